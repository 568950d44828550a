"""One of the P processes of a job of `links`: `python -m repurpose_opt_benchmarks.links_process JOB.json`.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which one, as for torchrun.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.processes import group
from repurpose_opt_benchmarks.links_dense import dense_of
from repurpose_opt_benchmarks.links_jobs import Job, Row, read_job
from repurpose_opt_benchmarks.links_namespaces import LINKS, Counter, counters
from repurpose_opt_benchmarks.links_network import ODD, WANTS_ANSWER, Prepared
from repurpose_opt_benchmarks.links_peers import Peer, build, modelled
from repurpose_opt_benchmarks.links_planned import BareExchange, PlannedPeer, planned_peer

LINK = "the link itself"
"""In place of a peer."""
FLOAT_BYTES = 4
PAIR_BYTES = (4, 10_000, 100_000, 1_000_000)
"""Sizes of the messages by which a link is measured."""
LINK_TIMES = 4
"""How many more exchanges of 4 bytes there are than batches."""
SETTLE_SECONDS = 0.2
"""For acknowledgements that are still under way."""


def main(argv: Sequence[str] | None = None) -> int:
    (path,) = sys.argv[1:] if argv is None else argv
    job = read_job(Path(path))
    torch.set_num_threads(1)
    rank, _ = group.rank_and_size()
    with group.process_group(job.silence), torch.inference_mode():
        for row in _JOBS[job.kind](job, rank):
            if rank == WANTS_ANSWER:
                with Path(job.rows).open("a") as lines:
                    lines.write(json.dumps({**job.head, **row}) + "\n")
        group.barrier()
    return 0


# Times


def _times(job: Job, rank: int) -> Iterator[Row]:
    """A row for each peer, and one for the link."""
    prepared = Prepared(Path(job.folder))
    inputs, batch = prepared.inputs(), slice(0, job.batch_size)
    for name in job.peers:
        if name == LINK:
            yield {"peer": name, **_link_row(job, rank)}
            continue
        peer = build(name, prepared, rank, job.n_workers, job.batch_size)
        value = peer.read(inputs, batch)
        row = _times_of(job, rank, peer, value)
        answer = peer.run(value)
        if answer is not None:
            row["difference"] = _difference(answer, modelled(name, prepared), inputs[:, batch])
        yield {"peer": name, **row}


def _times_of(job: Job, rank: int, peer: Peer, value: torch.Tensor) -> Row:
    for _ in range(job.warm_up):
        peer.run(value)
    if not isinstance(peer, PlannedPeer):
        return {"seconds": _slowest(job, lambda: peer.run(value))}
    blocked: list[float] = []

    def run() -> None:
        before = peer.blocked.seconds
        peer.run(value)
        blocked.append(peer.blocked.seconds - before)

    handed = peer.bytes_handed
    seconds = _slowest(job, run)
    handed = peer.bytes_handed - handed
    compute = _durations(job, lambda: peer.compute(value))
    bare = BareExchange.of(peer.manifest, rank, job.batch_size)
    bare.run()
    row: Row = {
        "seconds": seconds,
        "blocked": _by_rank(blocked).max(axis=0).tolist(),
        "blocked_by_worker": np.median(_by_rank(blocked), axis=1).tolist(),
        "compute_in_order": np.median(np.sort(compute, axis=0), axis=1).tolist(),
        "bytes_handed": np.stack(group.gather(handed)).tolist(),
        "bytes_predicted": (peer.predicted(value.shape[1]) * job.batches).tolist(),
    }
    if peer.wire is None:
        row["bare"] = _slowest(job, bare.run)
    if LINKS[job.link].rate is not None:
        row["counted"] = _counted(job, rank, lambda: peer.run(value))
    return row


def _durations(job: Job, run: Callable[[], object]) -> NDArray[np.float64]:
    """(P, batches) seconds of each worker, all of which begin each batch together."""
    durations = []
    for _ in range(job.batches):
        group.barrier()
        began = time.perf_counter()
        run()
        durations.append(time.perf_counter() - began)
    return _by_rank(durations)


def _slowest(job: Job, run: Callable[[], object]) -> list[float]:
    """Seconds of each batch, by the worker that is done last."""
    slowest: list[float] = _durations(job, run).max(axis=0).tolist()
    return slowest


def _by_rank(mine: list[float]) -> NDArray[np.float64]:
    return np.array(group.gather(mine))


def _counted(job: Job, rank: int, run: Callable[[], object]) -> Row:
    """(P, P) what the kernel counts from worker p (row) to worker k (column) in all batches, and its packets."""

    def now() -> dict[int, Counter]:
        group.barrier()
        time.sleep(SETTLE_SECONDS)
        return counters(job.n_workers, rank)

    before = now()
    for _ in range(job.batches):
        run()
    after = now()
    mine = [after[k] - before[k] if k != rank else Counter(0, 0) for k in range(job.n_workers)]
    every = group.gather(mine)
    return {
        "batches": job.batches,
        "bytes": [[counter.sent_bytes for counter in row] for row in every],
        "packets": [[counter.packets for counter in row] for row in every],
    }


def _link_row(job: Job, rank: int) -> Row:
    """Seconds of exchanges by torch.distributed alone: 4 bytes between all pairs; some sizes from each to the next."""
    P = job.n_workers
    ones = [int(k != rank) for k in range(P)]
    source, target = ([int(k == (rank + step) % P) for k in range(P)] for step in (-1, 1))

    def timed(received: list[int], sent: list[int], numbers: int, times: int = 1) -> list[float]:
        buffers = (torch.zeros(sum(received), numbers), torch.zeros(sum(sent), numbers))
        exchange = BareExchange([(*buffers, received, sent, sum(sent) == P - 1)])
        exchange.run()
        return _slowest(replace(job, batches=times * job.batches), exchange.run)

    following = {str(size): timed(source, target, size // FLOAT_BYTES) for size in PAIR_BYTES}
    return {"all_pairs": timed(ones, ones, 1, LINK_TIMES), "next": following}


# Alone: start, memory, answers


def _alone(job: Job, rank: int) -> Iterator[Row]:
    """One row: what it takes to begin, what it keeps in memory, and whether its answers are right."""
    (name,) = job.peers
    prepared = Prepared(Path(job.folder))
    joined = _resident()
    peer = build(name, prepared, rank, job.n_workers, job.batch_size)
    inputs, labels = prepared.inputs(), prepared.labels()
    answers = []
    begun = 0.0
    for start in range(0, inputs.shape[1], job.batch_size):
        batch = slice(start, min(start + job.batch_size, inputs.shape[1]))
        answer = peer.run(peer.read(inputs, batch))
        begun = begun or time.time() - job.started
        if answer is not None:
            answers.append(answer.argmax(0).numpy())
    memory = group.gather((peer.weight_bytes, peer.buffer_bytes, joined, _resident()))
    weights, buffers, before, most = np.array(memory).T.tolist()
    accuracy = float((np.concatenate(answers) == labels).mean()) if answers else None
    yield {
        "peer": name,
        "accuracy": accuracy,
        "start_seconds": begun,
        "weight_bytes": weights,
        "buffer_bytes": buffers,
        "resident_joined": before,
        "resident_most": most,
    }


def _resident() -> int:
    """Bytes of the most memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# Odd sizes


def _odd(job: Job, rank: int) -> Iterator[Row]:
    """One row: the largest difference from one process, of a plan (its name) or of a layout of DTensor."""
    (name,) = job.peers
    case, _, how = name.partition(": ")
    prepared = Prepared(Path(job.folder))
    inputs = prepared.inputs(odd=True)
    row: Row = {"peer": name}
    plan = direct = Plan.load(prepared.plan(f"{case}, direct"))
    if how.startswith("DTensor"):
        from repurpose_opt_benchmarks.links_dtensor import DTensorPeer

        layout, _, option = how.partition("; ")
        strips, keeps_shapes = ODD[case], option != ""
        parallel = DTensorPeer(layout, dense_of(direct), rank, job.n_workers, strips=strips, keeps_shapes=keeps_shapes)
        row["local_shapes"] = group.gather(parallel.local_shapes)
        peer: Peer = parallel
    else:
        plan = Plan.load(prepared.plan(f"{case}, {how}"))
        peer = planned_peer(prepared, f"{case}, {how}", None, rank, job.batch_size)
    answer = peer.run(peer.read(inputs, slice(0, inputs.shape[1])))
    if answer is not None:
        row["answer_shape"] = list(answer.shape)
        row["difference"] = _difference(answer, plan, inputs)
    yield row


def _difference(answer: torch.Tensor, plan: Plan, inputs: NDArray[np.float32]) -> float | None:
    """The largest in any output from what the plan's model says in this process; None for another shape."""
    expected = plan.model(torch.from_numpy(np.ascontiguousarray(inputs.T))).T
    return float((answer - expected).abs().max()) if answer.shape == expected.shape else None


_JOBS: dict[str, Callable[[Job, int], Iterator[Row]]] = {"times": _times, "alone": _alone, "odd": _odd}

if __name__ == "__main__":
    sys.exit(main())
