"""A table of all instances, and a section for each: facts, its matrix before and after, every solver on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.bench.claims import ZERO, is_at_most
from repurpose_opt.bench.report.document import Block, Cell, Column, Facts, Paragraph, Pictures, Section, Table
from repurpose_opt.bench.report.grouped import Grouped, InstanceKey
from repurpose_opt.bench.report.pictures import before_and_after
from repurpose_opt.bench.report.text import (
    bytes_cell,
    counted,
    listed,
    objective_cell,
    percent,
    quantity,
    share,
    significant,
    spread,
    whole,
    word,
)
from repurpose_opt.bench.row import Row
from repurpose_opt.bench.statistics import Known
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Termination

Layer = Callable[[str, str], tuple[LayerProblem, NDArray[np.int64]] | None]
"""(testset, instance) → its problem and the owners (m,) of its best verified answer; None where there is none."""


def table(grouped: Grouped) -> Table:
    columns = (
        Column("Instance", is_number=False),
        Column("Test set", is_number=False),
        Column("Formulation", is_number=False),
        Column("Kind", is_number=False),
        Column("m", note="neurons"),
        Column("n", note="input values"),
        Column("P", note="workers"),
        Column("Nonzeros"),
        Column("Best known"),
        Column("Best bound"),
        Column("Gap", note="(best known − best bound) / best known; proved optimal at 0"),
        Column("Best solver", is_number=False, note="those whose objective is the best known; the fastest first"),
    )
    return Table("All instances", columns, tuple(_line(key, grouped) for key in grouped.instances))


def _line(key: InstanceKey, grouped: Grouped) -> tuple[Cell, ...]:
    row, known = _described(grouped.instances[key]), grouped.known.get(key)
    return (
        Cell(key[1], link=grouped.anchors[key]),
        Cell(key[0]),
        word(row.formulation),
        word(row.kind),
        *(whole(value) for value in (row.m, row.n, row.P, row.nonzeros)),
        objective_cell(known.objective if known else None),
        objective_cell(known.bound if known else None),
        share(_gap(known)),
        word(listed(_best_solvers(grouped.instances[key], known), 2)),
    )


def sections(grouped: Grouped, layer: Layer | None, most_pictures: int) -> tuple[Section, ...]:
    """One section an instance; the first `most_pictures` that have an answer have pictures."""
    made = []
    drawn = 0
    for key in grouped.instances:
        blocks: list[Block] = [_facts(key, grouped)]
        found = layer(*key) if layer is not None and drawn < most_pictures else None
        if found is not None:
            drawn += 1
            blocks.append(Pictures(before_and_after(*found)))
        blocks.append(_solvers(key, grouped))
        made.append(Section(key[1], grouped.anchors[key], tuple(blocks)))
    return tuple(made)


def notes(grouped: Grouped, layer: Layer | None, most_pictures: int) -> tuple[Block, ...]:
    """What the pictures of the sections show, and how many are left out."""
    if layer is None:
        return ()
    text = (
        "Pictures show |W|: the background is zero, three shades are thirds of the weights, and a pixel of a large "
        "matrix is the largest weight that it covers. Before: neurons in their order. After: neurons grouped by "
        "owner. Lines are borders between workers, shaded blocks stay within a worker: what lies outside has to be "
        "sent or pruned."
    )
    if len(grouped.instances) > most_pictures:
        text += f" To keep this page small, only the first {counted(most_pictures, 'instance')} have pictures."
    return (Paragraph(text),)


def _described(rows: Sequence[Row]) -> Row:
    """A row that knows the size of the problem, if any does."""
    return next((row for row in rows if row.m is not None), rows[0])


def _gap(known: Known | None) -> float | None:
    if known is None or known.objective is None or known.bound is None:
        return None
    return max(0.0, known.objective - known.bound) / max(abs(known.objective), ZERO)


def _best_solvers(rows: Sequence[Row], known: Known | None) -> list[str]:
    if known is None or known.objective is None:
        return []
    best = [row for row in rows if row.objective is not None and is_at_most(row.objective, known.objective)]
    return list(dict.fromkeys(row.solver for row in sorted(best, key=_seconds)))


def _seconds(row: Row) -> float:
    return float("inf") if row.seconds is None else row.seconds


def _facts(key: InstanceKey, grouped: Grouped) -> Facts:
    row, known = _described(grouped.instances[key]), grouped.known.get(key)
    size = f"{row.m:,} neurons, {row.n:,} values, {row.P} workers" if row.m is not None and row.n is not None else ""
    gap = _gap(known)
    proved = "proved optimal" if known is not None and known.is_proved else ""
    unsupported = dict.fromkeys(
        row.solver for row in grouped.instances[key] if row.termination == Termination.UNSUPPORTED
    )
    facts = (
        ("Test set", key[0]),
        ("Formulation", row.formulation),
        ("Kind", row.kind),
        ("Size", size),
        ("Nonzeros", whole(row.nonzeros).text if row.nonzeros is not None else ""),
        ("Direct volume", f"{row.direct_volume:,} bytes a sample" if row.direct_volume is not None else ""),
        ("Best known", objective_cell(known.objective).text if known and known.objective is not None else ""),
        ("Best bound", objective_cell(known.bound).text if known and known.bound is not None else ""),
        ("Gap", proved or (percent(gap) if gap is not None else "")),
        ("Judged", "once, at the end; nothing is tuned on it" if row.judge_once else ""),
        ("Not supported by", ", ".join(unsupported)),
    )
    return Facts(tuple((name, text) for name, text in facts if text))


def _solvers(key: InstanceKey, grouped: Grouped) -> Table:
    groups: dict[str, list[Row]] = {}
    for row in grouped.instances[key]:
        if row.termination == Termination.UNSUPPORTED:
            continue
        groups.setdefault(row.solver, []).append(row)
    columns = (
        Column("Solver", is_number=False),
        Column("Objective"),
        Column("From best known"),
        Column("Gap to its bound"),
        Column("Volume"),
        Column("Seconds"),
        Column("Peak memory"),
        Column("Ended", is_number=False),
    )
    known = grouped.known.get(key)
    lines = sorted((_solver(solver, rows, known) for solver, rows in groups.items()), key=_by_objective)
    caption = f"Solvers on {key[1]}: median over seeds (least – greatest)"
    return Table(caption, columns, tuple(lines), is_sortable=False)


def _by_objective(line: tuple[Cell, ...]) -> tuple[float, float]:
    objective, seconds = line[1].value, line[5].value
    return (
        float("inf") if objective is None else objective,
        float("inf") if seconds is None else seconds,
    )


def _solver(solver: str, rows: Sequence[Row], known: Known | None) -> tuple[Cell, ...]:
    objective = spread((row.objective for row in rows), lambda value: quantity(value, 5))
    beyond = None
    if objective.value is not None and known is not None and known.objective is not None:
        beyond = max(0.0, objective.value - known.objective) / max(abs(objective.value), ZERO)
    return (
        Cell(solver),
        objective,
        share(beyond),
        _median_share(rows),
        spread((row.volume for row in rows), lambda value: f"{value:,.0f}"),
        spread((row.seconds for row in rows if row.objective is not None), lambda value: significant(value, 2)),
        bytes_cell(max((row.peak_bytes for row in rows if row.peak_bytes is not None), default=None)),
        Cell(_endings(rows)),
    )


def _median_share(rows: Sequence[Row]) -> Cell:
    gaps = [gap for row in rows if (gap := row.gap) is not None]
    return share(float(np.median(gaps)) if gaps else None)


def _endings(rows: Sequence[Row]) -> str:
    """`optimal`, or `2 optimal, 1 crash` where seeds differ."""
    counts = Counter(row.failure.value if row.failure else row.termination.replace("_", " ") for row in rows)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count}\u00a0{what}" for what, count in counts.most_common())
