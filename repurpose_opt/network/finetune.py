"""Fine-tuning in PyTorch with the pruned connections held at zero."""

from __future__ import annotations

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
    distillation  share of the loss that compares with the original model's prediction instead of the label;
                  1 needs no labels
    """

    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    distillation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidArgument(name, repr(value), "a whole number ≥ 1")
        if not self.learning_rate > 0:
            raise InvalidArgument("learning_rate", self.learning_rate, "a number > 0")
        if not 0 <= self.distillation <= 1:
            raise InvalidArgument("distillation", self.distillation, "a share in [0, 1]")


Batch = tuple[torch.Tensor, torch.Tensor | None]


def fine_tune(
    model: nn.Sequential, batches: Iterator[Batch], settings: FineTuning, teacher: nn.Module | None = None
) -> None:
    """Train `model` in place on `settings.steps` batches; weights that are zero stay zero.

    `teacher` is the original model, needed for distillation. The model ends in evaluation mode.
    """
    masks = [(linear.weight, linear.weight != 0) for linear in model if isinstance(linear, nn.Linear)]
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=max(settings.steps, 2)
    )
    model.train()
    for _ in range(settings.steps):
        inputs, labels = next(batches)
        loss = _loss(model(inputs), inputs, labels, settings.distillation, teacher)
        optimizer.zero_grad()
        loss.backward()
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
) -> torch.Tensor:
    loss = outputs.new_zeros(())
    if distillation < 1:
        assert labels is not None
        loss = loss + (1 - distillation) * functional.cross_entropy(outputs, labels)
    if distillation > 0:
        assert teacher is not None
        with torch.no_grad():
            target = teacher(inputs).softmax(1)
        loss = loss + distillation * functional.cross_entropy(outputs, target)
    return loss
