"""`alps`: Meng, Behdin, Wang, Mazumder 2024, arXiv 2406.07831 (NeurIPS 2024): ADMM on the ℓ0 constraint, ρ rising.

The paper's algorithm 1 with groups in place of weights. Columns are scaled to K_jj = 1; then ADMM alternates
B = (R − Y + ρD)(K + ρI)⁻¹, D = the projection of B + Y/ρ on at most N groups of all workers, and Y ← Y + ρ(B − D)
(section 3.2). The eigenvectors of K turn a change of ρ into a division. ρ rises the faster the more of the support
still changes. In place of algorithm 2 (conjugate gradients on the support, section 3.3) the refit is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.peers.peer import Choice, Groups, Peer, column_energy, error, largest, refitted_error

FIRST_RHO = 0.1
MOST_ROUNDS = 300
ROUNDS_A_CHECK = 3
RISES = ((0.1, 1.05), (0.005, 1.03), (0.0, 1.02))
"""If more than this share of the groups kept has changed since the last check, ρ rises by this factor.

The authors' factors, 1.3, 1.2 and 1.1, end after about 30 rounds here, with an error up to 7 % higher.
"""
LEAST_CHANGE = 0.005
"""Where the first check sees no larger change, ρ was too large and is …"""
CUT = 5.0
"""… divided by this, down to …"""
LEAST_RHO = 1e-6
PATIENCE = 10
"""Checks without a change of the support after which it counts as settled."""


class Alps(Peer):
    """As in the authors' code ρ begins at 0.1, and all starts over with a fifth of it where nothing moves.

    Of the supports seen at the checks the one of least error after refit counts, where the paper takes the last.
    `raw_error` is that of the last D.
    """

    name = "alps"

    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        splits = [_Split(worker) for worker in workers]
        first = support = largest([column_energy(split.start) for split in splits], count)
        _restart(splits, first)
        rho, is_moving, rounds, unchanged = FIRST_RHO, False, 0, 0
        best, least = first, _refitted(splits, first)
        while rounds < MOST_ROUNDS and unchanged < PATIENCE:
            for _ in range(ROUNDS_A_CHECK):
                kept = _round(splits, rho, count)
            rounds += ROUNDS_A_CHECK
            changed = sum(int((old != new).sum()) for old, new in zip(support, kept, strict=True))
            support = kept
            reached = _refitted(splits, support) if changed else least
            if reached < least:
                best, least = support, reached
            is_moving = is_moving or changed > LEAST_CHANGE * count
            if is_moving:
                unchanged = 0 if changed else unchanged + 1
                rho *= next((factor for share, factor in RISES if changed > share * count), 1.0)
            elif rho < LEAST_RHO:
                break
            else:
                rho, support = rho / CUT, first
                _restart(splits, first)
        raw_error = sum(error(split.reduced, split.weight) for split in splits)
        return Choice(best, {"raw_error": raw_error, "rounds": rounds, "rho": rho})


def _refitted(splits: Sequence[_Split], kept: Sequence[NDArray[np.bool_]]) -> float:
    return sum(refitted_error(split.reduced, columns) for split, columns in zip(splits, kept, strict=True))


def _round(splits: Sequence[_Split], rho: float, count: int) -> list[NDArray[np.bool_]]:
    """One round of ADMM on all workers; the columns (c,) that each keeps."""
    proposals = [split.minimise(rho) for split in splits]
    kept = largest([column_energy(proposal) for proposal in proposals], count)
    for split, proposal, columns in zip(splits, proposals, kept, strict=True):
        split.project(proposal, columns, rho)
    return kept


def _restart(splits: Sequence[_Split], kept: Sequence[NDArray[np.bool_]]) -> None:
    for split, columns in zip(splits, kept, strict=True):
        split.restart(columns)


class _Split:
    """B, D and Y of one worker, all (r, c), B and Y in the basis of K's eigenvectors. Single precision suffices."""

    def __init__(self, groups: Groups) -> None:
        self.reduced = groups.reduced
        self.scale = np.sqrt(self.reduced.variance)
        values, vectors = eigh(self.reduced.moment / np.outer(self.scale, self.scale), overwrite_a=True, driver="evd")
        self.eigenvalues, self.basis = values.astype(np.float32), vectors.astype(np.float32)
        self.given = (self.reduced.residual / self.scale).astype(np.float32) @ self.basis
        self.start = (groups.weight * self.scale).astype(np.float32)

    @property
    def weight(self) -> NDArray[np.float64]:
        """D on the scale of the weights."""
        return self.projected / self.scale

    def restart(self, kept: NDArray[np.bool_]) -> None:
        """D = the dense weights on the columns kept, Y = 0."""
        self.multiplier = np.zeros_like(self.given)
        self._keep(self.start, kept)

    def minimise(self, rho: float) -> NDArray[np.float32]:
        """Set B; B + Y/ρ in the basis of the columns. O(r c²)."""
        numerator = self.given - self.multiplier + np.float32(rho) * self.projected_in_basis
        self.minimiser = numerator / (self.eigenvalues + np.float32(rho))
        return (self.minimiser + self.multiplier / np.float32(rho)) @ self.basis.T

    def project(self, proposal: NDArray[np.float32], kept: NDArray[np.bool_], rho: float) -> None:
        """Set D, and Y by B − D."""
        self._keep(proposal, kept)
        self.multiplier += np.float32(rho) * (self.minimiser - self.projected_in_basis)

    def _keep(self, matrix: NDArray[np.float32], kept: NDArray[np.bool_]) -> None:
        self.projected = np.where(kept, matrix, np.float32(0))
        self.projected_in_basis = matrix[:, kept] @ self.basis[kept]
