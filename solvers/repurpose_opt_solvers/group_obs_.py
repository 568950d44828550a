"""`group-obs`: the optimal brain surgeon over transfers: all are made at first, the one that is missed least goes.

On one worker (see `reduced`) let A = K_SS over the columns S that it receives and V = R_S A⁻¹ their weights. Without
value b (its columns) the error rises by tr(V_b ([A⁻¹]_bb)⁻¹ V_bᵀ) = tr(([A⁻¹]_bb)⁻¹ G_bb), where G = VᵀV. With
[A⁻¹]_bb = L Lᵀ, Z = L⁻¹ [A⁻¹]_b and Y = L⁻¹ G_b − ½ L⁻¹ G_bb L⁻ᵀ Z the removal leaves A⁻¹ − ZᵀZ and G − YᵀZ − ZᵀY.
Hassibi, Stork, Wolff: Optimal brain surgeon and general network pruning, ICNN 1993; here for groups of columns and
many rows at once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg.blas import dgemm
from scipy.linalg.lapack import dpotri

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.reduced import WorkerProblem, worker_problems

_DELAY = 48
"""Removals whose downdates are applied to the matrices together."""
_FULL = 0.75
"""Share of columns still received below which the matrices are cut to those."""


class GroupOBS:
    """Backward elimination by the exact increase of the error after refit, per byte. Volume of total bytes only."""

    name = "group-obs"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, Volume):
            return "eliminates by the error after refit: Volume only"
        if formulation.communication == "busiest":
            return "a removal is judged by its own bytes: not with communication='busiest'"
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        if problem.moments.is_diagonal:
            return Candidate(Termination.HEURISTIC, owner, formulation.select(problem, owner))
        deadline = Deadline(options.time_limit)
        found = _all_removals(worker_problems(problem, formulation, owner), deadline)
        if formulation.transfer_price is None:
            exchange = formulation.take(problem, owner, iter(_ranking(found)), lambda: deadline.passed)
        else:
            exchange = _worth_their_price(problem, found, formulation.transfer_price)
        out_of_time = deadline.passed or any(path.is_cut for path in found)
        return Candidate(Termination.TIME_LIMIT if out_of_time else Termination.HEURISTIC, owner, exchange)


@dataclass(frozen=True, eq=False)
class Removals:
    """The values of one worker in the order in which they are removed."""

    worker: int
    value: NDArray[np.int64]
    """(v,)"""
    size: NDArray[np.float64]
    """(v,) what each counts against the limit."""
    increase: NDArray[np.float64]
    """(v,) of the error, by each removal after those before it."""
    is_cut: bool
    """Whether time ran out: the last ones are then in the order of their increases at that moment."""


def _all_removals(workers: list[WorkerProblem], deadline: Deadline) -> list[Removals]:
    """Worker by worker, as no removal changes another worker's error; each has an equal share of the time left."""
    found = []
    for position, worker in enumerate(workers):
        left = deadline.remaining
        found.append(removals(worker, Deadline(None if left is None else left / (len(workers) - position))))
    return found


def removals(worker: WorkerProblem, deadline: Deadline, delay: int = _DELAY) -> Removals:
    """All values of one worker by repeated removal of the least increase per size. O(c³), mostly matrix products.

    When the deadline passes, those that are left follow by their increases as they stand.
    """
    order: list[int] = []
    increases: list[float] = []
    if deadline.passed:
        rest, scores = _first_gains(worker)
    else:
        elimination = _Elimination(worker, delay)
        while elimination.left and not deadline.passed:
            value, rise = elimination.remove_least()
            order.append(value)
            increases.append(rise)
        rest, scores = elimination.rest()
    in_order = np.concatenate([np.array(order, dtype=np.int64), rest])
    increase = np.concatenate([np.array(increases), scores])
    return Removals(worker.worker, worker.value[in_order], worker.size[in_order], increase, len(rest) > 0)


def _ranking(found: list[Removals]) -> list[tuple[int, int, float]]:
    """(value, worker, rate) of all workers: the least rate of all is removed first, the last removed ranks first.

    What was worth nothing when it was removed is not in it.
    """
    rates = [_rate(path.increase, path.size) for path in found]
    heap = [(rate[0], position, 0) for position, rate in enumerate(rates)]
    heapq.heapify(heap)
    removed = []
    while heap:
        rate, position, step = heap[0]
        path = found[position]
        if rate > 0:
            removed.append((int(path.value[step]), path.worker, float(rate)))
        if step + 1 < len(path.value):
            heapq.heapreplace(heap, (rates[position][step + 1], position, step + 1))
        else:
            heapq.heappop(heap)
    return removed[::-1]


def _worth_their_price(problem: LayerProblem, found: list[Removals], price: float) -> Exchange:
    """Each worker stops where error + price · size is least along its removals, which need not be the first rise."""
    transfers = np.zeros((problem.n, problem.P), dtype=bool)
    for path in found:
        change = np.concatenate([[0.0], np.cumsum(path.increase - price * path.size)])
        removed = len(change) - 1 - int(np.argmin(change[::-1]))
        transfers[path.value[removed:], path.worker] = True
    return Exchange.of_transfers(transfers, problem.input_owner)


class _Elimination:
    """A⁻¹ and G of one worker, both without the downdates of the last removals, which are kept beside them."""

    def __init__(self, worker: WorkerProblem, delay: int) -> None:
        self._size = worker.size
        self._delay = delay
        self._widest = max(group.columns.shape[1] for group in worker.size_classes)
        self._inverse = _inverse(worker.rows(np.arange(len(worker.column))))
        weights = worker.residual @ self._inverse
        self._gram = weights.T @ weights
        self._values = [
            _Values(group.values, group.columns, self._inverse, self._gram) for group in worker.size_classes
        ]
        self._steps, self._halves = self._room()
        self._delayed = 0
        self.left = len(worker.value)

    def remove_least(self) -> tuple[int, float]:
        """Remove the value with the least increase of the error per size: its position and that increase."""
        best = [(*group.least(self._size), group) for group in self._values if group.is_left.any()]
        _, member, group = min(best, key=lambda found: found[0])
        value, increase = int(group.values[member]), float(group.increase[member])
        group.is_left[member] = False
        self.left -= 1
        self._downdate(group.columns[member])
        if self.left and self._delayed + self._widest > len(self._steps):
            self._apply()
        return value, increase

    def rest(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The values that are left and the increases of the error if one is removed, least per size first."""
        values = np.concatenate([group.values[group.is_left] for group in self._values])
        increase = np.concatenate([group.increase[group.is_left] for group in self._values])
        order = np.argsort(_rate(increase, self._size[values]), kind="stable")
        return values[order], increase[order]

    def _downdate(self, columns: NDArray[np.int64]) -> None:
        steps, halves = self._steps[: self._delayed], self._halves[: self._delayed]
        inverse = self._inverse[columns] - steps[:, columns].T @ steps
        gram = self._gram[columns] - halves[:, columns].T @ steps - steps[:, columns].T @ halves
        if len(columns) == 1:  # the usual case, where calls of LAPACK cost more than what they compute
            root = np.sqrt(inverse[0, columns[0]])
            step, half = inverse / root, gram / root
            half -= (0.5 * half[0, columns[0]] / root) * step
        else:
            factor = cholesky(inverse[:, columns], lower=True)
            step, half = (solve_triangular(factor, rows, lower=True) for rows in (inverse, gram))
            half -= 0.5 * solve_triangular(factor, half[:, columns].T, lower=True).T @ step
        for group in self._values:
            group.downdate(step, half)
        end = self._delayed + len(columns)
        self._steps[self._delayed : end], self._halves[self._delayed : end] = step, half
        self._delayed = end

    def _apply(self) -> None:
        """The delayed downdates at once; then cut the matrices to what is left, if that is little enough."""
        steps, halves = self._steps[: self._delayed], self._halves[: self._delayed]
        _subtract_product(self._inverse, steps, steps)
        _subtract_product(self._gram, halves, steps)
        _subtract_product(self._gram, steps, halves)
        kept = np.zeros(len(self._inverse), dtype=bool)
        for group in self._values:
            kept[group.columns[group.is_left]] = True
        if kept.mean() <= _FULL:
            self._inverse, self._gram = (matrix[np.ix_(kept, kept)] for matrix in (self._inverse, self._gram))
            place = np.cumsum(kept) - 1
            self._values = [
                _Values(group.values[group.is_left], place[group.columns[group.is_left]], self._inverse, self._gram)
                for group in self._values
                if group.is_left.any()
            ]
            self._steps, self._halves = self._room()
        self._delayed = 0

    def _room(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Z and Y of the delayed downdates, one of any value at least; their first `_delayed` rows are in use."""
        shape = (self._delay + self._widest - 1, len(self._inverse))
        return np.empty(shape), np.empty(shape)


class _Values:
    """The values of one number of columns b, with the blocks [A⁻¹]_bb and G_bb (v, b, b), never delayed."""

    def __init__(
        self,
        values: NDArray[np.int64],
        columns: NDArray[np.int64],
        inverse: NDArray[np.float64],
        gram: NDArray[np.float64],
    ) -> None:
        self.values, self.columns = values, columns
        self.is_left = np.ones(len(values), dtype=bool)
        self._inverse = inverse[columns[:, :, None], columns[:, None, :]]
        self._gram = gram[columns[:, :, None], columns[:, None, :]]
        self.increase = self._increases()

    def least(self, size: NDArray[np.float64]) -> tuple[float, int]:
        """The least increase of the error per size, and which of those that are left has it."""
        members = np.flatnonzero(self.is_left)
        rate = _rate(self.increase[members], size[self.values[members]])
        least = int(np.argmin(rate))
        return float(rate[least]), int(members[least])

    def downdate(self, step: NDArray[np.float64], half: NDArray[np.float64]) -> None:
        if self.columns.shape[1] == 1:
            column = self.columns[:, 0]
            self._inverse[:, 0, 0] -= np.einsum("sc,sc->c", step, step)[column]
            self._gram[:, 0, 0] -= 2 * np.einsum("sc,sc->c", step, half)[column]
        else:
            steps, halves = step[:, self.columns], half[:, self.columns]
            self._inverse -= np.einsum("svb,svd->vbd", steps, steps, optimize=True)
            product = np.einsum("svb,svd->vbd", halves, steps, optimize=True)
            self._gram -= product + product.transpose(0, 2, 1)
        self.increase = self._increases()

    def _increases(self) -> NDArray[np.float64]:
        """(v,) tr([A⁻¹]_bb⁻¹ G_bb), meaningful for the values that are left."""
        if self.columns.shape[1] == 1:
            inverse = np.where(self.is_left, self._inverse[:, 0, 0], 1.0)
            return np.maximum(self._gram[:, 0, 0] / inverse, 0.0)
        increase = np.zeros(len(self.values))
        left = self.is_left
        increase[left] = np.trace(np.linalg.solve(self._inverse[left], self._gram[left]), axis1=1, axis2=2)
        return np.maximum(increase, 0.0)


def _rate(increase: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Increase per size; 0 for what is worth nothing, infinite for what is worth something and costs nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(increase > 0, increase / size, 0.0)


def _first_gains(worker: WorkerProblem) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What each value would gain on its own if its columns were uncorrelated, least per size first. O(r c)."""
    energy = np.einsum("rc,rc->c", worker.residual, worker.residual) / worker.variance
    gain = np.asarray(np.bincount(worker.column_value, energy, len(worker.value)), dtype=np.float64)
    order = np.argsort(_rate(gain, worker.size), kind="stable")
    return np.asarray(order, dtype=np.int64), gain[order]


def _inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a symmetric positive definite matrix."""
    factor = cholesky(matrix, lower=True)
    lower, _ = dpotri(factor, lower=1, overwrite_c=True)
    lower = np.tril(lower)
    return np.ascontiguousarray(lower + np.tril(lower, -1).T)


def _subtract_product(matrix: NDArray[np.float64], left: NDArray[np.float64], right: NDArray[np.float64]) -> None:
    """matrixᵀ -= leftᵀ right in place, for rows (steps, c)."""
    assert matrix.flags.c_contiguous, "BLAS would change a copy"
    dgemm(-1.0, left.T, right.T, 1.0, matrix.T, trans_b=True, overwrite_c=True)
