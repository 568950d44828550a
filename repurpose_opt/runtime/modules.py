"""The modules that a plan may hold, and their specs for JSON.

A spec is {"kind": "LeakyReLU", "arguments": {"negative_slope": 0.01}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from repurpose_opt.errors import UnsupportedModule
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import CodedConv, CodedLinear


class Role(Enum):
    """How a module runs on workers of which each holds a part of its inputs."""

    PRODUCT = "a layer of a plan: its inputs are sent as values or codes"
    SOURCE = "makes what it holds out of an input that every worker has"
    NORM = "workers send each other the statistics of what they hold"
    UNIT = "each value by itself, where it is held"
    STRUCTURE = "changes which values stand where, not where they are held"
    GATHER = "all values are sent to one worker"
    CENTRAL = "needs all values on one worker"


_PARAMETRIC = (
    *("Linear", "CodedLinear", "Conv1d", "Conv2d", "CodedConv", "Embedding", "LayerNorm", "GroupNorm"),
    *("Affine", "AddPositions"),
)
"""Kinds that have parameters, of a dtype."""


class Kind(NamedTuple):
    module: type[nn.Module]
    arguments: tuple[str, ...]
    """That are kept; `inplace` is not."""
    role: Role


def _pool(module: type[nn.Module], *names: str) -> Kind:
    return Kind(module, names, Role.UNIT)


_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

ELEMENTWISE: dict[str, Kind] = {
    name: Kind(module, arguments, Role.UNIT)
    for name, module, arguments in (
        ("ReLU", nn.ReLU, ()),
        ("LeakyReLU", nn.LeakyReLU, ("negative_slope",)),
        ("ELU", nn.ELU, ("alpha",)),
        ("GELU", nn.GELU, ("approximate",)),
        ("SiLU", nn.SiLU, ()),
        ("Tanh", nn.Tanh, ()),
        ("Sigmoid", nn.Sigmoid, ()),
        ("Softplus", nn.Softplus, ("beta", "threshold")),
        ("Hardtanh", nn.Hardtanh, ("min_val", "max_val")),
        ("ReLU6", nn.ReLU6, ()),
        ("Hardsigmoid", nn.Hardsigmoid, ()),
        ("Hardswish", nn.Hardswish, ()),
        ("Mish", nn.Mish, ()),
        ("Identity", nn.Identity, ()),
        ("Dropout", nn.Dropout, ("p",)),
        ("Dropout1d", nn.Dropout1d, ("p",)),
        ("Dropout2d", nn.Dropout2d, ("p",)),
    )
}
"""Modules that act on every number by itself."""

POOLING: dict[str, Kind] = {
    "MaxPool1d": _pool(nn.MaxPool1d, *_MAX),
    "MaxPool2d": _pool(nn.MaxPool2d, *_MAX),
    "AvgPool1d": _pool(nn.AvgPool1d, *_AVERAGE),
    "AvgPool2d": _pool(nn.AvgPool2d, *_AVERAGE, "divisor_override"),
    "AdaptiveAvgPool1d": _pool(nn.AdaptiveAvgPool1d, "output_size"),
    "AdaptiveAvgPool2d": _pool(nn.AdaptiveAvgPool2d, "output_size"),
    "AdaptiveMaxPool1d": _pool(nn.AdaptiveMaxPool1d, "output_size"),
    "AdaptiveMaxPool2d": _pool(nn.AdaptiveMaxPool2d, "output_size"),
}
"""Modules that act on every channel by itself."""

KINDS: dict[str, Kind] = {
    "Flatten": Kind(nn.Flatten, ("start_dim", "end_dim"), Role.STRUCTURE),
    "Linear": Kind(nn.Linear, (*_LINEAR, "bias"), Role.PRODUCT),
    "CodedLinear": Kind(CodedLinear, (*_LINEAR, "numbers"), Role.PRODUCT),
    "Conv1d": Kind(nn.Conv1d, (*_CONV, "groups", "bias"), Role.PRODUCT),
    "Conv2d": Kind(nn.Conv2d, (*_CONV, "groups", "bias"), Role.PRODUCT),
    "CodedConv": Kind(CodedConv, (*_CONV, "numbers"), Role.PRODUCT),
    "Embedding": Kind(nn.Embedding, ("num_embeddings", "embedding_dim"), Role.SOURCE),
    "LayerNorm": Kind(nn.LayerNorm, ("normalized_shape", "eps", "elementwise_affine", "bias"), Role.NORM),
    "Affine": Kind(steps.Affine, ("size",), Role.UNIT),
    "AddPositions": Kind(steps.AddPositions, ("tokens", "size"), Role.UNIT),
    "Linearly": Kind(steps.Linearly, ("factor", "offset"), Role.UNIT),
    "Add": Kind(steps.Add, (), Role.UNIT),
    "Multiply": Kind(steps.Multiply, (), Role.UNIT),
    "MeanPositions": Kind(steps.MeanPositions, ("axis",), Role.UNIT),
    "Token": Kind(steps.Token, ("index",), Role.UNIT),
    "Concatenate": Kind(steps.Concatenate, ("axis",), Role.STRUCTURE),
    "Slice": Kind(steps.Slice, ("axis", "start", "stop"), Role.STRUCTURE),
    "AsMap": Kind(steps.AsMap, ("axes",), Role.UNIT),
    "ToTokens": Kind(steps.ToTokens, (), Role.STRUCTURE),
    "Attention": Kind(steps.Attention, ("heads", "causal"), Role.STRUCTURE),
    "Gather": Kind(steps.Gather, (), Role.GATHER),
    "Softmax": Kind(nn.Softmax, ("dim",), Role.CENTRAL),
    "LogSoftmax": Kind(nn.LogSoftmax, ("dim",), Role.CENTRAL),
    "Opaque": Kind(steps.Opaque, ("name",), Role.CENTRAL),
    "GroupNorm": Kind(nn.GroupNorm, ("num_groups", "num_channels", "eps", "affine"), Role.CENTRAL),
    **ELEMENTWISE,
    **POOLING,
}
"""kind → class, arguments and role. A Conv with a group for each channel is a depthwise one, of the role UNIT."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, None for one that is in no table: a subclass may compute something else, so it is not."""
    kind = KINDS.get(type(module).__name__)
    return kind if kind is not None and kind.module is type(module) else None


def role_of(module: nn.Module) -> Role:
    """The role of a module; one that is in no table needs all values on one worker."""
    kind = kind_of(module)
    if kind is None:
        return Role.CENTRAL
    return Role.UNIT if is_depthwise(module) else kind.role


def is_depthwise(module: nn.Module) -> bool:
    """Whether every channel is convolved by itself."""
    return isinstance(module, nn.Conv1d | nn.Conv2d) and 1 < module.groups == module.in_channels


def to_spec(module: nn.Module) -> dict[str, Any]:
    """What it takes to build the module again, apart from its weights.

    Raises UnsupportedModule for one that is in no table.
    """
    kind = kind_of(module)
    if kind is None:
        raise UnsupportedModule(f"{type(module).__qualname__} cannot be in a plan; allowed: {', '.join(KINDS)}")
    _check_plain(module)
    arguments = {name: _json(getattr(module, name)) for name in kind.arguments}
    if "bias" in arguments:
        arguments["bias"] = getattr(module, "bias", None) is not None
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            got = f"{type(module).__name__}({name}={value})"
            raise UnsupportedModule(f"{got} cannot be in a plan; allowed: finite arguments")
    return {"kind": type(module).__name__, "arguments": arguments}


def from_spec(spec: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of a spec, in eval mode. Its parameters, of `dtype`, are zeros without memory: see `materialised`.

    Raises UnsupportedModule for a kind or arguments that are in no table.
    """
    check_spec(spec)
    if spec["kind"] == "Opaque":
        raise UnsupportedModule(f"module {spec['arguments']['name']!r} is not in the plan, only its name")
    create: Any = KINDS[spec["kind"]].module
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in spec["arguments"].items()}
    if spec["kind"] in _PARAMETRIC:
        arguments["dtype"] = dtype
    with _WithoutMemory():
        module: nn.Module = create(**arguments)
    return module.eval()


def materialised(module: nn.Module) -> nn.Module:
    """The same module, each of its parameters in memory of its own."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format)))
    return module


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raises UnsupportedModule for a kind, or names of arguments, that are in no table."""
    kind, arguments = spec["kind"], spec["arguments"]
    if kind not in KINDS:
        raise UnsupportedModule(f"module kind {kind!r} is unknown")
    names = KINDS[kind].arguments
    if set(arguments) != set(names):
        raise UnsupportedModule(f"{kind} has arguments {sorted(arguments)}; allowed: {sorted(names)}")


def _check_plain(module: nn.Module) -> None:
    """Raises UnsupportedModule where an argument that is not kept changes what the module computes."""
    for name, plain in (("padding_mode", "zeros"), ("return_indices", False), ("max_norm", None)):
        if getattr(module, name, plain) != plain:
            got = f"{type(module).__name__}({name}={getattr(module, name)!r})"
            raise UnsupportedModule(f"{got} cannot be in a plan; allowed: {name}={plain!r}")


class _WithoutMemory(TorchFunctionMode):
    """In which new tensors are zeros without memory, and are not initialised.

    Initialising would draw from the global random numbers of whoever loads a plan. torch.nn.utils.skip_init draws none,
    but the device "meta", which it uses, costs a process a second or more of imports.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.empty, torch.zeros, torch.ones):
            size = args[0] if isinstance(args[0], tuple | list) else args
            return torch.zeros((), dtype=kwargs.get("dtype")).expand(size)
        name = function.__name__
        if name.endswith("_") and not name.endswith("__"):  # in place
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
