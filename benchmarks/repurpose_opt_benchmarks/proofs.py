"""What the mixed-integer backends prove and add: share proved by each engine, each bound, and `mip` after `metis`.

Proofs and bounds are on Lossless layers of at most 64 inputs; what `mip` adds is on random ones of up to 1,024, read
from the trajectory of one solve. One core a solve.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from repurpose_opt import LayerProblem, Lossless, SolveOptions, Termination
from repurpose_opt.formulation import nets
from repurpose_opt.linear_model import linear_model, whole_loads
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Deadline
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.lossless_classes import LosslessClasses
from repurpose_opt_benchmarks.lossless_random import lossless_problem
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, mean_ratio, table, write

ENGINES = ("mip", "mip:cp-sat", "mip:highs", "mip:scip")
SMALL, LARGEST = 64, 1024
"""Inputs of the largest layers for proofs, and for what `mip` adds."""
_SIZES = ((32, 4, 0.05, False), (32, 4, 0.1, False), (64, 2, 0.05, False), (64, 4, 0.08, True))
"""n, P, density and whether it is planted, of layers that every seed draws anew."""
_AFTER = (10.0, 30.0, 60.0)
_WITHIN = 10.0
"""Bar: seconds for the layers that must be proved."""
_PACKAGES = ("ortools", "pymetis")

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks proofs", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 … N−1 (default 5)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="solves at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="few instances, one seed, 3 s; writes no results")
    parser.add_argument("--output", type=Path, help="folder for proofs.json and proofs.md")
    args = parser.parse_args(argv)
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}; allowed: at least 1")
    report = measure(1 if args.quick else args.seeds, args.jobs, args.quick)
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "proofs", report, markdown(report))
    return 0


def measure(seeds: int, jobs: int, is_quick: bool) -> dict[str, Any]:
    """Rows of the three tables, and the bars."""
    limit = 3.0 if is_quick else max(_AFTER)
    small = list(problems(seeds, SMALL, is_quick))
    larger = [name for name in named(LARGEST, is_quick) if "random" in name and (not is_quick or name in small)]
    os.environ.update(ONE_THREAD)  # for the processes: the libraries read it when they load
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

        def rows(function: Callable[..., Row], calls: Sequence[tuple[Any, ...]]) -> list[Row]:
            return list(pool.map(function, *zip(*calls, strict=True)))

        proofs = rows(proof, [(name, engine, limit) for name in small for engine in ENGINES])
        bounds = rows(bound, [(name, limit / 6) for name in small])
        gains = rows(gain, [(name, seed, limit) for name in larger for seed in range(seeds)])
    return {
        "command": f"python -m repurpose_opt_benchmarks proofs --seeds {seeds} --jobs {jobs}" + " --quick" * is_quick,
        "time_limit": limit,
        "environment": environment(*_PACKAGES),
        "proofs": proofs,
        "bounds": bounds,
        "gains": gains,
        "bars": list(bars(proofs, gains)),
    }


def named(most: int, is_quick: bool) -> Iterator[str]:
    """Instances of lossless-classes with at most so many inputs and neurons; the real layers are larger."""
    for instance in LosslessClasses():
        if instance.kind == "real":
            return
        if max(instance.problem.m, instance.problem.n) <= most and not (is_quick and instance.judge_once):
            yield instance.name


def problems(seeds: int, most: int, is_quick: bool) -> Iterator[str]:
    """Names of the small layers; those that a seed draws say all that `problem_of` needs."""
    yield from named(most, is_quick)
    for n, P, density, is_planted in _SIZES[: 2 if is_quick else None]:
        for seed in range(seeds):
            yield f"{'planted' if is_planted else 'random'}:{n}:{P}:{density}:{seed}"


def problem_of(name: str) -> LayerProblem:
    if ":" not in name:
        return next(instance.problem for instance in LosslessClasses() if instance.name == name)
    kind, n, P, density, seed = name.split(":")
    return lossless_problem(int(n), int(P), float(density), planted=kind == "planted", seed=int(seed))


def proof(name: str, engine: str, limit: float) -> Row:
    """One engine on one layer."""
    began = time.perf_counter()
    solution = solve_problem(problem_of(name), Lossless(), SolveOptions(time_limit=limit), partitioner=engine)
    return {
        "instance": name,
        "engine": engine,
        "termination": str(solution.termination),
        "objective": solution.objective if solution.owner is not None else None,
        "bound": solution.bound,
        "seconds": time.perf_counter() - began,
        "message": solution.message,
    }


def bound(name: str, seconds: float) -> Row:
    """Each bound by itself, without branching, and the seconds that it took."""
    from repurpose_opt_solvers.bounds import (
        relaxation,
        spread,
        with_degree_cuts,
        with_order,
        with_worker_cuts,
        worker_bounds,
    )
    from repurpose_opt_solvers.transport import assign_with_bound

    problem = problem_of(name)
    hypergraph = nets(problem)
    model = linear_model(problem, hypergraph)
    alike = np.unique(hypergraph.pins.toarray(), axis=0, return_inverse=True)[1]
    # The bound by worker needs an objective to step towards.
    known = solve_problem(problem, Lossless(), partitioner="alternate").objective
    plain, multiplier = relaxation(model)
    timed = {
        "spread": lambda: assign_with_bound(problem, spread(hypergraph)).bound,
        "relaxation": lambda: relaxation(model)[0],
        "degree cuts": lambda: relaxation(with_degree_cuts(model, hypergraph.pins, whole_loads(problem)[0]))[0],
        "order of identical neurons": lambda: relaxation(with_order(model, alike))[0],
    }
    row: Row = {"instance": name, "known": known, "seconds": {}}
    for what, of in timed.items():
        began = time.perf_counter()
        row[what] = of()
        row["seconds"][what] = time.perf_counter() - began
    began = time.perf_counter()
    best = None
    for found in worker_bounds(model, known, multiplier, Deadline(seconds)):
        best = found if best is None or found.bound > best.bound else best
    row["by worker"] = plain if best is None else max(plain, best.bound)
    row["seconds"]["by worker"] = time.perf_counter() - began
    if best is not None:
        row["cuts by worker"] = relaxation(with_worker_cuts(model, best))[0]
    return row


def gain(name: str, seed: int, limit: float) -> Row:
    """The objective of metis, and of metis+mip after some seconds of one solve."""
    options = SolveOptions(time_limit=limit, seed=seed)
    began = time.perf_counter()
    solution = solve_problem(problem_of(name), Lossless(), options, partitioner="metis+mip")
    first = solution.stats["stages"][0]
    alone = solve_problem(problem_of(name), Lossless(), SolveOptions(seed=seed), partitioner="metis")
    after = {
        f"{moment:g}": min([first["objective"], *(cost for at, cost in solution.stats["trajectory"] if at <= moment)])
        for moment in _AFTER
        if moment <= limit
    }
    return {
        "instance": name,
        "seed": seed,
        "metis": first["objective"],
        "one_cut": alone.stats["volume_of_attempts"]["cut"],
        "after": after,
        "end": solution.objective,
        "bound": solution.bound,
        "termination": str(solution.termination),
        "parts": [part["part"] for part in solution.stats.get("parts", ())],
        "seconds": time.perf_counter() - began,
    }


def bars(proofs: Sequence[Row], gains: Sequence[Row]) -> Iterator[dict[str, Any]]:
    must = [
        row
        for row in proofs
        if row["engine"] == "mip"
        and row["instance"].startswith(("random-n64-P2", "random:64:2", "planted-little-noise-n64-P4"))
    ]
    late = [row for row in must if row["termination"] != Termination.OPTIMAL or row["seconds"] > _WITHIN]
    yield bar(f"R64 P2 and planted P4 layers that `mip` has not proved within {_WITHIN:g} s", float(len(late)), most=0)
    worse = [row for row in gains if row["end"] > row["metis"]]
    yield bar("solves in which metis+mip is worse than metis", float(len(worse)), most=0)
    random = [row for row in gains if _is_small_random(row["instance"])]
    last = str(30 if all("30" in row["after"] for row in random) else "end")
    reached = [row["after"].get(last, row["end"]) for row in random]
    for name, key in (("metis", "metis"), ("METIS's cut alone", "one_cut")):
        ratio = mean_ratio(reached, [row[key] for row in random])
        yield bar(f"metis+mip after 30 s relative to {name}, random n ≤ 256, geometric mean", ratio, most=0.9)


def _is_small_random(instance: str) -> bool:
    return instance.startswith(("random-n64", "random-n256"))


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Proofs", "", *str(__doc__).strip().split("\n"), ""]
    lines += [f"Proved within {report['time_limit']:g} s:", ""]
    lines += table(("layers", *ENGINES), list(_shares(report["proofs"])))
    lines += ["", "Bounds without branching, mean share of the best objective known, and median seconds:", ""]
    lines += table(("bound", "share", "seconds"), list(_bound_shares(report["proofs"], report["bounds"])))
    lines += ["", "`mip` after `metis`: objective relative to metis, geometric mean over seeds:", ""]
    moments = list(report["gains"][0]["after"])
    header = ("instance", *(f"{moment} s" for moment in moments), "end", "bound relative to the end", "parts")
    lines += table(header, list(_gain_rows(report["gains"], moments)))
    lines += ["", *map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    lines.append(machine_line(report["environment"], *_PACKAGES))
    return "\n".join(lines)


def _layers(name: str) -> str:
    """The row of the table that an instance counts in."""
    return name.rsplit(":", 1)[0] if ":" in name else "lossless-classes"


def _shares(proofs: Sequence[Row]) -> Iterator[list[str]]:
    groups = list(dict.fromkeys(_layers(row["instance"]) for row in proofs))
    for group in [*groups, "all"]:
        cells = [group]
        for engine in ENGINES:
            same = [row for row in proofs if row["engine"] == engine and group in ("all", _layers(row["instance"]))]
            proved = [row["seconds"] for row in same if row["termination"] == Termination.OPTIMAL]
            median = f", median {np.median(proved):.1f} s" if proved else ""
            cells.append(f"{len(proved)} of {len(same)}{median}")
        yield cells


def _bound_shares(proofs: Sequence[Row], bounds: Sequence[Row]) -> Iterator[list[str]]:
    best: dict[str, float] = {row["instance"]: row["known"] for row in bounds}
    for row in proofs:
        if row["objective"] is not None:
            best[row["instance"]] = min(best[row["instance"]], row["objective"])
    for what in bounds[0]["seconds"]:
        shares = [row[what] / best[row["instance"]] for row in bounds if best[row["instance"]] > 0]
        seconds = np.median([row["seconds"][what] for row in bounds])
        yield [what, f"{np.mean(shares):.1%}", f"{seconds:.2f}"]
    for engine in ENGINES:
        known = [row for row in proofs if row["engine"] == engine and row["bound"] is not None]
        shares = [row["bound"] / best[row["instance"]] for row in known if best[row["instance"]] > 0]
        if shares:
            took = np.median([row["seconds"] for row in known])
            yield [f"`{engine}`, with branching", f"{np.mean(shares):.1%}", f"{took:.2f}"]


def _gain_rows(gains: Sequence[Row], moments: Sequence[str]) -> Iterator[list[str]]:
    for name in dict.fromkeys(row["instance"] for row in gains):
        same = [row for row in gains if row["instance"] == name]
        metis = [row["metis"] for row in same]
        cells = [f"{mean_ratio([row['after'][moment] for row in same], metis):.3f}" for moment in moments]
        cells.append(f"{mean_ratio([row['end'] for row in same], metis):.3f}")
        bounded = [row["bound"] / row["end"] for row in same if row["bound"] is not None and row["end"] > 0]
        cells.append(f"{np.mean(bounded):.1%}" if bounded else "–")
        yield [name, *cells, " → ".join(same[0]["parts"]) or "–"]


if __name__ == "__main__":
    sys.exit(main())
