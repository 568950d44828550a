"""A linear layer of which some blocks go through a code: fewer numbers than values, sent from worker to worker."""

from __future__ import annotations

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


def effective_weight(module: nn.Linear | CodedLinear) -> torch.Tensor:
    """(m, n) what the inputs are multiplied by in all: W, or L + D E."""
    if isinstance(module, CodedLinear):
        return module.weight + module.decoder @ module.encoder
    return module.weight
