"""`group-lasso-fast`: the transfers by a convex group lasso, by Newton's method in the group norms, then the refit."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers import lasso_path
from repurpose_opt_solvers.lasso_newton import Floats, LassoProblem, LassoSolution, OutOfTime, solve


class GroupLassoFast:
    """Convex group lasso by Newton's method, to a duality gap of 1e-10 of the error; then the refit. Volume only."""

    name = "group-lasso-fast"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return lasso_path.supports(problem, formulation)

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

        def solver(index: int, lasso: LassoProblem, penalty_weight: float, near: Floats | None) -> LassoSolution:
            return solve(lasso, penalty_weight, near, out_of_time=lambda: deadline.passed)

        choice = None
        try:
            for choice in lasso_path.search(problem, formulation, owner, solver, lambda: deadline.passed):  # noqa: B007
                pass
        except OutOfTime:
            pass
        assert choice is not None
        termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
        return Candidate(termination, owner, choice.exchange, stats=choice.stats)
