"""Moments: centred, in every way of giving them."""

from __future__ import annotations

import numpy as np
import pytest

from repurpose_opt import Moments
from repurpose_opt.moments import RELATIVE_RIDGE
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
