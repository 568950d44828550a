"""The messages that one worker receives, as they are improved: what each source is worth beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from repurpose_opt.exchange import Exchange, Values
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import Link, stacked
from repurpose_opt.moments import lower_factor
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import Receiver, Spectrum, expanded, spectrum_of


def without_codes(formulation: Formulation) -> str | None:
    """Why a pruner that chooses codes does not serve a formulation, or None."""
    if isinstance(formulation, Volume) and formulation.sends_codes:
        return None
    return 'codes need Volume(messages="codes") or "mixed"'


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

    def spectrum(self, p: int, most: int | None = None) -> Spectrum:
        """What the first numbers from worker p, all or at most so many, are worth beside what the others send."""
        receiver = self.receiver
        is_wide = len(receiver.rows) < len(receiver.values[p])  # B_p itself is smaller than its Gram matrix
        if most is None or is_wide or receiver.width > 1 or receiver.local_half is None:
            return spectrum_of(*self.beside(p), receiver.width, receiver.energy)
        source, columns = receiver.sources[p], receiver.columns[p].ravel()
        others = [q for q in self.sent if q != p]
        if not others:
            return source.leading(source.gram, np.empty((0, len(source.gram))), most, receiver.energy)
        factor, worth = self._whitened(others)
        covariance = np.hstack([self._covariance[q][columns] for q in others])
        half = source.whitened(solve_triangular(factor, covariance.T, lower=True).T)
        image = source.whitened((worth @ receiver.residual[:, columns]).T)
        change = (image - 0.5 * half @ (worth @ worth.T)) @ half.T
        return source.leading(source.gram - change - change.T, half.T, most, receiver.energy)

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
        factor = lower_factor(covariance)
        return factor, solve_triangular(factor, np.hstack([self._worth[q] for q in sources]).T, lower=True)


@dataclass(frozen=True, eq=False)
class Line:
    """What one worker sends: to one receiver, or on broadcast links the same to several."""

    source: int
    ends: tuple[Received, ...]

    @property
    def link(self) -> Link:
        return (self.source, *(end.receiver.worker for end in self.ends))

    @property
    def sent(self) -> Sent:
        return self.ends[0].sent.get(self.source, self.nothing)

    @property
    def is_exact(self) -> bool:
        """Whether what its spectrum says is exact: one column a value, one end."""
        return len(self.ends) == 1 and self.ends[0].receiver.width == 1

    @property
    def nothing(self) -> Sent:
        return Sent(np.empty((0, len(self.ends[0].receiver.values[self.source]))))

    def set(self, sent: Sent) -> None:
        """Let the worker send this instead of what it did."""
        for end in self.ends:
            end.set(self.source, sent)

    def code(self, count: int) -> Sent:
        """The best code of so many numbers, or as many as are worth anything, beside what others send."""
        return Sent(self.spectrum(count).encoder(count)) if count else self.nothing

    def spectrum(self, most: int | None = None) -> Spectrum:
        """What the first numbers, all or at most so many, are worth to all ends beside what others send."""
        if len(self.ends) == 1:
            return self.ends[0].spectrum(self.source, most)
        return stacked([end.beside(self.source) for end in self.ends], [end.receiver for end in self.ends])

    @property
    def error(self) -> float:
        """Of all ends."""
        return sum(end.error for end in self.ends)
