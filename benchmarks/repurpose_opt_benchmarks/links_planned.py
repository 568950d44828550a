"""A worker of a plan, run by our runtime with a clock, and its messages alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.runtime.exchange import Wait, goes_at_once
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.local import Part, part_of
from repurpose_opt.runtime.manifest import DTYPES, Manifest
from repurpose_opt.runtime.processes import transport
from repurpose_opt.runtime.storage import read_manifest, read_worker
from repurpose_opt.runtime.wire import WIRES, traffic
from repurpose_opt_benchmarks.links_network import WANTS_ANSWER, Prepared, read_rows


@dataclass(eq=False)
class Blocked:
    """`transport.start` with a clock: the seconds that a worker does nothing else than communicate."""

    seconds: float = 0.0

    def start(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_counts: list[int],
        sent_counts: list[int],
        every: bool,
    ) -> Wait:
        began = time.perf_counter()
        wait = transport.start(received, sent, received_counts, sent_counts, every)
        self.seconds += time.perf_counter() - began

        def timed_wait() -> None:
            began = time.perf_counter()
            wait()
            self.seconds += time.perf_counter() - began

        return timed_wait


def start_nothing(
    received: torch.Tensor, sent: torch.Tensor, received_counts: list[int], sent_counts: list[int], every: bool
) -> Wait:
    """In place of an exchange: what would be received stays as it was."""
    return lambda: None


@dataclass(frozen=True, eq=False)
class PlannedPeer:
    """A worker of a plan, as `repurpose_opt.runtime.processes.worker` runs it."""

    manifest: Manifest
    rank: int
    part: Part
    weight_bytes: int
    wire: str | None
    blocked: Blocked = field(default_factory=Blocked)

    @property
    def buffer_bytes(self) -> int:
        return sum(exchange.nbytes for exchange in self.part.exchanges)

    @cached_property
    def held(self) -> Indices:
        assert self.manifest.input_owner is not None
        return np.flatnonzero(self.manifest.input_owner == self.rank)

    def read(self, inputs: NDArray[np.float32], batch: slice) -> torch.Tensor:
        return read_rows(inputs, self.held, batch)

    def run(self, value: torch.Tensor) -> torch.Tensor | None:
        return self._answer(self.part.run(value, value.shape[1], self.blocked.start))

    def compute(self, value: torch.Tensor) -> None:
        """The same without the exchanges."""
        self.part.run(value, value.shape[1], start_nothing)

    def _answer(self, output: torch.Tensor) -> torch.Tensor | None:
        return output if self.rank == WANTS_ANSWER else None

    @property
    def bytes_handed(self) -> Indices:
        """(P,) to each worker so far, counted from the tensors handed to torch.distributed."""
        return np.sum([exchange.bytes_sent for exchange in self.part.exchanges], axis=0)

    def predicted(self, samples: int) -> Indices:
        """(P, P) bytes of a batch."""
        return np.sum([traffic(layer, samples, self.wire) for layer in self.manifest.layers], axis=0)


def planned_peer(prepared: Prepared, plan: str, wire: str | None, rank: int, batch_size: int) -> PlannedPeer:
    folder = prepared.plan(plan)
    manifest = read_manifest(folder)
    tensors = read_worker(folder, manifest, rank)
    weight_bytes = sum(tensor.nbytes for tensor in tensors.values())
    format_ = None if wire is None else WIRES[wire]
    dtype = DTYPES[manifest.dtype]
    part = part_of(manifest.graph, manifest.layers, manifest.splits, rank, tensors, batch_size, dtype, format_)
    return PlannedPeer(manifest, rank, part, weight_bytes, wire)


@dataclass(frozen=True, eq=False)
class BareExchange:
    """The messages of a plan and nothing else: the same bytes between the same workers in the same number of steps."""

    steps: Sequence[tuple[torch.Tensor, torch.Tensor, list[int], list[int], bool]]

    @staticmethod
    def of(manifest: Manifest, rank: int, batch_size: int) -> BareExchange:
        return BareExchange([_step(layer, rank, batch_size) for layer in manifest.layers if layer.messages])

    def run(self) -> None:
        for step in self.steps:
            transport.start(*step)()


def _step(
    layer: PlannedLayer, rank: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int], bool]:
    P = layer.n_workers
    received = [len(layer.message(source, rank)) for source in range(P)]
    sent = [len(layer.message(rank, target)) for target in range(P)]
    buffers = (torch.zeros(sum(received), batch_size), torch.zeros(sum(sent), batch_size))
    return *buffers, received, sent, goes_at_once(layer, batch_size * layer.value_bytes)
