"""`large`: layers of 4,096 to 16,384 neurons on 8 to 64 workers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Edge, Lossless, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.dense_layers import diagonal_moments, edge_price, planted_weight
from repurpose_opt_benchmarks.pairs import Built, Case, pairs
from repurpose_opt_benchmarks.patterns import (
    Pattern,
    banded,
    blocks,
    grid_convolution,
    planted_degree,
    power_law,
    radix,
    uneven_capacity,
)


def _sparse(kind: str, n: int, workers: int, pattern: Pattern, is_even: bool = True) -> Case:
    def build(rng: np.random.Generator) -> Built:
        capacity = None if is_even else uneven_capacity(n, workers, rng)
        return LayerProblem.create(pattern(n, workers, rng), workers, capacity=capacity, value_bytes=1), Lossless()

    return Case(f"{kind}-n{n}-P{workers}{'' if is_even else '-uneven'}", kind, build)


def _edge(n: int, workers: int, rng: np.random.Generator) -> Built:
    problem = _dense(n, workers, rng)
    price = edge_price(problem, 0.95)
    return problem, Edge(weight_price=price / 100, transfer_price=price)


def _volume(n: int, workers: int, rng: np.random.Generator) -> Built:
    return _dense(n, workers, rng), Volume(budget=0.05)


def _dense(n: int, workers: int, rng: np.random.Generator) -> LayerProblem:
    capacity = uneven_capacity(n, workers, rng)
    weight = planted_weight(n, n, workers, rng)
    return LayerProblem.create(weight, workers, capacity=capacity, moments=diagonal_moments(n, rng))


_CASES = (
    _sparse("random", 4096, 16, planted_degree(8, 1.0)),
    _sparse("planted", 8192, 32, planted_degree(10, 0.4), is_even=False),
    _sparse("banded", 8192, 16, banded(200, 8), is_even=False),
    _sparse("radix", 4096, 16, radix(64, 64)),
    _sparse("convolution", 16384, 32, grid_convolution(128, 3)),
    _sparse("blocks", 16384, 64, blocks(32, 0.25, 1.5)),
    _sparse("power-law", 16384, 64, power_law(6, 0.8), is_even=False),
    Case("edge-n4096-P8", "edge", partial(_edge, 4096, 8)),
    Case("volume-n4096-P16", "volume", partial(_volume, 4096, 16)),
)


class Large:
    """Sparse layers of up to 16,384 neurons, and two dense ones of 4,096."""

    name = "large"
    requires: tuple[str, ...] = ()
    settings = Settings(time_limit=10.0, memory_limit=8 * 2**30)
    title = "Large layers, 4,096 to 16,384 neurons on 8 to 64 workers"
    description = (
        "Lossless on sparse layers, random, planted, banded, RadiX-Net, convolution, blocks and power law, with even "
        "or uneven capacities; Edge, and Volume with a variance for each input, on dense layers of 4,096 × 4,096. "
        "10 s and 8 GiB a solve. Every case comes twice, the second judged once."
    )

    def __len__(self) -> int:
        return 2 * len(_CASES)

    def __iter__(self) -> Iterator[Instance]:
        return pairs(self.name, _CASES)
