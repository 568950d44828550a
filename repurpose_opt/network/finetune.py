"""Fine-tuning in PyTorch with the pruned connections held at zero."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime.modules import Role, role_of

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(outputs, labels) → a number"""
Optimizer = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]
"""(parameters, learning rate) → an optimiser of torch.optim"""
CHECKS = 20
"""How often the validation samples are looked at."""


@dataclass(frozen=True)
class FineTuning:
    """Adam with a one-cycle learning rate.

    steps             batches to train on, over all rounds
    batch_size        samples a batch
    learning_rate     the highest of the cycle
    distillation      share of the loss that compares with the original model's outputs instead of the labels;
                      1 needs no labels
    optimizer         (parameters, learning rate) → torch.optim.Optimizer; None: Adam
    loss              (outputs, labels) → number; None: that of `repurpose`
    validation_share  of the data that is not trained on; the weights that are best on it, of 20 looks, are kept
    patience          looks without a better one after which training ends early; needs a validation_share
    """

    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    distillation: float = 0.0
    optimizer: Optimizer | None = None
    loss: Loss | None = None
    validation_share: float = 0.0
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "patience"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_whole and not (name == "patience" and value is None):
                raise InvalidArgument(name, repr(value), "a whole number ≥ 1")
        if not 0 < self.learning_rate < math.inf:
            raise InvalidArgument("learning_rate", self.learning_rate, "a finite number > 0")
        if not 0 <= self.distillation <= 1:
            raise InvalidArgument("distillation", self.distillation, "a share in [0, 1]")
        if not 0 <= self.validation_share < 1:
            raise InvalidArgument("validation_share", self.validation_share, "a share in [0, 1)")
        if self.patience is not None and self.validation_share == 0:
            raise InvalidArgument("patience", self.patience, "None without a validation_share")


Batch = tuple[torch.Tensor, torch.Tensor | None]


@torch.enable_grad()
def fine_tune(
    model: nn.Module,
    batches: Iterator[Batch],
    settings: FineTuning,
    teacher: nn.Module | None = None,
    *,
    loss: str = "cross_entropy",
    seed: int = 0,
    validation: Batch | None = None,
) -> None:
    """Train `model` in place on `settings.steps` batches; connections of its products that are zero stay zero.

    `teacher` is the original model, needed for distillation. `loss` is "cross_entropy" or "squared_error"; `seed` is
    for Dropout. With `validation` samples, the weights of least loss on them are kept. The model ends in evaluation
    mode.
    """
    masks = masks_of(model)
    parameters = list(model.requires_grad_().parameters())
    make = settings.optimizer or (lambda given, rate: torch.optim.Adam(given, lr=rate, fused=True))
    optimizer = make(parameters, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=max(settings.steps, 2),
        cycle_momentum=settings.optimizer is None,
    )
    compare = settings.loss or (functional.mse_loss if loss == "squared_error" else functional.cross_entropy)
    best = _Best(settings, model, validation, lambda batch: _loss(model, batch, settings, compare, teacher, loss))
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step in range(settings.steps):
            value = _loss(model, next(batches), settings, compare, teacher, loss)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            hold_at_zero(masks)
            if best.is_final_after(step + 1):
                break
    best.restore()
    model.eval().requires_grad_(False)


def masks_of(model: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights, encoders and decoders of products with zeros, and where they are not zero; kernels count as a whole.

    `model` is a graph or a flat nn.Sequential. Nothing else is pruned, so zeros elsewhere are numbers like any other.
    """
    products = [module for module in model.children() if role_of(module) is Role.PRODUCT]
    matrices = [matrix for module in products for matrix in module.parameters() if matrix.ndim >= 2]
    found = [(matrix, (matrix != 0).flatten(2).any(2) if matrix.ndim > 2 else matrix != 0) for matrix in matrices]
    return [(matrix, mask.view(*mask.shape, *(1,) * (matrix.ndim - 2))) for matrix, mask in found if not mask.all()]


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


def held_out(inputs: torch.Tensor, labels: torch.Tensor | None, share: float, seed: int) -> tuple[Batch, Batch | None]:
    """Samples to train on and, where the share is above 0, samples for validation; the same ones for the same seed."""
    if share == 0:
        return (inputs, labels), None
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * len(inputs)))
    training, validation = order[count:], order[:count]
    if len(training) == 0:
        raise InvalidArgument("validation_share", share, f"one that leaves samples of {len(inputs)} to train on")
    parts = [(inputs[part], None if labels is None else labels[part]) for part in (training, validation)]
    return parts[0], parts[1]


def in_rounds(settings: FineTuning, rounds: int) -> list[FineTuning]:
    """The steps shared by rounds: half of them for the last one, where all is pruned that will be."""
    if rounds == 1:
        return [settings]
    early = max(1, settings.steps // (2 * (rounds - 1)))
    last = max(1, settings.steps - early * (rounds - 1))
    return [replace(settings, steps=early)] * (rounds - 1) + [replace(settings, steps=last)]


class _Best:
    """The weights of least loss on validation samples, if there are any."""

    def __init__(
        self, settings: FineTuning, model: nn.Module, samples: Batch | None, loss: Callable[[Batch], torch.Tensor]
    ) -> None:
        self.settings, self.model, self.samples, self.loss = settings, model, samples, loss
        self.least, self.looks_since = math.inf, 0
        self.state: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def is_final_after(self, steps: int) -> bool:
        """Looks at the samples now and then; whether patience has run out."""
        if self.samples is None or steps % max(1, self.settings.steps // CHECKS):
            return False
        self.model.eval()
        inputs, labels = self.samples
        parts = [
            (batch, None if labels is None else labels[start : start + len(batch)])
            for start, batch in zip(range(0, len(inputs), 1024), inputs.split(1024), strict=True)
        ]
        value = sum(float(self.loss(part)) * len(part[0]) for part in parts) / len(inputs)
        self.model.train()
        self.looks_since += 1
        if value < self.least:
            self.least, self.looks_since, self.state = value, 0, copy.deepcopy(self.model.state_dict())
        return self.settings.patience is not None and self.looks_since >= self.settings.patience

    def restore(self) -> None:
        if self.state is not None:
            self.model.load_state_dict(self.state)


def _loss(
    model: nn.Module, batch: Batch, settings: FineTuning, compare: Loss, teacher: nn.Module | None, loss: str
) -> torch.Tensor:
    inputs, labels = batch
    outputs = model(inputs)
    total: torch.Tensor = outputs.new_zeros(())
    if settings.distillation < 1:
        assert labels is not None
        total = total + (1 - settings.distillation) * compare(outputs, labels)
    if settings.distillation > 0:
        assert teacher is not None
        with torch.no_grad():
            target = teacher(inputs)
        if loss == "squared_error":
            total = total + settings.distillation * functional.mse_loss(outputs, target)
        else:
            total = total + settings.distillation * functional.cross_entropy(outputs, target.softmax(1))
    return total
