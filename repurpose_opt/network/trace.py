"""Reads a model as a graph of steps: by torch.fx, and by torch.export where torch.fx cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn.parameter import UninitializedParameter

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.network.builder import CENTRAL_UNIT, Builder
from repurpose_opt.network.lower import Call, Output, Samples, lower_function, lower_module, mapped, outputs_in
from repurpose_opt.network.siblings import stacked
from repurpose_opt.runtime.coded import Product
from repurpose_opt.runtime.graph import INPUT, Graph
from repurpose_opt.runtime.layout import Layout
from repurpose_opt.runtime.modules import Role, role_of
from repurpose_opt.runtime.splits import reads_ids


@dataclass(frozen=True, eq=False)
class Network:
    """A model as a graph, and what of it is placed as a whole.

    The modules are copies in evaluation mode, on the CPU, and none works in place. `layouts` name the unit at each
    place of an output, 0 … n_units − 1; unit 0 is on the one worker that computes what cannot be split.
    """

    graph: Graph
    input_shape: tuple[int, ...]
    """Of one sample."""
    layouts: Mapping[str, Layout | None]
    """By step, and INPUT; None where every worker has the whole tensor."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of one sample, by step, and INPUT."""
    central: Mapping[str, str]
    """Steps that run on one worker, and why."""

    @cached_property
    def n_units(self) -> int:
        return 1 + max(int(layout.places.max(initial=0)) for layout in self.layouts.values() if layout is not None)

    @cached_property
    def products(self) -> tuple[str, ...]:
        """Names of the steps whose inputs are sent as values or codes, in order."""
        return tuple(step.name for step in self.graph.steps if role_of(self.graph.module(step.name)) is Role.PRODUCT)

    @cached_property
    def batch_size(self) -> int:
        """Samples at once, so that the largest tensor has at most some ten million numbers."""
        largest = max(int(np.prod(shape)) for shape in self.shapes.values())
        return max(1, min(2048, (1 << 24) // largest))

    @property
    def output(self) -> str:
        """Name of the last step."""
        return self.graph.steps[-1].name

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the weights, float32 or float64: what the plan computes in, and what its messages hold."""
        return next(self.graph.parameters()).dtype

    def is_source(self, name: str) -> bool:
        return role_of(self.graph.module(name)) is Role.SOURCE

    def product(self, name: str) -> Product:
        module = self.graph.module(name)
        assert isinstance(module, Product)
        return module

    def read(self, name: str) -> str:
        """Name of the only tensor that a step reads."""
        (step,) = (step for step in self.graph.steps if step.name == name)
        return step.inputs[0]

    def units(self, name: str) -> NDArray[np.int64]:
        """(size,) unit at each place of an output that is split."""
        layout = self.layouts[name]
        assert layout is not None
        return layout.places

    @cached_property
    def answer_units(self) -> NDArray[np.int64]:
        """Units of the answer that nothing else reads: they may be wherever the answer is wanted."""
        inputs = {step.name: step.inputs for step in self.graph.steps}
        ends, open_ends = [], [self.output]
        while open_ends:
            name = open_ends.pop()
            if name in inputs and (self.units(name) == CENTRAL_UNIT).all():
                open_ends += inputs[name]
            else:
                ends.append(name)
        layout = self.layouts[INPUT]
        elsewhere = [np.array([CENTRAL_UNIT]), *([] if layout is None else [layout.places])]
        for step in self.graph.steps:
            if role_of(self.graph.module(step.name)) in (Role.PRODUCT, Role.NORM):
                elsewhere.append(self.units(step.inputs[0]))
        return np.setdiff1d(np.concatenate([self.units(name) for name in ends]), np.concatenate(elsewhere))

    def positions(self, name: str) -> int:
        """Numbers of one place of an output, for one sample: pixels of a channel, tokens of a feature."""
        layout = self.layouts[name]
        size = self.shapes[name][-1] if layout is None else len(layout.places)
        return int(np.prod(self.shapes[name])) // size

    def with_modules(self, modules: Mapping[str, nn.Module]) -> Network:
        """The same network with other modules of the same kind and shape in some places."""
        steps = [
            (step.name, modules.get(step.name) or copy.deepcopy(self.graph.module(step.name)), step.inputs)
            for step in self.graph.steps
        ]
        return replace(self, graph=Graph(steps).eval().requires_grad_(False))


def trace(model: nn.Module, example_input: torch.Tensor) -> Network:
    """The network of a model of one input and one output, samples first in both.

    What is not known runs on one worker: `Network.central` names it. Raises UnsupportedModule where neither torch.fx
    nor torch.export can read the model or nothing in it can be placed, InvalidArgument where the example input does not
    fit the model or its weights are not finite.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument("model", type(model).__name__, "a torch.nn.Module")
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise InvalidArgument("model", "lazy modules without weights", "one that has run once")
    model = _copied(model).cpu().eval().requires_grad_(False)
    _check_weights(model)
    example = _checked_example(model, example_input)
    calls = _calls(model, example)
    builder = Builder(example)
    builder.layouts[INPUT] = _input_layout(builder, calls, example)
    output = _lower(builder, calls)
    builder = stacked(builder, output)
    network = _network(builder, model, example)
    if _can_be_wanted_anywhere(network):
        return network
    builder.gathered(network.output)
    return _network(builder, model, example)


def _copied(model: nn.Module) -> nn.Module:
    """A copy; of weights that hooks compute, as pruning and normalisation do, their numbers, which have no deepcopy."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(value): value.detach() for value in computed})


@dataclass(frozen=True)
class _Calls:
    """The graph of a model as torch.fx or torch.export gives it."""

    graph: fx.Graph
    constants: Mapping[str, Any]
    """Parameters and buffers by the names of their placeholders; none for torch.fx, which gets them by their paths."""
    module: nn.Module


def _calls(model: nn.Module, example: torch.Tensor) -> _Calls:
    if isinstance(model, fx.GraphModule):  # of torch.export too; its steps keep their names
        return _Calls(model.graph, {}, model)
    if type(model).__module__.startswith("torch.nn.") and not isinstance(model, nn.Sequential):
        model = nn.Sequential(model)  # known as a whole, not by what its forward does
    try:
        graph = fx.symbolic_trace(model).graph
        if sum(node.op == "placeholder" for node in graph.nodes) == 1:
            return _Calls(graph, {}, model)
        reason = "it has several inputs"  # which torch.export leaves at their defaults
    except Exception as error:  # whatever the model's own code makes of a value that is not there
        reason = str(error).split("\n")[0]
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    except Exception:
        raise UnsupportedModule(
            f"model: neither torch.fx nor torch.export can read it ({reason}); allowed: no control flow on values"
        ) from None
    signature, state = program.graph_signature, {**program.state_dict, **program.constants}
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return _Calls(program.graph, {name: state[path].detach() for name, path in named.items()}, model)


def _input_layout(builder: Builder, calls: _Calls, example: torch.Tensor) -> Layout | None:
    """Of what the first step reads: whole numbers are known to every worker; flattened samples are single columns."""
    if not example.is_floating_point():
        return None
    nodes = [node for node in calls.graph.nodes if node.op == "placeholder" and node.name not in calls.constants]
    if len(nodes) != 1:
        names = ", ".join(repr(node.name) for node in nodes[1:])
        raise UnsupportedModule(f"input {names}: the model has several inputs; allowed: one")
    readers = [_target(calls, user) for user in nodes[0].users]
    if example.ndim == 2:
        return Layout(1, builder.units.new(example.shape[1]))
    if readers and all(_is_flatten(reader) for reader in readers):
        return Layout(1, builder.units.new(example[0].numel()))
    is_map = example.ndim > 3 or any("conv1d" in str(reader).lower() for reader in readers)
    axis = 1 if is_map else -1
    return Layout(axis, builder.units.new(example.shape[axis]))


def _target(calls: _Calls, node: fx.Node) -> Any:
    return calls.module.get_submodule(str(node.target)) if node.op == "call_module" else node


def _is_flatten(reader: Any) -> bool:
    if isinstance(reader, nn.Module):
        return isinstance(reader, nn.Flatten) and (reader.start_dim, reader.end_dim) == (1, -1)
    name, given = _function(reader), reader.args[1:]
    if name == "flatten":
        dims = dict(zip(("start_dim", "end_dim"), given, strict=False)) | reader.kwargs
        return (dims.get("start_dim", 0), dims.get("end_dim", -1)) == (1, -1)
    if name in ("view", "reshape"):
        sizes = given[0] if len(given) == 1 and isinstance(given[0], tuple | list) else given
        return len(sizes) == 2
    return name in ("size", "sym_size", "dim", "getattr")  # numbers, for whatever flattens it then


def _function(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target.strip("_")
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1].strip("_")
    return str(getattr(target, "__name__", target)).strip("_")


def _lower(builder: Builder, calls: _Calls) -> str:
    """Add all steps; returns the name of the one whose output is the model's."""
    model = calls.module
    known: dict[fx.Node, Any] = {}

    def given(part: Any) -> Any:
        return fx.node.map_aggregate(part, lambda leaf: known[leaf] if isinstance(leaf, fx.Node) else leaf)

    for node in calls.graph.nodes:
        if node.op == "placeholder":
            constant = calls.constants.get(node.name)
            if constant is None and any(isinstance(value, Output) for value in known.values()):
                raise UnsupportedModule(f"input {node.name!r}: the model has several inputs; allowed: one")
            known[node] = Output(INPUT) if constant is None else constant
        elif node.op == "get_attr":
            known[node] = _attribute(model, str(node.target))
        elif node.op == "output":
            result = given(node.args[0])
            if isinstance(result, tuple | list) and len(result) == 1:
                (result,) = result
            if not isinstance(result, Output):
                raise UnsupportedModule("the output is not one tensor computed from the input; allowed: one tensor")
            return result.name
        else:
            known[node] = _lowered(builder, model, node, given(node.args), given(dict(node.kwargs)), known)
    raise UnsupportedModule("model: its graph has no output")


def _lowered(
    builder: Builder, model: nn.Module, node: fx.Node, args: Any, kwargs: Any, known: Mapping[fx.Node, Any]
) -> Any:
    """What a node gives: an Output, or a constant where it depends on no output."""
    read = outputs_in((args, kwargs))
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if not read:
            return module(*args, **kwargs)
        if isinstance(module, nn.MultiheadAttention):
            masks = [kwargs.get("key_padding_mask"), kwargs.get("attn_mask")]
            if len(args) > 3 or any(mask is not None for mask in masks) or kwargs.get("is_causal"):
                raise UnsupportedModule(f"module {node.target!r}: attention with a mask; allowed: without")
            return (lower_module(builder, str(node.target), module, read, False), None)
        is_plain = len(read) == len(args) and not kwargs
        # Several nodes may stand for one output, each but the first a user of another.
        same = [other for other, value in known.items() if isinstance(value, Output) and value.name in read]
        sole = len(read) == 1 and sum(len(other.users) for other in same) == len(same)
        if not is_plain:
            call = Call(str(node.target), type(module).__name__, module, tuple(args), kwargs)
            return lower_function(builder, call)
        return lower_module(builder, str(node.target), module, read, sole)
    function = _function(node)
    target: Callable[..., Any]
    if function == "view" and all(isinstance(part, int | tuple | list) for part in args[1:]):
        target = torch.reshape if node.op != "call_method" else _Method("reshape")  # strides need not be the model's
    elif node.op == "call_method":
        target = _Method(str(node.target))
    else:
        assert callable(node.target)
        target = node.target
    if function == "getitem" and isinstance(args[0], tuple):
        if args[0][args[1]] is None and node.users:
            raise UnsupportedModule(f"{node.name!r}: the weights of an attention are read; allowed: only its output")
        return args[0][args[1]]
    if not read:
        return target(*args, **kwargs)
    if function in ("size", "dim", "numel", "getattr", "sym_size"):  # of a tensor: numbers, the same for every sample
        values = mapped(lambda leaf: builder.values[leaf.name] if isinstance(leaf, Output) else leaf, tuple(args))
        found = target(*values, **kwargs)
        if isinstance(found, torch.Size):
            return (Samples(found[0]), *found[1:])
        if not isinstance(found, torch.Tensor):
            return Samples(found) if "size" in function and args[1:] == (0,) else found
    return lower_function(builder, Call(node.name, function, target, tuple(args), kwargs))


@dataclass(frozen=True)
class _Method:
    """A method of a tensor, as a function."""

    name: str

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(value, self.name)(*args, **kwargs)


def _attribute(model: nn.Module, path: str) -> Any:
    found: Any = model
    for part in path.split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, torch.Tensor) else found


def _can_be_wanted_anywhere(network: Network) -> bool:
    """Whether all of the answer's units are free to be where it is wanted; if not, they are sent there."""
    return bool(np.isin(network.units(network.output), [CENTRAL_UNIT, *network.answer_units]).all())


def _network(builder: Builder, model: nn.Module, example: torch.Tensor) -> Network:
    """The graph with its units counted from 1, and all of the output where it is wanted."""
    output = builder.steps[-1][0] if builder.steps else INPUT
    if builder.layouts[INPUT] is None and not reads_ids(builder.graph()):
        raise UnsupportedModule("input: whole numbers that no nn.Embedding reads as they are; allowed: token ids")
    if builder.layouts[output] is None or not any(role_of(module) is Role.PRODUCT for _, module, _ in builder.steps):
        raise UnsupportedModule("model: no nn.Linear or convolution in it that can be placed; allowed: at least one")
    found = {
        name: None if layout is None else builder.units.found(layout.places) for name, layout in builder.layouts.items()
    }
    units = np.unique(np.concatenate([[CENTRAL_UNIT], *(places for places in found.values() if places is not None)]))
    layouts: dict[str, Layout | None] = {}
    for name, layout in builder.layouts.items():
        places = found[name]
        layouts[name] = None if layout is None else Layout(layout.axis, np.searchsorted(units, np.asarray(places)))
    shapes = {name: tuple(value.shape[1:]) for name, value in builder.values.items()}
    network = Network(
        builder.graph().eval().requires_grad_(False), tuple(example.shape[1:]), layouts, shapes, builder.central
    )
    _check_same(model, network.graph, torch.cat([example, example[:1]]))
    return network


@torch.no_grad()
def _check_same(model: nn.Module, graph: Graph, inputs: torch.Tensor) -> None:
    """That the graph computes what the model does, for another number of samples than it was read with."""
    expected, output, name = model(inputs.clone()), inputs, INPUT
    try:
        for step, output in graph.outputs(inputs):
            name = step.name
            if len(output) != len(inputs):
                got = f"{len(output)} in front for {len(inputs)} samples"
                raise UnsupportedModule(f"step {name!r}: its output has {got}; allowed: samples first")
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UnsupportedModule(f"step after {name!r}: {reason}; allowed: any number of samples") from None
    if output.shape != expected.shape or not torch.allclose(expected, output, rtol=1e-3, atol=1e-4):
        raise UnsupportedModule("model: read as a graph, it computes something else; please report it")


def _check_weights(model: nn.Module) -> None:
    """Weights must be finite and of one dtype, float32 or float64."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not dtypes:
        raise UnsupportedModule("model: no nn.Linear or convolution in it that can be placed; allowed: at least one")
    if dtypes not in ({torch.float32}, {torch.float64}):
        got = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InvalidArgument("model", f"{got} weights", "float32 or float64, for instance model.float()")
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise InvalidArgument("model", "NaN or infinite weights", "finite numbers")


@torch.no_grad()
def _checked_example(model: nn.Module, example_input: torch.Tensor) -> torch.Tensor:
    """Two samples: with one, an axis of samples looks like any axis of length one."""
    if not isinstance(example_input, torch.Tensor):
        raise InvalidArgument("example_input", type(example_input).__name__, "a tensor")
    if example_input.ndim < 2 or len(example_input) == 0:
        raise InvalidArgument(
            "example_input", f"shape {tuple(example_input.shape)}", "(samples, …), at least one sample"
        )
    has_ids = any(isinstance(module, nn.Embedding) for module in model.modules()) or (
        isinstance(model, fx.GraphModule) and any(_function(node) == "embedding" for node in model.graph.nodes)
    )
    dtype = next(model.parameters()).dtype
    example = example_input[:1].cpu()
    example = example if has_ids and not example.is_floating_point() else example.to(dtype)
    # Numbers that differ, so that what is read wrongly is not equal by chance.
    if example.is_floating_point():
        noise = torch.randn((2, *example.shape[1:]), dtype=dtype, generator=torch.Generator().manual_seed(0))
        example = example + noise
    else:
        example = torch.cat([example, example.flip(-1)])
    try:
        output = model(example.clone())  # it may work in place
    except Exception as error:
        first_line = str(error).split("\n")[0]
        raise InvalidArgument("example_input", first_line, "an input that the model accepts") from None
    if isinstance(output, torch.Tensor) and (output.ndim < 2 or len(output) != 2):
        raise UnsupportedModule(f"the output has the shape {tuple(output.shape)} for 2 samples; allowed: samples first")
    return example
