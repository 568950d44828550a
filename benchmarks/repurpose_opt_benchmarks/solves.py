"""Solves of named instances, each on one core, several at a time; a row a solve, written at once and resumable."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from repurpose_opt import SolveOptions, registry
from repurpose_opt.bench.testset import Instance
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import registered
from repurpose_opt_benchmarks import ONE_THREAD
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
    done = {} if log is None or not log.exists() else {_key(row): row for row in map(json.loads, log.open())}
    left = [solve for solve in solves if _key(asdict(solve)) not in done]
    os.environ.update(ONE_THREAD)  # for the processes: the libraries read it when they load
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(row_of, solve) for solve in left]
        console = Console(stderr=True)
        finished = as_completed(waiting)
        try:
            for future in track(finished, "solves", len(waiting), console=console, disable=not console.is_terminal):
                row = future.result()
                done[_key(row)] = row
                if log is not None:
                    with log.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done[_key(asdict(solve))] for solve in solves]


def row_of(solve: Solve) -> dict[str, Any]:
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
        **asdict(solve),
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


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in Solve.__dataclass_fields__)
