"""The report of `links` as Markdown, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repurpose_opt_benchmarks.links_dense import ALL_GATHER
from repurpose_opt_benchmarks.links_namespaces import FAST
from repurpose_opt_benchmarks.links_network import ODD_WORKERS, OURS
from repurpose_opt_benchmarks.report import bar_line, machine_line, table

Row = dict[str, Any]
_SIMULATED_NOTE = (
    "Simulated: with the rates at which the workers of this run computed the same plan without exchanges, the latency "
    "of an exchange of 4 bytes, and the link's rate. Measured: in our exchanges, by the worker that waits longest. "
    "Bare: the same messages by torch.distributed and nothing else.",
    "",
)
_COUNTED_NOTE = (
    "Of a batch, all pairs together; the bars and the last column are of single pairs. Headers: 66 bytes a packet. "
    "What is left beyond the predicted are gloo's own, some 150 bytes a message whatever its size.",
    "",
)
_ODD_NOTE = (
    "Uneven strips: the workers hold 400, 300 and 85 inputs. Shapes given: DTensor is told the size of the whole, "
    "which `parallelize_module` does not know by itself.",
    "",
)


def markdown(report: dict[str, Any], about: str) -> str:
    lines = ["# Links", "", *about.split("\n"), "", *_time_tables(report), "", *_bar_lines(report), ""]
    lines += [
        "## Communication, simulated and measured",
        "",
        *_SIMULATED_NOTE,
        *_simulated_table(report["simulated"]),
        "",
    ]
    lines += ["## Bytes of a pair", "", *_COUNTED_NOTE, *_counted_table(report["counted"]), ""]
    lines += ["## Start, overhead, memory", "", *_alone_table(report), ""]
    lines += ["## Sizes that no number of workers divides", "", *_ODD_NOTE, *_odd_table(report), ""]
    lines += ["## The links themselves", "", *_link_table(report["links"]), ""]
    return "\n".join([*lines, *_setting_lines(report)])


def _time_tables(report: dict[str, Any]) -> Iterator[str]:
    """One table for each link and batch size."""
    for link, batch_size in dict.fromkeys((row["link"], row["batch_size"]) for row in report["times"]):
        rows = [row for row in report["times"] if (row["link"], row["batch_size"]) == (link, batch_size)]
        gather = next((row["seconds"]["median"] for row in rows if row["peer"] == ALL_GATHER), None)
        yield from (f"## {link}, {batch_size:,} samples a batch", "")
        header = (
            "peer",
            "accuracy",
            "kB a batch",
            "ms a batch",
            "all-gather's time over it",
            "waiting, ms",
            "bare, ms",
        )
        yield from table(header, [_time_cells(row, gather) for row in rows])
        yield ""
    yield (
        "Median (a tenth of the batches below – a tenth above). Waiting: in our exchanges, by the worker that waits "
        "longest. Bare: the same messages by torch.distributed and nothing else."
    )


def _time_cells(row: Row, gather: float | None) -> list[str]:
    cells = [row["peer"], f"{row['accuracy']:.2%}", f"{row['bytes'] / 1000:,.0f}" if "bytes" in row else "–"]
    cells += [_ms(row["seconds"]), "–" if gather is None else f"{gather / row['seconds']['median']:.2f}"]
    return [*cells, *(_ms(row[key]) if key in row else "–" for key in ("blocked", "bare"))]


def _ms(seconds: Mapping[str, float]) -> str:
    median_, low, high = (1000 * seconds[key] for key in ("median", "low", "high"))
    return f"{median_:,.1f} ({low:,.1f} – {high:,.1f})"


def _bar_lines(report: dict[str, Any]) -> list[str]:
    note = []
    if not report["is_official"]:
        note = ["Not the official figures: the bars are for all of MNIST (`--mnist-dir`) at full size.", ""]
    if report["no_namespaces"] is not None:
        note += [f"Loopback only, as this machine allows no other links: {report['no_namespaces']}.", ""]
    return [*note, *map(bar_line, report["bars"])]


def _simulated_table(rows: Sequence[Row]) -> list[str]:
    header = (
        "link",
        "samples",
        "peer",
        "simulated, ms",
        "measured, ms",
        "off",
        "bare, ms",
        "batch without computing, ms",
    )
    return table(
        header,
        [
            (
                row["link"],
                f"{row['batch_size']:,}",
                row["peer"],
                *(f"{1000 * row[key]:.2f}" for key in ("predicted", "blocked")),
                f"{row['off']:+.0%}",
                "–" if row["bare"] is None else f"{1000 * row['bare']:.2f}",
                f"{1000 * row['rest']:.2f}",
            )
            for row in rows
        ],
    )


def _counted_table(rows: Sequence[Row]) -> list[str]:
    header = ("link", "samples", "peer", "predicted", "kernel, headers left out", "kernel", "a pair is off by at most")
    return table(
        header,
        [
            (
                row["link"],
                f"{row['batch_size']:,}",
                row["peer"],
                *(f"{np.sum(row[key]):,.0f}" for key in ("predicted", "content", "counted")),
                f"{row['content_off']:.2%}",
            )
            for row in rows
            if row["round"] == 0
        ],
    )


def _alone_table(report: dict[str, Any]) -> list[str]:
    """Overhead at the largest batch on the fast link, or on the loopback interface."""
    links = {row["link"] for row in report["times"]}
    link = FAST.name if FAST.name in links else next(iter(links), None)
    at: dict[str, Row] = {}
    for row in report["times"]:
        if row["link"] == link and row["batch_size"] >= at.get(row["peer"], {"batch_size": 0})["batch_size"]:
            at[row["peer"]] = row
    header = (
        "peer",
        "start, s",
        f"over a bare exchange, ms ({link})",
        "of it computing, ms",
        "weights, kB",
        "buffers, kB",
    )
    rows = []
    for row in report["alone"]:
        if "error" in row:
            rows.append((row["peer"], row["error"], *["–"] * 5))
            continue
        rows.append((row["peer"], f"{row['start_seconds']:.1f}", *_overhead(at.get(row["peer"])), *_memory(row)))
    return table((*header, "resident, MB"), rows)


def _overhead(row: Row | None) -> tuple[str, str]:
    if row is None or "bare" not in row:
        return "–", "–"
    return f"{1000 * (row['seconds']['median'] - row['bare']['median']):.1f}", f"{1000 * row['compute']:.1f}"


def _memory(row: Row) -> tuple[str, str, str]:
    """Of the worker that has most; resident: the most it ever had, and what of it when it had only joined."""
    weights, buffers = (f"{max(row[key]) / 1000:,.0f}" for key in ("weight_bytes", "buffer_bytes"))
    most, joined = (max(row[key]) / 1e6 for key in ("resident_most", "resident_joined"))
    return weights, buffers, f"{most:.0f} ({joined:.0f} joined)"


def _odd_table(report: dict[str, Any]) -> list[str]:
    widths = "-".join(map(str, report["about"]["odd_widths"]))
    header = (f"{ODD_WORKERS} workers, {widths}", "difference from one process", "local weights, or what went wrong")
    return table(header, [(row["peer"], _difference(row), _odd_note(row)) for row in report["odd"]])


def _difference(row: Row) -> str:
    if "error" in row:
        return "failed"
    return f"answer has shape {row['answer_shape']}" if row["difference"] is None else f"{row['difference']:.1e}"


def _odd_note(row: Row) -> str:
    if "error" in row:
        return f"`{row['error'][:200]}`"
    shapes = row.get("local_shapes")
    return "–" if shapes is None else "; ".join(", ".join("×".join(map(str, s)) for s in worker) for worker in shapes)


def _link_table(rows: Sequence[Row]) -> list[str]:
    header = (
        ("link", "4 bytes between all pairs, ms", *(f"{int(size):,} bytes to the next, ms" for size in rows[0]["next"]))
        if rows
        else ("link",)
    )
    return table(
        header,
        [
            (f"{row['link']} ({row['batch_size']})", _ms(row["all_pairs"]), *map(_ms, row["next"].values()))
            for row in rows
        ],
    )


def _setting_lines(report: dict[str, Any]) -> list[str]:
    about, widths = report["about"], "-".join(map(str, report["about"]["widths"]))
    training, tuning = about["steps"]["training"], about["steps"]["fine_tuning"]
    links = ""
    if report["no_namespaces"] is None:
        links = " A network interface limits what a worker sends, not what it receives. TCP congestion control: "
        links += f"{report['congestion_control']}."
    return [
        f"`{report['command']}`",
        "",
        f"Data: {about['data']}; {about['test_images']:,} judge. Network {widths}, trained in {training:,} steps; "
        f"dense and ours fine-tuned for {tuning:,}. Each process computes with one thread, and all share this machine's"
        f" cores: no speed-up of computing is claimed.{links} {machine_line(report['environment'], 'torch')}",
    ]


def plot(report: dict[str, Any], path: Path) -> None:
    """Time of a batch by peer, a panel for each link and batch size."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((row["link"], row["batch_size"]) for row in report["times"]))
    peers = list(dict.fromkeys(row["peer"] for row in report["times"]))
    figure = Figure(figsize=(3 + 2.4 * len(settings), 1.5 + 0.22 * len(peers)), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    for axes, (link, batch_size) in zip(panels, settings, strict=True):
        for row in report["times"]:
            if (row["link"], row["batch_size"]) == (link, batch_size):
                middle, low, high = (1000 * row["seconds"][key] for key in ("median", "low", "high"))
                is_ours = row["peer"].startswith(tuple(OURS))
                error = [[middle - low], [high - middle]]
                axes.errorbar(middle, peers.index(row["peer"]), xerr=error, fmt="o", color="C1" if is_ours else "C0")
        axes.set(title=f"{link}, {batch_size:,} samples", xlabel="ms a batch", xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(peers)), peers)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)
