"""Codes against chosen values in whole networks, over the whole range of volumes: the strips and the six sensors.

The network of the experiment `strips`, and that of the demo, at as many numbers a sample as a plan may send; test
images judge, which chose nothing. For the strips also after fine-tuning at the rate that is best on validation images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repurpose_opt import Lossless, Volume
from repurpose_opt.demo import rows as demo
from repurpose_opt.demo.digits import Digits, load_digits
from repurpose_opt.demo.sensors import SENSORS, Groups, input_owner, train_dense
from repurpose_opt.formulation import Formulation
from repurpose_opt.network import baselines
from repurpose_opt.network.finetune import FineTuning
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.search import best_trial
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks import RESULTS, environment, strips
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, spread, table, write

KINDS = ("values", "codes")
BARS = {30: 1.8, 63: 0.75, 160: 0.3}
"""Numbers a sample on the strips: points that codes may be below dense, before fine-tuning."""
TUNED, TUNED_BAR = 63, 0.2
SENSOR_BARS = {120: 0.7, 75: 3.5}
LOGITS = 50
"""Numbers of the summed logits of independent experts, one for each sensor."""


@dataclass(frozen=True)
class Size:
    strips: strips.Size
    numbers: tuple[int, ...]
    steps: int
    sensor_numbers: tuple[int, ...]
    sensor_seeds: int


FULL = Size(strips.FULL, (15, 30, 63, 96, 160, 328), 1500, (120, 75, 50), 3)
QUICK = Size(strips.QUICK, (30, 63), 20, (), 0)


def strips_plan(task: strips.Task, formulation: Formulation) -> Plan:
    images = task.training.images
    return repurpose(
        task.model,
        images[:1],
        strips.WORKERS,
        data=images,
        input_owner=task.placement.input_owner,
        output_owner=strips.OUTPUT_OWNER,
        formulation=formulation,
        seed=task.seed,
    )


def strips_runs(task: strips.Task, size: Size) -> Iterator[dict[str, Any]]:
    """A row for each kind of message and number; `after` is fine-tuned, at TUNED only."""
    item = task.network.dtype.itemsize
    yield _run(task, "dense", 0, task.direct, tuned(task, task.direct, size))
    for kind in KINDS:
        plan = strips_plan(task, Lossless(messages=kind))
        yield _run(task, f"lossless {kind}", None, plan, None)
        for numbers in size.numbers:
            plan = strips_plan(task, Volume(budget_bytes=numbers * item, messages=kind))
            after = tuned(task, plan, size) if numbers == TUNED else None
            yield _run(task, kind, numbers, plan, after)


def tuned(task: strips.Task, plan: Plan, size: Size) -> float:
    """Accuracy on test images after fine-tuning, at the rate that is best on validation images."""
    models = [
        task.fine_tuned(plan, FineTuning(steps=size.steps, learning_rate=rate)) for rate in size.strips.learning_rates
    ]
    return task.test.accuracy(max(models, key=task.validation.accuracy))


def _run(task: strips.Task, kind: str, numbers: int | None, plan: Plan, after: float | None) -> dict[str, Any]:
    cost = baselines.cost_of(plan)
    return {
        "network": "strips",
        "seed": task.seed,
        "kind": kind,
        "at_most": numbers,
        "numbers": cost.values_per_sample,
        "volume_fraction": cost.volume_fraction,
        "busiest_macs": cost.busiest_macs,
        "before": task.test.accuracy(plan.model),
        "after": after,
    }


def sensor_runs(digits: Digits, seed: int, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The demo's network with codes, before fine-tuning, the demo's solvers."""
    dense = trace(train_dense(digits, seed), torch.zeros(1, len(input_owner())))
    test = demo.test_groups(digits, seed)
    placement = Placement(SENSORS, input_owner(), (demo.OUTPUT_OWNER,), np.full(SENSORS, 1 / SENSORS), link_price=None)
    training = Groups(digits.train_images, digits.train_labels)
    sweep = demo.sweep_of(dense, training, placement, seed, lambda step: None)
    shared = {"network": "sensors", "seed": seed, "after": None}
    before = demo.accuracy(dense.graph, *test)
    yield shared | {"kind": "dense", "at_most": 0, "numbers": 0, "volume_fraction": 0.0, "before": before}
    partitioner, pruner = demo.SOLVERS["ours_codes"]
    item = dense.dtype.itemsize
    for most in numbers:
        searched = replace(sweep, partitioner=partitioner, pruner=pruner, trials=[], owners={}, readings={})
        trial = best_trial(searched, Volume(budget_bytes=most * item, messages="codes"))
        plan = demo.planned(searched, trial, {})
        cost = baselines.cost_of(plan)
        figures = {"numbers": cost.values_per_sample, "volume_fraction": cost.volume_fraction}
        yield shared | {"kind": "codes", "at_most": most, "before": demo.accuracy(plan.model, *test)} | figures


def bars(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Points (hundredths) of the means over the seeds."""

    def points(network: str, kind: str, at_most: int, when: str) -> float:
        return 100 * _mean(runs, network, kind, at_most, when)

    for numbers, most in BARS.items():
        below = points("strips", "dense", 0, "before") - points("strips", "codes", numbers, "before")
        yield bar(f"strips, {numbers} numbers, no fine-tuning: points below dense", below, most=most)
    dense = max(points("strips", "dense", 0, "before"), points("strips", "dense", 0, "after"))
    below = dense - points("strips", "codes", TUNED, "after")
    yield bar(f"strips, {TUNED} numbers, fine-tuned: points below the better dense", below, most=TUNED_BAR)
    for numbers, most in SENSOR_BARS.items():
        below = points("sensors", "dense", 0, "before") - points("sensors", "codes", numbers, "before")
        yield bar(f"six sensors, {numbers} numbers, no fine-tuning: points below dense", below, most=most)


def _mean(runs: Sequence[dict[str, Any]], network: str, kind: str, at_most: int | None, when: str) -> float:
    key = (network, kind, at_most)
    return float(np.mean([run[when] for run in runs if (run["network"], run["kind"], run["at_most"]) == key]))


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Codes in networks", "", *str(__doc__).strip().split("\n"), ""]
    lines += table(
        ("network", "messages", "at most", "numbers", "of direct", "busiest MACs, × 1/P", "before", "fine-tuned"),
        [list(_row(report["runs"], key)) for key in _keys(report["runs"])],
    )
    lines += ["", f"The summed logits of an independent expert at each sensor would be {LOGITS} numbers."]
    lines += ["", *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", "", f"Means (least – most) over seeds. Data: {report['data']}."]
    lines += ["", machine_line(report["environment"], "torch")]
    return "\n".join(lines)


def _keys(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str, int | None]]:
    return list(dict.fromkeys((run["network"], run["kind"], run["at_most"]) for run in runs))


def _row(runs: Sequence[dict[str, Any]], key: tuple[str, str, int | None]) -> Iterator[str]:
    same = [run for run in runs if (run["network"], run["kind"], run["at_most"]) == key]
    yield from (key[0], key[1], "–" if not key[2] else str(key[2]))
    yield f"{np.mean([run['numbers'] for run in same]):.0f}"
    yield f"{np.mean([run['volume_fraction'] for run in same]):.2%}"
    macs = [run["busiest_macs"] for run in same if "busiest_macs" in run]
    yield f"{np.mean(macs):.2f}" if macs else "–"
    for when in ("before", "after"):
        found = [run[when] for run in same]
        yield "–" if None in found else _percent(spread(found))


def _percent(found: dict[str, float]) -> str:
    return f"{found['mean']:.2%} ({100 * found['least']:.2f} – {100 * found['most']:.2f})"


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Error on test images against numbers a sample, values and codes, before fine-tuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in KINDS:
        budgets = [most for network, found, most in _keys(runs) if (network, found) == ("strips", kind)]
        numbers = [_mean(runs, "strips", kind, most, "numbers") for most in budgets]
        errors = [
            [100 * (1 - run["before"]) for run in runs if (run["kind"], run["at_most"]) == (kind, most)]
            for most in budgets
        ]
        (line,) = axes.plot(numbers, np.mean(errors, axis=1), "o-", label=kind)
        axes.fill_between(numbers, np.min(errors, axis=1), np.max(errors, axis=1), alpha=0.2, color=line.get_color())
    axes.axhline(100 * (1 - _mean(runs, "strips", "dense", 0, "before")), color="black", ls="--", lw=1, label="dense")
    axes.set(
        xlabel="numbers a sample", ylabel="error on test images, %, before fine-tuning", xscale="log", yscale="log"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.legend()
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks network-codes", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files, for the strips")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 … N−1 (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one seed; writes no results")
    parser.add_argument("--output", type=Path, help="folder for network-codes.json, .md and .png")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}; allowed: at least 1")
    size = QUICK if args.quick else FULL
    digits = load_digits(args.mnist_dir)
    runs: list[dict[str, Any]] = []
    for seed in range(1 if args.quick else args.seeds):
        runs += strips_runs(strips.train(digits, size.strips, seed), size)
    sensor_digits = load_digits(None)
    for seed in range(min(size.sensor_seeds, args.seeds)):
        runs += sensor_runs(sensor_digits, seed, size.sensor_numbers)
    report = {
        "command": strips.command("network-codes", args),
        "data": f"{digits.source} (strips), {sensor_digits.source} (sensors)",
        "environment": environment("torch", "mlxtend"),
        "runs": runs,
        "bars": [] if args.quick else list(bars(runs)),
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        text = f"{markdown(report)}\n\n![error against numbers, before fine-tuning](network-codes.png)"
        write(folder, "network-codes", report, text)
        plot(runs, folder / "network-codes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
