"""Which values a worker should receive, as a problem of its own: its local inputs are eliminated.

For worker k with local columns L, K = C − C[:,L] C_LL⁻¹ C[L,:] on its remote columns (a Schur complement) and
R = √g W̃_k K. Receiving the columns S lowers its error by tr(R_S K_SS⁻¹ R_Sᵀ), with V_S = R_S K_SS⁻¹.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from repurpose_opt.formulation import Volume
from repurpose_opt.knowledge import kept_columns
from repurpose_opt.problem import LayerProblem


@dataclass(frozen=True)
class SizeClass:
    """The values that have the same number b of columns."""

    values: NDArray[np.int64]
    """(v,)"""
    columns: NDArray[np.int64]
    """(v, b)"""


@dataclass(frozen=True, eq=False)
class WorkerProblem:
    """What one worker may receive, and what that is worth."""

    worker: int
    value: NDArray[np.int64]
    """(v,) the remote values."""
    column: NDArray[np.int64]
    """(c,) their columns, those of one value side by side."""
    column_value: NDArray[np.int64]
    """(c,) position in `value` of each column's value; ascending."""
    size: NDArray[np.float64]
    """(v,) what receiving a value counts against the limit: bytes, or priced bytes."""
    residual: NDArray[np.float64]
    """R (r, c), r ≤ c: rows rotated by `rotation`, which leaves all norms over the rows as they are."""
    rotation: NDArray[np.float64] | None
    """(rows of the worker, r) with √g W̃_k K = rotation @ R; None where R is not rotated."""
    energy: float
    """The worker's error if it receives nothing."""
    second: NDArray[np.float64] = field(repr=False)
    """C (columns, columns) of the layer, with ridge."""
    local_half: NDArray[np.float64] = field(repr=False)
    """L⁻¹ C[L,:] (local columns, c), C_LL = L Lᵀ."""

    @cached_property
    def moment(self) -> NDArray[np.float64]:
        """K (c, c). O(local columns · c²) once; `rows` where a few are enough."""
        return self.rows(np.arange(len(self.column)))

    @cached_property
    def variance(self) -> NDArray[np.float64]:
        """Diagonal of K, (c,)."""
        return np.diagonal(self.second)[self.column] - np.einsum("lc,lc->c", self.local_half, self.local_half)

    def rows(self, positions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows of K (len(positions), c)."""
        own = self.second[self.column[positions]][:, self.column]
        return np.asarray(own - self.local_half[:, positions].T @ self.local_half)

    def columns_of(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions of the columns of some values, value after value."""
        return np.concatenate([np.arange(*self._span(q)) for q in values] or [np.empty(0, dtype=np.int64)])

    def _span(self, value: int) -> tuple[int, int]:
        return int(self._first[value]), int(self._first[value + 1])

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        return np.searchsorted(self.column_value, np.arange(len(self.value) + 1))

    @cached_property
    def size_classes(self) -> tuple[SizeClass, ...]:
        """The values by their number of columns."""
        return tuple(size_classes(self.column_value, len(self.value)))

    def gain(self, values: NDArray[np.int64]) -> float:
        """By how much receiving these values lowers the error. O(|S|³)."""
        columns = self.columns_of(np.asarray(values, dtype=np.int64))
        if len(columns) == 0:
            return 0.0
        factor = cholesky(self.rows(columns)[:, columns], lower=True)
        half = solve_triangular(factor, self.residual[:, columns].T, lower=True)
        return float(np.einsum("cr,cr->", half, half))


def worker_problems(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> list[WorkerProblem]:
    """The problems of all workers that hold neurons and lack values, under one limit or price. Full moments only."""
    judged = formulation.judged(problem)
    row_owner = owner[problem.row_neuron]
    size = formulation.paid(problem)
    found = []
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        if len(rows) and problem.remote[:, k].any():
            found.append(_worker_problem(judged, k, rows, size[:, k]))
    return found


def local_inputs(
    problem: LayerProblem, worker: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """A worker's own columns L, the factor of C_LL and its inverse times C[L,:]; kept as long as the problem."""
    kept = _locals.setdefault(problem, {})
    if worker not in kept:
        second = problem.moments.regularised
        columns = kept_columns(problem, np.zeros((problem.n, problem.P), dtype=bool), worker)
        factor = cholesky(second[np.ix_(columns, columns)], lower=True)
        kept[worker] = columns, factor, solve_triangular(factor, second[columns], lower=True)
    return kept[worker]


_locals: WeakKeyDictionary[
    LayerProblem, dict[int, tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]
] = WeakKeyDictionary()


def _worker_problem(
    problem: LayerProblem, worker: int, rows: NDArray[np.int64], size: NDArray[np.float64]
) -> WorkerProblem:
    value = np.flatnonzero(problem.remote[:, worker])
    is_remote = problem.column_home != worker
    column = np.flatnonzero(is_remote)
    column = column[np.argsort(problem.column_value[column], kind="stable")]
    local, factor, local_half = local_inputs(problem, worker)
    weighted = problem.predicted_moment[rows] * np.sqrt(problem.output_weight[rows])[:, None]
    explained = solve_triangular(factor, weighted[:, local].T, lower=True)
    local_half = local_half[:, column]
    residual = weighted[:, column] - explained.T @ local_half
    rotation = None
    if len(rows) > len(column):
        rotation, residual = np.linalg.qr(residual)
    energy = problem.output_weight[rows] @ problem.output_energy[rows] - np.einsum("cr,cr->", explained, explained)
    return WorkerProblem(
        worker,
        value,
        column,
        np.searchsorted(value, problem.column_value[column]),
        size[value].astype(np.float64),
        residual,
        rotation,
        float(energy),
        problem.moments.regularised,
        local_half,
    )


def size_classes(column_value: NDArray[np.int64], count: int) -> Iterator[SizeClass]:
    """The values 0 … count − 1 by their number of columns, for the value (columns,) of each column in any order."""
    order = np.argsort(column_value, kind="stable")
    columns = np.bincount(column_value, minlength=count)
    first = np.cumsum(columns) - columns
    for b in np.unique(columns):
        values = np.flatnonzero(columns == b)
        yield SizeClass(values, order[first[values][:, None] + np.arange(b)])
