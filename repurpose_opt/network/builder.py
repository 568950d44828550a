"""Builds a graph step by step: what each step makes of the layout of its inputs, and which units are coupled.

A unit is what is placed as a whole: a neuron, a channel, an attention head. Tensors that are added, or heads whose
query, key and value belong together, make units one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.graph import INPUT, Graph
from repurpose_opt.runtime.layout import Layout, carried, made
from repurpose_opt.runtime.modules import POOLING, Role, is_depthwise, role_of

CENTRAL_UNIT = 0
"""Stands for everything that is on the one worker that computes what cannot be split."""


class Units:
    """Disjoint sets of units, by union and find."""

    def __init__(self) -> None:
        self._parent = [CENTRAL_UNIT]

    def new(self, count: int) -> NDArray[np.int64]:
        first = len(self._parent)
        self._parent += range(first, first + count)
        return np.arange(first, first + count)

    def couple(self, one: NDArray[np.int64], other: NDArray[np.int64]) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            a, b = sorted((self.find(a), self.find(b)))
            self._parent[b] = a

    def find(self, unit: int) -> int:
        while self._parent[unit] != unit:
            self._parent[unit] = self._parent[self._parent[unit]]
            unit = self._parent[unit]
        return unit

    def found(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self.find(unit) for unit in places.tolist()], dtype=np.int64)


class Builder:
    """Steps so far, with the example's value and the layout (None: every worker has it) of each output."""

    def __init__(self, example: torch.Tensor) -> None:
        self.steps: list[tuple[str, nn.Module, tuple[str, ...]]] = []
        self.values: dict[str, torch.Tensor] = {INPUT: example}
        self.layouts: dict[str, Layout | None] = {INPUT: None}
        self.units = Units()
        self.central: dict[str, str] = {}
        """Why a step needs all its inputs on one worker, by its name."""
        self._gathered: dict[str, str] = {}

    @torch.no_grad()
    def add(self, name: str, module: nn.Module, *inputs: str) -> str:
        """Add a step and return its name, made unique; one that cannot be split runs on one worker.

        Raises UnsupportedModule where its output is not one tensor, samples first.
        """
        name = self._unique(name)
        if not isinstance(module, steps.Opaque):  # workers run no hooks: one that changes something is found out later
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        value = module.eval()(*(self.values[i] for i in inputs))
        samples = len(self.values[INPUT])
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != samples:
            is_tensor = isinstance(value, torch.Tensor)
            got = f"tensor of shape {tuple(value.shape)} for {samples} samples" if is_tensor else type(value).__name__
            raise UnsupportedModule(f"step {name!r}: its output is a {got}; allowed: one tensor, samples first")
        try:
            layout = self._layout(module, inputs, value)
        except InvalidArgument as error:
            self.central[name] = str(error)
            if role_of(module) is not Role.CENTRAL:
                module = steps.Opaque(type(module).__name__, module)
            inputs = tuple(self.gathered(i) for i in inputs)
            layout = made(
                np.full(self._size(value, inputs[0]), CENTRAL_UNIT), value.shape, self._axis(value, inputs[0])
            )
        return self._append(name, module, inputs, value, layout)

    def gathered(self, name: str) -> str:
        """The same tensor, wholly on one worker."""
        layout = self.layouts[name]
        if layout is None or (self.units.found(layout.places) == CENTRAL_UNIT).all():
            return name
        if name not in self._gathered:
            places = np.full(len(layout.places), CENTRAL_UNIT)
            at_one = replace(layout, places=places)
            new = self._unique(f"{name}_gathered")
            self._gathered[name] = self._append(new, steps.Gather(), (name,), self.values[name], at_one)
        return self._gathered[name]

    def replace_last(self, module: nn.Module) -> str:
        """Put another module of the same kind and size in the place of the last step's; returns its name."""
        name, _, inputs = self.steps.pop()
        with torch.no_grad():
            value = module.eval()(*(self.values[i] for i in inputs))
        return self._append(name, module, inputs, value, self.layouts[name])

    def graph(self) -> Graph:
        return Graph(self.steps)

    def _append(
        self, name: str, module: nn.Module, inputs: tuple[str, ...], value: torch.Tensor, layout: Layout | None
    ) -> str:
        self.steps.append((name, module, inputs))
        self.values[name], self.layouts[name] = value, layout
        return name

    def _unique(self, name: str) -> str:
        name, number = re.sub(r"\W", "_", name), 2  # names are in file names, too
        unique = name
        while unique in self.values or hasattr(Graph, unique):
            unique, number = f"{name}_{number}", number + 1
        return unique

    def _layout(self, module: nn.Module, inputs: Sequence[str], value: torch.Tensor) -> Layout | None:
        """Raises InvalidArgument where the step cannot be split."""
        role = role_of(module)
        layouts = [self.layouts[name] for name in inputs]
        if role is Role.SOURCE:
            if layouts != [None]:
                raise InvalidArgument("input", "computed by workers", "token ids that every worker has")
            return made(self.units.new(value.shape[-1]), value.shape)
        given = [layout for layout in layouts if layout is not None]
        if len(given) < len(layouts):
            raise InvalidArgument("input", "of whole numbers, or replicated", "a tensor that is split over the workers")
        if role is Role.PRODUCT:
            return self._product(module, given[0], self.values[inputs[0]], value)
        if role is Role.CENTRAL:
            kind = module.name if isinstance(module, steps.Opaque) else type(module).__name__
            raise InvalidArgument("module", kind, "one that can be split")
        return self._carried(module, inputs[0], given, value)

    def _product(self, module: nn.Module, layout: Layout, read: torch.Tensor, value: torch.Tensor) -> Layout:
        is_linear = isinstance(module, nn.Linear)
        axis = layout.axis % read.ndim
        if axis != (read.ndim - 1 if is_linear else 1) or (not is_linear and read.ndim == 2):
            raise InvalidArgument("input", f"split along axis {layout.axis}", "the axis that the product sums over")
        return made(self.units.new(value.shape[-1 if is_linear else 1]), value.shape, -1 if is_linear else 1)

    def _carried(self, module: nn.Module, read: str, given: list[Layout], value: torch.Tensor) -> Layout:
        first = given[0]
        if role_of(module) is Role.UNIT:
            for other in given[1:]:
                if other.axis != first.axis or len(other.places) != len(first.places):
                    raise InvalidArgument(
                        "inputs", "split along different axes or sizes", "tensors that are split alike"
                    )
            self._check_unit(module, first, self.values[read].ndim)
            for other in given[1:]:
                self.units.couple(first.places, other.places)
            given = [replace(layout, places=self.units.found(layout.places)) for layout in given]
        if isinstance(module, nn.LayerNorm) and (
            (first.axis != -1 and value.ndim > 2) or len(module.normalized_shape) > 1
        ):
            raise InvalidArgument("LayerNorm", "over several axes", "the axis that is split")
        if isinstance(module, nn.Flatten) and value.ndim != 2 and (module.start_dim != 2 or first.axis != 1):
            raise InvalidArgument("Flatten", f"to {value.ndim} axes", "all of a sample, or the positions of channels")
        if isinstance(module, steps.Concatenate) and any(layout.axis != first.axis for layout in given):
            raise InvalidArgument("inputs", "split along different axes", "tensors that are split alike")
        if isinstance(module, steps.Attention):
            self._couple_heads(module, first)
        if isinstance(module, steps.ToTokens) and first.axis != 1:
            raise InvalidArgument("input", "tokens already", "channels")
        return carried(module, given, value.shape)

    def _check_unit(self, module: nn.Module, layout: Layout, ndim: int) -> None:
        """Pools, affine maps and positions know which axis is a channel's."""
        kind = type(module).__name__
        if kind in POOLING and ndim != (3 if "1d" in kind else 4):
            raise InvalidArgument("input", f"of {ndim} axes", f"as many as {kind} has with samples first")
        needs = -1 if isinstance(module, steps.AddPositions | steps.Token) else 1
        knows = isinstance(module, steps.AddPositions | steps.Token | steps.Affine) or kind in POOLING
        if (knows or is_depthwise(module)) and layout.axis != needs:
            raise InvalidArgument("input", f"split along axis {layout.axis}", f"axis {needs}")
        if isinstance(module, steps.MeanPositions) and layout.axis != module.axis:
            raise InvalidArgument("input", f"split along axis {layout.axis}", f"axis {module.axis}")

    def _couple_heads(self, module: steps.Attention, layout: Layout) -> None:
        """All rows of a head, in its query, key and value, are one unit."""
        by_head = layout.places.reshape(3, module.heads, -1).transpose(1, 0, 2).reshape(module.heads, -1)
        for units in by_head:
            self.units.couple(np.full(len(units) - 1, units[0]), units[1:])

    def _axis(self, value: torch.Tensor, read: str) -> int:
        layout = self.layouts[read]
        same = layout is not None and value.ndim == self.values[read].ndim
        return layout.axis if same and layout is not None else 1

    def _size(self, value: torch.Tensor, read: str) -> int:
        return value.shape[self._axis(value, read)] if value.ndim > 1 else 1
