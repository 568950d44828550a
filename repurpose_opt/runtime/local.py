"""The steps of a plan as one worker runs them, on the part of every tensor that it holds.

A local tensor is units first: (places held, samples, *positions). What a step reads of other workers arrives through
its exchange, which sees (places, samples · positions).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import Conv, Product, convolve
from repurpose_opt.runtime.exchange import ExchangeStep, Start
from repurpose_opt.runtime.graph import INPUT, Graph, Step
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.modules import Role, is_depthwise, role_of
from repurpose_opt.runtime.splits import Split
from repurpose_opt.runtime.storage import Tensors, of_step
from repurpose_opt.runtime.wire import Wire

Compute = Callable[..., torch.Tensor]
"""Of local tensors."""


class LocalStep(Protocol):
    """A step that a worker does without the others."""

    def run(self, values: Sequence[Any], samples: int) -> Any: ...


class ExchangingStep(ABC):
    """A step before which workers exchange what they hold of its only input.

    What is computed of values held here goes on while those of others are under way.
    """

    exchange: ExchangeStep

    def run(self, value: torch.Tensor, samples: int, start: Start) -> torch.Tensor:
        offered = self.offered(value)
        self.exchange.begin(offered, start)
        own = self.own_part(value, offered, samples)
        return self.completed(own, offered, self.exchange.end(offered.shape[1]), samples)

    @abstractmethod
    def offered(self, value: torch.Tensor) -> torch.Tensor:
        """(held, samples · positions) out of which messages are made."""

    @abstractmethod
    def own_part(self, value: torch.Tensor, offered: torch.Tensor, samples: int) -> torch.Tensor:
        """What can be computed of the output before anything arrives."""

    @abstractmethod
    def completed(self, own: torch.Tensor, offered: torch.Tensor, received: torch.Tensor, samples: int) -> torch.Tensor:
        """The output, with the numbers received (numbers, samples · positions). May overwrite `own`."""


@dataclass(frozen=True, eq=False)
class Part:
    """The steps of a plan on one worker."""

    steps: tuple[tuple[Step, LocalStep | ExchangingStep], ...]
    last_readers: Mapping[str, str]

    @property
    def exchanges(self) -> tuple[ExchangeStep, ...]:
        """In the order in which they take place, those in which nothing is sent included."""
        return tuple(local.exchange for _, local in self.steps if isinstance(local, ExchangingStep))

    def run(self, value: torch.Tensor, samples: int, start: Start) -> torch.Tensor:
        """From the part of the input that the worker holds to its part of the output."""
        values: dict[str, Any] = {INPUT: value}
        output: Any = value
        for step, local in self.steps:
            inputs = [values[name] for name in step.inputs]
            if isinstance(local, ExchangingStep):
                output = local.run(inputs[0], samples, start)
            else:
                output = local.run(inputs, samples)
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

    def run(self, values: Sequence[torch.Tensor], samples: int) -> torch.Tensor:
        if self.held == 0 or samples == 0:
            return torch.empty((self.held, samples, *self.positions), dtype=self.dtype)
        return self.compute(*values)


@dataclass(frozen=True, eq=False)
class LinearStep(ExchangingStep):
    """A product, of held values and of received numbers. Either weight may be in compressed rows (CSR)."""

    exchange: ExchangeStep
    held: torch.Tensor
    """(rows, values held)"""
    received: torch.Tensor
    """(rows, numbers received): weights of values, decoders of numbers of codes."""
    bias: torch.Tensor
    """(rows, 1)"""
    positions: tuple[int, ...]

    def offered(self, value: torch.Tensor) -> torch.Tensor:
        return value.flatten(1)

    def own_part(self, value: torch.Tensor, offered: torch.Tensor, samples: int) -> torch.Tensor:
        if self.held.layout is torch.sparse_csr:
            return torch.mm(self.held, offered).add_(self.bias)
        return torch.addmm(self.bias, self.held, offered)

    def completed(self, own: torch.Tensor, offered: torch.Tensor, received: torch.Tensor, samples: int) -> torch.Tensor:
        output = own
        if self.received.layout is torch.sparse_csr:
            output = own.add_(torch.mm(self.received, received))
        elif len(received):
            output = own.addmm_(self.received, received)
        return output.view(len(output), samples, *self.positions)


@dataclass(frozen=True, eq=False)
class ConvStep(ExchangingStep):
    """A convolution, of held channels and of received maps."""

    exchange: ExchangeStep
    held: torch.Tensor
    """(rows, channels held, …)"""
    received: torch.Tensor
    """(rows, maps received, …)"""
    bias: torch.Tensor
    """(rows,)"""
    like: Conv
    read: tuple[int, ...]
    """Positions of the input."""
    positions: tuple[int, ...]
    """Of the output."""

    def offered(self, value: torch.Tensor) -> torch.Tensor:
        return value.flatten(1)

    def own_part(self, value: torch.Tensor, offered: torch.Tensor, samples: int) -> torch.Tensor:
        if 0 in self.held.shape or samples == 0:
            ones = (1,) * (1 + len(self.positions))
            # Memory of its own, as what follows may work in place.
            return self.bias.view(-1, *ones).repeat(1, samples, *self.positions)
        return self._convolved(offered, self.held, self.bias, samples)

    def completed(self, own: torch.Tensor, offered: torch.Tensor, received: torch.Tensor, samples: int) -> torch.Tensor:
        if 0 in self.received.shape or samples == 0:
            return own
        return own + self._convolved(received, self.received, None, samples)

    def _convolved(
        self, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, samples: int
    ) -> torch.Tensor:
        maps = inputs.view(len(inputs), samples, *self.read).transpose(0, 1)
        return convolve(maps, weight, bias, self.like).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class NormStep(ExchangingStep):
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

    def offered(self, value: torch.Tensor) -> torch.Tensor:
        features = value.flatten(1)
        statistics = features.new_zeros(2, features.shape[1])
        if self.held:
            torch.mean(features, 0, out=statistics[0])
            torch.sum((features - statistics[0]).square_(), 0, out=statistics[1])
        return statistics

    def own_part(self, value: torch.Tensor, offered: torch.Tensor, samples: int) -> torch.Tensor:
        return value

    def completed(self, own: torch.Tensor, offered: torch.Tensor, received: torch.Tensor, samples: int) -> torch.Tensor:
        if self.held == 0:
            return own
        value, statistics = own.flatten(1), torch.cat([offered, received])
        means, squares = statistics[0::2], statistics[1::2]
        mean = (self.counts * means).sum(0) / self.counts.sum()
        variance = (squares + self.counts * (means - mean).square()).sum(0) / self.counts.sum()
        output = (value - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            output = output * self.weight
        if self.bias is not None:
            output = output + self.bias
        return output.view(own.shape)


@dataclass(frozen=True, eq=False)
class GatherStep(ExchangingStep):
    """Everything on one worker, in order; nothing elsewhere."""

    exchange: ExchangeStep
    order: torch.Tensor
    """(n,) where each value stands among held and received ones; (0,) on the other workers."""

    def offered(self, value: torch.Tensor) -> torch.Tensor:
        return value.flatten(1)

    def own_part(self, value: torch.Tensor, offered: torch.Tensor, samples: int) -> torch.Tensor:
        return value

    def completed(self, own: torch.Tensor, offered: torch.Tensor, received: torch.Tensor, samples: int) -> torch.Tensor:
        gathered = torch.cat([offered, received]).index_select(0, self.order)
        return gathered.view(len(self.order), *own.shape[1:])


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

    def run(self, values: Sequence[Any], samples: int) -> Any:
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
    wire: Wire | None = None,
) -> Part:
    """The steps of one worker, with its own tensors; the parameters of the graph's modules are not read.

    `wire` is how messages are written; None: as numbers of `dtype`.
    """
    by_name = {layer.name: layer for layer in layers}
    built: list[tuple[Step, LocalStep | ExchangingStep]] = []
    for step in graph.steps:
        module, own = graph.module(step.name), of_step(tensors, step.name)
        inputs, output = tuple(splits[name] for name in step.inputs), splits[step.name]
        if role_of(module) in _ALONE:
            built.append((step, _alone(module, inputs, output, worker, own, dtype)))
        else:
            layer = by_name[step.name]
            exchange = ExchangeStep(layer, worker, batch_size, dtype, own.get("encoder"), wire)
            built.append((step, _exchanging(exchange, module, layer, inputs[0], output, worker, own, dtype)))
    return Part(tuple(built), graph.last_readers)


_ALONE = (Role.CENTRAL, Role.UNIT, Role.STRUCTURE, Role.SOURCE)


def _alone(
    module: nn.Module, inputs: tuple[Split, ...], output: Split, worker: int, tensors: Tensors, dtype: torch.dtype
) -> LocalStep:
    held = len(output.held(worker))
    if role_of(module) is Role.CENTRAL:
        return CentralStep(module, tensors, inputs, output, held > 0, dtype)
    return UnitStep(held, output.positions, dtype, _compute(module, inputs, output, worker, tensors))


def _exchanging(
    exchange: ExchangeStep,
    module: nn.Module,
    layer: PlannedLayer,
    read: Split,
    output: Split,
    worker: int,
    tensors: Tensors,
    dtype: torch.dtype,
) -> ExchangingStep:
    if role_of(module) is Role.GATHER:
        order = np.argsort(layer.columns(worker)) if len(output.held(worker)) else np.zeros(0, dtype=np.int64)
        return GatherStep(exchange, torch.as_tensor(order))
    if isinstance(module, nn.LayerNorm):
        return _norm(exchange, module, layer, worker, tensors, dtype)
    assert isinstance(module, Product)
    weight = tensors["weight"]
    bias = tensors.get("bias", torch.zeros(len(weight), dtype=dtype))
    n_held = len(layer.held(worker))
    # Contiguous on their own, as every product would copy them otherwise.
    held, received = weight[:, :n_held].contiguous(), weight[:, n_held:].contiguous()
    if isinstance(module, Conv):
        return ConvStep(exchange, held, received, bias, module, read.positions, output.positions)
    return LinearStep(exchange, held, received, bias[:, None], output.positions)


def _norm(
    exchange: ExchangeStep, module: nn.LayerNorm, layer: PlannedLayer, worker: int, tensors: Tensors, dtype: torch.dtype
) -> NormStep:
    counts = np.bincount(layer.owner, minlength=layer.n_workers)
    others = [k for k in np.flatnonzero(counts).tolist() if k != worker]
    by_place = torch.as_tensor(counts[[worker, *others]]).to(dtype)[:, None]
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
