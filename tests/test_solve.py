"""`solve_layer`: chains, starts, deadlines, and what is believed of a backend's claims."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from conftest import random_layer, random_owner
from numpy.typing import NDArray

from repurpose_opt import (
    Candidate,
    Edge,
    Exchange,
    Formulation,
    LayerProblem,
    LayerSolution,
    Lossless,
    SolveOptions,
    Termination,
    Values,
    Volume,
    metrics,
    solve_layer,
)
from repurpose_opt.errors import NoSolution
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Deadline, Prune
from repurpose_opt.testing import random_problem, registered

EDGE = Edge(weight_price=0.1, transfer_price=0.05)
FORMULATIONS: dict[str, Formulation] = {
    "edge": EDGE,
    "volume-price": Volume(transfer_price=0.03),
    "volume-budget": Volume(budget=0.3),
    "volume-nmse": Volume(max_nmse=0.1),
    "lossless": Lossless(),
}
each_formulation = pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS)

Solve = Callable[[LayerProblem, Formulation, SolveOptions, "NDArray[np.int64] | None", Prune], Candidate]


class Backend:
    """A partitioner made of one function."""

    requires: tuple[str, ...] = ()

    def __init__(self, name: str, solve: Solve) -> None:
        self.name = name
        self.solve = solve

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return None


def answers(name: str, candidate: Candidate) -> Backend:
    return Backend(name, lambda *arguments: candidate)


@pytest.fixture
def register() -> Iterator[Callable[[Backend], str]]:
    """Makes backends known by their name until the test ends."""
    with ExitStack() as stack:
        yield lambda backend: stack.enter_context(registered("partitioners", backend))


@pytest.fixture
def problem() -> LayerProblem:
    return random_layer(seed=1, m=8, n=6, P=2).problem


@pytest.fixture
def owner(problem: LayerProblem) -> NDArray[np.int64]:
    return random_owner(problem)


# ----------------------------------------------------------------------------------------------- chains and starts


@each_formulation
@pytest.mark.parametrize("first", ["contiguous", "random", "munkres", "metis"])
def test_a_later_stage_never_makes_it_worse(formulation: Formulation, first: str):
    problem = random_layer(seed=2, m=16, n=12, P=4).problem
    alone = solve_problem(problem, formulation, partitioner=first).require()
    chained = solve_problem(problem, formulation, partitioner=f"{first}+alternate").require()
    assert chained.objective <= alone.objective
    assert chained.violations == ()
    if chained.termination is not Termination.OPTIMAL:
        assert [stage["stage"] for stage in chained.stats["stages"]] == [first, "alternate"]


def test_a_later_stage_makes_some_better():
    problem = random_layer(seed=2, m=16, n=12, P=4).problem
    for formulation in (EDGE, Volume(budget=0.3), Lossless()):
        problem = replace(problem, weight=problem.weight * (np.abs(problem.weight) > 1))
        alone = solve_problem(problem, formulation, partitioner="contiguous")
        assert solve_problem(problem, formulation, partitioner="contiguous+alternate").objective < alone.objective


@each_formulation
@pytest.mark.parametrize("partitioner", ["random", "contiguous", "alternate", "metis"])
def test_a_start_is_never_made_worse(formulation: Formulation, partitioner: str):
    problem, good = good_answer(formulation)
    answer = solve_problem(problem, formulation, partitioner=partitioner, start=good.owner)
    assert answer.objective <= good.objective
    assert answer.stats["stages"][0]["stage"] == "start"


@cache
def good_answer(formulation: Formulation) -> tuple[LayerProblem, LayerSolution]:
    problem = random_layer(seed=3, m=12, n=8, P=3).problem
    return problem, solve_problem(problem, formulation, partitioner="flow+alternate").require()


def test_a_start_may_be_a_list_and_is_not_changed(problem: LayerProblem):
    start = [0, 1] * 4
    solve_problem(problem, EDGE, partitioner="random", start=start)
    assert start == [0, 1] * 4


def test_each_stage_starts_from_the_best_so_far(problem: LayerProblem, register: Callable[[Backend], str]):
    seen = []

    def look(*arguments: Any) -> Candidate:
        seen.append(arguments[3])
        return Candidate(Termination.UNSUPPORTED, message="only looking")

    register(Backend("look", look))
    best = solve_problem(problem, Lossless(), partitioner="flow").require()
    solution = solve_problem(problem, Lossless(), partitioner="look+flow+look+contiguous+look")
    assert seen[0] is None
    assert (seen[1] == best.owner).all()
    assert solution.objective <= best.objective
    assert len(solution.stats["stages"]) == 5


def test_a_proof_ends_the_chain():
    problem = random_layer(seed=4).problem
    solution = solve_problem(problem, EDGE, partitioner="munkres+contiguous")
    assert solution.termination is Termination.OPTIMAL
    assert [stage["stage"] for stage in solution.stats["stages"]] == ["munkres"]
    assert solution.gap == pytest.approx(0.0, abs=1e-6)


def test_a_stage_that_does_not_support_the_problem_is_passed_over():
    problem = random_problem(m=6, load=[1, 1, 1, 2, 2, 3], capacity=6)
    alone = solve_problem(problem, EDGE, partitioner="munkres")
    assert alone.termination is Termination.UNSUPPORTED
    assert "equal loads" in alone.message
    chained = solve_problem(problem, EDGE, partitioner="munkres+alternate").require()
    assert chained.violations == ()
    assert [stage["termination"] for stage in chained.stats["stages"]] == ["unsupported", "heuristic"]


def test_the_pruner_that_does_not_support_the_formulation_says_so(problem: LayerProblem):
    solution = solve_problem(problem, Lossless(), partitioner="contiguous", pruner="group-omp")
    assert solution.termination is Termination.UNSUPPORTED
    assert "group-omp" in solution.message
    with pytest.raises(NoSolution, match="group-omp"):
        _ = solution.objective


# ----------------------------------------------------------------------------------------------------- alternation


def recorded(
    problem: LayerProblem, formulation: Formulation, start: NDArray[np.int64], partitioner: str = "compensated"
) -> tuple[LayerSolution, list[LayerSolution]]:
    """The answer of the alternation, and what each of its rounds reached, by a pruner that records its calls."""
    from repurpose_opt_solvers.threshold_ import Threshold

    class Recorder(Threshold):
        name = "recorder"
        seen: list[NDArray[np.int64]] = []  # noqa: RUF012

        def solve(
            self, problem: LayerProblem, formulation: Formulation, options: SolveOptions, owner: Any, start: Any = None
        ) -> Candidate:
            self.seen.append(np.array(owner))
            return super().solve(problem, formulation, options, owner)

    recorder = Recorder()
    with registered("pruners", recorder) as name:
        answer = solve_problem(problem, formulation, partitioner=partitioner, pruner=name, start=start)
    every_place = np.eye(problem.P, dtype=bool)
    pinned = [replace(problem, allowed=every_place[owner]) for owner in recorder.seen]
    return answer, [solve_problem(fixed, formulation, partitioner="contiguous", pruner="threshold") for fixed in pinned]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("formulation", [Volume(budget=0.2), Volume(transfer_price=0.05)], ids=["budget", "price"])
def test_the_objective_falls_from_round_to_round_until_the_last(seed: int, formulation: Formulation):
    problem = random_layer(seed, m=16, n=12, P=4).problem
    answer, rounds = recorded(problem, formulation, random_owner(problem))
    objectives = [solution.objective for solution in rounds]
    accepted = objectives[:-1]  # the last round is the one that was not accepted, or found nothing new
    assert len(objectives) >= 2
    assert all(after < before for before, after in pairwise(accepted)), objectives
    assert answer.objective == min(objectives)


@pytest.mark.parametrize("seed", range(4))
def test_the_damped_alternation_keeps_the_best_of_its_rounds(seed: int):
    problem = random_layer(seed, m=24, n=16, P=4, density=0.15).problem
    answer, rounds = recorded(problem, Lossless(), random_owner(problem), "alternate")
    assert len(rounds) > 3
    assert answer.objective == min(solution.objective for solution in rounds)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [{"budget": 0.2}, {"transfer_price": 0.05}, {"max_nmse": 0.1}], ids=str)
def test_no_pruner_of_a_chain_and_no_placement_raises_the_objective(seed: int, limit: dict[str, float]):
    """Placement and selection together: every candidate that the alternation goes on from is at most the one before."""
    problem = random_layer(seed, m=16, n=12, P=4, noise=0.2).problem
    formulation, chain = Volume(**limit), "group-omp+swaps+tabu"
    objectives = [
        solve_problem(problem, formulation, partitioner="compensated", pruner=pruner).objective
        for pruner in ("group-omp", "group-omp+swaps", chain)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(objectives)), objectives
    alone = solve_problem(problem, formulation, partitioner="munkres", pruner=chain)
    assert alone.owner is not None
    together = solve_problem(problem, formulation, partitioner="compensated", pruner=chain, start=alone.owner)
    assert together.objective <= alone.objective * (1 + 1e-9)


def test_what_a_pruner_says_of_itself_is_in_the_stats():
    """Placed once, or in alternation with the pruner."""
    problem = random_layer(5, m=16, n=12, P=4).problem
    for partitioner in ("munkres", "compensated", "alternate"):
        answer = solve_problem(problem, Volume(budget=0.2), partitioner=partitioner, pruner="group-lasso-fast")
        assert answer.stats["lambda"] > 0, partitioner


def test_a_solved_layer_leaves_memory_with_its_last_reference():
    """Without a collection of cycles: its weights and moments may be large."""
    problem = random_layer(5, m=16, n=12, P=4).problem
    seen = weakref.ref(problem)
    gc.collect()
    gc.disable()
    try:
        solve_problem(problem, Volume(budget=0.2))
        del problem
        assert seen() is None
    finally:
        gc.enable()


def test_alternation_improves_on_its_start():
    problem = random_layer(5, m=16, n=12, P=4).problem
    start = random_owner(problem)
    before = solve_problem(problem, Volume(budget=0.2), partitioner="contiguous", start=start)
    after = solve_problem(problem, Volume(budget=0.2), partitioner="compensated", start=start)
    assert after.objective < 0.9 * before.stats["stages"][0]["objective"]
    assert after.stats["rounds"] >= 2


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_lossless_alternation_sees_the_zeros_of_the_weight(noise: float):
    """Two planted blocks, inputs on the other worker's side of the order; nothing needs to be sent."""
    layer = random_layer(6, m=8, n=8, P=2, noise=noise)
    block = np.kron(np.eye(2), np.ones((4, 4)))[[4, 0, 5, 1, 6, 2, 7, 3]]
    problem = replace(layer.problem, weight=layer.problem.weight * block)
    assert solve_problem(problem, Lossless(), partitioner="alternate").volume == 0


# ------------------------------------------------------------------------------------------------------- deadlines


def test_an_incumbent_at_the_time_limit_is_time_limit(problem: LayerProblem, register: Callable[[Backend], str]):
    def slow(problem: LayerProblem, formulation: Formulation, options: SolveOptions, *_: Any) -> Candidate:
        assert options.time_limit is not None
        time.sleep(options.time_limit + 0.01)
        return Candidate(Termination.TIME_LIMIT, random_owner(problem))

    def never(*_: Any) -> Candidate:
        raise AssertionError("asked after the deadline")

    register(Backend("slow", slow))
    register(Backend("never", never))
    solution = solve_problem(problem, EDGE, SolveOptions(time_limit=0.05), partitioner="slow+never")
    assert solution.termination is Termination.TIME_LIMIT
    assert solution.violations == ()


def test_stages_that_are_left_out_for_lack_of_time_show_in_the_termination(
    problem: LayerProblem, register: Callable[[Backend], str]
):
    def late(problem: LayerProblem, *_: Any) -> Candidate:
        time.sleep(0.05)
        return Candidate(Termination.HEURISTIC, random_owner(problem))

    register(Backend("late", late))
    solution = solve_problem(problem, EDGE, SolveOptions(time_limit=0.02), partitioner="late+munkres")
    assert len(solution.stats["stages"]) == 1
    assert solution.termination is Termination.TIME_LIMIT


def test_a_pruner_that_ran_out_of_time_shows_in_the_termination():
    problem = random_layer(7, m=8, n=60, P=2).problem
    solution = solve_problem(
        problem, Volume(budget=1.0), SolveOptions(time_limit=1e-6), partitioner="contiguous", pruner="group-omp"
    )
    assert solution.termination is Termination.TIME_LIMIT


def test_the_time_limit_is_for_all_stages_together(problem: LayerProblem, register: Callable[[Backend], str]):
    limits: list[float] = []

    def look(problem: LayerProblem, formulation: Formulation, options: SolveOptions, *_: Any) -> Candidate:
        limits.append(options.time_limit or 0.0)
        time.sleep(0.02)
        return Candidate(Termination.HEURISTIC, random_owner(problem))

    register(Backend("look", look))
    solve_problem(problem, Lossless(), SolveOptions(time_limit=10), partitioner="look+look")
    first, second = limits
    assert first == pytest.approx(10, abs=0.1)
    assert second <= first - 0.02


def test_deadline():
    assert Deadline(None).remaining is None
    assert not Deadline(None).passed
    deadline = Deadline(0.01)
    assert 0 < (deadline.remaining or 0) <= 0.01
    time.sleep(0.015)
    assert deadline.remaining == 0
    assert deadline.passed


# ------------------------------------------------------------------------------------------- what backends claim


def test_a_backend_that_raises_is_an_error_with_its_message(problem: LayerProblem, register: Callable[[Backend], str]):
    def fails(*_: Any) -> Candidate:
        raise ValueError("matrix is not to my taste")

    register(Backend("fails", fails))
    solution = solve_problem(problem, EDGE, partitioner="fails")
    assert solution.termination is Termination.ERROR
    assert solution.message == "fails: ValueError: matrix is not to my taste"
    assert "not to my taste" in solution.stats["traceback"]
    chained = solve_problem(problem, EDGE, partitioner="fails+munkres")
    assert chained.termination is Termination.OPTIMAL
    assert chained.stats["stages"][0]["termination"] == "error"


def least_edge(problem: LayerProblem) -> LayerSolution:
    return solve_problem(problem, EDGE, partitioner="munkres").require()


def test_optimal_without_a_bound_is_refused(problem: LayerProblem, register: Callable[[Backend], str]):
    best = least_edge(problem)
    register(answers("boasts", Candidate(Termination.OPTIMAL, best.owner)))
    solution = solve_problem(problem, EDGE, partitioner="boasts")
    assert solution.termination is Termination.HEURISTIC
    assert solution.stats["stages"][0]["termination"] == "heuristic"
    assert "optimal" in solution.stats["refused_claims"][0]


@pytest.mark.parametrize("bound", ["low", "surrogate"])
def test_optimal_with_a_gap_is_refused(problem: LayerProblem, register: Callable[[Backend], str], bound: str):
    best = least_edge(problem)
    claim: dict[str, Any] = {"bound": 0.9 * best.objective} if bound == "low" else {"surrogate_bound": best.objective}
    register(answers("boasts", Candidate(Termination.OPTIMAL, best.owner, **claim)))
    solution = solve_problem(problem, EDGE, partitioner="boasts")
    assert solution.termination is Termination.HEURISTIC
    assert solution.gap == (pytest.approx(0.1) if bound == "low" else None)
    assert len(solution.stats["refused_claims"]) == 1


@pytest.mark.parametrize("excess", [1.5, np.inf, np.nan])
def test_a_bound_that_is_none_is_dropped(problem: LayerProblem, register: Callable[[Backend], str], excess: float):
    owner = random_owner(problem)
    register(answers("boasts", Candidate(Termination.OPTIMAL, owner, bound=excess * 1e3)))
    solution = solve_problem(problem, EDGE, partitioner="boasts")
    assert solution.bound is None
    assert solution.gap is None
    assert solution.termination is Termination.HEURISTIC
    assert solution.stats["refused_claims"]


@pytest.mark.parametrize("chain", ["boasts+better", "better+boasts"])
def test_a_bound_above_another_stages_objective_proves_nothing(
    problem: LayerProblem, register: Callable[[Backend], str], chain: str
):
    best = least_edge(problem)
    worst = max(
        (solve_problem(problem, EDGE, SolveOptions(seed=seed), partitioner="random") for seed in range(9)),
        key=lambda solution: solution.objective,
    )
    assert worst.objective > best.objective * 1.01
    between = 0.5 * (best.objective + worst.objective)
    register(answers("boasts", Candidate(Termination.HEURISTIC, worst.owner, bound=between)))
    register(answers("better", Candidate(Termination.HEURISTIC, best.owner)))
    solution = solve_problem(problem, EDGE, partitioner=chain)
    assert solution.objective == pytest.approx(best.objective)
    assert solution.termination is Termination.HEURISTIC
    assert solution.bound is None


def test_the_best_of_two_bounds_is_kept(problem: LayerProblem, register: Callable[[Backend], str]):
    best = least_edge(problem)
    for name, share in (("loose", 0.5), ("tight", 0.9), ("looser", 0.2)):
        register(answers(name, Candidate(Termination.HEURISTIC, best.owner, bound=share * best.objective)))
    solution = solve_problem(problem, EDGE, partitioner="loose+tight+looser")
    assert solution.bound == pytest.approx(0.9 * best.objective)
    assert solution.termination is Termination.HEURISTIC


def test_a_bound_of_one_stage_and_the_answer_of_another_are_a_proof(
    problem: LayerProblem, register: Callable[[Backend], str]
):
    best = least_edge(problem)
    poor = random_owner(problem, 3)
    register(answers("bounds", Candidate(Termination.HEURISTIC, poor, bound=best.objective)))
    register(answers("finds", Candidate(Termination.HEURISTIC, best.owner)))
    assert solve_problem(problem, EDGE, partitioner="bounds+finds").termination is Termination.OPTIMAL


def test_a_wrong_objective_is_recorded_and_not_believed(problem: LayerProblem, register: Callable[[Backend], str]):
    owner = random_owner(problem)
    honest = solve_problem(problem, EDGE, partitioner="contiguous")
    register(answers("boasts", Candidate(Termination.HEURISTIC, owner, claimed_objective=1e-3)))
    solution = solve_problem(problem, EDGE, partitioner="boasts")
    assert solution.objective > 0.1 * honest.objective
    assert "0.001" in solution.stats["refused_claims"][0]


WRONG_OWNERS: dict[str, Any] = {
    "too many on a worker": [0] * 8,
    "out of range": [0, 1, 2, 3, 0, 1, 2, 3],
    "negative": [0, 1, 0, 1, 0, 1, 0, -1],
    "too few": [0, 1],
    "fractions": np.linspace(0, 1, 8),
    "a matrix": np.zeros((8, 2), dtype=int),
}


@pytest.mark.parametrize("owner", WRONG_OWNERS.values(), ids=WRONG_OWNERS)
def test_invalid_owners_are_an_error(problem: LayerProblem, register: Callable[[Backend], str], owner: Any):
    nothing = Exchange.nothing(problem.n, problem.P)
    register(answers("wrong", Candidate(Termination.OPTIMAL, np.array(owner), nothing, bound=0.0)))
    solution = solve_problem(problem, EDGE, partitioner="wrong")
    assert solution.termination is Termination.ERROR
    assert solution.owner is None
    assert solution.message
    chained = solve_problem(problem, EDGE, partitioner="wrong+munkres")
    assert chained.termination is Termination.OPTIMAL


@pytest.mark.parametrize("owner", WRONG_OWNERS.values(), ids=WRONG_OWNERS)
def test_invalid_owners_without_an_exchange_are_an_error(
    problem: LayerProblem, register: Callable[[Backend], str], owner: Any
):
    register(answers("wrong", Candidate(Termination.HEURISTIC, np.array(owner))))
    for formulation in (EDGE, Lossless(), Volume(budget=0.5)):
        solution = solve_problem(problem, formulation, partitioner="wrong")
        assert solution.termination is Termination.ERROR
        assert solution.owner is None


WRONG_EXCHANGES = {
    "sent by who does not hold it": Exchange(6, 2, {(1, 0): Values(np.array([0]))}),
    "sent twice": Exchange(6, 2, {(0, 1): Values(np.array([0, 0]))}),
    "of other values": Exchange(9, 2, {(0, 1): Values(np.array([8]))}),
    "of other workers": Exchange(6, 4, {(0, 3): Values(np.array([1]))}),
}


@pytest.mark.parametrize("exchange", WRONG_EXCHANGES.values(), ids=WRONG_EXCHANGES)
def test_impossible_messages_are_an_error(
    problem: LayerProblem, owner: NDArray[np.int64], register: Callable[[Backend], str], exchange: Exchange
):
    register(answers("wrong", Candidate(Termination.HEURISTIC, owner, exchange)))
    solution = solve_problem(problem, EDGE, partitioner="wrong")
    assert solution.termination is Termination.ERROR
    assert solution.owner is None


@pytest.mark.parametrize("chain", ["cheap+contiguous", "contiguous+cheap"])
def test_a_valid_answer_is_better_than_a_cheap_one_that_breaks_a_constraint(
    problem: LayerProblem, owner: NDArray[np.int64], register: Callable[[Backend], str], chain: str
):
    nothing = Exchange.nothing(problem.n, problem.P)
    register(answers("cheap", Candidate(Termination.OPTIMAL, owner, nothing, bound=0.0)))
    formulation = Volume(max_nmse=0.01)
    alone = solve_problem(problem, formulation, partitioner="cheap")
    assert alone.objective == 0
    assert alone.violations
    assert alone.termination is not Termination.OPTIMAL
    solution = solve_problem(problem, formulation, partitioner=chain)
    assert solution.violations == ()
    assert solution.objective > 0


@pytest.mark.parametrize("termination", [Termination.OPTIMAL, Termination.HEURISTIC])
def test_a_success_without_owners_is_an_error(
    problem: LayerProblem, register: Callable[[Backend], str], termination: Termination
):
    register(answers("empty", Candidate(termination)))
    solution = solve_problem(problem, EDGE, partitioner="empty")
    assert solution.termination is Termination.ERROR
    with pytest.raises(NoSolution):
        solution.require()


def test_an_answer_that_is_no_candidate_is_an_error(problem: LayerProblem, register: Callable[[Backend], str]):
    register(Backend("odd", lambda *_: "here you are"))  # type: ignore[arg-type]
    assert solve_problem(problem, EDGE, partitioner="odd").termination is Termination.ERROR


def test_a_pruner_that_raises_is_an_error_even_at_the_start(problem: LayerProblem, owner: NDArray[np.int64]):
    class Fails:
        """Raises."""

        name = "fails"
        requires: tuple[str, ...] = ()

        def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
            return None

        def solve(self, *_: Any) -> Candidate:
            raise ValueError("nothing to prune")

    with registered("pruners", Fails()):
        for start in (None, owner):
            solution = solve_problem(problem, EDGE, partitioner="contiguous", pruner="fails", start=start)
            assert solution.termination is Termination.ERROR
            assert "nothing to prune" in solution.message


def test_a_local_search_may_change_its_array_in_place(problem: LayerProblem, register: Callable[[Backend], str]):
    """The pruned candidates of earlier owners must not follow."""

    def search(
        problem: LayerProblem, formulation: Formulation, options: SolveOptions, _: Any, prune: Prune
    ) -> Candidate:
        owner = random_owner(problem)
        first = owner.copy()
        prune(owner)
        owner[[0, 1]] = owner[[1, 0]] if owner[0] != owner[1] else 1 - owner[[0, 1]]
        prune(owner)
        again = prune(first)
        assert again.owner is not None
        assert (again.owner == first).all(), "the pruner answered for other owners"
        return again

    register(Backend("search", search))
    solution = solve_problem(problem, Lossless(), partitioner="search")
    assert solution.violations == (), solution.message


def test_infeasible_by_allowed_is_infeasible():
    allowed = np.ones((5, 2), dtype=bool)
    allowed[:3, 1] = False
    for partitioner in ("flow", "munkres", "alternate", "brute-force", "contiguous", "random", "metis"):
        solution = solve_layer(
            np.ones((5, 4)), 2, allowed=allowed, capacity=[2, 3], formulation=EDGE, partitioner=partitioner
        )
        assert solution.termination is Termination.INFEASIBLE, partitioner
        assert solution.owner is None
        with pytest.raises(NoSolution, match="infeasible"):
            _ = solution.volume


# --------------------------------------------------------------------------------------------- defaults and figures


def test_solve_layer_with_nothing_but_a_weight():
    weight = np.random.default_rng(8).normal(size=(12, 9))
    solution = solve_layer(weight, 3)
    assert solution.formulation == Volume(budget=0.1)
    assert solution.violations == ()
    assert solution.volume <= 0.1 * solution.problem.direct_volume
    assert solution.owner is not None
    assert np.bincount(solution.owner).tolist() == [4, 4, 4]
    assert solution.stats["ridge"] == 0.0


def test_the_figures_are_those_of_the_metrics():
    problem = random_layer(seed=9, m=8, n=6, noise=0.2).problem
    solution = solve_problem(problem, Volume(budget=0.3)).require()
    owner, exchange, weight, bias = solution.owner, solution.exchange, solution.weight, solution.bias
    assert owner is not None
    assert exchange is not None
    assert bias is not None
    assert solution.nmse == metrics.nmse(problem, owner, weight, bias)
    assert solution.volume == metrics.volume(problem, exchange) == 8 * solution.transfers.sum()
    assert solution.busiest == metrics.busiest(problem, exchange)
    assert solution.objective == pytest.approx(metrics.weighted_error(problem, owner, weight))
    assert solution.gap is None
    assert solution.stats["ridge"] == problem.moments.ridge > 0


@each_formulation
def test_auto_gives_a_valid_answer_that_beats_contiguous(formulation: Formulation):
    problem = random_layer(seed=10, m=16, n=12, P=4, density=0.4).problem
    solution = solve_problem(problem, formulation).require()
    assert solution.violations == ()
    assert solution.objective <= solve_problem(problem, formulation, partitioner="contiguous").objective


def test_torch_tensors_are_accepted_throughout():
    torch = pytest.importorskip("torch")
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    given = {"inputs": inputs, "bias": torch.ones(6), "capacity": torch.tensor([2, 2, 2]), "start": torch.arange(6) % 3}
    expected = {name: tensor.numpy() for name, tensor in given.items()}
    solution = solve_layer(weight, 3, **given)
    assert solution.objective == pytest.approx(solve_layer(weight.numpy(), 3, **expected).objective)


def test_importing_and_solving_by_munkres_loads_no_heavy_package():
    code = """
import sys
import numpy as np
import repurpose_opt
assert not {"torch", "cvxpy", "ortools", "pymetis"} & set(sys.modules), "loaded by import"
weight = np.random.default_rng(0).normal(size=(8, 6))
solution = repurpose_opt.solve_layer(weight, 2, formulation=repurpose_opt.Edge(0.1, 0.1), partitioner="munkres")
assert solution.termination == "optimal", solution
assert not {"torch", "cvxpy", "ortools", "pymetis"} & set(sys.modules), "loaded by solve_layer"
print("light")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "light", done.stderr


def test_a_max_nmse_that_cannot_be_met_is_an_error_with_its_reason():
    generator = np.random.default_rng(0)
    inputs, unrelated = generator.normal(size=(2, 300, 8))
    formulation = Volume(max_nmse=0.1)
    solution = solve_layer(
        generator.normal(size=(6, 8)), 2, inputs=inputs, target_inputs=unrelated, formulation=formulation
    )
    assert solution.termination is Termination.ERROR
    assert "max_nmse" in solution.message
    assert solution.owner is not None


def test_an_optimal_claim_of_flow_allows_for_its_rounding():
    """Costs over many orders of magnitude: rounded to integers, flow cannot tell the small ones apart."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(40, 40))
    weight[0] = 0
    weight[0, :10] = 1e7
    formulation = Edge(transfer_price=2.5e11)
    flow, munkres = (solve_layer(weight, 4, formulation=formulation, partitioner=p) for p in ("flow", "munkres"))
    assert munkres.termination is Termination.OPTIMAL
    assert flow.bound is not None
    assert flow.bound <= munkres.objective
    assert flow.termination is not Termination.OPTIMAL or np.isclose(flow.objective, munkres.objective, rtol=1e-6)


@pytest.mark.parametrize("load", [[5, 5, 5, 4], [3, 3, 3, 3, 2], [0.03, 0.01, 0.02, 0.02, 0.01, 0.03]])
def test_the_default_capacity_holds_any_loads_and_spreads_them(load):
    workers = len(load) - 1
    solution = solve_layer(np.eye(len(load)), workers, load=load, formulation=Lossless())
    assert solution.violations == ()
    held = np.bincount(solution.owner, weights=load, minlength=workers)
    assert held.max() <= sum(load) / workers + max(load)


def test_loads_of_any_unit_are_kept_within_capacity():
    generator = np.random.default_rng(0)
    load = generator.uniform(1, 3, 24) * 1e-6
    weight = generator.normal(size=(24, 16))
    for partitioner in ("alternate", "random"):
        solution = solve_layer(weight, 4, load=load, capacity=np.full(4, load.sum() / 4 * 1.1), partitioner=partitioner)
        assert solution.violations == ()


def test_a_short_time_limit_spends_the_budget_by_the_gains_as_they_stand():
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(400, 120)) @ generator.normal(size=(120, 120))
    weight = generator.normal(size=(60, 120))
    solution = solve_layer(weight, 4, inputs=inputs, formulation=Volume(budget=0.2), time_limit=1e-6)
    assert solution.termination is Termination.TIME_LIMIT
    assert solution.violations == ()
    assert solution.volume > 0
