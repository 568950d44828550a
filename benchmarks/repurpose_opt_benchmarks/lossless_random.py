"""`lossless-random`: sparse layers, random or with planted blocks, whose volume is to be minimised unpruned."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Lossless
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.patterns import sparse_layer

# Few consumers per worker and input: denser instances saturate, and every method is near the maximum there.
_SIZES = (
    ("random", 64, 4, 0.05),
    ("random", 256, 8, 0.05),
    ("planted", 256, 8, 0.03),
    ("random", 1024, 8, 0.01),
    ("planted", 1024, 8, 0.015),
)
_SEEDS = range(2)
_NOISE = 0.35
"""Share of a planted instance's nonzeros that lie anywhere."""


class LosslessRandom:
    """Hypergraph partitioning with fixed terminals, n = 64 … 1024."""

    name = "lossless-random"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Lossless on sparse layers, random and planted"
    description = (
        "Sparse n × n layers, n = 64 to 1024, on 4 or 8 workers, values of one byte. `random`: nonzeros anywhere. "
        "`planted`: most nonzeros of a neuron read the inputs of one hidden worker, so a good placement exists."
    )

    def __len__(self) -> int:
        return len(_SIZES) * len(_SEEDS)

    def __iter__(self) -> Iterator[Instance]:
        for kind, n, workers, density in _SIZES:
            for seed in _SEEDS:
                build = partial(_instance, n, workers, density, kind == "planted", seed)
                yield Instance(f"{kind}-n{n}-P{workers}-{seed}", build, kind)


def _instance(n: int, workers: int, density: float, planted: bool, seed: int) -> tuple[LayerProblem, Lossless]:
    return lossless_problem(n, workers, density, planted=planted, seed=seed), Lossless()


def lossless_problem(n: int, workers: int, density: float, *, planted: bool, seed: int) -> LayerProblem:
    """An n × n sparse layer on workers with contiguous inputs, values of one byte."""
    # The sizes are part of the seed, so that a partitioner with the same seed does not draw the hidden placement.
    rng = np.random.default_rng([seed, n, workers])
    weight = sparse_layer(n, workers, density, _NOISE if planted else None, rng)
    return LayerProblem.create(weight, workers, input_owner=np.arange(n) * workers // n, value_bytes=1)
