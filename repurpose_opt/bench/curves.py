"""Curves of solvers: performance profiles, objectives over time, times to a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.bench.claims import AS_GOOD, SAME, ZERO, known
from repurpose_opt.bench.row import Row
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.solver import Termination

FIRST_SECONDS = 1e-3
"""Where logarithmic axes of time begin at the earliest."""


@dataclass(frozen=True)
class Profile:
    """Performance profile of one measure: share of solves within a ratio of the best of their instance.

    Dolan and Moré, *Benchmarking optimization software with performance profiles*, 2002, with every seed as a solve.
    """

    measure: str
    """`seconds` or `objective`."""
    ratios: Mapping[str, tuple[float, ...]]
    """By solver, ascending: measure / best of the instance, of the solves that have an answer; in a profile of
    seconds, one within AS_GOOD of the least known objective: bad answers are fast.

    1 where both are 0, inf where only the best is.
    """
    failed: Mapping[str, Mapping[str, int]]
    """By solver, how many solves have no ratio and why: a Failure, `unsupported`, `infeasible`, `worse` (than AS_GOOD
    beyond the least known, in a profile of seconds), `missing` (no row)."""
    solves: int
    """Of each solver."""


def profile(rows: Sequence[Row], measure: str) -> Profile:
    """Of judged rows; `measure` is "seconds" or "objective"."""
    if measure not in ("seconds", "objective"):
        raise InvalidArgument("measure", repr(measure), "seconds or objective")
    best: dict[tuple[str, str], float] = {}
    least = _least(rows)
    for row in rows:
        figure = _figure(row, measure, least)
        if figure is not None:
            key = (row.testset, row.instance)
            best[key] = min(best.get(key, np.inf), figure)
    ratios: dict[str, list[float]] = {}
    failed: dict[str, Counter[str]] = {}
    for row in rows:
        figure = _figure(row, measure, least)
        of_solver = ratios.setdefault(row.solver, [])
        missing = failed.setdefault(row.solver, Counter())
        if figure is None:
            missing["worse" if row.objective is not None else str(row.failure or row.termination)] += 1
        else:
            of_solver.append(_ratio(figure, best[row.testset, row.instance]))
    solves = len({(row.testset, row.instance, row.seed, row.time_limit, row.threads) for row in rows})
    for solver, reasons in failed.items():
        missing_rows = solves - len(ratios[solver]) - reasons.total()
        if missing_rows:
            reasons["missing"] = missing_rows
    return Profile(measure, {solver: tuple(sorted(found)) for solver, found in ratios.items()}, failed, solves)


def _figure(row: Row, measure: str, least: Mapping[tuple[str, str], float]) -> float | None:
    """What a profile measures of a row; None without an answer, or one that is good enough for its seconds to count."""
    if row.objective is None or measure == "objective":
        return row.objective
    gap = (row.objective - least[row.testset, row.instance]) / max(abs(row.objective), ZERO)
    return row.seconds if gap <= AS_GOOD else None


def _ratio(figure: float, best: float) -> float:
    if figure <= best or figure <= ZERO:
        return 1.0
    return figure / best if best > ZERO else np.inf


def anytime(rows: Sequence[Row], points: int = 50) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """By solver (seconds, mean ratio of the incumbent to the least known objective) on a logarithmic grid of times.

    The mean begins where every solve of the solver that has an answer has an incumbent. Incumbents are claims, except
    for the last of each solve; claims below the least known objective are left out. All curves end with the last
    answer of any solver. Of judged rows; without instances whose least known objective is 0, which has no ratio. A
    solver without an answer has two empty tuples.
    """
    if points < 2:
        raise InvalidArgument("points", points, "a whole number ≥ 2")
    least = _least(rows)
    curves: dict[str, list[NDArray[np.float64]]] = {row.solver: [] for row in rows}
    for row in rows:
        objective = least.get((row.testset, row.instance))
        if row.objective is not None and objective is not None and objective > ZERO:
            seconds, incumbents = _incumbents(row, objective)
            curves[row.solver].append(np.array([seconds, incumbents / objective]))
    end = max((curve[0, -1] for found in curves.values() for curve in found), default=0.0)
    return {solver: _mean_curve(found, end, points) for solver, found in curves.items()}


def _mean_curve(
    curves: Sequence[NDArray[np.float64]], end: float, points: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean of step functions, each (2, steps) times and values, from where all have begun."""
    if not curves:
        return (), ()
    begin = max(FIRST_SECONDS, *(curve[0, 0] for curve in curves))
    end = max(begin, end)
    # Clipped, as rounding must not put a time before the first incumbent.
    grid = np.clip(np.geomspace(begin, end, points), begin, end)
    values = [curve[1, np.searchsorted(curve[0], grid, side="right") - 1] for curve in curves]
    return tuple(grid.tolist()), tuple(np.mean(values, axis=0).tolist())


def times_to_target(rows: Sequence[Row], within: float) -> dict[str, tuple[tuple[float, ...], int]]:
    """By solver: seconds, ascending, until an incumbent within this share of the least known; how many never had one.

    Only solves whose answer is within it count as having had one, as incumbents before the last are claims; of the
    others, those that the solver does not support or called infeasible are not counted. Of judged rows. Plotted as a
    distribution: Aiex, Resende and Ribeiro, *TTT plots*, 2007.
    """
    if not within >= 0:
        raise InvalidArgument("within", within, "a share ≥ 0")
    least = _least(rows)
    times: dict[str, list[float]] = {row.solver: [] for row in rows}
    never = Counter[str]()
    for row in rows:
        objective = least.get((row.testset, row.instance))
        target = np.nan if objective is None else objective + (within + SAME) * max(abs(objective), ZERO)
        if row.objective is not None and objective is not None and row.objective <= target:
            seconds, incumbents = _incumbents(row, objective)
            times[row.solver].append(float(seconds[np.argmax(incumbents <= target)]))
        elif row.termination not in (Termination.UNSUPPORTED, Termination.INFEASIBLE):
            never[row.solver] += 1
    return {solver: (tuple(sorted(found)), never[solver]) for solver, found in times.items()}


def _least(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    return {instance: its.objective for instance, its in known(rows).items() if its.objective is not None}


def _incumbents(row: Row, least: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times, ascending, and objectives of an answered row, without claims below the least known objective."""
    assert row.objective is not None
    if not row.trajectory:
        return np.array([row.seconds or 0.0]), np.array([row.objective])
    seconds, objectives = np.array(row.trajectory, dtype=float).T
    objectives[-1] = row.objective
    is_credible = objectives >= least - SAME * max(abs(least), ZERO)
    return seconds[is_credible], objectives[is_credible]
