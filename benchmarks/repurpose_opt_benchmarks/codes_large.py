"""Codes for a layer of LLaMA-7B's feed-forward shape, 11008 × 4096 float32, on 8 workers: seconds, memory and error.

The layer, its samples and the way of measuring are those of `large_layer`, with full moments: each measurement runs in
a process of its own with one thread. `default` is the default chain and placement; the others choose codes for
contiguous owners, one stage more from line to line. Memory is how far the peak of the resident set rises above what
the weight and the samples take already.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from repurpose_opt import LayerProblem, Moments, SolveOptions, Volume
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.large_layer import (
    GROWING,
    QUICK_SIZES,
    SEED,
    SHAPE,
    SIZES,
    WORKERS,
    Profile,
    exponents,
    generate,
    measure_alone,
    nmse_on,
    resident,
    restart_peak,
)
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

BUDGET = 0.01
DEFAULT = "default"
CHAINS = ("threshold", "code-greedy", "code-greedy+code-descent")
MODES = (*CHAINS, DEFAULT)
PARTS = {
    "code-greedy": [("code_greedy_.py", "solve")],
    "code-descent": [("code_descent_.py", "solve")],
    "placement costs": [("repair.py", "compensated_cost_with_codes"), ("repair.py", "compensated_cost")],
    "assignment": [("transport.py", "assign")],
    "refit": [("repair.py", "refit_with_codes")],
    "judging": [("metrics.py", "weighted_error")],
}
"""Where the default spends its time: functions that do not call each other, by file and name."""
_MOST_SECONDS = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks codes-large", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 and 128 inputs; writes no results")
    parser.add_argument("--most-inputs", type=int, default=SIZES[-1], metavar="N", help="leave out larger layers")
    parser.add_argument("--output", type=Path, help="folder for codes-large.json and codes-large.md")
    args = parser.parse_args(argv)
    if args.most_inputs < SIZES[1]:
        parser.error(f"--most-inputs {args.most_inputs}: at least {SIZES[1]}, growth needs two sizes")
    sizes = QUICK_SIZES if args.quick else [n for n in SIZES if n <= args.most_inputs]
    rows = [measure_alone(__spec__.name, mode, n) for n in sizes for mode in MODES]
    report = {
        "command": "python -m repurpose_opt_benchmarks codes-large"
        + (f" --most-inputs {args.most_inputs}" if args.most_inputs < SIZES[-1] else ""),
        "environment": environment(),
        "bars": list(bars(rows)),
        "exponents": {mode: exponents([row for row in rows if row["mode"] == mode]) for mode in MODES},
        "rows": rows,
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "codes-large", report, markdown(report))
    return 0


def measure(mode: str, n: int) -> dict[str, Any]:
    """One solve, its time by parts, its peak memory and its errors on the calibration and the held-out samples."""
    layer = generate(n)
    _solve(
        LayerProblem.create(layer.weight[:64, :64], WORKERS, moments=Moments.from_samples(layer.samples[:, :64])), mode
    )
    load = os.getloadavg()[0]
    before = restart_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    moments = Moments.from_batches(layer.batches())
    calibrated = time.perf_counter()
    problem = LayerProblem.create(layer.weight, WORKERS, moments=moments)
    problem.predicted_moment, problem.output_energy  # noqa: B018  computed once, by whichever part needs them first
    prepared = time.perf_counter()
    profile = cProfile.Profile()  # its overhead is below a hundredth on such arrays
    solution = profile.runcall(_solve, problem, mode)
    solved, cpu_solved = time.perf_counter(), time.process_time()
    peak = resident("VmHWM") - before
    assert solution.exchange is not None
    assert solution.bias is not None
    found = _parts(profile)
    parts = {"products": prepared - calibrated, **found, "rest": solved - prepared - sum(found.values())}
    numbers = [message.size for message in solution.exchange.messages.values()]
    return {
        "mode": mode,
        "neurons": len(layer.weight),
        "inputs": n,
        "samples": len(layer.samples),
        "seconds": solved - began,
        "cpu_seconds": cpu_solved - cpu_began,
        "load_before": load,
        "calibration_seconds": calibrated - began,
        "solve_seconds": solved - calibrated,
        "parts": parts,
        "peak_bytes": peak,
        "peak_per_weight_bytes": peak / layer.weight.nbytes,
        "objective": solution.objective,
        "nmse": solution.nmse,
        "held_out_nmse": nmse_on(layer.held_out, layer.weight, solution.weight, solution.bias),
        "volume_fraction": solution.volume / problem.direct_volume,
        "numbers": sum(numbers),
        "most_numbers": max(numbers, default=0),
        "violations": len(solution.violations),
        "termination": str(solution.termination),
        "rounds": solution.stats.get("rounds"),
    }


def _solve(problem: LayerProblem, mode: str) -> Any:
    formulation, options = Volume(budget=BUDGET, messages="codes"), SolveOptions(seed=SEED)
    if mode == DEFAULT:
        return solve_problem(problem, formulation, options).require()
    return solve_problem(problem, formulation, options, partitioner="contiguous", pruner=mode).require()


def _parts(profile: cProfile.Profile) -> dict[str, float]:
    """Cumulative seconds of PARTS, those that ran."""
    found = Profile(profile)
    return {
        name: sum(found.seconds(*place) for place in places if found.has(*place))
        for name, places in PARTS.items()
        if any(found.has(*place) for place in places)
    }


def bars(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """None where the layer of the full size was left out."""
    for row in rows:
        if row["mode"] == DEFAULT and (row["neurons"], row["inputs"]) == SHAPE:
            yield bar("seconds, default, calibration included", row["seconds"], most=_MOST_SECONDS)
            yield bar("volume as a share of direct", row["volume_fraction"], most=BUDGET)
            yield bar("violations", float(row["violations"]), most=0)


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    header = ["inputs", "codes by", "calibration, s", "solve, s", "CPU, s in all", "peak / W.nbytes"]
    header += ["NMSE", "held out", "numbers", "most of a pair", "rounds"]
    cells: list[tuple[str, ...]] = []
    for mode in MODES:
        cells += [
            (
                str(row["inputs"]), mode, f"{row['calibration_seconds']:.2f}", f"{row['solve_seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}", f"{row['peak_per_weight_bytes']:.2f}", f"{row['nmse']:.4f}",
                f"{row['held_out_nmse']:.4f}", str(row["numbers"]), str(row["most_numbers"]),
                "–" if row["rounds"] is None else str(row["rounds"]),
            )
            for row in rows
            if row["mode"] == mode
        ]  # fmt: skip
        grown = [f"n^{report['exponents'][mode][name]:.1f}" for name in GROWING]
        cells.append(("last two", mode, *grown, *[""] * 6))
    lines = ["# Codes for a large layer", "", *str(__doc__).strip().split("\n"), ""]
    lines += [f"P = {WORKERS}, budget {BUDGET:.0%}; neurons = inputs · {SHAPE[0]} / {SHAPE[1]}.", ""]
    lines += [*table(header, cells), ""]
    largest = [row for row in rows if row["inputs"] == rows[-1]["inputs"]]
    names = list(dict.fromkeys(name for row in largest for name in row["parts"]))
    header = [f"seconds, n = {rows[-1]['inputs']}", *(row["mode"] for row in largest)]
    lines += [*table(header, [(name, *(_part(row, name) for row in largest)) for name in names]), ""]
    lines += [*map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    lines.append(f"Load average before each measurement: at most {max(row['load_before'] for row in rows):.1f}.")
    return "\n".join([*lines, machine_line(report["environment"])])


def _part(row: dict[str, Any], name: str) -> str:
    if name not in row["parts"]:
        return "–"
    return f"{row['parts'][name]:.1f} ({row['parts'][name] / row['seconds']:.0%})"


if __name__ == "__main__":
    sys.exit(main())
