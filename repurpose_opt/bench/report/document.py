"""What a report is made of: sections of paragraphs, tables, charts and pictures. Both formats print the same one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

EMPTY = "–"
"""What an empty cell shows."""


@dataclass(frozen=True)
class Cell:
    """One cell; `value` is what a column of numbers is sorted by, None for an empty cell."""

    text: str = EMPTY
    value: float | None = None
    link: str = ""
    """Anchor of the same page."""


@dataclass(frozen=True)
class Column:
    title: str
    is_number: bool = True
    note: str = ""
    """What it means, printed below the table."""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of a row is its header."""

    block: ClassVar[str] = "table"
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    is_sortable: bool = True
    has_cards: bool = False
    """Whether each row is a card of its own on a narrow screen, rather than a line of a table that scrolls."""


@dataclass(frozen=True)
class Paragraph:
    block: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Bullets:
    block: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    block: ClassVar[str] = "facts"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Command:
    block: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True)
class Axis:
    """Positions on an axis and what is written at them; the scale is whatever put the curves there."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    edge: float | None = None
    """Where the scale ends and ticks begin that are no numbers: failures."""


@dataclass(frozen=True)
class Curve:
    """A line of points in the units of the axes; `series` chooses colour, dashes and marker."""

    series: int
    solver: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Chart:
    name: str
    """Unique in the report."""
    title: str
    alternative: str
    """What one sees, in words."""
    x: Axis
    y: Axis
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Charts:
    """Charts that share a legend."""

    block: ClassVar[str] = "charts"
    name: str
    charts: tuple[Chart, ...]
    legend: tuple[tuple[int, str], ...]
    """Series and solver."""
    caption: str


@dataclass(frozen=True)
class Picture:
    """A matrix as pixels, with the borders between workers as fractions of its sides."""

    title: str
    alternative: str
    png: bytes
    row_borders: tuple[float, ...]
    column_borders: tuple[float, ...]
    local: tuple[tuple[float, float, float, float], ...] = ()
    """x, y, width, height of the blocks that stay within a worker."""


@dataclass(frozen=True)
class Pictures:
    block: ClassVar[str] = "pictures"
    pictures: tuple[Picture, ...]


Block: TypeAlias = Paragraph | Bullets | Facts | Command | Table | Charts | Pictures


@dataclass(frozen=True)
class Section:
    title: str
    anchor: str
    blocks: tuple[Block, ...]
    parts: tuple[Section, ...] = ()
    is_detail: bool = False
    """Too long for a page in a repository: only the HTML report has it."""


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    """What was run, in one sentence."""
    answer: Table | Paragraph
    """Which solver to use."""
    sections: tuple[Section, ...]
