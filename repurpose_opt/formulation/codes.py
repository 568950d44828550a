"""Choosing codes under `Volume`: how many numbers each pair of workers sends, best first by what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Code, Exchange, Message, Values
from repurpose_opt.metrics import priced_volume, weighted_error
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import Spectrum, receivers

if TYPE_CHECKING:
    from repurpose_opt.formulation.volume import Volume

MESSAGES = ("values", "codes", "mixed")
Pair = tuple[int, int]
"""(source worker, target worker)"""
Counts = Mapping[Pair, int]
"""Numbers of each pair."""


@dataclass(frozen=True)
class Cost:
    """What a number of a code costs, by source and target (P, P)."""

    size: NDArray[np.float64]
    """What it counts against the limit: bytes, or priced bytes."""
    work: NDArray[np.float64]
    """Its encoding and decoding, in the units of the error."""


def cost_of_numbers(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> Cost:
    """Bytes where there is a budget, else priced bytes; and mac_price times the multiply-accumulates of a number."""
    size = _size(problem, formulation)
    return Cost(size, formulation.mac_price * macs_of_numbers(problem, owner).astype(np.float64))


def _size(problem: LayerProblem, formulation: Volume) -> NDArray[np.float64]:
    size = np.ones((problem.P, problem.P)) if formulation.has_budget else problem.link_price
    return size * problem.number_bytes[:, None]


def macs_of_numbers(problem: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P, P) multiply-accumulates of one number of a code from worker p (row) to worker k: n_p + rows of k · b."""
    assert problem.value_columns is not None
    held = np.bincount(problem.input_owner, minlength=problem.P)
    rows = np.bincount(owner[problem.row_neuron], minlength=problem.P)
    return np.asarray(held[:, None] + rows[None, :] * problem.value_columns.shape[1])


def select_codes(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], out_of_time: Callable[[], bool]
) -> Exchange:
    """For each pair by itself the best code beside what the receiver holds: truncated singular value decompositions.

    The best there is where the sources of a receiver are uncorrelated beside its own values (Eckart–Young).
    """
    spectra = {
        (p, receiver.worker): receiver.spectrum(p)
        for receiver in receivers(formulation.judged(problem), owner)
        for p in receiver.values
    }

    def exchange(counts: Counts) -> Exchange:
        return exchange_of(problem, {pair: spectra[pair].encoder(count) for pair, count in counts.items() if count})

    ranking = _Ranking.of(spectra, cost_of_numbers(problem, formulation, owner))
    if formulation.max_nmse is None:
        return exchange(ranking.within(formulation, problem))
    low, high = -1, len(ranking.rate)
    while high - low > 1 and not out_of_time():  # all of the numbers where none are enough
        middle = (low + high) // 2
        reached = formulation.meets(problem, owner, exchange(ranking.first(middle)))
        low, high = (low, middle) if reached else (middle, high)
    return exchange(ranking.first(high))


def exchange_of(problem: LayerProblem, encoders: Mapping[Pair, NDArray[np.float64]]) -> Exchange:
    """The exchange of codes R (r, n_p) with linearly independent rows; as many numbers as values are the values."""
    messages: dict[Pair, Message] = {}
    for (source, target), encoder in encoders.items():
        is_all = len(encoder) == encoder.shape[1]
        held = np.flatnonzero(problem.input_owner == source)
        messages[source, target] = Values(held) if is_all else Code.spanning(encoder)
    return Exchange(problem.n, problem.P, messages)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The numbers of all pairs in the order in which a greedy takes them; those of a pair in theirs."""

    pairs: list[Pair]
    pair: NDArray[np.int64]
    """(numbers,) position in `pairs`."""
    rate: NDArray[np.float64]
    """(numbers,) worth, less its work, per size: falling."""
    size: NDArray[np.float64]
    """(numbers,)"""

    @staticmethod
    def of(spectra: Mapping[Pair, Spectrum], cost: Cost) -> _Ranking:
        pairs = list(spectra)
        pair = np.repeat(np.arange(len(pairs)), [len(spectra[p].gains) for p in pairs])
        gains = np.concatenate([spectra[p].gains for p in pairs] or [np.empty(0)])
        index = tuple(np.array(pairs, dtype=np.int64).reshape(-1, 2)[pair].T)
        size, gains = cost.size[index], gains - cost.work[index]
        worth = gains > 0
        with np.errstate(divide="ignore"):
            rate = gains[worth] / size[worth]
        order = np.argsort(-rate, kind="stable")
        return _Ranking(pairs, pair[worth][order], rate[order], size[worth][order])

    def within(self, formulation: Volume, problem: LayerProblem) -> Counts:
        """What a price or a budget allows."""
        if formulation.transfer_price is not None:
            return self._counts(self.rate > formulation.transfer_price)
        left = formulation.limit(problem)
        assert left is not None
        taken = np.zeros(len(self.rate), dtype=bool)
        for position, size in enumerate(self.size):
            if size <= left:
                taken[position] = True
                left -= size
        return self._counts(taken)

    def first(self, count: int) -> Counts:
        return self._counts(np.arange(len(self.rate)) < count)

    def _counts(self, taken: NDArray[np.bool_]) -> Counts:
        return dict(zip(self.pairs, np.bincount(self.pair[taken], minlength=len(self.pairs)).tolist(), strict=True))


def codes_are_exact(problem: LayerProblem, formulation: Volume) -> bool:
    """Whether `select_codes` is optimal for any owners: one column a value, uncorrelated sources, one size."""
    if problem.columns != problem.n or formulation.mac_price > 0:
        return False
    if formulation.max_nmse is not None and problem.moments.ridge > 0:
        return False  # what numbers are worth has the ridge in it, the NMSE does not
    if formulation.transfer_price is None:
        size = _size(problem, formulation)
        if len(np.unique(size[~np.eye(problem.P, dtype=bool)])) > 1:
            return False
    return sources_are_uncorrelated(problem)


def least_of_uncorrelated(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], exchange: Exchange
) -> float:
    """The least objective for these owners where `codes_are_exact`: from the singular values, not from the refit.

    `exchange` is what `select_codes` answers.
    """
    communication = priced_volume(problem, exchange)
    if formulation.max_nmse is not None:
        return communication
    nothing = Exchange.nothing(problem.n, problem.P)
    error = weighted_error(problem, owner, formulation.repair(problem, owner, nothing))
    for receiver in receivers(problem, owner):
        for p in receiver.values:
            message = exchange.messages.get((p, receiver.worker))
            error -= 0.0 if message is None else float(receiver.spectrum(p).gains[: message.size].sum())
    return error + (formulation.transfer_price or 0.0) * communication


def sources_are_uncorrelated(problem: LayerProblem) -> bool:
    """Whether values of different workers are, or there are no two workers that could send to a third."""
    if problem.moments.is_diagonal or problem.P == 2:
        return True
    between = problem.column_home[:, None] != problem.column_home
    return not problem.moments.second[between].any()
