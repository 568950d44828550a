"""The steps of a plan as one worker runs them, on the part of every tensor that it holds.

A local tensor is units first: (places held, samples, *positions). What a step reads of other workers arrives through
its exchange, which sees (places, samples · positions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import Conv, Product, convolve
from repurpose_opt.runtime.exchange import ExchangeStep, Send
from repurpose_opt.runtime.graph import INPUT, Graph, Step
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.modules import Role, is_depthwise, role_of
from repurpose_opt.runtime.splits import Split
from repurpose_opt.runtime.storage import Tensors, of_step

Compute = Callable[..., torch.Tensor]
"""Of local tensors."""


class LocalStep(Protocol):
    """A step on one worker: its only input's exchange, if it has one, then what the worker computes."""

    @property
    def exchange(self) -> ExchangeStep | None: ...

    def run(self, values: Sequence[Any], samples: int, send: Send) -> Any: ...


@dataclass(frozen=True, eq=False)
class Part:
    """The steps of a plan on one worker."""

    steps: tuple[tuple[Step, LocalStep], ...]
    last_readers: Mapping[str, str]

    @property
    def exchanges(self) -> tuple[ExchangeStep, ...]:
        """In the order in which they take place, those in which nothing is sent included."""
        return tuple(local.exchange for _, local in self.steps if local.exchange is not None)

    def run(self, value: torch.Tensor, samples: int, send: Send) -> torch.Tensor:
        """From the part of the input that the worker holds to its part of the output."""
        values: dict[str, Any] = {INPUT: value}
        output: Any = value
        for step, local in self.steps:
            output = local.run([values[name] for name in step.inputs], samples, send)
            values[step.name] = output
            for name in set(step.inputs):
                if self.last_readers[name] == step.name:
                    del values[name]
        result: torch.Tensor = output
        return result


@dataclass(frozen=True, eq=False)
class UnitStep:
    """What is done to each value where it is held."""

    held: int
    """Places of the output."""
    positions: tuple[int, ...]
    """Of the output."""
    dtype: torch.dtype
    compute: Compute
    exchange: None = None

    def run(self, values: Sequence[torch.Tensor], samples: int, send: Send) -> torch.Tensor:
        if self.held == 0 or samples == 0:
            return torch.empty((self.held, samples, *self.positions), dtype=self.dtype)
        return self.compute(*values)


@dataclass(frozen=True, eq=False)
class LinearStep:
    """Exchange, multiply."""

    exchange: ExchangeStep
    weight: torch.Tensor
    """(rows, columns), decoders of received numbers included."""
    bias: torch.Tensor
    """(rows, 1)"""
    positions: tuple[int, ...]

    def run(self, values: Sequence[torch.Tensor], samples: int, send: Send) -> torch.Tensor:
        inputs = self.exchange.run(values[0].flatten(1), send)
        outputs = torch.addmm(self.bias, self.weight, inputs)
        return outputs.view(len(outputs), samples, *self.positions) if self.positions else outputs


@dataclass(frozen=True, eq=False)
class ConvStep:
    """Exchange, convolve."""

    exchange: ExchangeStep
    weight: torch.Tensor
    """(rows, columns, …), decoders of received maps included."""
    bias: torch.Tensor
    """(rows,)"""
    like: Conv
    read: tuple[int, ...]
    """Positions of the input."""
    positions: tuple[int, ...]
    """Of the output."""

    def run(self, values: Sequence[torch.Tensor], samples: int, send: Send) -> torch.Tensor:
        inputs = self.exchange.run(values[0].flatten(1), send)
        if 0 in self.weight.shape or samples == 0:
            ones = (1,) * (1 + len(self.positions))
            return self.bias.view(-1, *ones).expand(-1, samples, *self.positions)
        maps = inputs.view(len(inputs), samples, *self.read).transpose(0, 1)
        return convolve(maps, self.weight, self.bias, self.like).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class NormStep:
    """Mean and variance over all features, from those of every worker's part.

    With n_k, mean_k and M_k, the sum of squares around it, of each worker: mean = Σ n_k mean_k / n and M = Σ M_k +
    n_k (mean_k − mean)² (Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance").
    """

    exchange: ExchangeStep
    counts: torch.Tensor
    """(workers that hold something, 1) how many features each holds: this worker first, then by number."""
    eps: float
    weight: torch.Tensor | None
    """(held, 1)"""
    bias: torch.Tensor | None
    held: int

    def run(self, values: Sequence[torch.Tensor], samples: int, send: Send) -> torch.Tensor:
        value = values[0].flatten(1)
        statistics = value.new_zeros(2, value.shape[1])
        if self.held:
            torch.mean(value, 0, out=statistics[0])
            torch.sum((value - statistics[0]).square_(), 0, out=statistics[1])
        if self.exchange.is_needed:
            statistics = self.exchange.run(statistics, send)
        if self.held == 0:
            return torch.empty_like(values[0])
        means, squares = statistics[0::2], statistics[1::2]
        mean = (self.counts * means).sum(0) / self.counts.sum()
        variance = (squares + self.counts * (means - mean).square()).sum(0) / self.counts.sum()
        output = (value - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            output = output * self.weight
        if self.bias is not None:
            output = output + self.bias
        return output.view(values[0].shape)


@dataclass(frozen=True, eq=False)
class GatherStep:
    """Everything on one worker, in order; nothing elsewhere."""

    exchange: ExchangeStep
    order: torch.Tensor
    """(n,) where each value stands among held and received ones; (0,) on the other workers."""

    def run(self, values: Sequence[torch.Tensor], samples: int, send: Send) -> torch.Tensor:
        gathered = self.exchange.run(values[0].flatten(1), send)
        return gathered.index_select(0, self.order).view(len(self.order), *values[0].shape[1:])


@dataclass(frozen=True, eq=False)
class CentralStep:
    """A module of whole tensors on the worker that has them all; what other workers have of it is empty."""

    module: nn.Module
    tensors: Tensors
    """Its parameters."""
    inputs: tuple[Split, ...]
    output: Split
    is_here: bool
    dtype: torch.dtype
    exchange: None = None

    def run(self, values: Sequence[Any], samples: int, send: Send) -> Any:
        if not self.is_here:
            return torch.empty((0, samples, *self.output.positions), dtype=self.dtype)
        whole = tuple(whole_tensor(value, split) for value, split in zip(values, self.inputs, strict=True))
        output = torch.func.functional_call(self.module, self.tensors, whole)
        return units_first(output, self.output)


def whole_tensor(value: Any, split: Split) -> Any:
    """(samples, …) of (all places, samples, *positions). What is no tensor, or never was split, stays as it is."""
    if split.layout is None or not isinstance(value, torch.Tensor):
        return value
    return value.movedim(0, split.axis) if split.shape else value[0]


def units_first(value: Any, split: Split) -> Any:
    """The inverse of `whole_tensor`."""
    if split.layout is None or not isinstance(value, torch.Tensor):
        return value
    return value.movedim(split.axis, 0) if split.shape else value[None]


def part_of(
    graph: Graph,
    layers: Sequence[PlannedLayer],
    splits: Mapping[str, Split],
    worker: int,
    tensors: Tensors,
    batch_size: int,
    dtype: torch.dtype,
) -> Part:
    """The steps of one worker, with its own tensors; the parameters of the graph's modules are not read."""
    by_name = {layer.name: layer for layer in layers}
    built: list[tuple[Step, LocalStep]] = []
    for step in graph.steps:
        module, own, layer = graph.module(step.name), of_step(tensors, step.name), by_name.get(step.name)
        inputs, output = tuple(splits[name] for name in step.inputs), splits[step.name]
        built.append((step, _local(module, layer, inputs, output, worker, own, batch_size, dtype)))
    return Part(tuple(built), graph.last_readers)


def _local(
    module: nn.Module,
    layer: PlannedLayer | None,
    inputs: tuple[Split, ...],
    output: Split,
    worker: int,
    tensors: Tensors,
    batch_size: int,
    dtype: torch.dtype,
) -> LocalStep:
    role, held = role_of(module), output.held(worker)
    if role is Role.CENTRAL:
        return CentralStep(module, tensors, inputs, output, len(held) > 0, dtype)
    if role in (Role.UNIT, Role.STRUCTURE, Role.SOURCE):
        compute = _compute(module, inputs, output, worker, tensors)
        return UnitStep(len(held), output.positions, dtype, compute)
    assert layer is not None
    exchange = ExchangeStep(layer, worker, batch_size, dtype, tensors.get("encoder"))
    if role is Role.GATHER:
        order = np.argsort(layer.columns(worker)) if len(held) else np.zeros(0, dtype=np.int64)
        return GatherStep(exchange, torch.from_numpy(order))
    if isinstance(module, nn.LayerNorm):
        return _norm(exchange, module, layer, worker, tensors, dtype)
    assert isinstance(module, Product)
    weight = tensors["weight"]
    bias = tensors.get("bias", torch.zeros(len(weight), dtype=dtype))
    if isinstance(module, Conv):
        return ConvStep(exchange, weight, bias, module, inputs[0].positions, output.positions)
    return LinearStep(exchange, weight, bias[:, None], output.positions)


def _norm(
    exchange: ExchangeStep, module: nn.LayerNorm, layer: PlannedLayer, worker: int, tensors: Tensors, dtype: torch.dtype
) -> NormStep:
    counts = np.bincount(layer.owner, minlength=layer.n_workers)
    others = [k for k in np.flatnonzero(counts).tolist() if k != worker]
    by_place = torch.from_numpy(counts[[worker, *others]]).to(dtype)[:, None]
    weight, bias = (tensors[name][:, None] if name in tensors else None for name in ("weight", "bias"))
    return NormStep(exchange, by_place, module.eps, weight, bias, int(counts[worker]))


def _compute(module: nn.Module, inputs: Sequence[Split], output: Split, worker: int, tensors: Tensors) -> Compute:
    """What a step without exchange does to local tensors that are not empty."""
    first = inputs[0]
    if isinstance(module, nn.Embedding):
        return lambda ids: functional.embedding(ids, tensors["weight"]).movedim(-1, 0)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        assert is_depthwise(module)
        return _depthwise(module, len(first.held(worker)), tensors)
    if isinstance(module, steps.Affine):
        scale, shift = (tensors[name].view(-1, 1, *(1 for _ in output.positions)) for name in ("scale", "shift"))
        return lambda value: value * scale + shift
    if isinstance(module, steps.AddPositions):
        added = tensors["positions"].T[:, None]
        return lambda value: value + added
    if isinstance(module, steps.Token):
        return lambda value: value[:, :, module.index]
    if isinstance(module, steps.MeanPositions):
        return lambda value: value.flatten(2).mean(2)
    if isinstance(module, steps.ToTokens):
        return lambda value: value.flatten(2)
    if isinstance(module, steps.Concatenate):
        return lambda *values: torch.cat(values)
    if isinstance(module, steps.Slice):
        start, stop = np.searchsorted(first.held(worker), [module.start, module.stop]).tolist()
        return lambda value: value[start:stop]
    if isinstance(module, steps.Attention):
        return _attention(module, first.held(worker), len(first.places))
    if isinstance(module, nn.Flatten) and len(output.shape) == 1:
        # A place of the output is a place and a position of the input: places lead if the split axis does.
        order = (0, 2, 1) if first.axis == 1 else (2, 0, 1)
        return lambda value: value.flatten(2).permute(order).flatten(0, 1) if value.ndim > 2 else value
    return module


def _depthwise(module: nn.Conv1d | nn.Conv2d, channels: int, tensors: Tensors) -> Compute:
    function: Any = functional.conv1d if isinstance(module, nn.Conv1d) else functional.conv2d
    weight, bias = tensors["weight"], tensors.get("bias")
    geometry = (module.stride, module.padding, module.dilation)
    return lambda value: function(value.transpose(0, 1), weight, bias, *geometry, channels).transpose(0, 1)


def _attention(module: steps.Attention, held: Indices, places: int) -> Compute:
    """Of the heads that a worker holds: its queries, then its keys, then its values, head by head in each."""
    d = places // (3 * module.heads)
    heads = len(held) // (3 * d)

    def attend(value: torch.Tensor) -> torch.Tensor:
        # (3 · heads · d, samples, tokens) → 3 times (samples, heads, tokens, d)
        query, key, content = value.unflatten(0, (3, heads, d)).permute(0, 3, 1, 4, 2)
        attended = functional.scaled_dot_product_attention(query, key, content, is_causal=module.causal)
        return attended.permute(1, 3, 0, 2).flatten(0, 1)

    return attend
