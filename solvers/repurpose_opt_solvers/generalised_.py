"""`generalised`: one assignment on the formulation's cost for any loads, with a bound: generalised assignment."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions, Termination
from repurpose_opt_solvers.transport import Infeasible, assign_with_bound

_PLACES = 3000
_MANY = 10_000
"""Pairs of neuron and worker above which, without a time limit, only the most promising are looked at."""
_PLACES_OF_MANY = 60
_NODES = 1000
_NO_LIMIT = 2**31 - 1


class Generalised:
    """Assignment with a bound for any loads: for Edge often proved optimal, a start for the others."""

    name = "generalised"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        began = time.monotonic()
        cost = formulation.assignment_cost(problem, None, None)
        spent = time.monotonic() - began
        is_timed = options.time_limit is not None
        is_large = problem.m * problem.P > _MANY
        try:
            found = assign_with_bound(
                problem,
                cost,
                time_limit=options.time_limit,
                relative_gap=options.relative_gap,
                node_limit=_NO_LIMIT if is_timed else _NODES,
                most_places=_PLACES_OF_MANY if is_large and not is_timed else _PLACES,
            )
        except Infeasible as reason:
            return reason.candidate()
        unproved = Termination.TIME_LIMIT if found.out_of_time else Termination.HEURISTIC
        if not formulation.assignment_is_exact:
            return Candidate(unproved, found.owner, stats=found.stats)
        least = float(cost[np.arange(problem.m), found.owner].sum())
        is_optimal = least - found.bound <= options.relative_gap * abs(least)
        return Candidate(
            Termination.OPTIMAL if is_optimal else unproved,
            found.owner,
            bound=found.bound,
            claimed_objective=least,
            stats={**found.stats, "trajectory": [(spent + seconds, total) for seconds, total in found.trajectory]},
        )
