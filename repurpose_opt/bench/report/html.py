"""The report as one page that needs nothing but itself."""

from __future__ import annotations

import re
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from repurpose_opt.bench.report import svg
from repurpose_opt.bench.report.document import Cell, Chart, Document, Picture


def text(document: Document) -> str:
    environment = Environment(
        loader=PackageLoader("repurpose_opt.bench", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(chart=_chart, picture=_picture, swatch=_swatch, breakable=_breakable, key=_key)
    page = environment.get_template("template.html.j2")
    return page.render(document=document, style=_resource("style.css"), script=_resource("sort.js"))


def _resource(name: str) -> Markup:
    return Markup((files("repurpose_opt.bench.report") / name).read_text(encoding="utf-8"))


def _chart(of: Chart) -> Markup:
    return Markup(svg.chart(of))


def _picture(of: Picture) -> Markup:
    return Markup(svg.picture(of))


def _swatch(series: int) -> Markup:
    return Markup(svg.swatch(series))


def _breakable(words: str) -> Markup:
    """Long names of solvers and instances may break after their joints."""
    return Markup(re.sub(r"(?<=\S)([+/_,])(?=\S)", r"\1<wbr>", str(escape(words))))


def _key(cell: Cell) -> str:
    """What a number is sorted by."""
    return "" if cell.value is None else f"{cell.value:.9g}"
