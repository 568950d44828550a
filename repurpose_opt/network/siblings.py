"""Products that read the same tensor become one: a value is sent to a worker once, however many layers use it there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from repurpose_opt.network.builder import Builder
from repurpose_opt.network.products import product_with
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.steps import Gather, Slice

Named = tuple[str, nn.Module, tuple[str, ...]]


def stacked(builder: Builder, output: str) -> Builder:
    """The same steps up to `output`, with one product for those that read one tensor alike, and a slice for each."""
    needed = _needed(builder.steps, output)
    steps = [step for step in builder.steps if step[0] in needed]
    groups: dict[tuple[str, ...], list[Named]] = {}
    for name, module, inputs in steps:
        key = _key(module, inputs)
        if key is not None:
            groups.setdefault(key, []).append((name, module, inputs))
    again = Builder(builder.values[INPUT])
    again.units, layout = type(builder.units)(), builder.layouts[INPUT]
    again.layouts[INPUT] = None if layout is None else type(layout)(layout.axis, again.units.new(len(layout.places)))
    names = {INPUT: INPUT}
    for name, module, inputs in steps:
        group = groups.get(_key(module, inputs) or (), [])
        if isinstance(module, Gather):
            names[name] = names[inputs[0]]  # put in anew where it is needed
        elif len(group) < 2:
            names[name] = again.add(name, module, *(names[read] for read in inputs))
            if name in builder.central:  # why, before it was wrapped
                again.central[names[name]] = builder.central[name]
        elif name not in names:
            _add_group(again, group, names)
    if names[output] != again.steps[-1][0]:  # a slice, or something that was added before what is stacked
        names[output] = again.add("output", nn.Identity(), names[output])
    return again


def _needed(steps: Sequence[Named], output: str) -> set[str]:
    needed = {output}
    for name, _, inputs in reversed(steps):
        if name in needed:
            needed.update(inputs)
    return needed


def _key(module: nn.Module, inputs: tuple[str, ...]) -> tuple[str, ...] | None:
    """What products must have in common to be stacked; None for what is none."""
    if isinstance(module, nn.Linear):
        return ("Linear", *inputs)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1:
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        return (type(module).__name__, *map(str, geometry), *inputs)
    return None


def _add_group(builder: Builder, group: Sequence[Named], names: dict[str, str]) -> None:
    first, inputs = group[0][1], group[0][2]
    weights: list[torch.Tensor] = [module.get_parameter("weight") for _, module, _ in group]
    biases = [
        weight.new_zeros(len(weight)) if module.bias is None else module.get_parameter("bias")
        for weight, (_, module, _) in zip(weights, group, strict=True)
    ]
    product = product_with(torch.cat(weights), torch.cat(list(biases)), first)
    together = builder.add("_and_".join(name for name, _, _ in group), product, *(names[read] for read in inputs))
    layout = builder.layouts[together]
    axis, start = 1 if layout is None else layout.axis, 0
    for (name, _, _), bias in zip(group, biases, strict=True):
        names[name] = builder.add(name, Slice(axis, start, start + len(bias)), together)
        start += len(bias)
