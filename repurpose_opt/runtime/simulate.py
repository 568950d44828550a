"""A plan on P workers in this process, each with its own part only: for tests, and where no processes are wanted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime.exchange import Wait
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import checked_inputs, reader_of
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.local import Part, part_of, whole_tensor
from repurpose_opt.runtime.manifest import DTYPES
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.sparse import sparse_where_faster
from repurpose_opt.runtime.storage import tensor_key
from repurpose_opt.runtime.wire import wire_of


@dataclass(frozen=True, eq=False)
class Simulation:
    """What P workers in one process answered and handed over."""

    outputs: NDArray[Any]
    """(samples, …)"""
    bytes_sent: Indices
    """(P, P) counted from the tensors that worker p (row) handed over for worker k (column)."""


def run_in_process(plan: Plan, inputs: NDArray[Any], *, batch_size: int = 256, wire: str | None = None) -> NDArray[Any]:
    """The outputs (samples, …) of P workers that exchange values by copying them; see `simulate`."""
    return simulate(plan, inputs, batch_size=batch_size, wire=wire).outputs


def simulate(plan: Plan, inputs: NDArray[Any], *, batch_size: int = 256, wire: str | None = None) -> Simulation:
    """Run a plan as its workers do, a thread for each, which has nothing but the worker's part of model and input.

    `wire` is one of `wire.WIRES`; None: messages are of the plan's dtype. Raises RepurposeError where the inputs,
    (samples, *input_shape), are none that the plan can take.
    """
    if batch_size < 1:
        raise InvalidArgument("batch_size", batch_size, "a whole number ≥ 1")
    graph, splits, P = plan.graph, plan.splits, plan.n_workers
    dtype = plan.manifest().dtype
    written = wire_of(wire, DTYPES[dtype])
    array = checked_inputs("inputs", np.asarray(inputs), graph, plan.input_shape)
    readers = [reader_of(graph, splits[INPUT], worker, dtype) for worker in range(P)]
    parts = []
    for worker, reader in enumerate(readers):
        reader.check("inputs", array)
        sub_model = plan.sub_model(worker)
        tensors = {tensor_key(part.name, key): tensor for part in sub_model for key, tensor in part.tensors.items()}
        part = part_of(graph, plan.layers, splits, worker, tensors, batch_size, DTYPES[dtype], written)
        parts.append(sparse_where_faster(part, batch_size))
    output = splits[graph.steps[-1].name]
    batches = []
    for start in range(0, max(len(array), 1), batch_size):
        batch = slice(start, min(start + batch_size, len(array)))
        values = [reader.read(array, batch) for reader in readers]
        held = run_together(parts, values, batch.stop - batch.start)
        whole = torch.empty((len(output.places), batch.stop - batch.start, *output.positions), dtype=DTYPES[dtype])
        for worker, value in enumerate(held):
            whole[torch.from_numpy(output.held(worker))] = value
        batches.append(whole_tensor(whole, output).numpy())
    sent = np.sum([[exchange.bytes_sent for exchange in part.exchanges] for part in parts], axis=1)
    return Simulation(np.concatenate(batches), sent)


def run_together(parts: Sequence[Part], values: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
    """What each worker makes of its part of the inputs, in a thread of its own that waits at every exchange."""
    post = _Post(len(parts))

    def work(worker: int) -> torch.Tensor:
        def start(received: torch.Tensor, sent: torch.Tensor, _: list[int], counts: list[int], __: bool) -> Wait:
            return post.start(worker, received, sent, counts)

        try:
            with torch.inference_mode():
                return parts[worker].run(values[worker], samples, start)
        except BaseException:
            post.barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        running = [pool.submit(work, worker) for worker in range(len(parts))]
    errors = [future.exception() for future in running]
    # Workers whose wait was broken off are the consequence of one that failed for a reason of its own.
    causes = [error for error in errors if error is not None and not isinstance(error, threading.BrokenBarrierError)]
    if causes:
        raise causes[0]
    return [future.result() for future in running]


class _Post:
    """Where workers in one process leave what they send."""

    def __init__(self, n_workers: int) -> None:
        self.barrier = threading.Barrier(n_workers)
        self._sent: list[tuple[torch.Tensor, ...]] = [()] * n_workers

    def start(self, worker: int, received: torch.Tensor, sent: torch.Tensor, counts: list[int]) -> Wait:
        """As `transport.start` does. Every worker comes to every exchange in which any of them sends."""
        self._sent[worker] = sent.split(counts)

        def wait() -> None:
            self.barrier.wait()
            torch.cat([parts[worker] for parts in self._sent], out=received)
            self.barrier.wait()

        return wait
