"""The messages that one worker receives, as they are improved: what each source is worth beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from repurpose_opt.exchange import Exchange, Values
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import Receiver, Spectrum, expanded, spectrum_of


@dataclass(frozen=True, eq=False)
class Sent:
    """What one source sends: R (r, n_p) with linearly independent rows; of chosen values it picks their positions."""

    encoder: NDArray[np.float64]
    chosen: NDArray[np.int64] | None = None
    """(r,) positions among the source's values, or None for a code."""

    @staticmethod
    def values(chosen: NDArray[np.int64], held: int) -> Sent:
        return Sent(np.eye(held)[chosen], chosen)

    @property
    def size(self) -> int:
        return len(self.encoder)


class Received:
    """What each source sends to one receiver; sources that send nothing are absent."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.sent: dict[int, Sent] = {}
        self._numbers: dict[int, NDArray[np.float64]] = {}
        """Eᵀ (n_p·b, numbers), E = R ⊗ I"""
        self._covariance: dict[int, NDArray[np.float64]] = {}
        """K[:,p] Eᵀ (columns, numbers)"""
        self._worth: dict[int, NDArray[np.float64]] = {}
        """B_p Eᵀ (rows, numbers)"""

    @staticmethod
    def of(receiver: Receiver, problem: LayerProblem, exchange: Exchange) -> Received:
        """What the exchange sends to the receiver."""
        received = Received(receiver)
        for p, held in receiver.values.items():
            message = exchange.messages.get((p, receiver.worker))
            if isinstance(message, Values):
                received.set(p, Sent.values(np.searchsorted(held, message.values), len(held)))
            elif message is not None:
                received.set(p, Sent(np.asarray(message.encoder, dtype=np.float64)))
        return received

    def set(self, p: int, sent: Sent) -> None:
        """Let worker p send this instead of what it did."""
        self.sent.pop(p, None)
        if sent.size == 0:
            return
        receiver = self.receiver
        columns = receiver.columns[p].ravel()
        numbers = expanded(sent.encoder, receiver.width)
        self.sent[p], self._numbers[p] = sent, numbers
        self._worth[p] = receiver.residual[:, columns] @ numbers
        self._covariance[p] = receiver.covariance_of(p, numbers)

    def beside(self, p: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """B_p (rows, n_p·b) and K_pp (n_p·b, n_p·b), or its diagonal, beside what the others send."""
        receiver = self.receiver
        columns = receiver.columns[p].ravel()
        residual, variance = receiver.residual[:, columns], receiver.variances[p]
        others = [q for q in self.sent if q != p]
        if receiver.local_half is None or not others:
            return residual, variance
        factor, worth = self._whitened(others)
        shared = np.hstack([self._covariance[q][columns] for q in others]).T
        shared = solve_triangular(factor, shared, lower=True)
        return residual - worth.T @ shared, variance - shared.T @ shared

    def spectrum(self, p: int) -> Spectrum:
        """What numbers from worker p are worth beside what the others send."""
        return spectrum_of(*self.beside(p), self.receiver.width, self.receiver.energy)

    @property
    def error(self) -> float:
        """The receiver's error after refit."""
        if not self.sent:
            return self.receiver.energy
        _, worth = self._whitened(list(self.sent))
        return float(self.receiver.energy - np.einsum("nr,nr->", worth, worth))

    def _whitened(self, sources: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """F (numbers, numbers), the covariance of the sources' numbers being F Fᵀ, and F⁻¹ (B Eᵀ)ᵀ (numbers, rows)."""
        columns = self.receiver.columns
        covariance = np.block(
            [[self._numbers[p].T @ self._covariance[q][columns[p].ravel()] for q in sources] for p in sources]
        )
        factor = cholesky(covariance, lower=True)
        return factor, solve_triangular(factor, np.hstack([self._worth[q] for q in sources]).T, lower=True)
