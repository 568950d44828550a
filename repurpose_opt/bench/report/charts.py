"""What the charts show, as positions on their axes: profiles, incumbents over time, time to a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from repurpose_opt.bench import statistics
from repurpose_opt.bench.claims import AS_GOOD
from repurpose_opt.bench.report.document import Axis, Chart, Charts, Curve
from repurpose_opt.bench.report.grouped import Grouped, slug
from repurpose_opt.bench.report.text import percent, significant
from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.bench.statistics import Profile

_POINTS = 50
"""Most points of a curve; more cannot be told apart at the size of a chart."""
_OUTCOMES = ("best is 0", "beyond 1 %", "time-out", "failed", "infeasible", "unsupported", "not run")
_REASONS = {
    Failure.TIMEOUT.value: "time-out",
    Failure.NO_ANSWER.value: "time-out",
    "infeasible": "infeasible",
    "unsupported": "unsupported",
    "worse": "beyond 1 %",
    "missing": "not run",
}
_KNOTS = (1.0, 1.01, 1.1, 2.0)
"""A unit of the axis of ratios each; above the last, a unit is a factor of ten."""

_OBJECTIVES = {"lossless": "priced volume"}
"""What the objective of a formulation is, if there is a word for it."""

Scale = Callable[[float], float]


def formulation_charts(name: str, rows: Sequence[Row], grouped: Grouped) -> Charts:
    """Four charts of the solves of one formulation."""
    charts = (
        profile_chart(name, statistics.profile(rows, "objective"), grouped.series),
        profile_chart(name, statistics.profile(rows, "seconds"), grouped.series),
        anytime_chart(name, statistics.anytime(rows), grouped.series),
        target_chart(name, statistics.times_to_target(rows, AS_GOOD), grouped.series),
    )
    drawn = {curve.series for chart in charts for curve in chart.curves}
    legend = tuple((place, solver) for solver, place in grouped.series.items() if place in drawn)
    caption = (
        "Profiles (Dolan and Moré 2002): the share of solves whose measure is within a ratio of the best of their "
        "instance; higher is better. Right of the line, solves without a ratio are added one outcome at a time. "
        "Axes of ratios are stretched near 1. Times count where the answer is within 1 % of the best known, as bad "
        "answers are fast. Incumbents over time are the backends' own claims."
    )
    return Charts(f"charts-{slug(name)}", charts, legend, caption)


def ratio_position(ratio: float) -> float:
    """Linear between the knots, logarithmic above them."""
    if ratio > _KNOTS[-1]:
        return len(_KNOTS) - 1 + math.log10(ratio / _KNOTS[-1])
    return float(np.interp(ratio, _KNOTS, range(len(_KNOTS))))


def profile_chart(formulation: str, profile: Profile, series: Mapping[str, int]) -> Chart:
    finite = [ratio for ratios in profile.ratios.values() for ratio in ratios if math.isfinite(ratio)] or [1.0]
    scale = ratio_position if profile.measure == "objective" else _log
    edge = 1.02 * max(scale(max(finite)), 0.3)
    ticks = ratio_ticks(finite) if profile.measure == "objective" else _log_ticks(0.0, edge)
    counts = [_outcomes(profile, solver) for solver in profile.ratios]
    present = [outcome for outcome in _OUTCOMES if any(count[outcome] for count in counts)]
    step = 0.09 * edge
    right = [(edge + step * place, outcome) for place, outcome in enumerate(present, start=1)]
    what = "time" if profile.measure == "seconds" else _OBJECTIVES.get(formulation, "objective")
    x_axis = Axis(
        f"{what} / best of the instance",
        0.0,
        edge + step * (len(present) + 0.5),
        (*((place, text) for place, text in ticks if place <= edge), *right),
        edge if present else None,
    )
    curves = tuple(
        Curve(series[solver], solver, *_profile_curve(profile, solver, scale, edge, right)) for solver in profile.ratios
    )
    within = " of answers within 1 %" if profile.measure == "seconds" else ""
    name, title = f"{formulation}-profile-{profile.measure}", f"Performance profile: {what}{within}"
    return Chart(name, title, _profile_words(what, profile), x_axis, _share_axis(), curves)


def _profile_curve(
    profile: Profile, solver: str, scale: Scale, edge: float, right: Sequence[tuple[float, str]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Steps up at each ratio, then by the share of each outcome at its tick."""
    places = [scale(ratio) for ratio in profile.ratios[solver] if math.isfinite(ratio)]
    x, y = _steps(places, profile.solves, 0.0, edge)
    outcomes = _outcomes(profile, solver)
    height = y[-1]
    for place, outcome in right:
        x, y = (*x, place, place), (*y, height, height + outcomes[outcome] / max(1, profile.solves))
        height = y[-1]
    return x, y


def _outcomes(profile: Profile, solver: str) -> dict[str, int]:
    """Counts by what the right edge tells apart; a ratio to a best of 0 is infinite."""
    counts = dict.fromkeys(_OUTCOMES, 0)
    counts["best is 0"] = sum(math.isinf(ratio) for ratio in profile.ratios[solver])
    for reason, count in profile.failed.get(solver, {}).items():
        counts[_REASONS.get(str(reason), "failed")] += count
    return counts


def _profile_words(what: str, profile: Profile) -> str:
    if not any(profile.ratios.values()):
        return f"Performance profile of the {what}: no solve has an answer."
    shares = {solver: sum(r <= 1 + statistics.SAME for r in ratios) for solver, ratios in profile.ratios.items()}
    most = max(shares, key=lambda solver: shares[solver])
    return (
        f"Performance profile of the {what} of {len(profile.ratios)} solvers. {most} is most often "
        f"{'the first within 1 % of the best known' if profile.measure == 'seconds' else 'the best'}, "
        f"in {percent(shares[most] / max(1, profile.solves))} of the solves."
    )


def anytime_chart(
    formulation: str, curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]], series: Mapping[str, int]
) -> Chart:
    ratios = [ratio for _, y in curves.values() for ratio in y if math.isfinite(ratio)]
    x_axis, scale = _seconds_axis(second for x, _ in curves.values() for second in x)
    drawn = []
    for solver, (x, y) in curves.items():
        points = [(scale(a), ratio_position(max(b, 1.0))) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
        if points:
            drawn.append(Curve(series[solver], solver, *_columns(_thinned(points))))
    ends = {solver: y[-1] for solver, (_, y) in curves.items() if y}
    best = min(ends, key=lambda solver: ends[solver], default=None)
    words = "Mean ratio of the incumbent to the least known objective over time"
    words += ": no solver tells of incumbents." if best is None else f"; {best} ends at {significant(ends[best], 4)}."
    top = max([ratio_position(ratio) for ratio in ratios], default=1.0)
    y_axis = Axis("incumbent / best known", 0.0, max(top, 0.3) * 1.03, ratio_ticks(ratios))
    return Chart(f"{formulation}-anytime", "Incumbent over time", words, x_axis, y_axis, tuple(drawn))


def target_chart(
    formulation: str, times: Mapping[str, tuple[tuple[float, ...], int]], series: Mapping[str, int]
) -> Chart:
    x_axis, scale = _seconds_axis(second for reached, _ in times.values() for second in reached)
    curves = []
    for solver, (reached, never) in times.items():
        if reached:
            places = [max(scale(second), x_axis.low) for second in reached]
            curves.append(Curve(series[solver], solver, *_steps(places, len(reached) + never, x_axis.low, x_axis.high)))
    shares = {solver: len(reached) / max(1, len(reached) + never) for solver, (reached, never) in times.items()}
    most = max(shares, key=lambda solver: shares[solver], default=None)
    words = f"Share of solves with an incumbent within {100 * AS_GOOD:g} % of the best known, over time"
    words += ": none." if most is None else f"; {most} reaches it most often, in {percent(shares[most])}."
    name, title = f"{formulation}-target", f"Time to {100 * AS_GOOD:g} % of the best known"
    return Chart(name, title, words, x_axis, _share_axis(), tuple(curves))


def _share_axis() -> Axis:
    ticks = ((0.0, "0"), (0.25, "25 %"), (0.5, "50 %"), (0.75, "75 %"), (1.0, "100 %"))
    return Axis("share of solves", 0.0, 1.02, ticks)


def ratio_ticks(ratios: Sequence[float]) -> tuple[tuple[float, str], ...]:
    """Marks of an axis of ratios up to the largest, as many as there is room for."""
    most = max(ratios, default=1.1)
    fine = [1.005, 1.05, 1.5] if most < 20 else []
    stride = 1 + int(math.log10(most)) // 5
    marks = sorted([*_KNOTS, *fine, *(10.0**power for power in range(1, 300, stride))])
    return tuple((ratio_position(mark), f"{mark:g}") for mark in marks if mark <= max(most, 1.01) * (1 + 1e-9))


def _log_ticks(low: float, high: float) -> tuple[tuple[float, str], ...]:
    """Marks between two logarithms: powers of ten, and where the range is short 2 and 5 of them."""
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    stride = 1 + int(high - low) // 7
    marks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1, stride) for step in steps]
    return tuple((math.log10(mark), f"{mark:g}") for mark in marks if low <= math.log10(mark) <= high)


def _seconds_axis(seconds: Iterable[float]) -> tuple[Axis, Scale]:
    logs = [_log(second) for second in seconds] or [0.0]
    low, high = min(logs), max(logs)
    margin = max(0.02 * (high - low), 0.2 - (high - low) / 2)
    return Axis("seconds", low - margin, high + margin, _log_ticks(low - margin, high + margin)), _log


def _log(value: float) -> float:
    """Of times of 0 as well, which are too short to be told from a tenth of a millisecond."""
    return math.log10(max(value, 1e-4))


def _steps(
    places: Sequence[float], count: int, start: float, end: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Corners of the staircase that rises by 1 / count at each place."""
    points = [(place, (index + 1) / max(1, count)) for index, place in enumerate(places)]
    corners, height = [(start, 0.0)], 0.0
    for place, level in _thinned(points):
        corners += [(place, height), (place, level)]
        height = level
    return _columns([*corners, (end, height)])


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _POINTS of them, evenly, and the last; of equal places the last."""
    last = list(dict(points).items())
    stride = max(1, math.ceil(len(last) / _POINTS))
    return [*last[: len(last) - 1 : stride], *last[-1:]]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)
