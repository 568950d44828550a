"""`munkres`: SciPy's assignment with a column for each place of each worker, as RePurpose describes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from repurpose_opt.problem import LayerProblem
from repurpose_opt_solvers.exact_assignment import ExactAssignment
from repurpose_opt_solvers.transport import Infeasible


class Munkres(ExactAssignment):
    """Exact assignment by SciPy (equal loads): optimal for Edge, a start for the others. O(m³)."""

    name = "munkres"
    requires: tuple[str, ...] = ()

    def assign(self, problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
        return assign_by_munkres(problem, cost)


def assign_by_munkres(problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """(m,) owners of least total cost (m, P). Raises Infeasible."""
    places = np.minimum(problem.slots, problem.m)
    required = np.minimum(problem.min_slots, places)
    column_worker = np.repeat(np.arange(problem.P), places)
    costs = np.where(problem.allowed, cost, np.inf)[:, column_worker]
    if required.any():
        # Dummy neurons fill what stays empty, which the first `required` places of a worker must not.
        place = np.concatenate([np.arange(count) for count in places])
        optional = place >= required[column_worker]
        dummies = np.where(optional, 0.0, np.inf)
        costs = np.vstack([costs, np.tile(dummies, (len(column_worker) - problem.m, 1))])
    try:
        rows, columns = linear_sum_assignment(costs)
    except ValueError as error:
        if "infeasible" not in str(error):
            raise
        raise Infeasible("no placement satisfies capacity, min_load and allowed", proved=True) from None
    owner = np.empty(len(costs), dtype=np.int64)
    owner[rows] = column_worker[columns]
    return owner[: problem.m]
