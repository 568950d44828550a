"""Charts as inline SVG: its colours are the page's, light or dark, and its text the page's own font."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from html import escape

from repurpose_opt.bench.report import series as look
from repurpose_opt.bench.report.document import Axis, Chart, Curve, Picture

_WIDTH = 560.0
_LEFT, _RIGHT, _TOP, _FLOOR = 78.0, 14.0, 10.0, 260.0
_MARKERS = {
    "o": "m-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s": "m-2.7-2.7h5.4v5.4h-5.4z",
    "^": "m0-3.6l3.3 6.3h-6.6z",
    "v": "m0 3.6l3.3-6.3h-6.6z",
    "<": "m-3.6 0l6.3 3.3v-6.6z",
    ">": "m3.6 0l-6.3 3.3v-6.6z",
    "D": "m0-3.7l3.7 3.7l-3.7 3.7l-3.7-3.7z",
    "P": "m-1.2-3.4h2.4v2.2h2.2v2.4h-2.2v2.2h-2.4v-2.2h-2.2v-2.4h2.2z",
    "X": "m-3.2-1.6l1.6-1.6l1.6 1.6l1.6-1.6l1.6 1.6l-1.6 1.6l1.6 1.6l-1.6 1.6l-1.6-1.6l-1.6 1.6l-1.6-1.6l1.6-1.6z",
}
"""From the middle of a marker; by the name that matplotlib has for it."""


def chart(of: Chart) -> str:
    """The chart as an <svg> element."""
    # Names of outcomes are written aslant and need more room below.
    height = _FLOOR + (48 if of.x.edge is None else 76)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH:g} {height:g}" aria-label="{escape(of.alternative)}">',
        *_x_axis(of.x),
        *_y_axis(of.y),
        *(part for curve in of.curves for part in _curve(of, curve)),
    ]
    if not of.curves:
        parts.append(_text("tick", "middle", _WIDTH / 2, _FLOOR / 2, "no data"))
    return "".join(parts) + "</svg>"


def swatch(series: int) -> str:
    """A line with its marker, for the legend."""
    line = f'<path d="M1 7H33"{_dashes(series)}/>'
    marker = _markers([("17", "7")], series)
    return f'<svg class="swatch s{look.color(series)}" viewBox="0 0 34 14" aria-hidden="true">{line}{marker}</svg>'


def picture(of: Picture) -> str:
    """A matrix with the borders between workers drawn over its pixels."""
    data = base64.b64encode(of.png).decode()
    lines = "".join(f"M0 {_short(100 * y)}H100" for y in of.row_borders)
    lines += "".join(f"M{_short(100 * x)} 0V100" for x in of.column_borders)
    local = "".join(
        f"M{_short(100 * x)} {_short(100 * y)}h{_short(100 * w)}v{_short(100 * h)}h-{_short(100 * w)}z"
        for x, y, w, h in of.local
    )
    return (
        f'<svg class="matrix" role="img" viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'aria-label="{escape(of.alternative)}">'
        f'<image width="100" height="100" preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
        + (f'<path class="local" d="{local}"/>' if local else "")
        + (f'<path class="border" d="{lines}"/>' if lines else "")
        + "</svg>"
    )


def _across(axis: Axis, value: float) -> float:
    span = max(axis.high - axis.low, 1e-9)
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(max((value - axis.low) / span, 0.0), 1.0)


def _up(axis: Axis, value: float) -> float:
    span = max(axis.high - axis.low, 1e-9)
    return _FLOOR - (_FLOOR - _TOP) * min(max((value - axis.low) / span, 0.0), 1.0)


def _x_axis(axis: Axis) -> Iterator[str]:
    yield _grid(f"M{_short(_across(axis, place))} {_TOP:g}V{_FLOOR:g}" for place, _ in axis.ticks)
    for place, text in axis.ticks:
        x = _across(axis, place)
        if axis.edge is not None and place > axis.edge:
            yield _text("tick outcome", "end", x, _FLOOR + 10, text, turned=-35)
        else:
            yield _text("tick", "middle", x, _FLOOR + 16, text)
    if axis.edge is not None:
        yield f'<path class="edge" d="M{_short(_across(axis, axis.edge))} {_TOP:g}V{_FLOOR:g}"/>'
    yield _text("label", "start", _LEFT, _FLOOR + 40, axis.label)


def _y_axis(axis: Axis) -> Iterator[str]:
    yield _grid(f"M{_LEFT:g} {_short(_up(axis, place))}H{_WIDTH - _RIGHT:g}" for place, _ in axis.ticks)
    for place, text in axis.ticks:
        yield _text("tick", "end", _LEFT - 6, _up(axis, place) + 4, text)
    yield _text("label", "middle", 13, (_TOP + _FLOOR) / 2, axis.label, turned=-90)


def _grid(lines: Iterable[str]) -> str:
    return f'<path class="grid" d="{"".join(lines)}"/>'


def _text(kind: str, anchor: str, x: float, y: float, words: str, turned: int = 0) -> str:
    turn = f"rotate({turned})" if turned else ""
    place = f'transform="translate({_short(x)} {_short(y)}){turn}"'
    return f'<text class="{kind}" text-anchor="{anchor}" {place}>{escape(words)}</text>'


def _curve(of: Chart, curve: Curve) -> Iterator[str]:
    points = [(_short(_across(of.x, x)), _short(_up(of.y, y))) for x, y in zip(curve.x, curve.y, strict=True)]
    yield f'<g class="curve s{look.color(curve.series)}" data-series="{curve.series}">'
    yield f"<title>{escape(curve.solver)}</title>"
    yield f'<path d="{_path(points)}"{_dashes(curve.series)}/>'
    yield _markers((points[index] for index in look.marked(len(points), curve.series)), curve.series)
    yield "</g>"


def _path(points: list[tuple[str, str]]) -> str:
    """Horizontal and vertical steps take a number each."""
    d, (x, y) = f"M{points[0][0]} {points[0][1]}", points[0]
    for to_x, to_y in points[1:]:
        if to_x == x and to_y == y:
            continue
        d += f"V{to_y}" if to_x == x else f"H{to_x}" if to_y == y else f"L{to_x} {to_y}"
        x, y = to_x, to_y
    return d


def _markers(points: Iterable[tuple[str, str]], series: int) -> str:
    shape = _MARKERS[look.marker(series)]
    return f'<path class="marker" d="{"".join(f"M{x} {y}{shape}" for x, y in points)}"/>'


def _dashes(series: int) -> str:
    dashes = look.dashes(series)
    return f' stroke-dasharray="{" ".join(map(str, dashes))}"' if dashes else ""


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
