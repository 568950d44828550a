"""The trajectory of a solve: incumbents of all stages over time, and what backends claim of theirs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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
    Volume,
    registry,
)
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import random_problem, registered
from repurpose_opt.trajectory import Incumbents, Point, extended
from repurpose_opt_benchmarks.lossless_random import lossless_problem

INSTALLED = [name for name in registry.names("partitioners") if registry.is_installed("partitioners", name)]
EXACT: dict[str, Formulation] = {
    "edge": Edge(weight_price=0.1, transfer_price=0.05),
    "volume": Volume(transfer_price=1.0),
    "lossless": Lossless(),
    "busiest": Lossless(communication="busiest"),
}
"""Formulations whose objective backends know, where the inputs are uncorrelated."""
LIMITED: dict[str, Formulation] = {"budget": Volume(budget=0.3), "nmse": Volume(max_nmse=0.2)}
TELL = {
    "alternate": {"volume", "lossless", "busiest"},
    "compensated": {"volume"},
    "generalised": {"edge"},
    "kahypar": {"lossless"},
    "local-search": set(EXACT),
    "metis": {"lossless"},
    "mip": set(EXACT),
    "mip-lns": {"edge", "volume", "lossless"},
    "mip:highs": set(EXACT),
    "mt-kahypar": {"lossless"},
}
"""What each backend has incumbents of on the layer below; the others have one answer."""
OF_ONE_KIND = ("mip:cp-sat", "mip:scip")
"""They record as mip:highs does."""


def small() -> LayerProblem:
    """Uncorrelated inputs, uneven loads, with room to move."""
    rng = np.random.default_rng(5)
    weight = np.where(rng.random((8, 8)) < 0.4, rng.normal(size=(8, 8)), 0.0)
    return random_problem(5, weight=weight, P=2, load=rng.integers(1, 4, 8), capacity=[12, 12])


class Kept:
    """A backend, and the candidate that it answered with."""

    name = "kept"

    def __init__(self, backend: Any) -> None:
        self.backend, self.requires = backend, backend.requires

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        reason: str | None = self.backend.supports(problem, formulation)
        return reason

    def solve(self, *arguments: Any) -> Candidate:
        self.began = time.perf_counter()
        self.candidate: Candidate = self.backend.solve(*arguments)
        self.seconds = time.perf_counter() - self.began
        return self.candidate

    @property
    def claims(self) -> list[Point]:
        return list(self.candidate.stats.get("trajectory", ()))


def solved(
    name: str, problem: LayerProblem, formulation: Formulation, start: NDArray[np.int64] | None = None
) -> tuple[LayerSolution, Kept]:
    """The solution, and the backend with its candidate and the second at which it was asked."""
    kept = Kept(registry.load("partitioners", name)())
    reason = kept.supports(problem, formulation)
    if reason is not None:
        pytest.skip(reason)
    with registered("partitioners", kept):
        began = time.perf_counter()
        solution = solve_problem(problem, formulation, partitioner="kept", start=start)
        check(solution, time.perf_counter() - began)
    kept.began -= began
    return solution, kept


def check(solution: LayerSolution, seconds: float) -> None:
    """What holds for the trajectory of any solve with a valid answer."""
    points = solution.stats["trajectory"]
    times, objectives = [0.0, *(at for at, _ in points), seconds], [objective for _, objective in points]
    assert all(before <= after for before, after in pairwise(times))
    assert all(before > after for before, after in pairwise(objectives))
    assert objectives[-1] == solution.objective


# ------------------------------------------------------------------------------------------------- what backends tell


@pytest.mark.parametrize("formulation", EXACT)
@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in OF_ONE_KIND])
def test_claims_are_objectives(name: str, formulation: str):
    """Recomputed, the last claim is what the answer costs, so that none is dropped; times are within the solve."""
    solution, kept = solved(name, small(), EXACT[formulation])
    if formulation in TELL.get(name, ()):
        assert kept.claims, "it has incumbents"
    if not kept.claims:
        assert len(solution.stats["trajectory"]) == 1
        return
    times = [0.0, *(at for at, _ in kept.claims), kept.seconds]
    assert all(before <= after for before, after in pairwise(times))
    assert min(cost for _, cost in kept.claims) == pytest.approx(solution.objective, rel=1e-9, abs=1e-12)
    found = min(at for at, cost in kept.claims if cost == pytest.approx(solution.objective, rel=1e-9, abs=1e-12))
    assert found <= solution.stats["trajectory"][-1][0] <= kept.began + found


@pytest.mark.parametrize("formulation", LIMITED)
@pytest.mark.parametrize(
    "name", [name for name in ("alternate", "compensated", "local-search", "mip") if name in INSTALLED]
)
def test_trajectories_under_limits(name: str, formulation: str):
    solved(name, small(), LIMITED[formulation])


@pytest.mark.parametrize("formulation", EXACT)
@pytest.mark.parametrize("name", [name for name in ("local-search", "mt-kahypar") if name in INSTALLED])
def test_claims_lead_from_the_start_to_the_answer(name: str, formulation: str):
    """Both are verified: the first as the stage `start`."""
    problem = lossless_problem(32, 4, 0.1, planted=False, seed=0)
    start = random_owner(problem)
    solution, kept = solved(name, problem, EXACT[formulation], start)
    first = solution.stats["stages"][0]
    assert first["stage"] == "start"
    assert kept.claims[0][1] == pytest.approx(first["objective"], rel=1e-9)
    assert kept.claims[-1][1] == pytest.approx(solution.objective, rel=1e-9)
    assert solution.objective < first["objective"] == solution.stats["trajectory"][0][1]


@pytest.mark.parametrize("name", [name for name in ("local-search", "mip", "mip-lns") if name in INSTALLED])
def test_costs_that_stand_in_for_the_objective_are_left_out(name: str):
    """With correlated inputs these backends know the cost on the diagonal only."""
    problem = random_layer(seed=2, m=8, n=6, P=2).problem
    _, kept = solved(name, problem, Volume(transfer_price=0.05), random_owner(problem))
    assert kept.claims == []


@pytest.mark.parametrize("name", [name for name in ("mip", "metis") if name in INSTALLED])
def test_a_child_has_the_clock_of_its_parent(name: str):
    """With a time limit, which both end long before, they search in another process."""
    problem = lossless_problem(32, 2, 0.1, planted=True, seed=0)
    began = time.perf_counter()
    solution = solve_problem(problem, Lossless(), SolveOptions(time_limit=60.0), partitioner=f"random+{name}")
    check(solution, time.perf_counter() - began)
    first, second = solution.stats["stages"]
    assert second["objective"] < first["objective"]
    assert first["seconds"] < solution.stats["trajectory"][1][0]


# ------------------------------------------------------------------------------------------ what the solve makes of it


@pytest.fixture
def problem() -> LayerProblem:
    return random_layer(seed=1, m=8, n=6, P=2).problem


@pytest.fixture
def register() -> Iterator[Callable[..., None]]:
    """`register(name, candidate, seconds)`: a backend that answers so, after so many seconds."""
    with ExitStack() as stack:

        def add(name: str, candidate: Candidate, seconds: float = 0.0) -> None:
            def solve(*_: Any) -> Candidate:
                time.sleep(seconds)
                return candidate

            stub = Kept(type("Stub", (), {"requires": (), "solve": staticmethod(solve), "supports": lambda *_: None})())
            stub.name = name
            stack.enter_context(registered("partitioners", stub))

        yield add


def claiming(owner: NDArray[np.int64] | None, *claims: Point) -> Candidate:
    return Candidate(Termination.HEURISTIC, owner, stats={"trajectory": claims})


def two_owners(problem: LayerProblem) -> tuple[tuple[NDArray[np.int64], float], tuple[NDArray[np.int64], float]]:
    """Owners and objectives under EDGE, the worse first."""
    found = [solve_problem(problem, EXACT["edge"], partitioner=name).require() for name in ("contiguous", "munkres")]
    (worse, high), (better, low) = [(solution.owner, solution.objective) for solution in found]
    assert high > low
    assert worse is not None
    assert better is not None
    return (worse, high), (better, low)


def test_the_stages_of_a_chain_follow_each_other(problem: LayerProblem, register: Callable[..., None]):
    (worse, high), (better, low) = two_owners(problem)
    between = 0.5 * (high + low)
    register("first", claiming(worse, (0.01, 3 * high), (0.02, 2 * high), (0.03, high)), 0.04)
    register("second", claiming(better, (0.0, 2 * high), (0.01, high), (0.02, between)), 0.03)
    solution = solve_problem(problem, EXACT["edge"], partitioner="first+second")
    check(solution, math.inf)
    times, objectives = zip(*solution.stats["trajectory"], strict=True)
    assert objectives == (3 * high, 2 * high, high, between, low)
    assert np.diff(times[:3]) == pytest.approx(0.01)
    first, second = (stage["seconds"] for stage in solution.stats["stages"])
    assert times[2] <= times[0] - 0.01 + first < times[3] - 0.02 + 1e-9
    assert times[-1] >= first + second


def test_false_claims_are_left_out(problem: LayerProblem, register: Callable[..., None]):
    """Below what is verified, after the end, before the begin, not a number, without an answer."""
    (worse, high), (_, low) = two_owners(problem)
    register("boasts", claiming(worse, (-5.0, 2 * high), (0.0, math.nan), (0.0, low), (1e9, 1.5 * high), (0.0, -1.0)))
    register("nothing", claiming(None, (0.0, low)))
    began = time.perf_counter()
    solution = solve_problem(problem, EXACT["edge"], partitioner="boasts+nothing")
    check(solution, time.perf_counter() - began)
    assert [objective for _, objective in solution.stats["trajectory"]] == [2 * high, 1.5 * high, high]
    alone = solve_problem(problem, EXACT["edge"], partitioner="nothing")
    assert alone.owner is None
    assert alone.stats["trajectory"] == []


def test_a_stage_that_breaks_a_limit_has_no_incumbents(problem: LayerProblem, register: Callable[..., None]):
    """It has the lower objective, the volume, since it sends nothing."""
    silent = Exchange.of_transfers(np.zeros((problem.n, problem.P), dtype=bool), problem.input_owner)
    stats = {"trajectory": [(0.0, 1.0)]}
    register("silent", Candidate(Termination.HEURISTIC, random_owner(problem), silent, stats=stats))
    alone = solve_problem(problem, Volume(max_nmse=1e-3), partitioner="silent")
    assert alone.violations
    assert alone.stats["trajectory"] == []
    for chain in ("silent+contiguous", "contiguous+silent"):
        solution = solve_problem(problem, Volume(max_nmse=1e-3), partitioner=chain)
        assert not solution.violations
        assert [objective for _, objective in solution.stats["trajectory"]] == [solution.objective]


def test_a_sum_in_another_order_is_the_same_objective():
    """The answer counts from when it was claimed, and a cost that is rounded down is not a false claim."""
    for claimed in (10.0 - 1e-14, 10.0, 10.0 + 1e-14):
        assert extended([], [(1.0, 12.0), (2.0, claimed)], 5.0, 9.0, 10.0) == [(6.0, 12.0), (7.0, 10.0)]
    assert extended([(1.0, 10.0)], [(0.0, 11.0)], 2.0, 3.0, 10.0) == [(1.0, 10.0)]
    assert extended([(1.0, 10.0)], [], 2.0, 3.0, 9.0) == [(1.0, 10.0), (3.0, 9.0)]


def test_only_better_incumbents_are_recorded():
    incumbents = Incumbents(time.monotonic() - 5.0)
    for objective in (4.0, math.inf, math.nan, 5.0, 4.0, 3.0):
        incumbents.add(objective)
    (first, high), (second, low) = incumbents.points
    assert (high, low) == (4.0, 3.0)
    assert 5.0 <= first <= second
