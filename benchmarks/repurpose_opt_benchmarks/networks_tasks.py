"""The tasks of the experiment `networks`: for each seed a trained network, samples, and who holds which input.

`sensors`: the demo's six sensors, which see different images of one digit through noise. `sum`: two sensors, each with
another digit; the label is their sum. `strips`: a digit in four strips. `widths-K`: the strips' network with hidden
layers K times as wide. Images that train, that choose learning rates, that calibrate and that judge are all different
ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.demo import rows as demo
from repurpose_opt.demo.digits import Digits
from repurpose_opt.demo.sensors import SENSORS, WIDTHS, Groups
from repurpose_opt.formulation import Volume
from repurpose_opt.network import baselines
from repurpose_opt.network.calibrate import loss_weights
from repurpose_opt.network.finetune import FineTuning, fine_tune
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks.strips import Samples

OUTPUT_OWNER = 0
BATCH_SIZE = 128
VALIDATION_SHARE, CALIBRATION_SHARE = 0.15, 0.2
"""Of the training half's images; the others train."""
_TRAINING, _TUNING, _CALIBRATION, _VALIDATION, _TEST = range(5)
"""Streams of random numbers of a seed."""

Draw = Callable[[torch.Tensor, torch.Tensor, int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]
"""(images, labels, samples, random numbers) → inputs (samples, n) and labels (samples,)."""


def one_image(
    images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Different images; all of them where there are no more."""
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    return images[chosen], labels[chosen]


def two_images(
    images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two independent images side by side, and the sum of their labels."""
    chosen = torch.randint(len(labels), (count, 2), generator=generator)
    return images[chosen].flatten(1), labels[chosen].sum(1)


def noisy_group(
    images: torch.Tensor, labels: torch.Tensor, count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The demo's groups: different images of one digit, with fresh noise."""
    return Groups(images, labels).draw(count, generator)


@dataclass(frozen=True)
class Setting:
    """What a task is and how much of everything it takes."""

    name: str
    n_workers: int
    widths: tuple[int, ...]
    """Neurons a layer, the inputs first."""
    draw: Draw
    training: FineTuning
    """Of the dense network."""
    choices: tuple[FineTuning, ...]
    """Of all other rows, all of the same number of steps; one is chosen for each row. With none, nothing but the dense
    network is trained, and `ours` alone is measured."""
    budgets: Mapping[str, tuple[float, ...]]
    """Fractions of direct, by what messages may be."""
    solvers: Mapping[str, tuple[str, str]]
    """Partitioner and pruner, by what messages may be."""
    placing_seconds: float | None = 12.0
    """For Mt-KaHyPar, which goes on until its time is up."""
    training_images: int = 20_000
    calibration_samples: int = 8000
    round_samples: int = 20_000
    """What `ours` calibrates on and trains on where it alternates."""
    validation_samples: int = 5000
    test_samples: int = 10_000


@dataclass(frozen=True, eq=False)
class Task:
    """A trained dense network and its samples, of one seed."""

    setting: Setting
    seed: int
    model: nn.Sequential
    training_images: torch.Tensor
    training_labels: torch.Tensor
    calibration: torch.Tensor
    """(samples, n)"""
    validation: Samples
    """Choose learning rates and penalties."""
    test: Samples

    @cached_property
    def network(self) -> Network:
        return trace(self.model, self.calibration[:1])

    @cached_property
    def placement(self) -> Placement:
        """The inputs in equal runs, the answer on one worker, all workers alike."""
        n, P = self.setting.widths[0], self.setting.n_workers
        return Placement(P, np.arange(n) * P // n, (OUTPUT_OWNER,), np.full(P, 1 / P), None)

    @cached_property
    def direct(self) -> Plan:
        return baselines.direct_plan(self.network, self.placement)

    @cached_property
    def loss_weights(self) -> dict[str, NDArray[np.float64]]:
        return loss_weights(self.network, self.calibration, self.seed)

    def numbers(self, budget: float) -> int:
        """Numbers a sample that a budget allows."""
        return int(budget * baselines.cost_of(self.direct).values_per_sample + 1e-9)

    def batches(self, stream: int = _TUNING) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches of fresh samples, the same ones for every row."""
        generator = _generator(self.seed, stream)
        while True:
            yield self.setting.draw(self.training_images, self.training_labels, BATCH_SIZE, generator)

    def training(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """So many of the samples that train, drawn beforehand."""
        return self.setting.draw(self.training_images, self.training_labels, count, _generator(self.seed, _TUNING))

    def tuned(self, model: Any, settings: FineTuning) -> Any:
        """A copy of a model, of whatever kind `fine_tune` takes, fine-tuned; what is zero stays zero."""
        tuned = copy.deepcopy(model)
        fine_tune(tuned, self.batches(), settings, teacher=self.model, seed=self.seed)
        return tuned


def make(setting: Setting, digits: Digits, seed: int) -> Task:
    """Train the dense network of a seed and draw its samples. Which images do what is drawn by the seed, too."""
    order = torch.randperm(len(digits.train_labels), generator=_generator(seed, _TRAINING))
    validating, calibrating = (int(share * len(order)) for share in (VALIDATION_SHARE, CALIBRATION_SHARE))
    parts = order.split([validating, calibrating, len(order) - validating - calibrating])
    images = [(digits.train_images[part], digits.train_labels[part]) for part in parts]
    training_images, training_labels = (part[: setting.training_images] for part in images[2])
    draw = setting.draw
    validation = draw(*images[0], setting.validation_samples, _generator(seed, _VALIDATION))
    calibration, _ = draw(*images[1], setting.calibration_samples, _generator(seed, _CALIBRATION))
    test = draw(digits.test_images, digits.test_labels, setting.test_samples, _generator(seed, _TEST))
    task = Task(
        setting=setting,
        seed=seed,
        model=perceptron(setting.widths, seed),
        training_images=training_images,
        training_labels=training_labels,
        calibration=calibration,
        validation=Samples(*validation),
        test=Samples(*test),
    )
    fine_tune(task.model, task.batches(_TRAINING), setting.training, seed=seed)
    return task


def perceptron(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Linear layers with ReLU between them, at PyTorch's random weights of a seed."""
    modules: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width, following in pairwise(widths):
            modules += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def ours(task: Task, budget: float, messages: str, rounds: int = 1, finetune: FineTuning | None = None) -> Plan:
    """`repurpose` within a budget: in one shot, or in several rounds with a fine-tuning after each.

    Rounds train on samples drawn beforehand and calibrate on the same; one shot calibrates on images of its own.
    """
    partitioner, pruner = task.setting.solvers[messages]
    data: Any = task.calibration if finetune is None else task.training(task.setting.round_samples)
    return repurpose(
        task.model,
        task.calibration[:1],
        task.setting.n_workers,
        data=data,
        input_owner=task.placement.input_owner,
        output_owner=OUTPUT_OWNER,
        formulation=Volume(budget=budget, messages=messages),
        partitioner=partitioner,
        pruner=pruner,
        finetune=finetune,
        rounds=rounds,
        seed=task.seed,
    )


def choices(steps: int, low: float, high: float) -> tuple[FineTuning, ...]:
    """Labels alone at two learning rates; half labels, half distillation from the dense network at the higher one."""
    by_labels = [FineTuning(steps, BATCH_SIZE, rate) for rate in (low, high)]
    return (*by_labels, replace(by_labels[-1], distillation=0.5))


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * stream + seed)


_AUTO = {"values": ("auto", "auto"), "codes": ("auto", "auto")}
_DEMO = {"values": demo.SOLVERS["ours"], "codes": demo.SOLVERS["ours_codes"]}

SENSORS_TASK = Setting(
    name="sensors",
    n_workers=SENSORS,
    widths=WIDTHS,
    draw=noisy_group,
    training=FineTuning(1500, BATCH_SIZE, 1e-3),
    choices=choices(250, 3e-4, 1e-3),
    budgets={"values": (0.01,), "codes": (0.005,)},
    solvers=_DEMO,
    validation_samples=2000,
    test_samples=5000,
)
SUM_TASK = Setting(
    name="sum",
    n_workers=2,
    widths=(2 * 784, 256, 128, 19),
    draw=two_images,
    training=FineTuning(6000, BATCH_SIZE, 2e-3),
    choices=choices(800, 2e-3, 6e-3),
    budgets={"values": (0.01, 0.02), "codes": (0.01, 0.02)},
    solvers=_AUTO,
    training_images=40_000,
    calibration_samples=20_000,
)
STRIPS_TASK = Setting(
    name="strips",
    n_workers=4,
    widths=(784, 256, 128, 10),
    draw=one_image,
    training=FineTuning(2400, BATCH_SIZE, 2e-3),
    choices=choices(1000, 2e-3, 6e-3),
    budgets={"values": (0.03, 0.10), "codes": (0.005, 0.01, 0.03)},
    solvers=_AUTO,
    calibration_samples=12_000,
)
WIDTHS_TASKS = tuple(
    replace(
        STRIPS_TASK,
        name=f"widths-{factor}",
        widths=(784, 256 * factor, 128 * factor, 10),
        training=FineTuning(800, BATCH_SIZE, 2e-3 / factor**0.5),
        choices=(),
        budgets={"values": (0.03,), "codes": (0.01,)},
        solvers={"values": ("compensated", "group-omp"), "codes": ("alternate", "threshold")},
    )
    for factor in (1, 2, 4, 8)
)
FULL = {"sensors": (SENSORS_TASK,), "sum": (SUM_TASK,), "strips": (STRIPS_TASK,), "widths": WIDTHS_TASKS}


def quick(setting: Setting) -> Setting:
    """The same in small: a few steps, narrow layers, one rate, one budget for each kind of message."""
    inputs, *hidden, outputs = setting.widths
    return replace(
        setting,
        widths=(inputs, *(width // 8 for width in hidden), outputs),
        training=replace(setting.training, steps=60),
        choices=tuple(replace(choice, steps=8) for choice in setting.choices[1:2]),
        budgets={messages: budgets[-1:] for messages, budgets in setting.budgets.items()},
        placing_seconds=2.0,
        training_images=1000,
        calibration_samples=300,
        round_samples=300,
        validation_samples=200,
        test_samples=300,
    )


QUICK = {name: tuple(map(quick, settings)) for name, settings in FULL.items()}
