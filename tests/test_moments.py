"""Moments: centred, in every way of giving them."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import random_layer, random_owner, random_supported_weight, random_transfers
from hypothesis import given
from hypothesis import strategies as st

from repurpose_opt import LayerProblem, Moments, Volume, accumulator, metrics, solve_layer
from repurpose_opt.accumulator import MomentAccumulator
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.moments import FEW_SAMPLES, RELATIVE_RIDGE
from repurpose_opt.testing import correlated_samples


def samples() -> tuple[np.ndarray, np.ndarray]:
    original = correlated_samples(4, seed=1)
    return original + 0.2 * np.random.default_rng(2).normal(size=original.shape), original


def test_samples_give_their_covariances():
    received, original = samples()
    moments = Moments.from_samples(received, original)
    together = np.cov(np.hstack([received, original]).T, bias=True)
    np.testing.assert_allclose(moments.second, together[:4, :4], rtol=1e-12)
    np.testing.assert_allclose(moments.cross, together[4:, :4], rtol=1e-12, atol=1e-14)  # E[x x̂ᵀ]: x in the rows
    np.testing.assert_allclose(moments.target, together[4:, 4:], rtol=1e-12)
    np.testing.assert_allclose(moments.mean, received.mean(axis=0))
    np.testing.assert_allclose(moments.target_mean, original.mean(axis=0))
    assert not moments.same_inputs


def test_raw_moments_equal_the_samples_that_they_come_from():
    received, original = samples()
    count = len(received)
    expected = Moments.from_samples(received, original)
    moments = Moments.from_raw(
        received.T @ received / count,
        original.T @ received / count,
        received.mean(axis=0),
        original.T @ original / count,
        original.mean(axis=0),
    )
    for name in ("second", "cross", "target", "mean", "target_mean", "ridge"):
        np.testing.assert_allclose(getattr(moments, name), getattr(expected, name), rtol=1e-9, atol=1e-12)


def test_raw_diagonals_are_the_diagonals_of_the_square_ones():
    received, original = samples()
    count = len(received)
    square = (received.T @ received / count, original.T @ received / count, original.T @ original / count)
    means = {"input_mean": received.mean(axis=0), "target_mean": original.mean(axis=0)}
    full = Moments.from_raw(square[0], square[1], target_moment=square[2], **means)
    diagonal = Moments.from_raw(np.diag(square[0]), np.diag(square[1]), target_moment=np.diag(square[2]), **means)
    assert diagonal.is_diagonal
    assert not full.is_diagonal
    for name in ("second", "cross", "target"):
        np.testing.assert_allclose(getattr(diagonal, name), np.diag(getattr(full, name)), rtol=1e-12)


def test_the_ridge_is_a_fraction_of_the_mean_variance_and_positive_even_for_constant_inputs():
    received, _ = samples()
    assert Moments.from_samples(received).ridge == pytest.approx(RELATIVE_RIDGE * received.var(axis=0).mean())
    constant = Moments.from_samples(np.ones((5, 3)))
    assert constant.ridge > 0
    np.linalg.cholesky(constant.regularised)
    np.testing.assert_allclose(constant.variance, np.diag(constant.regularised))


def test_one_set_of_samples_means_that_nothing_was_pruned_before():
    moments = Moments.from_samples(samples()[0])
    assert moments.same_inputs
    assert moments.target is moments.second


def test_without_data_the_error_is_the_distance_of_the_weights():
    moments = Moments.identity(3)
    assert moments.ridge == 0
    np.testing.assert_array_equal(moments.regularised, np.ones(3))


# --------------------------------------------------------------------------------------------------------- batches

splits = st.lists(st.integers(1, 59), max_size=6).map(lambda cuts: sorted(set(cuts)))


@given(st.integers(0, 10**6), splits, st.sampled_from([0.0, 1e6]), st.integers(1, 40))
def test_any_split_into_batches_gives_the_covariances(seed: int, cuts: list[int], mean: float, block: int):
    original = correlated_samples(4, seed) + mean
    received = original + 0.2 * np.random.default_rng(seed).normal(size=original.shape)
    together = np.cov(np.hstack([received, original]).T, bias=True)
    before = accumulator._BLOCK_ENTRIES
    accumulator._BLOCK_ENTRIES = 4 * block
    try:
        pairs = zip(np.split(received, cuts), np.split(original, cuts), strict=True)
        moments = Moments.from_batches(pairs, shrinkage=0.0)
    finally:
        accumulator._BLOCK_ENTRIES = before
    tolerance = {"rtol": 1e-10, "atol": 1e-10 * together.max()}
    np.testing.assert_allclose(moments.second, together[:4, :4], **tolerance)
    np.testing.assert_allclose(moments.cross, together[4:, :4], **tolerance)
    np.testing.assert_allclose(moments.target, together[4:, 4:], **tolerance)
    np.testing.assert_allclose(moments.mean, received.mean(axis=0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(moments.target_mean, original.mean(axis=0), rtol=1e-14, atol=1e-14)
    assert moments.samples == 60


def test_samples_of_single_precision_are_summed_in_double_and_never_copied_whole(monkeypatch: pytest.MonkeyPatch):
    inputs = (1e3 + np.random.default_rng(0).normal(size=(50_000, 16))).astype(np.float32)
    monkeypatch.setattr(accumulator, "_BLOCK_ENTRIES", 1 << 14)
    tracemalloc.start()
    moments = Moments.from_samples(inputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < inputs.nbytes / 4
    np.testing.assert_allclose(moments.second, np.cov(inputs.T.astype(np.float64), bias=True), rtol=1e-10, atol=1e-10)


def tensors() -> Iterator[Any]:
    torch = pytest.importorskip("torch")
    received, original = (torch.from_numpy(array) for array in samples())
    return iter(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(received, original), batch_size=17))


BATCHES: dict[str, Callable[[], Any]] = {
    "generator of pairs": lambda: ((x, y) for x, y in zip(*map(halves, samples()), strict=True)),
    "list of pairs": lambda: list(zip(*map(halves, samples()), strict=True)),
    "lists of numbers": lambda: [(x.tolist(), y.tolist()) for x, y in zip(*map(halves, samples()), strict=True)],
    "DataLoader": tensors,
    "an empty batch among them": lambda: [(samples()[0][:0], samples()[1][:0]), samples()],
}


def halves(array: np.ndarray) -> list[np.ndarray]:
    return [array[:20], array[20:]]


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_batches_of_every_kind_are_the_samples_in_one_array(batches: Callable[[], Any]):
    expected = Moments.from_samples(*samples())
    moments = Moments.from_batches(batches())
    for name in ("second", "cross", "target", "mean", "target_mean", "ridge"):
        np.testing.assert_allclose(getattr(moments, name), getattr(expected, name), rtol=1e-12, atol=1e-13)


def test_solve_layer_takes_batches_for_inputs():
    received, original = samples()
    W = np.random.default_rng(0).normal(size=(6, 4))
    expected = solve_layer(W, 2, inputs=received, target_inputs=original, formulation=Volume(budget=0.3))
    from_pairs = solve_layer(
        W, 2, inputs=zip(*map(halves, (received, original)), strict=True), formulation=Volume(budget=0.3)
    )
    assert from_pairs.objective == pytest.approx(expected.objective, rel=1e-9)
    expected = solve_layer(W, 2, inputs=received.tolist(), formulation=Volume(budget=0.3))
    for batches in (halves(received), [(half,) for half in halves(received)], iter(halves(received))):
        solution = solve_layer(W, 2, inputs=batches, formulation=Volume(budget=0.3))
        assert solution.objective == pytest.approx(expected.objective, rel=1e-9)
        assert solution.problem.moments.samples == len(received)


WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    "no batches": ("inputs", lambda: Moments.from_batches([])),
    "empty batches": ("inputs", lambda: Moments.from_batches([np.ones((0, 3))])),
    "one sample": ("inputs", lambda: Moments.from_samples(np.ones((1, 3)))),
    "one sample in batches": ("inputs", lambda: Moments.from_batches([np.ones((1, 3)), np.ones((0, 3))])),
    "no columns": ("inputs", lambda: Moments.from_samples(np.ones((5, 0)))),
    "other columns later": ("inputs", lambda: Moments.from_batches([np.ones((5, 3)), np.ones((5, 2))])),
    "NaN later": ("inputs", lambda: Moments.from_batches([np.ones((5, 3)), np.full((5, 3), np.nan)])),
    "infinite originals": ("target_inputs", lambda: Moments.from_samples(np.ones((5, 3)), np.full((5, 3), np.inf))),
    "originals of another shape": ("target_inputs", lambda: Moments.from_samples(np.ones((5, 3)), np.ones((4, 3)))),
    "originals in one batch only": (
        "target_inputs",
        lambda: Moments.from_batches([np.ones((5, 3)), (np.ones((5, 3)), np.ones((5, 3)))]),
    ),
    "labels for originals": ("target_inputs", lambda: Moments.from_batches([(np.ones((5, 3)), np.ones(5))])),
    "three dimensions": ("inputs", lambda: Moments.from_samples(np.ones((5, 3, 2)))),
    "complex numbers": ("inputs", lambda: Moments.from_samples(np.ones((5, 3)) * 1j)),
    "ragged samples": ("inputs", lambda: Moments.from_samples([[1.0, 2.0], [3.0]])),
    "batches that are words": ("inputs", lambda: Moments.from_batches("many")),
    "shrinkage above 1": ("shrinkage", lambda: Moments.from_samples(np.ones((5, 3)), shrinkage=1.5)),
    "shrinkage of words": ("shrinkage", lambda: Moments.from_samples(np.ones((5, 3)), shrinkage="much")),  # type: ignore[arg-type]
    "shrinkage NaN": ("shrinkage", lambda: Moments.from_samples(np.ones((5, 3)), shrinkage=np.nan)),
    "target_inputs beside batches": (
        "target_inputs",
        lambda: solve_layer(np.ones((3, 4)), 2, inputs=halves(samples()[0]), target_inputs=samples()[1]),
    ),
    "diagonal_moments without inputs": (
        "diagonal_moments",
        lambda: solve_layer(np.ones((3, 4)), 2, second_moment=np.ones(4), diagonal_moments=True),
    ),
}


@pytest.mark.parametrize(("argument", "call"), WRONG.values(), ids=WRONG)
def test_wrong_samples_are_one_line_that_names_the_argument(argument: str, call: Callable[[], Any]):
    with pytest.raises(InvalidArgument) as raised:
        call()
    assert raised.value.argument == argument
    assert "\n" not in str(raised.value)


def test_a_batch_that_is_refused_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(accumulator, "_BLOCK_ENTRIES", 8)
    received, _ = samples()
    sums = MomentAccumulator()
    sums.add(received[:30])
    spoilt = received[30:].copy()
    spoilt[-1, -1] = np.nan
    with pytest.raises(InvalidArgument):
        sums.add(spoilt)
    sums.add(received[30:])
    np.testing.assert_allclose(Moments.of(sums).second, np.cov(received.T, bias=True), rtol=1e-12)


# ------------------------------------------------------------------------------------------------------- shrinkage


def two_pass_shrinkage(inputs: np.ndarray) -> float:
    """Ledoit and Wolf's δ by its definition, sample by sample."""
    centred = inputs - inputs.mean(axis=0)
    C = centred.T @ centred / len(centred)
    aim = np.trace(C) / len(C) * np.eye(len(C))
    noise = np.mean([np.square(np.outer(c, c) - C).sum() for c in centred]) / len(centred)
    return float(min(noise / np.square(C - aim).sum(), 1.0))


@given(st.integers(0, 10**6), splits, st.integers(2, 60), st.sampled_from([0.0, 1e3]))
def test_shrinkage_in_one_pass_is_that_of_two_passes(seed: int, cuts: list[int], columns: int, mean: float):
    inputs = correlated_samples(columns, seed) ** 3 + mean
    batches = np.split(inputs, cuts)
    moments = Moments.from_batches(batches)
    expected = two_pass_shrinkage(inputs) if len(inputs) < FEW_SAMPLES * columns else 0.0
    assert moments.shrinkage == pytest.approx(expected, rel=1e-6)
    C = np.cov(inputs.T, bias=True)
    shrunk = (1 - expected) * C + expected * np.trace(C) / columns * np.eye(columns)
    np.testing.assert_allclose(moments.second, shrunk, rtol=1e-6, atol=1e-7 * C.max())


@pytest.mark.parametrize(("count", "columns"), [(10, 40), (50, 40), (200, 100), (3, 2)])
def test_shrinkage_is_that_of_scikit_learn(count: int, columns: int):
    covariance = pytest.importorskip("sklearn.covariance")
    inputs = correlated_samples(columns, count=count) + 5.0
    reference = covariance.LedoitWolf().fit(inputs)
    moments = Moments.from_samples(inputs)
    assert moments.shrinkage == pytest.approx(reference.shrinkage_, rel=1e-9)
    assert 0 < moments.shrinkage <= 1
    np.testing.assert_allclose(moments.second, reference.covariance_, rtol=1e-9, atol=1e-12)


def test_shrinkage_brings_few_samples_closer_to_the_covariance_than_they_are():
    scale = np.random.default_rng(0).normal(size=(30, 30)) @ np.diag(np.geomspace(1, 0.1, 30))
    truth = scale @ scale.T
    inputs = np.random.default_rng(1).normal(size=(40, 30)) @ scale.T
    plain, shrunk = Moments.from_samples(inputs, shrinkage=0.0), Moments.from_samples(inputs)
    assert np.linalg.norm(shrunk.second - truth) < np.linalg.norm(plain.second - truth)


def test_only_full_moments_of_few_samples_are_shrunk_unless_the_caller_says_so():
    few, enough = correlated_samples(16, count=FEW_SAMPLES * 16 - 1), correlated_samples(16, count=FEW_SAMPLES * 16)
    assert Moments.from_samples(few).shrinkage > 0
    assert Moments.from_samples(enough).shrinkage == 0
    np.testing.assert_allclose(Moments.from_samples(enough).second, np.cov(enough.T, bias=True), rtol=1e-10, atol=1e-13)
    assert Moments.from_samples(few, diagonal=True).shrinkage == 0
    plain = Moments.from_samples(few, shrinkage=0.0)
    np.testing.assert_allclose(plain.second, np.cov(few.T, bias=True), rtol=1e-10, atol=1e-13)
    given = Moments.from_samples(enough, shrinkage=0.25, diagonal=True)
    variance = enough.var(axis=0)
    np.testing.assert_allclose(given.second, 0.75 * variance + 0.25 * variance.mean(), rtol=1e-10)
    assert given.shrinkage == 0.25


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_shrinkage_adds_the_distance_to_the_original_weights_to_the_error(noise: float):
    """error' = (1−δ) error + δ μ ‖W−V‖², so it pulls V towards W as the ridge does."""
    layer = random_layer(3, noise=noise, output_weight=[0.1, 2.0, 0.0, 1.0, 5.0, 0.5])
    problem, delta = layer.problem, 0.3
    owner, transfers = random_owner(problem), random_transfers(problem)
    V = random_supported_weight(problem, owner, transfers)
    originals = layer.original if noise else None
    plain = Moments.from_samples(layer.received, originals, shrinkage=0.0)
    shrunk = Moments.from_samples(layer.received, originals, shrinkage=delta)
    assert shrunk.same_inputs == (not noise)

    def error(moments: Moments) -> float:
        return metrics.weighted_error(replace(problem, moments=replace(moments, ridge=0.0)), owner, V)

    distance = problem.output_weight @ np.square(layer.weight - V).sum(axis=1)
    expected = (1 - delta) * error(plain) + delta * layer.received.var(axis=0).mean() * distance
    assert error(shrunk) == pytest.approx(expected, rel=1e-9)
    toward_w = replace(problem, moments=Moments.from_samples(layer.received, originals, shrinkage=1.0))
    np.testing.assert_allclose(toward_w.target_weight, layer.weight, rtol=1e-9)


# -------------------------------------------------------------------------------------------------------- diagonal


@pytest.mark.parametrize("is_pair", [False, True])
def test_diagonal_moments_are_the_diagonals_of_the_full_ones(is_pair: bool):
    received, original = samples()
    originals = original if is_pair else None
    full = Moments.from_samples(received, originals)
    diagonal = Moments.from_samples(received, originals, diagonal=True)
    assert diagonal.is_diagonal
    assert diagonal.same_inputs == (not is_pair)
    for name in ("second", "cross", "target"):
        np.testing.assert_allclose(getattr(diagonal, name), np.diag(getattr(full, name)), rtol=1e-12)
    for name in ("mean", "target_mean", "ridge", "samples"):
        np.testing.assert_allclose(getattr(diagonal, name), getattr(full, name), rtol=1e-12)


def test_moments_are_diagonal_only_where_full_ones_would_not_fit(monkeypatch: pytest.MonkeyPatch):
    for columns in (4704, 11008, 13377):
        assert 3 * columns**2 * 8 <= accumulator.MOST_FULL_BYTES
    assert Moments.from_samples(np.zeros((2, 13378), dtype=np.float32)).choice["moments"] == "diagonal"
    received, _ = samples()
    monkeypatch.setattr(accumulator, "MOST_FULL_BYTES", 3 * 4**2 * 8)
    assert not Moments.from_samples(received).is_diagonal
    monkeypatch.setattr(accumulator, "MOST_FULL_BYTES", 3 * 4**2 * 8 - 1)
    assert Moments.from_samples(received).is_diagonal
    assert not Moments.from_samples(received, diagonal=False).is_diagonal
    assert solve_layer(np.ones((3, 4)), 2, inputs=received).problem.moments.is_diagonal
    assert not solve_layer(np.ones((3, 4)), 2, inputs=received, diagonal_moments=False).problem.moments.is_diagonal


def test_the_choice_says_what_was_done():
    received, _ = samples()
    full, few = Moments.from_samples(received), Moments.from_samples(received[:9])
    count = len(received)
    assert full.choice == {"moments": "full", "samples": count, "shrinkage": 0.0, "ridge": full.ridge}
    assert few.choice == {"moments": "full", "samples": 9, "shrinkage": few.shrinkage, "ridge": few.ridge}
    assert few.shrinkage > 0
    assert Moments.from_samples(received, diagonal=True).choice["moments"] == "diagonal"
    assert Moments.from_raw(received.var(axis=0)).choice["moments"] == "diagonal"
    assert Moments.from_raw(np.ones(4)).choice["samples"] is None
    assert Moments.identity(4).choice == {"moments": "identity", "samples": None, "shrinkage": 0.0, "ridge": 0.0}


# ------------------------------------------------------------------------------------------------ degenerate input


def test_inputs_that_never_change_cost_nothing_to_leave_out():
    """All that they say is in the bias."""
    W, constant = np.random.default_rng(0).normal(size=(6, 4)), np.tile([1.0, -2.0, 0.1, 7.0], (20, 1))
    solution = solve_layer(W, 2, inputs=constant, formulation=Volume(budget=0.0), bias=np.ones(6))
    assert solution.volume == 0
    assert solution.nmse == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(solution.weight @ constant[0] + solution.bias, W @ constant[0] + 1.0, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [None, 0.0])
def test_a_singular_covariance_is_repaired_by_the_inputs_that_are_there(shrinkage: float | None):
    """Inputs 2 and 3, on the other worker, repeat inputs 0 and 1: nothing need be sent."""
    half = correlated_samples(2, count=100)
    moments = Moments.from_samples(np.hstack([half, half]), shrinkage=shrinkage)
    assert np.linalg.matrix_rank(moments.second) == 2
    solution = solve_layer(
        np.random.default_rng(0).normal(size=(6, 4)), 2, second_moment=moments.second, formulation=Volume(budget=0.0)
    )
    assert solution.nmse < 1e-3


def test_rows_of_zeros_cost_nothing_wherever_they_are():
    W = np.random.default_rng(0).normal(size=(6, 4))
    W[[1, 4]] = 0.0
    for arguments in ({"inputs": samples()[0]}, {"inputs": samples()[0], "diagonal_moments": True}):
        solution = solve_layer(W, 2, formulation=Volume(budget=0.2), **arguments)
        np.testing.assert_array_equal(solution.weight[[1, 4]], 0.0)
        assert np.isfinite(solution.objective)
    nothing = solve_layer(np.zeros((6, 4)), 2, inputs=samples()[0], formulation=Volume(budget=0.2))
    assert (nothing.objective, nothing.nmse) == (0.0, 0.0)


def test_the_constructor_needs_no_more_than_the_moments_themselves():
    second = np.cov(samples()[0].T)
    moments = Moments(second, second, second, np.zeros(4), np.zeros(4), 0.1)
    assert (moments.samples, moments.shrinkage) == (None, 0.0)
    assert LayerProblem.create(np.ones((3, 4)), 2, moments=moments).moments is moments


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e8])
def test_the_ridge_follows_the_scale_of_the_inputs(scale: float):
    received = np.random.default_rng(3).normal(1.0, 1.0, size=(60, 4))
    ridge = Moments.from_samples(received, shrinkage=0.0).ridge
    assert Moments.from_samples(scale * received, shrinkage=0.0).ridge == pytest.approx(scale**2 * ridge, rel=1e-6)
    raw = scale**2 * (received.T @ received / 60)
    mean = scale * received.mean(axis=0)
    assert Moments.from_raw(raw, input_mean=mean).ridge == pytest.approx(scale**2 * ridge, rel=1e-6)


def test_two_samples_say_nothing_of_correlations():
    moments = Moments.from_samples(np.random.default_rng(4).normal(size=(2, 6)))
    assert moments.shrinkage == 1.0
    np.testing.assert_allclose(moments.second, np.diag(np.diagonal(moments.second)), atol=1e-12)
