"""What each worker computes, moves in its memory and sends, step by step, for one batch of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Values
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.manifest import DTYPES, Manifest
from repurpose_opt.runtime.modules import Role, is_depthwise, role_of
from repurpose_opt.runtime.splits import Split
from repurpose_opt.runtime.wire import traffic, wire_of

_MOVES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Flatten),
    *(steps.Concatenate, steps.Slice, steps.AsMap, steps.ToTokens, steps.Token, steps.Gather),
)
"""Modules that compute nothing; what they copy is left out."""
_MOST_SAMPLES = 10**6
"""In one batch: int64 holds the operations of any network."""


@dataclass(frozen=True, eq=False)
class Demand:
    """What one computation asks of each worker for one batch."""

    operations: Indices
    """(P,) a multiply-accumulate is two."""
    memory: Indices
    """(P,) bytes of weights, inputs and outputs, each moved once; 0 only where there are no operations."""

    @staticmethod
    def of(operations: Indices, memory: Indices) -> Demand:
        """Memory counts only where something is computed."""
        return Demand(operations, np.where(operations > 0, np.maximum(memory, 1), 0))


@dataclass(frozen=True, eq=False)
class Work:
    """One step for one batch: what is computed before the exchange, the messages, what is computed after it."""

    name: str
    prepare: Demand
    """Encoding into codes; statistics of a normalisation."""
    sent: Indices
    """(P, P) bytes from worker p (row) to worker k (column)."""
    compute: Demand

    @property
    def participants(self) -> NDArray[np.bool_]:
        """(P,) whether a worker sends or receives anything."""
        involved: NDArray[np.bool_] = self.sent.sum(axis=0) + self.sent.sum(axis=1) > 0
        return involved


def work_of(manifest: Manifest, batch_size: int, wire: str | None = None) -> tuple[Work, ...]:
    """The work of every step, in order.

    Products count two operations for each multiply-accumulate of a worker's dense part, and so do attention and
    depthwise convolutions; anything else counts one for each value that it reads, twice for a normalisation (its
    statistics, then itself). Biases, softmax inside attention and conversions to another wire are left out.

    batch_size   samples
    wire         as for `runtime.wire`; None: the dtype of the plan

    Raises InvalidArgument for a batch size below 1 or an unknown wire.
    """
    return _works(manifest, {layer.name: layer for layer in manifest.layers}, batch_size, wire)


def direct_work_of(manifest: Manifest, batch_size: int, wire: str | None = None) -> tuple[Work, ...] | None:
    """The work where every value is sent to every other worker with a neuron of the layer, and the owners are the same.

    None where that is not the direct model that the plan was compared with: bytes a sample differ.
    """
    products = {step.name for step in manifest.steps if role_of(manifest.graph.module(step.name)) is Role.PRODUCT}
    layers = {layer.name: _direct(layer) if layer.name in products else layer for layer in manifest.layers}
    if sum(int(layers[name].traffic().sum()) for name in products) != manifest.direct_volume:
        return None
    return _works(manifest, layers, batch_size, wire)


def weight_bytes(manifest: Manifest) -> Indices | None:
    """(P,) bytes of each worker's file of weights; None before the plan is saved."""
    return np.array([file.size for file in manifest.files], dtype=np.int64) if manifest.files else None


def _direct(layer: PlannedLayer) -> PlannedLayer:
    targets, sources = np.unique(layer.owner).tolist(), np.unique(layer.input_owner).tolist()
    messages = {(p, k): Values(layer.held(p)) for p in sources for k in targets if p != k}
    return replace(layer, messages=messages)


def _works(
    manifest: Manifest, layers: Mapping[str, PlannedLayer], batch_size: int, wire: str | None
) -> tuple[Work, ...]:
    if not 1 <= batch_size <= _MOST_SAMPLES:
        raise InvalidArgument("batch_size", batch_size, f"a whole number in 1 … {_MOST_SAMPLES}")
    dtype, P = DTYPES[manifest.dtype], manifest.n_workers
    wire_of(wire, dtype)
    nothing = np.zeros(P, dtype=np.int64)
    found = []
    for step in manifest.steps:
        module, layer = manifest.graph.module(step.name), layers.get(step.name)
        inputs, output = [manifest.splits[name] for name in step.inputs], manifest.splits[step.name]
        values = sum((_values(split, P) for split in inputs), start=nothing) * batch_size
        size = _Size(values, _values(output, P) * batch_size, batch_size, dtype.itemsize)
        if layer is not None and role_of(module) is Role.PRODUCT:
            prepare, compute = _product(module, layer, size)
        else:
            prepare, compute = _unit(module, inputs, output, size)
        sent = np.zeros((P, P), dtype=np.int64) if layer is None else traffic(layer, batch_size, wire)
        found.append(Work(step.name, prepare, sent, compute))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Size:
    """Of one step and batch."""

    inputs: Indices
    """(P,) values that each worker holds of what the step reads."""
    outputs: Indices
    """(P,) values that each worker makes."""
    samples: int
    itemsize: int

    @property
    def nothing(self) -> Demand:
        return Demand(np.zeros_like(self.inputs), np.zeros_like(self.inputs))


def _values(split: Split, n_workers: int) -> Indices:
    """(P,) values a sample that each worker holds."""
    if split.layout is None:
        return np.full(n_workers, math.prod(split.shape), dtype=np.int64)
    return np.bincount(split.places, minlength=n_workers) * split.n_positions


def _product(module: nn.Module, layer: PlannedLayer, size: _Size) -> tuple[Demand, Demand]:
    """Encode the held values into numbers, then multiply all columns."""
    workers = range(layer.n_workers)
    rows, columns, held, encoded = (
        np.array([len(of(worker)) for worker in workers], dtype=np.int64)
        for of in (layer.rows, layer.columns, layer.held, layer.encoded)
    )
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None) is not None
    taps, at = math.prod(weight.shape[2:]), layer.positions * size.samples
    encoding = encoded * held
    values, weights = columns * at + size.outputs, rows * taps * columns + rows * bias
    prepare = Demand.of(2 * encoding * at, size.itemsize * (encoding + (held + encoded) * at))
    macs = rows * columns * layer.weight_macs * size.samples
    return prepare, Demand.of(2 * macs, size.itemsize * (values + weights))


def _unit(module: nn.Module, inputs: Sequence[Split], output: Split, size: _Size) -> tuple[Demand, Demand]:
    """Of a step that is no product."""
    if isinstance(module, _MOVES):
        return size.nothing, size.nothing
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if role_of(module) is Role.SOURCE:  # reads as much of its table as it makes
        return size.nothing, Demand.of(size.outputs, size.itemsize * 2 * size.outputs)
    places = _values(output, len(size.outputs)) // max(output.n_positions, 1)
    weights = parameters * places // max(int(places.sum()), 1)
    memory = size.itemsize * (weights + size.inputs + size.outputs)
    compute = Demand.of(_operations(module, inputs, size), memory)
    if role_of(module) is Role.NORM:
        return Demand.of(size.inputs, size.itemsize * size.inputs), compute
    return size.nothing, compute


def _operations(module: nn.Module, inputs: Sequence[Split], size: _Size) -> Indices:
    """(P,) of one batch."""
    if is_depthwise(module):
        return 2 * size.outputs * math.prod(module.get_parameter("weight").shape[2:])
    if isinstance(module, steps.Attention):
        # q kᵀ and the sum over v: each a multiply-accumulate for every output and token.
        return 4 * size.outputs * inputs[0].n_positions
    return size.inputs
