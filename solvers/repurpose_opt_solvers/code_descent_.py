"""`code-descent`: improves the codes one pair at a time, each the best there is beside all others.

Given the others, the best code of a pair is a truncated singular value decomposition (`receiver`), so no step raises
the error; how many numbers each pair sends follows from the price, or is evened out between the pairs of a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange, Message, Values
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import Cost, Link, cost_of_numbers, exchange_of, links_of
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import receivers
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.chosen_values import best_values
from repurpose_opt_solvers.received import Line, Received, Sent, without_codes

MOST_SWEEPS = 40
SMALLEST_FALL = 1e-4
"""A sweep over all pairs that lowers the objective by less than this share is the last."""
MOST_MORE = 8
"""Beyond twice what a pair sends now, so many numbers of it are looked at where numbers move between pairs."""
RELUCTANCES = (1.0, 1.2, 2.0)
"""By how much the numbers that are sent count for more than those that are not, where numbers move between pairs."""


class CodeDescent:
    """Alternating least squares on the codes, pair by pair, with their numbers; from a start or from SVDs."""

    name = "code-descent"
    requires: tuple[str, ...] = ()
    sends_codes = True

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return without_codes(formulation)

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
            descent.sweep_within_limit()
            descent.drop_numbers()
        if formulation.mac_price > 0:
            descent.sweep(descent.cheaper_kind)
        termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
        return Candidate(termination, owner, descent.exchange())


Choose = Callable[[Line], Sent]
"""What a worker should send on a line, given what the others send."""


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
    lines: list[Line]
    deadline: Deadline

    @staticmethod
    def of(
        problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], start: Exchange, deadline: Deadline
    ) -> _Descent:
        found = receivers(formulation.judged(problem), owner)
        received = {receiver.worker: Received.of(receiver, problem, start) for receiver in found}
        assert problem.value_columns is not None
        rows = np.bincount(owner[problem.row_neuron], minlength=problem.P) * problem.value_columns.shape[1]
        return _Descent(
            problem,
            formulation,
            owner,
            cost_of_numbers(problem, formulation, owner),
            formulation.mac_price * rows,
            list(received.values()),
            [Line(p, tuple(received[end.worker] for end in ends)) for p, ends in links_of(problem, found)],
            deadline,
        )

    @property
    def objective(self) -> float:
        """Error, work and, where there is one, the price of what is sent; under max_nmse the error alone."""
        errors = sum(received.error for received in self.received)
        return errors + sum(self._charge(line, line.sent) for line in self.lines)

    def exchange(self) -> Exchange:
        codes: dict[Link, NDArray[np.float64]] = {}
        chosen: dict[tuple[int, int], Message] = {}
        for line in self.lines:
            if line.sent.chosen is None:
                codes[line.link] = line.sent.encoder
            else:
                held = np.flatnonzero(self.problem.input_owner == line.source)
                chosen |= {(line.source, k): Values(held[np.sort(line.sent.chosen)]) for k in line.link[1:]}
        return Exchange(self.problem.n, self.problem.P, {**exchange_of(self.problem, codes).messages, **chosen})

    def sweep(self, choose: Choose) -> None:
        """Choose for one line after the other, until a sweep over all brings next to nothing."""
        before = self.objective
        for _ in range(MOST_SWEEPS):
            for line in self.lines:
                if self.deadline.passed:
                    return
                sent = choose(line)
                if not line.is_exact:
                    sent = self._cheaper(line, (line.sent, sent))
                line.set(sent)
            after = self.objective
            if before - after <= SMALLEST_FALL * abs(before):
                return
            before = after

    def sweep_within_limit(self) -> None:
        """Sweep, unless that takes the NMSE above its limit: it falls with the error but for the ridge in that."""
        kept = self._all_sent()
        self.sweep(self.as_many)
        if not self.formulation.meets(self.problem, self.owner, self.exchange()):
            self._restore(kept)

    def as_many(self, line: Line) -> Sent:
        """The best code of as many numbers as are sent."""
        return line.code(line.sent.size)

    def at_price(self, line: Line) -> Sent:
        """The numbers that are worth their price and their work."""
        spectrum = line.spectrum()
        assert self.formulation.transfer_price is not None
        pair = line.link[:2]
        least = self.formulation.transfer_price * self.cost.size[pair] + self.cost.work[pair]
        return Sent(spectrum.encoder(int(np.count_nonzero(spectrum.gains > least))))

    def cheaper_kind(self, line: Line) -> Sent:
        """The code that is sent, or, where it costs less in all, chosen values: as many, or what a price allows."""
        before, (received,) = line.sent, line.ends
        if before.size == 0:
            return before
        price, (_, worker) = self.formulation.transfer_price, line.link
        code, most, least = before, before.size, 0.0
        if price is not None:
            most = before.encoder.shape[1]
            least = self.decoding[worker] + price * float(self.cost.size[line.source, worker])
        if before.chosen is not None:
            code = self.as_many(line) if price is None else self.at_price(line)
        values = best_values(*received.beside(line.source), received.receiver.width, most, least)
        return self._cheaper(line, (code, Sent.values(values, before.encoder.shape[1])))

    def move_numbers(self) -> None:
        """Take numbers from lines where they are worth little, give them to others, while the error falls."""
        best = self.objective
        while not self.deadline.passed:
            kept = self._all_sent()
            for reluctance in RELUCTANCES:
                counts = self._evened_out(reluctance)
                if counts == {link: sent.size for link, sent in kept.items() if sent.size}:
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
            kept = self._all_sent()
            ranked = [link for _, link in sorted((rate, link) for rate, link, is_sent in self._rates() if is_sent)]
            low, high = 0, len(ranked) + 1
            while high - low > 1 and not self.deadline.passed:
                middle = (low + high) // 2
                low, high = (middle, high) if self._without(ranked[:middle], kept) else (low, middle)
            self._without(ranked[:low], kept)
            if low == 0:
                return
            self.sweep_within_limit()

    def _without(self, dropped: list[Link], kept: dict[Link, Sent]) -> bool:
        """Leave out a number for each time that its link is listed; whether the NMSE is within its limit then."""
        self._restore(kept)
        self._resize({link: sent.size - dropped.count(link) for link, sent in kept.items()})
        return self.formulation.meets(self.problem, self.owner, self.exchange())

    def _evened_out(self, reluctance: float) -> dict[Link, int]:
        """Numbers of each link if the budget goes to what is worth most a byte, in favour of what is sent now."""
        left = self.formulation.limit(self.problem)
        assert left is not None
        ranked = [(rate * (reluctance if is_sent else 1.0), link) for rate, link, is_sent in self._rates()]
        counts: dict[Link, int] = {}
        for _, link in sorted(ranked, key=lambda number: -number[0]):
            size = self.cost.size[link[:2]]
            if size <= left:
                left -= size
                counts[link] = counts.get(link, 0) + 1
        return counts

    def _rates(self) -> Iterator[tuple[float, Link, bool]]:
        """What each number is worth a byte, less its work, its link, and whether it is sent: best first in a link."""
        for line in self.lines:
            pair, now = line.link[:2], line.sent.size
            for position, gain in enumerate(line.spectrum(2 * now + MOST_MORE).gains):
                worth, size = gain - self.cost.work[pair], self.cost.size[pair]
                if worth > 0 or position < now:
                    yield (worth / size if size > 0 else np.inf), line.link, position < now

    def _resize(self, counts: dict[Link, int]) -> None:
        """The best codes of so many numbers, line by line where the number changes."""
        for line in self.lines:
            count = counts.get(line.link, 0)
            if count != line.sent.size:
                line.set(line.code(count))

    def _all_sent(self) -> dict[Link, Sent]:
        return {line.link: line.sent for line in self.lines}

    def _restore(self, kept: dict[Link, Sent]) -> None:
        for line in self.lines:
            line.set(kept[line.link])

    def _charge(self, line: Line, sent: Sent) -> float:
        """What the messages of a line cost beside the error."""
        pair = line.link[:2]
        work = self.cost.work[pair] if sent.chosen is None else self.decoding[pair[1]]
        return sent.size * float(work + (self.formulation.transfer_price or 0.0) * self.cost.size[pair])

    def _cheaper(self, line: Line, choices: Sequence[Sent]) -> Sent:
        """What lowers the objective most, the first of equals."""
        kept, found = line.sent, []
        for sent in choices:
            line.set(sent)
            found.append(line.error + self._charge(line, sent))
        line.set(kept)
        return choices[int(np.argmin(found))]
