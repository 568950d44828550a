"""Solves of named instances, each on one core, several at a time; a row a solve, written at once and resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from repurpose_opt import SolveOptions, registry
from repurpose_opt.bench.testset import Instance
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import registered
from repurpose_opt_benchmarks import tasks
from repurpose_opt_solvers.mt_kahypar_ import MtKaHyPar

PEERS = {"mt-kahypar, repeats only": MtKaHyPar(("DETERMINISTIC",), cycles=0)}
"""Backends that are set up otherwise than the registered one."""


@dataclass(frozen=True)
class Solve:
    """What to solve and how; the key of a row."""

    testset: str
    instance: str
    solver: str
    seed: int
    time_limit: float | None


def run(solves: Sequence[Solve], jobs: int, log: Path | None) -> list[dict[str, Any]]:
    """The rows of all solves, in their order; those in the log (JSON lines) are not solved again."""
    return tasks.run(solves, figures, jobs, log, "solves")


def figures(solve: Solve) -> dict[str, Any]:
    """The verified figures of one solve."""
    instance = _instances(solve.testset)[solve.instance]
    options = SolveOptions(time_limit=solve.time_limit, seed=solve.seed)
    with ExitStack() as stack:
        name = solve.solver
        if name in PEERS:
            name = stack.enter_context(registered("partitioners", PEERS[name]))
        began = time.perf_counter()
        solution = solve_problem(instance.problem, instance.formulation, options, partitioner=name)
        seconds = time.perf_counter() - began
    solved = solution.owner is not None
    return {
        "kind": instance.kind,
        "termination": str(solution.termination),
        "objective": solution.objective if solved else None,
        "volume": solution.volume if solved else None,
        "bound": solution.bound,
        "violations": list(solution.violations) if solved else [],
        "message": solution.message,
        "seconds": seconds,
        "stages": [
            {key: stage.get(key) for key in ("stage", "seconds", "objective")} for stage in solution.stats["stages"]
        ],
    }


def instances(testset: str) -> Iterator[Instance]:
    return iter(registry.load("testsets", testset)())


@cache
def _instances(testset: str) -> dict[str, Instance]:
    return {instance.name: instance for instance in instances(testset)}
