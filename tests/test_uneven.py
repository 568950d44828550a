"""Neurons with unequal loads: placements and bounds against enumeration and HiGHS, and every backend with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from repurpose_opt import Edge, LayerProblem, Lossless, Termination, Volume, metrics, registry, solver
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import random_problem, registered
from repurpose_opt_solvers import alternate_, transport, uneven
from repurpose_opt_solvers.generalised_ import Generalised
from repurpose_opt_solvers.transport import Infeasible, assign, assign_with_bound, nearest_placement

EDGE = Edge(weight_price=0.05, transfer_price=0.02)
EXACT: dict[str, Any] = {"relative_gap": 1e-9, "node_limit": 20_000, "most_places": 5000}
FEW_PLACES = {**EXACT, "most_places": 2}


def instance(
    seed: int, m: int, P: int, *, room: float = 1.05, kind: str = "random", **arguments: Any
) -> tuple[LayerProblem, NDArray[np.float64]]:
    """Loads 1 … 99, uneven capacities with little room about a planted placement, min_load, and costs (m, P)."""
    random = np.random.default_rng(seed)
    load = random.integers(1, 100, m).astype(float)
    planted = random.integers(0, P, m)
    held = np.bincount(planted, load, P)
    allowed = random.random((m, P)) < 0.8
    allowed[np.arange(m), planted] = True
    costs = {
        "random": random.random((m, P)),
        "by load": random.random((m, P)) * load[:, None],
        "against load": 1000 / load[:, None] - 10 * random.random((m, P)),  # type E of the literature: the hardest
        "ties": random.integers(0, 3, (m, P)).astype(float),
    }
    given = {"load": load, "capacity": held * room, "min_load": held * 0.7, "allowed": allowed, **arguments}
    return random_problem(seed, m, P, P, **given), costs[kind]


def every_placement(problem: LayerProblem) -> NDArray[np.int64]:
    """(placements, m) all that are valid."""
    every = np.stack(np.unravel_index(np.arange(problem.P**problem.m), (problem.P,) * problem.m), axis=1)
    held = np.stack([(problem.load * (every == k)).sum(axis=1) for k in range(problem.P)], axis=1)
    slack = 1e-9 * problem.load.sum()
    valid = ((held <= problem.capacity + slack) & (held >= problem.min_load - slack)).all(axis=1)
    return every[valid & problem.allowed[np.arange(problem.m), every].all(axis=1)]


def enumerated(problem: LayerProblem, cost: NDArray[np.float64]) -> float:
    """The least total cost over all placements; infinite if there is none."""
    return float(cost[np.arange(problem.m), every_placement(problem)].sum(axis=1).min(initial=np.inf))


def by_highs(problem: LayerProblem, cost: NDArray[np.float64]) -> float:
    """The least total cost by the integer program as it is written down, solved to the end."""
    m, P = cost.shape
    result = milp(
        cost.ravel(),
        integrality=np.ones(m * P),
        bounds=Bounds(0, problem.allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(sparse.kron(sparse.eye_array(m), np.ones((1, P))), 1, 1),
            LinearConstraint(
                sparse.kron(problem.load[None, :], sparse.eye_array(P)), problem.min_load, problem.capacity
            ),
        ],
        options={"mip_rel_gap": 0},
    )
    assert result.status == 0
    return float(result.fun)


@pytest.fixture(params=["flow", "linear program"])
def relaxation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With OR-Tools, and without it."""
    if request.param == "linear program":
        monkeypatch.setattr(uneven, "find_spec", lambda name: None)
    return str(request.param)


@given(
    st.integers(0, 10**6), st.integers(2, 8), st.integers(2, 3),
    st.sampled_from(["random", "by load", "against load", "ties"]), st.sampled_from([1.0, 1.05, 1.5]),
    st.floats(-5, 5), st.sampled_from([1e-9, 1.0, 1e6]),
)  # fmt: skip
def test_a_placement_is_valid_and_its_bound_no_more_than_the_optimum(
    seed: int, m: int, P: int, kind: str, room: float, shift: float, scale: float
):
    problem, cost = instance(seed, m, P, kind=kind, room=room)
    cost = scale * (cost + shift)
    least = enumerated(problem, cost)
    tolerance = 1e-7 * np.abs(cost).sum()
    for arguments in ({}, FEW_PLACES, EXACT):
        found = assign_with_bound(problem, cost, **arguments)
        total = cost[np.arange(m), found.owner].sum()
        assert metrics.placement_violations(problem, found.owner) == ()
        assert found.bound <= least + tolerance
        assert total >= least - tolerance
    assert total <= least + tolerance
    assert found.bound >= least - tolerance


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_of_the_relaxation_alone_is_no_more_than_the_optimum(seed: int, relaxation: str):
    problem, cost = instance(seed, 8, 3, kind=["random", "by load", "against load"][seed % 3])
    with_limits = uneven._Instance.of(problem, cost)
    shares = uneven._relaxation(with_limits, solver.Deadline(None))
    bound = uneven._bound(with_limits, uneven._multipliers(with_limits, shares))
    least = enumerated(problem, cost)
    whole = np.where(shares > 0, cost, 0.0) * shares
    assert bound <= least
    assert bound == pytest.approx(whole.sum(), rel=1e-5, abs=1e-5 * np.abs(cost).sum()), "weaker than the relaxation"
    anything = np.random.default_rng(seed).normal(size=3)
    assert uneven._bound(with_limits, anything) <= least


@pytest.mark.parametrize("seed", range(20))
def test_every_better_placement_uses_the_places_that_are_kept_only(seed: int):
    problem, cost = instance(seed, 8, 3, room=1.2)
    with_limits = uneven._Instance.of(problem, cost)
    multiplier = uneven._multipliers(with_limits, uneven._relaxation(with_limits, solver.Deadline(None)))
    bound, reduced = uneven._bound(with_limits, multiplier), uneven._reduced(with_limits, multiplier)
    every = every_placement(problem)
    totals = cost[np.arange(8), every].sum(axis=1)
    known = int(np.argsort(totals)[len(totals) // 4])
    places, is_whole = uneven._places(reduced, every[known], totals[known] - bound, 100)
    assert is_whole
    better = every[totals < totals[known]]
    assert places[np.arange(8), better].all()
    assert not places.all()
    _, is_whole = uneven._places(reduced, every[known], totals[known] - bound, 0)
    assert not is_whole


@pytest.mark.parametrize("kind", ["random", "by load", "against load"])
@pytest.mark.parametrize("seed", range(2))
def test_against_highs_to_optimality(seed: int, kind: str, relaxation: str):
    problem, cost = instance(seed, 60, 4, room=1.1, kind=kind)
    least = by_highs(problem, cost)
    exact, quick = assign_with_bound(problem, cost, **EXACT), assign_with_bound(problem, cost)
    totals = [cost[np.arange(60), found.owner].sum() for found in (exact, quick)]
    assert totals[0] == pytest.approx(least, rel=1e-7)
    assert exact.bound == pytest.approx(least, rel=1e-7)
    assert least * (1 - 1e-7) <= totals[1] <= least * 1.02
    assert quick.bound <= least * (1 + 1e-7)


@pytest.mark.parametrize("kind", ["random", "by load", "against load", "ties"])
def test_the_search_without_integer_programs_is_near_the_bound_on_thousands_of_neurons(kind: str):
    problem, cost = instance(5, 3000, 8, room=1.01, kind=kind)
    found = assign_with_bound(problem, cost, relative_gap=0.005)
    assert "places" not in found.stats
    assert metrics.placement_violations(problem, found.owner) == ()
    assert cost[np.arange(3000), found.owner].sum() <= found.bound * (1.005 if found.bound > 0 else 0.995)


@pytest.mark.parametrize("seed", range(3))
def test_moves_and_swaps_mend_a_placement_and_then_lower_its_cost(seed: int):
    problem, cost = instance(seed, 80, 4, room=1.02)
    with_limits = uneven._Instance.of(problem, cost)
    reduced = uneven._reduced(with_limits, np.zeros(4))
    deadline = solver.Deadline(None)
    start = np.argmax(problem.allowed, axis=1)
    assert metrics.placement_violations(problem, start)
    mended = uneven._repaired(with_limits, start, reduced, deadline)
    assert metrics.placement_violations(problem, mended) == ()
    blind = assign(problem, np.random.default_rng(seed).random((80, 4)))
    for valid, share in ((mended, 1.0), (blind, 0.6)):
        better = uneven._improved(with_limits, valid, reduced, deadline)
        assert metrics.placement_violations(problem, better) == ()
        assert with_limits.total(better) < share * with_limits.total(valid)
    assert (uneven._improved(with_limits, better, reduced, deadline) == better).all()


def test_the_same_answer_again():
    problem, cost = instance(1, 200, 6)
    first, again = (assign_with_bound(problem, cost) for _ in range(2))
    assert (first.owner == again.owner).all()
    assert first.bound == again.bound


def test_a_time_limit_leaves_a_valid_placement():
    problem, cost = instance(2, 300, 8, room=1.01, kind="by load")
    found = assign_with_bound(problem, cost, time_limit=1e-9, **EXACT)
    assert found.out_of_time
    assert metrics.placement_violations(problem, found.owner) == ()
    assert found.bound <= cost[np.arange(300), found.owner].sum()


def test_infeasible_with_and_without_a_proof(monkeypatch: pytest.MonkeyPatch, relaxation: str):
    """Loads 3, 3, 3, 1 on two workers of 5 fit as shares, not as wholes; 6 of pinned loads not even as shares."""
    whole = random_problem(m=4, P=2, load=[3, 3, 3, 1], capacity=5)
    allowed = np.array([[True, False], [True, False], [False, True], [True, True]])
    shares = random_problem(m=4, P=2, load=[3, 3, 3, 1], capacity=[5, 7], allowed=allowed)
    for problem in (whole, shares):
        assert enumerated(problem, np.zeros((4, 2))) == np.inf
        with pytest.raises(Infeasible) as raised:
            assign(problem, np.zeros((4, 2)))
        assert raised.value.proved
        assert raised.value.candidate().termination is Termination.INFEASIBLE
    for time_limit, termination in ((1e-9, Termination.TIME_LIMIT), (None, Termination.ERROR)):
        monkeypatch.setattr(uneven, "_by_integer_program", lambda *_: (None, -np.inf))
        with pytest.raises(Infeasible) as raised:
            assign(whole, np.zeros((4, 2)), time_limit=time_limit)
        assert not raised.value.proved
        if time_limit is None or relaxation == "flow":
            assert raised.value.candidate().termination is termination


@pytest.mark.parametrize("with_ortools", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_equal_loads_is_their_optimum(seed: int, with_ortools: bool, monkeypatch: pytest.MonkeyPatch):
    if not with_ortools:
        monkeypatch.setattr(transport, "find_spec", lambda name: None)
    problem, _ = instance(seed, 30, 3)
    problem = replace(problem, load=np.full(30, 2.0), capacity=np.array([40.0, 21, 13]), min_load=np.array([0, 5.0, 9]))
    problem = replace(problem, allowed=problem.allowed | (np.arange(3) == 0))
    cost = np.random.default_rng(seed).normal(size=(30, 3))
    found = assign_with_bound(problem, cost)
    assert metrics.placement_violations(problem, found.owner) == ()
    assert found.bound == pytest.approx(cost[np.arange(30), found.owner].sum(), rel=1e-9)


def test_the_nearest_placement_of_a_valid_one_is_itself_and_moves_little_else():
    problem, cost = instance(3, 400, 8, room=1.03)
    owner = assign(problem, cost)
    assert (nearest_placement(problem, owner, cost).owner == owner).all()
    broken = owner.copy()
    broken[:20] = np.argmax(problem.allowed[:20], axis=1)
    assert metrics.placement_violations(problem, broken)
    nearest = nearest_placement(problem, broken, cost).owner
    assert nearest is not None
    assert metrics.placement_violations(problem, nearest) == ()
    moved = problem.load[nearest != broken].sum()
    assert moved <= 1.1 * problem.load[owner != broken].sum()


# ------------------------------------------------------------------------------------------------ the backends


def generalised(problem: LayerProblem, formulation: Any, **arguments: Any) -> Any:
    with registered("partitioners", Generalised()):
        return solve_problem(problem, formulation, partitioner="generalised", **arguments)


@pytest.mark.parametrize("seed", range(10))
def test_generalised_proves_edge_with_unequal_loads(seed: int):
    problem, _ = instance(seed, 24, 3, link_price=np.random.default_rng(seed).uniform(0.5, 2, (3, 3)))
    solution = generalised(problem, EDGE).require()
    assert solution.termination is Termination.OPTIMAL
    assert "refused_claims" not in solution.stats
    assert solution.objective == pytest.approx(by_highs(problem, EDGE.assignment_cost(problem, None, None)), rel=1e-6)
    other = solve_problem(problem, EDGE, partitioner="alternate").require()
    assert solution.objective <= other.objective * (1 + 1e-6)


def test_generalised_proves_nothing_where_the_cost_is_not_exact():
    problem, _ = instance(0, 24, 3)
    for formulation in (Lossless(), Volume(budget=0.3), replace(EDGE, communication="busiest")):
        solution = generalised(problem, formulation).require()
        assert solution.termination is Termination.HEURISTIC
        assert solution.bound is None


def real_machine(seed: int = 0, m: int = 32, **arguments: Any) -> LayerProblem:
    """Every constraint at once: a fast and a slow rack, capacities, loads, min_load, pinned places, sizes of values."""
    random = np.random.default_rng(seed)
    load = random.integers(1, 9, m).astype(float)
    share = load.sum() * np.array([0.5, 0.3, 0.2, 0.15])
    allowed = random.random((m, 4)) < 0.7
    allowed[:, 0] = True
    allowed[:2] = np.arange(4) == 3
    prices = np.where(np.add.outer([0, 0, 1, 1], [0, 0, 1, 1]) == 1, 5.0, 0.5)
    given = {"load": load, "capacity": share, "min_load": share * [0, 0.5, 0, 0.6], "allowed": allowed}
    given |= {"value_bytes": random.integers(1, 9, 20), "link_price": prices}
    weight = random.normal(size=(m, 20)) * (random.random((m, 20)) < 0.3)
    return random_problem(seed, m, 20, 4, weight=weight, **given, **arguments)


FORMULATIONS = {
    f"{formulation.name}-{communication}": replace(formulation, communication=communication)
    for formulation in (EDGE, Volume(budget=0.3), Lossless())
    for communication in ("total", "busiest")
}


@pytest.mark.filterwarnings("ignore:Passing xadj/adjncy:DeprecationWarning")
@pytest.mark.parametrize("label", FORMULATIONS)
@pytest.mark.parametrize("name", [entry.name for entry in registry.registered("partitioners") if entry.installed])
def test_every_backend_honours_every_constraint_or_says_so(name: str, label: str):
    problem = real_machine()
    start = assign(problem, np.random.default_rng(0).random((problem.m, problem.P)))
    options = solver.SolveOptions(time_limit=0.5)
    solution = solve_problem(problem, FORMULATIONS[label], options, partitioner=name, start=start)
    ended = {stage["termination"]: stage["message"] for stage in solution.stats["stages"]}
    assert Termination.ERROR not in ended, ended
    assert Termination.INFEASIBLE not in ended
    assert ended.get(Termination.UNSUPPORTED) != ""
    assert solution.violations == ()
    assert "refused_claims" not in solution.stats


def test_an_alternation_that_cannot_go_on_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch):
    problem = real_machine()
    calls = []

    def once(*arguments: Any, **options: Any) -> NDArray[np.int64]:
        calls.append(1)
        if len(calls) > 1:
            raise Infeasible("none was found", proved=False, out_of_time=True)
        return assign(*arguments, **options)

    monkeypatch.setattr(alternate_, "assign", once)
    solution = solve_problem(problem, Lossless(), partitioner="alternate").require()
    assert len(calls) == 2
    assert solution.violations == ()
    assert solution.termination is Termination.TIME_LIMIT
    assert solution.stats["gave_up"] == "none was found"


def test_prices_of_links_decide_where_neurons_go():
    """A neuron reads one value of each rack; the link between the racks is dear in one direction only."""
    prices = np.array([[0.0, 9.0], [1.0, 0.0]])
    problem = random_problem(m=3, n=2, P=2, weight=np.ones((3, 2)), load=[1, 1, 2], capacity=4, link_price=prices)
    for name in ("alternate", "brute-force"):
        for communication in ("total", "busiest"):
            solution = solve_problem(problem, Lossless(communication=communication), partitioner=name).require()
            assert (solution.owner == 0).all()


def test_an_assignment_with_no_choice_left_is_proved() -> None:
    """Reduced costs may settle every neuron: there is no integer program to solve then."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        load = rng.integers(1, 6, 4).astype(float)
        problem = LayerProblem.create(rng.random((4, 5)), 2, load=load)
        edge = Edge(weight_price=0.1, transfer_price=0.1)
        found = solve_problem(problem, edge, solver.SolveOptions(relative_gap=0.0), partitioner="generalised")
        assert found.termination in (Termination.OPTIMAL, Termination.HEURISTIC), found.message
        assert not found.violations
