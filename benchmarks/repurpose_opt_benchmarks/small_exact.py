"""`small-exact`: layers that exact backends can prove, the larger ones only by the better backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.dense_layers import (
    correlated_moments,
    diagonal_moments,
    edge_price,
    planted_weight,
    price_of,
)
from repurpose_opt_benchmarks.pairs import Built, Case, pairs
from repurpose_opt_benchmarks.patterns import planted_degree, uneven_capacity

Limits = dict[str, Any]


def _lossless(n: int, P: int, degree: int, noise: float, is_even: bool = True, communication: str = "total") -> Case:
    def build(rng: np.random.Generator) -> Built:
        weight = planted_degree(degree, noise)(n, P, rng)
        capacity = None if is_even else uneven_capacity(n, P, rng)
        problem = LayerProblem.create(weight, P, capacity=capacity, value_bytes=1)
        return problem, Lossless(communication=communication)

    marks = ("lossless", "busiest" if communication == "busiest" else "", f"n{n}-d{degree}-P{P}")
    return Case("-".join(filter(None, (*marks, "" if is_even else "uneven"))), "lossless", build)


def _edge(n: int, P: int, limits: Callable[[int, int, np.random.Generator], Limits], detail: str) -> Case:
    def build(rng: np.random.Generator) -> Built:
        weight, moments = planted_weight(n, n, P, rng), diagonal_moments(n, rng)
        problem = LayerProblem.create(weight, P, moments=moments, value_bytes=1, **limits(n, P, rng))
        price = edge_price(problem, 0.7)
        return problem, Edge(weight_price=price / 100, transfer_price=price)

    return Case(f"edge-{detail}-n{n}-P{P}", "edge", build)


def _uneven(n: int, P: int, rng: np.random.Generator) -> Limits:
    return {"capacity": uneven_capacity(n, P, rng)}


def _loads(n: int, P: int, rng: np.random.Generator) -> Limits:
    """Loads 1 to 9 that fill the workers: generalised assignment, with no slack to speak of."""
    load = rng.integers(1, 10, size=n)
    return {"load": load, "capacity": np.full(P, np.ceil(load.sum() / P) + 1)}


def _volume(
    size: tuple[int, int, int],
    formulation: Callable[[LayerProblem], Formulation],
    detail: str,
    moments: Callable[[int, np.random.Generator], Moments] = diagonal_moments,
    are_owners_given: bool = False,
) -> Case:
    """With the owners given every neuron has a single place, so that a proof for these owners is a proof."""
    m, n, P = size

    def build(rng: np.random.Generator) -> Built:
        weight = planted_weight(m, n, P, rng)
        allowed = None
        if are_owners_given:
            allowed = rng.permutation(np.arange(m) * P // m)[:, None] == np.arange(P)
        problem = LayerProblem.create(weight, P, moments=moments(n, rng), value_bytes=1, allowed=allowed)
        return problem, formulation(problem)

    return Case(f"volume-{detail}-m{m}-n{n}-P{P}", "volume", build)


def _price(problem: LayerProblem) -> Formulation:
    return Volume(transfer_price=price_of(problem, 2.0))


def _budget(problem: LayerProblem) -> Formulation:
    return Volume(budget=0.2)


def _max_nmse(problem: LayerProblem) -> Formulation:
    return Volume(max_nmse=0.05)


_CASES = (
    _lossless(12, 2, 3, 0.5),
    _lossless(16, 3, 3, 0.5, is_even=False),
    _lossless(24, 3, 3, 0.4),
    _lossless(24, 4, 4, 0.5, is_even=False),
    _lossless(32, 2, 5, 0.7),
    _lossless(24, 4, 5, 0.5),
    _lossless(32, 4, 4, 0.35),
    _lossless(40, 2, 5, 0.6, is_even=False),
    _lossless(40, 4, 4, 0.5),
    _lossless(16, 3, 3, 0.5, communication="busiest"),
    _lossless(24, 4, 3, 0.5, communication="busiest"),
    _edge(32, 4, _uneven, "uneven"),
    _edge(16, 2, _loads, "loads"),
    _edge(24, 3, _loads, "loads"),
    _edge(40, 4, _loads, "loads"),
    _volume((12, 12, 2), _price, "price"),
    _volume((16, 16, 3), _price, "price"),
    _volume((24, 16, 4), _price, "price"),
    _volume((12, 12, 2), _budget, "budget"),
    _volume((16, 12, 2), _budget, "budget"),
    _volume((16, 16, 3), _budget, "budget"),
    _volume((16, 24, 2), _price, "owners-given-price", correlated_moments, are_owners_given=True),
    _volume((24, 24, 3), _budget, "owners-given-budget", correlated_moments, are_owners_given=True),
    _volume((40, 24, 4), _max_nmse, "owners-given-max-nmse", correlated_moments, are_owners_given=True),
)


class SmallExact:
    """12 to 40 neurons on 2 to 4 workers: optimality in seconds, but not for every backend."""

    name = "small-exact"
    requires: tuple[str, ...] = ()
    settings = Settings(time_limit=10.0)
    title = "Small layers of every formulation that can be proved"
    description = (
        "12 to 40 neurons on 2 to 4 workers with even or uneven capacities, values of one byte. Lossless on planted "
        "layers, total and busiest; Edge with uneven capacities or tight loads; Volume with a variance for each input, "
        "and with full moments where the owners are given. Every case comes twice, the second judged once."
    )

    def __len__(self) -> int:
        return 2 * len(_CASES)

    def __iter__(self) -> Iterator[Instance]:
        return pairs(self.name, _CASES)
