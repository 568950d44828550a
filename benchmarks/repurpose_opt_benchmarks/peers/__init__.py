"""Pruning methods of other people, written from their papers for comparison only, as pruners of one layer.

All see the same problem: for each worker the inputs that it holds are free and eliminated, each input that it lacks is
a group (a column of the weights of its neurons), and one budget counts the groups of all workers. Each chooses the
groups; the refit is then exact for all. Where a method has weights of its own, `raw_error` in its stats is their
error. They are set up as strong as they could be made; what differs from a paper is said where it does.
"""

from __future__ import annotations

from repurpose_opt_benchmarks.peers.alps import Alps
from repurpose_opt_benchmarks.peers.magnitude import Magnitude
from repurpose_opt_benchmarks.peers.osscar import Osscar
from repurpose_opt_benchmarks.peers.peer import Peer
from repurpose_opt_benchmarks.peers.sparsegpt import SparseGPT
from repurpose_opt_benchmarks.peers.wanda import Wanda, WandaReduced

PEERS: tuple[type[Peer], ...] = (Magnitude, Wanda, WandaReduced, SparseGPT, Alps, Osscar)

__all__ = ["PEERS", "Alps", "Magnitude", "Osscar", "Peer", "SparseGPT", "Wanda", "WandaReduced"]
