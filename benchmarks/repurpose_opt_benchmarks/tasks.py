"""Tasks in processes of one core each, several at a time; a row a task, written at once and resumable."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import track

from repurpose_opt_benchmarks import ONE_THREAD

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Task = TypeVar("Task", bound=DataclassInstance)

Row = dict[str, Any]


def run(
    tasks: Sequence[Task], figures: Callable[[Task], Mapping[str, Any]], jobs: int, log: Path | None, what: str
) -> list[Row]:
    """A row for each task, in their order: its fields, which are its key, and the figures found for it.

    Tasks that have a row in the log (JSON lines) are not done again. They are begun in their order, so that those that
    share what a process keeps in memory should follow each other. `figures` is a function that can be pickled; `what`
    is what the progress bar calls the tasks.
    """
    key = partial(_key, [field.name for field in fields(tasks[0])] if tasks else [])
    done = {} if log is None or not log.exists() else {key(row): row for row in map(json.loads, log.open())}
    left = [task for task in tasks if key(asdict(task)) not in done]
    os.environ.update(ONE_THREAD)  # for the processes: the libraries read it when they load
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(_row, figures, task) for task in left]
        console = Console(stderr=True)
        finished = as_completed(waiting)
        try:
            for future in track(finished, what, len(waiting), console=console, disable=not console.is_terminal):
                row = future.result()
                done[key(row)] = row
                if log is not None:
                    with log.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done[key(asdict(task))] for task in tasks]


def _row(figures: Callable[[Task], Mapping[str, Any]], task: Task) -> Row:
    return {**asdict(task), **figures(task)}


def _key(names: Sequence[str], row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in names)
