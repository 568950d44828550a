"""What the workers of a run compare: versions and plans before the first sample, bytes sent after the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.processes.members import Member
from repurpose_opt.runtime.wire import traffic


@dataclass(frozen=True)
class Readiness:
    """What one worker is about to do, or why it cannot."""

    error: str | None = None
    digest: str = ""
    """Of the manifest."""
    mode: str = ""
    """How the workers get their inputs, in words."""
    inputs: tuple[tuple[int, ...], ...] = ()
    """(samples, …) of each file that it reads."""
    batch_size: int = 0
    sent_counts: tuple[tuple[int, ...], ...] = ()
    """(layers, P) numbers that it is about to send to each worker for one sample."""
    received_counts: tuple[tuple[int, ...], ...] = ()
    """(layers, P) numbers that it expects from each worker for one sample."""
    wire: str = ""
    """What messages are written in."""
    device: str = ""
    """cpu or cuda."""


def disagreement(workers: Sequence[Readiness]) -> str | None:
    """Why these workers cannot run together, in one line; None if they can."""
    return _errors(workers) or _difference(workers) or _unmatched(workers)


def version_mismatch(members: Sequence[Member]) -> str | None:
    """Whose version of this package is not that of worker 0, in one line; None if all are the same.

    Apart from `disagreement`, as another version may not even understand a Readiness.
    """
    odd = [rank for rank, member in enumerate(members) if member.version != members[0].version]
    if not odd:
        return None
    theirs, ours = members[odd[0]].version, members[0].version
    return f"the version of repurpose-opt of worker {_listed(odd)} is {theirs}, that of worker 0 is {ours}"


def byte_mismatch(layers: Sequence[PlannedLayer], counted: Indices, predicted: Indices) -> str | None:
    """The first pair for which bytes counted and predicted, (layers, P, P), differ, in one line; None if none does."""
    different = np.argwhere(counted != predicted)
    if not len(different):
        return None
    layer, source, target = different[0]
    return (
        f"worker {source} sent {counted[layer, source, target]} bytes to worker {target} for layer "
        f"{layers[layer].name!r}, the plan predicts {predicted[layer, source, target]}: "
        f"{len(different)} of the counts differ from the plan"
    )


def predicted_bytes(layers: Sequence[PlannedLayer], samples: int, wire: str) -> Indices:
    """(layers, P, P) bytes that the plan predicts for one batch of so many samples."""
    return np.array([traffic(layer, samples, wire) for layer in layers])


def _errors(workers: Sequence[Readiness]) -> str | None:
    errors = {rank: worker.error for rank, worker in enumerate(workers) if worker.error is not None}
    if not errors:
        return None
    rank, error = next(iter(errors.items()))
    if len(errors) == len(workers) and len(set(errors.values())) == 1:
        return error
    others = f" (and on worker {_listed(list(errors)[1:])} too)" if len(errors) > 1 else ""
    return f"worker {rank}: {error}{others}"


def _difference(workers: Sequence[Readiness]) -> str | None:
    meanings = {
        "digest": "plan (SHA-256 of its manifest)",
        "mode": "way to get inputs (--serve, --listen, --feed)",
        "inputs": "input (samples, …)",
        "batch_size": "batch size",
        "wire": "wire",
        "device": "device",
    }
    for field, meaning in meanings.items():
        values = [getattr(worker, field) for worker in workers]
        odd = [rank for rank, value in enumerate(values) if value != values[0]]
        if odd:
            theirs, ours = (_text(values[rank]) for rank in (odd[0], 0))
            return f"the {meaning} of worker {_listed(odd)} is {theirs}, that of worker 0 is {ours}"
    return None


def _text(value: object) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _unmatched(workers: Sequence[Readiness]) -> str | None:
    sent: NDArray[np.int64] = np.array([worker.sent_counts for worker in workers])
    received: NDArray[np.int64] = np.array([worker.received_counts for worker in workers])
    different = np.argwhere(sent != received.transpose(2, 1, 0))
    if not len(different):
        return None
    source, layer, target = different[0]
    return (
        f"workers {source} and {target} disagree on layer number {layer}: {source} sends "
        f"{sent[source, layer, target]} numbers, {target} expects {received[target, layer, source]}"
    )


def _listed(ranks: Sequence[int]) -> str:
    return " and ".join(str(rank) for rank in ranks)
