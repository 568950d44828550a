"""Refit and compensated cost against least squares on the samples, neuron by neuron, and against CVXPY."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import (
    BLOCKS,
    Layer,
    error_on_samples,
    has_column,
    random_layer,
    random_owner,
    random_supported_weight,
    random_transfers,
    refit_on_samples,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from repurpose_opt import Exchange, LayerProblem, Moments, metrics
from repurpose_opt import problem as problem_module
from repurpose_opt.problem import dense
from repurpose_opt.repair import column_energy, compensated_cost, corrected_bias, refit, restrict, value_energy
from repurpose_opt.testing import random_problem

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.4},
    "output_weight": {"noise": 0.4, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "blocks": {"noise": 0.4, **BLOCKS},
    "permuted_rows": {"noise": 0.4, "row_neuron": [3, 1, 0, 5, 4, 2]},
    "sparse": {"noise": 0.4, "is_sparse": True, "density": 0.5},
    "a_worker_without_inputs": {"noise": 0.4, "input_owner": [0, 0, 2, 2, 0]},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)


def expected_refit(layer: Layer, owner: np.ndarray, transfers: np.ndarray) -> np.ndarray:
    has = has_column(layer.problem, owner, transfers)
    return np.array([refit_on_samples(layer, row, np.flatnonzero(has[row])) for row in range(layer.problem.rows)])


@each_layer
def test_refit_is_least_squares_on_the_samples(arguments: dict[str, Any]):
    layer = random_layer(seed=1, **arguments)
    owner, transfers = random_owner(layer.problem), random_transfers(layer.problem)
    weight = refit(layer.problem, owner, transfers)
    assert sparse.issparse(weight) == layer.problem.is_sparse
    np.testing.assert_allclose(dense(weight), expected_refit(layer, owner, transfers), rtol=1e-8, atol=1e-10)


def test_refit_is_what_cvxpy_finds():
    cvxpy = pytest.importorskip("cvxpy")
    layer = random_layer(seed=2, noise=0.4, **BLOCKS)
    problem = layer.problem
    owner, transfers = random_owner(problem), random_transfers(problem)
    received = layer.received - layer.received.mean(axis=0)
    target = (layer.original - layer.original.mean(axis=0)) @ layer.weight.T
    V = cvxpy.Variable(problem.weight.shape)
    error = cvxpy.sum_squares(target - received @ V.T) / len(received)
    lacking = ~has_column(problem, owner, transfers)
    convex = cvxpy.Problem(cvxpy.Minimize(error + layer.ridge * cvxpy.sum_squares(layer.weight - V)), [V[lacking] == 0])
    convex.solve(solver="CLARABEL")
    weight = refit(problem, owner, transfers)
    np.testing.assert_allclose(weight, V.value, atol=1e-4)
    assert metrics.weighted_error(problem, owner, weight) == pytest.approx(convex.value, rel=1e-5)


@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_no_other_weights_with_the_same_support_have_a_smaller_error(seed: int, share: float):
    layer = random_layer(seed, noise=0.4)
    owner, transfers = random_owner(layer.problem, seed), random_transfers(layer.problem, seed, share)
    best = refit(layer.problem, owner, transfers)
    step = random_supported_weight(layer.problem, owner, transfers, seed)
    for size in (1e-3, -1e-3, 0.1, -0.1):
        assert error_on_samples(layer, best + size * step) >= error_on_samples(layer, best)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_refit_on_a_diagonal_scales_the_weights_that_are_left(is_sparse: bool):
    """Uncorrelated inputs: v = w (D + λ) / (C + λ) where the worker has the value, whatever else it has."""
    second, cross, target = np.array([1.0, 2.0, 3.0]), np.array([0.9, 1.0, 2.5]), np.array([1.0, 1.5, 2.5])
    moments = Moments.from_raw(second, cross, target_moment=target)
    problem = random_problem(3, moments=moments)
    owner, transfers = random_owner(problem), random_transfers(problem)
    scale = (cross + moments.ridge) / (second + moments.ridge)
    expected = np.where(has_column(problem, owner, transfers), problem.weight * scale, 0.0)
    if is_sparse:
        problem = replace(problem, weight=sparse.csr_array(problem.weight))
    np.testing.assert_allclose(dense(refit(problem, owner, transfers)), expected, rtol=1e-12)


def test_refit_with_everything_sent_gives_the_target_weight_and_the_original_where_nothing_was_pruned():
    pruned, whole = random_layer(seed=4, noise=0.4).problem, random_layer(seed=4).problem
    for problem in (pruned, whole):
        owner = random_owner(problem)
        np.testing.assert_allclose(refit(problem, owner, problem.remote), problem.target_weight, rtol=1e-9)
    np.testing.assert_array_equal(whole.target_weight, whole.weight)
    assert not np.allclose(pruned.target_weight, pruned.weight, rtol=1e-3)


def test_the_refitted_weight_keeps_its_precision():
    problem = random_layer(seed=5).problem
    single = replace(problem, weight=problem.weight.astype(np.float32))
    assert refit(single, random_owner(single), single.remote).dtype == np.float32


def test_restrict_keeps_the_weights_that_are_there_and_no_others():
    problem = random_layer(seed=6, **BLOCKS).problem
    owner, transfers = random_owner(problem), random_transfers(problem)
    expected = np.where(has_column(problem, owner, transfers), problem.weight, 0.0)
    row_owner = owner[problem.row_neuron]
    np.testing.assert_array_equal(restrict(problem, problem.weight, row_owner, transfers), expected)
    thin = replace(problem, weight=sparse.csr_array(problem.weight))
    np.testing.assert_array_equal(dense(restrict(thin, thin.weight, row_owner, transfers)), expected)


@each_layer
def test_corrected_bias_leaves_no_error_in_the_mean(arguments: dict[str, Any]):
    layer = random_layer(seed=7, **arguments)
    owner, transfers = random_owner(layer.problem), random_transfers(layer.problem)
    weight = refit(layer.problem, owner, transfers)
    bias = corrected_bias(layer.problem, weight)
    difference = layer.original @ layer.weight.T + layer.problem.bias - layer.received @ dense(weight).T - bias
    np.testing.assert_allclose(difference.mean(axis=0), 0.0, atol=1e-12)


@each_layer
def test_compensated_cost_is_the_error_after_refitting_each_neuron_on_each_worker(arguments: dict[str, Any]):
    layer = random_layer(seed=8, **arguments)
    problem, transfers = layer.problem, random_transfers(layer.problem)
    cost = compensated_cost(problem, transfers)
    for i in range(problem.m):
        rows = np.flatnonzero(problem.row_neuron == i)
        for k in range(problem.P):
            has = has_column(problem, np.full(problem.m, k), transfers)
            weight = layer.weight.copy()
            for row in rows:
                weight[row] = refit_on_samples(layer, int(row), np.flatnonzero(has[row]))
            # The rows of the other neurons must count nothing: their error is left out by g = 0.
            g = np.where(np.isin(np.arange(problem.rows), rows), problem.output_weight, 0.0)
            alone = replace(layer, problem=replace(problem, output_weight=g))
            assert cost[i, k] == pytest.approx(error_on_samples(alone, weight), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("moments", ["identity", "diagonal", "pruned_diagonal", "full", "pruned"])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_compensated_costs_add_up_to_the_error_after_refit(moments: str, is_sparse: bool):
    given_moments = {
        "identity": Moments.identity(5),
        "diagonal": Moments.from_raw(np.arange(1.0, 6.0)),
        "pruned_diagonal": Moments.from_raw(
            np.arange(1.0, 6.0), np.arange(0.9, 5.0), target_moment=np.arange(1.0, 6.0)
        ),
        "full": random_layer(9).problem.moments,
        "pruned": random_layer(9, noise=0.4).problem.moments,
    }[moments]
    weight: Any = random_layer(9).problem.weight
    weight = sparse.csr_array(weight) if is_sparse else weight
    problem = LayerProblem.create(weight, 3, moments=given_moments, output_weight=[1, 2, 3, 0.5, 1, 1])
    owner, transfers = random_owner(problem), random_transfers(problem)
    cost = compensated_cost(problem, transfers)[np.arange(6), owner].sum()
    error = metrics.weighted_error(problem, owner, refit(problem, owner, transfers))
    assert cost == pytest.approx(error, rel=1e-9)


def diagonal_moments(columns: int, seed: int = 0) -> Moments:
    """x̂ ≠ x, with means."""
    random = np.random.default_rng(seed)
    original = random.normal(size=(50, columns)) * random.uniform(0.5, 2.0, columns) + 1.0
    return Moments.from_samples(original + 0.3 * random.normal(size=original.shape), original, diagonal=True)


@pytest.mark.parametrize("height", [1, 3, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_row_blocks_of_any_height_give_what_whole_matrices_give(
    monkeypatch: pytest.MonkeyPatch, height: int, dtype: type
):
    monkeypatch.setattr(problem_module, "_CACHED_ENTRIES", height * 8)
    moments = diagonal_moments(8)
    weight = np.random.default_rng(1).normal(size=(8, 8)).astype(dtype)
    g = np.arange(1.0, 9.0)
    problem = LayerProblem.create(weight, 3, moments=moments, output_weight=g, input_owner=[0, 1, 2, 1, 0], **BLOCKS)
    owner, transfers = random_owner(problem), random_transfers(problem)
    tolerance = {"rtol": 1e-12 if dtype is np.float64 else 1e-6, "atol": 1e-12 if dtype is np.float64 else 1e-5}
    scale = (moments.cross + moments.ridge) / moments.variance
    W = weight.astype(np.float64)
    np.testing.assert_allclose(problem.target_weight, W * scale, **tolerance)
    assert problem.target_weight.dtype == dtype
    energy = np.square(W * scale) * moments.variance * g[:, None]
    np.testing.assert_allclose(column_energy(problem), energy, **tolerance)
    np.testing.assert_allclose(problem.output_energy, np.square(W) @ (moments.target + moments.ridge), **tolerance)
    by_worker = np.stack([energy[owner[problem.row_neuron] == k].sum(axis=0) for k in range(3)], axis=1)
    by_value = np.stack([by_worker[problem.column_value == j].sum(axis=0) for j in range(5)])
    np.testing.assert_allclose(value_energy(problem, owner), by_value, **tolerance)
    lacking = ~(transfers | ~problem.remote)[problem.column_value]
    unexplained = g * (np.square(W) @ (moments.target + moments.ridge)) - energy.sum(axis=1)
    by_row = energy @ lacking + unexplained[:, None]
    by_neuron = np.stack([by_row[problem.row_neuron == i].sum(axis=0) for i in range(6)])
    np.testing.assert_allclose(compensated_cost(problem, transfers), by_neuron, **tolerance)
    has = has_column(problem, owner, transfers)
    V = refit(problem, owner, transfers)
    np.testing.assert_allclose(V, np.where(has, W * scale, 0.0), **tolerance)
    assert V.dtype == dtype
    bias = W @ moments.target_mean - V.astype(np.float64) @ moments.mean
    np.testing.assert_allclose(corrected_bias(problem, V), bias, **tolerance)


WHOLE = random_problem(
    512, 2048, P=4, weight=np.random.default_rng(2).normal(size=(512, 2048)).astype(np.float32),
    moments=diagonal_moments(2048),
)  # fmt: skip
OWNER, TRANSFERS = random_owner(WHOLE), random_transfers(WHOLE)
FUNCTIONS: dict[str, tuple[float, Callable[[], Any]]] = {
    "target_weight": (1.0, lambda: replace(WHOLE).target_weight),
    "output_energy": (0.0, lambda: replace(WHOLE).output_energy),
    "restrict": (1.0, lambda: restrict(WHOLE, WHOLE.weight, OWNER, TRANSFERS)),
    "corrected_bias": (0.0, lambda: corrected_bias(WHOLE, WHOLE.weight)),
    "compensated_cost": (0.0, lambda: compensated_cost(WHOLE, TRANSFERS)),
    "value_energy": (0.0, lambda: value_energy(WHOLE, OWNER)),
    "weighted_error": (0.0, lambda: metrics.weighted_error(WHOLE, OWNER, WHOLE.weight)),
    "weighted_error of what nothing was pruned before": (
        0.0,
        lambda: metrics.weighted_error(replace(WHOLE, moments=Moments.identity(2048)), OWNER, WHOLE.weight),
    ),
    "nmse": (0.0, lambda: metrics.nmse(WHOLE, OWNER, WHOLE.weight, WHOLE.bias)),
    "weights_outside": (
        0.0,
        lambda: metrics.weights_outside(
            WHOLE, OWNER, Exchange.of_transfers(TRANSFERS, WHOLE.input_owner), WHOLE.weight
        ),
    ),
}


@pytest.mark.parametrize(("result", "function"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_diagonal_moments_need_no_copy_of_the_weight(result: float, function: Callable[[], Any]):
    """Beyond a result of so many times the weight: row blocks, and vectors of the columns."""
    assert WHOLE.target_weight is not None  # computed once, and not counted below
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (result + 0.6) * WHOLE.weight.nbytes
