"""Fine-tuning in PyTorch with the pruned connections held at zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from repurpose_opt.errors import InvalidArgument


@dataclass(frozen=True)
class FineTuning:
    """Adam with a one-cycle learning rate.

    steps         batches to train on
    batch_size    samples a batch
    learning_rate the highest of the cycle
    distillation  share of the loss that compares with the original model's outputs instead of the labels;
                  1 needs no labels
    """

    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    distillation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgument(name, repr(value), "a whole number ≥ 1")
        if not 0 < self.learning_rate < math.inf:
            raise InvalidArgument("learning_rate", self.learning_rate, "a finite number > 0")
        if not 0 <= self.distillation <= 1:
            raise InvalidArgument("distillation", self.distillation, "a share in [0, 1]")


Batch = tuple[torch.Tensor, torch.Tensor | None]


@torch.enable_grad()
def fine_tune(
    model: nn.Sequential,
    batches: Iterator[Batch],
    settings: FineTuning,
    teacher: nn.Module | None = None,
    *,
    loss: str = "cross_entropy",
    seed: int = 0,
) -> None:
    """Train `model` in place on `settings.steps` batches; weights, encoders and decoders that are zero stay zero.

    `teacher` is the original model, needed for distillation. `loss` is "cross_entropy" or "squared_error"; `seed` is
    for Dropout. The model ends in evaluation mode.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    masks = [(matrix, matrix != 0) for matrix in matrices if not matrix.all()]
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=max(settings.steps, 2)
    )
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(settings.steps):
            inputs, labels = next(batches)
            value = _loss(model(inputs), inputs, labels, settings.distillation, teacher, loss)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            hold_at_zero(masks)
    model.eval().requires_grad_(False)


@torch.no_grad()
def hold_at_zero(masks: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Set each weight to zero where its mask is false."""
    for weight, mask in masks:
        weight.mul_(mask)


def batches_of(inputs: torch.Tensor, labels: torch.Tensor | None, size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches of samples, the last of an epoch left out where it is short."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=generator)
        whole = max(len(order) // size, 1)
        for chosen in order[: whole * size].split(size):
            yield inputs[chosen], None if labels is None else labels[chosen]


def _loss(
    outputs: torch.Tensor,
    inputs: torch.Tensor,
    labels: torch.Tensor | None,
    distillation: float,
    teacher: nn.Module | None,
    loss: str,
) -> torch.Tensor:
    is_squared = loss == "squared_error"
    compare = functional.mse_loss if is_squared else functional.cross_entropy
    total = outputs.new_zeros(())
    if distillation < 1:
        assert labels is not None
        total = total + (1 - distillation) * compare(outputs, labels)
    if distillation > 0:
        assert teacher is not None
        with torch.no_grad():
            target = teacher(inputs)
        total = total + distillation * compare(outputs, target if is_squared else target.softmax(1))
    return total
