"""Runs a function in a forked process, ended with all that it started at a limit of time or memory. Linux only."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from repurpose_opt.bench.row import Failure

_POLL = 0.02
"""Seconds between two looks at the memory: what can be allocated and touched meanwhile is tens of MB."""
_DIE_WITH_PARENT, _ADOPT_ORPHANS = 1, 36  # PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER of prctl(2)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_BASELINE = struct.Struct("<Q")
_LEAST_GROWTH = 8 * 2**20
"""Bytes by which several processes must have grown to be measured anew, which takes 10 ms for each."""


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
    """Most memory of all its processes beyond what the first had when it was forked: anonymous pages, so without files
    and libraries. Sampled; where one process came to its end, exact."""


class ParentGone(Exception):
    """Nobody waits for the answer any more."""


def call(
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float,
    memory_limit: int,
    watched: int | None = None,
    private: Sequence[int] = (),
) -> Outcome:
    """function(*arguments) in a fork of this process, which should have no other threads.

    memory_limit   bytes beyond what this process has now
    watched        a file descriptor; when its other end closes, the call is ended and ParentGone is raised
    private        file descriptors of this process that the call must not keep open
    The returned value is pickled.
    """
    ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1)  # what a call leaves behind becomes a child of this process
    others = set(_children(os.getpid()))
    began = time.perf_counter()
    with tempfile.TemporaryFile() as complaints:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for descriptor in (reader, *private):
                os.close(descriptor)
            _answer(writer, complaints, function, arguments)
        os.close(writer)
        try:
            memory = _Memory(child, _first(reader))
            received, failure = _watch(memory, reader, began + seconds, memory_limit, watched)
        finally:
            os.close(reader)
            _end(child)
            _, status, usage = os.wait4(child, 0)
            _end_strays(others)
        elapsed = time.perf_counter() - began
        value, files, failure, message = _told(received, status, failure, complaints)
        peak = memory.most
        if files is not None:
            peak = max(peak, usage.ru_maxrss * 1024 - files - memory.baseline)
    if failure is not Failure.TIMEOUT and peak > memory_limit:
        failure = Failure.MEMORY
    if failure is Failure.TIMEOUT:
        message = f"ended after {elapsed:.1f} s"
    elif failure is Failure.MEMORY:
        message = message or f"ended with {peak / 2**20:,.0f} MiB; allowed: {memory_limit / 2**20:,.0f} MiB"
    return Outcome(None if failure else value, failure, message, elapsed, usage.ru_utime + usage.ru_stime, peak)


def _answer(writer: int, complaints: IO[bytes], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The child's side. Never returns."""
    status, body = 1, b""
    try:
        os.setpgid(0, 0)
        os.write(writer, _BASELINE.pack(_anonymous(os.getpid())))
        control = ctypes.CDLL(None).prctl
        control(_DIE_WITH_PARENT, signal.SIGKILL)
        control(_ADOPT_ORPHANS, 1)  # so that they count as its family
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(complaints.fileno(), 1)
        os.dup2(complaints.fileno(), 2)
        body = pickle.dumps((True, function(*arguments), _pages(os.getpid())[1]))
        status = 0
    except BaseException as error:
        with suppress(Exception):  # the backend may have closed it
            traceback.print_exc()
            sys.stderr.flush()
        reason = " ".join(str(error).split())
        body = pickle.dumps((False, (type(error).__name__, f"{type(error).__name__}: {reason}"), None))
    finally:  # a fork must not go on with what its parent was doing
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(body)
        finally:
            os._exit(status)


def _first(reader: int) -> int:
    """Bytes that the child had at its start; 0 if it died before."""
    told = os.read(reader, _BASELINE.size)
    return int(_BASELINE.unpack(told)[0]) if len(told) == _BASELINE.size else 0


class _Memory:
    """The most memory of a process and its descendants beyond its baseline, which is what this process has."""

    def __init__(self, child: int, baseline: int) -> None:
        self.child, self.baseline, self.most = child, baseline, 0
        self._measured_at = 0

    def look(self) -> None:
        """Forks share pages: with descendants, each page counts once, by proportional set sizes of all that share."""
        family = list(_family(self.child))
        sizes = [_anonymous(process) for process in family]
        self.most = max(self.most, sizes[0] - self.baseline)
        if len(family) > 1 and sum(sizes) > self._measured_at + max(_LEAST_GROWTH, self.most // 16):
            self._measured_at = sum(sizes)
            self.most = max(self.most, sum(map(_proportional, (os.getpid(), *family))) - self.baseline)


def _watch(
    memory: _Memory, reader: int, deadline: float, memory_limit: int, watched: int | None
) -> tuple[bytes, Failure | None]:
    """(what the child sent, why it must be ended)."""
    received = bytearray()
    ended = os.pidfd_open(memory.child)
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
            elif ended in ready:
                return bytes(received), None
            if watched in ready:
                raise ParentGone
            memory.look()
            if max(memory.most, len(received)) > memory_limit:
                return bytes(received), Failure.MEMORY
            if time.perf_counter() > deadline:
                return bytes(received), Failure.TIMEOUT
    finally:
        os.close(ended)


def _told(
    received: bytes, status: int, failure: Failure | None, complaints: IO[bytes]
) -> tuple[Any, int | None, Failure | None, str]:
    """(value, bytes of files in its memory at the end, failure, message) of what the child sent and how it ended."""
    if failure is not None:
        return None, None, failure, ""
    code = os.waitstatus_to_exitcode(status)
    try:
        is_value, told, files = pickle.loads(received)
    except Exception:  # cut off, or never written
        complaints.seek(0)
        said = complaints.read().decode(errors="replace").strip().split("\n")[-1]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return None, None, Failure.CRASH, f"{how}: {said}" if said else how
    if is_value:
        return told, files, None, ""
    kind, message = told
    return None, None, Failure.MEMORY if kind == "MemoryError" else Failure.EXCEPTION, message


def _end(child: int) -> None:
    """End the process, not yet waited for, its descendants, and all of its group, which outlive it otherwise."""
    for process in reversed([*_family(child)]):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it had no time to make its group
        os.killpg(child, signal.SIGKILL)


def _end_strays(others: set[int]) -> None:
    """End what a process that has ended left behind, in whatever session: all new children of this process."""
    while strays := set(_children(os.getpid())) - others:
        for stray in strays:
            _end(stray)
            with suppress(ChildProcessError):
                os.waitpid(stray, 0)


def _family(child: int) -> Iterator[int]:
    """The process and its descendants."""
    yield child
    for grandchild in _children(child):
        yield from _family(grandchild)


def _children(process: int) -> list[int]:
    """Empty for a process that has ended."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{task}/children") as children:
                found += map(int, children.read().split())
    return found


def _proportional(process: int) -> int:
    """Bytes of anonymous pages, of those that n processes share an nth; 0 for a process that has ended."""
    try:
        with open(f"/proc/{process}/smaps_rollup") as sizes:
            return next(int(line.split()[1]) for line in sizes if line.startswith("Pss_Anon:")) * 1024
    except (OSError, StopIteration):
        return 0


def _anonymous(process: int) -> int:
    """Bytes of anonymous pages in memory; 0 for a process that has ended."""
    resident, files = _pages(process)
    return resident - files


def _pages(process: int) -> tuple[int, int]:
    """Bytes in memory, and how many of them are of files and shared memory."""
    try:
        with open(f"/proc/{process}/statm") as counts:
            _, resident, files, *_ = counts.read().split()
    except (OSError, ValueError):
        return 0, 0
    return int(resident) * _PAGE, int(files) * _PAGE
