"""The row of a solve: what was asked, what came back and what was recomputed of it. A results file has one a solve."""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

SCHEMA = 1
"""Raised whenever the meaning of a column changes."""
_MOST_BYTES = 200
"""Of a file's name; file systems take 255."""


class Failure(enum.StrEnum):
    """Why a solve has no answer that holds."""

    CRASH = "crash"
    """Its process died."""
    TIMEOUT = "timeout"
    """It was ended, as it did not keep its time limit."""
    MEMORY = "memory"
    """It was ended above the memory limit, or an allocation failed."""
    EXCEPTION = "exception"
    """The backend raised."""
    INVALID = "invalid"
    """Its answer breaks a limit of the problem, or cannot be read."""
    NO_ANSWER = "no answer"
    """It ended by itself, at its time limit, without one."""
    INSTANCE = "instance"
    """The problem could not be built."""


@dataclass(frozen=True)
class Task:
    """One solve to do: the key of a row."""

    testset: str
    instance: str
    solver: str
    """PARTITIONER or PARTITIONER/PRUNER, each a name or a chain; the pruner is "auto" where none is named."""
    seed: int
    time_limit: float
    """Seconds."""
    threads: int = 1

    @property
    def partitioner(self) -> str:
        return self.solver.partition("/")[0]

    @property
    def pruner(self) -> str:
        return self.solver.partition("/")[2] or "auto"

    @property
    def file(self) -> str:
        """Name of the file with its answer, of characters that every file system takes."""
        parts = (
            self.testset,
            self.instance,
            self.solver,
            f"seed{self.seed}",
            f"{self.time_limit:g}s",
            f"{self.threads}t",
        )
        key = "--".join(parts)
        name = "".join(c if c.isalnum() or c in "-_.+@" else "~" for c in key).encode()
        if len(name) > _MOST_BYTES:
            digest = hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()[:16]
            name = name[: _MOST_BYTES - len(digest)].decode(errors="ignore").encode() + digest.encode()
        return f"{name.decode()}.npz"


@dataclass(frozen=True)
class Row:
    """A task and what became of it. None is what is unknown; it is an empty cell in the file."""

    testset: str
    instance: str
    solver: str
    seed: int
    time_limit: float
    threads: int
    memory_limit: int
    """Bytes."""
    schema: int
    fingerprint: str
    """Of problem and formulation; empty where they could not be built."""
    kind: str
    judge_once: bool
    formulation: str
    """Its name: edge, volume, lossless."""
    m: int | None
    n: int | None
    P: int | None
    nonzeros: int | None
    termination: str
    """A `Termination`, verified; `error` with every failure but TIMEOUT and NO_ANSWER, which have `time_limit`."""
    failure: Failure | None
    """None for an answer that holds, and where the solver said `infeasible` or `unsupported`."""
    message: str
    refused: tuple[str, ...]
    """Claims of the backend that do not hold; what they were about was recomputed or dropped."""
    objective: float | None
    """Recomputed; None without an answer that holds."""
    bound: float | None
    """Claimed; a bound above the objective is refused at once, one above a better solver's by `statistics.judged`."""
    surrogate_bound: float | None
    nmse: float | None
    volume: int | None
    """Bytes a sample."""
    direct_volume: int | None
    busiest: int | None
    seconds: float | None
    """Wall time of the solve, without the runner and imports; until its end where it was ended."""
    cpu_seconds: float | None
    """Of the solve and the processes that it started."""
    peak_bytes: int | None
    """Most memory of its processes together beyond what the runner's own had, without files and libraries."""
    overhead: float | None
    """Seconds that the runner took beside the solve."""
    trajectory: tuple[tuple[float, float], ...]
    """(seconds, objective) of incumbents as the backend tells them: claims. The last is the answer, recomputed."""
    has_answer: bool
    """Whether owners and exchange are kept beside the results, in `Task.file`; also of an answer that does not hold."""

    @property
    def task(self) -> Task:
        return Task(self.testset, self.instance, self.solver, self.seed, self.time_limit, self.threads)

    @property
    def gap(self) -> float | None:
        """(objective − bound) / |objective|; None without both."""
        if self.objective is None or self.bound is None:
            return None
        return max(0.0, self.objective - self.bound) / max(abs(self.objective), 1e-12)
