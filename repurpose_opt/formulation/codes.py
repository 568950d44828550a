"""Choosing codes under `Volume`: how many numbers each pair of workers sends, best first by what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Code, Exchange, Message, Values
from repurpose_opt.metrics import priced_volume, weighted_error
from repurpose_opt.problem import LayerProblem, dense
from repurpose_opt.receiver import Receiver, Spectrum, receivers, row_space, spectrum_of

if TYPE_CHECKING:
    from repurpose_opt.formulation.volume import Volume

MESSAGES = ("values", "codes", "mixed")
Link = tuple[int, ...]
"""(source worker, target worker); on broadcast links (source, target, target …), which get the same."""
Counts = Mapping[Link, int]
"""Numbers of each link."""


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
    price = np.broadcast_to(problem.link_price.max(axis=1)[:, None], (problem.P, problem.P))
    price = price if problem.broadcast else problem.link_price
    return (np.ones_like(price) if formulation.has_budget else price) * problem.number_bytes[:, None]


def macs_of_numbers(problem: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P, P) multiply-accumulates of one number of a code from worker p (row) to worker k: n_p + rows of k · b."""
    assert problem.value_columns is not None
    held = np.bincount(problem.input_owner, minlength=problem.P)
    rows = np.bincount(owner[problem.row_neuron], minlength=problem.P)
    return np.asarray(held[:, None] + rows[None, :] * problem.value_columns.shape[1])


def select_codes(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], out_of_time: Callable[[], bool]
) -> Exchange:
    """For each link by itself the best code beside what its ends hold: truncated singular value decompositions.

    The best there is where the sources of a receiver are uncorrelated beside its own values (Eckart–Young). A link
    that sends all of its numbers sends the row space of W̃_kp if that is no more: if all links do, nothing is lost.
    """
    judged = formulation.judged(problem)
    found = receivers(judged, owner)
    spectra = {(p, *(end.worker for end in ends)): spectrum_at(ends, p) for p, ends in links_of(problem, found)}

    @cache  # asked for again and again by the bisection below
    def lossless(link: Link) -> NDArray[np.float64]:
        return _lossless(judged, owner, link)

    def exchange(counts: Counts) -> Exchange:
        encoders = {}
        for link, count in counts.items():
            encoders[link] = spectra[link].encoder(count)
            if 0 < count == len(spectra[link].gains):
                encoders[link] = lossless(link) if len(lossless(link)) <= count else encoders[link]
        return exchange_of(problem, encoders)

    ranking = _Ranking.of(spectra, cost_of_numbers(problem, formulation, owner))
    if formulation.max_nmse is None:
        return exchange(ranking.within(formulation, problem))
    low, high = -1, len(ranking.rate)
    while high - low > 1 and not out_of_time():  # all of the numbers where none are enough
        middle = (low + high) // 2
        reached = formulation.meets(problem, owner, exchange(ranking.first(middle)))
        low, high = (low, middle) if reached else (middle, high)
    return exchange(ranking.first(high))


def links_of(problem: LayerProblem, found: Sequence[Receiver]) -> Iterator[tuple[int, tuple[Receiver, ...]]]:
    """(source, receivers that get the same): each pair of workers by itself, or on broadcast links all receivers."""
    if not problem.broadcast:
        yield from ((p, (receiver,)) for receiver in found for p in receiver.values)
        return
    for p in np.unique(problem.input_owner).tolist():
        ends = tuple(receiver for receiver in found if p in receiver.values)
        if ends:
            yield p, ends


def spectrum_at(ends: Sequence[Receiver], p: int) -> Spectrum:
    """What numbers from worker p are worth to all ends of a link, their rows stacked, beside their own values."""
    if len(ends) == 1:
        return ends[0].spectrum(p)
    return stacked([(end.residual[:, end.columns[p].ravel()], end.variances[p]) for end in ends], ends)


def stacked(parts: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]], ends: Sequence[Receiver]) -> Spectrum:
    """The spectrum of B (rows, n_p·b) of all ends together, with the mean of their K.

    Exact where what the ends know says the same of the source, for instance nothing.
    """
    residual = np.vstack([residual for residual, _ in parts])
    variance = np.mean([variance for _, variance in parts], axis=0)
    return spectrum_of(residual, variance, ends[0].width, sum(end.energy for end in ends))


def _lossless(problem: LayerProblem, owner: NDArray[np.int64], link: Link) -> NDArray[np.float64]:
    """The row space of W̃_kp over the rows that count at all targets of a link, (rank, n_p): what loses nothing."""
    assert problem.value_columns is not None
    rows = np.flatnonzero(np.isin(owner[problem.row_neuron], link[1:]) & (problem.output_weight > 0))
    columns = problem.value_columns[problem.input_owner == link[0]]
    scale = np.sqrt(problem.moments.variance[columns].mean(axis=1))  # in units of what the values vary
    scale[scale == 0] = 1.0
    block = np.asarray(dense(problem.target_weight[rows])[:, columns], dtype=np.float64).swapaxes(1, 2) * scale
    rounding = len(columns) * float(np.finfo(problem.weight.dtype).eps)
    return row_space(block.reshape(-1, len(columns)), rounding) / scale


def exchange_of(problem: LayerProblem, encoders: Mapping[Link, NDArray[np.float64]]) -> Exchange:
    """The exchange of codes R (r, n_p) with linearly independent rows; as many numbers as values are the values."""
    messages: dict[tuple[int, int], Message] = {}
    for (source, *targets), encoder in encoders.items():
        if len(encoder) == 0:
            continue
        is_all = len(encoder) == encoder.shape[1]
        message = Values(np.flatnonzero(problem.input_owner == source)) if is_all else Code.spanning(encoder)
        messages |= {(source, target): message for target in targets}
    return Exchange(problem.n, problem.P, messages)


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The numbers of all links in the order in which a greedy takes them; those of a link in theirs."""

    links: list[Link]
    link: NDArray[np.int64]
    """(numbers,) position in `links`."""
    rate: NDArray[np.float64]
    """(numbers,) worth, less its work, per size: falling."""
    size: NDArray[np.float64]
    """(numbers,)"""

    @staticmethod
    def of(spectra: Mapping[Link, Spectrum], cost: Cost) -> _Ranking:
        links = list(spectra)
        link = np.repeat(np.arange(len(links)), [len(spectra[key].gains) for key in links])
        gains = np.concatenate([spectra[key].gains for key in links] or [np.empty(0)])
        index = tuple(np.array([key[:2] for key in links], dtype=np.int64).reshape(-1, 2)[link].T)
        size, gains = cost.size[index], gains - cost.work[index]
        worth = gains > 0
        with np.errstate(divide="ignore"):
            rate = gains[worth] / size[worth]
        order = np.argsort(-rate, kind="stable")
        return _Ranking(links, link[worth][order], rate[order], size[worth][order])

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
        return dict(zip(self.links, np.bincount(self.link[taken], minlength=len(self.links)).tolist(), strict=True))


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
    for p, ends in links_of(problem, receivers(problem, owner)):
        message = exchange.messages.get((p, ends[0].worker))
        error -= 0.0 if message is None else float(spectrum_at(ends, p).gains[: message.size].sum())
    return error + (formulation.transfer_price or 0.0) * communication


def sources_are_uncorrelated(problem: LayerProblem) -> bool:
    """Whether values of different workers are, or there are no two workers that could send to a third."""
    if problem.moments.is_diagonal or problem.P <= 2:
        return True
    between = problem.column_home[:, None] != problem.column_home
    return not problem.moments.second[between].any()
