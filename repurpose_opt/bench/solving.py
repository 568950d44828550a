"""Solves one task and tells what came of it. Only the solve is timed."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

from repurpose_opt import registry
from repurpose_opt.bench.answer import Answer, Claims
from repurpose_opt.bench.row import Task
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solution import LayerSolution
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions, Termination

_MOST_STEPS = 24
"""Of a trajectory that are kept."""
_TINY_SECONDS = 0.2
"""Time limit of the tiny problems: what they import counts, not their answers."""


def solve_task(problem: LayerProblem, formulation: Formulation, task: Task, relative_gap: float) -> bytes:
    """The answer to a task, as `Answer.of_bytes` reads it."""
    options = SolveOptions(task.time_limit, task.seed, task.threads, relative_gap)
    cpu, began = _cpu_seconds(), time.perf_counter()
    try:
        solution = solve_problem(problem, formulation, options, partitioner=task.partitioner, pruner=task.pruner)
    except Exception as error:  # whatever a backend raises is a row
        seconds, spent = time.perf_counter() - began, _cpu_seconds() - cpu
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raised = type(error).__name__
        claims = Claims(Termination.ERROR, message, None, None, None, (), raised, seconds, spent, ())
        return Answer(claims, None, None).to_bytes()
    seconds, spent = time.perf_counter() - began, _cpu_seconds() - cpu
    return Answer(_claims(solution, seconds, spent), solution.owner, solution.exchange).to_bytes()


def _claims(solution: LayerSolution, seconds: float, cpu_seconds: float) -> Claims:
    traceback = solution.stats.get("traceback") if solution.owner is None else None
    return Claims(
        termination=str(solution.termination),
        message=" ".join(solution.message.split()),
        objective=None if solution.owner is None else solution.objective,
        bound=_number(solution.bound),
        surrogate_bound=_number(solution.surrogate_bound),
        refused=tuple(map(str, solution.stats.get("refused_claims", ()))),
        raised=None if traceback is None else traceback.strip().split("\n")[-1].partition(":")[0],
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        trajectory=_thinned([(float(at), float(cost)) for at, cost in solution.stats.get("trajectory", ())]),
    )


def _thinned(steps: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most so many of them that a row stays short: the first, the last, and others evenly by their number."""
    if len(steps) <= _MOST_STEPS:
        return tuple(steps)
    return tuple(steps[position * (len(steps) - 1) // (_MOST_STEPS - 1)] for position in range(_MOST_STEPS))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _cpu_seconds() -> float:
    """Of this process and those that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def modules_of(solver: str) -> list[str]:
    """What solving tiny problems with it imports: `server` has it loaded before it solves real ones."""
    before = set(sys.modules)
    task = Task("", "", solver, 0, _TINY_SECONDS)
    for kind, chain in (("partitioners", task.partitioner), ("pruners", task.pruner)):
        for stage in chain.split("+"):
            name = stage.partition("@")[0]
            if name != "auto":
                for package in registry.load(kind, name).requires:
                    __import__(package)
    for problem, formulation in _tiny():
        solve_task(problem, formulation, task, 1e-6)
    return [name for name in sys.modules if name not in before]


def _tiny() -> list[tuple[LayerProblem, Formulation]]:
    weight = [[1.0, 0.0, 0.5, 2.0], [0.0, 1.0, 0.5, 0.25], [2.0, 0.0, 0.0, 1.0], [0.5, 0.0, 1.0, 0.0]]
    second = [[2.0, 0.5, 0.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.2], [0.0, 0.0, 0.2, 3.0]]
    problem = LayerProblem.create(weight, 2, value_bytes=1)
    correlated = LayerProblem.create(weight, 2, value_bytes=1, moments=Moments.from_raw(second))
    return [
        (problem, Lossless()),
        (problem, Edge(transfer_price=0.3)),
        (correlated, Volume(budget=0.5)),
        (correlated, Volume(budget=0.5, messages="codes")),
    ]
