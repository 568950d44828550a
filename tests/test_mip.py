"""The mixed-integer backends: bounds and proofs against enumeration, the model against SciPy's HiGHS, time limits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from repurpose_opt import Edge, LayerProblem, Lossless, Termination, Volume, metrics
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Formulation
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import LinearModel, common_unit, linear_model, possible_places, whole_loads
from repurpose_opt.moments import Moments
from repurpose_opt.onward import Onward
from repurpose_opt.solution import LayerSolution
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Deadline, SolveOptions
from repurpose_opt.testing import TINY_CASES, random_problem, registered
from repurpose_opt_benchmarks.lossless_random import lossless_problem
from repurpose_opt_solvers.bounds import (
    relaxation,
    spread,
    with_degree_cuts,
    with_order,
    with_worker_cuts,
    worker_bounds,
)
from repurpose_opt_solvers.brute_force_ import BruteForce
from repurpose_opt_solvers.mip_ import Mip, MipCpSat, MipHighs, MipScip
from repurpose_opt_solvers.mip_engines import Effort, answers
from repurpose_opt_solvers.mip_lns_ import MipLns
from repurpose_opt_solvers.neighbourhoods import improvements
from repurpose_opt_solvers.transport import assign_with_bound

pytest.importorskip("ortools")

BACKENDS: dict[str, Callable[[], Any]] = {kind.name: kind for kind in (Mip, MipCpSat, MipHighs, MipScip, MipLns)}
PROVERS = ("mip", "mip:cp-sat", "mip:highs", "mip:scip")


def solve(
    name: str,
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions | None = None,
    start: Any = None,
) -> LayerSolution:
    with registered("partitioners", BACKENDS[name]()):
        solution = solve_problem(problem, formulation, options, partitioner=name, pruner="threshold", start=start)
    assert "refused_claims" not in solution.stats, solution.stats["refused_claims"]
    assert not any(stage["termination"] == "error" for stage in solution.stats.get("stages", ())), solution.message
    return solution


# ---------------------------------------------------------------------------------------- tiny problems, enumerated


def tiny_problem(seed: int) -> tuple[LayerProblem, Formulation]:
    """Five neurons or fewer with any mix of what a problem may have."""
    random = np.random.default_rng([8, seed])
    formulation: Formulation = (
        Lossless(),
        Lossless(communication="busiest"),
        Volume(transfer_price=float(random.uniform(0.05, 1.0))),
        Volume(budget=float(random.uniform(0.1, 0.6))),
        Edge(weight_price=0.05, transfer_price=float(random.uniform(0.05, 0.5))),
    )[seed % 5]
    P = int(random.integers(2, 4))
    m, n = int(random.integers(3, 6)), int(random.integers(2, 4))
    if isinstance(formulation, Volume) and formulation.budget is not None:
        m, n, P = 4, 3, 2  # all sets of transfers are enumerated
    weight = random.normal(size=(m, n)) * (random.random((m, n)) < 0.7)
    load = random.choice([1.0, 1.5, 2.0, 0.3], m) if random.random() < 0.4 else np.full(m, random.choice([1.0, 0.1]))
    load = random.uniform(0.5, 2.0, m) if random.random() < 0.2 else load
    share = random.dirichlet(np.full(P, 3.0)) * load.sum()
    places = random.random((m, P)) < 0.8
    places[np.arange(m), random.integers(P, size=m)] = True
    arguments = {
        "load": load,
        "capacity": np.maximum(share, 0) + load.max() * random.uniform(0.4, 1.2),
        "min_load": np.where(random.random(P) < 0.3, share * 0.5, 0.0),
        "allowed": places if random.random() < 0.4 else None,
        "value_bytes": random.integers(0, 5, n),
        "link_price": random.choice([0.5, 1.0, 2.5], (P, P)) if random.random() < 0.5 else random.uniform(0, 2, (P, P)),
        "input_owner": random.integers(P, size=n),
        "moments": Moments.from_raw(random.uniform(0.2, 2.0, n)),
        "output_weight": random.uniform(0.5, 2.0, m),
    }
    return LayerProblem.create(weight, P, **arguments), formulation


def check_against_enumeration(name: str, seed: int) -> None:
    try:
        problem, formulation = tiny_problem(seed)
    except InvalidArgument:
        return  # what cannot be placed by counting alone
    if BACKENDS[name]().supports(problem, formulation) is not None:
        return
    least = BruteForce().solve(problem, formulation, SolveOptions(), None, None)  # type: ignore[arg-type]
    solution = solve(name, problem, formulation)
    if least.owner is None:
        assert solution.termination is Termination.INFEASIBLE
        return
    assert solution.owner is not None, solution.message
    optimum = least.claimed_objective
    assert optimum is not None
    slack = 1e-9 * max(1.0, abs(optimum))
    assert solution.objective >= optimum - slack
    assert solution.bound is not None
    assert solution.bound <= optimum + slack
    if name in PROVERS:
        assert solution.objective <= optimum + 1e-6 * max(1.0, abs(optimum))
        assert solution.termination is Termination.OPTIMAL or optimum < 1e-6


@pytest.mark.parametrize("seed", [*range(60), 133, 362, 843])
def test_tiny_problems_against_enumeration(seed: int):
    for name in (PROVERS[seed % 4], PROVERS[(seed + 2) % 4], "mip-lns"):
        check_against_enumeration(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("seed", range(500))
def test_bounds_never_exceed_the_optimum(name: str, seed: int):
    check_against_enumeration(name, seed)


# --------------------------------------------------------------------------------------------------- the linear model


def least_of(model: LinearModel) -> tuple[float, np.ndarray]:
    """By SciPy's HiGHS."""
    rows = LinearConstraint(model.matrix, model.row_lower, model.row_upper)
    found = milp(model.cost, integrality=model.is_integer, bounds=Bounds(model.lower, model.upper), constraints=rows)
    return found.fun + model.constant, found.x


def placements(problem: LayerProblem) -> list[np.ndarray]:
    every = (np.array(labels) for labels in itertools.product(range(problem.P), repeat=problem.m))
    return [owner for owner in every if not metrics.placement_violations(problem, owner)]


@pytest.mark.parametrize("case", TINY_CASES)
@pytest.mark.parametrize(
    "formulation",
    [Lossless(), Lossless(communication="busiest"), Volume(transfer_price=0.04), Edge(transfer_price=0.02)],
    ids=["lossless", "busiest", "volume", "edge"],
)
def test_least_of_the_model_is_least_cost_of_the_placements(case: str, formulation: Formulation):
    problem = TINY_CASES[case]()
    hypergraph = formulation.hypergraph(problem, None)
    assert hypergraph is not None
    model = linear_model(problem, hypergraph)
    least, values = least_of(model)
    assert least == pytest.approx(min(map(hypergraph.cost, placements(problem))), abs=1e-6)
    assert hypergraph.cost(model.owner(values)) == pytest.approx(least, abs=1e-6)
    assert len(model.names) == len(set(model.names)) == len(model.cost)


def test_variables_of_a_placement_are_feasible_and_cost_what_it_costs():
    problem = TINY_CASES["link_price"]()
    for formulation in (Lossless(), Lossless(communication="busiest"), Volume(transfer_price=0.04)):
        hypergraph = formulation.hypergraph(problem, None)
        assert hypergraph is not None
        model = linear_model(problem, hypergraph)
        for owner in placements(problem):
            held = np.asarray(hypergraph.pins.T @ np.eye(problem.P)[owner])
            values = model.variables(owner, held > (0 if hypergraph.keeps_all else hypergraph.price))
            assert model.constant + model.cost @ values == pytest.approx(hypergraph.cost(owner))
            rows = model.matrix @ values
            assert (rows >= model.row_lower - 1e-9).all()
            assert (rows <= model.row_upper + 1e-9).all()


def test_a_model_that_keeps_everything_takes_no_budget_and_no_infinite_price():
    problem = random_problem(0)
    hypergraph = Lossless().hypergraph(problem)
    with pytest.raises(InvalidArgument, match="budget"):
        linear_model(problem, hypergraph, 3.0)
    with pytest.raises(InvalidArgument, match="infinite price"):
        linear_model(problem, replace(hypergraph, price=np.where(problem.remote, np.inf, 0.0)))


@pytest.mark.parametrize(
    ("numbers", "unit"),
    [([2.0, 4.0], 2.0), ([0.5, 0.75], 0.25), ([0.3, 0.9], 0.3), ([1.0, np.pi], None), ([0.0], 1.0)],
)
def test_common_unit(numbers: list[float], unit: float | None):
    found = common_unit(np.array(numbers))
    assert found == (None if unit is None else pytest.approx(unit))


def test_whole_loads_admit_the_placements_that_are_valid_and_no_others():
    random = np.random.default_rng(2)
    for trial in range(30):
        load = random.uniform(0.5, 2.0, 5) if trial % 2 else random.choice([0.1, 0.3, 0.7], 5)
        capacity = np.array([load[[0, 1]].sum(), load.sum()])  # holds two of them exactly
        problem = random_problem(trial, load=load, capacity=capacity, min_load=[load[0], 0])
        whole, low, high = whole_loads(problem)
        for labels in itertools.product(range(2), repeat=5):
            held = np.bincount(labels, whole, 2)
            is_valid = not metrics.placement_violations(problem, np.array(labels))
            assert is_valid == bool((held >= low).all() and (held <= high).all())


# ------------------------------------------------------------------------------------------------------------- bounds


def lossless(n: int, P: int, seed: int) -> tuple[LayerProblem, Hypergraph, LinearModel]:
    problem = lossless_problem(n, P, 0.1, planted=False, seed=seed)
    hypergraph = Lossless().hypergraph(problem)
    return problem, hypergraph, linear_model(problem, hypergraph)


@pytest.mark.parametrize(("n", "seed"), [(16, 0), (16, 1), (32, 0)])
def test_bounds_rise_from_one_to_the_next_and_stay_below_the_least_objective(n: int, seed: int):
    problem, hypergraph, model = lossless(n, 4, seed)
    first = assign_with_bound(problem, spread(hypergraph)).bound
    relaxed, multiplier = relaxation(model)
    rounds = itertools.islice(worker_bounds(model, 1.3 * relaxed, multiplier, Deadline(None)), 3)
    best = max(rounds, key=lambda found: found.bound)
    assert first <= relaxed + 1e-5 <= best.bound + 2e-5
    assert relaxation(with_worker_cuts(model, best))[0] == pytest.approx(best.bound, rel=1e-3)
    if n == 16:
        assert best.bound <= least_of(model)[0] + 1e-6
    else:
        assert best.bound > 1.05 * relaxed  # 22.5 and 23.8, of 32


def test_cuts_and_order_leave_the_optimum_as_it_is():
    random = np.random.default_rng(5)
    for seed in range(6):
        weight = (random.random((8, 6)) < 0.5).astype(float)
        weight[5] = weight[2]
        weight[7] = weight[0]
        problem = random_problem(
            seed, weight=weight, P=3, capacity=[3, 3, 2], link_price=random.uniform(0.5, 2, (3, 3))
        )
        hypergraph = Lossless().hypergraph(problem)
        model = linear_model(problem, hypergraph)
        least, _ = least_of(model)
        alike = np.unique(weight, axis=0, return_inverse=True)[1]
        with_degrees = with_degree_cuts(model, hypergraph.pins, whole_loads(problem)[0])
        assert least_of(with_degrees)[0] == pytest.approx(least)
        assert least_of(with_order(model, alike))[0] == pytest.approx(least)
        assert relaxation(with_degrees)[0] >= relaxation(model)[0] - 1e-6


def test_degree_cuts_lift_the_relaxation_where_readers_do_not_fit_beside_their_value():
    problem = random_problem(0, weight=np.ones((8, 4)), P=4, capacity=2)  # each value must reach all other workers
    hypergraph = Lossless().hypergraph(problem)
    model = linear_model(problem, hypergraph)
    tightened = with_degree_cuts(model, hypergraph.pins, whole_loads(problem)[0])
    assert relaxation(model)[0] < 0.9 * least_of(model)[0]
    assert relaxation(tightened)[0] == pytest.approx(least_of(model)[0], rel=1e-5)


def test_a_bound_on_the_diagonal_of_c_is_no_bound_on_the_objective():
    problem = TINY_CASES["correlated"]()
    for formulation in (Volume(transfer_price=0.04), Volume(budget=0.4)):
        solution = solve("mip", problem, formulation)
        assert solution.bound is None
        assert solution.surrogate_bound is not None
        assert solution.termination is not Termination.OPTIMAL


# ----------------------------------------------------------------------------------------------------- neighbourhoods


def test_neighbourhoods_never_rise_and_keep_placements_valid():
    random = np.random.default_rng(3)
    weight = random.normal(size=(24, 20)) * (random.random((24, 20)) < 0.2)
    problem = random_problem(3, weight=weight, P=4, load=random.integers(1, 4, 24), capacity=17, min_load=6)
    for formulation in (Lossless(), Volume(transfer_price=0.1)):
        hypergraph = formulation.hypergraph(problem, None)
        assert hypergraph is not None
        start = solve_problem(problem, formulation, partitioner="contiguous", pruner="threshold").require().owner
        assert start is not None
        costs = [hypergraph.cost(start)]
        for owner, _ in improvements(
            hypergraph, possible_places(problem), whole_loads(problem), start, Deadline(None), rounds=3
        ):
            assert metrics.placement_violations(problem, owner) == ()
            costs.append(hypergraph.cost(owner))
        assert (np.diff(costs) <= 1e-9).all()
        assert costs[-1] < costs[0]


def test_a_neighbourhood_of_all_neurons_is_the_whole_problem():
    problem, hypergraph, model = lossless(12, 3, 0)
    start = np.arange(12) * 3 // 12
    *_, (owner, counts) = improvements(
        hypergraph, possible_places(problem), whole_loads(problem), start, Deadline(None), rounds=200
    )
    assert hypergraph.cost(owner) == pytest.approx(least_of(model)[0])
    assert counts["rounds"] < 200


def test_lns_depends_on_the_seed_only():
    problem = lossless_problem(32, 4, 0.05, planted=False, seed=0)
    first, again = (solve("mip-lns", problem, Lossless(), SolveOptions(seed=7)) for _ in range(2))
    assert first.owner is not None
    assert (first.owner == again.owner).all()


# -------------------------------------------------------------------------------------------------------- time limits


@pytest.mark.parametrize("name", BACKENDS)
def test_an_interrupted_search_returns_its_incumbent_and_a_bound(name: str):
    problem = lossless_problem(256, 8, 0.05, planted=False, seed=0)
    start = np.random.default_rng(0).permutation(np.arange(256) % 8)
    before = Lossless().hypergraph(problem).cost(start)
    began = time.monotonic()
    solution = solve(name, problem, Lossless(), SolveOptions(time_limit=1.0), start)
    assert time.monotonic() - began < 1.0 + 5.0  # a busy machine
    assert solution.termination is Termination.TIME_LIMIT
    assert solution.objective <= before
    assert solution.bound is not None
    assert 0 < solution.bound < solution.objective


def test_what_an_engine_cannot_hold_is_said_at_once():
    problem = LayerProblem.create(np.ones((600, 600)), 8, value_bytes=1)
    assert "at most" in str(MipScip().supports(problem, Lossless()))
    assert Mip().supports(problem, Lossless()) is None


def test_stats_say_which_parts_ran():
    small = solve(
        "mip", lossless_problem(32, 2, 0.05, planted=False, seed=0), Lossless(), SolveOptions(time_limit=20.0)
    )
    assert small.termination is Termination.OPTIMAL
    assert small.stats["trajectory"][-1][1] == small.objective
    assert {part["part"] for part in small.stats["parts"]} <= {"neighbourhoods", "scip", "bound"}


def test_no_bound_is_claimed_before_there_is_one() -> None:
    """CP-SAT says 0 where it has none, which is above the optimum where neurons are paid to be somewhere."""
    problem = random_problem(0, 150, 40, 6)
    reward = Onward(Lossless(), -60 * np.random.default_rng(0).random((150, 6)))
    model = linear_model(problem, reward.hypergraph(problem, None))
    *_, last = answers("cp-sat", model, None, Effort(deterministic_time=1e-9))
    assert (last.values, last.bound) == (None, -np.inf)
    solution = solve_problem(problem, reward, SolveOptions(time_limit=0.4), partitioner="mip:cp-sat")
    assert solution.bound is None or solution.bound <= -1500


def test_a_stand_in_that_is_solved_did_not_end_by_its_limit() -> None:
    samples = np.random.default_rng(0).normal(size=(50, 8)) @ np.random.default_rng(1).normal(size=(8, 8))
    problem = random_problem(0, 6, 8, 2, moments=Moments.from_samples(samples))
    options = SolveOptions(time_limit=60.0)
    solution = solve_problem(problem, Volume(transfer_price=0.5), options, partitioner="mip")
    assert solution.termination is Termination.HEURISTIC
    assert solution.surrogate_bound is not None
