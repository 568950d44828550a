"""What a worker needs of memory to answer batches of a given size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from repurpose_opt.runtime.graph import INPUT, Graph
from repurpose_opt.runtime.layer import PlannedLayer
from repurpose_opt.runtime.splits import Split, reads_ids
from repurpose_opt.runtime.wire import Wire, layer_wire


@dataclass(frozen=True)
class Memory:
    """Bytes on one worker, without PyTorch itself and what a single operation needs in passing.

    The latter is little for linear layers; for a convolution it can be several times what it reads and makes.
    """

    weights: int
    messages: int
    """Buffers of all exchanges: they are allocated once."""
    activations: int
    """Most at one time: what a step reads, what later ones still need, and what it makes."""

    @property
    def total(self) -> int:
        return self.weights + self.messages + self.activations


def message_bytes(layers: Sequence[PlannedLayer], worker: int, batch_size: int, dtype: torch.dtype, wire: Wire) -> int:
    """Of the buffers for what a worker sends and receives; a narrower wire writes numbers into buffers of its own."""
    total = 0
    for layer in layers:
        sent = sum(len(layer.message(worker, target)) for target in range(layer.n_workers))
        rows, columns = sent + len(layer.received(worker)), batch_size * layer.positions
        written = layer_wire(layer, wire, dtype)
        total += rows * columns * dtype.itemsize
        if written.dtype != dtype:
            total += rows * written.row_bytes(columns)
    return total


def activation_bytes(
    graph: Graph, splits: Mapping[str, Split], worker: int, batch_size: int, dtype: torch.dtype
) -> int:
    """The most that a worker holds of inputs and outputs of steps at one time."""

    def size(name: str) -> int:
        split = splits[name]
        places = math.prod(split.shape) if split.layout is None else len(split.held(worker)) * split.n_positions
        itemsize = torch.int64.itemsize if name == INPUT and reads_ids(graph) else dtype.itemsize
        return places * batch_size * itemsize

    # Who calls `Part.run` holds the input to the end.
    last_readers = {name: step for name, step in graph.last_readers.items() if name != INPUT}
    alive, most = {INPUT: size(INPUT)}, size(INPUT)
    for step in graph.steps:
        alive[step.name] = size(step.name)
        most = max(most, sum(alive.values()))
        for name in set(step.inputs):
            if last_readers.get(name) == step.name:
                del alive[name]
    return most
