"""One worker of a plan, started P times by torchrun.

    torchrun --nproc-per-node=P -m repurpose_opt.runtime.processes.worker PLAN --input FILE.npy --output FILE.npy

Each process reads the manifest and its own weights, computes its own neurons and sends only what others need.
Exit code 0: fine, 1: the run failed, with one line on stderr that says why, 2: usage.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import PlanError, RepurposeError
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import open_inputs, reader_of
from repurpose_opt.runtime.local import Part, part_of
from repurpose_opt.runtime.manifest import DTYPES, Manifest
from repurpose_opt.runtime.processes import group
from repurpose_opt.runtime.processes.agreement import Readiness, disagreement, version_mismatch
from repurpose_opt.runtime.processes.console import print_error, print_note
from repurpose_opt.runtime.processes.desk import Desk
from repurpose_opt.runtime.processes.faults import Watch
from repurpose_opt.runtime.processes.feed import Files, Listener, Pipe, Source, targets_of
from repurpose_opt.runtime.processes.job import Job, device_of, on, traffic_report
from repurpose_opt.runtime.processes.join import Unheard, joined
from repurpose_opt.runtime.processes.options import EPILOG, add_options, check_options
from repurpose_opt.runtime.processes.outputs import assembled, write_whole
from repurpose_opt.runtime.processes.service import Front, follow
from repurpose_opt.runtime.processes.stop import StopSignal, stop_signals
from repurpose_opt.runtime.sparse import sparse_where_faster
from repurpose_opt.runtime.storage import Tensors, read_manifest, read_worker
from repurpose_opt.runtime.wire import Wire, wire_of

SECONDS_TO_HAND_ON = 5.0
"""For clients to fetch their last answers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one worker; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node=P -m repurpose_opt.runtime.processes.worker",
        description="One worker of a plan.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    arguments = parser.parse_args(argv)
    check_options(parser, arguments)
    return run(arguments)


def run(arguments: argparse.Namespace) -> int:
    """The same with options that have been read."""
    try:
        with stop_signals() as stop, joined(arguments.timeout, stop, arguments.device) as watch:
            return _run_or_tell(arguments, stop, watch)
    except Unheard:
        return 1
    except RepurposeError as error:
        print_error(error)
        return 1


def _run_or_tell(arguments: argparse.Namespace, stop: StopSignal, watch: Watch) -> int:
    rank, size = group.rank_and_size()
    try:
        return _run(arguments, rank, size, stop, watch)
    except group.SharedError as error:
        if rank == 0:
            print_error(error)
        # torchrun ends the others as soon as one has failed: not before the line is printed.
        group.barrier()
        return 1


def _run(arguments: argparse.Namespace, rank: int, size: int, stop: StopSignal, watch: Watch) -> int:
    fault = version_mismatch(watch.members)
    if fault is not None:
        raise group.SharedError(fault)
    job, source, desk, error = None, None, Desk(), None
    try:
        job = prepare(arguments, rank, size)
        if arguments.serve and rank == 0:
            source = source_of(arguments, desk, job.manifest)
    except RepurposeError as caught:
        error = str(caught)
    fault = disagreement(group.gather(Readiness(error) if error is not None or job is None else job.readiness()))
    if fault is not None or job is None:
        raise group.SharedError(fault)
    if not arguments.serve:
        return _run_file(arguments, job, stop)
    if source is not None:
        return _serve(arguments, job, source, desk, stop)
    follow(job)
    _traffic(job, 0.0)
    group.barrier()
    return 0


def prepare(arguments: argparse.Namespace, rank: int, size: int) -> Job:
    """Read the manifest and this worker's weights, check the input, allocate the buffers. Raises RepurposeError."""
    manifest = read_manifest(arguments.plan)
    if size != manifest.n_workers:
        option = f"torchrun --nproc-per-node={manifest.n_workers}"
        raise PlanError(
            f"{arguments.plan} is a plan for {manifest.n_workers} workers, started with {size} processes: use {option}"
        )
    tensors = read_worker(arguments.plan, manifest, rank)
    reader = reader_of(manifest.graph, manifest.splits[INPUT], rank, manifest.dtype)
    reads_files = not arguments.serve or arguments.feed == "owners"
    names = arguments.input if reads_files else []
    files = tuple(open_inputs(name, manifest.graph, manifest.input_shape) for name in names)
    for name, inputs in zip(names, files, strict=True):
        reader.check(name, inputs)
    for path in (arguments.output, arguments.report):
        if path is not None and not path.absolute().parent.is_dir():
            raise RepurposeError(f"{path}: cannot be written; its folder does not exist")
    batch_size = arguments.batch_size
    if not arguments.serve:
        batch_size = max(1, min(batch_size, len(files[0])))
    mode = f"--serve --feed {arguments.feed}" if arguments.serve else "a run over one file"
    device = device_of(arguments.device)
    wire = wire_of(arguments.wire, DTYPES[manifest.dtype])
    with on(device):
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        part = build_part(manifest, rank, tensors, batch_size, wire)
    return Job(rank, manifest, part, reader, files, batch_size, mode, wire, device)


def build_part(manifest: Manifest, rank: int, tensors: Tensors, batch_size: int, wire: Wire | None = None) -> Part:
    """The steps of this worker, for batches of at most so many samples."""
    dtype = DTYPES[manifest.dtype]
    part = part_of(manifest.graph, manifest.layers, manifest.splits, rank, tensors, batch_size, dtype, wire)
    return sparse_where_faster(part, batch_size)


def source_of(arguments: argparse.Namespace, desk: Desk, manifest: Manifest) -> Source:
    """Where worker 0 takes batches from. Raises RepurposeError."""
    if arguments.listen is not None:
        return Listener(arguments.listen, desk)
    if not arguments.input:
        return Pipe(desk)
    targets = targets_of(arguments.input, arguments.output)
    files = [open_inputs(name, manifest.graph, manifest.input_shape) for name in arguments.input]
    return Files(desk, arguments.input, files, targets, arguments.batch_size)


def _run_file(arguments: argparse.Namespace, job: Job, stop: StopSignal) -> int:
    outputs, seconds = compute(job, stop)
    report = _traffic(job, seconds)
    owners = np.unique(job.output.places).tolist()
    whole = assembled(job.output, job.rank, outputs, writer=owners[0] if len(owners) == 1 else 0)
    if whole is not None:
        write_whole(arguments.output, lambda file: np.save(file, whole))
    if job.rank == 0:
        _write_report(arguments.report, report)
    group.barrier()
    return 0


def compute(job: Job, stop: StopSignal) -> tuple[NDArray[Any], float]:
    """The outputs that this worker computes, (places held, samples, *positions), and the seconds it took."""
    (inputs,) = job.files
    shape = (len(job.output.held(job.rank)), len(inputs), *job.output.positions)
    outputs = np.empty(shape, dtype=job.manifest.dtype)
    group.barrier()
    started = time.perf_counter()
    for start in range(0, len(inputs), job.batch_size):
        stop.raise_if_received(job.rank)
        batch = slice(start, min(start + job.batch_size, len(inputs)))
        outputs[:, batch] = job.run(job.reader.read(inputs, batch), batch.stop - batch.start)
    group.barrier()
    return outputs, time.perf_counter() - started


def _serve(arguments: argparse.Namespace, job: Job, source: Source, desk: Desk, stop: StopSignal) -> int:
    """Worker 0 of a service."""
    front = Front(job, desk, stop, arguments.timeout)
    source.start()
    print_note(f"serving {arguments.plan} on {source.name}")
    front.serve()
    report = _traffic(job, front.tally.seconds)
    desk.close(min(SECONDS_TO_HAND_ON, arguments.timeout / 2))
    source.close()
    report |= front.tally.figures(report["samples"]) | {"bytes_fed": front.bytes_fed.tolist()}
    _write_report(arguments.report, report)
    print_note(json.dumps(report) if arguments.json else front.tally.text(report["samples"]))
    group.barrier()
    return 1 if source.has_failed else 0


def _traffic(job: Job, seconds: float) -> dict[str, Any]:
    """The report of what was sent. Raises SharedError where that is not what the plan predicts."""
    report, fault = traffic_report(job, seconds)
    if fault is not None:
        raise group.SharedError(fault)
    return report


def _write_report(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        write_whole(path, lambda file: file.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    sys.exit(main())
