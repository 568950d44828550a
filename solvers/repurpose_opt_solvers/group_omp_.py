"""`group-omp`: orthogonal matching pursuit over transfers, exact gains after refit, the largest per byte first.

For worker k with columns S, M_k = C − C[:,S] C_SS⁻¹ C[S,:] and R_k = W̃_k M_k. Sending value b (its columns) lowers the
error by tr(R_b M_bb⁻¹ R_bᵀ). With M_bb = L Lᵀ and Z = L⁻¹ M_b: it leaves M − ZᵀZ and R − (R_b L⁻ᵀ) Z.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular
from scipy.linalg.blas import dger

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.reduced import local_inputs, size_classes

_PROMISING = 64


class GroupOMP:
    """Greedy by the exact decrease of the error after refit, per byte, over all workers at once. Volume only."""

    name = "group-omp"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return None if isinstance(formulation, Volume) else "greedy by the error after refit: Volume only"

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
        exchange = formulation.take(
            problem, owner, _pursue(problem, formulation, owner, deadline), lambda: deadline.passed
        )
        return Candidate(Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC, owner, exchange)


def _pursue(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], deadline: Deadline
) -> Iterator[tuple[int, int, float]]:
    """(value, worker, gain per byte) in the order of the greedy; what no longer fits a budget is passed over."""
    allowance = formulation.allowance(problem)
    cost: NDArray[Any] = problem.transfer_price if allowance is None else problem.transfer_bytes
    row_owner = owner[problem.row_neuron]
    workers = {
        k: _WorkerPursuit(formulation.judged(problem), k, np.flatnonzero(row_owner == k), cost[:, k])
        for k in range(problem.P)
        if (row_owner == k).any()
    }
    heap = [(-rate, k, value) for k, worker in workers.items() for value, rate in [worker.best()]]
    heapq.heapify(heap)
    while heap and heap[0][0] < 0 and not deadline.passed:
        negative_rate, k, value = heapq.heappop(heap)
        if allowance is None or allowance.take(value, k):
            yield value, k, -negative_rate
            workers[k].add(value)
        else:  # one by one, all that no longer fits would take longer than what was chosen
            workers[k].candidate &= allowance.fits(k)
        value, rate = workers[k].best()
        heapq.heappush(heap, (-rate, k, value))
    if deadline.passed:  # no time to choose one by one: the rest, by the gains as they stand
        rest = [(rate, k, value) for k, worker in workers.items() for value, rate in worker.offers()]
        yield from ((value, k, rate) for rate, k, value in sorted(rest, reverse=True))


class _WorkerPursuit:
    """One worker's pursuit: which of the values that it lacks lowers its error most per byte.

    A step costs O(columns · (m_k + steps so far)); rows of the Schur complement of the local inputs are computed
    for many promising values at a time, where a matrix product is far cheaper than as many products with a vector.
    """

    def __init__(self, problem: LayerProblem, worker: int, rows: NDArray[np.int64], cost: NDArray[np.float64]) -> None:
        self.second = problem.moments.regularised
        self.cost = cost
        self.candidate = problem.input_owner != worker
        local, factor, self.local_half = local_inputs(problem, worker)
        given = problem.predicted_moment[rows] * np.sqrt(problem.output_weight[rows])[:, None]
        explained = solve_triangular(factor, given[:, local].T, lower=True)
        self.residual = given - explained.T @ self.local_half
        self.steps = np.empty((64, problem.columns))
        self.taken = 0
        parts = size_classes(problem.column_value, problem.n)
        self.sizes = [_Blocks(part.values, part.columns, self) for part in parts]
        self.columns_of = {int(v): c for size in self.sizes for v, c in zip(size.values, size.columns, strict=True)}
        self.local_schur: dict[int, NDArray[np.float64]] = {}

    def best(self) -> tuple[int, float]:
        """The value with the largest gain per byte, and that rate; 0 where nothing is left to gain."""
        rate = self._rates()
        value = int(np.argmax(rate))
        return value, float(rate[value])

    def offers(self) -> Iterator[tuple[int, float]]:
        """All values that the worker lacks, with their gains per byte."""
        rate = self._rates()
        return ((int(value), float(rate[value])) for value in np.flatnonzero(self.candidate))

    def add(self, value: int) -> None:
        """Receive a value: downdate M and R."""
        columns = self.columns_of[value]
        taken = self.steps[: self.taken]
        moment = self._local_schur(value) - taken[:, columns].T @ taken
        if len(columns) == 1:  # the usual case, where calls of LAPACK cost more than what they compute
            step = moment / np.sqrt(moment[:, columns])
            onto = self.residual[:, columns[0]] / step[0, columns[0]]
            self.residual = dger(-1.0, step[0], onto, a=self.residual.T, overwrite_a=True).T
        else:
            factor = cholesky(moment[:, columns], lower=True)
            step = solve_triangular(factor, moment, lower=True)
            self.residual -= solve_triangular(factor, self.residual[:, columns].T, lower=True).T @ step
        for size in self.sizes:
            size.downdate(step)
        self._remember(step)
        self.candidate[value] = False

    def _rates(self) -> NDArray[np.float64]:
        gain = np.empty(len(self.cost))
        for size in self.sizes:
            gain[size.values] = size.gains(self.residual, self.candidate[size.values])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.candidate & (gain > 0), gain / self.cost, 0.0)

    def _local_schur(self, value: int) -> NDArray[np.float64]:
        """(b, columns) rows of C − C[:,local] C_local⁻¹ C[local,:] for a value's columns."""
        if value not in self.local_schur:
            promising = [int(v) for v in np.argsort(-self._rates())[:_PROMISING] if int(v) not in self.local_schur]
            wanted = [value] + [v for v in promising if v != value and self.candidate[v]]
            columns = np.concatenate([self.columns_of[v] for v in wanted])
            block = self.second[columns] - self.local_half[:, columns].T @ self.local_half
            parts = np.split(block, np.cumsum([len(self.columns_of[v]) for v in wanted])[:-1])
            self.local_schur.update(zip(wanted, parts, strict=True))
        return self.local_schur.pop(value)

    def _remember(self, step: NDArray[np.float64]) -> None:
        if self.taken + len(step) > len(self.steps):
            self.steps = np.concatenate([self.steps, np.empty_like(self.steps), np.empty_like(step)])
        self.steps[self.taken : self.taken + len(step)] = step
        self.taken += len(step)


class _Blocks:
    """The values of one number of columns b: their diagonal blocks M_bb, (values, b, b), and gains."""

    def __init__(self, values: NDArray[np.int64], columns: NDArray[np.int64], pursuit: _WorkerPursuit) -> None:
        self.values, self.columns = values, columns
        self.moment = pursuit.second[columns[:, :, None], columns[:, None, :]]
        self.downdate(pursuit.local_half)

    def downdate(self, step: NDArray[np.float64]) -> None:
        if self.columns.shape[1] == 1:
            self.moment[:, 0, 0] -= np.einsum("sc,sc->c", step, step)[self.columns[:, 0]]
            return
        parts = step[:, self.columns]
        self.moment -= np.einsum("svb,svd->vbd", parts, parts, optimize=True)

    def gains(self, residual: NDArray[np.float64], candidate: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(values,) tr(R_b M_bb⁻¹ R_bᵀ), 0 where M_bb is singular because the worker has the value already."""
        if self.columns.shape[1] == 1:
            norms = np.einsum("rc,rc->c", residual, residual)[self.columns[:, 0]]
            return np.where(candidate, norms / np.where(candidate, self.moment[:, 0, 0], 1.0), 0.0)
        gain = np.zeros(len(self.values))
        parts = residual[:, self.columns[candidate]].transpose(1, 2, 0)
        gain[candidate] = np.einsum("vbr,vbr->v", parts, np.linalg.solve(self.moment[candidate], parts))
        return gain
