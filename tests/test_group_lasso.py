"""Both group lassos against the problem of the whole layer written down in CVXPY, and the optimality conditions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner
from hypothesis import given, settings
from hypothesis import strategies as st

from repurpose_opt import Edge, LayerProblem, Lossless, Moments, SolveOptions, Termination, Volume, metrics
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solution import verify
from repurpose_opt_benchmarks import lasso as experiment
from repurpose_opt_solvers import lasso_path
from repurpose_opt_solvers.group_lasso_ import ConvexSolver, GroupLasso, GroupLassoClarabel, GroupLassoScs, is_nonzero
from repurpose_opt_solvers.group_lasso_fast_ import GroupLassoFast
from repurpose_opt_solvers.lasso_newton import LassoProblem, LassoSolution, OutOfTime, _Part, certify, solve
from repurpose_opt_solvers.lasso_path import WorkerLasso, raw_lasso
from repurpose_opt_solvers.reduced import worker_problems

cvxpy = pytest.importorskip("cvxpy")

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"n": 9},
    "two_workers": {"n": 8, "P": 2},
    "noise": {"n": 9, "noise": 0.4},
    "output_weight": {"noise": 0.4, "n": 8, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "blocks": {"noise": 0.4, "value_bytes": [4, 8, 4, 12, 4], **BLOCKS},
    "link_price": {"n": 9, "noise": 0.4, "link_price": [[0, 1, 4], [2, 0, 1], [1, 3, 0]]},
    "free_links": {"n": 9, "link_price": [[0, 0, 4], [2, 0, 0], [1, 3, 0]]},
    "free_values": {"n": 9, "value_bytes": [0, 4, 4, 0, 8, 4, 4, 0, 1]},
    "free_blocks": {"value_bytes": [4, 0, 4, 12, 4], **BLOCKS},
    "more_rows_than_columns": {"m": 40, "n": 6, "P": 2},
    "sparse": {"n": 9, "noise": 0.4, "is_sparse": True, "density": 0.5},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
limits = pytest.mark.parametrize("limit", [{"budget": 0.35}, {"transfer_price": 0.02}], ids=["budget", "price"])


def random_lasso(seed: int, sizes: list[int], rows: int, condition: float = 1e2) -> LassoProblem:
    """Groups of these numbers of columns; eigenvalues of K down to 1/condition."""
    random = np.random.default_rng(seed)
    columns = sum(sizes)
    directions, _ = np.linalg.qr(random.normal(size=(columns, columns)))
    moment = (directions * np.geomspace(1, 1 / condition, columns)) @ directions.T
    residual = random.normal(size=(rows, columns)) @ moment
    energy = float(np.trace(residual @ np.linalg.solve(moment, residual.T)))
    first = np.concatenate([[0], np.cumsum(sizes)])
    return LassoProblem.of_arrays(moment, residual, random.uniform(0.5, 2, len(sizes)), first, energy)


def full(problem: LassoProblem, solution: LassoSolution) -> np.ndarray:
    weight = np.zeros_like(problem.residual)
    weight[:, problem.columns_of(solution.group)] = solution.weight
    return weight


def groups(problem: LassoProblem, matrix: np.ndarray) -> list[np.ndarray]:
    return [matrix[:, a:b] for a, b in zip(problem.first[:-1], problem.first[1:], strict=True)]


def newton(index: int, problem: LassoProblem, penalty_weight: float, near: np.ndarray | None) -> LassoSolution:
    return solve(problem, penalty_weight, near)


def whole_layer(
    problem: LayerProblem, formulation: Volume, owner: np.ndarray, penalty_weight: float
) -> tuple[Callable[[np.ndarray], float], float, np.ndarray]:
    """The group lasso over all weights of a layer: its objective, its least value, and (n, P) norms at the optimum."""
    second = problem.moments.regularised
    target = problem.target_weight.toarray() if problem.is_sparse else problem.target_weight
    row_owner = owner[problem.row_neuron]
    penalty = penalty_weight * np.sqrt(formulation.paid(problem))
    root = np.linalg.cholesky(second)
    scale = np.sqrt(problem.output_weight)[:, None]
    weight = cvxpy.Variable(target.shape)
    total = 0.5 * cvxpy.sum_squares(cvxpy.multiply(scale, target - weight) @ root)
    parts: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        for j in np.flatnonzero(problem.remote[:, k]):
            columns = np.flatnonzero(problem.column_value == j)
            half = np.linalg.cholesky(second[np.ix_(columns, columns)])
            if len(rows):
                parts[int(j), k] = rows, columns, half
                group = cvxpy.multiply(scale[rows], weight[rows][:, columns]) @ half
                total += penalty[j, k] * cvxpy.norm(group, "fro")
    model = cvxpy.Problem(cvxpy.Minimize(total))
    model.solve(solver="CLARABEL", tol_gap_rel=1e-10, tol_gap_abs=1e-10, tol_feas=1e-10)

    def norms(V: np.ndarray) -> np.ndarray:
        found = np.zeros((problem.n, problem.P))
        for (j, k), (rows, columns, half) in parts.items():
            found[j, k] = np.linalg.norm((scale[rows] * V[np.ix_(rows, columns)]) @ half)
        return found

    def objective(V: np.ndarray) -> float:
        return float(0.5 * np.square(scale * (target - V) @ root).sum() + (penalty * norms(V)).sum())

    return objective, float(model.value), norms(weight.value)


@limits
@each_layer
def test_raw_weights_solve_the_lasso_of_the_whole_layer(arguments: dict[str, Any], limit: dict[str, float]):
    problem = random_layer(seed=3, **arguments).problem
    owner = random_owner(problem)
    formulation = Volume(**limit)
    choice, weight = raw_lasso(problem, formulation, owner, newton)
    assert choice.penalty_weight > 0
    objective, least, norms = whole_layer(problem, formulation, owner, choice.penalty_weight)
    assert objective(weight) == pytest.approx(least, rel=1e-6, abs=1e-9)
    sent = np.zeros((problem.n, problem.P), dtype=bool)
    for j, k in np.argwhere(problem.remote):
        rows, columns = owner[problem.row_neuron] == k, problem.column_value == j
        sent[j, k] = weight[np.ix_(rows, columns)].any()
    clear = (norms > 1e-3 * norms.max()) | (norms < 1e-7 * norms.max())
    assert clear.sum() > 0.9 * clear.size
    assert (sent == (norms > 1e-3 * norms.max()))[clear].all()
    assert not (sent & ~choice.exchange.transfers).any()


@limits
@each_layer
def test_cvxpy_and_the_fast_solver_choose_the_same_transfers(arguments: dict[str, Any], limit: dict[str, float]):
    problem = random_layer(seed=4, **arguments).problem
    owner = random_owner(problem)
    fast, reference = (
        backend.solve(problem, Volume(**limit), SolveOptions(), owner) for backend in (GroupLassoFast(), GroupLasso())
    )
    assert reference.stats["lambda"] == pytest.approx(fast.stats["lambda"], rel=1e-9)
    assert reference.stats["lasso_objective"] == pytest.approx(fast.stats["lasso_objective"], rel=1e-6, abs=1e-9)
    assert (reference.exchange.transfers == fast.exchange.transfers).all()
    assert reference.stats["statuses"] == ["optimal"]


@pytest.mark.parametrize("backend", [GroupLassoScs, GroupLassoClarabel])
@pytest.mark.parametrize("sizes", [[1] * 30, [1, 3, 2, 4, 1, 1, 5, 2]], ids=["columns", "blocks"])
def test_each_solver_of_cvxpy_reaches_the_objective_and_the_support(backend: Any, sizes: list[int]):
    problem = random_lasso(5, sizes, rows=7, condition=1e3)
    reference = ConvexSolver(backend().solver)
    for share in (0.7, 0.3, 0.05):
        penalty_weight = share * problem.largest_useful
        exact = solve(problem, penalty_weight)
        found = reference(0, problem, penalty_weight, None)
        assert found.objective == pytest.approx(exact.objective, rel=1e-6)
        tied = np.abs(exact.pull / (penalty_weight * problem.penalty) - 1) < 1e-5
        differ = np.setxor1d(found.group, exact.group)
        assert tied[differ].all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=10),
    rows=st.integers(1, 6),
    share=st.floats(1e-3, 1.2),
    condition=st.sampled_from([1.0, 1e2, 1e5]),
)
def test_optimality_conditions(seed: int, sizes: list[int], rows: int, share: float, condition: float):
    problem = random_lasso(seed, sizes, rows, condition)
    penalty_weight = share * problem.largest_useful
    solution = solve(problem, penalty_weight, tolerance=1e-13)
    weight = full(problem, solution)
    moment = problem.rows(np.arange(weight.shape[1]))
    pulls = groups(problem, problem.residual - weight @ moment)
    scale = penalty_weight * problem.penalty
    for j, (own, pull) in enumerate(zip(groups(problem, weight), pulls, strict=True)):
        if j in solution.group:
            direction = own / np.linalg.norm(own)
            np.testing.assert_allclose(pull, scale[j] * direction, atol=1e-4 * scale[j])
        else:
            assert not own.any()
            assert np.linalg.norm(pull) <= scale[j] * (1 + 1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(1e-6, 3), share=st.floats(0.05, 1.0))
def test_the_gap_is_no_smaller_than_the_distance_from_the_optimum(seed: int, noise: float, share: float):
    problem = random_lasso(seed, [1, 2, 1, 3, 1], rows=3)
    penalty_weight = share * problem.largest_useful
    exact = solve(problem, penalty_weight)
    weight = full(problem, exact)
    weight = weight + noise * np.random.default_rng(seed).normal(size=weight.shape)
    worse = certify(problem, penalty_weight, np.arange(5), weight, {})
    moment = problem.rows(np.arange(8))
    by_hand = (
        0.5 * np.trace(weight @ moment @ weight.T)
        - np.trace(problem.residual @ weight.T)
        + 0.5 * problem.energy
        + penalty_weight
        * sum(p * np.linalg.norm(v) for p, v in zip(problem.penalty, groups(problem, weight), strict=True))
    )
    assert worse.objective == pytest.approx(by_hand, rel=1e-9)
    assert worse.gap >= (worse.objective - exact.objective) * (1 - 1e-9)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 1, 3]], ids=["columns", "blocks"])
def test_the_derivatives_of_the_reduced_function_also_where_groups_are_zero(sizes: list[int]):
    problem = random_lasso(6, sizes, rows=4)
    count = len(sizes)
    part = _Part(problem, np.arange(count), 0.3 * problem.largest_useful)
    norm = np.random.default_rng(0).uniform(0.2, 1.5, count)
    norm[1] = 0.0

    def slope(at: np.ndarray) -> np.ndarray:
        remainder = part.remainder(part.at(at))
        tension = np.array([np.linalg.norm(G) for G in groups(problem, remainder)]) / (
            part.penalty_weight * part.penalty
        )
        return 0.5 * part.penalty_weight * part.penalty * (1 - tension**2)

    point = part.at(norm)
    hessian = part.hessian(point, part.remainder(point), np.ones(count, dtype=bool))
    step = 1e-6
    for j in range(count):
        ahead = norm + step * (np.arange(count) == j)
        middle = norm + 0.5 * step * (np.arange(count) == j)
        assert (part.at(ahead).value - point.value) / step == pytest.approx(slope(middle)[j], rel=1e-5, abs=1e-7)
        np.testing.assert_allclose((slope(ahead) - slope(norm)) / step, hessian[:, j], rtol=1e-3, atol=1e-5)


def test_nothing_is_received_from_the_largest_useful_penalty_on():
    problem = random_lasso(7, [1, 2, 1, 3], rows=5)
    for share in (1.0, 1.0001, 5.0):
        assert len(solve(problem, share * problem.largest_useful).group) == 0
    assert len(solve(problem, 0.999 * problem.largest_useful).group) == 1


def test_a_warm_start_changes_the_way_not_the_answer():
    problem = random_lasso(8, [1] * 60, rows=10, condition=1e4)
    largest = problem.largest_useful
    cold = solve(problem, 0.1 * largest)
    starts = [solve(problem, share * largest).norm for share in (0.5, 0.12, 0.08, 0.01)] + [np.full(60, 7.0)]
    for start in starts:
        warm = solve(problem, 0.1 * largest, start)
        assert warm.objective == pytest.approx(cold.objective, rel=1e-9)
        assert (warm.group == cold.group).all()
        np.testing.assert_allclose(full(problem, warm), full(problem, cold), atol=1e-4)
    near = solve(problem, 0.1 * largest, starts[1])
    assert near.stats["newton_steps"] < cold.stats["newton_steps"]


@pytest.mark.parametrize("sizes", [[1] * 300, [3] * 100], ids=["columns", "blocks"])
def test_many_groups_converge_in_few_steps(sizes: list[int]):
    problem = random_lasso(9, sizes, rows=40, condition=1e4)
    for share in (0.5, 0.1, 0.01):
        solution = solve(problem, share * problem.largest_useful)
        assert solution.gap <= 1e-10 * problem.energy
        assert solution.stats["newton_steps"] <= 60


def test_no_time_no_solution():
    problem = random_lasso(10, [1] * 20, rows=4)
    with pytest.raises(OutOfTime):
        solve(problem, 0.1 * problem.largest_useful, out_of_time=lambda: True)


@each_layer
def test_budgets_are_hard_and_filled(arguments: dict[str, Any]):
    problem = random_layer(seed=6, **{"value_bytes": None, **arguments}).problem
    owner = random_owner(problem)
    before = np.inf
    for budget in (0.0, 0.1, 0.35, 0.7, 1.0):
        solution = GroupLassoFast().solve(problem, Volume(budget=budget), SolveOptions(), owner)
        transfers = solution.exchange.transfers
        left = np.floor(budget * problem.direct_volume + 1e-9) - problem.transfer_bytes[transfers].sum()
        assert left >= 0
        if budget == 0:
            assert problem.transfer_bytes[transfers].sum() == 0
        error = metrics.weighted_error(problem, owner, refit(problem, owner, transfers))
        assert error <= before * 1.05 + 1e-9
        before = error
        would_fit = problem.remote & ~transfers & (problem.transfer_bytes <= left)
        for j, k in np.argwhere(would_fit):  # only what is of no use may be left out
            more = transfers.copy()
            more[j, k] = True
            assert metrics.weighted_error(problem, owner, refit(problem, owner, more)) >= error * (1 - 1e-6) - 1e-9
    assert before == pytest.approx(
        metrics.weighted_error(problem, owner, refit(problem, owner, problem.remote)), abs=1e-9
    )


def test_a_budget_has_the_smallest_penalty_whose_transfers_fit():
    problem = random_layer(seed=7, n=30, noise=0.3).problem
    owner = random_owner(problem)
    formulation = Volume(budget=0.3)
    choice = list(lasso_path.search(problem, formulation, owner, newton))[-1]
    workers = [WorkerLasso(worker) for worker in worker_problems(problem, formulation, owner)]

    def size(penalty_weight: float) -> float:
        found = [solve(worker.lasso, penalty_weight) for worker in workers]
        return sum(worker.size[one.group].sum() for worker, one in zip(workers, found, strict=True))

    limit = formulation.limit(problem)
    assert size(choice.penalty_weight) <= limit
    assert limit - size(choice.penalty_weight) < 8 or size(choice.penalty_weight / 1.01) > limit


def test_a_price_is_the_best_point_of_the_path():
    problem = random_layer(seed=8, n=24, noise=0.3).problem
    owner = random_owner(problem)
    formulation = Volume(transfer_price=0.03)
    found = verify(
        problem, formulation, GroupLassoFast().solve(problem, formulation, SolveOptions(), owner), SolveOptions()
    )
    workers = [WorkerLasso(worker) for worker in worker_problems(problem, formulation, owner)]
    largest = max(worker.lasso.largest_useful for worker in workers)
    assert 0 < found.volume < problem.direct_volume
    for penalty_weight in np.geomspace(1e-3, 1, 60) * largest:
        transfers = np.zeros((problem.n, problem.P), dtype=bool)
        for worker in workers:
            transfers[worker.values(solve(worker.lasso, penalty_weight).group), worker.worker.worker] = True
        error = metrics.weighted_error(problem, owner, refit(problem, owner, transfers))
        assert found.objective <= 1.02 * (error + 0.03 * (problem.transfer_price * transfers).sum())
    free = GroupLassoFast().solve(problem, Volume(transfer_price=0.0), SolveOptions(), owner)
    assert free.exchange.transfers[problem.remote].all()
    dear = GroupLassoFast().solve(problem, Volume(transfer_price=1e6), SolveOptions(), owner)
    assert not dear.exchange.transfers.any()


def test_max_nmse_is_met_and_a_looser_limit_costs_less():
    problem = random_layer(seed=9, m=8, n=14, noise=0.1).problem
    owner = random_owner(problem)
    volumes = []
    for max_nmse in (0.5, 0.2, 0.1, 0.05, 0.03):
        transfers = GroupLassoFast().solve(problem, Volume(max_nmse=max_nmse), SolveOptions(), owner).exchange.transfers
        weight = refit(problem, owner, transfers)
        assert metrics.nmse(problem, owner, weight, corrected_bias(problem, weight)) <= max_nmse
        volumes.append(transfers.sum())
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1] < problem.remote.sum()


def test_an_nmse_of_zero_sends_what_is_needed_and_no_more():
    layer = random_layer(seed=10)
    weight = layer.problem.weight.copy()
    owner = random_owner(layer.problem)
    weight[owner == 0, 4] = 0.0  # held by worker 2: worker 0 has no use for it
    problem = replace(layer.problem, weight=weight)
    transfers = GroupLassoFast().solve(problem, Volume(max_nmse=0.0), SolveOptions(), owner).exchange.transfers
    assert metrics.weighted_error(problem, owner, refit(problem, owner, transfers)) == pytest.approx(0, abs=1e-9)
    assert not transfers[4, 0]


def test_nothing_to_compute_and_constant_inputs_need_nothing():
    silent = LayerProblem.create(
        np.zeros((4, 6)), 2, moments=Moments.from_samples(np.random.default_rng(0).normal(size=(9, 6)))
    )
    constant = LayerProblem.create(np.ones((4, 6)), 2, moments=Moments.from_samples(np.ones((9, 6))))
    for problem in (silent, constant):
        for limit in ({"budget": 0.5}, {"transfer_price": 0.1}, {"max_nmse": 0.1}):
            for backend in (GroupLassoFast(), GroupLasso()):
                found = backend.solve(problem, Volume(**limit), SolveOptions(), np.array([0, 0, 1, 1]))
                assert found.termination is Termination.HEURISTIC
                assert problem is constant or not found.exchange.transfers.any()


@pytest.mark.parametrize("limit", [{"budget": 0.3}, {"transfer_price": 0.02}, {"max_nmse": 0.1}], ids=str)
@pytest.mark.parametrize("backend", [GroupLassoFast(), GroupLasso()], ids=["fast", "cvxpy"])
def test_without_time_there_is_a_valid_answer_that_says_so(backend: Any, limit: dict[str, float]):
    problem = random_layer(seed=12, n=40).problem
    owner = random_owner(problem)
    found = backend.solve(problem, Volume(**limit), SolveOptions(time_limit=1e-6), owner)
    assert found.termination is Termination.TIME_LIMIT
    assert not verify(problem, Volume(**limit), found, SolveOptions()).violations


def test_a_child_process_gives_the_same_answer():
    problem = random_layer(seed=13, n=12, noise=0.2).problem
    owner = random_owner(problem)
    here, there = (
        GroupLasso().solve(problem, Volume(budget=0.3), SolveOptions(time_limit=limit), owner) for limit in (None, 60.0)
    )
    assert there.termination is Termination.HEURISTIC
    assert (here.exchange.transfers == there.exchange.transfers).all()
    assert there.stats["lambda"] == here.stats["lambda"]


def test_a_solver_that_is_missing_or_fails_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    problem = random_layer(seed=14).problem
    owner = random_owner(problem)
    missing = GroupLasso("NONESUCH").solve(problem, Volume(budget=0.3), SolveOptions(), owner)
    assert missing.termination is Termination.ERROR
    assert "NONESUCH" in missing.message
    monkeypatch.setattr("repurpose_opt_solvers.group_lasso_.SETTINGS", {"SCS": {"max_iters": 20, "eps_abs": 1e-12}})
    inaccurate = GroupLasso().solve(problem, Volume(budget=0.3), SolveOptions(), owner)
    assert "optimal_inaccurate" in inaccurate.stats["statuses"]
    monkeypatch.setattr(cvxpy.Problem, "status", property(lambda self: "infeasible"))
    failed = GroupLasso().solve(problem, Volume(budget=0.3), SolveOptions(), owner)
    assert (failed.termination, failed.exchange) == (Termination.ERROR, None)
    assert "infeasible" in failed.message


def test_noise_near_the_largest_useful_penalty_is_no_support():
    problem = random_lasso(15, [1] * 5, rows=3)
    assert not is_nonzero(problem, np.full(5, 1e-9)).any()
    assert is_nonzero(problem, np.array([1.0, 2e-4, 5e-5, 0.0, 0.5])).tolist() == [True, True, False, False, True]


def test_they_serve_the_total_volume_only():
    problem = random_layer().problem
    for backend in (GroupLassoFast(), GroupLasso()):
        assert backend.supports(problem, Volume(budget=0.1)) is None
        assert "Volume" in str(backend.supports(problem, Edge()))
        assert "Volume" in str(backend.supports(problem, Lossless()))
        assert "total" in str(backend.supports(problem, Volume(budget=0.1, communication="busiest")))


@pytest.mark.slow
def test_the_experiment_reports_every_solver(tmp_path: Path):
    assert experiment.main(["--quick", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "lasso.json").read_text())
    solved = {row["solver"] for row in report["rows"] if "seconds" in row}
    assert {"Newton", *experiment.CONIC, *experiment.FIRST_ORDER} <= solved
    for row in report["rows"]:
        if "seconds" in row:
            assert row["excess"] <= 1e-5
    assert "FISTA" in (tmp_path / "lasso.md").read_text()
