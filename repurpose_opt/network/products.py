"""Linear layers and convolutions with given weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from repurpose_opt.runtime.coded import CodedConv


@torch.no_grad()
def product_with(
    weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Module | None = None, **geometry: Any
) -> Any:
    """An nn.Linear of weights (m, n), or a convolution of (m, n / groups, …), in evaluation mode.

    A convolution has the stride, padding, dilation and groups that are given, or those of `like`. Nothing is drawn from
    the caller's random numbers.
    """
    options: dict[str, Any] = {"bias": bias is not None, "dtype": weight.dtype}
    if weight.ndim == 2:
        module = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)
    else:
        if like is not None:
            assert isinstance(like, nn.Conv1d | nn.Conv2d | CodedConv)
            geometry = {name: getattr(like, name) for name in ("stride", "padding", "dilation")} | geometry
        kind = nn.Conv1d if weight.ndim == 3 else nn.Conv2d
        channels = weight.shape[1] * geometry.get("groups", 1)
        module = nn.utils.skip_init(kind, channels, weight.shape[0], tuple(weight.shape[2:]), **geometry, **options)
    module.weight.copy_(weight)
    if bias is not None:
        module.bias.copy_(bias)
    return module.eval()
