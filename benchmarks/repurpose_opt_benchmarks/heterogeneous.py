"""`heterogeneous`: uneven workers, links, neurons and values, for all three formulations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
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
"""Keywords of LayerProblem.create."""
Unevenness = Callable[[int, int, int, np.random.Generator], Limits]
"""(m, n, P, rng) → what is uneven."""
Objective = Callable[[LayerProblem], Formulation]
_SPARE = 1.15
"""Room relative to the load, where loads differ or places are forbidden."""


# Links


def two_racks(P: int) -> NDArray[np.float64]:
    """(P, P) a byte inside a rack, of half of the workers, costs 1, between racks 8."""
    rack = np.arange(P) * 2 // P
    return np.where(rack[:, None] == rack, 1.0, 8.0)


def star(P: int) -> NDArray[np.float64]:
    """(P, P) a byte to or from worker 0, the hub, costs 1, through the hub 2."""
    prices = np.full((P, P), 2.0)
    prices[0] = prices[:, 0] = 1.0
    return prices


def random_links(P: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(P, P) prices of 0.5 to 4 in quarters, another one each way."""
    return rng.integers(2, 17, size=(P, P)) / 4


# What is uneven


def capacities(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    return {"capacity": uneven_capacity(m, P, rng)}


def holder_without_room(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    """Worker 0 holds inputs and takes no neuron, as a sensor does."""
    return {"capacity": np.array([0, *np.full(P - 1, -(-m // (P - 1)))])}


def loads(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    """Neurons of load 1 to 5, every worker at least half full."""
    load = rng.integers(1, 6, size=m)
    share = load.sum() / P
    return {"load": load, "capacity": np.full(P, np.ceil(_SPARE * share)), "min_load": np.full(P, np.floor(share / 2))}


def places(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    """A tenth of the neurons are pinned, each of the others may not be on about a quarter of the workers."""
    home = np.arange(m) % P
    allowed = rng.random((m, P)) < 0.75
    allowed[rng.random(m) < 0.1] = False
    allowed[np.arange(m), rng.permutation(home)] = True
    return {"allowed": allowed, "capacity": np.full(P, np.ceil(_SPARE * m / P))}


def racks(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    return {"link_price": two_racks(P)}


def hub(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    """A star whose hub has room for twice as many neurons as a leaf."""
    share = -(-m // (P + 1))
    return {"link_price": star(P), "capacity": np.array([m - (P - 1) * share, *np.full(P - 1, share)])}


def links(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    return {"link_price": random_links(P, rng), **capacities(m, n, P, rng)}


def values(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    """Values of 1, 4, 16 and 64 bytes; inputs held anywhere, by some workers more than by others."""
    owner = np.searchsorted(np.cumsum(uneven_capacity(n, P, rng)), np.arange(n), side="right")
    return {"value_bytes": rng.choice([1, 4, 16, 64], size=n), "input_owner": rng.permutation(owner)}


def everything(m: int, n: int, P: int, rng: np.random.Generator) -> Limits:
    allowed = places(m, n, P, rng)
    load = loads(m, n, P, rng)
    room = {"capacity": np.ceil(rng.uniform(1.3, 2.0, size=P) * load["load"].sum() / P)}
    return {**values(m, n, P, rng), "link_price": random_links(P, rng), **allowed, **load, **room}


# Objectives


def _lossless(problem: LayerProblem) -> Formulation:
    return Lossless()


def _lossless_busiest(problem: LayerProblem) -> Formulation:
    return Lossless(communication="busiest")


def _edge(problem: LayerProblem) -> Formulation:
    price = edge_price(problem, 0.9)
    return Edge(weight_price=price / 100, transfer_price=price)


def _budget(problem: LayerProblem) -> Formulation:
    return Volume(budget=0.1)


def _price(problem: LayerProblem) -> Formulation:
    return Volume(transfer_price=price_of(problem, 1.0))


def _busiest(problem: LayerProblem) -> Formulation:
    return Volume(budget=0.1, communication="busiest")


_OBJECTIVES: dict[str, Objective] = {
    "lossless": _lossless,
    "lossless-busiest": _lossless_busiest,
    "edge": _edge,
    "volume-budget": _budget,
    "volume-price": _price,
    "volume-busiest": _busiest,
}


def _case(objective: str, uneven: Unevenness, n: int, workers: int) -> Case:
    """A sparse planted layer for Lossless; a dense one with a variance for each input for Edge, full moments else."""

    def build(rng: np.random.Generator) -> Built:
        limits = uneven(n, n, workers, rng)
        if objective.startswith("lossless"):
            weight, moments = planted_degree(8, 0.4)(n, workers, rng), None
        else:
            weight = planted_weight(n, n, workers, rng)
            moments = (diagonal_moments if objective == "edge" else correlated_moments)(n, rng)
        problem = LayerProblem.create(weight, workers, moments=moments, **{"value_bytes": 4, **limits})
        return problem, _OBJECTIVES[objective](problem)

    return Case(f"{objective}-{uneven.__name__.replace('_', '-')}-n{n}-P{workers}", objective.split("-")[0], build)


_CASES = (
    _case("lossless", capacities, 128, 6),
    _case("lossless", holder_without_room, 256, 5),
    _case("lossless", loads, 96, 4),
    _case("lossless", loads, 512, 8),
    _case("lossless", places, 256, 8),
    _case("lossless", racks, 64, 4),
    _case("lossless", racks, 1024, 16),
    _case("lossless", hub, 256, 6),
    _case("lossless", links, 512, 8),
    _case("lossless", values, 256, 8),
    _case("lossless", everything, 32, 3),
    _case("lossless", everything, 512, 8),
    _case("lossless-busiest", racks, 64, 4),
    _case("lossless-busiest", capacities, 256, 8),
    _case("edge", loads, 64, 4),
    _case("edge", loads, 512, 8),
    _case("edge", places, 256, 8),
    _case("edge", racks, 512, 8),
    _case("edge", links, 1024, 8),
    _case("edge", everything, 128, 5),
    _case("volume-budget", capacities, 128, 4),
    _case("volume-budget", holder_without_room, 128, 5),
    _case("volume-budget", values, 256, 6),
    _case("volume-budget", everything, 96, 4),
    _case("volume-price", racks, 32, 4),
    _case("volume-price", racks, 256, 8),
    _case("volume-price", hub, 128, 6),
    _case("volume-price", everything, 64, 4),
    _case("volume-busiest", capacities, 128, 4),
)


class Heterogeneous:
    """Uneven capacities, loads, places, links and value sizes, for all three formulations."""

    name = "heterogeneous"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Uneven workers, links, neurons and values"
    description = (
        "Layers of 32 to 1,024 neurons on 3 to 16 workers. Capacities that differ by up to four, a worker that holds "
        "data only, loads of 1 to 5 with least loads, pinned neurons and forbidden places; links of two racks (eight "
        "times dearer between them), of a star and with random prices; values of 1 to 64 bytes; and everything at "
        "once. Every case comes twice, the second judged once."
    )

    def __len__(self) -> int:
        return 2 * len(_CASES)

    def __iter__(self) -> Iterator[Instance]:
        return pairs(self.name, _CASES)
