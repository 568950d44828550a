"""The table, bars, comparison and plots of the experiment `networks`, from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table

Row = dict[str, Any]
Key = tuple[str, str, str | None, float | None]
"""Task, row, kind of messages, budget."""

BARS = (
    ("sensors", "codes", 0.005, "after", 0.5),
    ("sensors", "codes", 0.005, "before", 2.0),
    ("sum", "values", 0.02, "after", 1.0),
    ("sum", "codes", 0.02, "after", 1.0),
    ("strips", "values", 0.03, "after", 0.5),
    ("strips", "values", 0.10, "after", 0.1),
    ("strips", "codes", 0.01, "after", 0.5),
    ("strips", "codes", 0.03, "after", 0.1),
)
"""Task, messages, budget, before or after fine-tuning, and the points that ours may be below the better dense."""
FIGURES = ("numbers", "volume_fraction", "busiest_macs", "before", "after", "seconds", "training_seconds")


def key_of(row: Row) -> Key:
    return row["task"], row["row"], row["messages"], row["budget"]


def grouped(rows: Sequence[Row]) -> dict[Key, list[Row]]:
    """The seeds of each row together, in the order of the first."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    return groups


def summary(rows: Sequence[Row]) -> list[Row]:
    """Means and standard deviations over the seeds; None where there is no figure, or one seed only."""
    found = []
    for (task, row, messages, budget), same in grouped(rows).items():
        seeds = [each["seed"] for each in same]
        figures = {figure: _spread(_values(same, figure)) for figure in FIGURES}
        found.append({"task": task, "row": row, "messages": messages, "budget": budget, "seeds": seeds} | figures)
    return found


def bars(rows: Sequence[Row]) -> Iterator[Row]:
    """Points (hundredths) of the means over seeds, for each of our rows."""
    groups = grouped(rows)
    for task, messages, budget, when, most in BARS:
        for key, same in groups.items():
            found = _values(same, when)
            if not is_ours(key[1]) or key[0] != task or key[2:] != (messages, budget) or not found:
                continue
            moment = "fine-tuned" if when == "after" else "before fine-tuning"
            what = f"{task}, {key[1]}, {messages}, {budget:.1%} of direct, {moment}: points below the better dense"
            yield bar(what, 100 * (_better_dense(groups, task) - mean(found)), most=most)


def is_ours(row: str) -> bool:
    return row.partition(",")[0] == "ours"


def _better_dense(groups: dict[Key, list[Row]], task: str) -> float:
    dense = groups[task, "dense", None, None]
    return max(mean(found) for when in ("before", "after") if (found := _values(dense, when)))


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """For each of our rows, whether it is above every trained baseline of at most its budget.

    By more than the seeds' spread: the mean of the differences of accuracy, seed by seed, is above their standard
    deviation.
    """
    groups = grouped(rows)
    for key, same in groups.items():
        task, row, messages, budget = key
        if not is_ours(row) or budget is None or not _values(same, "after"):
            continue
        peers = {
            other[1]: _differences(same, theirs)
            for other, theirs in groups.items()
            if other[0] == task and _is_peer(other, theirs, budget)
        }
        if not peers:
            continue
        lost = {peer: found for peer, found in peers.items() if not _is_above(found)}
        text = ", ".join(f"{peer} {_points(found)}" for peer, found in sorted(peers.items(), key=lambda p: mean(p[1])))
        verdict = "yes" if not lost else f"no ({', '.join(lost)})"
        if min(map(len, peers.values())) < 2:
            verdict += "; one seed, so no spread"
        yield f"- {task}, {row}, {messages}, {budget:.2%}: {verdict}. Points above: {text}"


def _is_peer(key: Key, rows: Sequence[Row], budget: float) -> bool:
    _, row, _, limit = key
    is_baseline = row != "dense" and not is_ours(row) and bool(_values(rows, "after"))
    return is_baseline and limit in (None, budget) and mean(_values(rows, "volume_fraction")) <= budget + 1e-9


def _differences(ours: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    """In points, of the seeds that both have."""
    mine, other = ({row["seed"]: row["after"] for row in rows if row["after"] is not None} for rows in (ours, theirs))
    return [100 * (mine[seed] - other[seed]) for seed in mine if seed in other]


def _is_above(differences: Sequence[float]) -> bool:
    return mean(differences) > (stdev(differences) if len(differences) > 1 else 0.0)


def _points(differences: Sequence[float]) -> str:
    spread = f" ± {stdev(differences):.2f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.2f}{spread}"


def markdown(report: Row, rows: Sequence[Row], about: str) -> str:
    groups = grouped(rows)
    lines = ["# Networks", "", *about.split("\n")]
    header = ("row", "messages", "budget", "numbers", "of direct", "busiest MACs, × 1/P", "before", "fine-tuned", "s")
    for setting in report["settings"]:
        name = setting["name"]
        lines += ["", f"## {name}: {'-'.join(map(str, setting['widths']))} on {setting['n_workers']} workers", ""]
        lines += table(header, [_cells(key, same) for key, same in groups.items() if key[0] == name])
    compared = list(comparisons(rows))
    if compared:
        lines += ["", "Ours above every trained baseline of at most the same volume, by more than the seeds' spread?"]
        lines += ["", *compared]
    if report["bars"]:
        lines += ["", *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", ""]
    lines += [
        f"Means ± standard deviation over seeds {', '.join(map(str, report['seeds']))}; data: {report['data']}. "
        "`s` is what making the row took before any training. `dense` runs on one worker; `naive`, `central`, `direct` "
        "and `partial sums` compute the same as it, and `sparse, placed` the same as `sparse`. Volumes count numbers, "
        "of values or of codes."
    ]
    lines += ["", machine_line(report["environment"], "torch")]
    return "\n".join(lines)


def _cells(key: Key, rows: Sequence[Row]) -> list[str]:
    _, row, messages, budget = key
    return [
        f"**{row}**" if is_ours(row) else row,
        messages or "–",
        "–" if budget is None else f"{budget:.2%}",
        _mean(rows, "numbers", ".0f"),
        _mean(rows, "volume_fraction", ".2%"),
        _mean(rows, "busiest_macs", ".2f"),
        _percent(_values(rows, "before")),
        _percent(_values(rows, "after")),
        _mean(rows, "seconds", ".1f"),
    ]


def _mean(rows: Sequence[Row], figure: str, form: str) -> str:
    found = _values(rows, figure)
    return format(mean(found), form) if found else "–"


def _percent(found: Sequence[float]) -> str:
    if not found:
        return "–"
    spread = f" ± {100 * stdev(found):.2f}" if len(found) > 1 else ""
    return f"{mean(found):.2%}{spread}"


def _values(rows: Sequence[Row], figure: str) -> list[float]:
    return [row[figure] for row in rows if row[figure] is not None]


def _spread(found: Sequence[float]) -> Row | None:
    if not found:
        return None
    return {"mean": mean(found), "std": stdev(found) if len(found) > 1 else None}


# Plots


def plot(rows: Sequence[Row], family: str, path: Path) -> None:
    """Of the widths what they cost; of the others error on test images, fine-tuned, against volume."""
    from matplotlib.figure import Figure

    groups = {key: same for key, same in grouped(rows).items() if key[0].partition("-")[0] == family}
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    if family == "widths":
        _plot_costs(figure, groups)
    else:
        _plot_errors(figure, groups)
    figure.savefig(path, dpi=130)


def _plot_errors(figure: Any, groups: dict[Key, list[Row]]) -> None:
    axes = figure.add_subplot()
    curves: dict[str, list[list[Row]]] = {}
    for (_, row, messages, _), same in groups.items():
        if row != "dense" and _values(same, "after"):
            curves.setdefault(row if messages is None else f"{row}, {messages}", []).append(same)
    for label, points in curves.items():
        points.sort(key=lambda same: mean(_values(same, "volume_fraction")))
        errors = [[100 * (1 - accuracy) for accuracy in _values(same, "after")] for same in points]
        axes.errorbar(
            [100 * mean(_values(same, "volume_fraction")) for same in points],
            [mean(found) for found in errors],
            [stdev(found) if len(found) > 1 else 0.0 for found in errors],
            fmt="o-" if is_ours(label) else "x:",
            capsize=3,
            label=label,
        )
    for (_, row, _, _), same in groups.items():
        found = _values(same, "after")
        if row == "dense" and found:
            axes.axhline(100 * (1 - mean(found)), color="black", linewidth=1, linestyle="--", label="dense")
    axes.set(xlabel="volume, % of direct", ylabel="error on test images, %, fine-tuned", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside right upper", fontsize="small")


def _plot_costs(figure: Any, groups: dict[Key, list[Row]]) -> None:
    for axes, (what, label) in zip(
        figure.subplots(1, 2), (("numbers", "numbers sent a sample"), ("seconds", "seconds to solve")), strict=True
    ):
        for messages in dict.fromkeys(key[2] for key in groups if is_ours(key[1])):
            points = {
                int(key[0].partition("-")[2]): _values(same, what) for key, same in groups.items() if key[2] == messages
            }
            means = [mean(found) for found in points.values()]
            spreads = [stdev(found) if len(found) > 1 else 0.0 for found in points.values()]
            axes.errorbar(list(points), means, spreads, fmt="o-", capsize=3, label=messages)
        axes.set(xlabel="width of the hidden layers, ×", ylabel=label, xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.legend()
