"""`alternate`: assign by the cost on the diagonal of C, choose the transfers, assign again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solve import alternate
from repurpose_opt.solver import Candidate, Deadline, Prune, SolveOptions, Termination
from repurpose_opt_solvers.transport import Infeasible, assign

_GAP = 5e-4
_GAP_OF_MARGINAL_COSTS = 5e-3
"""How far from a bound the assignment of unequal loads may end."""


class Alternate:
    """Assign ↔ select on the diagonal of C; damped marginal costs for Lossless. Any formulation, any loads."""

    name = "alternate"
    requires: tuple[str, ...] = ()
    keeps_start = True

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
        # Edge sees the diagonal only, Lossless the weight itself, which on_diagonal replaces by its target.
        seen = on_diagonal(problem) if isinstance(formulation, Volume) else problem
        return alternate_on(seen, problem, formulation, options, start, prune, [seen], began)


def alternate_on(
    seen: LayerProblem,
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions,
    start: NDArray[np.int64] | None,
    prune: Prune,
    start_seen: Sequence[LayerProblem],
    began: float,
) -> Candidate:
    """The alternation with the assignment costs of the problem `seen`; pruned and verified on the true one.

    Without a start, from the owners of least cost before anything is sent, as each problem of `start_seen` has it.
    The trajectory counts from `began`, on `time.monotonic()`.
    """

    def cost(owner: NDArray[np.int64] | None, exchange: Exchange | None) -> NDArray[np.float64]:
        return formulation.assignment_cost(seen, owner, exchange)

    deadline = Deadline(options.time_limit)
    gap = _GAP if formulation.assignment_is_exact else _GAP_OF_MARGINAL_COSTS
    placed = start
    gave_up: list[Infeasible] = []

    def assign_costs(costs: NDArray[np.float64]) -> NDArray[np.int64]:
        nonlocal placed
        try:
            placed = assign(problem, costs, time_limit=deadline.remaining, relative_gap=gap)
        except Infeasible as reason:
            if placed is None:
                raise
            gave_up.append(reason)  # the same owners again end the alternation
        return placed

    try:
        if start is None and formulation.assignment_is_exact:  # the cost does not depend on the owners
            return prune(assign_costs(cost(None, None)))
        starts = (
            [start]
            if start is not None
            else [assign_costs(formulation.assignment_cost(other, None, None)) for other in start_seen]
        )
        found = alternate(problem, formulation, options, starts, prune, cost, assign_costs, began)
    except Infeasible as reason:
        return reason.candidate()
    if not gave_up:
        return found
    termination = Termination.TIME_LIMIT if gave_up[0].out_of_time else found.termination
    return replace(found, termination=termination, stats={**found.stats, "gave_up": str(gave_up[0])})


def on_diagonal(problem: LayerProblem) -> LayerProblem:
    """The problem as if its inputs were uncorrelated, with the same target weights W̃."""
    if problem.moments.is_diagonal:
        return problem
    variance, zeros = problem.moments.variance, np.zeros(problem.columns)
    uncorrelated = Moments(variance, variance, variance, zeros, zeros)
    return replace(problem, weight=problem.target_weight, moments=uncorrelated)
