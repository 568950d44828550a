"""What a worker receives, kept so that adding, removing and exchanging values are cheap and exact.

The tableau of K swept on the columns S (Goodnight 1979, "A tutorial on the SWEEP operator") has K_SS⁻¹, the
regression B = K_SS⁻¹ K_S of all columns on them, and the Schur complement M = K − K_:S B, of which only the diagonal
blocks are kept; beside it the weights V = R_S K_SS⁻¹ and the residual R − V K_S.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky
from scipy.linalg.blas import dger

from repurpose_opt_solvers.reduced import SizeClass, WorkerProblem

_MOST_CHANGES = 64
"""Changes by rank-one updates before everything is computed anew, which bounds the rounding errors."""


class Tableau:
    """One worker's received values and what each change of them would do to its error.

    With s columns received of c, and r rows: a change costs O(c (r + s)), all removal costs O(r s), all gains O(r c),
    the best of all exchanges O(c s (r + 1)), always exact.
    """

    columns: NDArray[np.int64]
    """(s,) those of `values`, in the order in which they came."""
    inverse: NDArray[np.float64]
    """K_SS⁻¹ (s, s)"""
    regression: NDArray[np.float64]
    """B (s, c)"""
    weight: NDArray[np.float64]
    """V (r, s)"""
    residual: NDArray[np.float64]
    """(r, c)"""

    def __init__(self, worker: WorkerProblem, values: Sequence[int] | NDArray[np.int64]) -> None:
        self.problem = worker
        self.values = [int(q) for q in values]
        self._restart()

    def add(self, value: int) -> None:
        """Receive a value."""
        self.values.append(value)
        if self._is_stale():
            self._restart()
            return
        new = self.problem.columns_of(np.array([value]))
        rows = self.problem.rows(new)
        schur = rows - rows[:, self.columns] @ self.regression
        pivot = np.linalg.inv(schur[:, new])
        onto = self.regression[:, new]
        regression = pivot @ schur
        weight = self.residual[:, new] @ pivot
        corner = onto @ pivot
        self.inverse = np.block([[self.inverse + corner @ onto.T, -corner], [-corner.T, pivot]])
        self.weight = np.concatenate([self.weight - weight @ onto.T, weight], axis=1)
        _subtract_product(self.residual, weight, schur)
        _subtract_product(self.regression, onto, regression)
        self.regression = np.concatenate([self.regression, regression])
        self._change_blocks(schur, -regression)
        self.columns = np.concatenate([self.columns, new])

    def remove(self, value: int) -> None:
        """Receive a value no more."""
        gone = self._places(value)
        self.values.remove(value)
        if self._is_stale():
            self._restart()
            return
        left = np.delete(np.arange(len(self.columns)), gone)
        moment = np.linalg.inv(self.inverse[np.ix_(gone, gone)])
        regression, weight = self.regression[gone], self.weight[:, gone]
        lifted = moment @ regression
        onto = self.inverse[:, gone] @ moment
        self._change_blocks(lifted, regression)
        self.inverse = (self.inverse - onto @ self.inverse[gone])[np.ix_(left, left)]
        self.weight = (self.weight - weight @ onto.T)[:, left]
        _subtract_product(self.residual, -weight, lifted)
        _subtract_product(self.regression, onto, regression)
        self.regression = self.regression[left]
        self.columns = self.columns[left]

    @property
    def is_received(self) -> NDArray[np.bool_]:
        """(v,) whether a value is received."""
        received = np.zeros(len(self.problem.value), dtype=bool)
        received[self.values] = True
        return received

    def gains(self) -> NDArray[np.float64]:
        """(v,) by how much the error falls if one more value is received; 0 for those that are."""
        gain = np.zeros(len(self.problem.value))
        received = self.is_received
        for part, block in zip(self.problem.size_classes, self._blocks, strict=True):
            gain[part.values] = _traces(_gram(self.residual, part), block, received[part.values])
        return gain

    def removal_costs(self) -> NDArray[np.float64]:
        """(len(values),) by how much the error rises if one of `values` is received no more."""
        if self._has_single_columns:
            return np.einsum("rs,rs->s", self.weight, self.weight) / np.diagonal(self.inverse)
        return np.array([self._removal(value)[0] for value in self.values])

    def swap_falls(self) -> NDArray[np.float64]:
        """(len(values), v) by how much the error falls if one of `values` gives way to another value.

        −inf where that other one is received already.
        """
        falls = self._swap_falls_of_columns() if self._has_single_columns else self._swap_falls_of_blocks()
        falls[:, self.values] = -np.inf
        return falls

    def _swap_falls_of_columns(self) -> NDArray[np.float64]:
        moment = 1 / np.diagonal(self.inverse)
        cost = moment * np.einsum("rs,rs->s", self.weight, self.weight)
        variance = np.square(self.regression) * moment[:, None]
        gram = (self.weight * (2 * moment)).T @ self.residual
        gram *= self.regression
        gram += variance * cost[:, None]
        gram += np.einsum("rc,rc->c", self.residual, self.residual)
        variance += self._blocks[0][:, 0, 0]
        variance[:, self.values] = 1.0  # nothing is left of them
        gram /= variance
        gram -= cost[:, None]
        return gram

    def _swap_falls_of_blocks(self) -> NDArray[np.float64]:
        falls = np.empty((len(self.values), len(self.problem.value)))
        grams = [_gram(self.residual, part) for part in self.problem.size_classes]
        received = self.is_received
        for place, value in enumerate(self.values):
            cost, moment, gone = self._removal(value)
            regression, weight = self.regression[gone], self.weight[:, gone]
            rows = (regression, moment @ regression, weight.T @ self.residual)
            square = weight.T @ weight
            for part, block, gram in zip(self.problem.size_classes, self._blocks, grams, strict=True):
                own, lifted, onto = (row[:, part.columns].transpose(1, 0, 2) for row in rows)
                crossed = np.einsum("vsb,vsd->vbd", lifted, onto)
                grown = np.einsum("vsb,st,vtd->vbd", lifted, square, lifted)
                new_gram = gram + crossed + crossed.transpose(0, 2, 1) + grown
                new_block = block + np.einsum("vsb,vsd->vbd", own, lifted)
                falls[place, part.values] = _traces(new_gram, new_block, received[part.values]) - cost
        return falls

    @property
    def _has_single_columns(self) -> bool:
        return len(self.problem.column) == len(self.problem.value)

    def _removal(self, value: int) -> tuple[float, NDArray[np.float64], NDArray[np.int64]]:
        """The rise of the error, the moment of what only this value tells, and its places in `columns`."""
        gone = self._places(value)
        moment: NDArray[np.float64] = np.linalg.inv(self.inverse[np.ix_(gone, gone)]).astype(np.float64, copy=False)
        weight = self.weight[:, gone]
        return float(np.einsum("rb,bd,rd->", weight, moment, weight)), moment, gone

    def _places(self, value: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.problem.column_value[self.columns] == value)

    def _is_stale(self) -> bool:
        self.changes += 1
        return self.changes > _MOST_CHANGES

    def _restart(self) -> None:
        """Everything from K. O(s c (s + r))."""
        problem = self.problem
        self.changes = 0
        self.columns = problem.columns_of(np.array(self.values, dtype=np.int64))
        rows = problem.rows(self.columns)
        factor = (cholesky(rows[:, self.columns], lower=True), True)
        self.inverse = cho_solve(factor, np.eye(len(self.columns)))
        self.regression = np.ascontiguousarray(cho_solve(factor, rows))
        self.weight = cho_solve(factor, problem.residual[:, self.columns].T).T
        self.residual = np.ascontiguousarray(problem.residual - self.weight @ rows)
        self._blocks = [_own_blocks(problem, part) for part in problem.size_classes]
        self._change_blocks(rows, -self.regression)

    def _change_blocks(self, left: NDArray[np.float64], right: NDArray[np.float64]) -> None:
        """Diagonal blocks of M + leftᵀ right; left and right are (·, c)."""
        for block, part in zip(self._blocks, self.problem.size_classes, strict=True):
            block += np.einsum("svb,svd->vbd", left[:, part.columns], right[:, part.columns])


def _subtract_product(target: NDArray[np.float64], left: NDArray[np.float64], right: NDArray[np.float64]) -> None:
    """target −= left @ right in place, in one pass where NumPy makes three: for few columns of `left`, C-contiguous."""
    if target.size:
        for b in range(left.shape[1]):
            dger(-1.0, right[b], left[:, b], a=target.T, overwrite_a=True)


def _own_blocks(problem: WorkerProblem, part: SizeClass) -> NDArray[np.float64]:
    """(v, b, b) diagonal blocks of K."""
    columns = problem.column[part.columns]
    half = problem.local_half[:, part.columns]
    own = problem.second[columns[:, :, None], columns[:, None, :]]
    return np.asarray(own - np.einsum("lvb,lvd->vbd", half, half))


def _gram(residual: NDArray[np.float64], part: SizeClass) -> NDArray[np.float64]:
    """(v, b, b) R_bᵀ R_b."""
    if part.columns.shape[1] == 1:
        return np.einsum("rc,rc->c", residual, residual)[part.columns][:, :, None]
    blocks = residual[:, part.columns]
    return np.einsum("rvb,rvd->vbd", blocks, blocks, optimize=True)


def _traces(gram: NDArray[np.float64], moment: NDArray[np.float64], skipped: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(v,) tr(moment⁻¹ gram); 0 for the skipped, of which nothing is left because they are received."""
    trace = np.zeros(len(gram))
    if gram.shape[1] == 1:
        trace[~skipped] = gram[~skipped, 0, 0] / moment[~skipped, 0, 0]
    else:
        trace[~skipped] = np.trace(np.linalg.solve(moment[~skipped], gram[~skipped]), axis1=1, axis2=2)
    return trace
