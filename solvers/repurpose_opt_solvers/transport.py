"""Assigning neurons to workers at least cost: a transportation problem for equal loads, a heuristic for others.

Shared by the backends; each engine is its own file.
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Termination


class Infeasible(Exception):
    """No placement satisfies capacity, min_load and allowed; `proved` is False where a heuristic gave up."""

    def __init__(self, message: str, *, proved: bool) -> None:
        super().__init__(message)
        self.proved = proved

    def candidate(self) -> Candidate:
        return Candidate(Termination.INFEASIBLE if self.proved else Termination.ERROR, message=str(self))


def assign(problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """(m,) owners for costs (m, P): exact for equal loads (by OR-Tools where it is installed), else a heuristic.

    Raises Infeasible.
    """
    if not problem.has_equal_loads:
        from repurpose_opt_solvers.uneven import assign_uneven

        return assign_uneven(problem, cost)
    if find_spec("ortools") is not None:
        from repurpose_opt_solvers.flow_ import assign_by_flow

        return assign_by_flow(problem, cost)
    from repurpose_opt_solvers.munkres_ import assign_by_munkres

    return assign_by_munkres(problem, cost)


def nearest_placement(
    problem: LayerProblem, owner: NDArray[np.int64], cost: NDArray[np.float64] | None = None
) -> Candidate:
    """The valid placement that moves the least load away from `owner`, of least cost (m, P) among those."""
    away = np.repeat(problem.load[:, None], problem.P, axis=1)
    away[np.arange(problem.m), owner] = 0.0
    if cost is not None:
        relative = cost - cost.min(axis=1, keepdims=True)
        most = relative.max()
        away += relative * (problem.load.min() / (2 * problem.m * most) if most > 0 else 0.0)
    try:
        return Candidate(Termination.HEURISTIC, assign(problem, away))
    except Infeasible as reason:
        return reason.candidate()
