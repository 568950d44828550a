"""What a backend is: the protocols, the options that it is given and the candidate that it answers with."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem


class Termination(enum.StrEnum):
    """Why a solve ended. `OPTIMAL` only with a bound within the tolerance."""

    OPTIMAL = "optimal"
    HEURISTIC = "heuristic"
    TIME_LIMIT = "time_limit"
    INFEASIBLE = "infeasible"
    UNSUPPORTED = "unsupported"
    ERROR = "error"


@dataclass(frozen=True)
class SolveOptions:
    """time_limit in seconds (None: none), seed, threads a backend may use, relative gap that counts as optimal."""

    time_limit: float | None = None
    seed: int = 0
    threads: int = 1
    relative_gap: float = 1e-6

    def __post_init__(self) -> None:
        if self.time_limit is not None and not (
            isinstance(self.time_limit, (int, float, np.number)) and 0 < self.time_limit < np.inf
        ):
            raise InvalidArgument("time_limit", repr(self.time_limit), "seconds > 0, or None")
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise InvalidArgument("seed", repr(self.seed), "a whole number ≥ 0")
        if self.threads < 1:
            raise InvalidArgument("threads", self.threads, "a whole number ≥ 1")
        if not 0 <= self.relative_gap < 1:
            raise InvalidArgument("relative_gap", self.relative_gap, "a number in [0, 1)")


class Deadline:
    """Counts down from a time limit in seconds; None never passes."""

    def __init__(self, time_limit: float | None) -> None:
        self._end = None if time_limit is None else time.monotonic() + time_limit

    @property
    def remaining(self) -> float | None:
        """Seconds left, at least 0; None if there is no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.remaining == 0.0


def time_left(options: SolveOptions, deadline: Deadline, share: float = 1.0) -> SolveOptions:
    """The options with a share of the time that is left as the limit."""
    left = deadline.remaining
    return replace(options, time_limit=None if left is None else max(share * left, 1e-3))


@dataclass(frozen=True)
class Candidate:
    """A backend's answer. Objective, bound and termination are claims until verified from the labels."""

    termination: Termination
    owner: NDArray[np.int64] | None = None
    """(m,); None where there is no answer."""
    exchange: Exchange | None = None
    """None lets the pruner choose the transfers."""
    bound: float | None = None
    """A lower bound on the objective as given."""
    surrogate_bound: float | None = None
    """A lower bound on the objective with the diagonal of C only."""
    claimed_objective: float | None = None
    message: str = ""
    stats: Mapping[str, Any] = field(default_factory=dict)
    """Anything that the backend tells of its search. One key is known: "trajectory", a list of (seconds since `solve`
    began, objective) of incumbents, in the units of the formulation's objective (`trajectory.Incumbents` records it).
    The solution's "trajectory" is that of all stages, without claims below what was verified.
    """


PruneStage = Callable[[NDArray[np.int64], Exchange | None], Candidate]
"""One pruner, applied to owners (m,) and the exchange before."""


class Prune(Protocol):
    """The chosen pruner, applied to owners (m,)."""

    @property
    def stages(self) -> Sequence[PruneStage]:
        """The pruners of a chain, one by one, for partitioners that place anew in between."""
        ...

    def __call__(self, owner: NDArray[np.int64]) -> Candidate: ...


class Partitioner(Protocol):
    """Chooses owners. `requires` names the importable packages that it needs; import them inside `solve`.

    One that has `keeps_start = True` applies every stage of `prune` to its start, so its answer is never worse.
    """

    name: str
    requires: tuple[str, ...]

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        """Why this backend cannot solve the problem, or None."""
        ...

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate: ...


class Pruner(Protocol):
    """Chooses the transfers, given the owners; `start` is what an earlier pruner of a chain chose.

    One that has `sends_codes = True` serves formulations with codes (`Formulation.sends_codes`) as well. A bound, and
    `optimal`, are for these owners.
    """

    name: str
    requires: tuple[str, ...]

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None: ...

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate: ...
