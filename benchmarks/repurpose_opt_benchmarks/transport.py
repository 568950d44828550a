"""How fast `Edge` is: `flow` against `munkres` on one cost matrix, and the whole solve against one pass over W.

Runs in a fresh process with one thread. The pass is `np.minimum(W * W * c, eta).sum(1)`: what RePurpose's rule
costs for a single worker.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import Edge, LayerProblem, solve_layer
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.edge_random import edge_instance
from repurpose_opt_benchmarks.report import table

N = 4096
WORKERS = 8
LEAST_SPEEDUP = 50.0
"""Bar: how many times faster than `munkres` the `flow` is."""
MOST_PASSES = 5.0
"""Bar: how many passes over W the whole solve takes."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks.transport", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="n = 1024 and fewer runs; writes no results")
    parser.add_argument("--output", type=Path, help="folder for transport.json and transport.md")
    args, _ = parser.parse_known_args(argv)  # the other experiments take options of their own
    folder = args.output or (None if args.quick else RESULTS)
    report = measure_alone(*((1024, 3, 5) if args.quick else (N, 5, 25)))
    print(markdown(report))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "transport.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "transport.md").write_text(markdown(report) + "\n")
    return 0


def measure_alone(n: int, assignment_runs: int, solve_runs: int) -> dict[str, Any]:
    """`measure` in a fresh process with one thread: the libraries read their limits when they load."""
    call = f"measure({n}, {assignment_runs}, {solve_runs})"
    code = f"import json; from {__spec__.name} import measure; print(json.dumps({call}))"
    environ = {**os.environ, **ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def measure(n: int, assignment_runs: int, solve_runs: int) -> dict[str, Any]:
    """Both comparisons for an n × n layer on WORKERS workers."""
    return {
        "n": n,
        "workers": WORKERS,
        "threads": 1,
        "environment": environment("ortools"),
        "assignment": list(_assignments(n, assignment_runs)),
        "solve": list(_solves(n, solve_runs)),
    }


def _assignments(n: int, runs: int) -> Iterator[dict[str, Any]]:
    """Seconds of `flow` and `munkres` on the cost matrix of an Edge problem, and on uniform random costs."""
    from repurpose_opt_solvers.flow_ import assign_by_flow
    from repurpose_opt_solvers.munkres_ import assign_by_munkres

    uneven, edge = edge_instance(n, WORKERS, seed=0)
    problem = LayerProblem.create(uneven.weight, WORKERS, moments=uneven.moments, value_bytes=1)
    costs = {
        "edge": edge.assignment_cost(problem, None, None),
        "uniform": np.random.default_rng(n).random((n, WORKERS)),
    }
    assign_by_flow(problem, costs["edge"])  # the first call loads OR-Tools
    for kind, cost in costs.items():
        flow, munkres = _interleaved(
            runs, partial(assign_by_flow, problem, cost), partial(assign_by_munkres, problem, cost)
        )
        least = [_total(cost, timed.answer) for timed in (flow, munkres)]
        yield {
            "cost": kind,
            "flow": flow.seconds,
            "munkres": munkres.seconds,
            "speedup": _ratio(munkres, flow),
            "relative_difference": abs(least[0] - least[1]) / abs(least[1]),
        }


def _solves(n: int, runs: int) -> Iterator[dict[str, Any]]:
    """Seconds of solve_layer for Edge, everything included, and of one pass over the weights."""
    problem, edge = edge_instance(n, WORKERS, seed=0)
    diagonal, eta = problem.moments.second, edge.transfer_price
    for dtype in (np.float64, np.float32):
        W = problem.weight.astype(dtype)
        # transfer_price is for a byte, eta for a value
        formulation = Edge(weight_price=edge.weight_price, transfer_price=eta / W.itemsize)
        one_pass, solve = _interleaved(
            runs,
            partial(_one_pass, W, diagonal, eta),
            partial(solve_layer, W, WORKERS, formulation=formulation, second_moment=diagonal, partitioner="flow"),
        )
        yield {
            "dtype": np.dtype(dtype).name,
            "solve": solve.seconds,
            "one_pass": one_pass.seconds,
            "passes": _ratio(solve, one_pass),
            "termination": str(solve.answer.termination),
            "violations": len(solve.answer.violations),
        }


def _one_pass(W: NDArray[np.floating], c: NDArray[np.float64], eta: float) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.minimum(W * W * c, eta).sum(1)
    return total


class _Timed:
    """The seconds of a function's runs and its last answer."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.runs: list[float] = []
        self.answer: Any = None

    def run(self) -> None:
        began = time.perf_counter()
        self.answer = self._function()
        self.runs.append(time.perf_counter() - began)

    @property
    def seconds(self) -> dict[str, float]:
        return _spread(self.runs)


def _interleaved(runs: int, *functions: Callable[[], Any]) -> list[_Timed]:
    """Each function once a round, so that all meet the same state of the machine; the first round does not count."""
    timed = [_Timed(function) for function in functions]
    for function in functions:
        function()
    for _ in range(runs):
        for one in timed:
            one.run()
    return timed


def _ratio(numerator: _Timed, denominator: _Timed) -> dict[str, float]:
    """Spread of the ratio within a round, which a neighbour's load on the machine changes least."""
    return _spread([a / b for a, b in zip(numerator.runs, denominator.runs, strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "least": min(values), "most": max(values), "runs": len(values)}


def _total(cost: NDArray[np.float64], owner: NDArray[np.int64]) -> float:
    return float(cost[np.arange(len(cost)), owner].sum())


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown; a bar counts at the full size only."""
    machine = report["environment"]
    full = report["n"] == N
    rows = []
    for row in report["assignment"]:
        met = row["speedup"]["median"] >= LEAST_SPEEDUP
        what = f"`munkres` against `flow`, {row['cost']} costs"
        bar = f"≥ {LEAST_SPEEDUP:g}: {'met' if met else 'missed'}" if full else "–"
        rows.append((what, _ms(row["munkres"]), _ms(row["flow"]), _span(row["speedup"], 1), bar))
    for row in report["solve"]:
        met = row["passes"]["median"] <= MOST_PASSES
        what = f"`Edge` solve against one pass, {row['dtype']}"
        bar = f"≤ {MOST_PASSES:g}: {'met' if met else 'missed'}" if full else "–"
        rows.append((what, _ms(row["solve"]), _ms(row["one_pass"]), _span(row["passes"], 2), bar))
    header = ("what", "first, ms", "second, ms", "ratio", "bar")
    lines = ["# Transport", "", __doc__.strip().split("\n")[0], ""]
    lines += [*table(header, rows), ""]
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "numpy", "scipy", "ortools"))
    lines.append(
        f"n = {report['n']} neurons and inputs, P = {report['workers']}, one thread, {machine['cores']} cores "
        f"({machine['system']}, {machine['machine']}). Median (least – most) of interleaved runs, the ratio within "
        f"each round. {versions}; commit {machine['commit'] or 'unknown'}{changed}."
    )
    return "\n".join(lines)


def _ms(seconds: dict[str, float]) -> str:
    return _span({key: 1000 * value for key, value in seconds.items()}, 1)


def _span(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} – {values['most']:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
