"""Values of options, tables and messages, for all verbs."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repurpose_opt.errors import InvalidArgument

PROGRAM = "repurpose-opt"
FAILED = 1


def fail(message: str) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return FAILED


def add_verb(verbs: Any, name: str, summary: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return verb


def positive(text: str) -> int:
    return int(_checked(text, int, lambda value: value >= 1, "a whole number ≥ 1"))


def natural(text: str) -> int:
    return int(_checked(text, int, lambda value: value >= 0, "a whole number ≥ 0"))


def price(text: str) -> float:
    return _checked(text, float, lambda value: 0 <= value < math.inf, "a finite number ≥ 0")


def fraction(text: str) -> float:
    return _checked(text, float, lambda value: 0 <= value <= 1, "a number in [0, 1]")


def seconds(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value < math.inf, "seconds > 0")


def gibibytes(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value < math.inf, "GiB > 0")


def loads(text: str) -> float | list[float]:
    found = [_checked(part, float, lambda value: value >= 0, "numbers ≥ 0 with commas") for part in text.split(",")]
    return found[0] if len(found) == 1 else found


def _checked(text: str, convert: Any, accepts: Any, allowed: str) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
    return value


def check_output(output: Path, args: argparse.Namespace) -> None:
    """Finds out before the work, not after it, that the answer could not be written."""
    if output.resolve() == args.file.resolve():
        args.usage_error("--output would replace FILE")
    if not output.parent.is_dir():
        raise InvalidArgument("--output", f"{output}, in a folder that does not exist", "an existing folder")
    if output.is_dir():
        raise InvalidArgument("--output", f"{output}, a folder", "the name of a file")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
