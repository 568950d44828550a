"""The dense network on several workers, written by hand with collectives of torch.distributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from repurpose_opt.runtime.coded import Product
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks.links_network import WANTS_ANSWER, read_rows

ONE_PROCESS, CENTRAL, NAIVE, ALL_GATHER = "one process", "central", "naive", "direct, all-gather"
HAND_WRITTEN = (ONE_PROCESS, CENTRAL, NAIVE, ALL_GATHER)


@dataclass(frozen=True)
class Linear:
    weight: torch.Tensor
    """(m, n)"""
    bias: torch.Tensor
    """(m, 1)"""

    def rows(self, of: slice) -> Linear:
        return Linear(self.weight[of].clone(), self.bias[of].clone())

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


def dense_of(plan: Plan) -> list[Linear]:
    products = [module for module in plan.graph.modules() if isinstance(module, Product)]
    return [Linear(module.weight.detach(), _bias(module)[:, None]) for module in products]


def _bias(module: Product) -> torch.Tensor:
    assert module.bias is not None
    return module.bias.detach()


def share(count: int, rank: int, n_workers: int) -> slice:
    """The places of one worker, in order; all workers have as many."""
    each = count // n_workers
    return slice(rank * each, (rank + 1) * each)


def feed_forward(layers: Sequence[Linear], value: torch.Tensor) -> torch.Tensor:
    for layer in layers[:-1]:
        value = torch.addmm(layer.bias, layer.weight, value).relu_()
    return torch.addmm(layers[-1].bias, layers[-1].weight, value)


class Whole:
    """Workers that compute the whole network: all of them, or the one that wants the answer alone.

    `name` is one of ONE_PROCESS (the inputs are where they are needed), CENTRAL, NAIVE.
    """

    def __init__(self, name: str, layers: Sequence[Linear], rank: int, n_workers: int, batch_size: int) -> None:
        self._name, self._rank, self._P = name, rank, n_workers
        self._n = layers[0].weight.shape[1]
        self._computes = rank == WANTS_ANSWER or name == NAIVE
        self._layers = layers if self._computes else []
        receives = self._computes and name != ONE_PROCESS
        self._received = self._n if receives else 0
        self._inputs = torch.empty(self._received * batch_size)

    @property
    def weight_bytes(self) -> int:
        return sum(layer.nbytes for layer in self._layers)

    @property
    def buffer_bytes(self) -> int:
        return self._inputs.nbytes

    def read(self, inputs: NDArray[np.float32], batch: slice) -> torch.Tensor:
        rows = slice(None) if self._name == ONE_PROCESS else share(self._n, self._rank, self._P)
        return read_rows(inputs, rows, batch)

    def run(self, value: torch.Tensor) -> torch.Tensor | None:
        whole = value if self._name == ONE_PROCESS else self._gathered(value)
        if not self._computes:
            return None
        answer = feed_forward(self._layers, whole)
        return answer if self._rank == WANTS_ANSWER else None

    def _gathered(self, value: torch.Tensor) -> torch.Tensor:
        samples = value.shape[1]
        inputs = _view(self._inputs, self._received, samples)
        if self._name == NAIVE:
            dist.all_gather_into_tensor(inputs, value)
        else:
            dist.gather(value, _parts(inputs, self._P) if self._computes else None, dst=WANTS_ANSWER)
        return inputs


class AllGather:
    """Each worker has an equal share of the rows of every layer and gathers all values that a layer reads.

    What it multiplies by its own values goes on meanwhile. The worker that wants the answer has the last layer, whose
    inputs go to it alone.
    """

    def __init__(self, layers: Sequence[Linear], rank: int, n_workers: int, batch_size: int) -> None:
        self._rank, self._P = rank, n_workers
        *hidden, last = layers
        mine = [layer.rows(share(len(layer.weight), rank, n_workers)) for layer in hidden]
        self._hidden = [_Columns.of(layer, n_workers) for layer in mine]
        self._last = _Columns.of(last, n_workers) if rank == WANTS_ANSWER else None
        self._widths = [layer.weight.shape[1] for layer in hidden]
        self._widths.append(last.weight.shape[1] if self._last is not None else 0)
        self._buffers = [torch.empty(width * batch_size) for width in self._widths]

    @property
    def weight_bytes(self) -> int:
        return sum(layer.nbytes for layer in (*self._hidden, self._last) if layer is not None)

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def read(self, inputs: NDArray[np.float32], batch: slice) -> torch.Tensor:
        return read_rows(inputs, share(len(inputs), self._rank, self._P), batch)

    def run(self, value: torch.Tensor) -> torch.Tensor | None:
        samples = value.shape[1]
        buffers = [_view(buffer, width, samples) for buffer, width in zip(self._buffers, self._widths, strict=True)]
        for layer, gathered in zip(self._hidden, buffers[:-1], strict=True):
            work = dist.all_gather_into_tensor(gathered, value, async_op=True)
            value = self._product(layer, value, gathered, work).relu_()
        parts = None if self._last is None else _parts(buffers[-1], self._P)
        work = dist.gather(value, parts, dst=WANTS_ANSWER, async_op=True)
        if self._last is None:
            work.wait()
            return None
        return self._product(self._last, value, buffers[-1], work)

    def _product(self, layer: _Columns, own: torch.Tensor, gathered: torch.Tensor, work: dist.Work) -> torch.Tensor:
        output = torch.addmm(layer.bias, layer.weights[self._rank], own)
        work.wait()
        for source, part in enumerate(_parts(gathered, self._P)):
            if source != self._rank:
                output.addmm_(layer.weights[source], part)
        return output


@dataclass(frozen=True)
class _Columns:
    """A layer whose weights are apart by the worker that has what they read."""

    weights: list[torch.Tensor]
    bias: torch.Tensor

    @staticmethod
    def of(layer: Linear, n_workers: int) -> _Columns:
        n = layer.weight.shape[1]
        return _Columns([layer.weight[:, share(n, k, n_workers)].clone() for k in range(n_workers)], layer.bias)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights) + self.bias.nbytes


def _view(buffer: torch.Tensor, rows: int, samples: int) -> torch.Tensor:
    """(rows, samples) of memory for a whole batch, contiguous for a smaller one too."""
    return buffer[: rows * samples].view(rows, samples)


def _parts(gathered: torch.Tensor, n_workers: int) -> list[torch.Tensor]:
    return list(gathered.chunk(n_workers))
