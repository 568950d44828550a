"""Chains of pruners: `"group-omp+swaps"` hands each one the exchange before, and keeps the best verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import registry
from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solution import LayerSolution, rank, verify
from repurpose_opt.solver import Candidate, Deadline, Pruner, PruneStage, SolveOptions, Termination, time_left


def load_pruner(chain: str) -> PrunerChain:
    """The pruners of a name, or of several joined by +. Raises InvalidArgument, UnknownSolver, SolverNotInstalled."""
    if not all(chain.split("+")):
        raise InvalidArgument("pruner", repr(chain), "names joined by +")
    return PrunerChain(tuple(registry.load("pruners", name)() for name in chain.split("+")))


@dataclass(frozen=True)
class PrunerChain:
    """Pruners one after the other, each starting from the best exchange so far, under one time limit."""

    pruners: tuple[Pruner, ...]

    @property
    def name(self) -> str:
        return "+".join(pruner.name for pruner in self.pruners)

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        """Why one of the pruners cannot solve the problem, or None."""
        reasons = [(pruner.name, _unsupported(pruner, problem, formulation)) for pruner in self.pruners]
        return next((f"{name}: {reason}" for name, reason in reasons if reason is not None), None)

    def solve(
        self, problem: LayerProblem, formulation: Formulation, options: SolveOptions, owner: NDArray[np.int64]
    ) -> Candidate:
        """The best exchange of all pruners, with the best bound.

        `time_limit` where the limit passed. A pruner after the first that fails is recorded in stats.
        """
        deadline = Deadline(options.time_limit)
        found = _Found()
        for pruner in self.pruners:
            if found.best is not None and deadline.passed:
                break
            within = time_left(options, deadline)
            start = None if found.best is None else found.best.exchange
            try:
                candidate = _chosen(pruner, problem, formulation, within, owner, start)
            except Exception as error:
                if found.best is None or isinstance(error, RepurposeError):
                    raise
                failed = f"{type(error).__name__}: {error}"
                candidate = Candidate(Termination.ERROR, message=failed, stats={"failed": failed})
            found.add(pruner.name, candidate, verify(problem, formulation, candidate, options))
        return found.candidate(owner, options, deadline)


def _unsupported(pruner: Pruner, problem: LayerProblem, formulation: Formulation) -> str | None:
    if formulation.sends_codes and not getattr(pruner, "sends_codes", False):
        return "it chooses values, not codes"
    return pruner.supports(problem, formulation.selection)


def _chosen(
    pruner: Pruner | PrunerChain,
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions,
    owner: NDArray[np.int64],
    start: Exchange | None = None,
) -> Candidate:
    """A pruner's answer, by the formulation that chooses messages; what it claims holds for that one only."""
    if isinstance(pruner, PrunerChain):
        return pruner.solve(problem, formulation, options, owner)
    candidate = pruner.solve(problem, formulation.selection, options, owner, start)
    if formulation.selection is formulation:
        return candidate
    proved = candidate.termination is Termination.OPTIMAL
    termination = Termination.HEURISTIC if proved else candidate.termination
    return replace(candidate, termination=termination, bound=None, surrogate_bound=None, claimed_objective=None)


@dataclass
class _Found:
    """What the pruners of a chain answered."""

    best: LayerSolution | None = None
    bound: float | None = None
    asked: list[tuple[str, Candidate]] = field(default_factory=list)

    def add(self, name: str, candidate: Candidate, solution: LayerSolution) -> None:
        self.asked.append((name, candidate))
        if solution.owner is not None and (self.best is None or rank(solution) < rank(self.best)):
            self.best = solution
        if solution.bound is not None:
            self.bound = solution.bound if self.bound is None else max(self.bound, solution.bound)

    def candidate(self, owner: NDArray[np.int64], options: SolveOptions, deadline: Deadline) -> Candidate:
        last = self.asked[-1][1]
        stats = {"pruners": [{"pruner": name, **candidate.stats} for name, candidate in self.asked]}
        if self.best is None:
            return replace(last, stats=stats)
        termination = Termination.HEURISTIC
        slack = options.relative_gap * max(abs(self.best.objective), 1e-12)
        if self.bound is not None and self.best.objective <= self.bound + slack:
            termination = Termination.OPTIMAL
        elif deadline.passed or any(c.termination is Termination.TIME_LIMIT for _, c in self.asked):
            termination = Termination.TIME_LIMIT
        return Candidate(termination, owner, self.best.exchange, self.bound, message=self.best.message, stats=stats)


class Pruning:
    """A chain of pruners for one problem, as partitioners see it (`repurpose_opt.solver.Prune`)."""

    def __init__(
        self, problem: LayerProblem, formulation: Formulation, chain: PrunerChain, options: Callable[[], SolveOptions]
    ) -> None:
        self.problem, self.formulation, self.chain = problem, formulation, chain
        self.options = options
        """Called for each pruning: the time that is left."""
        self.pruned: dict[tuple[str, bytes], Candidate] = {}

    @property
    def stages(self) -> Sequence[PruneStage]:
        return [partial(self._stage, pruner) for pruner in self.chain.pruners]

    def __call__(self, owner: NDArray[np.int64]) -> Candidate:
        return self._remembered(self.chain if len(self.chain.pruners) > 1 else self.chain.pruners[0], owner)

    def by_first(self, owner: NDArray[np.int64]) -> Candidate:
        """By the first pruner of the chain only."""
        return self._remembered(self.chain.pruners[0], owner)

    def _stage(self, pruner: Pruner, owner: NDArray[np.int64], start: Exchange | None) -> Candidate:
        if start is None:
            return self._remembered(pruner, owner)
        pruned = _chosen(pruner, self.problem, self.formulation, self.options(), np.array(owner), start)
        return self._for_these_owners(pruned)

    def _remembered(self, pruner: Pruner | PrunerChain, owner: NDArray[np.int64]) -> Candidate:
        owner = np.array(owner)  # a copy: a local search changes its array in place
        key = (pruner.name, owner.tobytes())  # a partitioner prunes its start again, which is often the costliest step
        if key not in self.pruned:
            pruned = _chosen(pruner, self.problem, self.formulation, self.options(), owner)
            self.pruned[key] = self._for_these_owners(pruned)
        return self.pruned[key]

    def _for_these_owners(self, candidate: Candidate) -> Candidate:
        """A pruner's proof holds for its owners: it is no bound on the layer unless there are no others."""
        if (self.problem.allowed.sum(axis=1) == 1).all():
            return candidate
        proved = candidate.termination is Termination.OPTIMAL
        return replace(
            candidate,
            termination=Termination.HEURISTIC if proved else candidate.termination,
            bound=None,
            surrogate_bound=None,
            stats={**candidate.stats, "bound_given_owners": candidate.bound},
        )
