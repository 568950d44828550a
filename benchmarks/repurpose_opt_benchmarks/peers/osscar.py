"""`osscar`: Meng, Ibrahim, Behdin, Hazimeh, Ponomareva, Mazumder 2024, arXiv 2403.12983 (ICML 2024).

First groups are removed, a few at a time, those that cost least, ‖V_j‖² / [K_SS⁻¹]_jj, with low-rank downdates of V
and of the inverse. Then a local search swaps t groups at a time: the t that cost least to remove make room for the t
that gain most once those are gone. A swap that does not lower the error is undone and t halved.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.peers.peer import Choice, Groups, Peer, column_energy, largest
from repurpose_opt_solvers.reduced import WorkerProblem

REMOVALS = 50
"""Rounds of removal: in each the same number of groups goes, over all workers."""
FIRST_SWAP = 0.1
"""Share of the groups kept that the first swap exchanges."""
MOST_SWAPS = 50


class Osscar(Peer):
    """Costs and gains are compared over all workers, so that a swap may move a group from one to another."""

    name = "osscar"

    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        reduced = [worker.reduced for worker in workers]
        kept = _remove([_Removal(worker) for worker in workers], count)
        return _swap(reduced, kept)


def _remove(removals: Sequence[_Removal], count: int) -> list[NDArray[np.bool_]]:
    """The columns (c,) of each worker that are left when `count` are."""
    left = sum(len(removal.left) for removal in removals)
    batch = max(1, -(-(left - count) // REMOVALS))
    while left > count:
        going = min(batch, left - count)
        cheapest = _smallest([removal.costs() for removal in removals], going)
        for removal, positions in zip(removals, cheapest, strict=True):
            removal.remove(positions)
        left -= going
    return [removal.kept for removal in removals]


def _smallest(costs: Sequence[NDArray[np.float64]], count: int) -> list[NDArray[np.int64]]:
    """Positions in each worker's costs of the `count` smallest of all."""
    is_smallest = np.zeros(sum(map(len, costs)), dtype=bool)
    is_smallest[np.argsort(np.concatenate(costs), kind="stable")[:count]] = True
    parts = np.split(is_smallest, np.cumsum([len(cost) for cost in costs])[:-1])
    return [np.flatnonzero(part) for part in parts]


class _Removal:
    """The columns S that a worker still has, V (r, |S|) and K_SS⁻¹."""

    def __init__(self, groups: Groups) -> None:
        self.columns = len(groups.reduced.column)
        self.left = np.arange(self.columns)
        self.weight = groups.weight
        self.inverse = cho_solve(cho_factor(groups.reduced.moment), np.eye(self.columns))

    @property
    def kept(self) -> NDArray[np.bool_]:
        kept = np.zeros(self.columns, dtype=bool)
        kept[self.left] = True
        return kept

    def costs(self) -> NDArray[np.float64]:
        """(|S|,) by how much the error rises if one column goes."""
        return column_energy(self.weight) / np.diagonal(self.inverse)

    def remove(self, positions: NDArray[np.int64]) -> None:
        """Without the columns at these positions of S. O(|S|² · positions)."""
        if len(positions) == 0:
            return
        stays = np.delete(np.arange(len(self.left)), positions)
        factor = cholesky(self.inverse[np.ix_(positions, positions)], lower=True)
        step = solve_triangular(factor, self.inverse[positions], lower=True)
        onto = solve_triangular(factor, self.weight[:, positions].T, lower=True)
        self.left = self.left[stays]
        self.weight = self.weight[:, stays] - onto.T @ step[:, stays]
        self.inverse = self.inverse[np.ix_(stays, stays)] - step[:, stays].T @ step[:, stays]


def _swap(workers: Sequence[WorkerProblem], kept: list[NDArray[np.bool_]]) -> Choice:
    """The local search, from some columns kept (c,) for each worker."""
    size = max(1, round(FIRST_SWAP * sum(int(columns.sum()) for columns in kept)))
    current, costs = _error_and_costs(workers, kept)
    stats = {"error_before_swaps": current, "swaps": 0}
    for _ in range(MOST_SWAPS):
        without = [columns.copy() for columns in kept]
        for columns, positions in zip(without, _smallest(costs, size), strict=True):
            columns[positions] = False
        gains = [_gains(worker, columns) for worker, columns in zip(workers, without, strict=True)]
        tried = [old | new for old, new in zip(without, largest(gains, size), strict=True)]
        error, costs_of_tried = _error_and_costs(workers, tried)
        if error < current:
            kept, current, costs = tried, error, costs_of_tried
            stats["swaps"] += 1
        elif size > 1:
            size //= 2
        else:
            break
    return Choice(kept, stats)


def _error_and_costs(
    workers: Sequence[WorkerProblem], kept: Sequence[NDArray[np.bool_]]
) -> tuple[float, list[NDArray[np.float64]]]:
    """The error of all workers after refit; by how much it rises without a column (c,), infinite if it is not kept."""
    error, costs = 0.0, []
    for worker, columns in zip(workers, kept, strict=True):
        read = np.flatnonzero(columns)
        inverse = cho_solve(cho_factor(worker.moment[np.ix_(read, read)]), np.eye(len(read)))
        weight = worker.residual[:, read] @ inverse
        error += worker.energy - float(np.sum(weight * worker.residual[:, read]))
        cost = np.full(len(columns), np.inf)
        cost[read] = column_energy(weight) / np.diagonal(inverse)
        costs.append(cost)
    return error, costs


def _gains(worker: WorkerProblem, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(c,) by how much the error falls with one more column, 0 if it is kept already. O(|S|² c)."""
    read, others = np.flatnonzero(kept), np.flatnonzero(~kept)
    factor = cholesky(worker.moment[np.ix_(read, read)], lower=True)
    half = solve_triangular(factor, worker.moment[np.ix_(read, others)], lower=True)
    onto = solve_triangular(factor, worker.residual[:, read].T, lower=True)
    left = worker.residual[:, others] - onto.T @ half
    gains = np.zeros(len(kept))
    gains[others] = column_energy(left) / (worker.variance[others] - column_energy(half))
    return gains
