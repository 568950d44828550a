"""Asks a server of this process for rows; one server for each thread, started when the thread's first task comes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace

from repurpose_opt.bench.environment import capped_threads
from repurpose_opt.bench.judge import Verdict
from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.bench.server import (
    BUILD_SECONDS,
    JUDGE_SECONDS,
    LOAD_SECONDS,
    Built,
    Request,
    assembled,
    read_message,
    write_message,
)
from repurpose_opt.solver import Termination

_local = threading.local()
_open: set[Slot] = set()
_lock = threading.Lock()


class Slot:
    """A server, restarted when it died. Not to be shared by threads."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as the slot
        self.server: subprocess.Popen[bytes] | None = None

    def row(self, request: Request) -> tuple[Row, bytes | None]:
        """The row of a task and the contents of its answer's file; a server that dies or hangs is a row too."""
        if self.server is None or self.server.poll() is not None:
            self.server = self._start()
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        task = request.task
        most = task.time_limit + request.grace + BUILD_SECONDS + JUDGE_SECONDS + 2 * LOAD_SECONDS
        watchdog = threading.Timer(most, self.server.kill)
        watchdog.daemon = True
        watchdog.start()
        began = time.perf_counter()
        try:
            write_message(self.server.stdin, request)
            reply = read_message(self.server.stdout)
        except (EOFError, BrokenPipeError):
            return self._lost(request), None
        finally:
            watchdog.cancel()
        overhead = time.perf_counter() - began - reply.build_seconds - (reply.row.seconds or 0.0)
        return replace(reply.row, overhead=round(overhead, 6)), reply.answer

    def close(self) -> None:
        if self.server is not None:
            for pipe in (self.server.stdin, self.server.stdout):
                assert pipe is not None
                pipe.close()
            self.server.kill()
            self.server.wait()
            self.server = None
        self.complaints.close()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", "from repurpose_opt.bench.server import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env={**os.environ, **capped_threads(self.threads)},
            start_new_session=True,  # an interrupt from the keyboard is for the one who asks
        )

    def _lost(self, request: Request) -> Row:
        """The row of a task whose server died: by an instance that could not be built, or for want of memory."""
        assert self.server is not None
        code = self.server.wait()
        self.complaints.seek(0)
        said = self.complaints.read().decode(errors="replace").strip().split("\n")[-1]
        message = f"the process that forks solves ended with code {code}: {said}"
        nothing = Built((request.task.testset, request.task.instance))
        return assembled(request, nothing, Verdict(Termination.ERROR, Failure.CRASH, message), None, None)


def row_of(request: Request) -> tuple[Row, bytes | None]:
    """The row of a task and the contents of its answer's file, by this thread's server. For any executor."""
    slot = getattr(_local, "slot", None)
    if slot is None or slot.threads != request.task.threads:
        slot = _local.slot = Slot(request.task.threads)
        with _lock:
            _open.add(slot)
    return slot.row(request)


def close_all() -> None:
    """End the servers of all threads of this process."""
    with _lock:
        while _open:
            _open.pop().close()
    _local.__dict__.clear()
