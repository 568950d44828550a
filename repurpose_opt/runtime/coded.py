"""Products of which some blocks go through a code: fewer numbers than values, sent from worker to worker."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional


class CodedLinear(nn.Module):
    """x Lᵀ + (x Eᵀ) Dᵀ + b: L where a worker has the value itself, E encodes at the source, D decodes at the target.

    Weights begin at zero.
    """

    def __init__(self, in_features: int, out_features: int, numbers: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features, self.numbers = in_features, out_features, numbers
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype))
        """L, (m, n)"""
        self.encoder = nn.Parameter(torch.zeros(numbers, in_features, dtype=dtype))
        """E, (numbers, n): a row is zero outside the values of the worker that encodes it."""
        self.decoder = nn.Parameter(torch.zeros(out_features, numbers, dtype=dtype))
        """D, (m, numbers): a column is zero outside the neurons of the worker that receives it."""
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype))
        """(m,)"""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(…, n) → (…, m)"""
        sent = functional.linear(values, self.encoder)
        return functional.linear(values, self.weight, self.bias) + functional.linear(sent, self.decoder)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, numbers={self.numbers}"


class CodedConv(nn.Module):
    """The same for a convolution in one or two dimensions: a number is a whole map, a combination of channels.

    `kernel_size`, `stride`, `padding` and `dilation` have one number a dimension. Weights begin at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        numbers: int,
        kernel_size: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.numbers = in_channels, out_channels, numbers
        self.kernel_size, self.stride = tuple(kernel_size), tuple(stride)
        self.padding, self.dilation = tuple(padding), tuple(dilation)
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, *self.kernel_size, dtype=dtype))
        """L, (m, n, …)"""
        self.encoder = nn.Parameter(torch.zeros(numbers, in_channels, dtype=dtype))
        """E, (numbers, n)"""
        self.decoder = nn.Parameter(torch.zeros(out_channels, numbers, *self.kernel_size, dtype=dtype))
        """D, (m, numbers, …)"""
        self.bias = nn.Parameter(torch.zeros(out_channels, dtype=dtype))
        """(m,)"""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(samples, n, …) → (samples, m, …)"""
        sent = torch.einsum("rn,sn...->sr...", self.encoder, values)
        inputs, weight = torch.cat([values, sent], dim=1), torch.cat([self.weight, self.decoder], dim=1)
        return convolve(inputs, weight, self.bias, self)


Conv = nn.Conv1d | nn.Conv2d | CodedConv
Product = nn.Linear | CodedLinear | Conv
"""Modules that are a layer of a plan, with messages of values or codes."""


def convolve(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, like: Conv) -> torch.Tensor:
    """A convolution with these weights, (rows, channels, …), and the stride, padding and dilation of another."""
    function = functional.conv1d if weight.ndim == 3 else functional.conv2d
    return function(values, weight, bias, like.stride, like.padding, like.dilation)


def effective_weight(module: Product) -> torch.Tensor:
    """(m, n, …) what the inputs are multiplied by in all: W, or L + D E."""
    if isinstance(module, CodedLinear | CodedConv):
        return module.weight + torch.einsum("mr...,rn->mn...", module.decoder, module.encoder)
    return module.weight
