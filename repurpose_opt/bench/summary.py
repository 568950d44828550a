"""A solver over many rows, and which solver to use for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from repurpose_opt.bench.claims import AS_GOOD, ZERO, Known, is_at_most, is_proved, known
from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.solver import Termination

SHIFT_SECONDS = 0.1
"""Of the shifted geometric mean of times: (Π (t + shift))^(1/n) − shift."""
SIZES = {"small": 64, "medium": 512}
"""Most neurons m of the sizes; what has more is large."""
CLEARLY_FASTER = 0.9
"""Of the seconds of another solver."""


@dataclass(frozen=True)
class Summary:
    """A solver over some rows; shares are of the solves that it supports.

    An `infeasible` that no row refutes is no answer, but may be right: it has no gap, and its own seconds.
    """

    solver: str
    solves: int
    """That it supports."""
    unsupported: int
    """Beside these."""
    answered: int
    """With an objective."""
    failures: Mapping[Failure, int]
    refused: int
    """Solves with a claim that does not hold."""
    proved: int
    """Solves proved optimal by their own bound."""
    best: int
    """Solves whose objective is the least known, within SAME."""
    gap_to_best: float | None
    """Mean of (objective − least known) / |objective|, in [0, 1]; solves without an answer count as 1.

    The primal gap of Berthold, *Measuring the impact of primal heuristics*, 2013.
    """
    gap_to_bound: float | None
    """Mean of (objective − highest known bound) / |objective|, over solves whose instance has a bound; as above."""
    seconds: float | None
    """Shifted geometric mean; solves without an answer count with their time limit."""
    imputed: int
    """How many those are."""
    peak_bytes: int | None
    most_cores: float | None
    """Largest CPU time over wall time."""
    overruns: int
    """Solves that took more than 1.1 × their time limit + 1 s."""


@dataclass(frozen=True)
class Recommended:
    """Which solver to use for instances of one formulation and size."""

    formulation: str
    size: str
    """small (m ≤ 64), medium (≤ 512) or large."""
    instances: int
    ranking: tuple[Summary, ...]
    """All solvers that support at least one of them: by gap to best (of the same share of solves), then by the share
    that they prove, then by seconds.

    So that all are ranked on the same solves, those that a solver does not support, or has no row of, count as 1.
    """
    bounded: int
    """Instances that have a bound."""
    fastest: Summary | None
    """The fastest of those whose gap to best is within AS_GOOD of the first's and that is faster, else the first.

    It counts as faster from a tenth on.
    """


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """One for each solver, in the order of their first rows; of judged rows."""
    found = known(rows)
    by_solver: dict[str, list[Row]] = {}
    for row in rows:
        by_solver.setdefault(row.solver, []).append(row)
    return [_summary(solver, group, found) for solver, group in by_solver.items()]


def _summary(solver: str, rows: Sequence[Row], found: Mapping[tuple[str, str], Known]) -> Summary:
    solves = [row for row in rows if row.termination != Termination.UNSUPPORTED]
    of = [found[row.testset, row.instance] for row in solves]
    pairs = [(row, its) for row, its in zip(solves, of, strict=True) if row.termination != Termination.INFEASIBLE]
    imputed = [row.seconds is None or _has_no_end(row) for row in solves]
    seconds = [row.time_limit if guess else row.seconds for row, guess in zip(solves, imputed, strict=True)]
    return Summary(
        solver=solver,
        solves=len(solves),
        unsupported=len(rows) - len(solves),
        answered=sum(row.objective is not None for row in solves),
        failures=Counter(row.failure for row in solves if row.failure is not None),
        refused=sum(bool(row.refused) for row in solves),
        proved=sum(is_proved(row) for row in solves),
        best=sum(_is_best(row, its) for row, its in pairs),
        gap_to_best=_mean(_gap(row.objective, its.objective) for row, its in pairs),
        gap_to_bound=_mean(_gap(row.objective, its.bound) for row, its in pairs if its.bound is not None),
        seconds=shifted_geometric_mean([second for second in seconds if second is not None]),
        imputed=sum(imputed),
        peak_bytes=max((row.peak_bytes for row in solves if row.peak_bytes is not None), default=None),
        most_cores=max(
            (row.cpu_seconds / row.seconds for row in solves if row.cpu_seconds and row.seconds), default=None
        ),
        overruns=sum(row.seconds is not None and row.seconds > 1.1 * row.time_limit + 1 for row in solves),
    )


def _has_no_end(row: Row) -> bool:
    """Whether the row's seconds do not tell how long an answer takes."""
    return row.objective is None and row.termination != Termination.INFEASIBLE


def _is_best(row: Row, its: Known) -> bool:
    return row.objective is not None and its.objective is not None and is_at_most(row.objective, its.objective)


def _gap(objective: float | None, least: float | None) -> float:
    if objective is None or least is None:
        return 1.0
    return min(1.0, max(0.0, objective - least) / max(abs(objective), ZERO))


def _mean(figures: Iterable[float]) -> float | None:
    taken = list(figures)
    return float(np.mean(taken)) if taken else None


def shifted_geometric_mean(seconds: Sequence[float], shift: float = SHIFT_SECONDS) -> float | None:
    """(Π (t + shift))^(1/n) − shift: short times weigh little (Achterberg, *Constraint integer programming*, 2007)."""
    return float(np.exp(np.mean(np.log(np.asarray(seconds) + shift))) - shift) if len(seconds) else None


def size_of(row: Row) -> str:
    """small, medium or large; "unknown" where the problem could not be built."""
    if row.m is None:
        return "unknown"
    return next((size for size, most in SIZES.items() if row.m <= most), "large")


def recommendations(rows: Sequence[Row]) -> list[Recommended]:
    """By formulation and size, of judged rows; without instances that no row could build."""
    place = {(row.testset, row.instance): (row.formulation, size_of(row)) for row in rows if row.m is not None}
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (row.testset, row.instance) in place:
            grouped.setdefault(place[row.testset, row.instance], []).append(row)
    sizes = [*SIZES, "large"]
    order = sorted(grouped, key=lambda cell: (cell[0], sizes.index(cell[1])))
    return [_recommended(formulation, size, grouped[formulation, size]) for formulation, size in order]


def _recommended(formulation: str, size: str, rows: Sequence[Row]) -> Recommended:
    found = known(rows)
    solves = len({(row.testset, row.instance, row.seed, row.time_limit, row.threads) for row in rows})
    supporting = [summary for summary in summaries(rows) if summary.solves]
    asked = Counter(row.solver for row in rows if row.termination == Termination.INFEASIBLE)
    gaps = {
        its.solver: _gap_of_all(its, its.solves - asked[its.solver], solves - asked[its.solver]) for its in supporting
    }
    # Rounded, so that gaps that differ by less than SAME are the same.
    ranking = sorted(supporting, key=lambda its: (round(gaps[its.solver], 6), -its.proved / its.solves, _seconds(its)))
    as_good = [its for its in ranking if gaps[its.solver] <= gaps[ranking[0].solver] + AS_GOOD]
    of = {(row.testset, row.instance) for row in rows}
    bounded = sum(found[key].bound is not None for key in of)
    fastest = min(as_good, key=_seconds, default=None)
    if fastest is not None and _seconds(fastest) > CLEARLY_FASTER * _seconds(ranking[0]):
        fastest = ranking[0]
    return Recommended(formulation, size, len(of), tuple(ranking), bounded, fastest)


def _gap_of_all(summary: Summary, judged: int, solves: int) -> float:
    """Gap to best over all solves, of which a summary has the mean of some."""
    return ((summary.gap_to_best or 0.0) * judged + solves - judged) / solves if solves else 0.0


def _seconds(summary: Summary) -> float:
    assert summary.seconds is not None
    return summary.seconds
