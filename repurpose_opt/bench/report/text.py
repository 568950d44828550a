"""Numbers as an expert wants to read them, as cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from repurpose_opt.bench.report.document import Cell

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def significant(value: float, digits: int = 3) -> str:
    """Rounded to that many digits, without an exponent between 1e-4 and 1e7."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    magnitude = math.floor(math.log10(abs(value)))
    if not -5 < magnitude < 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def quantity(value: float, digits: int) -> str:
    """The same, but whole numbers as they are: bytes and their likes."""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e7 else significant(value, digits)


def percent(share: float) -> str:
    """0 and 100 % are said of nothing but themselves."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    if 0 < share < 0.00005:
        return "< 0.01 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{significant(100 * share, 2 if share < 0.1 else 3)} %"


def memory(n_bytes: float) -> str:
    power = min(int(math.log2(n_bytes) // 10), len(_BINARY_UNITS) - 1) if n_bytes >= 1 else 0
    figure = n_bytes / 1024**power
    return f"{significant(figure) if figure % 1 else f'{figure:.0f}'} {_BINARY_UNITS[power]}"


def counted(count: int, what: str) -> str:
    """`1 solve`, `2,000 solves`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def word(text: str, link: str = "") -> Cell:
    return Cell(text, None, link) if text else Cell()


def number(value: float | None, digits: int = 3) -> Cell:
    return Cell() if value is None else Cell(significant(value, digits), value)


def objective_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(quantity(value, 6), value)


def whole(value: int | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:,}", value)


def share(value: float | None) -> Cell:
    return Cell() if value is None else Cell(percent(value), value)


def bytes_cell(value: float | None) -> Cell:
    return Cell() if value is None else Cell(memory(value), value)


def spread(values: Iterable[float | None], printed: Callable[[float], str]) -> Cell:
    """Median, and the least and greatest where they differ from it as printed."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell()
    median = statistics.median(known)
    middle, low, high = (printed(value) for value in (median, min(known), max(known)))
    return Cell(middle if low == high else f"{middle} ({low} – {high})", median)
