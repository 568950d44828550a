"""The folder of a run: rows.csv with a row a solve, run.json with what they were made by, and the answers.

A row is written and flushed when its solve ends, so that a run which is killed loses none.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from repurpose_opt.bench.row import SCHEMA, Failure, Row
from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.registry import check_importable

ROWS, RUN, ANSWERS, _LOCK = "rows.csv", "run.json", "answers", ".lock"
COLUMNS = tuple(field.name for field in fields(Row))
_SEPARATOR = " | "
_RUN_KEYS = {"schema", "sessions", "testsets", "solvers", "environment"}
_DIGITS = 6
"""Of the numbers of a trajectory, which are for curves."""
_MOST_TEXT = 1000
"""Characters of a message: backends say anything, and `csv` reads no cell above 128 KiB."""


class ResultsError(RepurposeError):
    """The folder of a run is damaged, in use, or of another run."""


def read_rows(folder: Path) -> list[Row]:
    """All rows; a last line that was cut off is left out. Raises ResultsError, naming the line."""
    path = folder / ROWS
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{path}: {getattr(error, 'strerror', None) or 'no text'}; the folder of a run has one"
        ) from None
    # Not str.splitlines: it also splits at characters that a name may have.
    reader = csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    header = next(reader, None)
    if header is None:  # killed before its first line was whole
        return []
    if header != list(COLUMNS):
        strange = sorted(set(header) ^ set(COLUMNS))
        raise ResultsError(f"{path}: other columns than schema {SCHEMA} has ({', '.join(strange)})")
    rows: list[Row] = []
    for cells in reader:
        try:
            rows.append(_row(cells))
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path}, line {reader.line_num}: {' '.join(str(error).split())}") from None
        if rows[-1].schema != SCHEMA:
            raise ResultsError(f"{path}, line {reader.line_num}: schema {rows[-1].schema}; this version reads {SCHEMA}")
    return rows


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json holds. Raises ResultsError."""
    path = folder / RUN
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: {' '.join(str(error).split())}; the folder of a run has one") from None
    missing = _RUN_KEYS - set(run if isinstance(run, dict) else ())
    if missing or run["schema"] != SCHEMA or not run["sessions"]:
        what = f"no {', '.join(sorted(missing))}" if missing else f"schema {run['schema']}; this version reads {SCHEMA}"
        raise ResultsError(f"{path}: {what}")
    return run


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Write beside the file and rename, so that it is always whole."""
    part = folder / f"{RUN}.part"
    part.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / RUN)


class RowFile:
    """rows.csv, to be appended to."""

    def __init__(self, folder: Path) -> None:
        path = folder / ROWS
        self._stream = path.open("a+", encoding="utf-8", errors="backslashreplace", newline="")
        self._cut_torn_line()
        self._writer = csv.writer(self._stream, lineterminator="\n")
        if self._stream.tell() == 0:
            self._write(COLUMNS)

    def append(self, row: Row) -> None:
        row = replace(row, message=_line(row.message), refused=tuple(map(_line, row.refused)))
        self._write([_cell(getattr(row, name)) for name in COLUMNS])

    def close(self) -> None:
        self._stream.close()

    def _write(self, cells: Sequence[str]) -> None:
        self._writer.writerow(cells)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _cut_torn_line(self) -> None:
        """A run killed while it wrote leaves a line without its end."""
        data = Path(self._stream.name).read_bytes()
        self._stream.truncate(data.rfind(b"\n") + 1)
        self._stream.seek(0, os.SEEK_END)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Raises ResultsError while another process writes in the folder; a lock ends with the process that has it."""
    import fcntl

    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(f"{folder}: another run writes there; wait for it, or choose another folder") from None
        yield


def write_parquet(path: Path, rows: Sequence[Row], run: Mapping[str, Any]) -> None:
    """All columns with their types, and run.json as metadata `repurpose_opt.run`. Raises SolverNotInstalled."""
    check_importable("Parquet", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    of_python = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    listed = {
        "refused": pyarrow.list_(pyarrow.string()),
        "trajectory": pyarrow.list_(pyarrow.list_(pyarrow.float64(), 2)),
        "failure": pyarrow.string(),
    }
    types = {name: listed.get(name) or of_python[_PLAIN[name]] for name in COLUMNS}
    schema = pyarrow.schema(list(types.items()), metadata={"repurpose_opt.run": json.dumps(run)})
    columns = {name: [_stored(getattr(row, name)) for row in rows] for name in COLUMNS}
    parquet.write_table(pyarrow.table(columns, schema=schema), path)


def _stored(value: Any) -> Any:
    if isinstance(value, Failure):
        return str(value)
    return (
        [list(entry) if isinstance(entry, tuple) else entry for entry in value] if isinstance(value, tuple) else value
    )


def _plain(hint: Any) -> type:
    """int of `int | None`."""
    if isinstance(hint, UnionType):
        hint = next(option for option in get_args(hint) if option is not type(None))
    return hint if isinstance(hint, type) else tuple


_PLAIN = {name: _plain(hint) for name, hint in get_type_hints(Row).items() if name in COLUMNS}


def _cell(value: Any) -> str:
    """Empty for None; floats with all their digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return " ".join(f"{at:.{_DIGITS}g}:{cost:.{_DIGITS}g}" for at, cost in value)
        return _SEPARATOR.join(entry.replace("|", "/") for entry in value)
    return str(value) if isinstance(value, str) else repr(value)


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_TEXT else f"{line[: _MOST_TEXT - 1]}…"


def _row(cells: Sequence[str]) -> Row:
    return Row(**{name: _value(name, cell) for name, cell in zip(COLUMNS, cells, strict=True)})


def _value(name: str, cell: str) -> Any:
    if name == "refused":
        return tuple(cell.split(_SEPARATOR)) if cell else ()
    if name == "trajectory":
        return tuple((float(at), float(cost)) for at, _, cost in (step.partition(":") for step in cell.split()))
    kind = _PLAIN[name]
    if kind is str:
        return cell
    if cell == "":
        return None
    return bool(int(cell)) if kind is bool else kind(cell)


def check_folder(folder: Path) -> Path:
    """The folder, if it is one. Raises InvalidArgument."""
    if not folder.is_dir():
        raise InvalidArgument("DIR", f"{folder}, which is no folder", "the --output of a bench run")
    return folder
