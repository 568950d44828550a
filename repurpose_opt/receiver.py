"""What a worker has to compute of others' values, and how well few numbers from one of them do: the choice of codes.

For worker k with its own columns L, K = C − C[:,L] C_LL⁻¹ C[L,:] and B = √g W̃_k K. A code R of worker p lowers the
error by tr(B_p Rᵀ (R K_pp Rᵀ)⁻¹ R B_pᵀ): the best r numbers are the leading right singular vectors of B_p K_pp^-½,
and σ_i² is what the i-th is worth (Eckart–Young; reduced-rank regression, Izenman 1975, J. Multivariate Analysis 5).
With codes of other workers known, B and K are those that are left beside them: a Schur complement again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh, solve_triangular
from scipy.sparse.linalg import LinearOperator, eigsh

from repurpose_opt.moments import lower_factor
from repurpose_opt.problem import LayerProblem, dense

_NOTHING = 1e-13
"""Share of a worker's energy below which a number is rounding."""
_FEW_VALUES = 96
"""Up to so many values of a source a dense eigenvalue problem is the faster one."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What the numbers that one worker may send are worth, best first."""

    gains: NDArray[np.float64]
    """(numbers,) σ², falling; an estimate where values have several columns."""
    vectors: NDArray[np.float64] = field(repr=False)
    """(n_p, numbers) right singular vectors."""
    factor: NDArray[np.float64] = field(repr=False)
    """(n_p, n_p) lower Cholesky factor F of K_pp, or its diagonal (n_p,)."""

    def encoder(self, count: int) -> NDArray[np.float64]:
        """R (count, n_p) of the best numbers: uncorrelated, of unit variance beside what is known."""
        leading = self.vectors[:, :count]
        if self.factor.ndim == 1:
            return np.asarray((leading / self.factor[:, None]).T)
        return np.asarray(solve_triangular(self.factor, leading, lower=True, trans=1).T)


@dataclass(frozen=True, eq=False)
class Source:
    """The values x̂_p of one worker made uncorrelated beside the receiver's own, F⁻¹x̂_p with K_pp = F Fᵀ.

    Once per receiver: beside the numbers of others, whose covariances with F⁻¹x̂_p are S (numbers, n_p), what is left
    of K is I − SᵀS, and a rank-|numbers| change of the Gram matrix is left of B.
    """

    factor: NDArray[np.float64] = field(repr=False)
    """F (n_p, n_p), lower"""
    gram: NDArray[np.float64] = field(repr=False)
    """F⁻¹ B_pᵀ B_p F⁻ᵀ (n_p, n_p)"""

    @staticmethod
    def of(residual: NDArray[np.float64], variance: NDArray[np.float64]) -> Source:
        """Of B_p (rows, n_p) and K_pp. O(rows n_p²) once."""
        factor = lower_factor(variance)
        half = solve_triangular(factor, residual.T @ residual, lower=True)
        return Source(factor, solve_triangular(factor, half.T, lower=True))

    def whitened(self, covariance: NDArray[np.float64]) -> NDArray[np.float64]:
        """F⁻¹ (n_p, …)"""
        return np.asarray(solve_triangular(self.factor, covariance, lower=True))

    def leading(self, gram: NDArray[np.float64], shared: NDArray[np.float64], most: int, energy: float) -> Spectrum:
        """The first `most` numbers for the Gram matrix that is left and S (numbers, n_p): Lanczos, by ARPACK.

        O(n_p² + numbers · n_p) a step. Numbers worth less than 1e-13 of `energy` are left out.
        """
        count = len(gram)
        if np.trace(gram) <= _NOTHING * energy:  # the sum of all gains; ARPACK has no answer to zeros
            return Spectrum(np.empty(0), np.empty((count, 0)), self.factor)
        root = _InverseRoot.of(shared)
        if count <= _FEW_VALUES or 4 * most > count:
            unit = root.apply(np.eye(count))
            gains, vectors = eigh(unit.T @ gram @ unit, subset_by_index=[max(count - most, 0), count - 1])
        else:
            steps = LinearOperator(
                (count, count), matvec=lambda v: root.transposed(gram @ root.apply(v)), dtype=np.float64
            )
            start = np.random.default_rng(0).standard_normal(count)  # the same answer every time
            gains, vectors = eigsh(steps, k=most, v0=start)
        gains, vectors = gains[::-1], vectors[:, ::-1]
        worth = int(np.count_nonzero(gains > _NOTHING * energy))
        return Spectrum(gains[:worth], root.apply(vectors[:, :worth]), self.factor)


@dataclass(frozen=True, eq=False)
class _InverseRoot:
    """N with N Nᵀ = (I − SᵀS)⁻¹: I + Qᵀ diag(c) Q for few numbers, L⁻ᵀ for many."""

    basis: NDArray[np.float64] | None
    """Q (numbers, n_p), the rows of Uᵀ S for S Sᵀ = U diag(d) Uᵀ"""
    change: NDArray[np.float64]
    """c = ((1−d)^-½ − 1) / d (numbers,), or L (n_p, n_p), the Cholesky factor of I − SᵀS"""

    @staticmethod
    def of(shared: NDArray[np.float64]) -> _InverseRoot:
        numbers, count = shared.shape
        if 2 * numbers > count:
            return _InverseRoot(None, lower_factor(np.eye(count) - shared.T @ shared))
        known, vectors = eigh(shared @ shared.T)
        left = np.sqrt(1 - known)
        return _InverseRoot(vectors.T @ shared, 1 / (left * (1 + left)))

    def apply(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.basis is None:
            return np.asarray(solve_triangular(self.change, vectors, lower=True, trans=1))
        return np.asarray(vectors + self.basis.T @ (self.change * (self.basis @ vectors).T).T)

    def transposed(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        if self.basis is None:
            return np.asarray(solve_triangular(self.change, vectors, lower=True))
        return self.apply(vectors)


@dataclass(frozen=True, eq=False)
class Receiver:
    """One worker's neurons, and the values of the others, source by source."""

    worker: int
    rows: NDArray[np.int64]
    """Of its neurons."""
    values: Mapping[int, NDArray[np.int64]]
    """(n_p,) values of each other worker that has any, ascending."""
    columns: Mapping[int, NDArray[np.int64]]
    """(n_p, b) their columns."""
    energy: float
    """Its error if it receives nothing."""
    residual: NDArray[np.float64] = field(repr=False)
    """B (rows, columns of the layer)."""
    second: NDArray[np.float64] = field(repr=False)
    """C (columns, columns) of the layer with ridge, or its diagonal."""
    local_half: NDArray[np.float64] | None = field(repr=False)
    """L⁻¹ C[L,:] (local columns, columns), C_LL = L Lᵀ; None where C is diagonal."""

    @property
    def width(self) -> int:
        """b, columns of a value."""
        return next(iter(self.columns.values())).shape[1]

    @cached_property
    def variances(self) -> Mapping[int, NDArray[np.float64]]:
        """K_pp (n_p·b, n_p·b) of each source, or its diagonal."""
        return {p: self._variance(p) for p in self.values}

    def covariance_of(self, p: int, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """K[:,p] Eᵀ (columns of the layer, numbers) for numbers Eᵀ (n_p·b, numbers) of worker p."""
        columns = self.columns[p].ravel()
        if self.local_half is None:
            covariance = np.zeros((len(self.second), numbers.shape[1]))
            covariance[columns] = self.second[columns, None] * numbers
            return covariance
        known = self.local_half.T @ (self.local_half[:, columns] @ numbers)
        return np.asarray(self.second[columns].T @ numbers - known)  # symmetric: its rows are contiguous

    @cached_property
    def sources(self) -> Mapping[int, Source]:
        """Each source's values made uncorrelated; for values of one column and full moments."""
        return {p: Source.of(self.residual[:, self.columns[p].ravel()], self.variances[p]) for p in self.values}

    def _variance(self, p: int) -> NDArray[np.float64]:
        columns = self.columns[p].ravel()
        if self.local_half is None:
            return self.second[columns]
        known = self.local_half[:, columns]
        return np.asarray(self.second[np.ix_(columns, columns)] - known.T @ known)

    def spectrum(self, p: int) -> Spectrum:
        """What numbers from worker p are worth beside nothing but the receiver's own values."""
        return spectrum_of(self.residual[:, self.columns[p].ravel()], self.variances[p], self.width, self.energy)


def receivers(problem: LayerProblem, owner: NDArray[np.int64]) -> list[Receiver]:
    """One for each worker that holds neurons and lacks values. Only for values of equally many columns."""
    row_owner = owner[problem.row_neuron]
    found = []
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        if len(rows) and problem.remote[:, k].any():
            found.append(_receiver(problem, k, rows))
    return found


def _receiver(problem: LayerProblem, worker: int, rows: NDArray[np.int64]) -> Receiver:
    assert problem.value_columns is not None
    values = {int(p): np.flatnonzero(problem.input_owner == p) for p in np.unique(problem.input_owner) if p != worker}
    moments = problem.moments
    scale = np.sqrt(problem.output_weight[rows])[:, None]
    local = np.flatnonzero(problem.column_home == worker)
    energy = problem.output_weight[rows] @ problem.output_energy[rows]
    second = moments.regularised
    local_half = None
    if moments.is_diagonal:
        residual = scale * (np.asarray(dense(problem.target_weight[rows]), dtype=np.float64) * second)
        explained = residual[:, local] / np.sqrt(np.where(second[local] > 0, second[local], 1.0))
    else:
        weighted = scale * problem.predicted_moment[rows]
        factor = lower_factor(second[np.ix_(local, local)])
        local_half = solve_triangular(factor, second[local], lower=True)
        explained = solve_triangular(factor, weighted[:, local].T, lower=True).T
        residual = weighted - explained @ local_half
    return Receiver(
        worker,
        rows,
        values,
        {p: problem.value_columns[held] for p, held in values.items()},
        float(max(energy - np.einsum("rc,rc->", explained, explained), 0.0)),
        residual,
        second,
        local_half,
    )


def row_space(block: NDArray[np.float64], rounding: float) -> NDArray[np.float64]:
    """(rank, n_p) orthonormal rows that span those of a block; `rounding` is relative to its largest singular value."""
    if block.size == 0:
        return np.zeros((0, block.shape[1]))
    _, values, right = np.linalg.svd(block, full_matrices=False)
    return right[values > rounding * values.max(initial=0.0)]


def expanded(encoder: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """(R ⊗ I)ᵀ (n_p·b, numbers·b) on the columns of the values, for R (numbers, n_p) and b columns a value."""
    return np.asarray(np.kron(encoder.T, np.eye(width)), dtype=np.float64)


def spectrum_of(residual: NDArray[np.float64], variance: NDArray[np.float64], width: int, energy: float) -> Spectrum:
    """The numbers that serve B (rows, n_p·b) best, given K (n_p·b, n_p·b) or its diagonal. O(rows n_p² + n_p³).

    Exact for b = 1. For b > 1 numbers are R ⊗ I, and K is taken for a Kronecker product of its means over the values
    and over the b columns of a value. Numbers worth less than 1e-13 of `energy` are left out.
    """
    whitened, factor = _whitened(residual, variance, width)
    rows, count = whitened.shape
    if rows >= count:
        gains, vectors = eigh(whitened.T @ whitened)
    else:
        gains, left = eigh(whitened @ whitened.T)
        vectors = (whitened.T @ left) / np.sqrt(np.maximum(gains, np.finfo(float).tiny))
    gains, vectors = gains[::-1], vectors[:, ::-1]
    worth = int(np.count_nonzero(gains > _NOTHING * energy))
    return Spectrum(gains[:worth], vectors[:, :worth], factor)


def strongest(
    residual: NDArray[np.float64], variance: NDArray[np.float64], width: int, energy: float
) -> tuple[float, NDArray[np.float64]]:
    """The gain of the first number of `spectrum_of` and its combination (n_p,); 0 where it is not worth anything."""
    whitened, factor = _whitened(residual, variance, width)
    rows, count = whitened.shape
    gram = whitened.T @ whitened if rows >= count else whitened @ whitened.T
    gains, vectors = eigh(gram, subset_by_index=[len(gram) - 1, len(gram) - 1])
    if gains[0] <= _NOTHING * energy:
        return 0.0, np.zeros(count)
    vector = vectors if rows >= count else (whitened.T @ vectors) / np.sqrt(gains)
    return float(gains[0]), Spectrum(gains, vector, factor).encoder(1)[0]


def _whitened(
    residual: NDArray[np.float64], variance: NDArray[np.float64], width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """B K^-½ as (rows·b, n_p), and the factor of K over the values: (n_p, n_p), or (n_p,) where it is diagonal."""
    if width == 1:
        if variance.ndim == 1:
            factor = np.sqrt(np.where(variance > 0, variance, 1.0))
            return residual / factor, factor
        factor = lower_factor(variance)
        return solve_triangular(factor, residual.T, lower=True).T, factor
    factor, within = kronecker_factors(np.diag(variance) if variance.ndim == 1 else variance, width)
    count = len(factor)
    inverse = solve_triangular(factor, np.eye(count), lower=True)
    columns = np.einsum("uv,rvi->rui", inverse, residual.reshape(-1, count, width), optimize=True)
    columns = solve_triangular(within, columns.reshape(-1, width).T, lower=True)
    return columns.T.reshape(-1, count, width).swapaxes(1, 2).reshape(-1, count), factor


def kronecker_factors(moment: NDArray[np.float64], width: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """F (n_p, n_p) and G (b, b), lower, with F Fᵀ ⊗ G Gᵀ near a moment (n_p·b, n_p·b), equal to it for b = 1.

    From its means over the b columns of a value and, made uncorrelated by F, over the values.
    """
    if width == 1:
        return lower_factor(moment), np.eye(1)
    count = len(moment) // width
    blocks = moment.reshape(count, width, count, width)
    values = lower_factor(np.einsum("viwi->vw", blocks) / width)
    inverse = solve_triangular(values, np.eye(count), lower=True)
    within = np.einsum("uv,viwj,uw->ij", inverse, blocks, inverse, optimize=True) / count
    return values, lower_factor(within)
