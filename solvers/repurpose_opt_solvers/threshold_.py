"""`threshold`: the formulation's own choice of transfers, by group norms on the diagonal of C."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, SolveOptions, Termination


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
        return Candidate(Termination.HEURISTIC, owner, formulation.select(problem, owner))
