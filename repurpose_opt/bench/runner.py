"""Runs tasks on an executor and writes a row for each as soon as it ends."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path

from repurpose_opt.bench.results import ANSWERS, ResultsError, RowFile
from repurpose_opt.bench.row import Row, Task
from repurpose_opt.bench.server import Request
from repurpose_opt.bench.slot import row_of

Progress = Callable[[int, float | None, str], None]
"""Called with the rows that were added, the seconds left (None: not known) and what was done last."""


@dataclass(frozen=True)
class Limits:
    """Of the solves of one test set."""

    memory_limit: int
    """Bytes of a solve."""
    relative_gap: float
    """Relative difference of objective and bound that counts as a proof."""
    grace: float
    """Seconds beyond its time limit after which a solve is ended."""


def run(
    tasks: Sequence[Task],
    done: Sequence[Row],
    folder: Path,
    executor: Executor,
    jobs: int,
    limits: Mapping[str, Limits],
    progress: Progress,
) -> list[Row]:
    """The rows of the tasks that `done` has none of, in the order in which they ended; `jobs` run at a time.

    `limits` are by test set. Raises ResultsError when the executor breaks.
    """
    finished = {row.task for row in done}
    left = [task for task in tasks if task not in finished]
    pace = Pace(left, done, jobs)
    (folder / ANSWERS).mkdir(exist_ok=True)
    rows: list[Row] = []
    file = RowFile(folder)
    try:
        for row, answer in _as_completed(left, executor, 2 * jobs, limits):
            if answer is not None:
                (folder / ANSWERS / row.task.file).write_bytes(answer)
            file.append(row)
            rows.append(row)
            pace.add(row)
            progress(len(rows), pace.seconds_left, f"{row.solver} on {row.instance}")
    except BrokenExecutor as error:
        raise ResultsError(f"the executor broke ({error}); the same command goes on") from None
    finally:
        file.close()
    return rows


def _as_completed(
    tasks: Sequence[Task], executor: Executor, most: int, limits: Mapping[str, Limits]
) -> Iterator[tuple[Row, bytes | None]]:
    """Hands over a few tasks at a time, so that an interrupted run does not wait for all that are queued."""
    waiting: set[Future[tuple[Row, bytes | None]]] = set()
    queue = iter(tasks)
    try:
        while True:
            while len(waiting) < most and (task := next(queue, None)) is not None:
                its = limits[task.testset]
                request = Request(task, its.memory_limit, its.relative_gap, its.grace)
                waiting.add(executor.submit(row_of, request))
            if not waiting:
                return
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    finally:
        for future in waiting:
            future.cancel()


class Pace:
    """Expects of each task left what its solver took on average; without a row of it, what all took."""

    def __init__(self, left: Sequence[Task], done: Sequence[Row], jobs: int) -> None:
        self._left = Counter(task.solver for task in left)
        self._taken: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # seconds and rows
        self._jobs = jobs
        for row in done:
            self._count(row)

    def add(self, row: Row) -> None:
        self._left[row.solver] -= 1
        self._count(row)

    @property
    def seconds_left(self) -> float | None:
        seconds, rows = map(sum, zip(*self._taken.values(), strict=True)) if self._taken else (0.0, 0.0)
        if rows == 0:
            return None
        means = {solver: taken / count for solver, (taken, count) in self._taken.items()}
        return sum(count * means.get(solver, seconds / rows) for solver, count in self._left.items()) / self._jobs

    def _count(self, row: Row) -> None:
        self._taken[row.solver][0] += (row.seconds or 0.0) + (row.overhead or 0.0)
        self._taken[row.solver][1] += 1
