"""Lossless placement: `auto` against Mt-KaHyPar and METIS, each on one core with the same time limit.

`mt-kahypar, repeats only` has its best preset (DETERMINISTIC, on the instances for tuning), repeats seeds until the
limit and keeps its best after the exact repair of the balance. `mt-kahypar`, our backend, adds V-cycles of two presets.
The instances are those of the test set lossless-classes that are judged once; `--half tune` shows the others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, mean_ratio, table, write
from repurpose_opt_benchmarks.solves import Solve, instances, run

TESTSET = "lossless-classes"
OURS, PEER, STRONGER, METIS = "auto", "mt-kahypar, repeats only", "mt-kahypar", "metis"
SOLVERS = (OURS, PEER, STRONGER, METIS)
PACKAGES = ("numba", "ortools", "pymetis", "mtkahypar")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks placement", description=__doc__)
    parser.add_argument("--half", choices=("judge", "tune"), default="judge", help="which instances; default: judge")
    parser.add_argument("--solvers", default="", metavar="A,B", help=f"solvers beside {'; '.join(SOLVERS)}")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 … N−1 (default 5)")
    parser.add_argument("--time-limit", type=float, default=10.0, metavar="S", help="of each solve (default 10)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="solves at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="the smallest instances, one seed, 1 s; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; rows that it has are not solved again")
    args = parser.parse_args(argv)
    if args.quick:
        args.half, args.seeds, args.time_limit = "tune", 1, 1.0
    solvers = (*SOLVERS, *filter(None, args.solvers.split(",")))
    chosen = [found for found in instances(TESTSET) if found.judge_once == (args.half == "judge")]
    if args.quick:
        chosen = [found for found in chosen if found.problem.m <= 64]
    solves = [
        Solve(TESTSET, found.name, solver, seed, args.time_limit)
        for seed in range(args.seeds)
        for found in chosen
        for solver in solvers
    ]
    folder = args.output or (None if args.quick else RESULTS)
    name = "placement" if args.half == "judge" else f"placement-{args.half}"
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    rows = run(solves, args.jobs, None if folder is None else folder / f"{name}.rows.jsonl")
    report = {
        "command": f"python -m repurpose_opt_benchmarks placement --half {args.half} --seeds {args.seeds} "
        f"--time-limit {args.time_limit:g} --jobs {args.jobs}",
        "environment": environment(*PACKAGES),
        "bars": list(bars(rows)) if args.half == "judge" else [],
        "rows": rows,
    }
    print(markdown(report, solvers))
    if folder is not None:
        write(folder, name, report, markdown(report, solvers))
    return 0


def volumes(rows: Sequence[dict[str, Any]], solver: str) -> dict[str, float]:
    """Median volume over the seeds, by instance."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["solver"] == solver and row["volume"] is not None:
            found.setdefault(row["instance"], []).append(row["volume"])
    return {instance: median(values) for instance, values in found.items()}


def ratios(rows: Sequence[dict[str, Any]], solver: str, kind: str | None = None) -> dict[str, float]:
    """Median volume of `auto` relative to the solver's, by instance that both solved."""
    ours, theirs = volumes(rows, OURS), volumes(rows, solver)
    kinds = {row["instance"]: row["kind"] for row in rows}
    return {name: ours[name] / theirs[name] for name in ours if name in theirs and kind in (None, kinds[name])}


def bars(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for peer in (PEER, STRONGER):
        against = ratios(rows, peer)
        yield bar(f"volume relative to {peer}, geometric mean", _mean(against), most=1.0)
        yield bar(f"volume relative to {peer} on random layers", _mean(ratios(rows, peer, "random")), most=0.97)
        yield bar(f"volume relative to {peer} on the worst instance", max(against.values()), most=1.01)
    yield bar(f"volume relative to {METIS} on random layers", _mean(ratios(rows, METIS, "random")), most=0.9)
    yield bar("wall time relative to limit × 1.1 + 1 s, largest", _overrun(rows), most=1.0)


def _overrun(rows: Sequence[dict[str, Any]]) -> float:
    return float(max(row["seconds"] / (1.1 * row["time_limit"] + 1.0) for row in rows))


def _mean(found: dict[str, float]) -> float:
    return mean_ratio(list(found.values()), [1.0] * len(found))


def markdown(report: dict[str, Any], solvers: Sequence[str]) -> str:
    rows = report["rows"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    others = [solver for solver in solvers if solver != OURS]
    means = [
        [kind or "all", *(f"{_mean(ratios(rows, solver, kind)):.3f}" for solver in others)] for kind in (*kinds, None)
    ]
    lines = ["# Placement", "", *str(__doc__).strip().split("\n"), ""]
    lines += [f"Volume of `{OURS}` relative to others, geometric mean of the medians over seeds:", ""]
    lines += table(("class", *(f"relative to {solver}" for solver in others)), means)
    lines += ["", "Volume, median (least – most) over seeds:", ""]
    lines += table(("instance", *solvers), [[name, *_cells(rows, name, solvers)] for name in _names(rows)])
    lines += ["", *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", "", machine_line(report["environment"], *PACKAGES)]
    return "\n".join(lines)


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["instance"] for row in rows))


def _cells(rows: Sequence[dict[str, Any]], instance: str, solvers: Sequence[str]) -> Iterator[str]:
    for solver in solvers:
        found = [row["volume"] for row in rows if row["instance"] == instance and row["solver"] == solver]
        solved = [volume for volume in found if volume is not None]
        failed = f"; {len(found) - len(solved)} without an answer" if len(solved) < len(found) else ""
        yield f"{median(solved):g} ({min(solved)} – {max(solved)}){failed}" if solved else "–"


if __name__ == "__main__":
    sys.exit(main())
