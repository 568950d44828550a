"""Solvers side by side: which one to use, what each did, and how it fared against the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

from repurpose_opt.bench import statistics
from repurpose_opt.bench.report.document import EMPTY, Cell, Column, Paragraph, Table
from repurpose_opt.bench.report.grouped import Grouped, leader, rank
from repurpose_opt.bench.report.text import bytes_cell, counted, number, share, significant, whole, word
from repurpose_opt.bench.row import Row
from repurpose_opt.bench.statistics import Paired, Recommended, Summary

_SIZES = {"small": "m ≤ 64", "medium": "m 65–512", "large": "m > 512"}
_GAP_TO_BEST = Column(
    "Gap to best known",
    note="mean of (objective − least objective known) / objective; a solve without an answer counts as 100 %",
)
_GAP_TO_BOUND = Column(
    "Gap to bound",
    note="mean of (objective − highest valid bound of any solver) / objective, where an instance has a bound: "
    "the optimum is no further away than that; (2 of 5): so many instances have one",
)
_PROVED = Column("Proved optimal", note="share of the solves whose own bound proves their answer optimal")
_SECONDS = Column("Seconds", note="shifted geometric mean; a solve without an answer counts with its time limit")


def answer(grouped: Grouped) -> Table | Paragraph:
    """Which solver to use, by formulation and size."""
    if not grouped.recommended:
        return Paragraph("No solve was recorded, so there is nothing to recommend.")
    columns = (
        Column("Formulation and size", is_number=False),
        Column("Use", is_number=False),
        Column("Instances"),
        _GAP_TO_BEST,
        _GAP_TO_BOUND,
        _PROVED,
        _SECONDS,
        Column("Fastest within 1 %", is_number=False, note="of the gap to best known of the solver to use"),
    )
    rows = tuple(_recommendation(found) for found in grouped.recommended)
    return Table("Which solver should I use?", columns, rows, is_sortable=False, has_cards=True)


def _recommendation(found: Recommended) -> tuple[Cell, ...]:
    where = f"{found.formulation}, {found.size} ({_SIZES[found.size]})"
    best = next(iter(found.ranking), None)
    if best is None or not best.answered:
        return (Cell(where), Cell("none has an answer"), whole(found.instances), *(Cell() for _ in range(5)))
    fastest = found.fastest
    alternative = EMPTY if fastest is None else f"{fastest.solver}, {significant(fastest.seconds or 0, 2)} s"
    if fastest is not None and fastest.solver == best.solver:
        alternative = "the same"
    return (
        Cell(where),
        Cell(best.solver),
        whole(found.instances),
        share(best.gap_to_best),
        _of_bounded(best.gap_to_bound, found),
        share(_proved_share(best)),
        number(best.seconds, 2),
        Cell(alternative),
    )


def _of_bounded(gap: float | None, found: Recommended) -> Cell:
    """A gap to bounds, and how many instances have one if not all do."""
    cell = share(gap)
    if gap is None or found.bounded == found.instances:
        return cell
    return Cell(f"{cell.text} ({found.bounded} of {found.instances})", gap)


def summary_table(caption: str, summaries: Sequence[Summary]) -> Table:
    columns = (
        Column("Solver", is_number=False),
        _GAP_TO_BEST,
        Column("Best", note="share of the solves whose objective is the least known"),
        _GAP_TO_BOUND,
        _PROVED,
        _SECONDS,
        Column("Solves", note="those that the solver supports"),
        Column("Unsupported", note="solves that it declined, beside these"),
        Column("Answered", note="with an answer that holds, verified"),
        Column("Failures", is_number=False, note="solves without such an answer, by what happened"),
        Column("Refused claims", note="solves with a claim that does not hold"),
        Column("Imputed", note="solves without an answer that count with their time limit in the seconds"),
        Column("Overruns", note="solves that took more than 1.1 × their time limit + 1 s"),
        Column("Peak memory", note="most of any solve, beyond what the runner had"),
        Column("Cores", note="most CPU time over wall time of any solve"),
    )
    return Table(caption, columns, tuple(_summary(summary) for summary in sorted(summaries, key=rank)))


def _summary(summary: Summary) -> tuple[Cell, ...]:
    most_frequent = sorted(summary.failures.items(), key=lambda item: -item[1])
    failed = [f"{count:,}\u00a0{failure}" for failure, count in most_frequent if count]
    return (
        Cell(summary.solver),
        share(summary.gap_to_best),
        share(summary.best / summary.solves if summary.solves else None),
        share(summary.gap_to_bound),
        share(_proved_share(summary)),
        number(summary.seconds),
        whole(summary.solves),
        whole(summary.unsupported),
        whole(summary.answered),
        word(", ".join(failed)),
        whole(summary.refused),
        whole(summary.imputed),
        whole(summary.overruns),
        bytes_cell(summary.peak_bytes),
        Cell() if summary.most_cores is None else Cell(f"{summary.most_cores:.2f}", summary.most_cores),
    )


def _proved_share(summary: Summary) -> float | None:
    return summary.proved / summary.solves if summary.solves else None


def kinds_table(rows: Sequence[Row]) -> Table | None:
    """Gap to the best known of each solver, by kind of instance; None if there is one kind only."""
    kinds = sorted({row.kind for row in rows})
    if len(kinds) < 2:
        return None
    gaps = {}
    for kind in kinds:
        for summary in statistics.summaries([row for row in rows if row.kind == kind]):
            gaps[summary.solver, kind] = summary.gap_to_best
    solvers = dict.fromkeys(row.solver for row in rows)
    columns = (Column("Solver", is_number=False), *(Column(kind or "(no kind)") for kind in kinds))
    body = tuple((Cell(solver), *(share(gaps.get((solver, kind))) for kind in kinds)) for solver in solvers)
    return Table("Gap to the best known, by kind of instance", columns, body)


def paired_table(rows: Sequence[Row], summaries: Sequence[Summary]) -> Table | None:
    """Each solver beside the leader; None without a second solver that has answers."""
    best = leader(summaries)
    others = [summary.solver for summary in summaries if summary.answered and summary is not best]
    if best is None or not others:
        return None
    columns = (
        Column("Solver", is_number=False),
        Column("Instances", note="that both answered"),
        Column(
            "Ratio of objectives", note=f"geometric mean of the solver's over that of {best.solver}; above 1 is worse"
        ),
        Column("95 % from", note="BCa bootstrap over instances"),
        Column("95 % to"),
        Column("Wins", note="instances where the solver's median over seeds is the lesser"),
        Column("Ties"),
        Column("Losses"),
    )
    body = tuple(_paired(statistics.paired(rows, solver, best.solver)) for solver in others)
    body = tuple(sorted(body, key=lambda line: math.inf if line[2].value is None else line[2].value))
    return Table(f"Each solver against {best.solver}", columns, body)


def _paired(pair: Paired) -> tuple[Cell, ...]:
    figures = (number(value, 4) for value in (pair.ratio, pair.low, pair.high))
    counts = (whole(value) for value in (pair.wins, pair.ties, pair.losses))
    return (Cell(pair.first), whole(pair.instances), *figures, *counts)


def wins_table(rows: Sequence[Row]) -> Table | None:
    """Wins – ties – losses of every solver against every other."""
    solvers = list(dict.fromkeys(row.solver for row in rows))
    if len(solvers) < 2:
        return None
    counts = statistics.win_tie_loss(rows)
    titles = [f"{place}" for place in range(1, len(solvers) + 1)]
    columns = (Column("Solver", is_number=False), *(Column(title) for title in titles))
    body = tuple(
        (Cell(f"{title} {first}"), *(_wins(counts.get((first, second))) for second in solvers))
        for title, first in zip(titles, solvers, strict=True)
    )
    caption = "Wins – ties – losses of the solver in the row against that in the column, by instance that both support"
    return Table(caption, columns, body, is_sortable=False)


def _wins(counts: tuple[int, int, int] | None) -> Cell:
    return Cell() if counts is None else Cell(" – ".join(f"{count:,}" for count in counts), counts[0])


def imputations(summaries: Sequence[Summary]) -> str:
    """How many times were imputed, for the section on how things were measured."""
    imputed = sum(summary.imputed for summary in summaries)
    supported = sum(summary.solves for summary in summaries)
    return f"{counted(imputed, 'solve')} of {supported:,} had no answer and count with their time limit"
