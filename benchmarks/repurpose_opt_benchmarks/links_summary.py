"""The figures of `links`, made of its rows: times, communication, bytes, and the bars they are held to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.runtime.storage import read_manifest
from repurpose_opt_benchmarks.links_dense import ALL_GATHER
from repurpose_opt_benchmarks.links_layouts import LAYOUTS
from repurpose_opt_benchmarks.links_model import calibrated, predicted_communication, seconds_in_order
from repurpose_opt_benchmarks.links_namespaces import FAST, LINKS
from repurpose_opt_benchmarks.links_network import DIRECT, OURS, Prepared
from repurpose_opt_benchmarks.links_peers import OUR_DIRECT, PLANNED
from repurpose_opt_benchmarks.links_process import LINK
from repurpose_opt_benchmarks.report import bar

Row = dict[str, Any]
HEADER_BYTES = 66
"""Of Ethernet, IP and TCP with timestamps, once in each packet that the kernel counts."""
LEAST_RATIO, MOST_POINTS, MOST_BYTES_OFF, MOST_TIME_OFF, MOST_DIFFERENCE = 5.0, 1.0, 0.05, 0.30, 1e-4


def summary(rows: Sequence[Row], prepared: Prepared) -> dict[str, Any]:
    """Everything in the report that comes from the rows and the plans."""
    times = list(_times(rows))
    simulated = list(_simulated(rows, prepared))
    counted = list(_counted(rows))
    odd = [{key: value for key, value in row.items() if key != "kind"} for row in rows if row["kind"] == "odd"]
    return {
        "about": prepared.about,
        "times": times,
        "alone": [row for row in rows if row["kind"] == "alone"],
        "links": list(_links(rows)),
        "simulated": simulated,
        "counted": counted,
        "odd": odd,
        "bars": list(_bars(times, simulated, counted, odd, prepared.about["plans"])),
    }


def _by_setting(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """Rows of times by link and batch size, the links in order."""
    found: dict[tuple[str, int], list[Row]] = {}
    for link in LINKS:
        for row in rows:
            if row["kind"] == "times" and row["link"] == link:
                found.setdefault((link, row["batch_size"]), []).append(row)
    return found


def _times(rows: Sequence[Row]) -> Iterator[Row]:
    """A row for each link, batch size and peer: seconds over all batches of all rounds."""
    accuracy = {row["peer"]: row.get("accuracy") for row in rows if row["kind"] == "alone"}
    for (link, batch_size), measured in _by_setting(rows).items():
        for peer in dict.fromkeys(row["peer"] for row in rows if row["kind"] == "alone"):
            own = [row for row in measured if row["peer"] == peer and "error" not in row]
            if own:
                yield {
                    "link": link,
                    "batch_size": batch_size,
                    "peer": peer,
                    "accuracy": accuracy[peer],
                    "difference": _largest(row["difference"] for row in own),
                    "seconds": spread(own, "seconds"),
                    "of_round": {row["round"]: median(row["seconds"]) for row in own},
                    **(
                        {"bytes": int(np.sum(own[0]["bytes_predicted"])) // len(own[0]["seconds"])}
                        if peer in PLANNED
                        else {}
                    ),
                    **{key: spread(own, key) for key in ("blocked", "bare") if key in own[0]},
                    **({"compute": float(_compute(own))} if peer in PLANNED else {}),
                }


def spread(rows: Sequence[Row], key: str) -> dict[str, float]:
    """Of the numbers of all rows: the median, a tenth of them is below `low`, a tenth above `high`."""
    values = [value for row in rows for value in row[key]]
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9]).tolist()
    return {"median": middle, "low": low, "high": high, "count": len(values)}


def _compute(rows: Sequence[Row]) -> float:
    """Seconds of a batch without exchanges, by the worker that is done last."""
    return float(seconds_in_order(rows)[-1])


def _links(rows: Sequence[Row]) -> Iterator[Row]:
    for (link, batch_size), measured in _by_setting(rows).items():
        own = [row for row in measured if row["peer"] == LINK and "error" not in row]
        if own:
            sizes = {size: spread([row["next"] for row in own], size) for size in own[0]["next"]}
            yield {"link": link, "batch_size": batch_size, "all_pairs": spread(own, "all_pairs"), "next": sizes}


def _simulated(rows: Sequence[Row], prepared: Prepared) -> Iterator[Row]:
    """Predicted and measured seconds of communication of every plan."""
    manifests = {plan: read_manifest(prepared.plan(plan)) for plan in (*prepared.about["plans"],)}
    for (link, batch_size), measured in _by_setting(rows).items():
        by_peer: dict[str, list[Row]] = {}
        for row in measured:
            if "error" not in row:
                by_peer.setdefault(row["peer"], []).append(row)
        for peer, (plan, wire) in PLANNED.items():
            if peer in by_peer and LINK in by_peer:
                platform = calibrated(link, by_peer[LINK], by_peer[peer], manifests[plan])
                predicted = predicted_communication(manifests[plan], platform, batch_size, wire)
                blocked = spread(by_peer[peer], "blocked")["median"]
                yield {
                    "link": link,
                    "batch_size": batch_size,
                    "peer": peer,
                    "predicted": predicted,
                    "blocked": blocked,
                    "off": predicted / blocked - 1,
                    "bare": spread(by_peer[peer], "bare")["median"] if wire is None else None,
                    "rest": spread(by_peer[peer], "seconds")["median"] - _compute(by_peer[peer]),
                    "operations": platform.operations.tolist(),
                    "latency": float(platform.latency[0, 1]),
                    "bandwidth": float(platform.bandwidth[0, 1]),
                }


def _counted(rows: Sequence[Row]) -> Iterator[Row]:
    """Predicted bytes of a batch, those handed to the library and those that the kernel counted."""
    for row in rows:
        if row["kind"] == "times" and "counted" in row:
            batches, timed = row["counted"]["batches"], len(row["seconds"])
            predicted = np.array(row["bytes_predicted"]) / timed
            handed = np.array(row["bytes_handed"]) / timed
            sent = (np.array(row["counted"]["bytes"])) / batches
            content = sent - HEADER_BYTES * np.array(row["counted"]["packets"]) / batches
            yield {
                "link": row["link"],
                "batch_size": row["batch_size"],
                "round": row["round"],
                "peer": row["peer"],
                "predicted": predicted.tolist(),
                "handed_off": float(np.abs(handed - predicted).max()),
                "counted": sent.tolist(),
                "content": content.tolist(),
                "content_off": content_off(predicted, content),
            }


def content_off(predicted: NDArray[np.float64], content: NDArray[np.float64]) -> float:
    """The largest relative difference of a pair that is to send anything, in absolute value."""
    is_sent = predicted > 0
    return float(np.abs(content[is_sent] / predicted[is_sent] - 1).max())


def _bars(
    times: Sequence[Row], simulated: Sequence[Row], counted: Sequence[Row], odd: Sequence[Row], plans: Mapping[str, Row]
) -> Iterator[dict[str, Any]]:
    largest = max((row["batch_size"] for row in times if row["link"] == FAST.name), default=0)

    def is_judged(row: Row) -> bool:
        return (row["link"], row["batch_size"]) == (FAST.name, largest)

    if largest:
        at = {row["peer"]: row for row in times if is_judged(row)}
        for peer in _best_first(at):
            for plan in OURS:
                yield _ratio_bar(at[peer], at[plan])
    for plan in OURS:
        points = 100 * (plans[DIRECT]["accuracy"] - plans[plan]["accuracy"])
        yield bar(f"{plan}: points below dense", points, most=MOST_POINTS)
    if counted:
        yield bar(
            "bytes handed to the library: the most off the predicted", max(r["handed_off"] for r in counted), most=0
        )
        for peer in (OUR_DIRECT, *OURS):
            off = [row["content_off"] for row in counted if row["peer"] == peer and is_judged(row)]
            what = f"{peer}, {FAST.name}: bytes that the kernel counted for a pair, without headers, off the predicted"
            yield bar(what, max(off), most=MOST_BYTES_OFF)
    for row in simulated:
        if is_judged(row) and row["peer"] in (OUR_DIRECT, *OURS):
            what = f"{FAST.name}, {row['batch_size']} samples, {row['peer']}: simulated communication off the measured"
            yield bar(what, abs(row["off"]), most=MOST_TIME_OFF)
    exact = [row["difference"] for row in times if PLANNED.get(row["peer"], ("", None))[1] is None]
    yield bar("peers without fewer bits: largest difference from one process", _largest(exact), most=MOST_DIFFERENCE)
    ours = _largest(row.get("difference") for row in odd if "DTensor" not in row["peer"])
    yield bar("odd sizes: our largest difference from one process", ours, most=MOST_DIFFERENCE)


def _largest(differences: Iterable[float | None]) -> float:
    """Infinity where an answer has another shape."""
    return max((float("inf") if found is None else found for found in differences), default=0.0)


def _ratio_bar(theirs: Row, own: Row) -> dict[str, Any]:
    """Of medians over all batches; beside it those of each round."""
    rounds = [theirs["of_round"][key] / own["of_round"][key] for key in theirs["of_round"] if key in own["of_round"]]
    what = f"{own['link']}, {own['batch_size']} samples: {theirs['peer']}, time over that of {own['peer']}"
    what += f" (by round {min(rounds):.2f} … {max(rounds):.2f})" if rounds else ""
    return bar(what, theirs["seconds"]["median"] / own["seconds"]["median"], least=LEAST_RATIO)


def _best_first(at: Mapping[str, Row]) -> Iterator[str]:
    """All-gather, and the fastest layout of DTensor."""
    if ALL_GATHER in at:
        yield ALL_GATHER
    layouts = [peer for peer in LAYOUTS if peer in at]
    if layouts:
        yield min(layouts, key=lambda peer: float(at[peer]["seconds"]["median"]))
