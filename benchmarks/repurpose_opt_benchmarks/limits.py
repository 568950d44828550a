"""Whether time limits hold: every installed partitioner on every instance of lossless-classes, one core each.

A solve may take its limit × 1.1 + 1 s, imports, native calls and the exact repair of the balance included.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repurpose_opt import registry
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.placement import PACKAGES, TESTSET
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write
from repurpose_opt_benchmarks.solves import Solve, instances, run


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks limits", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=2.0, metavar="S", help="of each solve (default 2)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="solves at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="the smallest instances, 0.5 s; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; rows that it has are not solved again")
    args = parser.parse_args(argv)
    limit = 0.5 if args.quick else args.time_limit
    solvers = ["auto"] + [entry.name for entry in registry.registered("partitioners") if entry.installed]
    names = [found.name for found in instances(TESTSET) if not args.quick or found.problem.m <= 64]
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    solves = [Solve(TESTSET, name, solver, 0, limit) for name in names for solver in solvers]
    rows = run(solves, args.jobs, None if folder is None else folder / "limits.rows.jsonl")
    allowed = 1.1 * limit + 1.0
    report = {
        "command": f"python -m repurpose_opt_benchmarks limits --time-limit {limit:g} --jobs {args.jobs}",
        "environment": environment(*PACKAGES),
        "bars": [bar("longest wall time, seconds", max(row["seconds"] for row in rows), most=allowed)],
        "rows": rows,
    }
    print(markdown(report))
    if folder is not None:
        write(folder, "limits", report, markdown(report))
    return 0


def markdown(report: dict[str, Any]) -> str:
    header = ("partitioner", "longest, s", "on", "answers", "how they ended")
    lines = ["# Time limits", "", *str(__doc__).strip().split("\n"), ""]
    lines += table(
        header, [_cells(report["rows"], name) for name in dict.fromkeys(r["solver"] for r in report["rows"])]
    )
    lines += ["", *map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    return "\n".join([*lines, machine_line(report["environment"], *PACKAGES)])


def _cells(rows: Sequence[dict[str, Any]], solver: str) -> list[str]:
    own = [row for row in rows if row["solver"] == solver]
    longest = max(own, key=lambda row: row["seconds"])
    answers = sum(row["volume"] is not None for row in own)
    ended = Counter(row["termination"] for row in own)
    return [
        solver,
        f"{longest['seconds']:.2f}",
        longest["instance"],
        f"{answers} of {len(own)}",
        ", ".join(f"{termination} {count}" for termination, count in ended.most_common()),
    ]


if __name__ == "__main__":
    sys.exit(main())
