"""Dense layers and moments of their inputs, drawn so that they are the same bits on every machine.

Products of matrices are of whole numbers below 2⁵³, so that no order of summation, thus no BLAS, changes them.
"""

from __future__ import annotations

from math import floor, log10

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem

_STEPS = 1 << 10
"""Weights and mixing coefficients are multiples of 1 / _STEPS."""


def planted_weight(m: int, n: int, P: int, rng: np.random.Generator, contrast: float = 2.0) -> NDArray[np.float32]:
    """(m, n) Gaussian weights, `contrast` times as large for the inputs of a neuron's hidden worker, contiguous runs.

    Columns have lognormal scales, as some features count more than others.
    """
    hidden = rng.permutation(np.arange(m) * P // m)
    at_home = hidden[:, None] == np.arange(n) * P // n
    scale = rng.lognormal(sigma=0.5, size=n) * np.where(at_home, contrast, 1.0)
    return (np.rint(rng.normal(size=(m, n)) * scale * _STEPS) / _STEPS).astype(np.float32)


def correlated_moments(n: int, rng: np.random.Generator) -> Moments:
    """Full moments of n mixed inputs: C = AᵀA, where row r of the mixing A is in proportion to (r+1)^−½.

    The eigenvalues fall about as 1/r, as those of natural data do (van der Schaaf and van Hateren 1996).
    """
    mixing = np.rint(rng.normal(size=(n, n)) * np.arange(1, n + 1)[:, None] ** -0.5 * _STEPS)
    return Moments.from_raw(mixing.T @ mixing / _STEPS**2)


def diagonal_moments(n: int, rng: np.random.Generator) -> Moments:
    """Variances of uncorrelated inputs, lognormal, multiples of 1 / _STEPS."""
    return Moments.from_raw(np.maximum(1.0, np.rint(rng.lognormal(size=n) * _STEPS)) / _STEPS)


def price_of(problem: LayerProblem, share: float) -> float:
    """A price of a byte at which sending all costs 1 / share of the outputs' energy; of two digits, to be the same."""
    energy = float(problem.output_weight @ problem.output_energy)
    priced = float(problem.transfer_price[:, problem.capacity > 0].sum())
    return rounded(energy / priced / share)


def edge_price(problem: LayerProblem, below: float) -> float:
    """A price of a byte above the energy of this share of the weights that one transfer of 1 byte would serve."""
    energy = np.square(problem.weight, dtype=np.float64) * problem.moments.variance
    return rounded(float(np.quantile(energy, below)) / float(np.median(problem.value_bytes)))


def rounded(number: float) -> float:
    """To two significant digits."""
    return round(number, 1 - floor(log10(number)))
