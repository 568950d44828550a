"""Runs native code that cannot be interrupted in a child process, which is ended at the deadline."""

from __future__ import annotations

import inspect
import pickle
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import IO, Any

from repurpose_opt.errors import RepurposeError

_LENGTH = struct.Struct("<Q")


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
    # A fresh interpreter: fork hangs after threaded native code, and spawn would run the caller's script again.
    command = [sys.executable, "-c", "from repurpose_opt.isolation import answer; answer()"]
    request = pickle.dumps((function.__module__, function.__qualname__, arguments))
    with tempfile.TemporaryFile() as complaints, tempfile.TemporaryFile() as asked:
        asked.write(request)
        asked.seek(0)
        child = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=complaints)
        answers: list[Any] = []
        reader = threading.Thread(target=_read_answers, args=(child.stdout, answers), daemon=True)
        reader.start()
        try:
            child.wait(time_limit)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return _collected(reader, answers), False
        except BaseException:
            child.kill()
            raise
        answer = _collected(reader, answers)
        if child.returncode != 0:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().split("\n")[-1]
            raise RuntimeError(f"{function.__qualname__} ended with code {child.returncode}: {said}")
        return answer, True


def _collected(reader: threading.Thread, answers: list[Any]) -> Any:
    reader.join()
    return answers[-1] if answers else None


def _read_answers(pipe: IO[bytes], answers: list[Any]) -> None:
    """Keeps the last complete answer of the child; what is cut off is left out."""
    with pipe:
        while len(head := pipe.read(_LENGTH.size)) == _LENGTH.size:
            (size,) = _LENGTH.unpack(head)
            body = pipe.read(size)
            if len(body) == size:
                answers[:] = [pickle.loads(body)]


def answer() -> None:
    """The child's side: reads one request from standard input and writes its answers to standard output."""
    from importlib import import_module
    from os import dup, dup2, fdopen

    # Native libraries print to standard output: give them standard error, and keep the pipe for the answers.
    with fdopen(dup(1), "wb") as pipe:
        dup2(2, 1)
        module, name, arguments = pickle.loads(sys.stdin.buffer.read())
        result = getattr(import_module(module), name)(*arguments)
        for found in result if inspect.isgenerator(result) else [result]:
            body = pickle.dumps(found)
            pipe.write(_LENGTH.pack(len(body)) + body)
            pipe.flush()
