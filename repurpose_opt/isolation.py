"""Runs native code that cannot be interrupted in a child process, which is ended at the deadline."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from repurpose_opt.errors import RepurposeError


class DeadlinePassed(RepurposeError):
    """The call was ended at its time limit."""


def call(function: Callable[..., Any], *arguments: Any, time_limit: float | None) -> Any:
    """function(*arguments), in this process without a time limit, else in a child that is killed after it.

    `function` is importable by name; arguments and answer are pickled between the two processes of this machine.
    Raises DeadlinePassed, or RuntimeError with the child's last line if it died.
    """
    if time_limit is None:
        return function(*arguments)
    # A fresh interpreter: fork hangs after threaded native code, and spawn would run the caller's script again.
    command = [sys.executable, "-c", "from repurpose_opt.isolation import answer; answer()"]
    request = pickle.dumps((function.__module__, function.__qualname__, arguments))
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=time_limit, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlinePassed(f"{function.__qualname__} was ended after {time_limit:.3g} s") from None
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise RuntimeError(f"{function.__qualname__} ended with code {done.returncode}: {last}")
    return pickle.loads(done.stdout)


def answer() -> None:
    """The child's side: reads one request from standard input and writes the answer to standard output."""
    from importlib import import_module
    from os import dup, dup2, fdopen

    # Native libraries print to standard output: give them standard error, and keep the pipe for the answer.
    pipe = fdopen(dup(1), "wb")
    dup2(2, 1)
    module, name, arguments = pickle.loads(sys.stdin.buffer.read())
    result = getattr(import_module(module), name)(*arguments)
    with pipe:
        pipe.write(pickle.dumps(result))
