"""Runs native code that cannot be interrupted in a child process, which is ended at the deadline."""

from __future__ import annotations

import inspect
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any, Protocol

from repurpose_opt.errors import RepurposeError

_LENGTH = struct.Struct("<Q")
_SHORTEST_PAUSE, _LONGEST_PAUSE = 5e-4, 0.02
"""Seconds between two looks at a fork, longer and longer."""
_END = _LENGTH.pack(0)
_LAST_SECONDS = 3.0
"""Most that is read after a child was ended: processes that it started may keep its pipe open."""


class DeadlinePassed(RepurposeError):
    """The call was ended at its time limit, before it had an answer."""


def call(function: Callable[..., Any], *arguments: Any, time_limit: float | None) -> Any:
    """function(*arguments), in this process without a time limit, else in a child that is killed after it.

    `function` is importable by name; arguments and answer are pickled between the two processes of this machine.
    Raises DeadlinePassed, or RuntimeError with the child's last line if it died.
    """
    if time_limit is None:
        return function(*arguments)
    answer, is_finished = _answer_of_child(function, arguments, time_limit)
    if not is_finished:
        raise DeadlinePassed(f"{function.__qualname__} was ended after {time_limit:.3g} s")
    return answer


def last(function: Callable[..., Any], *arguments: Any, time_limit: float | None) -> tuple[Any, bool]:
    """The last answer that a generator function yields within the time limit, and whether it came to its end.

    Otherwise as `call`. Raises DeadlinePassed if there was no answer at all, RuntimeError if the child died.
    """
    if time_limit is None:
        answer = None
        for answer in function(*arguments):  # noqa: B007
            pass
        return answer, True
    answer, is_finished = _answer_of_child(function, arguments, time_limit)
    if answer is None and not is_finished:
        raise DeadlinePassed(f"{function.__qualname__} had no answer after {time_limit:.3g} s")
    return answer, is_finished


def _answer_of_child(function: Callable[..., Any], arguments: tuple[Any, ...], time_limit: float) -> tuple[Any, bool]:
    """(last answer or None, whether the child came to its end)."""
    start = _forked if _is_safe_to_fork() else _fresh
    with tempfile.TemporaryFile() as complaints:
        child, pipe = start(function, arguments, complaints)
        answers: list[Any] = []
        reader = threading.Thread(target=_read_answers, args=(pipe, answers), daemon=True)
        reader.start()
        try:
            code = child.wait(time_limit)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return _collected(reader, answers, _LAST_SECONDS), False
        except BaseException:
            child.kill()
            child.wait()
            raise
        # One that came to its end has said so, and the reader with it.
        answer = _collected(reader, answers, None if code == 0 else _LAST_SECONDS)
        if code != 0:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().split("\n")[-1]
            raise RuntimeError(f"{function.__qualname__} ended with code {code}: {said}")
        return answer, True


class _Child(Protocol):
    """The part of `subprocess.Popen` that is needed."""

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def _is_safe_to_fork() -> bool:
    """Whether this process has one thread. Libraries that have started others leave forks with locks that nobody opens.

    A fork has everything loaded: it starts in some milliseconds, a fresh interpreter with NumPy and a solver in half a
    second or more.
    """
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:  # not Linux
        return False


def _forked(
    function: Callable[..., Any], arguments: tuple[Any, ...], complaints: IO[bytes]
) -> tuple[_Child, IO[bytes]]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            _write_answers(function, arguments, writer, complaints.fileno())
            code = 0
        except BaseException:  # a fork must not go on with what its parent was doing
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(writer)
    return _Fork(child), os.fdopen(reader, "rb")


class _Fork:
    """A forked process, as `subprocess.Popen` would show it."""

    def __init__(self, process: int) -> None:
        self.process = process

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        pause = _SHORTEST_PAUSE
        while end is not None and os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            left = end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(str(self.process), timeout or 0.0)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)


def _fresh(function: Callable[..., Any], arguments: tuple[Any, ...], complaints: IO[bytes]) -> tuple[_Child, IO[bytes]]:
    # multiprocessing's spawn would run the caller's script again.
    command = [sys.executable, "-c", "from repurpose_opt.isolation import answer; answer()"]
    with tempfile.TemporaryFile() as asked:
        asked.write(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        asked.seek(0)
        child = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=complaints)
    assert child.stdout is not None
    return child, child.stdout


def _collected(reader: threading.Thread, answers: list[Any], most_seconds: float | None) -> Any:
    reader.join(most_seconds)
    # The thread is still listed for a moment after it ended, and the next call would not fork.
    while not reader.is_alive() and os.path.exists(f"/proc/self/task/{reader.native_id}"):
        time.sleep(0)
    return answers[-1] if answers else None


def _read_answers(pipe: IO[bytes], answers: list[Any]) -> None:
    """Keeps the last complete answer of the child; what is cut off is left out."""
    with pipe:
        while len(head := pipe.read(_LENGTH.size)) == _LENGTH.size:
            if head == _END:
                return
            (size,) = _LENGTH.unpack(head)
            body = pipe.read(size)
            if len(body) == size:
                answers[:] = [pickle.loads(body)]


def answer() -> None:
    """A fresh interpreter's side: reads one request from standard input and writes its answers to standard output."""
    module, name, arguments = pickle.loads(sys.stdin.buffer.read())
    _write_answers(getattr(import_module(module), name), arguments, os.dup(1), 2)


def _write_answers(function: Callable[..., Any], arguments: tuple[Any, ...], writer: int, complaints: int) -> None:
    """Native libraries print to standard output: what they print goes to `complaints`, and only answers to `writer`."""
    os.dup2(complaints, 1)
    os.dup2(complaints, 2)
    with os.fdopen(writer, "wb") as pipe:
        result = function(*arguments)
        for found in result if inspect.isgenerator(result) else [result]:
            body = pickle.dumps(found)
            pipe.write(_LENGTH.pack(len(body)) + body)
            pipe.flush()
        pipe.write(_END)
