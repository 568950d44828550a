"""The report of a benchmark: one page for a browser, one for a repository, from the rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repurpose_opt.bench.report.instances import Layer
from repurpose_opt.bench.row import Row
from repurpose_opt.registry import check_importable

__all__ = ["Layer", "write_report"]


def write_report(
    folder: Path,
    rows: Sequence[Row],
    run: Mapping[str, Any],
    *,
    problem_and_owner: Layer | None = None,
    most_pictures: int = 80,
) -> list[Path]:
    """Write report.html, which is self-contained, and report.md with its PNGs; answers with what was written.

    `run` is what run.json holds (sessions, test sets, solvers, environment); what is missing is left out.
    `problem_and_owner(testset, instance)` gives a problem and the owners (m,) of its best answer, or None; it is
    called for as many instances as have pictures, `most_pictures` at most. The same arguments give the same bytes.
    Raises SolverNotInstalled without jinja2 or matplotlib.
    """
    check_importable("the report", "jinja2", "matplotlib")
    from repurpose_opt.bench.report import content, html, markdown

    document = content.document(rows, run, problem_and_owner, most_pictures)
    folder.mkdir(parents=True, exist_ok=True)
    page, readme = folder / "report.html", folder / "report.md"
    page.write_text(html.text(document), encoding="utf-8")
    text, pictures = markdown.text(document, folder)
    readme.write_text(text, encoding="utf-8")
    return [page, readme, *pictures]
