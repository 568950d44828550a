"""The picture of a timeline: a lane for each worker."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import matplotlib as mpl
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.platform.timeline import Event, Kind, Timeline

Span: TypeAlias = tuple[int, float, float]
"""Worker, start and end in seconds."""
SUFFIXES = (".png", ".svg")
# Of Okabe & Ito, which people with colour-blindness tell apart too.
_COLORS: dict[Kind, str] = {"compute": "#0072b2", "overhead": "#cc79a7", "send": "#e69f00", "wait": "#dddddd"}
_LABELS: dict[Kind, str] = {"compute": "computes", "overhead": "overhead", "send": "sends", "wait": "waits"}
_INK = "#000000"
_LANE = 0.8
_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def draw_timeline(timeline: Timeline, path: Path) -> None:
    """Draws what each worker does over time, and outlines the critical path. PNG or SVG, by the name's end.

    Raises InvalidArgument for another end.
    """
    check_suffix(path)
    unit, name = next((pair for pair in _UNITS if timeline.total >= pair[0]), _UNITS[-1])
    n_workers = timeline.platform.n_workers
    figure = Figure(figsize=(10, 1.6 + 0.35 * n_workers), layout="constrained")
    axis = figure.subplots()
    events = list(timeline.events())
    kinds: list[Kind] = [kind for kind in _COLORS if any(event.kind == kind for event in events)]
    for kind in kinds:
        spans = _joined(event for event in events if event.kind == kind)
        axis.add_collection(PolyCollection(_bars(spans, unit), facecolor=_COLORS[kind]))
    path_bars = _bars(((event.worker, event.start, event.end) for event in timeline.critical_path), unit)
    axis.add_collection(PolyCollection(path_bars, facecolor="none", edgecolor=_INK, linewidth=1.2))
    handles = [Patch(facecolor=_COLORS[kind], label=_LABELS[kind]) for kind in kinds]
    handles.append(Patch(facecolor="none", edgecolor=_INK, label="critical path"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    axis.set_xlim(0, max(timeline.total, 1e-9) / unit)
    axis.set_ylim(n_workers - 0.5, -0.5)
    axis.set_yticks(range(n_workers), [f"worker {worker}" for worker in range(n_workers)])
    axis.set_xlabel(f"{name}, one batch of {timeline.batch_size} on {timeline.platform.name}")
    with mpl.rc_context({"svg.hashsalt": "repurpose-opt"}):
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def check_suffix(path: Path) -> None:
    """Raises InvalidArgument for a picture that could not be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidArgument("picture", path.name, f"a name that ends in {' or '.join(SUFFIXES)}")


def _joined(events: Iterable[Event]) -> list[Span]:
    """What one worker does without a pause is one span: a worker may send thousands of messages."""
    spans: list[Span] = []
    for event in events:
        if spans and spans[-1][0] == event.worker and spans[-1][1] <= event.start <= spans[-1][2]:
            spans[-1] = (event.worker, spans[-1][1], max(spans[-1][2], event.end))
        else:
            spans.append((event.worker, event.start, event.end))
    return spans


def _bars(spans: Iterable[Span], unit: float) -> list[list[tuple[float, float]]]:
    """Corners of a rectangle for each span."""
    bars = []
    for worker, start, end in spans:
        left, right, top, bottom = start / unit, end / unit, worker - _LANE / 2, worker + _LANE / 2
        bars.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    return bars
