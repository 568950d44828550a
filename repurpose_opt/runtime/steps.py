"""What a network computes between its products, as modules of whole tensors.

A tensor is (samples, …) with one axis along which it is split over the workers: axis 1 (channels, features) or the
last one (features of tokens). The others are positions. What each module does to the part that a worker holds is in
local.py.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Add(nn.Module):
    """The sum of tensors that are split alike."""

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total


class Multiply(nn.Module):
    """The product of two tensors that are split alike; positions broadcast."""

    def forward(self, value: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return value * factor


class Linearly(nn.Module):
    """factor · x + offset, both numbers."""

    def __init__(self, factor: float, offset: float) -> None:
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.factor + self.offset


class Concatenate(nn.Module):
    """Tensors side by side along the axis that is split."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return torch.cat(values, self.axis)


class Slice(nn.Module):
    """The part start … stop − 1 along the axis that is split."""

    def __init__(self, axis: int, start: int, stop: int) -> None:
        super().__init__()
        self.axis, self.start, self.stop = axis, start, stop

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.narrow(self.axis, self.start, self.stop - self.start)


class Affine(nn.Module):
    """scale · x + shift, a pair for each channel: a batch normalisation in evaluation mode."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.size = size
        self.scale = nn.Parameter(torch.ones(size, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """(samples, size, …)"""
        shape = (-1, *(1,) * (value.ndim - 2))
        return value * self.scale.view(shape) + self.shift.view(shape)


class AddPositions(nn.Module):
    """x + a parameter of every token and feature: a learnt position embedding."""

    def __init__(self, tokens: int, size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tokens, self.size = tokens, size
        self.positions = nn.Parameter(torch.zeros(tokens, size, dtype=dtype))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """(samples, tokens, size)"""
        return value + self.positions


class MeanPositions(nn.Module):
    """The mean over all positions: (samples, size, …) → (samples, size), or (samples, …, size) for axis −1."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.flatten(2).mean(2) if self.axis == 1 else value.flatten(1, -2).mean(1)


class Token(nn.Module):
    """One token: (samples, tokens, size) → (samples, size)."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value[:, self.index]


class AsMap(nn.Module):
    """(samples, size) → (samples, size, 1, …): as many axes of one position behind as it takes to meet a map."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.reshape(*value.shape, *(1,) * self.axes)


class ToTokens(nn.Module):
    """The positions of channels as tokens: (samples, channels, …) → (samples, tokens, channels)."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """softmax(q kᵀ / √d) v of each head: (samples, tokens, 3 · size), q, k and v side by side, → (…, size)."""

    def __init__(self, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        # (samples, tokens, 3, heads, d) → 3 times (samples, heads, tokens, d)
        query, key, content = value.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, content, is_causal=self.causal)
        return attended.transpose(1, 2).flatten(2)


class Gather(nn.Module):
    """Everything to one worker, which computes what comes next by itself; changes nothing in one process."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value


class Opaque(nn.Module):
    """Anything else, on one worker. A plan with one runs in one process; it cannot be saved."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name, self.module = name, module

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        # It may work in place, and others may read the same tensors.
        result: torch.Tensor = self.module(*(value.clone() for value in values))
        return result
