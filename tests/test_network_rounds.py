"""Rounds of pruning and fine-tuning, uneven workers, and runs that are killed at random moments.

Run as a script, this file is the run that is killed.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_network import same
from torch import nn
from torch.nn import functional

from repurpose_opt import Edge, FineTuning, Lossless, Plan, Volume
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Formulation
from repurpose_opt.network.finetune import Batch, fine_tune, held_out, in_rounds
from repurpose_opt.network.repurpose import repurpose

P = 3
BUDGET = Volume(budget=0.1)
TUNING = FineTuning(steps=60, batch_size=50, learning_rate=5e-3)


def sgd(parameters: Any, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate)


def smooth_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, labels, label_smoothing=0.1)


@cache
def task() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small convolutional network, maps (600, 3, 5, 5), and the classes that it finds in them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 7, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(28, 12), nn.Tanh()
        )
        model.append(nn.Linear(12, 4)).eval()
        inputs = torch.randn(600, 3, 5, 5)
    with torch.no_grad():
        outputs = model(inputs)
        return model, inputs, (outputs - outputs.mean(0)).argmax(1)


def planned(formulation: Formulation = BUDGET, **arguments: Any) -> Plan:
    model, inputs, labels = task()
    given: dict[str, Any] = {"data": (inputs, labels), "partitioner": "munkres", "pruner": "threshold"}
    return repurpose(model, inputs[:1], P, formulation=formulation, **{**given, **arguments})


def run(folder: Path | None = None) -> Plan:
    """The run that is killed and goes on: rounds, early stopping, a loss and an optimiser of its own."""
    tuning = replace(TUNING, optimizer=sgd, loss=smooth_loss, validation_share=0.2, patience=4, distillation=0.3)
    return planned(finetune=tuning, rounds=3, checkpoint_dir=folder, seed=4)


# Rounds


def test_budgets_fall_from_round_to_round(tmp_path: Path) -> None:
    plan = planned(finetune=TUNING, rounds=3, checkpoint_dir=tmp_path)
    records = plan.stats["rounds"]
    fractions = [record["volume_fraction"] for record in records]
    assert len(records) == 3
    assert fractions == sorted(fractions, reverse=True)
    for fraction, budget in zip(fractions, (0.4, 0.2, 0.1), strict=True):
        assert 0.4 * budget <= fraction <= budget
    assert records[-1]["volume"] == plan.volume
    for record in records:
        assert record["training_accuracy_after_finetuning"] > record["training_accuracy_before_finetuning"] - 0.05
    assert records[-1]["training_accuracy_after_finetuning"] > records[-1]["training_accuracy_before_finetuning"]
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(line["seconds"] > 0 for line in lines)


@pytest.mark.parametrize(
    ("formulation", "attribute", "expected"),
    [
        (Volume(budget=0.05), "budget", [0.2, 0.05]),
        (Volume(budget=0.5), "budget", [1.0, 0.5]),
        (Volume(budget_bytes=100), "budget_bytes", [400, 100]),
        (Volume(transfer_price=0.01), "transfer_price", [0.0025, 0.01]),
    ],
)
def test_limits_tighten_by_the_same_factor(
    formulation: Formulation, attribute: str, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from repurpose_opt.network import rounds

    used: list[float] = []
    best = rounds.best_trial

    def watched(sweep: Any, formulation: Any) -> Any:
        used.append(getattr(formulation, attribute))
        return best(sweep, formulation)

    monkeypatch.setattr(rounds, "best_trial", watched)
    planned(formulation, finetune=replace(TUNING, steps=2), rounds=2)
    assert used == pytest.approx(expected)


def test_one_round_is_what_it_was_and_names_no_trials_twice() -> None:
    plan = planned()
    (record,) = plan.stats["rounds"]
    assert "trials" not in record
    assert plan.stats["trials"][-1]["volume_fraction"] > 0
    assert plan.stats["central"] == {}


def test_the_last_round_has_half_of_the_steps() -> None:
    assert [part.steps for part in in_rounds(replace(TUNING, steps=100), 3)] == [25, 25, 50]
    assert [part.steps for part in in_rounds(replace(TUNING, steps=100), 1)] == [100]
    assert [part.steps for part in in_rounds(replace(TUNING, steps=2), 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds: got 0"),
        ({"rounds": True}, "rounds: got True"),
        ({"rounds": 2}, "1 without fine-tuning"),
        ({"rounds": 2, "finetune": TUNING, "formulation": Lossless()}, "without a price or budget"),
        ({"rounds": 2, "finetune": TUNING, "formulation": Edge()}, "without a price or budget"),
        ({"rounds": 2, "finetune": TUNING, "formulation": Volume(max_nmse=0.1)}, "without a price or budget"),
        ({"finetune": 3}, "finetune: got 3"),
    ],
)
def test_rounds_that_make_no_sense_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        planned(**arguments)
    assert "\n" not in str(caught.value)


# Fine-tuning


def linear_task(rate: float, **settings: Any) -> tuple[nn.Sequential, Batch, FineTuning, list[int]]:
    """y = 2x from 0; batches count themselves."""
    torch.manual_seed(0)
    inputs = torch.randn(40, 1)
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 1.0)
    tuning = FineTuning(steps=100, learning_rate=rate, optimizer=sgd, **settings)
    return model, (inputs, 2 * inputs), tuning, []


def counted(batch: Batch, seen: list[int]) -> Iterator[Batch]:
    while True:
        seen.append(1)
        yield batch


def test_the_best_weights_on_validation_samples_are_kept() -> None:
    """Plain descent with a rate that is far too high leaves the minimum ever farther behind."""
    model, batch, tuning, seen = linear_task(30.0, validation_share=0.5)
    fine_tune(model, counted(batch, seen), tuning, loss="squared_error", validation=batch)
    assert len(seen) == 100
    kept = float(model[0].weight)
    assert torch.isfinite(model[0].weight).all()
    model, batch, tuning, seen = linear_task(30.0)
    fine_tune(model, counted(batch, seen), tuning, loss="squared_error")
    last = float(model[0].weight)
    assert not abs(last - 2) <= abs(kept - 2)


def test_patience_ends_a_training_that_gets_no_better() -> None:
    model, batch, tuning, seen = linear_task(30.0, validation_share=0.5, patience=2)
    fine_tune(model, counted(batch, seen), tuning, loss="squared_error", validation=batch)
    assert len(seen) <= 40, "20 looks at 100 steps are one after every 5"
    model, batch, tuning, seen = linear_task(0.01, validation_share=0.5, patience=2)
    fine_tune(model, counted(batch, seen), tuning, loss="squared_error", validation=batch)
    assert len(seen) == 100


def test_validation_samples_train_nothing() -> None:
    inputs, labels = torch.arange(50.0)[:, None], torch.arange(50)
    training, validation = held_out(inputs, labels, 0.2, seed=3)
    assert validation is not None
    assert len(validation[0]) == 10
    assert sorted(torch.cat([training[0], validation[0]])[:, 0].tolist()) == list(range(50))
    for given, wanted in (training, validation):
        assert wanted is not None
        assert torch.equal(given[:, 0].long(), wanted)
    assert held_out(inputs, labels, 0.0, seed=3)[1] is None
    with pytest.raises(InvalidArgument, match="validation_share"):
        held_out(inputs[:2], None, 0.9, seed=0)
    with pytest.raises(InvalidArgument, match="patience: got 3; allowed: None without a validation_share"):
        FineTuning(patience=3)


def test_any_optimiser_and_loss_can_be_plugged_in() -> None:
    """One step by hand, at the rate with which torch's one-cycle schedule begins."""
    model, (inputs, labels), tuning, _ = linear_task(0.5, loss=lambda outputs, labels: (outputs - labels).sum())
    fine_tune(model, iter([(inputs, labels)]), replace(tuning, steps=1))
    dummy = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    (rate,) = torch.optim.lr_scheduler.OneCycleLR(dummy, 0.5, total_steps=2, cycle_momentum=False).get_last_lr()
    assert float(model[0].weight) == pytest.approx(1 - rate * float(inputs.sum()), rel=1e-5)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.AdamW])
def test_optimisers_of_torch_train(optimizer: Any) -> None:
    tuning = replace(TUNING, steps=20, optimizer=lambda parameters, rate: optimizer(parameters, lr=rate))
    before, after = planned(), planned(finetune=tuning)
    assert not same(before, after)
    assert before.volume == after.volume


# Uneven workers


def bytes_of(plan: Plan) -> list[int]:
    return [sum(step.nbytes for step in plan.sub_model(worker)) for worker in range(P)]


def test_a_worker_with_little_memory_gets_a_smaller_share() -> None:
    even = bytes_of(planned())
    limits = [2 * max(even), max(even) // 2, 2 * max(even)]
    plan = planned(memory_limit=limits)
    assert even[1] > limits[1]
    assert all(np.array(bytes_of(plan)) <= limits)
    assert sum(bytes_of(plan)) - bytes_of(plan)[1] > sum(even) - even[1]
    assert plan.volume <= 0.1 * plan.direct_volume
    with pytest.raises(InvalidArgument, match="memory_limit: got 8 bytes"):
        planned(memory_limit=8)


@pytest.mark.parametrize("share", [(1, 2, 3), (5, 1, 0), (1, 0, 0)])
def test_channels_go_by_the_workers_shares(share: tuple[int, ...]) -> None:
    plan = planned(worker_share=share, partitioner="auto")
    room = np.array(share) / sum(share)
    by_name = {layer.name: np.bincount(layer.owner, minlength=P) for layer in plan.layers}
    for name, held in by_name.items():
        if name != plan.layers[-1].name:
            assert (held <= np.ceil(held.sum() * room - 1e-9)).all(), name
    assert by_name[plan.layers[-1].name].tolist() == [4, 0, 0]
    if share == (1, 0, 0):
        assert plan.worker_macs()[1:].sum() == 0


# Runs that are killed


class Child:
    """The run in a process of its own, which says when it begins."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, __file__, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "begins\n", self.process.communicate(timeout=60)[1]

    def killed_after(self, seconds: float) -> bool:
        """Whether it was still running then."""
        try:
            self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        errors = self.process.communicate(timeout=60)[1]
        assert self.process.returncode in (0, -signal.SIGKILL), errors
        return self.process.returncode != 0

    def finished(self) -> None:
        _, errors = self.process.communicate(timeout=250)
        assert self.process.returncode == 0, errors


def check_killed_runs(folder: Path, kills: int, seed: int) -> None:
    """Start, kill after a random time, and start again until the run ends, so many times; then compare."""
    moments = random.Random(seed)
    started = time.monotonic()
    whole = run()
    seconds = time.monotonic() - started
    number = 0
    for _ in range(kills):
        place = folder / str(number)
        if not Child(place).killed_after(moments.uniform(0, 0.8 * seconds)):
            check_same(place, whole)
            number += 1
    Child(folder / str(number)).finished()
    check_same(folder / str(number), whole)


def check_same(folder: Path, whole: Plan) -> None:
    plan = Plan.load(folder / "plan")
    assert same(plan, whole)
    assert (plan.volume, plan.direct_volume, plan.stats) == (whole.volume, whole.direct_volume, whole.stats)


def test_a_run_that_is_killed_twice_ends_in_the_same_plan(tmp_path: Path) -> None:
    check_killed_runs(tmp_path, kills=2, seed=0)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_in_the_same_plan(tmp_path: Path) -> None:
    check_killed_runs(tmp_path, kills=20, seed=1)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    print("begins", flush=True)
    run(target / "checkpoint").save(target / "plan")
