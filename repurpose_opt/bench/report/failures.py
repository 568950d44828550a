"""Solves that failed and claims that do not hold, alike ones together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from repurpose_opt.bench.report.document import Block, Cell, Column, Paragraph, Table
from repurpose_opt.bench.report.grouped import Grouped
from repurpose_opt.bench.report.text import counted, listed, whole
from repurpose_opt.bench.row import Row

MOST_GROUPS = 60
_MOST_WORDS = 240


@dataclass(frozen=True)
class _Finding:
    row: Row
    what: str
    message: str


def blocks(grouped: Grouped) -> tuple[Block, ...]:
    failures = [_Finding(row, row.failure.value, row.message) for row in grouped.rows if row.failure is not None]
    refused = [_Finding(row, "refused claim", claim) for row in grouped.rows for claim in row.refused]
    return (
        *_listing("Failures", failures, "No solve failed."),
        *_listing("Refused claims", refused, "No claim of a backend was refused."),
    )


def _listing(caption: str, findings: Sequence[_Finding], none: str) -> Iterator[Block]:
    if not findings:
        yield Paragraph(none)
        return
    groups = _groups(findings)
    columns = (
        Column("Solver", is_number=False),
        Column("What", is_number=False),
        Column("Solves"),
        Column("Where", is_number=False),
        Column("Message (of the first)", is_number=False),
    )
    yield Table(caption, columns, tuple(_line(group) for group in groups[:MOST_GROUPS]))
    left = groups[MOST_GROUPS:]
    if left:
        solves = sum(len(group) for group in left)
        yield Paragraph(
            f"{counted(len(left), 'more group')} of alike ones ({counted(solves, 'solve')}) are left out here."
        )


def _groups(findings: Sequence[_Finding]) -> list[list[_Finding]]:
    """Alike: the same solver and message but for its numbers. The most frequent first."""
    groups: dict[tuple[str, str, str], list[_Finding]] = {}
    for finding in findings:
        key = (finding.row.solver, finding.what, re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", finding.message))
        groups.setdefault(key, []).append(finding)
    return sorted(groups.values(), key=len, reverse=True)


def _line(group: Sequence[_Finding]) -> tuple[Cell, ...]:
    seeds: dict[str, list[str]] = {}
    for finding in group:
        seeds.setdefault(finding.row.instance, []).append(str(finding.row.seed))
    where = [f"{instance} ({'seed' if len(of) == 1 else 'seeds'} {', '.join(of)})" for instance, of in seeds.items()]
    message = " ".join(group[0].message.split())
    cut = message[: _MOST_WORDS - 1] + "…" if len(message) > _MOST_WORDS else message
    return (
        Cell(group[0].row.solver),
        Cell(group[0].what),
        whole(len(group)),
        Cell(listed(where, 3)),
        Cell(cut) if cut else Cell(),
    )
