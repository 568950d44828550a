"""`threshold`: the formulation's own choice of transfers, by group norms on the diagonal of C."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import least_of_uncorrelated
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination


class Threshold:
    """Keeps what is worth most a byte by itself: energies, or SVDs of codes (exact where nothing is correlated)."""

    name = "threshold"
    requires: tuple[str, ...] = ()
    sends_codes = True

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
        exchange = formulation.select(problem, owner, lambda: deadline.passed)
        if deadline.passed:
            return Candidate(Termination.TIME_LIMIT, owner, exchange)
        if not (
            isinstance(formulation, Volume) and formulation.sends_codes and formulation.selection_is_exact(problem)
        ):
            return Candidate(Termination.HEURISTIC, owner, exchange)
        least = least_of_uncorrelated(problem, formulation, owner, exchange)
        return Candidate(Termination.OPTIMAL, owner, exchange, bound=least)
