"""How fast the group lasso is: Newton in the group norms against CVXPY's solvers and first-order methods, one core.

Random layers n × n on 4 workers, condition number 1e3, all workers at one λ: the one of a budget of 10 %, and
0.2 λ_max. Then a layer of 1536 inputs on 8 workers. Accuracies are computed from the weights, not taken from a solver.
Seconds are of the processor, which what else runs on the machine does not change much.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import LayerProblem, Moments, SolveOptions, Volume
from repurpose_opt.isolation import DeadlinePassed, call
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

WORKERS = 4
BUDGET = 0.1
SIZES = (64, 128, 256)
_CONDITION = 1e3
_LIMIT = 60.0
"""Seconds for CVXPY on one layer and one λ; twice that for the large layers."""
_MEMORY = 10 << 30
"""Bytes of address space for it."""
_TIE = 1e-5
"""A group whose pull is this near λ p_j may be zero or not."""
_ACCURATE = 1e-6
_TARGET = 1e-10
"""Relative duality gap of the first-order methods written here, as Newton's."""
_PACKAGES = ("cvxpy", "clarabel", "scs", "skglm", "celer", "numba")

CONIC: dict[str, tuple[str, dict[str, Any]]] = {
    "CLARABEL": ("CLARABEL", {}),
    "SCS, 1e-6": ("SCS", {"eps_abs": 1e-6, "eps_rel": 1e-6, "max_iters": 100_000}),
    "SCS, 1e-8": ("SCS", {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 100_000}),
}
"""CVXPY's solvers of second-order cones, and their tolerances."""

Row = dict[str, Any]
Floats = NDArray[np.float64]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks lasso", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 … N−1 (default 3)")
    parser.add_argument("--quick", action="store_true", help="small layers, one seed; writes no results")
    parser.add_argument("--output", type=Path, help="folder for lasso.json and lasso.md")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}; allowed: at least 1")
    report = measure(1 if args.quick else args.seeds, args.quick)
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "lasso", report, markdown(report))
    return 0


def measure(seeds: int, is_quick: bool) -> dict[str, Any]:
    """Rows of both tables, and the bars."""
    sizes, large = ((24, 32), [(96, 48)]) if is_quick else (SIZES, [(1536, 384), (1536, 1536)])
    limit = 20.0 if is_quick else _LIMIT
    os.environ.update(ONE_THREAD)  # for the process: the libraries read it when they load
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        cases = [(n, seed, limit) for n in sizes for seed in range(seeds)]
        rows = [row for found in alone.map(solver_rows, *zip(*cases, strict=True)) for row in found]
        wide = [(n, m, 2 * limit) for n, m in large]
        whole = [row for found in alone.map(large_rows, *zip(*wide, strict=True)) for row in found]
    return {
        "command": f"python -m repurpose_opt_benchmarks lasso --seeds {seeds}" + " --quick" * is_quick,
        "time_limit": limit,
        "memory_limit": _MEMORY,
        "environment": environment(*_PACKAGES),
        "rows": rows,
        "large": whole,
        "bars": list(bars(rows, whole)),
    }


def layer(n: int, m: int, P: int, seed: int) -> LayerProblem:
    """Normal weights; a covariance with eigenvalues from 1 to 1e-3, geometrically, in random directions."""
    random = np.random.default_rng([seed, n, m])
    directions, _ = np.linalg.qr(random.normal(size=(n, n)))
    covariance = (directions * np.geomspace(1.0, 1.0 / _CONDITION, n)) @ directions.T
    moments = Moments.from_raw((covariance + covariance.T) / 2)
    return LayerProblem.create(random.normal(size=(m, n)), P, moments=moments, value_bytes=4)


def workers_of(problem: LayerProblem) -> tuple[list[Any], NDArray[np.int64]]:
    """Each worker's lasso for the neurons in their order, and the owners."""
    from repurpose_opt_solvers.lasso_path import WorkerLasso
    from repurpose_opt_solvers.reduced import worker_problems

    owner = np.arange(problem.m) * problem.P // problem.m
    return [WorkerLasso(worker) for worker in worker_problems(problem, Volume(budget=BUDGET), owner)], owner


def solver_rows(n: int, seed: int, limit: float) -> list[Row]:
    """Every solver on one layer, at both λ. Nothing that is compiled at its first call is timed there."""
    from repurpose_opt_solvers.group_lasso_fast_ import GroupLassoFast
    from repurpose_opt_solvers.lasso_newton import LassoProblem

    problem = layer(n, n, WORKERS, seed)
    workers, owner = workers_of(problem)
    plain = [LassoProblem.of_arrays(*arrays_of(worker.lasso)) for worker in workers]
    at_budget = GroupLassoFast().solve(problem, Volume(budget=BUDGET), SolveOptions(), owner).stats["lambda"]
    largest = max(lasso.largest_useful for lasso in plain)
    rows = []
    for where, penalty_weight in (("budget 10 %", at_budget), ("0.2 λ_max", 0.2 * largest)):
        timed = [newton(plain, penalty_weight)]
        timed += [first_order(name, plain, penalty_weight) for name in FIRST_ORDER]
        timed += [library(name, plain, penalty_weight) for name in LIBRARIES]
        if where == "budget 10 %":
            timed += [conic(name, plain, penalty_weight, limit) for name in CONIC]
        rows += [{"n": n, "seed": seed, "where": where, **row} for row in _judged(plain, penalty_weight, timed)]
    return rows


def arrays_of(lasso: Any) -> tuple[Floats, Floats, Floats, NDArray[np.int64], float]:
    """K, R, p, first column of each group, energy."""
    moment = lasso.rows(np.arange(lasso.residual.shape[1]))
    return (moment + moment.T) / 2, lasso.residual, lasso.penalty, lasso.first, lasso.energy


def newton(problems: Sequence[Any], penalty_weight: float) -> Row:
    from repurpose_opt_solvers.lasso_newton import solve

    began = time.process_time()
    found = [solve(problem, penalty_weight) for problem in problems]
    seconds = time.process_time() - began
    return {
        "solver": "Newton",
        "seconds": seconds,
        "weights": [_full(p, s) for p, s in zip(problems, found, strict=True)],
    }


def first_order(name: str, problems: Sequence[Any], penalty_weight: float) -> Row:
    arrays = [arrays_of(problem) for problem in problems]
    began = time.process_time()
    weights = [
        FIRST_ORDER[name](problem, *given[:3], penalty_weight) for problem, given in zip(problems, arrays, strict=True)
    ]
    return {"solver": name, "seconds": time.process_time() - began, "weights": weights}


def library(name: str, problems: Sequence[Any], penalty_weight: float) -> Row:
    """A package's multi-task lasso on the design Lᵀ, K = L Lᵀ; its factor is timed with it, its compilation is not."""
    try:
        run = LIBRARIES[name]()
    except ImportError as missing:
        return {"solver": name, "failure": f"not installed: {missing.name}"}
    arrays = [arrays_of(problem)[:3] for problem in problems]
    run(*_design(*arrays[0]), penalty_weight)
    began = time.process_time()
    weights = [run(*_design(*given), penalty_weight) / given[2] for given in arrays]
    return {"solver": name, "seconds": time.process_time() - began, "weights": weights}


def conic(name: str, problems: Sequence[Any], penalty_weight: float, limit: float) -> Row:
    """A solver of CVXPY in a process of its own, ended at the limit."""
    solver, settings = CONIC[name]
    arrays = [arrays_of(problem) for problem in problems]
    try:
        timed: Row = call(solve_conic, arrays, penalty_weight, solver, settings, _MEMORY, time_limit=limit)
    except DeadlinePassed:
        return {"solver": name, "failure": f"not done after {limit:g} s", "peak": _peak_of_children()}
    except RuntimeError as error:
        return {"solver": name, "failure": str(error).rsplit(": ", 1)[-1] or "ended", "peak": _peak_of_children()}
    return {"solver": name, **timed}


def solve_conic(
    arrays: Sequence[tuple[Any, ...]], penalty_weight: float, solver: str, settings: dict[str, Any], memory: int
) -> Row:
    """The child's part of `conic`: seconds to compile all models, and to solve them without a warm start."""
    from repurpose_opt_solvers.group_lasso_ import SETTINGS, CompiledLasso
    from repurpose_opt_solvers.lasso_newton import LassoProblem

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    given = {**(settings or SETTINGS.get(solver, {})), "warm_start": False}
    compiling = solving = 0.0
    CompiledLasso(LassoProblem.of_arrays(np.eye(1), np.eye(1), np.ones(1), np.arange(2), 1.0)).solve(solver, 0.5)
    weights = []
    for one in arrays:
        began = time.process_time()
        compiled = CompiledLasso(LassoProblem.of_arrays(*one))
        compiled.penalty_weight.value = penalty_weight / compiled.unit
        compiled.model.get_problem_data(solver)
        compiling += time.process_time() - began
        began = time.process_time()
        compiled.solve(solver, penalty_weight, **given)
        solving += time.process_time() - began
        weights.append(compiled.weight.value * compiled.unit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": solving, "compile_seconds": compiling, "weights": weights, "peak": peak}


def large_rows(n: int, m: int, limit: float) -> list[Row]:
    """The whole search for a budget by Newton; its λ by other solvers, worker by worker."""
    from repurpose_opt_solvers.group_lasso_fast_ import GroupLassoFast
    from repurpose_opt_solvers.lasso_newton import LassoProblem

    problem = layer(n, m, 2 * WORKERS, 0)
    workers, owner = workers_of(problem)
    began = time.process_time()
    candidate = GroupLassoFast().solve(problem, Volume(budget=BUDGET), SolveOptions(), owner)
    seconds = time.process_time() - began
    shape = {"n": n, "m": m, "workers": problem.P}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plain = [LassoProblem.of_arrays(*arrays_of(worker.lasso)) for worker in workers]
    penalty_weight = candidate.stats["lambda"]
    timed = [newton(plain, penalty_weight), first_order("FISTA", plain, penalty_weight)]
    timed += [library(name, plain, penalty_weight) for name in LIBRARIES]
    timed += [conic(name, plain, penalty_weight, limit) for name in ("CLARABEL", "SCS, 1e-6")]
    search = {
        "solver": "group-lasso-fast, the search",
        "seconds": seconds,
        "gap": candidate.stats["lasso_gap"] / candidate.stats["lasso_objective"],
        "peak": peak,
        "lambdas": candidate.stats["lambdas_tried"],
    }
    return [{**shape, **row} for row in (search, *_judged(plain, penalty_weight, timed))]


def fista(problem: Any, K: Floats, R: Floats, p: Floats, penalty_weight: float) -> Floats:
    """Beck and Teboulle 2009, on K, with restarts; groups of one column."""
    step = 1.0 / np.linalg.eigvalsh(K)[-1]
    V = ahead = np.zeros_like(R)
    momentum = 1.0
    for count in range(1, 100_000):
        moved = ahead + step * (R - ahead @ K)
        following = _shrunk(moved, step * penalty_weight * p)
        if ((ahead - following) * (following - V)).sum() > 0:
            momentum = 1.0
        after = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / after * (following - V)
        V, momentum = following, after
        if count % 20 == 0 and _is_done(problem, V, penalty_weight):
            break
    return V


def block_descent(problem: Any, K: Floats, R: Floats, p: Floats, penalty_weight: float) -> Floats:
    """Group by group, G = R − V K kept up to date; groups of one column."""
    V, G = np.zeros_like(R), R.copy(order="F")
    for _ in range(100_000):
        for j in range(len(p)):
            pull = G[:, j] + K[j, j] * V[:, j]
            norm = np.sqrt(pull @ pull)
            new = pull * (max(0.0, 1 - penalty_weight * p[j] / norm) / K[j, j]) if norm > 0 else pull
            if norm > penalty_weight * p[j] or V[:, j].any():
                G -= np.outer(new - V[:, j], K[j])
                V[:, j] = new
        if _is_done(problem, V, penalty_weight):
            break
    return V


FIRST_ORDER: dict[str, Callable[..., Floats]] = {"FISTA": fista, "block descent": block_descent}


def _skglm() -> Callable[..., Floats]:
    penalties, datafits = import_module("skglm.penalties"), import_module("skglm.datafits")
    solvers = import_module("skglm.solvers")

    def run(design: Floats, targets: Floats, penalty_weight: float) -> Floats:
        solver = solvers.MultiTaskBCD(tol=1e-6, max_iter=1000, max_epochs=50_000, fit_intercept=False)
        penalty = penalties.L2_1(penalty_weight / len(design))
        return np.asarray(solver.solve(design, targets, datafits.QuadraticMultiTask(), penalty)[0]).T

    return run


def _celer() -> Callable[..., Floats]:
    mtl_path = import_module("celer.homotopy").mtl_path

    def run(design: Floats, targets: Floats, penalty_weight: float) -> Floats:
        alphas = [penalty_weight / len(design)]
        return np.asarray(
            mtl_path(design, targets, alphas=alphas, tol=1e-9, max_iter=1000, max_epochs=50_000)[1][..., 0]
        )

    return run


LIBRARIES: dict[str, Callable[[], Callable[..., Floats]]] = {"skglm": _skglm, "celer": _celer}
"""Imported when they are measured: they are no requirement of this package."""


def _design(K: Floats, R: Floats, p: Floats) -> tuple[Floats, Floats]:
    """Design (c, c) and targets (c, r) of the least squares problem, columns divided by their penalties."""
    factor = np.linalg.cholesky(K)
    return np.asfortranarray(factor.T / p), np.asfortranarray(np.linalg.solve(factor, R.T))


def _shrunk(matrix: Floats, by: Floats) -> Floats:
    norms = np.sqrt(np.einsum("rc,rc->c", matrix, matrix))
    return matrix * np.maximum(0.0, 1 - by / np.maximum(norms, 1e-300))


def _is_done(problem: Any, V: Floats, penalty_weight: float) -> bool:
    return bool(_certified(problem, V, penalty_weight).gap <= _TARGET * 0.5 * problem.energy)


def _certified(problem: Any, V: Floats, penalty_weight: float) -> Any:
    from repurpose_opt_solvers.lasso_newton import certify

    return certify(problem, penalty_weight, np.arange(len(problem.penalty)), V, {})


def _full(problem: Any, solution: Any) -> Floats:
    weight = np.zeros_like(problem.residual)
    weight[:, problem.columns_of(solution.group)] = solution.weight
    return weight


def _judged(problems: Sequence[Any], penalty_weight: float, timed: Sequence[Row]) -> Iterator[Row]:
    """Rows with accuracies in place of weights: against the best dual bound, and Newton's support."""
    certified = {
        row["solver"]: [_certified(p, V, penalty_weight) for p, V in zip(problems, row["weights"], strict=True)]
        for row in timed
        if "weights" in row
    }
    bound = sum(max(own[k].objective - own[k].gap for own in certified.values()) for k in range(len(problems)))
    exact = certified["Newton"]
    active = sum(int((found.norm > 0).sum()) for found in exact) / sum(len(p.penalty) for p in problems)
    for row in timed:
        row = {"active": active, "lambda": penalty_weight, **row}
        if row.pop("weights", None) is not None:
            own = certified[row["solver"]]
            objective = sum(found.objective for found in own)
            row["excess"] = (objective - bound) / bound
            row["gap"] = sum(found.gap for found in own) / objective
            row["wrong"] = sum(map(_differences, problems, exact, own, [penalty_weight] * len(own)))
        yield row


def _differences(problem: Any, exact: Any, own: Any, penalty_weight: float) -> int:
    """Groups that are zero in one solution only, away from ties; `is_nonzero` says what is zero."""
    from repurpose_opt_solvers.group_lasso_ import is_nonzero

    tension = exact.pull / (penalty_weight * problem.penalty)
    is_tied = (exact.norm == 0) & (tension > 1 - _TIE) | (exact.norm > 0) & (
        exact.norm < 2e-4 * exact.norm.max(initial=0)
    )
    support = is_nonzero(problem, own.norm)
    return int(((support != (exact.norm > 0)) & ~is_tied).sum())


def _peak_of_children() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def bars(rows: Sequence[Row], large: Sequence[Row]) -> Iterator[dict[str, Any]]:
    ours = [row for row in rows if row["solver"] == "Newton"]
    best = [
        min(
            (row["excess"] for row in rows if _same(row, one) and row["solver"] in CONIC and "excess" in row),
            default=None,
        )
        for one in ours
    ]
    above = [one["excess"] - other for one, other in zip(ours, best, strict=True) if other is not None]
    yield bar("Newton's objective above that of CVXPY's best, relative, worst", max(above), most=_ACCURATE)
    accurate = [row for row in rows if row["solver"] in ("CLARABEL", "SCS, 1e-8") and "wrong" in row]
    yield bar(
        "groups that the accurate solvers of CVXPY choose otherwise, away from ties",
        sum(r["wrong"] for r in accurate),
        most=0,
    )
    n = 128 if any(row["n"] == 128 for row in rows) else max(row["n"] for row in rows)
    for what, least, names in (
        ("CLARABEL", 50.0, ["CLARABEL"]),
        ("the fastest accurate solver of CVXPY", 5.0, list(CONIC)),
    ):
        for how, seconds in (("without compiling", _solve_seconds), ("with compiling", _all_seconds)):
            ratios = [
                min(found) / one["seconds"]
                for one in ours
                if one["n"] == n
                and (found := [seconds(r) for r in rows if _same(r, one) and r["solver"] in names and _is_accurate(r)])
            ]
            if ratios:
                yield bar(f"{what}, {how}, relative to Newton, n = {n}, median", median(ratios), least=least)
    search = [row["seconds"] for row in large if row["solver"].startswith("group-lasso-fast")]
    yield bar(
        f"seconds of group-lasso-fast for {large[0]['n']} inputs on {large[0]['workers']} workers", max(search), most=60
    )


def _same(row: Row, other: Row) -> bool:
    return all(row[key] == other[key] for key in ("n", "seed", "where"))


def _is_accurate(row: Row) -> bool:
    return "excess" in row and row["excess"] <= _ACCURATE


def _solve_seconds(row: Row) -> float:
    return float(row["seconds"])


def _all_seconds(row: Row) -> float:
    return float(row["seconds"] + row.get("compile_seconds", 0.0))


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Group lasso", "", *str(__doc__).strip().split("\n"), ""]
    lines += [
        "Seconds for all workers at one λ, median over seeds; objective above the best bound, and groups that are"
    ]
    lines += [f"chosen otherwise than by Newton away from ties ({_TIE:g}), worst over seeds:", ""]
    header = ("n", "λ", "active", "solver", "seconds", "compiling", "above the bound", "groups", "failures")
    lines += table(header, list(_cells(report["rows"])))
    gib = report["memory_limit"] / 2**30
    lines += ["", f"Large layers, CVXPY with {2 * report['time_limit']:g} s and {gib:g} GiB of address space:", ""]
    lines += table(
        ("layer", "workers", "solver", "seconds", "relative gap", "peak MiB", ""), list(_large_cells(report["large"]))
    )
    lines += ["", *map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    lines.append(machine_line(report["environment"], *_PACKAGES))
    return "\n".join(lines)


def _cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    for n, where, solver in dict.fromkeys((row["n"], row["where"], row["solver"]) for row in rows):
        same = [row for row in rows if (row["n"], row["where"], row["solver"]) == (n, where, solver)]
        done = [row for row in same if "seconds" in row]
        cells = [str(n), where, f"{median(row['active'] for row in same):.0%}", solver]
        if done:
            compiling = [row["compile_seconds"] for row in done if "compile_seconds" in row]
            cells += [f"{median(row['seconds'] for row in done):.3g}", f"{median(compiling):.2g}" if compiling else ""]
            cells += [f"{max(row['excess'] for row in done):.0e}", str(max(row["wrong"] for row in done))]
        else:
            cells += ["", "", "", ""]
        failures = sorted({row["failure"] for row in same if "failure" in row})
        yield [*cells, "; ".join(failures)]


def _large_cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    for row in rows:
        seconds = f"{row['seconds']:.3g}" if "seconds" in row else ""
        gap = f"{row['gap']:.0e}" if "gap" in row else ""
        peak = f"{row['peak'] / 2**20:.0f}" if "peak" in row else ""
        remark = f"{row['lambdas']} values of λ" if "lambdas" in row else row.get("failure", "")
        yield [f"{row['n']} → {row['m']}", str(row["workers"]), row["solver"], seconds, gap, peak, remark]


if __name__ == "__main__":
    # Under its own name, by which the child processes import it.
    sys.exit(import_module("repurpose_opt_benchmarks.lasso").main())
