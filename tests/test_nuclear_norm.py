"""Both nuclear-norm pruners against the relaxation of the whole layer in CVXPY, and their bounds against optima."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import random_layer, random_owner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag

from repurpose_opt import Edge, LayerProblem, Lossless, Moments, SolveOptions, Termination, Volume, metrics, registry
from repurpose_opt.exchange import Code, Exchange
from repurpose_opt.formulation.codes import cost_of_numbers
from repurpose_opt.receiver import receivers
from repurpose_opt.solution import verify
from repurpose_opt.testing import least_objective_given
from repurpose_opt_solvers.nuclear import (
    CodeProblem,
    OutOfTime,
    _towards_envelope,
    certified,
    largest_useful,
    lower_bound,
    merged_bound,
    solve,
)
from repurpose_opt_solvers.nuclear_norm_ import CompiledNuclear, NuclearNorm
from repurpose_opt_solvers.nuclear_norm_fast_ import NuclearNormFast
from repurpose_opt_solvers.nuclear_path import bound_given_owners, search

cvxpy = pytest.importorskip("cvxpy")

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"n": 9},
    "noise": {"n": 9, "noise": 0.4},
    "output_weight": {"n": 8, "noise": 0.4, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "sparse": {"n": 9, "noise": 0.4, "is_sparse": True, "density": 0.5},
    "link_price": {"n": 9, "noise": 0.4, "link_price": [[0, 1, 4], [2, 0, 1], [1, 3, 0]]},
    "free_links": {"n": 9, "link_price": [[0, 0, 4], [2, 0, 0], [1, 3, 0]]},
    "more_rows_than_columns": {"m": 20, "n": 6},
    "channels": {"noise": 0.4, "column_value": np.repeat(np.arange(7), 2), "value_bytes": 4},
    "scattered_columns": {"column_value": [0, 1, 2, 3, 4, 5, 5, 3, 4, 1, 2, 0], "value_bytes": 4},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
both = pytest.mark.parametrize("backend", [NuclearNormFast(), NuclearNorm()], ids=["fast", "cvxpy"])


def codes(**limit: float) -> Volume:
    return Volume(messages="codes", **limit)


def never() -> bool:
    return False


def problems(
    problem: LayerProblem, formulation: Volume, owner: np.ndarray, *, below: bool = False
) -> list[CodeProblem]:
    size = cost_of_numbers(problem, formulation, owner).size
    make = CodeProblem.below if below else CodeProblem.of
    return [make(r, size[:, r.worker]) for r in receivers(formulation.judged(problem), owner)]


def objective_of(problem: LayerProblem, formulation: Volume, owner: np.ndarray, exchange: Exchange) -> float:
    return formulation.objective(problem, owner, exchange, formulation.repair(problem, owner, exchange))


def random_codes(problem: LayerProblem, seed: int) -> Exchange:
    random = np.random.default_rng(seed)
    held = np.bincount(problem.input_owner, minlength=problem.P)
    messages = {
        (p, k): Code.spanning(random.normal(size=(random.integers(1, held[p] + 1), held[p])))
        for p in range(problem.P)
        for k in range(problem.P)
        if p != k and held[p] and random.random() < 0.7
    }
    return Exchange(problem.n, problem.P, messages)


# --------------------------------------------------------------------------------------------------- the relaxation


def whole_layer(problem: LayerProblem, formulation: Volume, owner: np.ndarray, penalty_weight: float) -> float:
    """The least objective over all weights of a layer, local ones included, in CVXPY; one column a value."""
    second = problem.moments.regularised
    target = np.linalg.solve(second, problem.predicted_moment.T).T * np.sqrt(problem.output_weight)[:, None]
    size = cost_of_numbers(problem, formulation, owner).size
    weight = cvxpy.Variable(target.shape)
    total = cvxpy.sum_squares((target - weight) @ np.linalg.cholesky(second))
    for k in range(problem.P):
        rows = np.flatnonzero(owner[problem.row_neuron] == k)
        local = np.flatnonzero(problem.input_owner == k)
        for p in range(problem.P):
            held = np.flatnonzero(problem.input_owner == p)
            if p == k or not len(held) or not len(rows):
                continue
            beside = second[np.ix_(held, held)]
            if len(local):
                cross = second[np.ix_(held, local)]
                beside = beside - cross @ np.linalg.solve(second[np.ix_(local, local)], cross.T)
            part = weight[rows][:, held] @ np.linalg.cholesky(beside)
            total += penalty_weight * size[p, k] * cvxpy.normNuc(part)
    model = cvxpy.Problem(cvxpy.Minimize(total))
    model.solve(solver="CLARABEL")
    return float(model.value)


@pytest.mark.parametrize("name", [name for name in LAYERS if "column_value" not in LAYERS[name]])
def test_both_solve_the_relaxation_of_the_whole_layer(name: str):
    problem = random_layer(3, **LAYERS[name]).problem
    owner = random_owner(problem)
    formulation = codes(transfer_price=0.1)
    parts = problems(problem, formulation, owner)
    largest = max(largest_useful(part) for part in parts)
    for share in (0.5, 0.1):
        expected = whole_layer(problem, formulation, owner, share * largest)
        fast = sum(solve(part, share * largest, None, never).objective - part.least_error for part in parts)
        convex = sum(CompiledNuclear(part).solve("SCS", share * largest).objective - part.least_error for part in parts)
        assert fast == pytest.approx(expected, rel=1e-6)
        assert convex == pytest.approx(expected, rel=1e-6)


@each_layer
def test_singular_value_thresholding_agrees_with_cones(arguments: dict[str, Any]):
    problem = random_layer(4, **arguments).problem
    owner = random_owner(problem)
    for part in problems(problem, codes(transfer_price=0.1), owner):
        compiled = CompiledNuclear(part)
        for share in (0.6, 0.2, 0.03):
            penalty_weight = share * (largest_useful(part) or 1.0)
            fast, convex = solve(part, penalty_weight, None, never), compiled.solve("SCS", penalty_weight)
            assert fast.objective == pytest.approx(convex.objective, rel=1e-6)
            assert [len(vectors) for vectors in fast.vectors] == [len(vectors) for vectors in convex.vectors]
            for gap in (fast.gap, convex.gap):
                assert -1e-9 * part.energy <= gap <= 1e-6 * part.energy


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), share=st.floats(0.02, 0.9))
def test_a_gap_is_never_smaller_than_what_is_left_to_gain(seed: int, share: float):
    problem = random_layer(seed, n=9, noise=0.3).problem
    part = problems(problem, codes(budget=0.1), random_owner(problem))[0]
    penalty_weight = share * largest_useful(part)
    least = solve(part, penalty_weight, None, never)
    random = np.random.default_rng(seed)
    for scale in (0.0, 1e-6, 1e-3, 0.1, 1.0):
        found = certified(part, penalty_weight, least.weight + scale * random.normal(size=least.weight.shape), 1e-8)
        assert found.gap >= found.objective - least.objective - 1e-12 * part.energy


@each_layer
def test_from_the_largest_useful_penalty_on_only_what_is_free_is_received(arguments: dict[str, Any]):
    problem = random_layer(5, **arguments).problem
    for part in problems(problem, codes(transfer_price=0.1), random_owner(problem)):
        largest = largest_useful(part)
        paid = np.flatnonzero(part.size > 0)
        if len(paid):
            above = solve(part, 1.001 * largest, None, never).vectors
            assert sum(len(above[source]) for source in paid) == 0
            below = solve(part, 0.99 * largest, None, never).vectors
            assert sum(len(below[source]) for source in paid) >= 1


def test_folding_is_undone_and_keeps_whole_values_together():
    problem = random_layer(6, **LAYERS["channels"]).problem
    part = problems(problem, codes(budget=0.1), random_owner(problem))[0]
    matrix = np.random.default_rng(0).normal(size=part.residual.shape)
    for span, folded in zip(part.spans, part.folded(matrix), strict=True):
        np.testing.assert_array_equal(part.unfold(folded), matrix[:, span])
        rows, values = len(matrix), (span.stop - span.start) // 2
        for row in range(rows):
            for value in range(values):
                np.testing.assert_array_equal(
                    folded[2 * row : 2 * row + 2, value], matrix[row, span][2 * value : 2 * value + 2]
                )


def test_no_time_no_solution():
    problem = random_layer(7, n=12, m=12).problem
    part = problems(problem, codes(budget=0.1), random_owner(problem))[0]
    with pytest.raises(OutOfTime):
        solve(part, 0.01 * largest_useful(part), np.zeros_like(part.residual), lambda: True)


# -------------------------------------------------------------------------------------------------------- the bound


def test_the_envelope_is_convex_below_the_rank_and_its_step_the_least():
    """σ² + τ[σ > 0] is nowhere below its envelope; the proximal step is that of a fine grid."""
    price = 0.7
    grid = np.linspace(0, 4, 40_001)
    envelope = np.where(grid <= np.sqrt(price), 2 * np.sqrt(price) * grid, grid**2 + price)
    assert (envelope <= grid**2 + price * (grid > 0) + 1e-12).all()
    assert (np.diff(envelope, 2) >= -1e-9).all()
    for steep in (0.0, 0.3, 5.0):
        for value in (0.1, 0.8, 0.9, 2.5, 3.5):
            step = float(_towards_envelope(np.array([value]), steep, price)[0])
            assert step == pytest.approx(grid[(steep * grid**2 - 2 * value * grid + envelope).argmin()], abs=2e-4)


@pytest.mark.parametrize("limit", [{"transfer_price": 0.02}, {"transfer_price": 0.3}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_the_optimum_of_one_source_and_of_uncorrelated_ones(seed: int, limit: dict[str, float]):
    two = random_layer(seed, m=5, n=7, P=2, noise=0.3, output_weight=[1, 0.2, 3, 1, 1]).problem
    owner = random_owner(two, seed)
    least = least_objective_given(two, codes(**limit), owner)
    assert bound_given_owners(two, codes(**limit), owner, never) == pytest.approx(least, rel=1e-7)
    random = np.random.default_rng(seed)
    blocks = [random.normal(size=(3, 3)) for _ in range(3)]
    second = block_diag(*(block @ block.T + 0.1 * np.eye(3) for block in blocks))
    apart = LayerProblem.create(random.normal(size=(6, 9)), 3, moments=Moments.from_raw(second))
    owner = random_owner(apart)
    exact = registry.load("pruners", "threshold")().solve(apart, codes(**limit), SolveOptions(), owner)
    assert exact.termination is Termination.OPTIMAL
    assert bound_given_owners(apart, codes(**limit), owner, never) == pytest.approx(exact.bound, rel=1e-7)


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_a_budget_has_a_bound_below_the_optimum(budget: float):
    gaps = []
    for seed in range(4):
        problem = random_layer(seed, m=5, n=7, P=2, noise=0.3).problem
        owner = random_owner(problem, seed)
        least = least_objective_given(problem, codes(budget=budget), owner)
        bound = bound_given_owners(problem, codes(budget=budget), owner, never)
        assert bound <= least * (1 + 1e-9) + 1e-9
        gaps.append((least - bound) / least)
    assert max(gaps) < (1e-4 if budget in (0.0, 1.0) else 0.5)


LIMITS: list[dict[str, float]] = [{"transfer_price": 0.01}, {"transfer_price": 0.1}, {"budget": 0.2}, {"budget": 0.6}]


@each_layer
@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_nothing_that_was_found_is_below_the_bound(arguments: dict[str, Any], limit: dict[str, float]):
    """Descents from many random codes, and those codes themselves where they are allowed."""
    problem = random_layer(8, **arguments).problem
    owner = random_owner(problem)
    formulation = codes(**limit)
    bound = bound_given_owners(problem, formulation, owner, never)
    descent = registry.load("pruners", "code-descent")()
    best = np.inf
    for seed in range(6):
        start = random_codes(problem, seed)
        for exchange in (start, descent.solve(problem, formulation, SolveOptions(), owner, start).exchange):
            weight = formulation.repair(problem, owner, exchange)
            if not formulation.violations(problem, owner, exchange, weight):
                best = min(best, formulation.objective(problem, owner, exchange, weight))
    assert bound <= best * (1 + 1e-9) + 1e-9
    if "transfer_price" in limit and "column_value" not in arguments:
        assert bound >= 0.9 * best


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), price=st.floats(1e-4, 1.0))
def test_a_bound_holds_wherever_it_is_taken(seed: int, price: float):
    """At X far from the minimum of the relaxation it is lower, but still a bound."""
    problem = random_layer(seed % 50, n=9, noise=0.3).problem
    owner = random_owner(problem)
    formulation = codes(transfer_price=price)
    parts = problems(problem, formulation, owner, below=True)
    random = np.random.default_rng(seed)
    starts = [part.least_squares + random.normal(size=part.residual.shape) for part in parts]
    early = sum(lower_bound(p, price, start, lambda: True).value for p, start in zip(parts, starts, strict=True))
    late = sum(lower_bound(part, price, None, never).value for part in parts)
    assert early <= late + 1e-5 * abs(late)
    for exchange in (random_codes(problem, seed), Exchange.nothing(problem.n, problem.P)):
        assert late <= objective_of(problem, formulation, owner, exchange)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), price=st.floats(1e-4, 3.0))
def test_sources_taken_for_one_bound_what_each_receiver_pays(seed: int, price: float):
    problem = random_layer(seed % 50, n=9, noise=0.3, link_price=[[0, 1, 4], [2, 0, 1], [1, 3, 0]]).problem
    owner = random_owner(problem)
    formulation = codes(transfer_price=price)
    bound = sum(merged_bound(part, price).value for part in problems(problem, formulation, owner))
    greedy = registry.load("pruners", "code-greedy")().solve(problem, formulation, SolveOptions(), owner).exchange
    for exchange in (greedy, random_codes(problem, seed), Exchange.nothing(problem.n, problem.P)):
        assert bound <= objective_of(problem, formulation, owner, exchange) + 1e-9
    one = problems(random_layer(seed % 50, P=2, n=7).problem, formulation, np.arange(6) % 2)
    exact = [merged_bound(part, price).value for part in one]
    below = problems(random_layer(seed % 50, P=2, n=7).problem, formulation, np.arange(6) % 2, below=True)
    assert exact == pytest.approx([lower_bound(part, price, None, never).value for part in below], rel=1e-6)


@each_layer
def test_the_metric_of_the_bound_is_below_the_moments(arguments: dict[str, Any]):
    problem = random_layer(9, **arguments).problem
    for part in problems(problem, codes(budget=0.3), random_owner(problem), below=True):
        assert np.linalg.eigvalsh(part.moment)[0] == pytest.approx(1.0, abs=1e-6)
        assert np.linalg.eigvalsh(part.moment)[0] >= 1.0


# ------------------------------------------------------------------------------------------------------- the pruners


@each_layer
def test_budgets_are_hard_and_what_is_left_is_filled(arguments: dict[str, Any]):
    problem = random_layer(10, **arguments).problem
    owner = random_owner(problem)
    size = int(problem.value_bytes[0])
    for budget in (0.0, 0.15, 0.4, 1.0):
        solved = NuclearNormFast().solve(problem, codes(budget=budget), SolveOptions(), owner)
        found = verify(problem, codes(budget=budget), solved, SolveOptions())
        assert found.violations == ()
        assert "refused_claims" not in found.stats
        allowed = np.floor(budget * problem.direct_volume + 1e-9)
        everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
        least = objective_of(problem, codes(budget=1.0), owner, everything)
        assert allowed - found.volume < size or found.objective == pytest.approx(least, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("price", [0.003, 0.02, 0.1])
def test_a_price_is_better_than_the_relaxations_along_the_path(price: float):
    problem = random_layer(11, m=9, n=12, noise=0.3).problem
    owner = random_owner(problem)
    formulation = codes(transfer_price=price)
    solved = NuclearNormFast().solve(problem, formulation, SolveOptions(), owner)
    found = verify(problem, formulation, solved, SolveOptions())
    parts = problems(problem, formulation, owner)
    for share in np.geomspace(1e-3, 1, 25):
        messages = {}
        for part in parts:
            solution = solve(part, share * max(largest_useful(p) for p in parts), None, never)
            for position, (p, vectors) in enumerate(zip(part.sources, solution.vectors, strict=True)):
                if len(vectors):
                    messages[p, part.worker] = Code.spanning(part.encoder(position, vectors))
        at = objective_of(problem, formulation, owner, Exchange(problem.n, problem.P, messages))
        assert found.objective <= at * 1.05
    assert found.bound <= found.objective
    assert found.gap < 0.1


@each_layer
def test_max_nmse_is_met_and_a_looser_limit_costs_less(arguments: dict[str, Any]):
    problem = random_layer(12, **arguments).problem
    owner = random_owner(problem)
    everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
    weight = codes(budget=1.0).repair(problem, owner, everything)
    bias = problem.bias + problem.weight @ problem.moments.target_mean - weight @ problem.moments.mean
    least = metrics.nmse(problem, owner, weight, bias, everything)
    costs = []
    for max_nmse in (least + 0.5, least + 0.1, least + 0.02):
        solved = NuclearNormFast().solve(problem, codes(max_nmse=max_nmse), SolveOptions(), owner)
        found = verify(problem, codes(max_nmse=max_nmse), solved, SolveOptions())
        assert found.violations == ()
        assert found.bound is None
        costs.append(found.objective)
    assert costs == sorted(costs)


def test_uncorrelated_sources_are_left_to_singular_value_decompositions():
    random = np.random.default_rng(13)
    problem = LayerProblem.create(random.normal(size=(6, 9)), 3, moments=Moments.from_raw(random.uniform(0.5, 2, 9)))
    for backend in (NuclearNormFast(), NuclearNorm()):
        found = backend.solve(problem, codes(transfer_price=0.1), SolveOptions(), random_owner(problem))
        assert found.termination is Termination.OPTIMAL


@pytest.mark.parametrize("limit", [*LIMITS[1:3], {"max_nmse": 0.1}], ids=str)
def test_cvxpy_makes_the_choices_of_the_fast_one(limit: dict[str, float]):
    problem = random_layer(14, n=9, noise=0.2).problem
    owner = random_owner(problem)
    fast, convex = (
        verify(problem, codes(**limit), backend.solve(problem, codes(**limit), SolveOptions(), owner), SolveOptions())
        for backend in (NuclearNormFast(), NuclearNorm())
    )
    assert convex.objective == pytest.approx(fast.objective, rel=0.02)
    assert convex.stats["relaxation_gap"] <= 1e-5 * convex.stats["relaxation_objective"]
    if fast.bound is not None:
        assert convex.bound == pytest.approx(fast.bound, rel=1e-9)


def test_a_child_process_gives_the_same_answer():
    problem = random_layer(15, n=9, noise=0.2).problem
    owner = random_owner(problem)
    here, there = (
        NuclearNorm().solve(problem, codes(budget=0.3), SolveOptions(time_limit=limit), owner) for limit in (None, 60.0)
    )
    assert there.termination is Termination.HEURISTIC
    assert here.exchange.messages.keys() == there.exchange.messages.keys()
    for pair, message in here.exchange.messages.items():
        np.testing.assert_array_equal(message.encoder, there.exchange.messages[pair].encoder)
    assert here.stats == there.stats


@pytest.mark.parametrize("limit", [{"budget": 0.3}, {"transfer_price": 0.02}, {"max_nmse": 0.1}], ids=str)
@both
def test_without_time_there_is_a_valid_answer_that_says_so(backend: Any, limit: dict[str, float]):
    problem = random_layer(16, m=24, n=40).problem
    owner = random_owner(problem)
    found = backend.solve(problem, codes(**limit), SolveOptions(time_limit=1e-6), owner)
    assert found.termination is Termination.TIME_LIMIT
    assert found.exchange is not None
    if "max_nmse" not in limit:  # what `select` has time for
        assert not verify(problem, codes(**limit), found, SolveOptions()).violations


@both
def test_layers_with_nothing_to_gain_send_nothing(backend: Any):
    samples = np.random.default_rng(17).normal(size=(40, 6))
    silent = LayerProblem.create(np.zeros((6, 6)), 3, moments=Moments.from_samples(samples))
    constant = LayerProblem.create(np.ones((6, 6)), 3, moments=Moments.from_samples(np.ones((9, 6))))
    known = LayerProblem.create(
        np.random.default_rng(18).normal(size=(6, 6)), 3, moments=Moments.from_samples(np.tile(samples[:, :2], 3))
    )
    for problem in (silent, constant, known):
        for limit in ({"budget": 0.5}, {"transfer_price": 0.1}, {"max_nmse": 0.1}):
            found = backend.solve(problem, codes(**limit), SolveOptions(), np.arange(6) % 3)
            solution = verify(problem, codes(**limit), found, SolveOptions())
            assert solution.violations == ()
            assert "refused_claims" not in solution.stats
            assert problem is not silent or solution.volume == 0
            assert problem is not known or "transfer_price" not in limit or solution.volume == 0


def test_a_solver_that_is_missing_or_fails_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    problem = random_layer(19, n=9).problem
    owner = random_owner(problem)
    missing = NuclearNorm("NONESUCH").solve(problem, codes(budget=0.3), SolveOptions(), owner)
    assert missing.termination is Termination.ERROR
    assert "NONESUCH" in missing.message
    monkeypatch.setattr(cvxpy.Problem, "status", property(lambda self: "infeasible"))
    failed = NuclearNorm().solve(problem, codes(budget=0.3), SolveOptions(), owner)
    assert (failed.termination, failed.exchange) == (Termination.ERROR, None)
    assert "infeasible" in failed.message


def test_they_serve_codes_without_a_price_for_work_only():
    problem = random_layer().problem
    for backend in (NuclearNormFast(), NuclearNorm()):
        assert backend.supports(problem, codes(budget=0.1)) is None
        assert backend.supports(problem, Volume(messages="mixed", budget=0.1)) is None
        assert "mac_price" in str(backend.supports(problem, Volume(messages="mixed", budget=0.1, mac_price=0.1)))
        assert "broadcast" in str(backend.supports(replace(problem, broadcast=True), codes(budget=0.1)))
        for other in (Edge(), Lossless(), Volume(budget=0.1)):
            assert "codes" in str(backend.supports(problem, other))


def test_choices_get_better():
    problem = random_layer(20, m=9, n=12, noise=0.3).problem
    owner = random_owner(problem)

    def solver(index: int, part: CodeProblem, penalty_weight: float, near: np.ndarray | None) -> Any:
        return solve(part, penalty_weight, near, never)

    for formulation in (codes(budget=0.3), codes(transfer_price=0.05)):
        found = [
            objective_of(problem, formulation, owner, choice.exchange)
            for choice in search(problem, formulation, owner, solver)
        ]
        assert len(found) > 3
        assert found[-1] == pytest.approx(min(found), rel=0.02)
        assert found[-1] < found[0]


def test_rows_of_weight_zero_change_nothing():
    problem = random_layer(21, n=9, output_weight=[0, 1, 1, 0, 1, 1]).problem
    owner = random_owner(problem)
    weight = np.array(problem.weight)
    weight[[0, 3]] *= 100
    other = replace(problem, weight=weight)
    for formulation in (codes(transfer_price=0.05), codes(budget=0.3)):
        one, two = (bound_given_owners(layer, formulation, owner, never) for layer in (problem, other))
        assert one == pytest.approx(two, rel=1e-6)
