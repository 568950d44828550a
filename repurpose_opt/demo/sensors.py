"""The demo's task: several sensors each see another image of the same digit through heavy noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.demo.digits import Digits
from repurpose_opt.network.finetune import Batch, FineTuning, fine_tune

SENSORS = 6
NOISE = 1.0
"""Standard deviation of the Gaussian noise on pixels in [0, 1]."""
PIXELS = 784
WIDTHS = (SENSORS * PIXELS, 384, 192, 96, 10)
TRAINING = FineTuning(steps=2000, batch_size=128, learning_rate=1e-3)


@dataclass(frozen=True, eq=False)
class Groups:
    """Groups of SENSORS different images of one digit with fresh noise, drawn from images (samples, 784)."""

    images: torch.Tensor
    labels: torch.Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (count, SENSORS · 784), sensor after sensor, and labels (count,)."""
        digits = torch.randint(10, (count,), generator=generator)
        chosen = torch.empty(count, SENSORS, dtype=torch.int64)
        for digit in range(10):
            rows = torch.nonzero(digits == digit).squeeze(1)
            members = torch.nonzero(self.labels == digit).squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            # Consecutive members of a shuffled circle: different images within a group.
            start = torch.randint(len(members), (len(rows), 1), generator=generator)
            chosen[rows] = members[(start + torch.arange(SENSORS)) % len(members)]
        images = self.images[chosen]
        return (images + NOISE * torch.randn(images.shape, generator=generator)).flatten(1), digits

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches of fresh groups."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.draw(size, generator)


def input_owner() -> NDArray[np.int64]:
    """(SENSORS · 784,) each worker holds its own sensor's pixels."""
    return np.repeat(np.arange(SENSORS), PIXELS)


def train_dense(digits: Digits, seed: int) -> nn.Sequential:
    """The dense network 6·784 → 384 → 192 → 96 → 10, trained on groups of training images."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for width, following in pairwise(WIDTHS):
        modules += [nn.Linear(width, following), nn.ReLU()]
    model = nn.Sequential(*modules[:-1])
    groups = Groups(digits.train_images, digits.train_labels)
    fine_tune(model, groups.batches(TRAINING.batch_size, seed), TRAINING)
    return model
