"""What `flow` and `munkres` share: one assignment on the formulation's cost, exact where the cost is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions, Termination
from repurpose_opt_solvers.transport import Infeasible


class ExactAssignment(ABC):
    """Assigns by the cost that the formulation gives without knowing owners; a subclass brings the engine."""

    name: str
    requires: tuple[str, ...]
    resolution = 0.0
    """Error of each cost, relative to the largest spread of a neuron's costs."""

    @abstractmethod
    def assign(self, problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
        """(m,) owners of least total cost (m, P). Raises Infeasible."""

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return None if problem.has_equal_loads else "exact for equal loads only; use 'alternate' for unequal ones"

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        cost = formulation.assignment_cost(problem, None, None)
        try:
            owner = self.assign(problem, cost)
        except Infeasible as reason:
            return reason.candidate()
        if not formulation.assignment_is_exact:
            return Candidate(Termination.HEURISTIC, owner)
        least = float(cost[np.arange(problem.m), owner].sum())
        doubt = problem.m * self.resolution * float(np.ptp(cost, axis=1).max())
        return Candidate(Termination.OPTIMAL, owner, bound=least - doubt, claimed_objective=least)
