"""Stored answers with the problems that they are of, for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from repurpose_opt.bench.answer import Answer
from repurpose_opt.bench.fingerprint import fingerprint
from repurpose_opt.bench.results import ANSWERS
from repurpose_opt.bench.row import Row
from repurpose_opt.bench.testsets import test_set
from repurpose_opt.errors import RepurposeError
from repurpose_opt.problem import LayerProblem


class BestAnswers:
    """The problem of an instance and the owners (m,) of its best verified answer; builds each instance when asked."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.missing: dict[str, str] = {}
        """Instances that have an answer but no problem here, and why."""
        self._folder = folder
        self._best: dict[tuple[str, str], Row] = {}
        for row in rows:
            if row.objective is not None and row.has_answer:
                before = self._best.get((row.testset, row.instance))
                if before is None or before.objective is None or row.objective < before.objective:
                    self._best[row.testset, row.instance] = row

    def __call__(self, testset: str, instance: str) -> tuple[LayerProblem, NDArray[Any]] | None:
        """None where there is no answer; and where `missing` then says why the instance is not here."""
        row = self._best.get((testset, instance))
        if row is None:
            return None
        try:
            built = next((found.build() for found in test_set(testset) if found.name == instance), None)
            if built is None or fingerprint(*built) != row.fingerprint:
                self.missing[instance] = "it is another one now"
                return None
            answer = Answer.of_bytes((self._folder / ANSWERS / row.task.file).read_bytes(), built[0])
        except (RepurposeError, OSError) as error:
            self.missing[instance] = str(error)
            return None
        return None if answer.owner is None else (built[0], answer.owner)
