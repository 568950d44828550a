"""One seed of the demo: trains, repurposes, fine-tunes every row alike and runs ours on six processes."""

from __future__ import annotations

from dataclasses import dataclass
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
    late_fusion_plan,
    naive,
    partial_sums,
    sparse_plan,
)
from repurpose_opt.network.calibrate import loss_weights
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning, fine_tune
from repurpose_opt.network.repurpose import best_trial, plan_of
from repurpose_opt.network.sweep import Placement, Sweep
from repurpose_opt.network.trace import Chain, trace
from repurpose_opt.progress import Report
from repurpose_opt.runtime.launch import run_plan
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.solver import SolveOptions

CALIBRATION_GROUPS = 8000
TEST_GROUPS = 5000
OUTPUT_OWNER = 0
FINE_TUNING = FineTuning(steps=800, batch_size=128, learning_rate=1e-3)
CURVE = (100.0, 10.0, 1 / 3, 1 / 7, 1 / 16)
"""Prices of the curve, relative to the price that meets the budget."""
_CALIBRATION_STREAM, _TUNING_STREAM, _TEST_STREAM = 1_000_000, 2_000_000, 3_000_000


@dataclass(frozen=True)
class Row:
    """One way to run the network; accuracies on held-out groups."""

    accuracy_before_finetuning: float
    accuracy: float
    cost: Cost


@dataclass(frozen=True, eq=False)
class Outcome:
    """All rows of one seed, and what the report draws."""

    rows: dict[str, Row]
    curve: list[tuple[float, float]]
    """(fraction of direct, accuracy before fine-tuning) of ours, over prices."""
    plan: Plan
    dense: Chain
    max_abs_difference: float
    """Largest |Δ| between the processes' outputs and the pruned model's in one process."""
    bytes_sent: NDArray[np.int64]
    """(P, P) counted by the processes, for all test groups."""
    bytes_predicted: NDArray[np.int64]


def run_seed(digits: Digits, budget: float, seed: int, plan_directory: Path, report: Report) -> Outcome:
    """Everything for one seed; the plan of `ours`, fine-tuned, is saved in `plan_directory`."""
    report("training the dense network")
    dense = trace(train_dense(digits, seed), torch.zeros(1, SENSORS * 784))
    training = Groups(digits.train_images, digits.train_labels)
    test = _draw(Groups(digits.test_images, digits.test_labels), TEST_GROUPS, _TEST_STREAM + seed)
    share = np.full(SENSORS, 1 / SENSORS)
    placement = Placement(SENSORS, input_owner(), (OUTPUT_OWNER,), share, link_price=None)
    ours, curve = _repurpose(dense, training, placement, budget, test, seed, report)

    def row(plan: Plan, name: str) -> Row:
        report(f"fine-tuning {name}")
        before = accuracy(plan.model, *test)
        fine_tune(plan.model, training.batches(FINE_TUNING.batch_size, _TUNING_STREAM + seed), FINE_TUNING)
        return Row(before, accuracy(plan.model, *test), cost_of(plan))

    direct = direct_plan(dense, placement)
    as_dense = row(direct, "dense")
    kept = [int(ours.linear(layer).weight.count_nonzero()) for layer in ours.layers]
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
    rows["ours"] = row(ours, "ours")
    report(f"running ours on {SENSORS} processes")
    ours.save(plan_directory)
    ran = run_plan(plan_directory, test[0].numpy())
    with torch.no_grad():
        difference = float(np.abs(ran.outputs - ours.model(test[0]).numpy()).max())
    return Outcome(rows, curve, ours, dense, difference, ran.bytes_sent, ran.bytes_predicted)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of samples whose largest output is the label's."""
    hits = sum(
        int((model(batch).argmax(1) == target).sum())
        for batch, target in zip(inputs.split(1024), labels.split(1024), strict=True)
    )
    return hits / len(labels)


def _repurpose(
    dense: Chain,
    training: Groups,
    placement: Placement,
    budget: float,
    test: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    report: Report,
) -> tuple[Plan, list[tuple[float, float]]]:
    """The plan within the budget as `repurpose` makes it, and the accuracies of the sweeps at other prices."""
    inputs, _ = _draw(training, CALIBRATION_GROUPS, _CALIBRATION_STREAM + seed)
    sweep = Sweep(
        chain=dense,
        inputs=inputs,
        loss_weights=loss_weights(dense, inputs, seed),
        placement=placement,
        partitioner="auto",
        pruner="auto",
        options=SolveOptions(seed=seed),
        checkpoint=Checkpoint(None, ""),
        report=report,
    )
    trial = best_trial(sweep, Volume(budget=budget))
    assert isinstance(trial.formulation, Volume)
    price = trial.formulation.transfer_price
    assert price is not None
    stats: dict[str, Any] = {"seed": seed, "budget": budget, "transfer_price": price}
    ours = plan_of(dense, trial, placement, stats)
    for ratio in CURVE:
        sweep.run(Volume(transfer_price=price * ratio))
    curve = [
        (tried.volume / tried.direct_volume, accuracy(plan_of(dense, tried, placement, {}).model, *test))
        for tried in sweep.trials
    ]
    return ours, sorted(curve)


def _draw(groups: Groups, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return groups.draw(count, torch.Generator().manual_seed(seed))
