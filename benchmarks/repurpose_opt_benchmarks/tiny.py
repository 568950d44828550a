"""`tiny`: problems small enough to enumerate, for every formulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from scipy import sparse

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem

_SEEDS = range(3)


class Tiny:
    """All formulations at a size that brute force proves in a second."""

    name = "tiny"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Tiny problems of every formulation"
    description = (
        "4 to 8 neurons on 2 or 3 workers, with uneven capacities, link prices, value sizes, forbidden places, "
        "unequal loads and full moments; brute force gives the optimum of each."
    )

    def __len__(self) -> int:
        return len(_KINDS) * len(_SEEDS)

    def __iter__(self) -> Iterator[Instance]:
        for name in _KINDS:
            for seed in _SEEDS:
                yield Instance(f"{name}-{seed}", partial(_instance, name, seed))


def _instance(name: str, seed: int) -> tuple[LayerProblem, Formulation]:
    formulation, create = _KINDS[name]
    return create(np.random.default_rng(seed)), formulation


def _plain(rng: np.random.Generator) -> LayerProblem:
    """8 neurons on 2 workers, capacities 5 and 4."""
    return LayerProblem.create(
        rng.normal(size=(8, 6)), 2, capacity=[5, 4], value_bytes=1, moments=_diagonal_moments(rng, 6)
    )


def _uneven(rng: np.random.Generator) -> LayerProblem:
    """6 neurons on 3 workers, with everything that a problem may have."""
    prices = rng.uniform(0.5, 2.0, size=(3, 3))
    allowed = np.ones((6, 3), dtype=bool)
    allowed[0, 0] = allowed[1, 2] = False
    return LayerProblem.create(
        rng.normal(size=(6, 6)),
        3,
        input_owner=rng.permutation([0, 0, 0, 1, 1, 2]),
        capacity=[3, 2, 2],
        min_load=[1, 0, 1],
        allowed=allowed,
        value_bytes=rng.integers(1, 4, size=6),
        link_price=prices,
        output_weight=rng.uniform(0.5, 2.0, size=6),
        moments=_diagonal_moments(rng, 6),
    )


def _unequal_loads(rng: np.random.Generator) -> LayerProblem:
    """6 neurons of loads 1 to 3 on 2 workers."""
    load = rng.permutation([1, 1, 2, 2, 3, 3])
    return LayerProblem.create(rng.normal(size=(6, 6)), 2, load=load, capacity=[7, 7], value_bytes=1)


def _correlated(rng: np.random.Generator) -> LayerProblem:
    """4 neurons on 2 workers, 5 inputs with full moments: every set of transfers has its own refit."""
    mixed = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    return LayerProblem.create(rng.normal(size=(4, 5)), 2, value_bytes=1, moments=Moments.from_samples(mixed))


def _sparse(rng: np.random.Generator) -> LayerProblem:
    """7 neurons on 3 workers that read two of nine inputs each."""
    return LayerProblem.create(_two_inputs_each(rng), 3, value_bytes=1)


def _sparse_uneven(rng: np.random.Generator) -> LayerProblem:
    """The same with uneven capacities, link prices and value sizes."""
    return LayerProblem.create(
        _two_inputs_each(rng),
        3,
        capacity=[4, 2, 2],
        link_price=rng.uniform(0.5, 2.0, size=(3, 3)),
        value_bytes=rng.integers(1, 4, size=9),
    )


def _two_inputs_each(rng: np.random.Generator) -> sparse.csr_array:
    weight = np.zeros((7, 9))
    weight[rng.permutation(7), :7] = np.eye(7)
    weight[np.arange(7), rng.integers(7, 9, size=7)] = 1.0
    return sparse.csr_array(weight)


def _diagonal_moments(rng: np.random.Generator, columns: int) -> Moments:
    return Moments.from_raw(rng.uniform(0.2, 2.0, size=columns))


_KINDS: dict[str, tuple[Formulation, Callable[[np.random.Generator], LayerProblem]]] = {
    "edge": (Edge(weight_price=0.05, transfer_price=0.4), _plain),
    "edge-uneven": (Edge(weight_price=0.05, transfer_price=0.2), _uneven),
    "edge-unequal-loads": (Edge(transfer_price=0.3), _unequal_loads),
    "volume-price": (Volume(transfer_price=0.8), _uneven),
    "volume-budget": (Volume(budget=0.3), _plain),
    "volume-max-nmse": (Volume(max_nmse=0.1), _plain),
    "volume-correlated-price": (Volume(transfer_price=1.0), _correlated),
    "volume-correlated-budget": (Volume(budget=0.4), _correlated),
    "volume-correlated-max-nmse": (Volume(max_nmse=0.02), _correlated),
    "lossless": (Lossless(), _sparse),
    "lossless-uneven": (Lossless(), _sparse_uneven),
}
