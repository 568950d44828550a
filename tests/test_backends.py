"""What single backends promise beyond the conformance checks: order, randomness, quality on planted problems."""

from __future__ import annotations

import numpy as np
import pytest

from repurpose_opt import Edge, Formulation, LayerProblem, Lossless, SolveOptions, Termination, Volume, metrics
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import random_problem
from repurpose_opt_solvers.transport import nearest_placement


def owner_of(problem: LayerProblem, partitioner: str, seed: int = 0) -> np.ndarray:
    owner = solve_problem(problem, Lossless(), SolveOptions(seed=seed), partitioner=partitioner).require().owner
    assert owner is not None
    return owner


def test_contiguous_fills_the_workers_in_order_and_in_proportion_to_their_capacity():
    assert owner_of(random_problem(m=6, P=3), "contiguous").tolist() == [0, 0, 1, 1, 2, 2]
    assert owner_of(random_problem(m=8, P=3, capacity=[8, 4, 4]), "contiguous").tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert owner_of(random_problem(m=4, P=3, capacity=[2, 0, 2]), "contiguous").tolist() == [0, 0, 2, 2]
    loads = random_problem(m=4, P=2, load=[3, 1, 1, 1], capacity=3)
    assert owner_of(loads, "contiguous").tolist() == [0, 1, 1, 1]


def test_random_has_the_loads_of_contiguous_and_depends_on_the_seed():
    problem = random_problem(m=24, P=4, capacity=[12, 8, 4, 4])
    owners = [owner_of(problem, "random", seed) for seed in range(5)]
    assert len({tuple(owner) for owner in owners}) == 5
    contiguous = metrics.worker_load(problem, owner_of(problem, "contiguous"))
    for owner in owners:
        np.testing.assert_array_equal(metrics.worker_load(problem, owner), contiguous)


def test_the_nearest_placement_moves_as_little_load_as_it_must():
    problem = random_problem(m=6, P=3, capacity=[2, 2, 2])
    valid = np.array([2, 0, 1, 0, 2, 1])
    np.testing.assert_array_equal(nearest_placement(problem, valid).owner, valid)
    crowded = np.array([0, 0, 0, 0, 1, 1])
    moved = nearest_placement(problem, crowded).owner
    assert moved is not None
    assert (moved != crowded).sum() == 2
    unequal = random_problem(m=4, P=2, load=[5, 2, 2, 2], capacity=[7, 6])
    moved = nearest_placement(unequal, np.zeros(4, dtype=np.int64)).owner
    assert moved is not None
    assert unequal.load[moved == 1].sum() == 4


def test_the_cheaper_of_two_equally_near_placements_is_taken():
    problem = random_problem(m=3, P=2, capacity=[2, 1])
    cost = np.array([[0.0, 5.0], [0.0, 1.0], [0.0, 3.0]])
    moved = nearest_placement(problem, np.zeros(3, dtype=np.int64), cost).owner
    assert moved is not None
    assert moved.tolist() == [0, 1, 0]


def planted(seed: int, m: int = 32, n: int = 32, P: int = 4, noise: float = 0.02) -> tuple[LayerProblem, np.ndarray]:
    """Blocks of neurons and inputs that belong together, in random order, and a few weights between them."""
    random = np.random.default_rng(seed)
    owner, input_owner = random.permutation(np.arange(m) % P), random.permutation(np.arange(n) % P)
    together = owner[:, None] == input_owner
    weight = random.normal(size=(m, n)) * np.where(together, 1.0, random.random((m, n)) < noise)
    return random_problem(seed, m, n, P, weight=weight, input_owner=input_owner), owner


FORMULATIONS: dict[str, Formulation] = {
    "edge": Edge(weight_price=0.01, transfer_price=0.05),
    "volume": Volume(transfer_price=0.05),
    "lossless": Lossless(),
}


@pytest.mark.parametrize("partitioner", ["metis", "alternate", "munkres", "flow"])
@pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS)
def test_planted_blocks_are_found(partitioner: str, formulation: Formulation):
    for seed in range(3):
        problem, owner = planted(seed)
        hint = solve_problem(problem, formulation, partitioner="contiguous", start=owner).objective
        blind = solve_problem(problem, formulation, partitioner="contiguous").objective
        found = solve_problem(problem, formulation, partitioner=partitioner).objective
        assert found <= hint + 0.25 * (blind - hint)


def test_metis_depends_on_its_seed_only():
    problem = random_problem(3, m=64, n=48, P=4, weight=np.random.default_rng(3).normal(size=(64, 48)))
    owners = {seed: owner_of(problem, "metis", seed) for seed in range(6)}
    assert len({tuple(owner) for owner in owners.values()}) > 1
    assert all((owner_of(problem, "metis", seed) == owner).all() for seed, owner in owners.items())


def test_brute_force_refuses_what_is_too_many_cases_to_count() -> None:
    solution = solve_problem(random_problem(m=2000, n=2, P=4), Lossless(), partitioner="brute-force")
    assert solution.termination is Termination.UNSUPPORTED
    assert "10^1204.1 cases" in solution.message
