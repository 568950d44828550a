"""The dense network by torch.distributed.tensor: `parallelize_module` with the layouts that make sense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from repurpose_opt_benchmarks.links_dense import Linear
from repurpose_opt_benchmarks.links_layouts import LAYOUTS

_STYLES: Mapping[str, Callable[..., ParallelStyle]] = {"column": ColwiseParallel, "row": RowwiseParallel}
_PLACEMENTS = {"split": Shard(-1), "whole": Replicate()}


class DTensorPeer:
    """One worker. It has its inputs, split along their last dimension, and answers (outputs, samples).

    `strips`: how many inputs each worker has; None: as `torch.chunk` cuts them, which is DTensor's rule.
    `keeps_shapes`: between layers tensors stay DTensors, which know the size of the whole; otherwise they are what
    `parallelize_module` gives by default, a worker's own part.
    """

    buffer_bytes = 0
    """It allocates them for each batch."""

    def __init__(
        self,
        name: str,
        layers: Sequence[Linear],
        rank: int,
        n_workers: int,
        *,
        strips: Sequence[int] | None = None,
        keeps_shapes: bool = False,
    ) -> None:
        self._rank, self._keeps_shapes = rank, keeps_shapes
        self._n = layers[0].weight.shape[1]
        each = -(-self._n // n_workers)
        ends = np.cumsum(strips or [each] * n_workers)
        self._strip = slice(0 if rank == 0 else int(ends[rank - 1]), int(ends[rank]))
        self._mesh = init_device_mesh("cpu", (n_workers,))
        self._model = parallelize_module(_model(layers), self._mesh, _styles(LAYOUTS[name], keeps_shapes))

    @property
    def weight_bytes(self) -> int:
        return sum(_local(parameter).nbytes for parameter in self._model.parameters())

    @property
    def local_shapes(self) -> list[list[int]]:
        """Of this worker's weights."""
        return [list(_local(p).shape) for p in self._model.parameters() if p.ndim == 2]

    def read(self, inputs: NDArray[np.float32], batch: slice) -> torch.Tensor:
        """(samples, inputs of this worker)"""
        return torch.from_numpy(np.ascontiguousarray(inputs[self._strip, batch].T))

    def run(self, value: torch.Tensor) -> torch.Tensor | None:
        answer = self._model(self._whole(value) if self._keeps_shapes else value)
        local: torch.Tensor = answer.to_local() if isinstance(answer, DTensor) else answer
        # Copying waits for a collective that is under way.
        found = torch.empty(local.shape).copy_(local)
        return found.T if self._rank == 0 else None

    def _whole(self, value: torch.Tensor) -> DTensor:
        shape = torch.Size((len(value), self._n))
        return DTensor.from_local(value, self._mesh, [Shard(-1)], run_check=False, shape=shape, stride=(self._n, 1))


def _model(layers: Sequence[Linear]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for layer in layers:
        m, n = layer.weight.shape
        linear = nn.Linear(n, m)
        linear.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)
        linear.bias = nn.Parameter(layer.bias[:, 0].clone(), requires_grad=False)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _styles(layout: Sequence[tuple[str, str, str]], keeps_shapes: bool) -> dict[str, ParallelStyle]:
    """By the names of the linear modules, which have ReLU between them."""
    return {
        str(2 * index): _STYLES[style](
            input_layouts=_PLACEMENTS[read], output_layouts=_PLACEMENTS[made], use_local_output=not keeps_shapes
        )
        for index, (style, read, made) in enumerate(layout)
    }


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
