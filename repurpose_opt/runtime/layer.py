"""One layer of a plan: who holds its inputs, who computes its neurons, who sends what to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
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


@dataclass(frozen=True)
class PlannedStatistics:
    """What a normalisation needs of one worker's values: their mean and the sum of squares around it."""

    size: int = 2


PlannedMessage: TypeAlias = Values | PlannedCode | PlannedStatistics


@dataclass(frozen=True, eq=False)
class PlannedLayer:
    """A step before which workers exchange what they hold: a product of n inputs and m neurons, a norm, a gathering.

    The numbers of its codes are counted by source worker, then by target worker, then by row of the encoder. What a
    worker may have are the n input values and behind them these numbers: number i is column n + i. A norm has two
    columns for each worker instead, its statistics.
    """

    name: str
    """Of the step in the model."""
    input_owner: Indices
    """(n,) worker that holds each input value."""
    owner: Indices
    """(m,) worker that computes each neuron."""
    messages: Mapping[tuple[int, int], PlannedMessage]
    """By (source worker, target worker); pairs that send nothing are absent."""
    n_workers: int
    value_bytes: int
    """Bytes of one value, or one number of a code, of one sample on the wire, over all its positions."""
    positions: int = 1
    """Of the inputs: pixels of a channel, tokens of a feature."""
    weight_macs: int = 1
    """Multiply-accumulates a sample for one row and column: taps of the kernel times positions of the outputs; 0 for
    what is no product."""

    @staticmethod
    def of_exchange(
        name: str,
        input_owner: Indices,
        owner: Indices,
        exchange: Exchange,
        value_bytes: int,
        positions: int = 1,
        weight_macs: int = 1,
    ) -> PlannedLayer:
        """A product that sends what an exchange sends. `value_bytes` covers all positions."""
        messages: dict[tuple[int, int], PlannedMessage] = {
            pair: PlannedCode(message.size) if isinstance(message, Code) else message
            for pair, message in exchange.messages.items()
        }
        return PlannedLayer(name, input_owner, owner, messages, exchange.P, value_bytes, positions, weight_macs)

    @staticmethod
    def source(name: str, owner: Indices, n_workers: int, value_bytes: int) -> PlannedLayer:
        """A step that reads what every worker has, and sends nothing."""
        return PlannedLayer(name, np.zeros(0, dtype=np.int64), owner, {}, n_workers, value_bytes, 1, 0)

    @staticmethod
    def norm(name: str, owner: Indices, n_workers: int, value_bytes: int, positions: int) -> PlannedLayer:
        """A normalisation: every worker that holds something sends its statistics to every other one."""
        holders = np.unique(owner).tolist()
        messages: dict[tuple[int, int], PlannedMessage] = {
            pair: PlannedStatistics() for pair in permutations(holders, 2)
        }
        return PlannedLayer(name, owner, owner, messages, n_workers, value_bytes, positions, 0)

    @staticmethod
    def gather(
        name: str, input_owner: Indices, worker: int, n_workers: int, value_bytes: int, positions: int
    ) -> PlannedLayer:
        """All values to one worker."""
        messages: dict[tuple[int, int], PlannedMessage] = {
            (source, worker): Values(np.flatnonzero(input_owner == source))
            for source in np.unique(input_owner).tolist()
            if source != worker
        }
        owner = np.full(len(input_owner), worker)
        return PlannedLayer(name, input_owner, owner, messages, n_workers, value_bytes, positions, 0)

    @staticmethod
    def central(name: str, inputs: int, outputs: int, worker: int, n_workers: int, value_bytes: int) -> PlannedLayer:
        """A step of one worker, which has all inputs; nothing is sent."""
        owners = (np.full(inputs, worker), np.full(outputs, worker))
        return PlannedLayer(name, *owners, {}, n_workers, value_bytes, 1, 0)

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

    def sendable(self, worker: int) -> Indices:
        """Columns out of which a worker's messages are made: the values that it holds, or their statistics."""
        return self.held(worker) if self._statistics == 0 else self._statistics * worker + np.arange(self._statistics)

    def message(self, source: int, target: int) -> Indices:
        """Columns that one worker sends to another: values, statistics, numbers of a code; empty where nothing is."""
        message = self.messages.get((source, target))
        if message is None:
            return np.zeros(0, dtype=np.int64)
        if isinstance(message, Values):
            return message.values
        if isinstance(message, PlannedStatistics):
            return self.sendable(source)
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
        """(P,) multiply-accumulates a sample of a product: rows by columns, and numbers encoded by values held."""
        macs = [
            len(self.rows(k)) * len(self.columns(k)) * self.weight_macs
            + len(self.encoded(k)) * len(self.held(k)) * self.positions
            for k in range(self.n_workers)
        ]
        return np.array(macs, dtype=np.int64)

    @property
    def sends_statistics(self) -> bool:
        """Whether its messages are those of a normalisation."""
        return self._statistics > 0

    @cached_property
    def _statistics(self) -> int:
        """Statistics that a worker has to send; 0 where messages are of something else."""
        sizes = (message.size for message in self.messages.values() if isinstance(message, PlannedStatistics))
        return next(sizes, 0)

    @cached_property
    def _first_number(self) -> Mapping[tuple[int, int], int]:
        """The first number of each code, by (source, target) in order."""
        first, count = {}, 0
        for pair, message in sorted(self.messages.items()):
            if isinstance(message, PlannedCode):
                first[pair] = count
                count += message.size
        return first


def check_layer(layer: PlannedLayer, n_workers: int) -> None:
    """Raises InvalidArgument where a layer contradicts itself or n_workers."""
    _check_owner(f"layer {layer.name!r}: input_owner", layer.input_owner, n_workers)
    _check_owner(f"layer {layer.name!r}: owner", layer.owner, n_workers)
    _check_messages(layer, n_workers)


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
        elif not isinstance(message, PlannedStatistics):
            raise InvalidArgument(name, type(message).__name__, "Values or PlannedCode")


def _check_values(name: str, layer: PlannedLayer, source: int, values: Indices) -> None:
    n = len(layer.input_owner)
    if values.ndim != 1 or values.dtype.kind not in "iu" or ((values < 0) | (values >= n)).any():
        raise InvalidArgument(name, f"{values.dtype} {values.shape} out of range", f"values 0 … {n - 1}")
    if len(np.unique(values)) < len(values) or (layer.input_owner[values] != source).any():
        raise InvalidArgument(name, "values twice or of others", f"values of worker {source}, each once")
