"""swaps, tabu and chains of pruners: every figure of the tableau and every end against errors after refit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner
from hypothesis import given, settings
from hypothesis import strategies as st

from repurpose_opt import LayerProblem, Moments, SolveOptions, Termination, Volume, metrics, testing
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.pruning import load_pruner
from repurpose_opt.repair import refit
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Candidate
from repurpose_opt_solvers.reduced import WorkerProblem, worker_problems
from repurpose_opt_solvers.swaps_ import Swaps
from repurpose_opt_solvers.tableau import Tableau
from repurpose_opt_solvers.tabu_ import Tabu

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.4},
    "output_weight": {"noise": 0.4, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "blocks": {"noise": 0.4, **BLOCKS},
    "many_rows": {"m": 40, "noise": 0.4},
    "a_worker_without_inputs": {"noise": 0.4, "input_owner": [0, 0, 2, 2, 0]},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
LIMITS: dict[str, dict[str, float]] = {
    "budget": {"budget": 0.35},
    "price": {"transfer_price": 0.05},
    "max_nmse": {"max_nmse": 0.1},
}
each_limit = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


def error_of(problem: LayerProblem, owner: np.ndarray, worker: WorkerProblem, values: list[int]) -> float:
    """The layer's error after refit where one worker receives these values and no other receives anything."""
    transfers = np.zeros((problem.n, problem.P), dtype=bool)
    transfers[worker.value[values], worker.worker] = True
    return metrics.weighted_error(problem, owner, refit(problem, owner, transfers))


def assert_exact(tableau: Tableau, problem: LayerProblem, owner: np.ndarray) -> None:
    worker, held = tableau.problem, tableau.values
    now = error_of(problem, owner, worker, held)
    missing = [q for q in range(len(worker.value)) if q not in held]
    expected = np.zeros(len(worker.value))
    expected[missing] = [now - error_of(problem, owner, worker, [*held, q]) for q in missing]
    np.testing.assert_allclose(tableau.gains(), expected, atol=1e-9)
    left = [[q for q in held if q != gone] for gone in held]
    np.testing.assert_allclose(
        tableau.removal_costs(), [error_of(problem, owner, worker, some) - now for some in left], atol=1e-9
    )
    falls = np.full((len(held), len(worker.value)), -np.inf)
    for place, q in product(range(len(held)), missing):
        falls[place, q] = now - error_of(problem, owner, worker, [*left[place], q])
    np.testing.assert_allclose(tableau.swap_falls(), falls, atol=1e-9)


@each_layer
def test_the_reduced_problem_has_the_errors_of_the_layer(arguments: dict[str, Any]):
    problem = random_layer(seed=1, **arguments).problem
    owner = random_owner(problem)
    workers = worker_problems(problem, Volume(budget=0.5), owner)
    nothing = error_of(problem, owner, workers[0], [])
    assert sum(worker.energy for worker in workers) == pytest.approx(nothing)
    for worker in workers:
        assert worker.residual.shape[0] <= worker.residual.shape[1]
        some = list(range(0, len(worker.value), 2))
        assert worker.gain(np.array(some)) == pytest.approx(nothing - error_of(problem, owner, worker, some))


@each_layer
def test_a_tableau_knows_what_each_change_would_do(arguments: dict[str, Any]):
    problem = random_layer(seed=2, **arguments).problem
    owner = random_owner(problem)
    for worker in worker_problems(problem, Volume(budget=0.5), owner):
        tableau = Tableau(worker, [1])
        assert_exact(tableau, problem, owner)
        tableau.add(0)
        assert_exact(tableau, problem, owner)
        last = len(worker.value) - 1
        if last > 1:
            tableau.add(last)
        tableau.remove(1)
        assert_exact(tableau, problem, owner)
        for value in tableau.values.copy():
            tableau.remove(value)
        assert_exact(tableau, problem, owner)


@given(seed=st.integers(0, 10_000), changes=st.lists(st.integers(0, 9), min_size=70, max_size=150))
def test_a_tableau_does_not_drift(seed: int, changes: list[int]):
    """However many values came and went, also beyond what is updated before everything is computed anew."""
    problem = random_layer(seed=seed, m=8, n=15, noise=0.3).problem
    owner = random_owner(problem)
    worker = worker_problems(problem, Volume(budget=0.5), owner)[0]
    tableau = Tableau(worker, [])
    for value in changes:
        (tableau.remove if value in tableau.values else tableau.add)(value)
    fresh = Tableau(worker, tableau.values)
    np.testing.assert_allclose(tableau.gains(), fresh.gains(), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(tableau.removal_costs(), fresh.removal_costs(), rtol=1e-8, atol=1e-10)


def objective_of(problem: LayerProblem, formulation: Volume, owner: np.ndarray, transfers: np.ndarray) -> float:
    """Infinite where the limit is broken."""
    exchange = Exchange.of_transfers(transfers, problem.input_owner)
    weight = refit(problem, owner, transfers)
    if formulation.violations(problem, owner, exchange, weight):
        return np.inf
    return formulation.objective(problem, owner, exchange, weight)


def neighbours(problem: LayerProblem, transfers: np.ndarray) -> Iterator[np.ndarray]:
    """Every set of transfers with one more, one less, or one instead of another."""
    made = [(int(j), int(k)) for j, k in np.argwhere(transfers)]
    missing = [(int(j), int(k)) for j, k in np.argwhere(problem.remote & ~transfers)]
    for gone, new in product([None, *made], [None, *missing]):
        changed = transfers.copy()
        if gone is not None:
            changed[gone] = False
        if new is not None:
            changed[new] = True
        yield changed


@pytest.mark.parametrize("pruner", [Swaps(), Tabu()], ids=["swaps", "tabu"])
@each_layer
@each_limit
def test_no_single_change_is_better_than_the_answer(
    limit: dict[str, float], arguments: dict[str, Any], pruner: Swaps | Tabu
):
    problem = random_layer(seed=3, **{"value_bytes": [4, 6, 4, 12, 4], **arguments}).problem
    owner, formulation = random_owner(problem), Volume(**limit)
    nothing = Exchange.nothing(problem.n, problem.P)
    start = nothing if "max_nmse" not in limit else None
    answer = pruner.solve(problem, formulation, SolveOptions(), owner, start)
    assert answer.exchange is not None
    transfers = answer.exchange.transfers
    found = objective_of(problem, formulation, owner, transfers)
    assert np.isfinite(found)
    if "max_nmse" in limit:  # no transfer can be spared
        for gone in np.argwhere(transfers):
            fewer = transfers.copy()
            fewer[tuple(gone)] = False
            assert np.isinf(objective_of(problem, formulation, owner, fewer))
        return
    least = min(objective_of(problem, formulation, owner, some) for some in neighbours(problem, transfers))
    assert found <= least + 1e-9 * abs(least)


def trap() -> tuple[LayerProblem, np.ndarray, set[int]]:
    """Values 0 and 1 tell everything together; value 2, their noisy sum, tells most alone and is taken first."""
    random = np.random.default_rng(5)
    told = random.normal(size=(4000, 2))
    inputs = np.hstack([told, told.sum(axis=1, keepdims=True) + 0.3 * random.normal(size=(4000, 1))])
    problem = LayerProblem.create(
        np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0]]),
        2,
        input_owner=[0, 0, 0],
        moments=Moments.from_samples(inputs),
        value_bytes=1,
    )
    return problem, np.array([0, 1]), {0, 1}


@each_limit
def test_an_exchange_leads_out_of_the_trap_of_a_greedy(limit: dict[str, float]):
    problem, owner, best = trap()
    if "budget" in limit:
        limit = {"budget_bytes": 2}
    if "transfer_price" in limit:
        limit = {"transfer_price": 0.003}
    if "max_nmse" in limit:
        limit = {"max_nmse": 0.01}
    formulation = Volume(**limit)
    greedy = load_pruner("group-omp").solve(problem, formulation, SolveOptions(), owner)
    chained = load_pruner("group-omp+swaps").solve(problem, formulation, SolveOptions(), owner)
    assert greedy.exchange is not None
    assert chained.exchange is not None
    assert greedy.exchange.transfers[2, 1]
    assert set(np.flatnonzero(chained.exchange.transfers[:, 1])) == best


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000),
    limit=st.sampled_from(
        [{"budget": 0.2}, {"budget": 0.6}, {"transfer_price": 0.02}, {"max_nmse": 0.2}, {"max_nmse": 0.01}]
    ),
    arguments=st.sampled_from(list(LAYERS.values())),
)
def test_never_worse_than_the_start_and_never_better_than_the_least(
    seed: int, limit: dict[str, float], arguments: dict[str, Any]
):
    problem = random_layer(seed=seed, **arguments).problem
    owner, formulation = random_owner(problem), Volume(**limit)
    chains = ("group-omp", "group-omp+swaps", "group-omp+swaps+tabu", "group-l0")
    answers = [load_pruner(name).solve(problem, formulation, SolveOptions(), owner) for name in chains]
    before, after, last, least = (objective_of(problem, formulation, owner, c.exchange.transfers) for c in answers)
    assert after <= before + 1e-9 * abs(before)
    assert last <= after + 1e-9 * abs(after)
    assert last >= least * (1 - 1e-9) - 1e-9


def test_a_start_above_the_budget_is_cut_to_it():
    problem = random_layer(seed=6, noise=0.4).problem
    owner = random_owner(problem)
    everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
    answer = Swaps().solve(problem, Volume(budget=0.3), SolveOptions(), owner, everything)
    assert answer.exchange is not None
    assert 0 < metrics.volume(problem, answer.exchange) <= 0.3 * problem.direct_volume


def test_a_limit_that_cannot_be_met_leaves_the_start():
    problem = random_layer(seed=7, noise=0.4).problem  # x̂ is noisy: an error remains whatever is sent
    solution = solve_problem(problem, Volume(max_nmse=1e-4), partitioner="contiguous", pruner="group-omp+swaps")
    assert solution.termination is Termination.ERROR
    assert "max_nmse" in solution.message
    assert f"{solution.nmse:.4g}" in solution.message


class Worse:
    """A pruner that sends nothing, whatever was chosen before."""

    name = "worse"
    requires: tuple[str, ...] = ()

    def supports(self, problem: Any, formulation: Any) -> str | None:
        return "this one only refuses blocks" if not problem.one_column_per_value else None

    def solve(self, problem: Any, formulation: Any, options: Any, owner: Any, start: Any = None) -> Candidate:
        return Candidate(Termination.HEURISTIC, owner, Exchange.nothing(problem.n, problem.P))


def test_a_chain_keeps_the_best_and_names_who_declines():
    problem = random_layer(seed=8).problem
    with testing.registered("pruners", Worse()):
        alone = solve_problem(problem, Volume(budget=0.3), partitioner="contiguous", pruner="group-omp")
        chain = solve_problem(problem, Volume(budget=0.3), partitioner="contiguous", pruner="group-omp+worse")
        assert chain.objective == pytest.approx(alone.objective)
        assert chain.stats["pruner"] == "group-omp+worse"
        assert [asked["pruner"] for asked in chain.stats["pruners"]] == ["group-omp", "worse"]
        blocks = replace(problem, column_value=np.array([0, 1, 1, 2, 2]), input_owner=np.array([0, 1, 2]))
        declined = solve_problem(blocks, Volume(budget=0.3), partitioner="contiguous", pruner="group-omp+worse")
        assert declined.termination is Termination.UNSUPPORTED
        assert "worse: this one only refuses blocks" in declined.message


class Fails(Worse):
    """A pruner that breaks down."""

    name = "fails"

    def solve(self, *arguments: Any) -> Candidate:
        raise np.linalg.LinAlgError("singular")


def test_a_pruner_that_fails_loses_nothing():
    problem = random_layer(seed=8).problem
    with testing.registered("pruners", Fails()):
        alone = solve_problem(problem, Volume(budget=0.3), partitioner="contiguous", pruner="group-omp")
        chain = solve_problem(problem, Volume(budget=0.3), partitioner="contiguous", pruner="group-omp+fails")
    assert chain.objective == pytest.approx(alone.objective)
    assert chain.stats["pruners"][1] == {"pruner": "fails", "failed": "LinAlgError: singular"}


def test_a_chain_keeps_the_proof_of_any_of_its_pruners():
    problem = random_layer(seed=8).problem
    answer = load_pruner("group-omp+group-l0+swaps").solve(
        problem, Volume(budget=0.3), SolveOptions(), random_owner(problem)
    )
    assert answer.termination is Termination.OPTIMAL
    solution = solve_problem(problem, Volume(budget=0.3), partitioner="contiguous", pruner="group-omp+group-l0")
    assert solution.bound is None, "a proof for these owners is none for the layer"
    assert solution.stats["bound_given_owners"] == pytest.approx(solution.objective)


@pytest.mark.parametrize("name", ["group-omp+", "+swaps", ""])
def test_a_chain_with_a_gap_is_refused(name: str):
    with pytest.raises(InvalidArgument, match="pruner"):
        load_pruner(name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("limit", [{"budget": 0.3}, {"transfer_price": 1e6}, {"max_nmse": 0.01}], ids=str)
@pytest.mark.parametrize("what", ["blocks", "nothing", "no weight", "constant"])
def test_search_ends_where_nothing_can_be_gained(what: str, limit: dict[str, float]):
    """Rounding must not pass for a fall: the same transfer would come and go for ever."""
    random = np.random.default_rng(0)
    weight, inputs, arguments = random.normal(size=(6, 12)), random.normal(size=(400, 12)), {}
    owner = np.repeat(np.arange(3), 2)
    if what == "blocks":
        weight *= owner[:, None] == np.repeat(np.arange(3), 4)
    elif what == "nothing":
        weight[:] = 0
    elif what == "no weight":
        arguments = {"output_weight": np.zeros(6)}
    else:
        inputs[:] = 0.1
    problem = LayerProblem.create(weight, 3, moments=Moments.from_samples(inputs), **arguments)
    answer = load_pruner("group-omp+swaps+tabu").solve(problem, Volume(**limit), SolveOptions(), owner)
    assert answer.exchange is not None
    if "transfer_price" in limit:
        assert not answer.exchange.transfers.any()


def test_the_time_limit_is_kept_and_said():
    problem = random_layer(seed=9, m=30, n=60, noise=0.4).problem
    owner = random_owner(problem)
    answer = load_pruner("group-omp+swaps").solve(problem, Volume(budget=0.3), SolveOptions(time_limit=1e-6), owner)
    assert answer.termination is Termination.TIME_LIMIT
    assert answer.exchange is not None
    assert metrics.volume(problem, answer.exchange) <= 0.3 * problem.direct_volume
