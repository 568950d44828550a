"""A service: the processes of a plan stay, worker 0 takes batches and tells the others of each.

Before each piece of a batch worker 0 sends a header to all, and while no batch comes an idle one every few seconds, so
that no worker's wait runs out and a worker that ended is noticed.
"""

from __future__ import annotations

import os
import queue
import time
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import checked_inputs, parts_of, reader_of
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.manifest import DTYPES
from repurpose_opt.runtime.processes import group
from repurpose_opt.runtime.processes.desk import Desk, Request
from repurpose_opt.runtime.processes.job import Job
from repurpose_opt.runtime.processes.outputs import assembled
from repurpose_opt.runtime.processes.stop import StopSignal

IDLE_SECONDS = 5.0
"""Between two headers while no batch comes, if a third of the timeout is not even less."""
KEPT_LATENCIES = 100_000
"""Of the last so many batches."""


PERCENTILES = (50, 95, 99)
"""Of the latencies."""


class Kind(IntEnum):
    """What a header announces."""

    IDLE, PIECE, STOP = range(3)


@dataclass(frozen=True)
class Header:
    """What all workers are to do next."""

    kind: Kind
    samples: int = 0
    file: int = 0
    start: int = 0
    """The first sample, where every worker reads the file."""

    def tell(self) -> None:
        """By worker 0."""
        group.broadcast(torch.tensor([self.kind, self.samples, self.file, self.start]), "tell of the next batch")

    @staticmethod
    def heard() -> Header:
        """By the others."""
        header = torch.empty(4, dtype=torch.int64)
        group.broadcast(header, "hear of the next batch")
        kind, samples, file, start = header.tolist()
        return Header(Kind(kind), samples, file, start)


@dataclass(eq=False)
class Tally:
    """What a service has done."""

    batches: int = 0
    refused: int = 0
    """Batches that the plan could not take."""
    seconds: float = 0.0
    """Spent on batches."""
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_LATENCIES))
    """Seconds from the arrival of a batch at worker 0 to its answer, waiting for its turn included."""

    def figures(self, samples: int) -> dict[str, Any]:
        """For the report; None where nothing was measured."""
        latencies = np.percentile(self.latencies, PERCENTILES).tolist() if self.latencies else [None] * len(PERCENTILES)
        return {
            "batches_answered": self.batches,
            "batches_refused": self.refused,
            "samples_per_second": samples / self.seconds if self.seconds else None,
            "latency_seconds": {f"p{share}": latency for share, latency in zip(PERCENTILES, latencies, strict=True)},
        }

    def text(self, samples: int) -> str:
        """The same for people, in one line."""
        figures = self.figures(samples)
        parts = [f"{samples:,} samples in {self.batches:,} batches, {self.refused:,} batches refused"]
        if self.seconds:
            parts.append(f"{figures['samples_per_second']:,.0f} samples/s while busy")
        if self.latencies:
            latency = [f"{name} {1000 * seconds:.2f} ms" for name, seconds in figures["latency_seconds"].items()]
            parts.append(f"latency of a batch {', '.join(latency)}")
        return "; ".join(parts)


def follow(job: Job) -> None:
    """Serve as one of the workers that do not take batches, until worker 0 says stop."""
    while (header := Header.heard()).kind != Kind.STOP:
        if header.kind == Kind.PIECE:
            values = _own_part(job, header) if job.files else _received_part(job, header.samples)
            assembled(job.output, job.rank, job.run(values, header.samples), writer=0)


class Front:
    """Worker 0 of a service."""

    def __init__(self, job: Job, desk: Desk, stop: StopSignal, timeout: float) -> None:
        """`timeout`: seconds that the others wait for a header."""
        manifest = job.manifest
        self.tally = Tally()
        self.bytes_fed: Indices = np.zeros(manifest.n_workers, dtype=np.int64)
        """(P,) bytes of inputs sent to each worker."""
        self._job, self._desk, self._stop = job, desk, stop
        self._idle_seconds = min(IDLE_SECONDS, timeout / 3)
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        split = manifest.splits[INPUT]
        self._readers = [reader_of(manifest.graph, split, k, manifest.dtype) for k in range(manifest.n_workers)]

    def serve(self) -> None:
        """Answer batches until there are no more, or a signal arrives; then the others are told to stop."""
        self._stop.tell = self._desk.end
        while (request := self._next()) is not None:
            started = time.perf_counter()
            try:
                outputs = self._outputs(request)
            except RefusedBatch as error:
                self.tally.refused += 1
                request.answer.set_exception(error)
                continue
            ended = time.perf_counter()
            self.tally.batches += 1
            self.tally.seconds += ended - started
            self.tally.latencies.append(ended - request.arrival)
            request.answer.set_result(outputs)
        Header(Kind.STOP).tell()

    def _next(self) -> Request | None:
        while self._stop.name is None and self._torchrun in (None, os.getppid()):
            try:
                request = self._desk.next(self._idle_seconds)
            except queue.Empty:
                Header(Kind.IDLE).tell()
                continue
            return request if self._stop.name is None else None
        return None

    def _outputs(self, request: Request) -> NDArray[Any]:
        """(samples, …) of a batch, piece by piece. Raises RefusedBatch before any worker has heard of it."""
        parts = self._parts(request)
        pieces = []
        for start in range(0, len(request.inputs), self._job.batch_size):
            samples = min(self._job.batch_size, len(request.inputs) - start)
            pieces.append(self._piece(request, parts, start, samples))
        if not pieces:
            return np.empty((0, *self._job.output.shape), dtype=self._job.manifest.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _parts(self, request: Request) -> list[torch.Tensor]:
        """What each worker holds of a batch; nothing where all of them read the files."""
        if self._job.files:
            return []
        manifest = self._job.manifest
        try:
            inputs = checked_inputs(request.name, request.inputs, manifest.graph, manifest.input_shape)
            return parts_of(request.name, self._readers, inputs, request.first)
        except RepurposeError as error:
            raise RefusedBatch(str(error)) from None

    def _piece(self, request: Request, parts: list[torch.Tensor], start: int, samples: int) -> NDArray[Any]:
        job = self._job
        header = Header(Kind.PIECE, samples, request.file, request.first + start)
        header.tell()
        if job.files:
            values = _own_part(job, header)
        else:
            axis = 0 if job.reader.split.layout is None else 1
            values, *others = [part.narrow(axis, start, samples).contiguous() for part in parts]
            group.deal(others, "inputs")
            self.bytes_fed[1:] += [part.nbytes for part in others]
        outputs = assembled(job.output, 0, job.run(values, samples), writer=0)
        assert outputs is not None
        return outputs


class RefusedBatch(RepurposeError):
    """A batch that the plan cannot take."""


def _own_part(job: Job, header: Header) -> torch.Tensor:
    return job.reader.read(job.files[header.file], slice(header.start, header.start + header.samples))


def _received_part(job: Job, samples: int) -> torch.Tensor:
    """This worker's part of the inputs, from worker 0."""
    split, reader = job.reader.split, job.reader
    dtype = DTYPES[job.manifest.dtype] if reader.vocabulary is None else torch.int64
    is_everywhere = split.layout is None
    shape = (samples, *split.shape) if is_everywhere else (len(split.held(job.rank)), samples, *split.positions)
    part = torch.empty(shape, dtype=dtype)
    if part.numel():
        group.receive(part, 0, "inputs")
    return part
