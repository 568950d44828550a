"""Charts as PNG files for a page in a repository: four panels and their legend in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from repurpose_opt.bench.report import series as look
from repurpose_opt.bench.report.document import Chart, Charts

_INK, _GRID = "#333333", "#dddddd"
_ROW, _LEGEND_ROW = 3.7, 0.22
"""Inches."""


def draw(charts: Charts, path: Path) -> None:
    """All charts of the group, two a row, above their legend."""
    rows, legend_rows = (len(charts.charts) + 1) // 2, (len(charts.legend) + 3) // 4
    height = _ROW * rows + _LEGEND_ROW * legend_rows + 0.1
    figure = Figure(figsize=(11, height))
    axes = figure.subplots(rows, 2, squeeze=False)
    # Fixed margins: a layout engine would take longer than all the drawing.
    figure.subplots_adjust(
        left=0.07, right=0.985, top=1 - 0.3 / height, bottom=1 - (_ROW * rows - 0.8) / height, wspace=0.2, hspace=0.42
    )
    for axis, chart in zip(axes.flat, charts.charts, strict=False):
        _draw(axis, chart)
    handles = [Line2D([], [], **_style(series), label=solver.replace("$", r"\$")) for series, solver in charts.legend]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw(axis: Axes, chart: Chart) -> None:
    for curve in chart.curves:
        marked = look.marked(len(curve.x), curve.series)
        axis.plot(curve.x, curve.y, **_style(curve.series), markevery=list(marked))
    axis.set_title(chart.title, fontsize=10, color=_INK)
    axis.set(xlim=(chart.x.low, chart.x.high), ylim=(chart.y.low, chart.y.high))
    axis.set_xlabel(chart.x.label, fontsize=9, color=_INK)
    axis.set_ylabel(chart.y.label, fontsize=9, color=_INK)
    axis.set_xticks([place for place, _ in chart.x.ticks], [text for _, text in chart.x.ticks], fontsize=8)
    axis.set_yticks([place for place, _ in chart.y.ticks], [text for _, text in chart.y.ticks], fontsize=8)
    for (place, _), text in zip(chart.x.ticks, axis.get_xticklabels(), strict=True):
        if chart.x.edge is not None and place > chart.x.edge:
            text.set(rotation=35, ha="right")
    if chart.x.edge is not None:
        axis.axvline(chart.x.edge, color=_INK, linewidth=0.8)
    axis.grid(color=_GRID, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _style(series: int) -> dict[str, Any]:
    dashes = look.dashes(series)
    return {
        "color": look.COLORS[look.color(series)],
        "linestyle": (0, tuple(0.6 * length for length in dashes)) if dashes else "-",
        "linewidth": 1.5,
        "marker": look.marker(series),
        "markersize": 4,
    }
