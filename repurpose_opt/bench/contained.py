"""Runs a function in a forked process, ended with all that it started at a limit of time or memory. Linux only."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from repurpose_opt.bench.row import Failure

_POLL = 0.02
"""Seconds between two looks at the memory: what can be allocated and touched meanwhile is tens of MB."""
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    value: Any
    """What the function returned; None with a failure."""
    failure: Failure | None
    """TIMEOUT, MEMORY, CRASH (it died) or EXCEPTION (it raised)."""
    message: str
    seconds: float
    """From the fork to the end."""
    cpu_seconds: float
    """Of the process and those that it started and waited for."""
    peak_bytes: int
    """Most resident memory of all its processes, without what the first had when it was forked. Sampled; for the
    first process exact."""


class ParentGone(Exception):
    """Nobody waits for the answer any more."""


def call(
    function: Callable[..., Any], *arguments: Any, seconds: float, memory_limit: int, watched: int | None = None
) -> Outcome:
    """function(*arguments) in a fork of this process, which should have no other threads.

    memory_limit   bytes beyond what this process has now
    watched        a file descriptor; when its other end closes, the call is ended and ParentGone is raised
    The returned value is pickled.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile() as complaints:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _answer(writer, complaints, function, arguments)
        os.close(writer)
        try:
            received, failure, sampled, baseline = _watch(child, reader, began + seconds, memory_limit, watched)
        finally:
            os.close(reader)
            _end(child)
            _, status, usage = os.wait4(child, 0)
        elapsed = time.perf_counter() - began
        peak = max(sampled, usage.ru_maxrss * 1024 - baseline, 0)
        value, failure, message = _told(received, status, failure, complaints)
    if failure is not Failure.TIMEOUT and peak > memory_limit:
        failure = Failure.MEMORY
    if failure is Failure.TIMEOUT:
        message = f"ended after {elapsed:.1f} s"
    elif failure is Failure.MEMORY:
        message = message or f"ended with {peak / 2**20:,.0f} MiB; allowed: {memory_limit / 2**20:,.0f} MiB"
    return Outcome(None if failure else value, failure, message, elapsed, usage.ru_utime + usage.ru_stime, peak)


def _answer(writer: int, complaints: IO[bytes], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child's side. Never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        control = ctypes.CDLL(None).prctl
        control(_DIE_WITH_PARENT, signal.SIGKILL)
        control(_ADOPT_ORPHANS, 1)  # so that they count as its family
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(complaints.fileno(), 1)
        os.dup2(complaints.fileno(), 2)
        body = pickle.dumps((True, function(*arguments)))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        reason = " ".join(str(error).split())
        body = pickle.dumps((False, (type(error).__name__, f"{type(error).__name__}: {reason}")))
    try:
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(body)
    finally:
        os._exit(status)


def _watch(
    child: int, reader: int, deadline: float, memory_limit: int, watched: int | None
) -> tuple[bytes, Failure | None, int, int]:
    """(what the child sent, why it must be ended, most memory seen, its memory at the start)."""
    received = bytearray()
    baseline, most = _resident(child), 0
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(reader, select.POLLIN)
    if watched is not None:
        poll.register(watched, 0)  # reports a hang-up only
    try:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(_POLL * 1000)}
            if reader in ready:
                data = os.read(reader, 1 << 20)
                received += data
                if not data:
                    poll.unregister(reader)
                continue
            if ended in ready:
                return bytes(received), None, most, baseline
            if watched in ready:
                raise ParentGone
            most = max(most, sum(map(_resident, _family(child))) - baseline)
            if most > memory_limit:
                return bytes(received), Failure.MEMORY, most, baseline
            if time.perf_counter() > deadline:
                return bytes(received), Failure.TIMEOUT, most, baseline
    finally:
        os.close(ended)


def _told(
    received: bytes, status: int, failure: Failure | None, complaints: IO[bytes]
) -> tuple[Any, Failure | None, str]:
    """(value, failure, message) of what the child sent and how it ended."""
    if failure is not None:
        return None, failure, ""
    code = os.waitstatus_to_exitcode(status)
    try:
        is_value, told = pickle.loads(received)
    except Exception:  # cut off, or never written
        complaints.seek(0)
        said = complaints.read().decode(errors="replace").strip().split("\n")[-1]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return None, Failure.CRASH, f"{how}: {said}" if said else how
    if is_value:
        return told, None, ""
    kind, message = told
    return None, Failure.MEMORY if kind == "MemoryError" else Failure.EXCEPTION, message


def _end(child: int) -> None:
    """End the process, not yet waited for, its descendants, and all of its group, which outlive it otherwise."""
    for process in reversed([*_family(child)]):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it had no time to make its group
        os.killpg(child, signal.SIGKILL)


def _family(child: int) -> Iterator[int]:
    """The process and its descendants."""
    yield child
    try:
        for task in os.listdir(f"/proc/{child}/task"):
            with open(f"/proc/{child}/task/{task}/children") as children:
                for grandchild in children.read().split():
                    yield from _family(int(grandchild))
    except OSError:  # it ended meanwhile
        return


def _resident(process: int) -> int:
    """Bytes in memory; 0 for a process that has ended."""
    try:
        with open(f"/proc/{process}/statm") as counts:
            return int(counts.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
