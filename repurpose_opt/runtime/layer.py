"""One layer of a plan: who holds its inputs, who computes its neurons, who sends what to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Code, Exchange, Values

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class PlannedCode:
    """So many linear combinations of all values of one worker; the encoder is a parameter of the model."""

    size: int


PlannedMessage: TypeAlias = Values | PlannedCode


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """A linear layer of n inputs and m neurons, split over workers.

    The numbers of its codes are counted by source worker, then by target worker, then by row of the encoder. What a
    worker may have are the n input values and behind them these numbers: number i is column n + i.
    """

    name: str
    """Path of the nn.Linear or CodedLinear in the model."""
    input_owner: Indices
    """(n,) worker that holds each input value."""
    owner: Indices
    """(m,) worker that computes each neuron."""
    messages: Mapping[tuple[int, int], PlannedMessage]
    """By (source worker, target worker); pairs that send nothing are absent."""
    n_workers: int
    value_bytes: int
    """Bytes of one value, or one number of a code, of one sample on the wire."""

    @staticmethod
    def of_exchange(
        name: str, input_owner: Indices, owner: Indices, exchange: Exchange, value_bytes: int
    ) -> PlannedLayer:
        """The layer that sends what an exchange sends."""
        messages: dict[tuple[int, int], PlannedMessage] = {
            pair: PlannedCode(message.size) if isinstance(message, Code) else message
            for pair, message in exchange.messages.items()
        }
        return PlannedLayer(name, input_owner, owner, messages, exchange.P, value_bytes)

    @cached_property
    def numbers(self) -> int:
        """How many numbers all codes of the layer have; 0 where every message is of values."""
        return sum(message.size for message in self.messages.values() if isinstance(message, PlannedCode))

    @cached_property
    def chosen_values(self) -> NDArray[np.bool_]:
        """(n, P) whether value j itself is sent to worker k, codes left out."""
        sent = np.zeros((len(self.input_owner), self.n_workers), dtype=bool)
        for (_, target), message in self.messages.items():
            if isinstance(message, Values):
                sent[message.values, target] = True
        return sent

    def held(self, worker: int) -> Indices:
        """Input values that a worker holds itself, ascending."""
        return np.flatnonzero(self.input_owner == worker)

    def rows(self, worker: int) -> Indices:
        """Neurons that a worker computes, ascending."""
        return np.flatnonzero(self.owner == worker)

    def encoded(self, worker: int) -> Indices:
        """Numbers that a worker encodes, ascending: by target worker."""
        pairs = [pair for pair in self._first_number if pair[0] == worker]
        return np.concatenate([np.zeros(0, dtype=np.int64), *(self.code_numbers(*pair) for pair in pairs)])

    def received(self, worker: int) -> Indices:
        """Columns that a worker receives: by source worker, then in the order of the message."""
        return np.concatenate([self.message(source, worker) for source in range(self.n_workers)])

    def columns(self, worker: int) -> Indices:
        """Columns that a worker has: the values that it holds, then what it receives."""
        return np.concatenate([self.held(worker), self.received(worker)])

    def message(self, source: int, target: int) -> Indices:
        """Columns that one worker sends to another, values or numbers of a code; empty where it sends nothing."""
        message = self.messages.get((source, target))
        if message is None:
            return np.zeros(0, dtype=np.int64)
        if isinstance(message, Values):
            return message.values
        return len(self.input_owner) + self.code_numbers(source, target)

    def code_numbers(self, source: int, target: int) -> Indices:
        """Numbers of the code from one worker to another."""
        first, message = self._first_number[source, target], self.messages[source, target]
        return np.arange(first, first + message.size)

    def traffic(self) -> Indices:
        """(P, P) bytes a sample from worker p (row) to worker k (column)."""
        sent = np.zeros((self.n_workers, self.n_workers), dtype=np.int64)
        for (source, target), message in self.messages.items():
            sent[source, target] = message.size * self.value_bytes
        return sent

    def worker_macs(self) -> Indices:
        """(P,) multiply-accumulates a sample: rows held times columns had, and numbers encoded times values held."""
        macs = [
            len(self.rows(k)) * len(self.columns(k)) + len(self.encoded(k)) * len(self.held(k))
            for k in range(self.n_workers)
        ]
        return np.array(macs, dtype=np.int64)

    @cached_property
    def _first_number(self) -> Mapping[tuple[int, int], int]:
        """The first number of each code, by (source, target) in order."""
        first, count = {}, 0
        for pair, message in sorted(self.messages.items()):
            if isinstance(message, PlannedCode):
                first[pair] = count
                count += message.size
        return first


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
    if layer.n_workers != n_workers:
        raise InvalidArgument(f"layer {layer.name!r}: n_workers", layer.n_workers, f"the plan's {n_workers}")
    for (source, target), message in layer.messages.items():
        name = f"layer {layer.name!r}: message from worker {source} to worker {target}"
        if source == target or not (0 <= source < n_workers and 0 <= target < n_workers):
            raise InvalidArgument(name, "these workers", f"two different workers of 0 … {n_workers - 1}")
        if isinstance(message, Values):
            _check_values(name, layer, source, message.values)
        elif isinstance(message, PlannedCode):
            held = len(layer.held(source))
            if type(message.size) is not int or not 1 <= message.size <= held:
                allowed = f"a whole number in 1 … {held}, the values of worker {source}"
                raise InvalidArgument(name, f"a code of {message.size} numbers", allowed)
        else:
            raise InvalidArgument(name, type(message).__name__, "Values or PlannedCode")


def _check_values(name: str, layer: PlannedLayer, source: int, values: Indices) -> None:
    n = len(layer.input_owner)
    if values.ndim != 1 or values.dtype.kind not in "iu" or ((values < 0) | (values >= n)).any():
        raise InvalidArgument(name, f"{values.dtype} {values.shape} out of range", f"values 0 … {n - 1}")
    if len(np.unique(values)) < len(values) or (layer.input_owner[values] != source).any():
        raise InvalidArgument(name, "values twice or of others", f"values of worker {source}, each once")
