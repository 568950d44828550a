"""Layers of a trained network with the moments of what they receive on calibration data, as arrays and as problems."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.moments import Moments
from repurpose_opt.network.columns import column_value, moments_of
from repurpose_opt.network.trace import trace
from repurpose_opt.problem import LayerProblem
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt_benchmarks.cache import Arrays


@dataclass(frozen=True, eq=False)
class NetworkLayer:
    """A linear layer, a convolution or an attention's projection."""

    weight: NDArray[np.float32]
    """(rows, columns); a convolution's is unfolded."""
    bias: NDArray[np.float32]
    """(rows,)"""
    covariance: NDArray[np.float64]
    """(columns, columns) of the inputs on calibration data, centred and shrunk."""
    mean: NDArray[np.float64]
    """(columns,)"""
    ridge: float
    samples: int
    shrinkage: float
    column_value: NDArray[np.int64]
    """(columns,)"""
    row_neuron: NDArray[np.int64]
    """(rows,) the rows of an attention head are one neuron."""
    value_unit: NDArray[np.int64]
    """(n,) values of the same unit, for instance those of a channel after flatten, are on the same worker."""
    value_bytes: int

    def problem(self, P: int) -> LayerProblem:
        """The layer on P workers of equal capacity, its inputs' units in contiguous equal runs."""
        units = int(self.value_unit.max()) + 1
        C, mean = self.covariance, self.mean
        return LayerProblem.create(
            self.weight,
            P,
            input_owner=self.value_unit * P // units,
            moments=Moments(C, C, C, mean, mean, self.ridge, self.samples, self.shrinkage),
            bias=self.bias,
            value_bytes=self.value_bytes,
            column_value=self.column_value,
            row_neuron=self.row_neuron,
        )

    def arrays(self) -> Arrays:
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @staticmethod
    def of_arrays(arrays: Arrays) -> NetworkLayer:
        fields: dict[str, Any] = {name: array if array.ndim else array.item() for name, array in arrays.items()}
        return NetworkLayer(**fields)


@torch.no_grad()
def gather(model: nn.Module, inputs: torch.Tensor, names: Collection[str]) -> dict[str, NetworkLayer]:
    """The layers of these names (`Network.products`), calibrated on inputs (samples, …)."""
    network = trace(model, inputs[:1])
    wanted = {network.read(name): name for name in names}
    found = {}
    for read, values in [(INPUT, inputs), *((step.name, value) for step, value in network.graph.outputs(inputs))]:
        if read not in wanted:
            continue
        name = wanted[read]
        module = network.product(name)
        moments = moments_of(module, values, values, network.batch_size)
        weight = module.weight.numpy().reshape(len(module.weight), -1)
        found[name] = NetworkLayer(
            weight=weight,
            bias=np.zeros(len(weight), np.float32) if module.bias is None else module.bias.numpy(),
            covariance=moments.second,
            mean=moments.mean,
            ridge=moments.ridge,
            samples=moments.samples or 0,
            shrinkage=moments.shrinkage,
            column_value=column_value(module),
            row_neuron=_numbered(network.units(name)),
            value_unit=_numbered(network.units(read)),
            value_bytes=network.positions(read) * weight.itemsize,
        )
    return {name: found[name] for name in names}


def packed(layers: dict[str, NetworkLayer]) -> Arrays:
    """All arrays of all layers, LAYER/FIELD, for a cache."""
    return {f"{name}/{field}": array for name, layer in layers.items() for field, array in layer.arrays().items()}


def unpacked(arrays: Arrays) -> dict[str, NetworkLayer]:
    by_layer: dict[str, Arrays] = {}
    for key, array in arrays.items():
        name, _, field = key.partition("/")
        by_layer.setdefault(name, {})[field] = array
    return {name: NetworkLayer.of_arrays(fields) for name, fields in by_layer.items()}


def _numbered(units: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same groups, numbered from 0 in the order of their numbers."""
    return np.unique(units, return_inverse=True)[1]
