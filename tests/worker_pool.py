"""Processes that run workers of plans, one run after the other: torch takes long to import.

Run as a script, this file is one of those processes. What is done to a worker within, `sabotage`, is really done: the
process kills or suspends itself in the middle of a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from repurpose_opt.runtime.exchange import ExchangeStep
from repurpose_opt.runtime.processes import members, worker
from repurpose_opt.runtime.processes.console import ERROR_PREFIX
from repurpose_opt.runtime.processes.launch import loopback

SECONDS = 90.0
"""After so long a run has failed and all processes are killed."""
CALL = 5
"""The exchange in which a worker is sabotaged."""
LATER = 1.0
"""Seconds from the start of a run after which "kill later" and "terminate later" happen."""


@dataclass(frozen=True)
class End:
    """How one worker ended."""

    process: int
    code: int
    """The worker's exit code; the process's own, if the process has ended too."""
    has_died: bool
    """Whether the process has ended."""
    printed: list[str]
    """On standard error, if the process lives."""


@dataclass(frozen=True)
class Ends:
    """How all workers of a run ended."""

    ranks: Mapping[int, End]

    @property
    def codes(self) -> list[int]:
        return [end.code for _, end in sorted(self.ranks.items())]

    @property
    def errors(self) -> list[str]:
        """All error lines, without what they all begin with."""
        lines = [line for end in self.ranks.values() for line in end.printed]
        return [line.removeprefix(ERROR_PREFIX) for line in lines if line.startswith(ERROR_PREFIX)]

    @property
    def printed(self) -> list[str]:
        return [line for _, end in sorted(self.ranks.items()) for line in end.printed]


class WorkerPool:
    """So many processes; some may die."""

    def __init__(self, size: int) -> None:
        # PyTorch's store asks for the name of each address: a name server that is silent must not cost 10 seconds.
        quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "RES_OPTIONS": "timeout:1 attempts:1"}
        self._environment = os.environ | quiet | loopback()
        self._all: list[subprocess.Popen[str]] = []
        self._idle = [self._started() for _ in range(size)]

    def run(
        self,
        size: int,
        arguments: Sequence[str],
        *,
        ranks: Sequence[int] | None = None,
        sabotage: Mapping[int, str] | None = None,
        of_rank: Mapping[int, Sequence[str]] | None = None,
        port: int | None = None,
        stdin: Path | None = None,
        stdout: Path | None = None,
    ) -> Ends:
        """Workers of a run of `size`, by default all of them.

        `of_rank`: other arguments for some. `stdin` and `stdout` are worker 0's; the latter is appended to.
        """
        port = port or free_port()
        ranks = range(size) if ranks is None else ranks
        processes = {rank: self._idle.pop(0) if self._idle else self._started() for rank in ranks}
        watchdog = threading.Timer(SECONDS, _kill, [list(processes.values())])
        watchdog.start()
        try:
            for rank, process in processes.items():
                task = {
                    "arguments": list((of_rank or {}).get(rank, arguments)),
                    "sabotage": (sabotage or {}).get(rank),
                    "environment": {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_PORT": str(port)},
                    "stdin": None if stdin is None or rank else str(stdin),
                    "stdout": None if stdout is None or rank else str(stdout),
                }
                assert process.stdin is not None
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
            return Ends({rank: self._end(process) for rank, process in processes.items()})
        finally:
            watchdog.cancel()

    def _started(self) -> subprocess.Popen[str]:
        command = [sys.executable, __file__]
        process = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._all.append(process)
        return process

    def _end(self, process: subprocess.Popen[str]) -> End:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            return End(process.pid, process.wait(), True, [])
        self._idle.append(process)
        return End(process.pid, **json.loads(line), has_died=False)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _kill(self._all)
        for process in self._all:
            process.communicate()


def _kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What a process does


def _itself(number: signal.Signals) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), number)


ACTS: dict[str, Callable[[], object]] = {
    "kill": _itself(signal.SIGKILL),
    "suspend": _itself(signal.SIGSTOP),
    "terminate": _itself(signal.SIGTERM),
    "hang": lambda: time.sleep(600),
}


@contextlib.contextmanager
def _sabotaged(kind: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if kind == "version":
            patch.setattr(members, "__version__", "0.0.7")
        elif kind in ("kill later", "terminate later"):
            threading.Timer(LATER, ACTS[kind.split()[0]]).start()
        elif kind is not None:
            patch.setattr(ExchangeStep, "begin", _at_call(CALL, ExchangeStep.begin, ACTS[kind]))
        yield


def _at_call(number: int, begin: Any, act: Callable[[], object]) -> Any:
    calls = []

    def acting(step: ExchangeStep, *arguments: Any) -> Any:
        calls.append(step)
        if len(calls) == number:
            act()
        return begin(step, *arguments)

    return acting


def _task(task: Mapping[str, Any]) -> dict[str, Any]:
    os.environ |= task["environment"] | {"MASTER_ADDR": "127.0.0.1"}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, mode in (("stdin", "r"), ("stdout", "a")):
            if task[name] is not None:
                patch.setattr(sys, name, stack.enter_context(open(task[name], mode)))
        stderr = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(_sabotaged(task["sabotage"]))
        code = worker.main(task["arguments"])
    return {"code": code, "printed": stderr.getvalue().splitlines()}


def _work() -> None:
    answers = sys.stdout
    for line in sys.stdin:
        answers.write(json.dumps(_task(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    _work()
