"""Asking a service for answers from Python."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.runtime.processes.feed import is_port
from repurpose_opt.runtime.processes.stream import DamagedStream, Npy

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two attempts to connect; doubled each time."""


class Client:
    """One connection to the address on which `repurpose-opt worker PLAN --serve --listen ADDRESS` listens.

    Where it breaks, because a worker ended and torchrun starts all of them again, the batch is sent anew: it may be
    computed twice, and is answered once. Not for several threads at once: each needs a client of its own.
    """

    def __init__(self, address: object, *, timeout: float = 300.0) -> None:
        """`address` is HOST:PORT or a path; `timeout` in seconds, for one answer, connecting included."""
        if not timeout > 0:
            raise InvalidArgument("timeout", timeout, "seconds > 0")
        self._address, self._timeout = str(address), timeout
        self._connection: socket.socket | None = None

    def answer(self, batch: NDArray[Any], check: Callable[[], object] = bool) -> NDArray[Any]:
        """The outputs (samples, …) for a batch (samples, *input_shape).

        `check` is called before each attempt to connect. Raises RepurposeError where the plan cannot take the batch,
        with the service's own line, or no answer comes within the timeout.
        """
        deadline = time.monotonic() + self._timeout
        pause = FIRST_PAUSE
        while True:
            try:
                return _answer(self._connected(deadline, check), batch)
            except (OSError, EOFError) as error:
                self.close()
                if time.monotonic() + pause > deadline:
                    raise RepurposeError(
                        f"{self._address}: no answer within {self._timeout:g} seconds ({error})"
                    ) from None
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _connected(self, deadline: float, check: Callable[[], object]) -> socket.socket:
        """A connection whose calls wait until the deadline at most. Raises OSError."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        if self._connection is None:
            check()
            if is_port(self._address):
                host, _, port = self._address.rpartition(":")
                self._connection = socket.create_connection((host, int(port)), remaining)
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                self._connection = socket.socket(socket.AF_UNIX)
                self._connection.settimeout(remaining)
                self._connection.connect(self._address)
        self._connection.settimeout(remaining)
        return self._connection


def _answer(connection: socket.socket, batch: NDArray[Any]) -> NDArray[Any]:
    """Raises OSError or EOFError where the connection breaks."""
    with contextlib.closing(connection.makefile("wb")) as writer:
        Npy().write(cast(BinaryIO, writer), np.asarray(batch))
    with contextlib.closing(connection.makefile("rb")) as reader:
        try:
            answer = Npy().read(reader)
        except DamagedStream as error:
            raise EOFError(str(error)) from None
    if answer is None:
        raise EOFError("the service closed the connection")
    if answer.dtype.kind == "U":
        raise RepurposeError(str(answer))
    return answer
