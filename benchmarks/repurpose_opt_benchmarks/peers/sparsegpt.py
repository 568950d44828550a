"""`sparsegpt`: Frantar, Alistarh 2023, arXiv 2301.00774, sections 3.2 – 3.3 and algorithm 1, for groups.

Columns are passed from left to right. With U the upper Cholesky factor of K⁻¹ (K⁻¹ = UᵀU), row j of U holds, scaled,
the row j of the inverse that is left once the columns before j are done with; so pruning column j costs
‖V_j‖² / U_jj², and the columns after it make up for it by V ← V − (V_j / U_jj) U_j. Kept columns stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, cholesky

from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.peers.peer import Choice, Groups, Peer, column_energy, error, largest

BLOCK = 32
"""Columns whose masks are chosen together (B_s of section 3.3; there 128, on weights)."""


class SparseGPT(Peer):
    """The paper prunes the same share of each block. That starves the columns that matter where a column is a group,
    so how many a block keeps is chosen over all blocks and workers, by the same cost before any update."""

    name = "sparsegpt"

    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        factors = [_factor_of_inverse(worker.reduced.moment) for worker in workers]
        saliency = [column_energy(w.weight) / column_energy(factor) for w, factor in zip(workers, factors, strict=True)]
        kept: list[NDArray[np.bool_]] = []
        raw_error = 0.0
        for worker, factor, first in zip(workers, factors, largest(saliency, count), strict=True):
            quota = [int(np.count_nonzero(first[start : start + BLOCK])) for start in range(0, len(first), BLOCK)]
            weight = _pruned(worker.weight.copy(), factor, quota)
            kept.append(np.asarray(weight.any(axis=0)))
            raw_error += error(worker.reduced, weight)
        return Choice(kept, {"raw_error": raw_error})


def _pruned(weight: NDArray[np.float64], factor: NDArray[np.float64], quota: list[int]) -> NDArray[np.float64]:
    """The weights (r, c), changed in place, with at most quota[b] nonzero columns in block b. O(r c²)."""
    for block, keep in enumerate(quota):
        start = block * BLOCK
        end = min(start + BLOCK, weight.shape[1])
        cost = column_energy(weight[:, start:end]) / np.square(np.diagonal(factor)[start:end])
        (is_kept,) = largest([cost], keep)
        errors = np.zeros((len(weight), end - start))
        for position in np.flatnonzero(~is_kept):
            j = start + position
            errors[:, position] = weight[:, j] / factor[j, j]
            weight[:, j:end] -= np.outer(errors[:, position], factor[j, j:end])
            weight[:, j] = 0.0
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def _factor_of_inverse(moment: NDArray[np.float64]) -> NDArray[np.float64]:
    """U, upper triangular, with K⁻¹ = Uᵀ U."""
    inverse = cho_solve(cho_factor(moment), np.eye(len(moment)))
    return np.asarray(cholesky(inverse, lower=False))
