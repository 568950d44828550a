"""What it costs that a unit is on a worker because others must read it elsewhere, seen from the sweep before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.onward import Onward
from repurpose_opt.problem import LayerProblem


@dataclass(frozen=True, eq=False)
class Reading:
    """How much a product needs each value of its input on each worker."""

    units: NDArray[np.int64]
    """(n,) that the values are of"""
    energy: NDArray[np.float64]
    """(n, P) loss-weighted energy of a value's columns in the rows of each worker, on the diagonal of C: what it would
    cost, with nothing repaired, that the worker does not have the value."""
    size: int
    """Bytes of a value."""
    link_price: NDArray[np.float64]
    """(P, P)"""

    def cost(self, price: float) -> NDArray[np.float64]:
        """(n, P) for a value on worker k: over all others, the cheaper of sending it there and its energy there."""
        P = self.energy.shape[1]
        lost = np.minimum(price * self.size * self.link_price, self.energy[:, None, :])
        lost[:, np.arange(P), np.arange(P)] = 0.0
        return np.asarray(lost.sum(axis=2))


def energies(problem: LayerProblem, row_owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, P) `Reading.energy` of a product whose rows are where they are, (rows,). O(rows · columns)."""
    energy = np.zeros((problem.n, problem.P))
    for worker in range(problem.P):
        rows = np.flatnonzero(row_owner == worker)
        squares = np.square(problem.weight[rows], dtype=np.float64)
        by_column = problem.output_weight[rows] @ squares * problem.moments.variance
        energy[:, worker] = np.bincount(problem.column_value, by_column, problem.n)
    return energy


def onward(
    formulation: Formulation,
    problem: LayerProblem,
    units: NDArray[np.int64],
    readings: Mapping[str, Reading],
    price: float,
) -> Formulation:
    """The formulation, and beside it what each neuron, of these units (m,), costs those that read it.

    As it is where nothing that is known reads one of them.
    """
    cost = np.zeros((problem.m, problem.P))
    for read in readings.values():
        place = np.searchsorted(units, read.units)
        found = (place < len(units)) & (units[np.minimum(place, len(units) - 1)] == read.units)
        np.add.at(cost, place[found], read.cost(price)[found])
    return Onward(formulation, cost) if cost.any() else formulation
