"""`lossless-classes`: Lossless on layers of five classes; the second of each pair is judged once, at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Lossless
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks import minilm
from repurpose_opt_benchmarks.patterns import Pattern, banded, planted, radix, random, uneven_capacity

_TUNE, _JUDGE = 0, 1


@dataclass(frozen=True)
class _Pair:
    """Two layers of one class and size, one to tune on, one to judge, and the pattern of each."""

    kind: str
    detail: str
    n: int
    workers: int
    patterns: tuple[Pattern, Pattern]
    is_even: bool = True


def _twice(pattern: Pattern) -> tuple[Pattern, Pattern]:
    return pattern, pattern


def _trained(name: str, share: float) -> tuple[Pattern, Pattern]:
    """Layers of MiniLM, in which this share of the weights, the largest, is kept."""

    def of(number: int) -> Pattern:
        return lambda n, P, rng: minilm.pruned_layer(name.format(number), share)

    return of(_TUNE), of(_JUDGE)


_PAIRS = (
    _Pair("random", "", 64, 2, _twice(random(0.05))),
    _Pair("random", "", 64, 4, _twice(random(0.05))),
    _Pair("random", "", 256, 8, _twice(random(0.05))),
    _Pair("random", "", 1024, 8, _twice(random(0.01))),
    _Pair("random", "", 1024, 16, _twice(random(0.006)), is_even=False),
    _Pair("random", "", 4096, 16, _twice(random(0.002))),
    _Pair("planted", "little-noise", 64, 4, _twice(planted(0.08, 0.1))),
    _Pair("planted", "", 256, 8, _twice(planted(0.03, 0.35))),
    _Pair("planted", "", 1024, 8, _twice(planted(0.015, 0.35)), is_even=False),
    _Pair("planted", "", 4096, 16, _twice(planted(0.003, 0.5))),
    _Pair("banded", "", 256, 4, _twice(banded(24, 6)), is_even=False),
    _Pair("banded", "", 2048, 8, _twice(banded(100, 8))),
    _Pair("radix", "butterfly", 64, 4, (radix(2, 4), radix(2, 16))),
    _Pair("radix", "net", 1024, 8, (radix(32, 1), radix(32, 32))),
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
    weight = pair.patterns[which](pair.n, pair.workers, rng)
    m = weight.shape[0]
    capacity = None if pair.is_even else uneven_capacity(m, pair.workers, rng)
    return LayerProblem.create(weight, pair.workers, capacity=capacity, value_bytes=1), Lossless()
