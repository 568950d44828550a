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
from torch import nn

from repurpose_opt.errors import PlanError, RepurposeError
from repurpose_opt.runtime import group
from repurpose_opt.runtime.agreement import Readiness, byte_mismatch, disagreement, predicted_bytes
from repurpose_opt.runtime.exchange import ExchangeStep
from repurpose_opt.runtime.inputs import check_finite, open_inputs, read_columns
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.manifest import DTYPES, Manifest
from repurpose_opt.runtime.modules import LINEAR, from_spec
from repurpose_opt.runtime.storage import Tensors, bias_key, encoder_key, read_manifest, read_worker, weight_key

ERROR_PREFIX = "repurpose-opt worker: error: "


@dataclass(frozen=True, eq=False)
class Step:
    """One layer on one worker: exchange, multiply, activate."""

    exchange: ExchangeStep
    weight: torch.Tensor
    """(rows, columns), decoders of received numbers included."""
    bias: torch.Tensor
    """(rows, 1)"""
    activation: nn.Sequential

    def run(self, values: torch.Tensor) -> torch.Tensor:
        """(held, samples) → (rows, samples)"""
        inputs = self.exchange.run(values, group.all_to_all)
        return self.activation(torch.addmm(self.bias, self.weight, inputs))


@dataclass(frozen=True, eq=False)
class Job:
    """All that one worker needs to run."""

    rank: int
    manifest: Manifest
    inputs: NDArray[Any]
    """(samples, n), memory-mapped"""
    before: nn.Sequential
    """What the model does to its inputs before the first layer."""
    steps: tuple[Step, ...]
    batch_size: int

    def readiness(self) -> Readiness:
        exchanges = [step.exchange for step in self.steps]
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
    inputs = open_inputs(arguments.input, manifest)
    check_finite(arguments.input, inputs, manifest.layers[0].held(rank), manifest.dtype)
    for path in (arguments.output, arguments.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise RepurposeError(f"{path}: cannot be written; its folder does not exist")
    batch_size = max(1, min(arguments.batch_size, len(inputs)))
    before, steps = build_steps(manifest, rank, tensors, batch_size)
    return Job(rank, manifest, inputs, before, steps, batch_size)


def build_steps(
    manifest: Manifest, rank: int, tensors: Tensors, batch_size: int
) -> tuple[nn.Sequential, tuple[Step, ...]]:
    """What comes before the first layer, and a step for each layer."""
    dtype = DTYPES[manifest.dtype]
    activations = [nn.Sequential()]
    for _, spec in manifest.modules:
        if spec["kind"] in LINEAR:
            activations.append(nn.Sequential())
        elif spec["kind"] != "Flatten":  # open_inputs has flattened the samples
            activations[-1].append(from_spec(spec))
    steps = []
    for layer, activation in zip(manifest.layers, activations[1:], strict=True):
        weight = tensors[weight_key(layer)]
        bias = tensors.get(bias_key(layer), torch.zeros(len(weight), dtype=dtype))
        exchange = ExchangeStep(layer, rank, batch_size, dtype, tensors.get(encoder_key(layer)))
        steps.append(Step(exchange, weight, bias[:, None], activation.eval()))
    return activations[0].eval(), tuple(steps)


@torch.inference_mode()
def compute(job: Job) -> tuple[NDArray[Any], float]:
    """The outputs that this worker computes, (rows, samples), and the seconds it took."""
    held = job.manifest.layers[0].held(job.rank)
    samples = len(job.inputs)
    outputs = np.empty((len(job.steps[-1].weight), samples), dtype=job.manifest.dtype)
    group.barrier()
    started = time.perf_counter()
    for start in range(0, samples, job.batch_size):
        batch = slice(start, start + job.batch_size)
        columns = read_columns(job.inputs, batch, held, job.manifest.dtype)
        values = job.before(torch.from_numpy(np.ascontiguousarray(columns.T)))
        for step in job.steps:
            values = step.run(values)
        outputs[:, batch] = values.numpy()
    group.barrier()
    return outputs, time.perf_counter() - started


def _report(job: Job, seconds: float) -> tuple[dict[str, Any], str | None]:
    """The report, and the pair whose counted bytes are not the predicted ones."""
    layers, samples = job.manifest.layers, len(job.inputs)
    exchanges = [step.exchange for step in job.steps]
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
        "outputs_gathered_on_worker_0": len(np.unique(layers[-1].owner)) > 1,
        "note": "bytes_sent is counted from the tensors handed to torch.distributed, row: source, column: target; "
        "gathering outputs that several workers own is not part of it",
    }
    return report, byte_mismatch(layers, counted, predicted)


def _assemble(job: Job, outputs: NDArray[Any]) -> NDArray[Any] | None:
    """All outputs, (samples, m), on their only owner, or on worker 0 if they have several; None elsewhere."""
    last = job.manifest.layers[-1]
    owners = np.unique(last.owner).tolist()
    writer = owners[0] if len(owners) == 1 else 0
    if job.rank != writer:
        if job.rank in owners and outputs.size:
            group.send(torch.from_numpy(outputs), writer)
        return None
    assembled = np.empty((len(job.inputs), len(last.owner)), dtype=job.manifest.dtype)
    for owner in owners:
        part = outputs
        if owner != job.rank:
            part = np.empty((len(last.rows(owner)), len(job.inputs)), dtype=job.manifest.dtype)
            if part.size:
                group.receive(torch.from_numpy(part), owner)
        assembled[:, last.rows(owner)] = part.T
    return assembled


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
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help=".npy, (samples, columns)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".npy to write, (samples, outputs)")
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
