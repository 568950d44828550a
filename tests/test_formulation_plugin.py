"""A formulation of one's own: a value that any other worker reads is broadcast, and paid for once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from repurpose_opt import Exchange, Formulation, LayerProblem, Termination
from repurpose_opt.auto import auto_partitioner, auto_pruner
from repurpose_opt.formulation import incidence
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import check_formulation, least_objective, partitioner_checks, pruner_checks, random_problem

SERVES_ALL = ["contiguous", "random", "brute-force", "munkres", "flow", "alternate"]


@dataclass(frozen=True)
class Broadcast(Formulation):
    """Σ_j bytes_j [some worker other than its owner reads value j]; nothing is pruned. Three methods, no more."""

    name = "broadcast"

    def objective(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: NDArray[np.float64]
    ) -> float:
        return float(problem.value_bytes[exchange.transfers.any(axis=1)].sum())

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        """The bytes of the values that a neuron would be the first to read remotely."""
        bytes_left = problem.transfer_bytes.copy()
        if exchange is not None:
            bytes_left[exchange.transfers.any(axis=1)] = 0
        return np.asarray(incidence(problem) @ bytes_left)

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        needed = np.asarray(incidence(problem).T @ np.eye(problem.P)[owner]) > 0
        return Exchange.of_transfers(needed & problem.remote, problem.input_owner)

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: NDArray[np.float64]
    ) -> tuple[str, ...]:
        return () if abs(weight - problem.weight).sum() == 0 else ("a weight is missing",)


def thin_problem(seed: int, m: int = 6, n: int = 4, P: int = 2, density: float = 0.35) -> LayerProblem:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(m, n)) * (random.random(size=(m, n)) < density)
    return random_problem(seed, m, n, P, weight=weight, value_bytes=random.integers(1, 9, n), capacity=m // P + 1)


def by_hand(problem: LayerProblem, owner: NDArray[np.int64]) -> int:
    readers = [{int(owner[i]) for i in range(problem.m) if problem.weight[i, j]} for j in range(problem.n)]
    return sum(int(problem.value_bytes[j]) for j in range(problem.n) if readers[j] - {int(problem.input_owner[j])})


@pytest.mark.parametrize("seed", range(10))
def test_every_formulation_free_backend_solves_it(seed: int):
    problem = thin_problem(seed)
    least = least_objective(problem, Broadcast())
    for name in SERVES_ALL:
        solution = solve_problem(problem, Broadcast(), partitioner=name).require()
        assert solution.owner is not None
        assert solution.violations == (), name
        assert solution.objective == by_hand(problem, solution.owner), name
        assert solution.objective >= least, name
        if name == "brute-force":
            assert solution.objective == least
            assert solution.termination is Termination.OPTIMAL
        else:
            assert solution.termination is Termination.HEURISTIC, f"{name} has no proof for this formulation"


def test_alternate_is_better_than_not_looking():
    found = {name: 0.0 for name in ("random", "alternate")}
    for seed in range(10):
        problem = thin_problem(seed, m=24, n=16, P=4, density=0.08)
        for name in found:
            found[name] += solve_problem(problem, Broadcast(), partitioner=name).objective
    assert found["alternate"] < 0.95 * found["random"]


def test_backends_that_know_only_some_formulations_say_so():
    for name in ("metis", "compensated"):
        solution = solve_problem(thin_problem(0), Broadcast(), partitioner=name)
        assert solution.termination is Termination.UNSUPPORTED
        assert solution.message.startswith(name)


def test_auto_serves_it():
    problem = thin_problem(0)
    assert auto_partitioner(problem, Broadcast()) == "alternate"
    assert auto_pruner(problem, Broadcast()) == "threshold"
    assert solve_problem(problem, Broadcast()).violations == ()


def test_it_passes_the_public_checks():
    check_formulation(Broadcast())


@pytest.mark.parametrize("name", ["contiguous", "alternate", "munkres", "brute-force"])
def test_backends_pass_the_public_checks_on_it(name: str):
    from repurpose_opt import registry

    backend = registry.load("partitioners", name)()
    reasons = {check_name: check() for check_name, check in partitioner_checks(backend, {"broadcast": Broadcast()})}
    assert reasons["oracle-identity-broadcast"] is None
    assert [reason for reason in reasons.values() if reason is None]


def test_the_threshold_pruner_passes_the_public_checks_on_it():
    from repurpose_opt import registry

    for name, check in pruner_checks(registry.load("pruners", "threshold")(), {"broadcast": Broadcast()}):
        assert check() is None, name
