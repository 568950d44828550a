"""Judged rows, grouped as the sections need them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repurpose_opt.bench import statistics
from repurpose_opt.bench.row import Row
from repurpose_opt.bench.statistics import Known, Recommended, Summary

InstanceKey = tuple[str, str]
"""Test set and instance."""


@dataclass(frozen=True)
class Grouped:
    rows: tuple[Row, ...]
    """Judged."""
    known: Mapping[InstanceKey, Known]
    instances: Mapping[InstanceKey, tuple[Row, ...]]
    formulations: Mapping[str, tuple[Row, ...]]
    """Without rows whose problem could not be built."""
    series: Mapping[str, int]
    """Solver → its place among all solvers, which chooses its colour."""
    anchors: Mapping[InstanceKey, str]
    summaries: tuple[Summary, ...]
    recommended: tuple[Recommended, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Grouped:
        judged = statistics.judged(rows)
        instances: dict[InstanceKey, list[Row]] = {}
        formulations: dict[str, list[Row]] = {}
        for row in judged:
            instances.setdefault((row.testset, row.instance), []).append(row)
            if row.formulation:
                formulations.setdefault(row.formulation, []).append(row)
        return cls(
            tuple(judged),
            statistics.known(judged),
            {key: tuple(group) for key, group in instances.items()},
            {name: tuple(group) for name, group in sorted(formulations.items())},
            {solver: place for place, solver in enumerate(dict.fromkeys(row.solver for row in judged))},
            _anchors(list(instances)),
            tuple(statistics.summaries(judged)),
            tuple(statistics.recommendations(judged)),
        )


def leader(summaries: Sequence[Summary]) -> Summary | None:
    """The solver that others are compared with: least gap to best over all solves, those it leaves out counted as 1."""
    answering = [summary for summary in summaries if summary.answered and summary.gap_to_best is not None]
    return min(answering, key=rank, default=None)


def rank(summary: Summary) -> tuple[float, float]:
    """Gap to best over all solves, those that are not supported counted as 1, then seconds."""
    gap = 1.0 if summary.gap_to_best is None else summary.gap_to_best
    over_all = (summary.solves * gap + summary.unsupported) / max(1, summary.solves + summary.unsupported)
    return over_all, math.inf if summary.seconds is None else summary.seconds


def slug(words: str) -> str:
    """Letters, digits and dashes, for anchors and names of files."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _anchors(keys: Sequence[InstanceKey]) -> dict[InstanceKey, str]:
    """`instance-…`, unique."""
    anchors: dict[InstanceKey, str] = {}
    taken: set[str] = set()
    for testset, instance in keys:
        name = f"instance-{slug(f'{testset}-{instance}')}"
        count, anchor = 1, name
        while anchor in taken:
            count += 1
            anchor = f"{name}-{count}"
        taken.add(anchor)
        anchors[testset, instance] = anchor
    return anchors
