"""SIGTERM and SIGINT as a wish that a worker fulfils where it can, not as an end in the middle of something."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

from repurpose_opt.errors import RepurposeError


class Stopped(RepurposeError):
    """A signal asked this process to end."""


class StopSignal:
    """The first signal that arrived, and who is to be told of it at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        """SIGTERM or SIGINT; None as long as none has arrived."""
        self.tell: Callable[[], object] = bool
        """Called in the signal handler."""

    def raise_if_received(self, rank: int) -> None:
        """Raises Stopped."""
        if self.name is not None:
            raise Stopped(f"worker {rank} was stopped by {self.name}")


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Note SIGTERM and SIGINT instead of ending.

    torchrun sends SIGTERM to the others as soon as one worker has ended: they must live to say which.
    """
    stop = StopSignal()

    def note(number: int, _: object) -> None:
        stop.name = stop.name or signal.Signals(number).name
        stop.tell()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
