"""`magnitude`: keeps the groups of largest norm."""

from __future__ import annotations

from collections.abc import Sequence

from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.peers.peer import Choice, Groups, Peer, column_energy, largest


class Magnitude(Peer):
    """The Frobenius norm of a group's weights: Han, Pool, Tran, Dally 2015, arXiv 1506.02626, section 3, for groups as
    Li, Kadav, Durdanovic, Samet, Graf 2017, arXiv 1608.08710, section 3.1 (there the ℓ1 norm)."""

    name = "magnitude"

    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        return Choice(largest([column_energy(worker.weight) for worker in workers], count))
