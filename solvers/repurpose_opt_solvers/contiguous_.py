"""`contiguous`: neurons in their given order, worker after worker; what one does without thinking."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions
from repurpose_opt_solvers.transport import nearest_placement


class Contiguous:
    """Fills the workers in order, in proportion to their capacity."""

    name = "contiguous"
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
        return nearest_placement(problem, contiguous_owner(problem))


def contiguous_owner(problem: LayerProblem) -> NDArray[np.int64]:
    """(m,) runs whose loads are in proportion to the capacities; may break bounds by a neuron."""
    share = np.minimum(problem.capacity, problem.load.sum())
    ends = np.cumsum(share) / share.sum() * problem.load.sum()
    middle = np.cumsum(problem.load) - problem.load / 2
    return np.minimum(np.searchsorted(ends, middle), problem.P - 1)
