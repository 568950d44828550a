"""One worker of a plan, started P times by torchrun.

    torchrun --nproc-per-node=P -m repurpose_opt.runtime.worker PLAN --input FILE.npy --output FILE.npy

Each process reads the manifest and its own weights, computes its own neurons and sends only what others need.
Exit code 0: fine, 1: the run failed, with one line on stderr that says why, 2: usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.errors import PlanError, RepurposeError
from repurpose_opt.runtime import group
from repurpose_opt.runtime.agreement import Readiness, byte_mismatch, disagreement, predicted_bytes
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import Reader, open_inputs, reader_of
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.local import Part, part_of
from repurpose_opt.runtime.manifest import DTYPES, Manifest
from repurpose_opt.runtime.splits import Split
from repurpose_opt.runtime.storage import Tensors, read_manifest, read_worker
from repurpose_opt.runtime.transport import start as start_exchange

ERROR_PREFIX = "repurpose-opt worker: error: "


@dataclass(frozen=True, eq=False)
class Job:
    """All that one worker needs to run."""

    rank: int
    manifest: Manifest
    inputs: NDArray[Any]
    """(samples, …), memory-mapped"""
    reader: Reader
    part: Part
    batch_size: int

    @property
    def output(self) -> Split:
        return self.manifest.splits[self.manifest.steps[-1].name]

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """Those with an exchange, in order."""
        names = {exchange.name for exchange in self.part.exchanges}
        return tuple(layer for layer in self.manifest.layers if layer.name in names)

    def readiness(self) -> Readiness:
        exchanges = self.part.exchanges
        return Readiness(
            digest=self.manifest.digest(),
            inputs=self.inputs.shape,
            batch_size=self.batch_size,
            sent_counts=tuple(tuple(exchange.sent_counts) for exchange in exchanges),
            received_counts=tuple(tuple(exchange.received_counts) for exchange in exchanges),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        rank, size = group.rank_and_size()
        with group.process_group(arguments.timeout):
            return _run_and_report(arguments, rank, size)
    except RepurposeError as error:
        _print_error(error)
        return 1


def _run_and_report(arguments: argparse.Namespace, rank: int, size: int) -> int:
    try:
        _run(arguments, rank, size)
    except group.SharedError as error:
        if rank == 0:
            _print_error(error)
        # torchrun ends the others as soon as one has failed: not before the line is printed.
        group.barrier()
        return 1
    except RepurposeError as error:
        _print_error(error)
        return 1
    return 0


def _run(arguments: argparse.Namespace, rank: int, size: int) -> None:
    job, error = None, None
    try:
        job = prepare(arguments, rank, size)
    except RepurposeError as caught:
        error = str(caught)
    fault = disagreement(group.gather(Readiness(error) if job is None else job.readiness()))
    if fault is not None or job is None:
        raise group.SharedError(fault)
    outputs, seconds = compute(job)
    report, fault = _report(job, seconds)
    if fault is not None:
        raise group.SharedError(fault)
    assembled = _assemble(job, outputs)
    if assembled is not None:
        _write(arguments.output, lambda file: np.save(file, assembled))
    if arguments.report is not None and rank == 0:
        _write(arguments.report, lambda file: file.write(json.dumps(report, indent=1).encode()))
    group.barrier()


def prepare(arguments: argparse.Namespace, rank: int, size: int) -> Job:
    """Read the manifest and this worker's weights, check the input, allocate the buffers. Raises RepurposeError."""
    manifest = read_manifest(arguments.plan)
    if size != manifest.n_workers:
        option = f"torchrun --nproc-per-node={manifest.n_workers}"
        raise PlanError(
            f"{arguments.plan} is a plan for {manifest.n_workers} workers, started with {size} processes: use {option}"
        )
    tensors = read_worker(arguments.plan, manifest, rank)
    inputs = open_inputs(arguments.input, manifest.graph, manifest.input_shape)
    reader = reader_of(manifest.graph, manifest.splits[INPUT], rank, manifest.dtype)
    reader.check(arguments.input, inputs)
    for path in (arguments.output, arguments.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise RepurposeError(f"{path}: cannot be written; its folder does not exist")
    batch_size = max(1, min(arguments.batch_size, len(inputs)))
    return Job(rank, manifest, inputs, reader, build_part(manifest, rank, tensors, batch_size), batch_size)


def build_part(manifest: Manifest, rank: int, tensors: Tensors, batch_size: int) -> Part:
    """The steps of this worker."""
    dtype = DTYPES[manifest.dtype]
    return part_of(manifest.graph, manifest.layers, manifest.splits, rank, tensors, batch_size, dtype)


@torch.inference_mode()
def compute(job: Job) -> tuple[NDArray[Any], float]:
    """The outputs that this worker computes, (places held, samples, *positions), and the seconds it took."""
    samples = len(job.inputs)
    outputs = np.empty(_shape(job, job.rank), dtype=job.manifest.dtype)
    group.barrier()
    started = time.perf_counter()
    for start in range(0, samples, job.batch_size):
        batch = slice(start, min(start + job.batch_size, samples))
        values = job.reader.read(job.inputs, batch)
        outputs[:, batch] = job.part.run(values, batch.stop - batch.start, start_exchange).numpy()
    group.barrier()
    return outputs, time.perf_counter() - started


def _shape(job: Job, worker: int) -> tuple[int, ...]:
    """Of the outputs that a worker computes."""
    return (len(job.output.held(worker)), len(job.inputs), *job.output.positions)


def _report(job: Job, seconds: float) -> tuple[dict[str, Any], str | None]:
    """The report, and the pair whose counted bytes are not the predicted ones."""
    layers, samples, exchanges = job.layers, len(job.inputs), job.part.exchanges
    sent = np.array([exchange.bytes_sent for exchange in exchanges])
    counts = group.gather((sent, sum(exchange.messages_sent for exchange in exchanges)))
    counted: Indices = np.stack([bytes_sent for bytes_sent, _ in counts], axis=1)
    predicted = predicted_bytes(layers, samples)
    batches = -(-samples // job.batch_size)
    report = {
        "samples": samples,
        "batches": batches,
        "seconds": seconds,
        "messages_per_batch": sum(messages for _, messages in counts) // max(batches, 1),
        "bytes_sent": counted.sum(axis=0).tolist(),
        "bytes_predicted": predicted.sum(axis=0).tolist(),
        "layers": [
            {"name": layer.name, "bytes_sent": ours.tolist(), "bytes_predicted": plans.tolist()}
            for layer, ours, plans in zip(layers, counted, predicted, strict=True)
        ],
        "outputs_gathered_on_worker_0": len(np.unique(job.output.places)) > 1,
        "note": "bytes_sent is counted from the tensors handed to torch.distributed, row: source, column: target; "
        "gathering outputs that several workers own is not part of it",
    }
    return report, byte_mismatch(layers, counted, predicted)


def _assemble(job: Job, outputs: NDArray[Any]) -> NDArray[Any] | None:
    """All outputs, (samples, …), on their only owner, or on worker 0 if they have several; None elsewhere."""
    owners = np.unique(job.output.places).tolist()
    writer = owners[0] if len(owners) == 1 else 0
    if job.rank != writer:
        if job.rank in owners and outputs.size:
            group.send(torch.from_numpy(outputs), writer)
        return None
    shape = (len(job.output.places), *outputs.shape[1:])
    assembled = np.empty(shape, dtype=job.manifest.dtype)
    for owner in owners:
        part = outputs
        if owner != job.rank:
            part = np.empty(_shape(job, owner), dtype=job.manifest.dtype)
            if part.size:
                group.receive(torch.from_numpy(part), owner)
        assembled[job.output.held(owner)] = part
    return np.ascontiguousarray(np.moveaxis(assembled, 0, job.output.axis))


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        raise RepurposeError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        partial.unlink(missing_ok=True)


def _print_error(error: RepurposeError) -> None:
    print(f"{ERROR_PREFIX}{error}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node=P -m repurpose_opt.runtime.worker",
        description="One worker of a plan. torchrun starts one for each of the plan's P workers.",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="folder of the plan")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help=".npy, (samples, …)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npy to write, (samples, …)")
    parser.add_argument(
        "--batch-size", type=_positive(int), default=256, metavar="N", help="samples at once (%(default)s)"
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="JSON to write: seconds and bytes for each pair of workers",
    )
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        default=300.0,
        metavar="SECONDS",
        help="give up when another worker is silent for so long (%(default)g)",
    )
    return parser


def _positive(kind: type[int] | type[float]) -> Any:
    def convert(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} > 0"
    return convert


if __name__ == "__main__":
    sys.exit(main())
