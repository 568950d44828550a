"""How every tensor of a graph is split: the axis, and what stands at each place of it.

What stands there are numbers: workers, where a plan runs; names of placed units, where a model is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.modules import Role, is_depthwise, role_of


@dataclass(frozen=True, eq=False)
class Layout:
    """`places` (size,) along an axis: 1 (channels, or all there is besides the samples) or −1 (features of tokens)."""

    axis: int
    places: Indices


def carried(module: nn.Module, inputs: Sequence[Layout], shape: Sequence[int]) -> Layout:
    """The layout of a step's output, (samples, …) of this shape, which is made of its inputs' places.

    For steps of the roles UNIT, NORM, STRUCTURE and GATHER. Raises InvalidArgument where inputs do not fit each other.
    """
    first = inputs[0]
    if role_of(module) in (Role.UNIT, Role.NORM, Role.GATHER):
        if any(other.axis != first.axis or not np.array_equal(other.places, first.places) for other in inputs[1:]):
            raise InvalidArgument("inputs", "split in different ways", f"of one layout for {type(module).__name__}")
        places = first.places
        if is_depthwise(module):
            places = np.repeat(places, shape[1] // len(places))
        return Layout(1 if len(shape) == 2 else first.axis, places)
    if isinstance(module, nn.Flatten):
        if len(shape) > 2:  # only positions become one axis
            return first
        positions = shape[1] // len(first.places)
        spread = np.repeat if first.axis == 1 else np.tile
        return Layout(1, spread(first.places, positions))
    if isinstance(module, steps.Concatenate):
        return replace(first, places=np.concatenate([layout.places for layout in inputs]))
    if isinstance(module, steps.Slice):
        return replace(first, places=first.places[module.start : module.stop])
    if isinstance(module, steps.ToTokens):
        return Layout(-1, first.places)
    if isinstance(module, steps.Attention):
        return replace(first, places=first.places[: len(first.places) // 3])
    raise InvalidArgument("module", type(module).__name__, "one that carries its inputs' places")


def made(places: Indices, shape: Sequence[int], axis: int = -1) -> Layout:
    """The layout of an output, (samples, …) of this shape, whose places are new: of a product or source."""
    return Layout(1 if len(shape) == 2 else axis, places)
