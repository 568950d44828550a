"""Lossless placement of 16,384 neurons with 16,384 inputs and 1 % nonzeros on 64 workers: `auto` against METIS.

Each solve runs in a process of its own with one thread; METIS has no time limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from repurpose_opt import LayerProblem, Lossless, SolveOptions
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.placement import PACKAGES
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

KINDS = ("random", "planted")
SOLVERS = ("auto", "metis")
WORKERS, DENSITY, AT_HOME = 64, 0.01, 0.65
_MOST_SECONDS, _MOST_GIB = 60.0, 8.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks large", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=50.0, metavar="S", help="of auto (default 50)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 … N−1 (default 5)")
    parser.add_argument("--quick", action="store_true", help="2,048 neurons, one seed, 5 s; writes no results")
    parser.add_argument("--output", type=Path, help="folder for large.json and large.md")
    args = parser.parse_args(argv)
    n, seeds, limit = (2048, 1, 5.0) if args.quick else (16384, args.seeds, args.time_limit)
    rows = [
        measure_alone(kind, n, solver, seed, limit if solver == "auto" else None)
        for seed in range(seeds)
        for kind in KINDS
        for solver in SOLVERS
    ]
    report = {
        "command": f"python -m repurpose_opt_benchmarks large --time-limit {limit:g} --seeds {seeds}",
        "environment": environment(*PACKAGES),
        "bars": list(_bars(rows)),
        "rows": rows,
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "large", report, markdown(report))
    return 0


def measure_alone(kind: str, n: int, solver: str, seed: int, time_limit: float | None) -> dict[str, Any]:
    """`measure` in a fresh process with one thread."""
    call = f"measure{kind, n, solver, seed, time_limit}"
    code = f"import json; from {__spec__.name} import measure; print(json.dumps({call}))"
    environ = {**os.environ, **ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(kind: str, n: int, solver: str, seed: int, time_limit: float | None) -> dict[str, Any]:
    problem = large_problem(n, seed, planted=kind == "planted")
    options = SolveOptions(time_limit=time_limit, seed=seed)
    began = time.perf_counter()
    solution = solve_problem(problem, Lossless(), options, partitioner=solver)
    seconds = time.perf_counter() - began
    kibibytes = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "kind": kind,
        "neurons": n,
        "nonzeros": int(problem.weight.nnz),
        "solver": solver,
        "seed": seed,
        "volume": solution.volume,
        "seconds": seconds,
        "peak_gib": sum(kibibytes) / 2**20,
        "termination": str(solution.termination),
        "stages": solution.stats["stages"],
    }


def large_problem(n: int, seed: int, *, planted: bool) -> LayerProblem:
    """A layer of ones; planted: most nonzeros of a neuron read inputs of its hidden worker."""
    rng = np.random.default_rng([seed, n, planted])
    rows = np.repeat(np.arange(n), rng.binomial(n, DENSITY, n))
    columns = rng.integers(0, n, len(rows))
    if planted:
        width = n // WORKERS
        hidden = rng.permutation(n) // width
        columns = np.where(rng.random(len(rows)) < AT_HOME, hidden[rows] * width + columns % width, columns)
    weight = sparse.csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=(n, n))
    return LayerProblem.create(weight, WORKERS, value_bytes=1)


def _bars(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    ours = [row for row in rows if row["solver"] == "auto"]
    theirs = {(row["kind"], row["seed"]): row["volume"] for row in rows if row["solver"] == "metis"}
    worst = max(row["volume"] / theirs[row["kind"], row["seed"]] for row in ours)
    yield bar("volume relative to METIS, largest", worst, most=1.0)
    yield bar("seconds, largest", max(row["seconds"] for row in ours), most=_MOST_SECONDS)
    yield bar("peak memory with children, GiB, largest", max(row["peak_gib"] for row in ours), most=_MOST_GIB)


def markdown(report: dict[str, Any]) -> str:
    header = ("class", "seed", "solver", "volume", "seconds", "peak GiB", "stages")
    cells = [
        (
            row["kind"], str(row["seed"]), row["solver"], f"{row['volume']:,}", f"{row['seconds']:.1f}",
            f"{row['peak_gib']:.2f}", ", ".join(f"{s['stage']} {s['seconds']:.1f} s" for s in row["stages"]),
        )
        for row in report["rows"]
    ]  # fmt: skip
    lines = ["# Large", "", *str(__doc__).strip().split("\n"), "", *table(header, cells), ""]
    lines += [*map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    return "\n".join([*lines, machine_line(report["environment"], *PACKAGES)])


if __name__ == "__main__":
    sys.exit(main())
