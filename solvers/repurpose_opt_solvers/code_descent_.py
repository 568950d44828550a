"""`code-descent`: improves the codes one pair at a time, each the best there is beside all others.

Given the others, the best code of a pair is a truncated singular value decomposition (`receiver`), so no step raises
the error; how many numbers each pair sends follows from the price, or is evened out between the pairs of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange, Message, Values
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import Cost, Pair, cost_of_numbers, exchange_of
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import receivers
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.chosen_values import best_values
from repurpose_opt_solvers.received import Received, Sent

MOST_SWEEPS = 40
SMALLEST_FALL = 1e-4
"""A sweep over all pairs that lowers the objective by less than this share is the last."""
RELUCTANCES = (1.0, 1.2, 2.0)
"""By how much the numbers that are sent count for more than those that are not, where numbers move between pairs."""


class CodeDescent:
    """Alternating least squares on the codes, pair by pair, with their numbers; from a start or from SVDs."""

    name = "code-descent"
    requires: tuple[str, ...] = ()
    sends_codes = True

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not (isinstance(formulation, Volume) and formulation.sends_codes):
            return 'codes need Volume(messages="codes") or "mixed"'
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        deadline = Deadline(options.time_limit)
        if start is None:
            start = formulation.select(problem, owner, lambda: deadline.passed)
        descent = _Descent.of(problem, formulation, owner, start, deadline)
        if formulation.transfer_price is not None:
            descent.sweep(descent.at_price)
        elif formulation.max_nmse is None:
            descent.sweep(descent.as_many)
            descent.move_numbers()
        else:
            descent.sweep(descent.as_many)
            descent.drop_numbers()
        if formulation.mac_price > 0:
            descent.sweep(descent.cheaper_kind)
        termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
        return Candidate(termination, owner, descent.exchange())


Choose = Callable[[Received, int], Sent]
"""What a source should send to a receiver, given what the others send to it."""


@dataclass(frozen=True, eq=False)
class _Descent:
    """What all receivers receive, under one formulation."""

    problem: LayerProblem
    formulation: Volume
    owner: NDArray[np.int64]
    cost: Cost
    decoding: NDArray[np.float64]
    """(P,) what a chosen value costs at its receiver, in the units of the error."""
    received: list[Received]
    deadline: Deadline

    @staticmethod
    def of(
        problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], start: Exchange, deadline: Deadline
    ) -> _Descent:
        found = receivers(formulation.judged(problem), owner)
        assert problem.value_columns is not None
        rows = np.bincount(owner[problem.row_neuron], minlength=problem.P) * problem.value_columns.shape[1]
        return _Descent(
            problem,
            formulation,
            owner,
            cost_of_numbers(problem, formulation, owner),
            formulation.mac_price * rows,
            [Received.of(receiver, problem, start) for receiver in found],
            deadline,
        )

    @property
    def objective(self) -> float:
        """Error, work and, where there is one, the price of what is sent; under max_nmse the error alone."""
        price = self.formulation.transfer_price or 0.0
        total = 0.0
        for received in self.received:
            total += received.error
            for p, sent in received.sent.items():
                work, size = self._of_number((p, received.receiver.worker), sent)
                total += sent.size * (work + price * size)
        return total

    def exchange(self) -> Exchange:
        codes, chosen = {}, {}
        for pair, sent in self._pairs():
            if sent.chosen is None:
                codes[pair] = sent.encoder
            else:
                chosen[pair] = Values(np.flatnonzero(self.problem.input_owner == pair[0])[np.sort(sent.chosen)])
        messages: dict[Pair, Message] = {**exchange_of(self.problem, codes).messages, **chosen}
        return Exchange(self.problem.n, self.problem.P, messages)

    def sweep(self, choose: Choose) -> None:
        """Choose for one pair after the other, until a sweep over all brings next to nothing."""
        before = self.objective
        for _ in range(MOST_SWEEPS):
            for received in self.received:
                for p in received.receiver.values:
                    if self.deadline.passed:
                        return
                    received.set(p, choose(received, p))
            after = self.objective
            if before - after <= SMALLEST_FALL * abs(before):
                return
            before = after

    def as_many(self, received: Received, p: int) -> Sent:
        """The best code of as many numbers as are sent."""
        if p not in received.sent:
            return _nothing(received, p)
        return Sent(received.spectrum(p).encoder(received.sent[p].size))

    def at_price(self, received: Received, p: int) -> Sent:
        """The numbers that are worth their price and their work."""
        pair = (p, received.receiver.worker)
        spectrum = received.spectrum(p)
        assert self.formulation.transfer_price is not None
        least = self.formulation.transfer_price * self.cost.size[pair] + self.cost.work[pair]
        return Sent(spectrum.encoder(int(np.count_nonzero(spectrum.gains > least))))

    def cheaper_kind(self, received: Received, p: int) -> Sent:
        """The code that is sent, or, where it costs less in all, chosen values: as many, or what a price allows."""
        if p not in received.sent:
            return _nothing(received, p)
        before, worker = received.sent[p], received.receiver.worker
        residual, variance = received.beside(p)
        price, size = self.formulation.transfer_price, float(self.cost.size[p, worker])
        least = self.decoding[worker] + (0.0 if price is None else price * size)
        most = before.size if price is None else before.encoder.shape[1]
        code = before if before.chosen is None else self._code(received, p)
        values = best_values(residual, variance, received.receiver.width, most, 0.0 if price is None else least)
        chosen = Sent.values(values, before.encoder.shape[1])
        return min((code, chosen), key=lambda sent: self._objective_with(received, p, sent))

    def move_numbers(self) -> None:
        """Take numbers from pairs where they are worth little, give them to others, while the error falls."""
        best = self.objective
        while not self.deadline.passed:
            kept = dict(self._pairs())
            for reluctance in RELUCTANCES:
                counts = self._evened_out(reluctance)
                if counts == {pair: sent.size for pair, sent in kept.items()}:
                    return
                self._resize(counts)
                self.sweep(self.as_many)
                if self.objective < best * (1 - SMALLEST_FALL):
                    break
                self._restore(kept)
            else:
                return
            best = self.objective

    def drop_numbers(self) -> None:
        """Leave out the numbers that are worth least a byte, while the NMSE stays within its limit."""
        while not self.deadline.passed:
            kept = dict(self._pairs())
            ranked = [pair for _, pair in sorted((rate, pair) for rate, pair, is_sent in self._rates() if is_sent)]
            low, high = 0, len(ranked) + 1
            while high - low > 1 and not self.deadline.passed:
                middle = (low + high) // 2
                low, high = (middle, high) if self._without(ranked[:middle], kept) else (low, middle)
            self._without(ranked[:low], kept)
            if low == 0:
                return
            self.sweep(self.as_many)

    def _without(self, dropped: list[Pair], kept: dict[Pair, Sent]) -> bool:
        """Leave out a number for each time that its pair is listed; whether the NMSE is within its limit then."""
        self._restore(kept)
        self._resize({pair: sent.size - dropped.count(pair) for pair, sent in kept.items()})
        return self.formulation.meets(self.problem, self.owner, self.exchange())

    def _evened_out(self, reluctance: float) -> dict[Pair, int]:
        """Numbers of each pair if the budget goes to what is worth most a byte, in favour of what is sent now."""
        left = self.formulation.limit(self.problem)
        assert left is not None
        ranked = [(rate * (reluctance if is_sent else 1.0), pair) for rate, pair, is_sent in self._rates()]
        counts: dict[Pair, int] = {}
        for _, pair in sorted(ranked, key=lambda number: -number[0]):
            size = self.cost.size[pair]
            if size <= left:
                left -= size
                counts[pair] = counts.get(pair, 0) + 1
        return counts

    def _rates(self) -> Iterator[tuple[float, Pair, bool]]:
        """What each number is worth a byte, less its work, its pair, and whether it is sent: best first in a pair."""
        for received in self.received:
            for p in received.receiver.values:
                pair = (p, received.receiver.worker)
                now = received.sent[p].size if p in received.sent else 0
                for position, gain in enumerate(received.spectrum(p).gains):
                    worth, size = gain - self.cost.work[pair], self.cost.size[pair]
                    if worth > 0 or position < now:
                        yield (worth / size if size > 0 else np.inf), pair, position < now

    def _resize(self, counts: dict[Pair, int]) -> None:
        """The best codes of so many numbers, pair by pair where the number changes."""
        for received in self.received:
            for p in received.receiver.values:
                count = counts.get((p, received.receiver.worker), 0)
                if count != (received.sent[p].size if p in received.sent else 0):
                    received.set(p, Sent(received.spectrum(p).encoder(count)))

    def _restore(self, kept: dict[Pair, Sent]) -> None:
        for received in self.received:
            for p in received.receiver.values:
                received.set(p, kept.get((p, received.receiver.worker), _nothing(received, p)))

    def _pairs(self) -> Iterator[tuple[Pair, Sent]]:
        for received in self.received:
            for p, sent in received.sent.items():
                yield (p, received.receiver.worker), sent

    def _of_number(self, pair: Pair, sent: Sent) -> tuple[float, float]:
        """What a number costs in work, and what it counts against the limit."""
        work = self.cost.work[pair] if sent.chosen is None else self.decoding[pair[1]]
        return float(work), float(self.cost.size[pair])

    def _code(self, received: Received, p: int) -> Sent:
        """The best code of a pair that sends chosen values now: as many numbers, or what the price allows."""
        return (self.as_many if self.formulation.transfer_price is None else self.at_price)(received, p)

    def _objective_with(self, received: Received, p: int, sent: Sent) -> float:
        """The receiver's share of the objective if worker p sends this."""
        kept = received.sent.get(p, _nothing(received, p))
        received.set(p, sent)
        work, size = self._of_number((p, received.receiver.worker), sent)
        price = self.formulation.transfer_price or 0.0
        objective = received.error + sent.size * (work + price * size)
        received.set(p, kept)
        return objective


def _nothing(received: Received, p: int) -> Sent:
    return Sent(np.empty((0, len(received.receiver.values[p]))))
