"""Assigning neurons to workers at least cost: a transportation problem for equal loads, generalised for others.

Shared by the backends; each engine is its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import metrics
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Termination
from repurpose_opt.trajectory import Point

_NEAR = 0.02
"""Gap to the least load that `nearest_placement` moves, where loads are unequal: more is not worth the time."""


class Infeasible(Exception):
    """No placement satisfies capacity, min_load and allowed; `proved` is False where a heuristic gave up."""

    def __init__(self, message: str, *, proved: bool, out_of_time: bool = False) -> None:
        super().__init__(message)
        self.proved = proved
        self.out_of_time = out_of_time

    def candidate(self) -> Candidate:
        unproved = Termination.TIME_LIMIT if self.out_of_time else Termination.ERROR
        return Candidate(Termination.INFEASIBLE if self.proved else unproved, message=str(self))


@dataclass(frozen=True, eq=False)
class Assignment:
    """A placement within capacity, min_load and allowed, and a lower bound on what any such placement costs."""

    owner: NDArray[np.int64]
    """(m,)"""
    bound: float
    out_of_time: bool = False
    stats: Mapping[str, Any] = field(default_factory=dict)
    trajectory: Sequence[Point] = ()
    """(seconds since the search began, total cost) of the placements that were found, of unequal loads."""


def assign(
    problem: LayerProblem,
    cost: NDArray[np.float64],
    *,
    time_limit: float | None = None,
    relative_gap: float = 5e-4,
) -> NDArray[np.int64]:
    """(m,) owners for costs (m, P): exact for equal loads (by OR-Tools where it is installed), else a heuristic.

    `time_limit` and `relative_gap` are for unequal loads: the search ends within that gap of a bound, or when a few
    integer programs have not reached it. Raises Infeasible.
    """
    if not problem.has_equal_loads:
        return assign_with_bound(problem, cost, time_limit=time_limit, relative_gap=relative_gap).owner
    if find_spec("ortools") is not None:
        from repurpose_opt_solvers.flow_ import assign_by_flow

        return assign_by_flow(problem, cost)
    from repurpose_opt_solvers.munkres_ import assign_by_munkres

    return assign_by_munkres(problem, cost)


def assign_with_bound(
    problem: LayerProblem,
    cost: NDArray[np.float64],
    *,
    time_limit: float | None = None,
    relative_gap: float = 5e-4,
    node_limit: int = 50,
    most_places: int = 60,
) -> Assignment:
    """Owners for costs (m, P) and a bound on the least total cost; the arguments are those of `assign_uneven`.

    Raises Infeasible.
    """
    from repurpose_opt_solvers.uneven import assign_uneven, bound_of

    if problem.has_equal_loads:
        owner = assign(problem, cost)
        return Assignment(owner, bound_of(problem, cost, owner))
    return assign_uneven(
        problem,
        cost,
        time_limit=time_limit,
        relative_gap=relative_gap,
        node_limit=node_limit,
        most_places=most_places,
    )


def nearest_placement(
    problem: LayerProblem, owner: NDArray[np.int64], cost: NDArray[np.float64] | None = None
) -> Candidate:
    """The valid placement that moves the least load away from `owner`, of least cost (m, P) among those.

    Exact for equal loads, else a heuristic.
    """
    if not metrics.placement_violations(problem, owner):
        return Candidate(Termination.HEURISTIC, owner)
    away = np.repeat(problem.load[:, None], problem.P, axis=1)
    away[np.arange(problem.m), owner] = 0.0
    if cost is not None:
        relative = cost - cost.min(axis=1, keepdims=True)
        most = relative.max()
        away += relative * (problem.load.min() / (2 * problem.m * most) if most > 0 else 0.0)
    try:
        return Candidate(Termination.HEURISTIC, assign(problem, away, relative_gap=_NEAR))
    except Infeasible as reason:
        return reason.candidate()
