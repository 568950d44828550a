"""`lossless-classes`: Lossless on layers of five classes; the second of each pair is judged once, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Lossless
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks import minilm
from repurpose_opt_benchmarks.lossless_random import sparse_layer
from repurpose_opt_benchmarks.radix_net import radix_layer

_TUNE, _JUDGE = 0, 1


@dataclass(frozen=True)
class _Pair:
    """Two layers of one class and size, one to tune on, one to judge; `build(n, P, rng, which)` makes them."""

    kind: str
    detail: str
    n: int
    workers: int
    build: Callable[[int, int, np.random.Generator, int], sparse.csr_array]
    is_even: bool = True


def _random(density: float) -> Callable[..., sparse.csr_array]:
    return lambda n, P, rng, which: sparse_layer(n, P, density, None, rng)


def _planted(density: float, noise: float) -> Callable[..., sparse.csr_array]:
    return lambda n, P, rng, which: sparse_layer(n, P, density, noise, rng)


def _banded(width: int, degree: int) -> Callable[..., sparse.csr_array]:
    """Neuron i reads `degree` inputs within `width` of its hidden place; neurons are shuffled."""

    def build(n: int, P: int, rng: np.random.Generator, which: int) -> sparse.csr_array:
        rows = np.repeat(np.arange(n), degree)
        columns = (rows + rng.integers(-width, width + 1, len(rows))) % n
        return _pattern(rng.permutation(n)[rows], columns, n)

    return build


def _radix(radix: int, strides: tuple[int, int]) -> Callable[..., sparse.csr_array]:
    """One layer of a RadiX-Net (radix 2: a butterfly), neurons and inputs shuffled."""

    def build(n: int, P: int, rng: np.random.Generator, which: int) -> sparse.csr_array:
        return radix_layer(n, radix, strides[which])[rng.permutation(n)][:, rng.permutation(n)].tocsr()

    return build


def _trained(name: str, share: float) -> Callable[..., sparse.csr_array]:
    """A layer of MiniLM, in which this share of the weights, the largest, is kept."""
    return lambda n, P, rng, which: minilm.pruned_layer(name.format(which), share)


def _pattern(rows: NDArray[np.int64], columns: NDArray[np.int64], n: int) -> sparse.csr_array:
    weight = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n, n))
    weight.sum_duplicates()
    weight.data[:] = 1.0
    return weight


_PAIRS = (
    _Pair("random", "", 64, 2, _random(0.05)),
    _Pair("random", "", 64, 4, _random(0.05)),
    _Pair("random", "", 256, 8, _random(0.05)),
    _Pair("random", "", 1024, 8, _random(0.01)),
    _Pair("random", "", 1024, 16, _random(0.006), is_even=False),
    _Pair("random", "", 4096, 16, _random(0.002)),
    _Pair("planted", "little-noise", 64, 4, _planted(0.08, 0.1)),
    _Pair("planted", "", 256, 8, _planted(0.03, 0.35)),
    _Pair("planted", "", 1024, 8, _planted(0.015, 0.35), is_even=False),
    _Pair("planted", "", 4096, 16, _planted(0.003, 0.5)),
    _Pair("banded", "", 256, 4, _banded(24, 6), is_even=False),
    _Pair("banded", "", 2048, 8, _banded(100, 8)),
    _Pair("radix", "butterfly", 64, 4, _radix(2, (4, 16))),
    _Pair("radix", "net", 1024, 8, _radix(32, (1, 32))),
    _Pair("real", "up", 384, 8, _trained("encoder.layer.{}.intermediate.dense.weight", 0.01)),
    _Pair("real", "down", 1536, 4, _trained("encoder.layer.{}.output.dense.weight", 0.01), is_even=False),
)


class LosslessClasses:
    """Random, planted, banded, RadiX-Net and real layers with even and uneven capacities; half are judged once."""

    name = "lossless-classes"
    title = "Lossless by class: random, planted, banded, RadiX-Net, pruned real layers"
    description = (
        "Layers of 64 to 4,096 inputs on 2 to 16 workers, values of one byte, capacities tight: each the same, or "
        "uneven by up to four. Every class and size comes twice; the second, marked judge_once, is for the final "
        "comparison only. The real layers are MiniLM's feed-forward layers with the largest 1 % of their weights."
    )
    requires = minilm.REQUIRES
    settings = Settings()

    def __len__(self) -> int:
        return 2 * len(_PAIRS)

    def __iter__(self) -> Iterator[Instance]:
        for number, pair in enumerate(_PAIRS):
            for which in (_TUNE, _JUDGE):
                marks = (pair.kind, pair.detail, f"n{pair.n}", f"P{pair.workers}", "" if pair.is_even else "uneven")
                name = "-".join([*filter(None, marks), str(which)])
                yield Instance(name, partial(_built, pair, number, which), pair.kind, judge_once=which == _JUDGE)


def _built(pair: _Pair, number: int, which: int) -> tuple[LayerProblem, Lossless]:
    rng = np.random.default_rng([20261124, number, which])
    weight = pair.build(pair.n, pair.workers, rng, which)
    m = weight.shape[0]
    capacity = None if pair.is_even else uneven_capacity(m, pair.workers, rng)
    return LayerProblem.create(weight, pair.workers, capacity=capacity, value_bytes=1), Lossless()


def uneven_capacity(m: int, workers: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(P,) capacities that differ by up to four times and hold m neurons exactly."""
    share = rng.uniform(0.5, 2.0, workers)
    ends = np.rint(np.cumsum(share) / share.sum() * m).astype(np.int64)
    return np.diff(ends, prepend=0)
