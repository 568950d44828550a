"""`threshold`: the formulation's own choice of transfers, by group norms on the diagonal of C."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination


class Threshold:
    """Keeps the transfers of largest energy per byte (exact for Edge, Lossless and diagonal Volume)."""

    name = "threshold"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        if not isinstance(formulation, Volume):
            return Candidate(Termination.HEURISTIC, owner, formulation.select(problem, owner))
        deadline = Deadline(options.time_limit)
        exchange = formulation.take(problem, owner, formulation.ranking(problem, owner), lambda: deadline.passed)
        return Candidate(Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC, owner, exchange)
