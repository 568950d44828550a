"""Where batches are handed in, one after the other, and wait for their answers."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from repurpose_opt.errors import RepurposeError


class ServiceEnded(RepurposeError):
    """A batch came too late."""


@dataclass(frozen=True, eq=False)
class Request:
    """One batch."""

    name: object
    """Of its source, for errors."""
    inputs: NDArray[Any]
    """(samples, …) as they came in."""
    first: int = 0
    """Number of its first sample in the source."""
    file: int = 0
    """Number of the file that it is from, if it is from one."""
    answer: Future[NDArray[Any]] = field(default_factory=Future)
    arrival: float = field(default_factory=time.perf_counter)
    """Seconds."""


class Desk:
    """Batches of several threads, which each wait for the answer to one batch, for one thread that answers."""

    def __init__(self) -> None:
        # SimpleQueue: a signal handler may put something into it.
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._waiting = 0
        self._is_closed = False
        self._change = threading.Condition()

    @contextlib.contextmanager
    def answered(self, request: Request) -> Iterator[NDArray[Any]]:
        """The outputs (samples, …), which the caller hands on within the block. Raises RepurposeError."""
        with self._change:
            if self._is_closed:
                raise ServiceEnded("the service has ended")
            self._waiting += 1
            self._requests.put(request)
        try:
            yield request.answer.result()
        finally:
            with self._change:
                self._waiting -= 1
                self._change.notify_all()

    def next(self, seconds: float) -> Request | None:
        """The next batch; None at the end. Raises queue.Empty if none comes for so long."""
        return self._requests.get(timeout=seconds)

    def end(self) -> None:
        """No batch comes after those that are there; may be called in a signal handler."""
        self._requests.put(None)

    def close(self, seconds: float) -> None:
        """Refuse what was not answered, and wait at most so long until all answers are handed on."""
        with self._change:
            self._is_closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._requests.get_nowait()
                if request is not None:
                    request.answer.set_exception(ServiceEnded("the service ended before this batch's turn"))
        with self._change:
            self._change.wait_for(lambda: self._waiting == 0, seconds)
