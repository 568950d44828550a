"""`edge-random`: `Edge` on random dense layers with uneven capacities; the optimum is known by a flow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Edge
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem

_SIZES = ((64, 4), (128, 4), (256, 8), (512, 8), (1024, 8), (2048, 8), (4096, 8))
_SEEDS = range(2)
_BELOW_PRICE = 0.95
"""Share of the weights whose energy is below the transfer price."""
_SPARE = 0.1
"""Share of room beyond what the neurons need."""


class EdgeRandom:
    """RePurpose-style ℓ0 pruning of random layers, n = 64 … 4096."""

    name = "edge-random"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Edge on random layers, uneven capacities"
    description = (
        "Gaussian weights n × n, n = 64 to 4096, inputs of unequal variance, 4 or 8 workers whose capacities differ; "
        "the transfer price is above the energy of 95 % of the weights. Solved exactly by a flow."
    )

    def __len__(self) -> int:
        return len(_SIZES) * len(_SEEDS)

    def __iter__(self) -> Iterator[Instance]:
        for n, workers in _SIZES:
            for seed in _SEEDS:
                yield Instance(f"n{n}-P{workers}-{seed}", partial(edge_instance, n, workers, seed))


def edge_instance(n: int, workers: int, seed: int) -> tuple[LayerProblem, Edge]:
    """An n × n layer in float32, and the `Edge` whose transfer price is above the energy of 95 % of its weights."""
    rng = np.random.default_rng([seed, n, workers])
    weight = (rng.standard_normal((n, n), dtype=np.float32) / np.sqrt(n)).astype(np.float32)
    variance = rng.lognormal(size=n)
    capacity = uneven_capacities(rng, n, workers)
    problem = LayerProblem.create(weight, workers, capacity=capacity, value_bytes=1, moments=Moments.from_raw(variance))
    price = float(np.quantile(np.square(weight) * variance.astype(np.float32), _BELOW_PRICE))
    return problem, Edge(weight_price=0.01 * price, transfer_price=price)


def uneven_capacities(rng: np.random.Generator, neurons: int, workers: int) -> NDArray[np.int64]:
    """(workers,) whole capacities up to three times apart, with room for a tenth more than the neurons."""
    share = rng.uniform(1.0, 3.0, size=workers)
    return np.ceil(share / share.sum() * neurons * (1 + _SPARE)).astype(np.int64)
