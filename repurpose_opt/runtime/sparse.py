"""Weights of a worker kept in compressed rows (CSR) where that multiplies faster."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch

from repurpose_opt.runtime.local import LinearStep, Part

LEAST_WEIGHTS, LARGEST_SHARE = 1 << 15, 0.12
"""From so many weights on, and up to this share of nonzeros, compressed rows are the faster ones, but not for a single
column: measured in benchmarks/results/sparse-weights.md."""


def sparse_where_faster(part: Part, samples: int) -> Part:
    """The same part for batches of so many samples, with CSR in place of linear layers' weights with few nonzeros."""
    steps = []
    for step, local in part.steps:
        if isinstance(local, LinearStep):
            columns = samples * math.prod(local.positions)
            local = replace(local, held=_compact(local.held, columns), received=_compact(local.received, columns))
        steps.append((step, local))
    return Part(tuple(steps), part.last_readers)


def is_faster_sparse(weight: torch.Tensor, columns: int) -> bool:
    """Whether CSR times (n, columns) is faster than dense (m, n) times it."""
    return (
        weight.dtype in (torch.float32, torch.float64)  # PyTorch multiplies no others in compressed rows
        and columns > 1
        and weight.numel() >= LEAST_WEIGHTS
        and int(weight.count_nonzero()) <= LARGEST_SHARE * weight.numel()
    )


def compressed(weight: torch.Tensor) -> torch.Tensor:
    """The same weights in compressed rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return weight.to_sparse_csr()


def _compact(weight: torch.Tensor, columns: int) -> torch.Tensor:
    return compressed(weight) if is_faster_sparse(weight, columns) else weight
