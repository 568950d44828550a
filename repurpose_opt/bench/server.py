"""A process that has the backends loaded and forks one more for each instance, each solve and each judgement.

`main` reads pickled `Request`s from standard input and writes a `Reply` to each.
"""

from __future__ import annotations

import gc
import os
import pickle
import struct
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from typing import IO, Any

from repurpose_opt.bench.answer import Answer
from repurpose_opt.bench.contained import Outcome, ParentGone, call
from repurpose_opt.bench.fingerprint import fingerprint
from repurpose_opt.bench.judge import Verdict, judge
from repurpose_opt.bench.row import SCHEMA, Failure, Row, Task
from repurpose_opt.bench.solving import modules_of, solve_task
from repurpose_opt.bench.testsets import test_set
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Termination

LENGTH = struct.Struct("<Q")
BUILD_SECONDS, JUDGE_SECONDS, LOAD_SECONDS = 600.0, 300.0, 60.0
"""Most that building an instance, judging an answer and a first tiny solve may take."""
_DECIMALS = 6
"""Of seconds."""
_ROOM = 16 * 2**30
"""Bytes for building and judging; the limit of a task is for its solve."""


@dataclass(frozen=True)
class Request:
    task: Task
    memory_limit: int
    """Bytes of the solve."""
    relative_gap: float
    grace: float
    """Seconds beyond its time limit after which a solve is ended."""


@dataclass(frozen=True)
class Reply:
    row: Row
    """`overhead` is left to the one who asked."""
    answer: bytes | None
    """Contents of the answer's file."""
    build_seconds: float
    """For the instance and for what the solver loads, where they were not there yet."""


@dataclass(frozen=True, eq=False)
class Built:
    """An instance, or why there is none."""

    key: tuple[str, str]
    problem: LayerProblem | None = None
    formulation: Formulation | None = None
    fingerprint: str = ""
    kind: str = ""
    judge_once: bool = False
    failure: str = ""
    """Why there is no problem."""


class _Server:
    def __init__(self, requests: int, replies: int) -> None:
        self.pipes = (requests, replies)
        self.built: Built | None = None  # the last one: its solves follow each other
        self.loaded: set[str] = set()

    def reply(self, request: Request) -> Reply:
        began = time.perf_counter()
        task = request.task
        self._load(task.solver)
        built = self._instance(task)
        prepared = time.perf_counter() - began
        if built.problem is None or built.formulation is None:
            verdict = Verdict(Termination.ERROR, Failure.INSTANCE, built.failure)
            return Reply(assembled(request, built, verdict, None, None), None, prepared)
        solved = self._call(
            solve_task, built.problem, built.formulation, task, request.relative_gap,
            seconds=task.time_limit + request.grace, memory_limit=request.memory_limit,
        )  # fmt: skip
        if solved.failure is not None:
            termination = Termination.TIME_LIMIT if solved.failure is Failure.TIMEOUT else Termination.ERROR
            verdict = Verdict(str(termination), solved.failure, solved.message)
            return Reply(assembled(request, built, verdict, solved, None), None, prepared)
        verdict, answer = self._judged(built.problem, built.formulation, solved.value, request.relative_gap)
        row = assembled(request, built, verdict, solved, answer)
        return Reply(row, solved.value if row.has_answer else None, prepared)

    def _judged(
        self, problem: LayerProblem, formulation: Formulation, data: bytes, relative_gap: float
    ) -> tuple[Verdict, Answer | None]:
        try:
            answer = Answer.of_bytes(data, problem)
        except ValueError as error:
            return Verdict(Termination.ERROR, Failure.INVALID, str(error)), None
        if answer.owner is None:
            return judge(problem, formulation, answer, relative_gap), answer
        judged = self._call(
            judge, problem, formulation, answer, relative_gap, seconds=JUDGE_SECONDS, memory_limit=_ROOM
        )
        if judged.failure is not None:
            message = f"the answer cannot be judged: {judged.message}"
            return Verdict(Termination.ERROR, Failure.INVALID, message, answer.claims.refused), answer
        return judged.value, answer

    def _call(self, function: Any, *arguments: Any, seconds: float, memory_limit: int) -> Outcome:
        return call(
            function,
            *arguments,
            seconds=seconds,
            memory_limit=memory_limit,
            watched=self.pipes[0],
            private=self.pipes,
        )

    def _load(self, solver: str) -> None:
        """Import here what solving with it imports, so that forks have it; a solver that fails at that is not spared
        its own imports."""
        if solver in self.loaded:
            return
        self.loaded.add(solver)
        found = self._call(modules_of, solver, seconds=LOAD_SECONDS, memory_limit=_ROOM)
        for name in found.value or ():
            try:
                import_module(name)
            except Exception:  # some modules only load as a part of others
                continue
        gc.collect()
        gc.freeze()  # so that the collector of a fork does not copy what they share

    def _instance(self, task: Task) -> Built:
        key = (task.testset, task.instance)
        if self.built is None or self.built.key != key:
            self.built = None  # its memory goes first
            built = self._call(_build, *key, seconds=BUILD_SECONDS, memory_limit=_ROOM)
            if built.failure is None:
                problem, formulation, digest, kind, judge_once = built.value
                self.built = Built(key, problem, formulation, digest, kind, judge_once)
            else:
                self.built = Built(key, failure=built.message)
        return self.built


def _build(testset: str, name: str) -> tuple[LayerProblem, Formulation, str, str, bool]:
    instance = next(found for found in test_set(testset) if found.name == name)
    problem, formulation = instance.build()
    return problem, formulation, fingerprint(problem, formulation), instance.kind, instance.judge_once


def assembled(request: Request, built: Built, verdict: Verdict, solved: Outcome | None, answer: Answer | None) -> Row:
    """The row of what was asked, built, solved and judged."""
    task, problem, claims = request.task, built.problem, None if answer is None else answer.claims
    timed = solved if claims is None else claims
    return Row(
        testset=task.testset,
        instance=task.instance,
        solver=task.solver,
        seed=task.seed,
        time_limit=task.time_limit,
        threads=task.threads,
        memory_limit=request.memory_limit,
        schema=SCHEMA,
        fingerprint=built.fingerprint,
        kind=built.kind,
        judge_once=built.judge_once,
        formulation="" if built.formulation is None else built.formulation.name,
        m=None if problem is None else problem.m,
        n=None if problem is None else problem.n,
        P=None if problem is None else problem.P,
        nonzeros=None if problem is None else _nonzeros(problem),
        termination=verdict.termination,
        failure=verdict.failure,
        message=verdict.message,
        refused=verdict.refused,
        objective=verdict.objective,
        bound=verdict.bound,
        surrogate_bound=verdict.surrogate_bound,
        nmse=verdict.nmse,
        volume=verdict.volume,
        direct_volume=None if problem is None else problem.direct_volume,
        busiest=verdict.busiest,
        seconds=None if timed is None else round(timed.seconds, _DECIMALS),
        cpu_seconds=None if timed is None else round(timed.cpu_seconds, _DECIMALS),
        peak_bytes=None if solved is None else solved.peak_bytes,
        overhead=None,
        trajectory=() if claims is None or verdict.objective is None else claims.trajectory,
        has_answer=answer is not None and answer.owner is not None,
    )


def _nonzeros(problem: LayerProblem) -> int:
    return int(problem.weight.nnz if problem.is_sparse else (problem.weight != 0).sum())


def read_message(pipe: IO[bytes]) -> Any:
    """The next pickled message. Raises EOFError where the other side has gone."""
    head = pipe.read(LENGTH.size)
    body = pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
    if not body:
        raise EOFError
    return pickle.loads(body)


def write_message(pipe: IO[bytes], message: Any) -> None:
    body = pickle.dumps(message)
    pipe.write(LENGTH.pack(len(body)) + body)
    pipe.flush()


def main() -> None:
    # Libraries print to standard output: give them standard error, and keep the pipes for messages.
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    server = _Server(requests.fileno(), replies.fileno())
    while True:
        try:
            write_message(replies, server.reply(read_message(requests)))
        except (EOFError, ParentGone, BrokenPipeError, KeyboardInterrupt):
            sys.stdout.flush()
            os._exit(0)
