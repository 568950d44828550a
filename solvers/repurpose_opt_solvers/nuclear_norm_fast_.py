"""`nuclear-norm-fast`: codes by a convex relaxation, the nuclear norm, with singular value thresholding; then refit.

The same relaxation as `nuclear-norm`, solved source by source in NumPy to a proved duality gap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers import nuclear_path
from repurpose_opt_solvers.nuclear import CodeProblem, Floats, NuclearSolution, OutOfTime, solve
from repurpose_opt_solvers.nuclear_path import Choice


class NuclearNormFast:
    """Convex nuclear norm by singular value thresholding, then the refit; with a bound. Volume with codes."""

    name = "nuclear-norm-fast"
    requires: tuple[str, ...] = ()
    sends_codes = True

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return nuclear_path.supports(problem, formulation)

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        deadline = Deadline(options.time_limit)
        exact = nuclear_path.delegated(problem, formulation, options, owner)
        if exact is not None:
            return exact

        def solver(index: int, part: CodeProblem, penalty_weight: float, near: Floats | None) -> NuclearSolution:
            return solve(part, penalty_weight, near, lambda: deadline.passed)

        choice: Choice | None = None
        try:
            for choice in nuclear_path.search(problem, formulation, owner, solver, lambda: deadline.passed):  # noqa: B007
                pass
        except OutOfTime:
            pass  # the deadline has passed, which the termination says
        if choice is None:
            return nuclear_path.without_time(problem, formulation, owner)
        termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
        candidate = Candidate(termination, owner, choice.exchange, stats=choice.stats)
        return nuclear_path.with_bound(problem, formulation, options, candidate, deadline)
