"""Chains of pruners: `"group-omp+swaps"` hands each one the exchange before, and keeps the best verified."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import registry
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solution import LayerSolution, rank, verify
from repurpose_opt.solver import Candidate, Deadline, Pruner, SolveOptions, Termination


def load_pruner(chain: str) -> Pruner:
    """The pruner of a name, or of several joined by +. Raises UnknownSolver, SolverNotInstalled."""
    stages = tuple(registry.load("pruners", name)() for name in chain.split("+"))
    return stages[0] if len(stages) == 1 else PrunerChain(stages)


@dataclass(frozen=True)
class PrunerChain:
    """Pruners one after the other, each starting from the best exchange so far, under one time limit."""

    stages: tuple[Pruner, ...]

    @property
    def name(self) -> str:
        return "+".join(stage.name for stage in self.stages)

    @property
    def requires(self) -> tuple[str, ...]:
        return tuple(package for stage in self.stages for package in stage.requires)

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        reasons = [(stage.name, stage.supports(problem, formulation)) for stage in self.stages]
        return next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        """The best exchange of all stages. `time_limit` where the limit passed, `error` where no stage answered."""
        deadline = Deadline(options.time_limit)
        best: LayerSolution | None = None
        asked: list[Candidate] = []
        for stage in self.stages:
            left = deadline.remaining
            within = replace(options, time_limit=None if left is None else max(left, 1e-3))
            candidate = stage.solve(problem, formulation, within, owner, start if best is None else best.exchange)
            asked.append(candidate)
            solution = verify(problem, formulation, candidate, options)
            if solution.owner is not None and (best is None or rank(solution) < rank(best)):
                best = solution
        stats = {"pruners": {stage.name: dict(c.stats) for stage, c in zip(self.stages, asked, strict=True)}}
        if best is None:
            return replace(asked[-1], stats=stats)
        out_of_time = Termination.TIME_LIMIT in (candidate.termination for candidate in asked)
        termination = Termination.TIME_LIMIT if out_of_time else best.termination
        return Candidate(termination, owner, best.exchange, best.bound, message=best.message, stats=stats)
