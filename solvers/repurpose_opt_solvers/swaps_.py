"""`swaps`: exchanges one transfer for another, adds and removes single ones, while that lowers the objective."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, SolveOptions
from repurpose_opt_solvers.transfer_search import search


class Swaps:
    """Descent by exact exchanges of transfers, from an earlier pruner's choice. Volume with total communication."""

    name = "swaps"
    requires: tuple[str, ...] = ()
    explores = False

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, Volume) or formulation.communication == "busiest":
            return "exchanges of transfers by the error after refit: Volume with total communication only"
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        return search(problem, formulation, options, owner, start, explores=self.explores)
