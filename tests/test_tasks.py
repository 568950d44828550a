"""Tasks in other processes, which import this file: it imports nothing that is slow to load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from repurpose_opt_benchmarks import tasks


@dataclass(frozen=True)
class Number:
    value: int
    name: str


def square(folder: Path, number: Number) -> dict[str, Any]:
    (folder / str(number.value)).touch(exist_ok=False)  # a task that is done again fails
    return {"square": number.value**2}


def test_tasks_that_have_a_row_are_not_done_again(tmp_path: Path) -> None:
    log = tmp_path / "log.rows.jsonl"
    two, three, four = (Number(value, "n") for value in (2, 3, 4))
    figures = partial(square, tmp_path)
    assert tasks.run([three, two], figures, 1, log, "numbers") == [
        {"value": 3, "name": "n", "square": 9},
        {"value": 2, "name": "n", "square": 4},
    ]
    (tmp_path / "3").unlink()
    found = tasks.run([two, four, Number(3, "other")], figures, 1, log, "numbers")
    assert [row["square"] for row in found] == [4, 16, 9]
    assert [json.loads(line) for line in log.read_text().splitlines()[2:]] == found[1:]


def test_no_tasks_have_no_rows() -> None:
    assert tasks.run([], square, 1, None, "numbers") == []
