"""One layer of a plan: who holds its inputs, who computes its neurons, who sends what to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """A linear layer of n inputs and m neurons, split over P workers."""

    name: str
    """Path of the nn.Linear in the model."""
    input_owner: Indices
    """(n,) worker that holds each input value."""
    owner: Indices
    """(m,) worker that computes each neuron."""
    exchange: Exchange
    value_bytes: int
    """Bytes of one value of one sample on the wire."""

    def held(self, worker: int) -> Indices:
        """Input values that a worker holds itself, ascending."""
        return np.flatnonzero(self.input_owner == worker)

    def rows(self, worker: int) -> Indices:
        """Neurons that a worker computes, ascending."""
        return np.flatnonzero(self.owner == worker)

    def received(self, worker: int) -> Indices:
        """Input values that a worker receives: by source worker, then in the order of the message."""
        messages = [self.message(source, worker) for source in range(self.exchange.P)]
        return np.concatenate(messages)

    def columns(self, worker: int) -> Indices:
        """Input values that a worker has: those it holds, then those it receives."""
        return np.concatenate([self.held(worker), self.received(worker)])

    def message(self, source: int, target: int) -> Indices:
        """Input values that one worker sends to another; empty where it sends nothing."""
        message = self.exchange.messages.get((source, target))
        return np.zeros(0, dtype=np.int64) if message is None else message.values

    def traffic(self) -> Indices:
        """(P, P) bytes a sample from worker p (row) to worker k (column)."""
        sent = np.zeros((self.exchange.P, self.exchange.P), dtype=np.int64)
        for (source, target), message in self.exchange.messages.items():
            sent[source, target] = message.size * self.value_bytes
        return sent

    def worker_macs(self) -> Indices:
        """(P,) multiply-accumulates a sample: rows held times columns had."""
        workers = range(self.exchange.P)
        return np.array([len(self.rows(k)) * len(self.columns(k)) for k in workers], dtype=np.int64)


def check_layers(layers: Sequence[PlannedLayer], n_workers: int) -> None:
    """Raises InvalidArgument where the layers of a plan do not fit each other or n_workers."""
    if not layers:
        raise InvalidArgument("layers", "none", "one for each Linear of the model")
    for layer in layers:
        _check_owner(f"layer {layer.name!r}: input_owner", layer.input_owner, n_workers)
        _check_owner(f"layer {layer.name!r}: owner", layer.owner, n_workers)
        _check_messages(layer, n_workers)
    for before, after in pairwise(layers):
        if not np.array_equal(before.owner, after.input_owner):
            allowed = f"the owner of layer {before.name!r}"
            raise InvalidArgument(f"layer {after.name!r}: input_owner", "other workers", allowed)


def _check_owner(name: str, owner: Indices, n_workers: int) -> None:
    if owner.ndim != 1 or owner.dtype.kind not in "iu":
        raise InvalidArgument(name, f"shape {owner.shape} of {owner.dtype}", "one whole number for each value")
    outside = owner[(owner < 0) | (owner >= n_workers)]
    if len(outside):
        raise InvalidArgument(name, f"worker {outside[0]}", f"0 … {n_workers - 1}")


def _check_messages(layer: PlannedLayer, n_workers: int) -> None:
    n = len(layer.input_owner)
    if (layer.exchange.n, layer.exchange.P) != (n, n_workers):
        got = f"{layer.exchange.n} values and {layer.exchange.P} workers"
        raise InvalidArgument(f"layer {layer.name!r}: exchange", got, f"{n} values and {n_workers} workers")
    for (source, target), message in layer.exchange.messages.items():
        name = f"layer {layer.name!r}: message from worker {source} to worker {target}"
        if source == target or not (0 <= source < n_workers and 0 <= target < n_workers):
            raise InvalidArgument(name, "these workers", f"two different workers of 0 … {n_workers - 1}")
        values = message.values
        if values.ndim != 1 or values.dtype.kind not in "iu" or ((values < 0) | (values >= n)).any():
            raise InvalidArgument(name, f"{values.dtype} {values.shape} out of range", f"values 0 … {n - 1}")
        if len(np.unique(values)) < len(values) or (layer.input_owner[values] != source).any():
            raise InvalidArgument(name, "values twice or of others", f"values of worker {source}, each once")
