"""`compensated`: assign by the exact cost after refit (Schur complement), choose the transfers, assign again."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions
from repurpose_opt_solvers.alternate_ import alternate_on, on_diagonal


class Compensated:
    """Assign ↔ select on the error that is left after refit, full C, two starts. Any loads; Volume only."""

    name = "compensated"
    requires: tuple[str, ...] = ()
    keeps_start = True

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return None if formulation.selection.name == "volume" else "there is no refit to compensate by outside Volume"

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        began = time.monotonic()
        starts = [problem] if problem.moments.is_diagonal else [problem, on_diagonal(problem)]
        return alternate_on(problem, problem, formulation, options, start, prune, starts, began)
