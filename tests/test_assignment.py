"""Exact assignment: flow, munkres and enumeration reach one optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from repurpose_opt import Edge, LayerProblem, Moments, Termination, metrics
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import random_problem
from repurpose_opt_solvers.flow_ import assign_by_flow
from repurpose_opt_solvers.munkres_ import assign_by_munkres
from repurpose_opt_solvers.transport import Infeasible, assign

EDGE = Edge(weight_price=0.05, transfer_price=0.02)


def random_instance(seed: int, most_neurons: int, most_workers: int, most_values: int) -> LayerProblem:
    """Uneven capacities; every other one with min_load, every third with forbidden places; all are feasible."""
    random = np.random.default_rng(seed)
    P = int(random.integers(2, most_workers + 1))
    m, n = int(random.integers(P, most_neurons + 1)), int(random.integers(1, most_values + 1))
    planted = random.choice(P, m, p=random.dirichlet(np.ones(P)))
    held = np.bincount(planted, minlength=P)
    arguments: dict[str, Any] = {"capacity": held + random.integers(0, 1 + m // 4, P)}
    if seed % 2:
        arguments["min_load"] = random.integers(0, held + 1)
    if seed % 3 == 0:
        arguments["allowed"] = random.random((m, P)) < 0.5
        arguments["allowed"][np.arange(m), planted] = True
    if seed % 5 == 0:
        arguments["link_price"] = random.uniform(0.1, 3.0, (P, P))
    if seed % 7 == 0:
        arguments["moments"] = Moments.from_raw(random.uniform(0.1, 2.0, n))
    return random_problem(seed, m, n, P, input_owner=random.integers(0, P, n), **arguments)


@pytest.mark.parametrize("seed", range(100))
def test_flow_and_munkres_reach_the_same_optimum(seed: int):
    problem = random_instance(seed, most_neurons=512, most_workers=16, most_values=64)
    flow, munkres = (solve_problem(problem, EDGE, partitioner=name).require() for name in ("flow", "munkres"))
    assert flow.objective == pytest.approx(munkres.objective, rel=1e-6)
    for solution in (flow, munkres):
        assert solution.termination is Termination.OPTIMAL
        assert solution.violations == ()
        assert solution.bound == pytest.approx(solution.objective, rel=1e-6)
        assert "refused_claims" not in solution.stats


@pytest.mark.parametrize("seed", range(200))
def test_enumeration_agrees_on_tiny_instances(seed: int):
    problem = random_instance(seed, most_neurons=5, most_workers=3, most_values=4)
    oracle = solve_problem(problem, EDGE, partitioner="brute-force").require()
    assert oracle.termination is Termination.OPTIMAL
    for name in ("flow", "munkres"):
        solution = solve_problem(problem, EDGE, partitioner=name)
        assert solution.objective == pytest.approx(oracle.objective, rel=1e-6, abs=1e-9)
        assert solution.termination is Termination.OPTIMAL


@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_that_of_the_linear_program(seed: int):
    """The transportation problem has whole-numbered vertices, so that its linear program has the same optimum."""
    problem = random_instance(seed, most_neurons=60, most_workers=5, most_values=20)
    m, P = problem.m, problem.P
    cost = EDGE.assignment_cost(problem, None, None)
    loads = np.tile(np.eye(P), m)
    program = linprog(
        cost.ravel(),
        A_ub=np.vstack([loads, -loads]),
        b_ub=np.concatenate([problem.capacity, -problem.min_load]),
        A_eq=np.kron(np.eye(m), np.ones(P)),
        b_eq=np.ones(m),
        bounds=[(0, float(places)) for places in problem.allowed.ravel()],
    )
    for engine in (assign_by_flow, assign_by_munkres):
        owner = engine(problem, cost)
        assert metrics.placement_violations(problem, owner) == ()
        assert cost[np.arange(m), owner].sum() == pytest.approx(program.fun, rel=1e-6)


@pytest.mark.parametrize("engine", [assign_by_flow, assign_by_munkres, assign])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_the_scale_and_the_sign_of_costs_do_not_matter(engine: Any, scale: float, shift: float):
    problem = random_problem(m=12, P=3, capacity=[6, 4, 2])
    cost = np.random.default_rng(0).random((12, 3))
    expected = cost[np.arange(12), assign_by_munkres(problem, cost)].sum()
    owner = engine(problem, (cost + shift) * scale)
    assert cost[np.arange(12), owner].sum() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("engine", [assign_by_flow, assign_by_munkres, assign])
def test_one_neuron_of_enormous_cost_does_not_blur_the_others(engine: Any):
    problem = random_problem(m=12, P=3, capacity=[5, 4, 3])
    cost = np.random.default_rng(1).random((12, 3))
    cost[0] = [0.0, 1e5, 1e5]
    best = cost[np.arange(12), assign_by_munkres(problem, cost)].sum()
    assert cost[np.arange(12), engine(problem, cost)].sum() == pytest.approx(best, rel=1e-6)
    assert best < 12


@pytest.mark.parametrize("engine", [assign_by_flow, assign_by_munkres, assign])
def test_equal_costs_have_any_valid_answer(engine: Any):
    problem = random_problem(m=7, P=3, capacity=[3, 3, 3], min_load=[1, 3, 0])
    assert metrics.placement_violations(problem, engine(problem, np.zeros((7, 3)))) == ()


@pytest.mark.parametrize("engine", [assign_by_flow, assign_by_munkres, assign])
def test_what_no_assignment_satisfies_is_proved(engine: Any):
    problem = random_problem(m=4, P=2, allowed=np.array([[True, False]] * 3 + [[True, True]]), capacity=[2, 2])
    with pytest.raises(Infeasible) as raised:
        engine(problem, np.zeros((4, 2)))
    assert raised.value.proved
    problem = random_problem(m=4, P=2, allowed=np.array([[True, False]] * 4), capacity=[4, 4], min_load=[0, 1])
    with pytest.raises(Infeasible):
        engine(problem, np.zeros((4, 2)))


@pytest.mark.parametrize("load", [0.1, 3.0, 1e6])
def test_loads_that_are_equal_but_not_1(load: float):
    problem = random_problem(m=10, P=3, load=load, capacity=np.array([3, 3, 5]) * load, min_load=[0, 0, 4.5 * load])
    for name in ("flow", "munkres"):
        solution = solve_problem(problem, EDGE, partitioner=name).require()
        assert solution.owner is not None
        assert np.bincount(solution.owner, minlength=3)[2] == 5
        assert solution.violations == ()


@pytest.mark.parametrize("seed", range(20))
def test_unequal_loads_are_placed_within_capacity_and_near_the_optimum(seed: int):
    """Loads as of multiply-accumulates, capacities that leave little room."""
    random = np.random.default_rng(seed)
    planted = random.integers(0, 3, 9)
    load = random.integers(1, 10**6, 9).astype(float)
    held = np.bincount(planted, load, 3)
    problem = random_problem(seed, m=9, P=3, load=load, capacity=held * 1.01, min_load=held * 0.5)
    cost = random.random((9, 3))
    owner = assign(problem, cost)
    assert metrics.placement_violations(problem, owner) == ()
    every = np.stack(np.unravel_index(np.arange(3**9), (3,) * 9), axis=1)
    loads = np.stack([(load * (every == k)).sum(axis=1) for k in range(3)], axis=1)
    valid = every[((loads <= problem.capacity) & (loads >= problem.min_load)).all(axis=1)]
    least = cost[np.arange(9), valid].sum(axis=1).min()
    assert cost[np.arange(9), owner].sum() <= least * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_capacities_that_are_filled_exactly(seed: int):
    random = np.random.default_rng(seed)
    planted = random.integers(0, 3, 12)
    load = random.uniform(1, 10**6, 12)
    problem = random_problem(seed, m=12, P=3, load=load, capacity=np.bincount(planted, load, 3))
    assert metrics.placement_violations(problem, assign(problem, random.random((12, 3)))) == ()
