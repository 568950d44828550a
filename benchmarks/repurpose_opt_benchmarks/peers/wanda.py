"""`wanda`: Sun, Liu, Bair, Kolter 2023, arXiv 2306.11695, section 3, equation 1: |W_ij| ‖x_j‖.

For a group: the Frobenius norm of the scores of its weights, ‖W_j‖ ‖x_j‖.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.peers.peer import Choice, Groups, Peer, column_energy, largest


class Wanda(Peer):
    """As in the paper: ‖x_j‖² is the second moment of the input, its mean included."""

    name = "wanda"

    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        power = problem.moments.variance + np.square(problem.moments.mean)
        return Choice(largest([column_energy(w.weight) * power[w.reduced.column] for w in workers], count))


class WandaReduced(Peer):
    """With what is left to know: ‖x_j‖² is the variance of the input given those that the worker holds."""

    name = "wanda-reduced"

    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        return Choice(largest([column_energy(w.weight) * w.reduced.variance for w in workers], count))
