"""When a worker fails, hangs or loses contact: the workers agree in their store on one line, which names the culprit.

A thread of each worker looks whether another one has found a fault, and then says what its worker is doing. A process
that was killed or suspended says nothing. The worker that found the fault judges, and one line is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from torch.distributed import Store  # type: ignore[attr-defined]

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.processes.group import ACTIVITY, LostContact
from repurpose_opt.runtime.processes.members import ENDED, SILENT, SUSPENDED, Member
from repurpose_opt.runtime.processes.stop import Stopped

POLL = 0.1
"""Seconds between two looks into the store."""
GRACE = 2.0
"""Seconds in which a worker that lives says so, if the timeout is not even shorter."""
FAULT, VERDICT = "fault", "verdict"

Speech = Callable[[RepurposeError], str | None]
"""The line that a process prints for its own error; None where another process speaks."""


@dataclass(frozen=True)
class Answer:
    """What a worker says of itself after another one has found a fault."""

    seconds_at_work: float
    """How long it has worked by itself; 0 where it waits for others as well."""
    error: str | None
    """Why it failed, if it did for a reason of its own."""


class Watch:
    """Looks after the other workers of a run, in a thread of its own."""

    def __init__(self, store: Store, keeper: int | None, members: Sequence[Member], rank: int, timeout: float) -> None:
        """`timeout` in seconds.

        `store` is used by the thread only, once all are connected; `keeper` is the worker in whose process it is kept,
        None for torchrun.
        """
        self._store, self._keeper, self._rank = store, keeper, rank
        self.members = members
        self._others = [other for other in range(len(members)) if other != rank]
        self._grace = min(GRACE, timeout)
        self._error: RepurposeError | None = None
        self._speech: Speech | None = None
        self._wake, self._decided, self._left = threading.Event(), threading.Event(), threading.Event()
        self._is_ending = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def settle(self, error: RepurposeError) -> str | None:
        """The line that this process has to print for its error; None where another one does."""
        self._error = error
        self._is_ending.set()
        self._wake.set()
        if not self._keeper_lives or not self._decided.wait(2 * self._grace) or self._speech is None:
            self._speech = self._without_store()
        return self._speech(error)

    def close(self) -> None:
        """Stop looking; the process that keeps the store waits until no other one needs it."""
        self._is_ending.set()
        self._wake.set()
        self._left.wait(2 * self._grace)

    def _watch(self) -> None:
        is_doomed = True
        try:
            while not (self._is_ending.is_set() or self._store.check([FAULT])):
                self._wake.wait(POLL)
            if self._error is not None or self._store.check([FAULT]):
                self._speech = self._decide()
        except RuntimeError:
            self._speech = self._without_store()
            is_doomed = self._keeper is not None
        self._decided.set()
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left {self._rank}", "")
            if self._keeper == self._rank:
                self._until(lambda: all(self._has_left(rank) for rank in self._others))
        self._left.set()
        if is_doomed and not self._is_ending.wait(self._grace):
            os._exit(1)  # nothing else ends a process that is stuck at work, or waits for one that is suspended

    def _decide(self) -> Speech:
        """Judge, or be judged by the worker that was the first to find a fault."""
        judge = int(self._store.compare_set(FAULT, "", str(self._rank)))
        if judge == self._rank:
            line = self._judge()
            self._store.set(VERDICT, "")
            return lambda _: line
        self._store.set(f"answer {self._rank}", json.dumps(asdict(self._answer())))
        if not self._until(lambda: self._store.check([VERDICT]), 1.5 * self._grace):
            return _own_or(f"{self._named(judge)} {self.members[judge].condition()}")
        return lambda _: None

    def _answer(self) -> Answer:
        is_own = self._error is not None and not isinstance(self._error, LostContact | Stopped)
        return Answer(ACTIVITY.seconds if ACTIVITY.purpose is None else 0.0, str(self._error) if is_own else None)

    def _judge(self) -> str:
        """The line that names the culprit."""
        error = str(self._error)
        if not isinstance(self._error, LostContact | Stopped):
            return error
        self._until(lambda: any(map(self._has_ended, self._others)) or not self._silent())
        culprits = [rank for rank in self._others if self._has_ended(rank)] or self._silent()
        if culprits:
            names = " and ".join(f"{self._named(rank)} {self.members[rank].condition()}" for rank in culprits)
            for rank in culprits:
                self.members[rank].kill()  # torchrun waits 30 seconds for a suspended process
            return f"{names}: {error}"
        answers = {rank: Answer(**json.loads(self._store.get(f"answer {rank}"))) for rank in self._others}
        failed = [answer.error for answer in answers.values() if answer.error is not None]
        if failed or isinstance(self._error, Stopped):
            return failed[0] if failed else error
        busiest = max(answers, key=lambda rank: answers[rank].seconds_at_work)
        seconds = answers[busiest].seconds_at_work
        if seconds == 0:
            return f"{error}; all workers live and wait for each other: look at the network between them"
        return f"{self._named(busiest)} has been busy for {seconds:.1f} seconds: {error}"

    def _without_store(self) -> Speech:
        """The store is gone or silent: the lowest worker that lives speaks for all who only lost contact."""
        if any(rank < self._rank and rank != self._keeper and not self._has_ended(rank) for rank in self._others):
            return lambda error: None if isinstance(error, LostContact) else str(error)
        if self._keeper is None:
            return _own_or("torchrun, which keeps the workers' store, ended")
        keeper = self.members[self._keeper]
        # Its connections end a moment before a killed process is known to have ended.
        self._until(lambda: keeper.condition() != SILENT)
        speech = _own_or(f"{self._named(self._keeper)}, which keeps the workers' store, {keeper.condition()}")
        keeper.kill()
        return speech

    @property
    def _keeper_lives(self) -> bool:
        """As far as is known from here; a suspended process would keep everybody waiting for an answer of its store."""
        return self._keeper is None or self.members[self._keeper].condition() not in (ENDED, SUSPENDED)

    def _named(self, rank: int) -> str:
        return self.members[rank].named(rank)

    def _has_ended(self, rank: int) -> bool:
        return self.members[rank].condition() == ENDED

    def _has_left(self, rank: int) -> bool:
        return self._store.check([f"left {rank}"]) or self._has_ended(rank)

    def _silent(self) -> list[int]:
        return [rank for rank in self._others if not self._store.check([f"answer {rank}"])]

    def _until(self, is_so: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait for something in the store for so long, by default the grace."""
        deadline = time.monotonic() + (self._grace if seconds is None else seconds)
        while not is_so():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL / 10)
        return True


def _own_or(cause: str) -> Speech:
    """A process that failed for a reason of its own says that, one that lost contact names the cause."""
    return lambda error: f"{cause}: {error}" if isinstance(error, LostContact) else str(error)
