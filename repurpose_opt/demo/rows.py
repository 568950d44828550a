"""One seed of the demo: trains, repurposes, fine-tunes every row alike and runs ours on six processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.demo.digits import Digits
from repurpose_opt.demo.sensors import SENSORS, Groups, input_owner, train_dense
from repurpose_opt.formulation import Volume
from repurpose_opt.network.baselines import (
    Cost,
    central,
    cost_of,
    direct_plan,
    filled_late_fusion_plan,
    late_fusion_plan,
    naive,
    partial_sums,
    sparse_plan,
)
from repurpose_opt.network.calibrate import loss_weights
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning, fine_tune
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.planned import plan_of
from repurpose_opt.network.search import best_trial
from repurpose_opt.network.sweep import Sweep, Trial
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.progress import Report
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.processes.launch import run_plan
from repurpose_opt.solver import SolveOptions

CALIBRATION_GROUPS = 8000
TEST_GROUPS = 5000
OUTPUT_OWNER = 0
FINE_TUNING = FineTuning(steps=800, batch_size=128, learning_rate=1e-3)
CURVE = {"ours": (100.0, 10.0, 1 / 3, 1 / 7, 1 / 16), "ours_codes": (10.0, 1 / 7)}
"""Prices of the curves, relative to the price that meets the budget; the search for it has tried others."""
SOLVERS = {"ours": ("auto", "auto"), "ours_codes": ("alternate", "threshold")}
"""Partitioner and pruner. Those that "auto" takes for codes need minutes for one sweep over 4,704 inputs."""
_CALIBRATION_STREAM, _TUNING_STREAM, _TEST_STREAM = 1_000_000, 2_000_000, 3_000_000


@dataclass(frozen=True)
class Row:
    """One way to run the network; accuracies on held-out groups."""

    accuracy_before_finetuning: float
    accuracy: float
    cost: Cost


@dataclass(frozen=True, eq=False)
class Ours:
    """A row of ours: its plan, how it does at other volumes, and what six processes did with it."""

    plan: Plan
    """Fine-tuned."""
    curve: list[tuple[float, float]]
    """(fraction of direct, accuracy before fine-tuning), over prices."""
    max_abs_difference: float
    """Largest |Δ| between the processes' outputs and the pruned model's in one process."""
    bytes_sent: NDArray[np.int64]
    """(P, P) counted by the processes, for all test groups."""
    bytes_predicted: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """All rows of one seed, and what the report draws."""

    rows: dict[str, Row]
    ours: dict[str, Ours]
    """By the name of the row."""
    dense: Network


def run_seed(
    digits: Digits, formulations: dict[str, Volume], seed: int, plan_directories: dict[str, Path], report: Report
) -> Outcome:
    """Everything for one seed: a row for each formulation, whose plan, fine-tuned, is saved in its directory."""
    report("training the dense network")
    dense = trace(train_dense(digits, seed), torch.zeros(1, len(input_owner())))
    training = Groups(digits.train_images, digits.train_labels)
    test = test_groups(digits, seed)
    share = np.full(SENSORS, 1 / SENSORS)
    placement = Placement(SENSORS, input_owner(), (OUTPUT_OWNER,), share, link_price=None)
    sweep = sweep_of(dense, training, placement, seed, report)
    plans, curves = {}, {}
    for name, formulation in formulations.items():
        partitioner, pruner = SOLVERS[name]
        searched = replace(sweep, partitioner=partitioner, pruner=pruner, trials=[], owners={}, readings={})
        plans[name], curves[name] = _repurpose(searched, formulation, CURVE[name], test)

    def row(plan: Plan, name: str) -> Row:
        report(f"fine-tuning {name}")
        before = accuracy(plan.model, *test)
        fine_tune(plan.model, training.batches(FINE_TUNING.batch_size, _TUNING_STREAM + seed), FINE_TUNING)
        return Row(before, accuracy(plan.model, *test), cost_of(plan))

    direct = direct_plan(dense, placement)
    as_dense = row(direct, "dense")
    ours = plans["ours"]
    kept = {layer.name: int(ours.weight(layer).count_nonzero()) for layer in ours.layers}
    numbers = cost_of(plans["ours_codes"]).values_per_sample
    lossless = {
        "dense": Cost(0, 0, 0.0, 0, 0, float(SENSORS)),
        "naive": naive(direct),
        "central": central(direct, OUTPUT_OWNER),
        "direct": as_dense.cost,
        "partial_sums": partial_sums(direct),
    }
    rows = {name: Row(as_dense.accuracy_before_finetuning, as_dense.accuracy, cost) for name, cost in lossless.items()}
    rows["sparse"] = row(sparse_plan(dense, placement, kept), "sparse")
    rows["late_fusion"] = row(late_fusion_plan(dense, placement), "late_fusion")
    filled = filled_late_fusion_plan(dense, placement, sweep.inputs, sweep.loss_weights, numbers)
    rows["late_fusion_filled"] = row(filled, "late_fusion_filled")
    found = {}
    for name, plan in plans.items():
        rows[name] = row(plan, name)
        report(f"running {name} on {SENSORS} processes")
        found[name] = _run(plan, curves[name], plan_directories[name], test[0])
    return Outcome(rows, found, dense)


@torch.no_grad()
def _run(plan: Plan, curve: list[tuple[float, float]], directory: Path, inputs: torch.Tensor) -> Ours:
    plan.save(directory)
    ran = run_plan(directory, inputs.numpy())
    difference = float(np.abs(ran.outputs - plan.model(inputs).numpy()).max())
    return Ours(plan, curve, difference, ran.bytes_sent, ran.bytes_predicted)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of samples whose largest output is the label's."""
    hits = sum(
        int((model(batch).argmax(1) == target).sum())
        for batch, target in zip(inputs.split(1024), labels.split(1024), strict=True)
    )
    return hits / len(labels)


def test_groups(digits: Digits, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and labels that judge, of images that nothing else sees."""
    return _draw(Groups(digits.test_images, digits.test_labels), TEST_GROUPS, _TEST_STREAM + seed)


def sweep_of(dense: Network, training: Groups, placement: Placement, seed: int, report: Report) -> Sweep:
    inputs, _ = _draw(training, CALIBRATION_GROUPS, _CALIBRATION_STREAM + seed)
    return Sweep(
        network=dense,
        inputs=inputs,
        loss_weights=loss_weights(dense, inputs, seed),
        placement=placement,
        partitioner="auto",
        pruner="auto",
        options=SolveOptions(seed=seed),
        checkpoint=Checkpoint(None, ""),
        report=report,
    )


def _repurpose(
    sweep: Sweep, formulation: Volume, ratios: Sequence[float], test: tuple[torch.Tensor, torch.Tensor]
) -> tuple[Plan, list[tuple[float, float]]]:
    """The plan within the budget as `repurpose` makes it, and the accuracies of the sweeps at other prices."""
    trial = best_trial(sweep, formulation)
    assert isinstance(trial.formulation, Volume)
    price = trial.formulation.transfer_price
    assert price is not None
    stats = {"seed": sweep.options.seed, "budget": formulation.budget, "transfer_price": price}
    ours = planned(sweep, trial, stats)
    for ratio in ratios:
        sweep.run(replace(trial.formulation, transfer_price=price * ratio))
    curve = [
        (tried.volume / tried.direct_volume, accuracy(planned(sweep, tried, {}).model, *test)) for tried in sweep.trials
    ]
    return ours, sorted(curve)


def planned(sweep: Sweep, trial: Trial, stats: Mapping[str, Any]) -> Plan:
    """The plan of one trial of a sweep."""
    return plan_of(sweep.network, sweep.placement, trial.layers, trial.unit_owner, trial.direct_volume, stats)


def _draw(groups: Groups, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return groups.draw(count, torch.Generator().manual_seed(seed))
