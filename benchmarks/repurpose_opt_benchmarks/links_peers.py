"""Ways to run the network of `links` on several workers, by name: what one worker of each does in a batch.

A tensor is (places, samples), so that what one worker holds of it is one run of memory; DTensor's are the other way.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks.links_dense import ALL_GATHER, HAND_WRITTEN, AllGather, Whole, dense_of
from repurpose_opt_benchmarks.links_network import DIRECT, OURS, SUMS, Prepared
from repurpose_opt_benchmarks.links_planned import planned_peer

OUR_DIRECT = f"{DIRECT}, our runtime"
FEWER_BITS = ("float16", "bfloat16", "int8")
PLANNED = {OUR_DIRECT: (DIRECT, None), SUMS: (SUMS, None)} | {
    plan + (f", {wire}" if wire else ""): (plan, wire) for plan in OURS for wire in (None, *FEWER_BITS)
}
"""Plan and wire, None: as the weights are."""


class Peer(Protocol):
    """One worker."""

    @property
    def weight_bytes(self) -> int: ...

    @property
    def buffer_bytes(self) -> int:
        """Of what is kept for messages."""

    def read(self, inputs: NDArray[np.float32], batch: slice) -> torch.Tensor:
        """What this worker has of a batch of the inputs (n, samples) before it begins."""

    def run(self, value: torch.Tensor) -> torch.Tensor | None:
        """The answer (outputs, samples) on the worker that wants it. All workers call it at once."""


def modelled(name: str, prepared: Prepared) -> Plan:
    """The plan whose model a peer computes."""
    return Plan.load(prepared.plan(PLANNED[name][0] if name in PLANNED else DIRECT))


def build(name: str, prepared: Prepared, rank: int, n_workers: int, batch_size: int) -> Peer:
    """One worker of a peer. DTensor, which takes seconds to load, only if asked for."""
    if name in PLANNED:
        plan, wire = PLANNED[name]
        return planned_peer(prepared, plan, wire, rank, batch_size)
    layers = dense_of(modelled(name, prepared))
    if name == ALL_GATHER:
        return AllGather(layers, rank, n_workers, batch_size)
    if name in HAND_WRITTEN:
        return Whole(name, layers, rank, n_workers, batch_size)
    from repurpose_opt_benchmarks.links_dtensor import DTensorPeer

    return DTensorPeer(name, layers, rank, n_workers)
