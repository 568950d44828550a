"""What a product sums over, as columns: inputs of a linear layer, unfolded patches of a convolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from repurpose_opt.accumulator import MomentAccumulator
from repurpose_opt.moments import Moments
from repurpose_opt.runtime.coded import CodedConv, CodedLinear, Product, convolve

_SAMPLES_PER_COLUMN = 40
_ROUNDING = 64
"""Times the last digit of a column's mean: what a sum of some hundred products may be off by."""
_FEWEST_ROWS = 20_000
"""Of a calibration with positions: neighbouring ones are alike, so more say little."""


def columns_of(module: Product, values: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of inputs (samples, …): a row for each position of the output."""
    if isinstance(module, nn.Linear | CodedLinear):
        return values.reshape(-1, values.shape[-1])
    numbers: list[Any] = [module.kernel_size, module.dilation, module.padding, module.stride]
    if values.ndim == 3:
        values = values.unsqueeze(2)
        numbers = [(first, *part) for first, part in zip((1, 1, 0, 1), numbers, strict=True)]
    unfolded = functional.unfold(values, *numbers)
    return unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])


def column_value(module: Product) -> NDArray[np.int64]:
    """(columns,) input value (channel) of each column."""
    n, *kernel = module.weight.shape[1:]
    return np.repeat(np.arange(n), int(np.prod(kernel)))


def moments_of(module: Product, received: torch.Tensor, original: torch.Tensor, size: int) -> Moments:
    """Moments of a product's columns, of x̂ and of x (the same tensor where they are equal).

    `size` samples at once. Of many positions some are drawn, the same for the same shapes.
    """
    sums, is_same = MomentAccumulator(), received is original
    sample = columns_of(module, received[:1])
    wanted = max(_FEWEST_ROWS, _SAMPLES_PER_COLUMN * sample.shape[1])
    each = len(sample) if len(sample) == 1 else min(len(sample), -(-wanted // len(received)))
    generator = np.random.default_rng(0)
    for batch in batches(len(received), size):
        count = len(received[batch])
        rows = torch.from_numpy(
            np.concatenate([i * len(sample) + generator.permutation(len(sample))[:each] for i in range(count)])
            if each < len(sample)
            else np.arange(count * len(sample))
        )
        parts = [
            columns_of(module, tensor[batch])[rows] for tensor in ((received,) if is_same else (received, original))
        ]
        sums.add(*(part.numpy() for part in parts))
    return without_rounding(Moments.of(sums), received.dtype)


def without_rounding(moments: Moments, dtype: torch.dtype) -> Moments:
    """The same moments, but a column of x̂ that varies by no more than its rounding does not vary at all.

    Weights that are fitted to rounding are huge, and rounding is not the same on every worker.
    """
    variance = moments.second if moments.is_diagonal else np.diagonal(moments.second)
    varies = (variance > np.square(_ROUNDING * torch.finfo(dtype).eps * moments.mean)).astype(np.float64)
    if moments.same_inputs or varies.all():
        return moments
    second = moments.second * (varies if moments.is_diagonal else np.outer(varies, varies))
    return replace(moments, second=second, cross=moments.cross * varies)


def product(
    module: Product, weight: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor, size: int
) -> torch.Tensor:
    """Outputs of a product with other weights (m, n, …) and biases (m,), `size` samples at once."""
    if isinstance(module, nn.Linear | CodedLinear):
        return in_batches(lambda batch: functional.linear(batch, weight, bias), size, values)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | CodedConv)
    return in_batches(lambda batch: convolve(batch, weight, bias, module), size, values)


def in_batches(function: Callable[..., torch.Tensor], size: int, *values: torch.Tensor) -> torch.Tensor:
    """A function of tensors of the same samples, `size` samples at once."""
    found = [function(*(value[batch] for value in values)) for batch in batches(len(values[0]), size)]
    return found[0] if len(found) == 1 else torch.cat(found)


def batches(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
