"""Recomputes the figures of a run from its stored answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from repurpose_opt.bench.answer import Answer
from repurpose_opt.bench.fingerprint import fingerprint
from repurpose_opt.bench.judge import judge
from repurpose_opt.bench.results import ANSWERS
from repurpose_opt.bench.row import Row
from repurpose_opt.bench.testsets import test_set
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem

_FIGURES = ("termination", "failure", "objective", "bound", "surrogate_bound", "nmse", "volume", "busiest")
_SAME = 1e-6
"""Relative difference of a figure on another machine, whose sums have another order."""


@dataclass(frozen=True)
class Checked:
    """A row, and what its answer says otherwise: (column, in the file, recomputed)."""

    row: Row
    differences: tuple[tuple[str, Any, Any], ...]


def check(folder: Path, rows: Sequence[Row], relative_gap: Mapping[str, float]) -> Iterator[Checked]:
    """Every row that has an answer, instance by instance; each is built once. Raises what building it raises.

    `relative_gap` is what counted as a proof, by test set.
    """
    answered = sorted((row for row in rows if row.has_answer), key=_instance_of)
    for (testset, name), of_instance in groupby(answered, key=_instance_of):
        built = next((instance.build() for instance in test_set(testset) if instance.name == name), None)
        for row in of_instance:
            yield Checked(row, tuple(_differences(folder, row, built, relative_gap[testset])))


def _differences(
    folder: Path, row: Row, built: tuple[LayerProblem, Formulation] | None, relative_gap: float
) -> Iterator[tuple[str, Any, Any]]:
    if built is None:
        yield "instance", row.instance, None
        return
    problem, formulation = built
    if (found := fingerprint(problem, formulation)) != row.fingerprint:
        yield "fingerprint", row.fingerprint, found
        return
    try:
        answer = Answer.of_bytes((folder / ANSWERS / row.task.file).read_bytes(), problem)
    except (OSError, ValueError) as error:
        yield "answer", row.task.file, " ".join(str(error).split())
        return
    verdict = judge(problem, formulation, answer, relative_gap)
    for name in _FIGURES:
        stored, now = getattr(row, name), getattr(verdict, name)
        if not _are_same(stored, now):
            yield name, stored, now


def _are_same(stored: Any, now: Any) -> bool:
    if isinstance(stored, float) and isinstance(now, float):
        return math.isclose(stored, now, rel_tol=_SAME, abs_tol=1e-12)
    return bool(stored == now)


def _instance_of(row: Row) -> tuple[str, str]:
    return row.testset, row.instance
