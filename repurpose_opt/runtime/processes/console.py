"""What a worker says on standard error."""

from __future__ import annotations

import sys

PREFIX = "repurpose-opt worker: "
ERROR_PREFIX = f"{PREFIX}error: "


def print_error(error: object) -> None:
    """The one line of a run that failed, or of an input that could not be answered."""
    _print(f"{ERROR_PREFIX}{error}")


def print_note(note: object) -> None:
    _print(f"{PREFIX}{note}")


def _print(line: str) -> None:
    # One write: the lines of several processes do not get mixed.
    sys.stderr.write(line.replace("\n", " ") + "\n")
    sys.stderr.flush()
