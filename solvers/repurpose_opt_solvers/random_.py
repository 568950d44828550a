"""`random`: a random valid placement, the baseline that every other must beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions
from repurpose_opt_solvers.contiguous_ import contiguous_owner
from repurpose_opt_solvers.transport import nearest_placement


class Random:
    """A random placement with loads in proportion to the capacities; the same for the same seed."""

    name = "random"
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
        shuffled = np.random.default_rng(options.seed).permutation(contiguous_owner(problem))
        return nearest_placement(problem, shuffled)
