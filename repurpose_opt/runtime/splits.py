"""How every tensor of a plan is split over the workers, and whether steps and layers fit each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Values
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import CodedConv, CodedLinear, Product
from repurpose_opt.runtime.graph import INPUT, Graph, Step
from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer, PlannedStatistics, check_layer
from repurpose_opt.runtime.layout import Layout, carried, made
from repurpose_opt.runtime.modules import POOLING, Role, role_of

SAMPLES = 2
"""With which shapes are found: an axis of one sample could be taken for something else."""
_LAYER_ROLES = (Role.PRODUCT, Role.SOURCE, Role.NORM, Role.GATHER, Role.CENTRAL)


@dataclass(frozen=True, eq=False)
class Split:
    """One tensor of a graph: its shape, and which worker holds what stands at each place of its axis."""

    shape: tuple[int, ...]
    """Of one sample."""
    layout: Layout | None
    """None where every worker has the whole tensor."""

    @property
    def axis(self) -> int:
        """That is split, of (samples, …)."""
        assert self.layout is not None
        return self.layout.axis % (len(self.shape) + 1) if self.shape else 0

    @property
    def positions(self) -> tuple[int, ...]:
        """The other axes of one sample."""
        return self.shape[: self.axis - 1] + self.shape[self.axis :] if self.shape else ()

    @property
    def n_positions(self) -> int:
        return math.prod(self.positions)

    @property
    def places(self) -> Indices:
        assert self.layout is not None
        return self.layout.places

    def held(self, worker: int) -> Indices:
        """Places that a worker holds, ascending."""
        return np.flatnonzero(self.places == worker)


def reads_ids(graph: Graph) -> bool:
    """Whether the network's input are whole numbers, which an embedding reads."""
    return any(isinstance(graph.module(step.name), nn.Embedding) for step in graph.readers(INPUT))


def is_flattened(graph: Graph) -> bool:
    """Whether whatever reads the network's input flattens it, so that its columns are held one by one."""
    modules = [graph.module(step.name) for step in graph.readers(INPUT)]
    return all(isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1) for module in modules)


def splits_of(
    graph: Graph,
    layers: Sequence[PlannedLayer],
    n_workers: int,
    dtype: torch.dtype,
    input_owner: Indices | None,
    input_shape: Sequence[int],
) -> dict[str, Split]:
    """How the input and the output of every step are split, by INPUT and the steps' names.

    Runs the graph once, on zeros. Raises InvalidArgument, naming the step or layer,
    where a step cannot run on inputs that are split as they are, or a layer does not fit its step.
    """
    _check_names(graph, layers)
    for layer in layers:
        check_layer(layer, n_workers)
    shapes = _shapes(graph, dtype, tuple(input_shape))
    by_name = {layer.name: layer for layer in layers}
    splits = {INPUT: _input_split(graph, n_workers, input_owner, tuple(input_shape))}
    for step in graph.steps:
        module, shape = graph.module(step.name), shapes[step.name]
        inputs = [splits[name] for name in step.inputs]
        if role_of(module) in _LAYER_ROLES:
            layout = _of_layer(step, module, by_name[step.name], inputs, shape, dtype.itemsize)
        else:
            layout = _of_unit(step, module, inputs, shape)
        splits[step.name] = Split(shape, layout)
    return splits


def _check_names(graph: Graph, layers: Sequence[PlannedLayer]) -> None:
    needed = [step.name for step in graph.steps if role_of(graph.module(step.name)) in _LAYER_ROLES]
    names = [layer.name for layer in layers]
    if not names:
        raise InvalidArgument("layers", "none", f"one for each step that is no unit by itself, in order: {needed}")
    if names != needed:
        raise InvalidArgument("layers", names, f"one for each step that is no unit by itself, in order: {needed}")


@torch.no_grad()
def _shapes(graph: Graph, dtype: torch.dtype, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of one sample of every output; () for what is no tensor."""
    zeros = torch.zeros(SAMPLES, *input_shape, dtype=torch.int64 if reads_ids(graph) else dtype)
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for step, output in graph.outputs(zeros):
            shapes[step.name] = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        name, reason = graph.steps[len(shapes)].name, str(error).split("\n")[0]
        raise InvalidArgument(
            "input_shape", f"{input_shape}, at step {name!r}: {reason}", "one that it accepts"
        ) from None
    return shapes


def _input_split(graph: Graph, n_workers: int, input_owner: Indices | None, shape: tuple[int, ...]) -> Split:
    if input_owner is None:
        return Split(shape, None)
    if reads_ids(graph):
        raise InvalidArgument("input_owner", "owners of token ids", "None: every worker has them")
    if is_flattened(graph):
        shape, axis = (math.prod(shape),), 1
    else:
        needed = [_needs(graph.module(step.name))[0] for step in graph.readers(INPUT)]
        is_tokens = len(shape) == 2 and 1 not in needed and len(input_owner) == shape[-1]
        axis = -1 if is_tokens else 1
    size = shape[axis - 1] if axis == 1 else shape[-1]
    if input_owner.shape != (size,):
        raise InvalidArgument("input_owner", f"shape {input_owner.shape}", f"({size},), a worker for each place")
    outside = input_owner[(input_owner < 0) | (input_owner >= n_workers)]
    if len(outside):
        raise InvalidArgument("input_owner", f"worker {outside[0]}", f"0 … {n_workers - 1}")
    return Split(shape, Layout(axis, input_owner))


def _of_layer(
    step: Step,
    module: nn.Module,
    layer: PlannedLayer,
    inputs: Sequence[Split],
    shape: tuple[int, ...],
    itemsize: int,
) -> Layout:
    """The layout of the output of a step with a layer, checked against it."""
    role, whole = role_of(module), (SAMPLES, *shape)
    if role is Role.SOURCE:
        if inputs[0].layout is not None:
            raise InvalidArgument(f"step {step.name!r}: input", "split over workers", "one that every worker has")
        _check_size(layer, "owner", len(layer.owner), shape[-1])
        _check_no_messages(layer)
        return made(layer.owner, whole)
    if role is Role.CENTRAL:
        return _central(step, layer, inputs, whole)
    (read,) = inputs
    _check_read(step, module, read)
    if not np.array_equal(read.places, layer.input_owner):
        allowed = f"the owner of {step.inputs[0]!r}, which it reads"
        raise InvalidArgument(f"layer {layer.name!r}: input_owner", "other workers", allowed)
    if layer.positions != read.n_positions:
        raise InvalidArgument(
            f"layer {layer.name!r}: positions", layer.positions, f"{read.n_positions}, those it reads"
        )
    if layer.value_bytes != itemsize * layer.positions:
        allowed = f"{itemsize * layer.positions}, {layer.positions} positions of {itemsize} bytes"
        raise InvalidArgument(f"layer {layer.name!r}: value_bytes", layer.value_bytes, allowed)
    if role is Role.PRODUCT:
        assert isinstance(module, Product)
        return _product(module, layer, whole)
    if role is Role.NORM:
        return _norm(layer, read)
    return _gather(layer, read)


def _product(module: Product, layer: PlannedLayer, whole: tuple[int, ...]) -> Layout:
    shape, planned = tuple(module.weight.shape[:2]), (len(layer.owner), len(layer.input_owner))
    if shape != planned:
        raise InvalidArgument(f"layer {layer.name!r}: (m, n)", planned, f"the module's {shape}")
    numbers = module.numbers if isinstance(module, CodedLinear | CodedConv) else 0
    if layer.numbers != numbers:
        raise InvalidArgument(f"layer {layer.name!r}: numbers of all codes", layer.numbers, f"the module's {numbers}")
    for (source, target), message in layer.messages.items():
        if not isinstance(message, Values | PlannedCode):
            name = f"layer {layer.name!r}: message from worker {source} to worker {target}"
            raise InvalidArgument(name, type(message).__name__, "Values or PlannedCode")
    taps = math.prod(module.weight.shape[2:])
    macs = taps * math.prod(whole[1:]) // len(layer.owner)
    if layer.weight_macs != macs:
        raise InvalidArgument(f"layer {layer.name!r}: weight_macs", layer.weight_macs, f"{macs}, taps times positions")
    return made(layer.owner, whole, 1 if module.weight.ndim > 2 else -1)


def _norm(layer: PlannedLayer, read: Split) -> Layout:
    expected = PlannedLayer.norm(layer.name, layer.owner, layer.n_workers, layer.value_bytes, layer.positions)
    if not np.array_equal(layer.owner, layer.input_owner):
        raise InvalidArgument(f"layer {layer.name!r}: owner", "other workers", "its input_owner")
    if dict(layer.messages) != dict(expected.messages):
        allowed = f"{PlannedStatistics()} between every two workers that hold something"
        raise InvalidArgument(f"layer {layer.name!r}: messages", dict(layer.messages), allowed)
    return Layout(read.axis if read.axis == 1 else -1, layer.owner)


def _gather(layer: PlannedLayer, read: Split) -> Layout:
    _check_size(layer, "owner", len(layer.owner), len(read.places))
    worker = _only_owner(layer)
    for (source, target), message in layer.messages.items():
        if target != worker or not isinstance(message, Values):
            name = f"layer {layer.name!r}: message from worker {source} to worker {target}"
            raise InvalidArgument(name, type(message).__name__, f"Values to worker {worker}")
    had = len(layer.columns(worker))
    if had < len(layer.input_owner):
        raise InvalidArgument(f"layer {layer.name!r}: messages", f"{had} values on worker {worker}", "all values")
    return Layout(read.axis if read.axis == 1 else -1, layer.owner)


def _central(step: Step, layer: PlannedLayer, inputs: Sequence[Split], whole: tuple[int, ...]) -> Layout:
    worker = _only_owner(layer)
    _check_no_messages(layer)
    owners = [layer.input_owner, *(read.places for read in inputs if read.layout is not None)]
    if any((owner != worker).any() for owner in owners):
        allowed = f"all of it on worker {worker}, after a Gather"
        raise InvalidArgument(f"step {step.name!r}: input", "split over workers", allowed)
    same = [read.axis for read in inputs if read.layout is not None and len(read.shape) + 1 == len(whole)]
    axis = same[0] if same else 1
    _check_size(layer, "owner", len(layer.owner), whole[axis] if len(whole) > 1 else len(layer.owner))
    return Layout(axis if axis == 1 else -1, layer.owner)


def _of_unit(step: Step, module: nn.Module, inputs: Sequence[Split], shape: tuple[int, ...]) -> Layout:
    """The layout of the output of a step that runs where its inputs are held."""
    for read in inputs:
        _check_read(step, module, read)
    first = inputs[0]
    for name, read in zip(step.inputs, inputs, strict=True):
        if read.axis != first.axis or len(read.shape) != len(first.shape):
            raise InvalidArgument(f"step {step.name!r}: inputs", f"{step.inputs[0]!r} and {name!r}", "of one axis")
        is_together = isinstance(module, steps.Concatenate)
        if not is_together and not np.array_equal(read.places, first.places):
            got = f"{step.inputs[0]!r} and {name!r}, which are split in different ways"
            raise InvalidArgument(f"step {step.name!r}: inputs", got, "inputs that are split alike")
    if isinstance(module, nn.Flatten):
        _check_flatten(step, module, first, shape)
    if isinstance(module, steps.Attention):
        heads = first.places.reshape(3, module.heads, -1)
        if (heads != heads[:1, :, :1]).any():
            raise InvalidArgument(f"step {step.name!r}: input", "a head on several workers", "whole heads")
    return carried(module, [read.layout for read in inputs if read.layout is not None], (SAMPLES, *shape))


def _check_read(step: Step, module: nn.Module, read: Split) -> None:
    """Raises InvalidArgument where a step cannot run on an input that is split as it is."""
    name = f"step {step.name!r}: input"
    if read.layout is None:
        raise InvalidArgument(name, "one that every worker has", "one that is split, but for Embedding")
    axis, dimensions = _needs(module)
    ndim = len(read.shape) + 1
    if ndim not in dimensions:
        raise InvalidArgument(name, f"{read.shape} a sample", f"{min(dimensions) - 1} axes")
    if axis is not None and axis % ndim != read.axis:
        raise InvalidArgument(name, f"split along axis {read.axis} of {ndim}", f"split along axis {axis}")
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        raise InvalidArgument(f"step {step.name!r}: normalized_shape", module.normalized_shape, "one axis")


def _needs(module: nn.Module) -> tuple[int | None, Sequence[int]]:
    """The axis along which an input must be split, None for any, and how many axes it may have, samples included."""
    many = range(2, 10)
    if isinstance(module, nn.Conv1d | nn.Conv2d | CodedConv):
        return 1, (module.weight.ndim,)
    if type(module).__name__ in POOLING:
        return 1, (3 if "1d" in type(module).__name__ else 4,)
    if isinstance(module, steps.AddPositions | steps.Token | steps.Attention):
        return -1, (3,)
    if isinstance(module, nn.Linear | CodedLinear | nn.LayerNorm):
        return -1, many
    if isinstance(module, steps.Affine):
        return 1, many
    if isinstance(module, steps.ToTokens):
        return 1, many[1:]
    if isinstance(module, steps.MeanPositions):
        return module.axis, many[1:]
    if isinstance(module, steps.Concatenate | steps.Slice):
        return module.axis, many
    return None, many


def _check_flatten(step: Step, module: nn.Flatten, read: Split, shape: tuple[int, ...]) -> None:
    """All of a sample becomes one axis, or only positions do."""
    is_whole = len(shape) == 1 and module.start_dim != 0
    is_positions = read.axis == 1 and module.start_dim % (len(read.shape) + 1) >= 2
    if not (is_whole or is_positions):
        got = f"start_dim={module.start_dim}, end_dim={module.end_dim} of {read.shape}"
        raise InvalidArgument(f"step {step.name!r}: Flatten", got, "all of a sample, or all behind the channels")


def _check_size(layer: PlannedLayer, name: str, got: int, allowed: int) -> None:
    if got != allowed:
        raise InvalidArgument(f"layer {layer.name!r}: {name}", f"{got} places", f"{allowed}, the step's")


def _check_no_messages(layer: PlannedLayer) -> None:
    if layer.messages:
        raise InvalidArgument(f"layer {layer.name!r}: messages", f"{len(layer.messages)}", "none")


def _only_owner(layer: PlannedLayer) -> int:
    owners = np.unique(layer.owner).tolist()
    if len(owners) != 1:
        raise InvalidArgument(f"layer {layer.name!r}: owner", f"workers {owners}", "one worker")
    return int(owners[0])
