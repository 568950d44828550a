"""The modules that a plan may hold, and their specs for JSON.

A spec is {"kind": "LeakyReLU", "arguments": {"negative_slope": 0.01}}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from repurpose_opt.errors import UnsupportedModule
from repurpose_opt.runtime.coded import CodedLinear

ELEMENTWISE: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "ReLU": (nn.ReLU, ()),
    "LeakyReLU": (nn.LeakyReLU, ("negative_slope",)),
    "ELU": (nn.ELU, ("alpha",)),
    "GELU": (nn.GELU, ("approximate",)),
    "SiLU": (nn.SiLU, ()),
    "Tanh": (nn.Tanh, ()),
    "Sigmoid": (nn.Sigmoid, ()),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
    "Hardtanh": (nn.Hardtanh, ("min_val", "max_val")),
    "ReLU6": (nn.ReLU6, ()),
    "Hardswish": (nn.Hardswish, ()),
    "Mish": (nn.Mish, ()),
    "Identity": (nn.Identity, ()),
    "Dropout": (nn.Dropout, ("p",)),
}
"""Modules that act on every value by itself: kind → (class, arguments that are kept; `inplace` is not)."""

_OTHERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "CodedLinear": (CodedLinear, ("in_features", "out_features", "numbers")),
}

LINEAR = ("Linear", "CodedLinear")
"""Kinds that are a layer of a plan, with messages of its own."""


def to_spec(module: nn.Module) -> dict[str, Any]:
    """What it takes to build the module again, apart from its weights.

    Raises UnsupportedModule for one that is in no table (a subclass may compute something else, so it is not either).
    """
    kind = type(module).__name__
    known, names = (ELEMENTWISE | _OTHERS).get(kind, (None, ()))
    if type(module) is not known:
        supported = ", ".join([*_OTHERS, *ELEMENTWISE])
        raise UnsupportedModule(f"{type(module).__qualname__} cannot be in a plan; allowed: {supported}")
    arguments = {name: getattr(module, name) for name in names}
    if isinstance(module, nn.Linear):
        arguments["bias"] = module.bias is not None
    for name, value in arguments.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UnsupportedModule(f"{kind}({name}={value}) cannot be in a plan; allowed: finite arguments")
    return {"kind": kind, "arguments": arguments}


def from_spec(spec: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of a spec, in eval mode; weights are of `dtype`, those of a Linear uninitialised memory.

    Raises UnsupportedModule for a kind or arguments that are in no table.
    """
    check_spec(spec)
    known, _ = (ELEMENTWISE | _OTHERS)[spec["kind"]]
    arguments = dict(spec["arguments"])
    if known is nn.Linear:
        # Initialising a weight would draw from the global random numbers of whoever loads the plan.
        return nn.utils.skip_init(nn.Linear, **arguments, dtype=dtype).eval()
    if known is CodedLinear:
        return CodedLinear(**arguments, dtype=dtype).eval()
    return known(**arguments).eval()


def check_spec(spec: Mapping[str, Any]) -> None:
    """Raises UnsupportedModule for a kind, or names of arguments, that are in no table."""
    kind, arguments = spec["kind"], spec["arguments"]
    known, names = (ELEMENTWISE | _OTHERS).get(kind, (None, ()))
    if known is None:
        raise UnsupportedModule(f"module kind {kind!r} is unknown")
    if set(arguments) != set(names):
        raise UnsupportedModule(f"{kind} has arguments {sorted(arguments)}; allowed: {sorted(names)}")


def named_modules(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """(name, module) in order; a module that stands in two places is listed twice."""
    listed = model.named_modules(remove_duplicate=False)
    return [(name, module) for name, module in listed if name]
