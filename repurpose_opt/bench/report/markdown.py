"""The report as Markdown for a page in a repository; the pictures are files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from repurpose_opt.bench.report.document import (
    EMPTY,
    Block,
    Bullets,
    Charts,
    Command,
    Document,
    Facts,
    Paragraph,
    Pictures,
    Section,
    Table,
)

_MOST_COLUMNS = 17
"""Of a table that can be read on a page of a repository."""


def text(document: Document, folder: Path) -> tuple[str, list[Path]]:
    """The report, and the pictures that were written to the folder for it."""
    from repurpose_opt.bench.report import plots

    sections = [section for section in document.sections if not section.is_detail]
    written = []
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Charts):
                written.append(folder / _file(block))
                plots.draw(block, written[-1])
    lines = [f"# {escape(document.title)}", "", escape(document.lead), ""]
    said: set[str] = set()
    lines += _block(document.answer, said)
    lines += ["The same with each instance, sortable: `report.html` beside this file.", ""]
    lines += [line for section in sections for line in _section(section, 2, said)]
    return "\n".join(lines).rstrip() + "\n", written


def escape(words: str) -> str:
    """Plain text as Markdown that shows it unchanged, in a cell of a table as well."""
    marked = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", re.sub(r"[ \t\r\n]+", " ", words).strip(" "))
    return marked.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _section(section: Section, level: int, said: set[str]) -> Iterator[str]:
    yield from (f"{'#' * level} {escape(section.title)}", "")
    for block in section.blocks:
        yield from _block(block, said)


def _block(block: Block, said: set[str]) -> Iterator[str]:
    """`said` has the notes that stand under a table already."""
    match block:
        case Paragraph():
            yield from (escape(block.text), "")
        case Bullets():
            yield from (*(f"- {escape(item)}" for item in block.items), "")
        case Facts():
            yield from (*(f"- {escape(name)}: {escape(words)}" for name, words in block.items), "")
        case Command():
            yield from (*(f"    {line}" for line in block.text.splitlines()), "")
        case Table():
            yield from _table(block, said)
        case Charts():
            words = " ".join(chart.alternative for chart in block.charts)
            yield from (f"![{escape(words)}]({_file(block)})", "", escape(block.caption), "")
        case Pictures():
            return


def _table(table: Table, said: set[str]) -> Iterator[str]:
    if len(table.columns) > _MOST_COLUMNS:
        yield from (f"{escape(table.caption)}: {len(table.columns)} columns, in `report.html`.", "")
        return
    yield from (f"**{escape(table.caption)}**", "")
    yield _line(column.title for column in table.columns)
    yield "|" + "|".join("--:" if column.is_number else ":--" for column in table.columns) + "|"
    yield from (_line(cell.text for cell in row) for row in table.rows)
    yield ""
    notes = [f"{escape(column.title)}: {escape(column.note)}." for column in table.columns if column.note]
    notes = [note for note in notes if note not in said]
    said.update(notes)
    if notes:
        yield from ("<sub>" + " ".join(notes) + "</sub>", "")


def _line(cells: Iterator[str]) -> str:
    return "| " + " | ".join(escape(cell) or EMPTY for cell in cells) + " |"


def _file(charts: Charts) -> str:
    return f"report-{charts.name}.png"
