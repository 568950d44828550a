"""What both nuclear-norm backends share: the search of λ for a price, a budget or an NMSE, and the bound.

    error(V) + λ Σ over pairs p → k of size_pk ‖V_kp Q_p^½‖_*

splits by receiver k; size is what a number counts against the limit, Q_p = K_pp. All receivers share λ. The ranks and
row spaces at the solution are the codes; the refit gives the weights. Where a limit leaves room, it is filled number
by number, each the best beside those that are sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import cost_of_numbers, exchange_of
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import Receiver, expanded, receivers, strongest
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.nuclear import (
    CodeProblem,
    Floats,
    NuclearSolution,
    largest_useful,
    lower_bound,
    merged_bound,
)
from repurpose_opt_solvers.received import Received, Sent, without_codes
from repurpose_opt_solvers.threshold_ import Threshold

Solver = Callable[[int, CodeProblem, float, "Floats | None"], NuclearSolution]
"""(which receiver of the list, its problem, λ, X of a solution near by) -> solution; may raise OutOfTime."""

_STEP = 0.7
"""Of λ, on the way down."""
_LEAST = 1e-4
"""The end of the path, relative to the λ from which on nothing is sent."""
_PATIENCE = 3
"""Points of the path without a lower objective after which it is left."""
_MOST_BISECTIONS = 14
_CLOSE = 1e-3
"""A bracket of λ that is narrower than this is not divided again."""
_ROUNDING = 1e-12
"""Of the error if nothing is received: what a bound is lowered by."""
_PRICES_TRIED = 15
_PRICE_RANGE = 1e6
"""From the largest gain a byte down to that over this."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Codes that a point of the path stands for."""

    exchange: Exchange
    penalty_weight: float
    """λ"""
    relaxation: float
    """Its least objective there, and how far from it the solver was."""
    gap: float
    counted: Mapping[str, Any]
    filled: int = 0
    """Numbers that were added where the limit left room."""

    @property
    def stats(self) -> dict[str, Any]:
        return {
            "lambda": self.penalty_weight,
            "relaxation_objective": self.relaxation,
            "relaxation_gap": self.gap,
            "numbers_filled_in": self.filled,
            **self.counted,
        }


def supports(problem: LayerProblem, formulation: Formulation) -> str | None:
    """Why the nuclear norm does not serve a formulation, or None."""
    reason = without_codes(formulation)
    if reason is not None:
        return reason
    assert isinstance(formulation, Volume)
    if formulation.mac_price > 0:
        return "the penalty stands for the numbers sent: mac_price 0 only"
    if problem.broadcast:
        return "the penalty adds up over receivers: no broadcast links"
    return None


def delegated(
    problem: LayerProblem, formulation: Volume, options: SolveOptions, owner: NDArray[np.int64]
) -> Candidate | None:
    """Of uncorrelated sources the relaxation has no more to say than truncated singular value decompositions."""
    if problem.moments.is_diagonal or formulation.selection_is_exact(problem):
        return Threshold().solve(problem, formulation, options, owner)
    return None


def without_time(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> Candidate:
    """What a backend answers that had no time for one point of the path."""
    stats = {"fallback": "threshold: the time was over before the first choice"}
    return Candidate(Termination.TIME_LIMIT, owner, formulation.select(problem, owner), stats=stats)


def with_bound(
    problem: LayerProblem, formulation: Volume, options: SolveOptions, candidate: Candidate, deadline: Deadline
) -> Candidate:
    """The candidate with a lower bound for its owners; none under max_nmse, or where there is no time."""
    if candidate.owner is None or candidate.exchange is None or formulation.max_nmse is not None or deadline.passed:
        return candidate
    bound = bound_given_owners(problem, formulation, candidate.owner, lambda: deadline.passed)
    weight = formulation.repair(problem, candidate.owner, candidate.exchange)
    objective = formulation.objective(problem, candidate.owner, candidate.exchange, weight)
    is_proved = objective - bound <= options.relative_gap * abs(objective)
    return replace(candidate, bound=bound, termination=Termination.OPTIMAL if is_proved else candidate.termination)


def bound_given_owners(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], out_of_time: Callable[[], bool]
) -> float:
    """No codes of these owners have a lower objective; for a price or a budget.

    For a budget L it is Lagrange's: the least error is at least (least error + μ size) − μ L for any μ ≥ 0; the best
    μ is found by bisection, since what the relaxation spends falls as μ rises.
    """
    size = cost_of_numbers(problem, formulation, owner).size
    waiting = receivers(formulation.judged(problem), owner)
    workers = [CodeProblem.below(receiver, size[:, receiver.worker]) for receiver in waiting]
    constant = _of_workers_without_messages(problem, owner, [worker.worker for worker in workers])
    starts: list[Floats | None] = [None] * len(workers)

    def at(price: float) -> tuple[float, float]:
        found = [lower_bound(w, price, start, out_of_time) for w, start in zip(workers, starts, strict=True)]
        starts[:] = [bound.weight for bound in found]
        merged = [merged_bound(worker, price) for worker in workers]
        found = [max(pair, key=lambda bound: bound.value) for pair in zip(found, merged, strict=True)]
        return constant + sum(bound.value for bound in found), sum(bound.spent for bound in found)

    rounding = _ROUNDING * sum(worker.energy for worker in workers)
    if formulation.transfer_price is not None:
        return max(at(formulation.transfer_price)[0] - rounding, 0.0)
    limit = formulation.limit(problem)
    assert limit is not None
    step = math.gcd(*(round(of_number) for worker in workers for of_number in worker.size))
    limit = step * (limit // step) if step else limit  # numbers are whole
    best = constant + sum(worker.least_error for worker in workers)
    high = max((_largest_rate(receiver, size[:, receiver.worker]) for receiver in waiting), default=0.0)
    low = high / _PRICE_RANGE
    price = high
    for _ in range(_PRICES_TRIED if high > 0 else 0):
        value, spent = at(price)
        best = max(best, value - price * limit)
        low, high = (price, high) if spent > limit else (low, price)
        price = float(np.sqrt(low * high))
        if out_of_time():
            break
    return max(best - rounding, 0.0)


def _largest_rate(receiver: Receiver, size: Floats) -> float:
    """What the best number is worth a size, beside nothing but the receiver's own values."""
    gains = {p: receiver.spectrum(p).gains for p in receiver.values if size[p] > 0}
    return max((float(gains[p][0] / size[p]) for p in gains if len(gains[p])), default=0.0)


def _of_workers_without_messages(problem: LayerProblem, owner: NDArray[np.int64], others: Sequence[int]) -> float:
    """The error of workers that hold all inputs; what they cannot explain of the outputs is left."""
    rows = ~np.isin(owner[problem.row_neuron], others)
    if not rows.any():
        return 0.0
    alone = replace(problem, output_weight=np.where(rows, problem.output_weight, 0.0))
    nothing = Volume(budget=0.0)
    exchange = Exchange.nothing(problem.n, problem.P)
    return nothing.objective(alone, owner, exchange, nothing.repair(alone, owner, exchange))


def search(
    problem: LayerProblem,
    formulation: Volume,
    owner: NDArray[np.int64],
    solver: Solver,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Choice]:
    """Better and better choices of codes; the last is the answer. Full moments only. Raises what the solver raises."""
    path = _Path(problem, formulation, owner, solver, out_of_time)
    if formulation.max_nmse is not None:
        return path.for_nmse()
    return path.for_price() if formulation.transfer_price is not None else path.for_budget()


@dataclass(frozen=True, eq=False)
class _Point:
    """The relaxation at one λ."""

    penalty_weight: float
    solutions: list[NuclearSolution]


class _Path:
    """The solutions of all receivers, λ by λ, each from the nearest one that is known."""

    def __init__(
        self,
        problem: LayerProblem,
        formulation: Volume,
        owner: NDArray[np.int64],
        solver: Solver,
        out_of_time: Callable[[], bool],
    ) -> None:
        self.problem, self.formulation, self.owner = problem, formulation, owner
        self.solver, self.out_of_time = solver, out_of_time
        self.receivers = receivers(formulation.judged(problem), owner)
        self.size = cost_of_numbers(problem, formulation, owner).size
        self.workers = [CodeProblem.of(receiver, self.size[:, receiver.worker]) for receiver in self.receivers]
        self.largest = max((largest_useful(worker) for worker in self.workers), default=0.0)
        self._known: dict[float, list[Floats]] = {}

    def at(self, penalty_weight: float) -> _Point:
        near = min(self._known, key=lambda known: abs(np.log(known / penalty_weight)), default=None)
        starts = [None] * len(self.workers) if near is None else self._known[near]
        found = [
            self.solver(index, worker, penalty_weight, start)
            for index, (worker, start) in enumerate(zip(self.workers, starts, strict=True))
        ]
        self._known[penalty_weight] = [solution.weight for solution in found]
        return _Point(penalty_weight, found)

    def received(self, point: _Point) -> list[Received]:
        """The codes that a point stands for."""
        found = []
        for receiver, worker, solution in zip(self.receivers, self.workers, point.solutions, strict=True):
            received = Received(receiver)
            for position, (p, vectors) in enumerate(zip(worker.sources, solution.vectors, strict=True)):
                received.set(p, Sent(worker.encoder(position, vectors)))
            found.append(received)
        return found

    def choice(self, point: _Point, received: list[Received], filled: int = 0) -> Choice:
        return Choice(
            self.exchange(received),
            float(point.penalty_weight),
            sum(solution.objective for solution in point.solutions),
            sum(solution.gap for solution in point.solutions),
            {"lambdas_tried": len(self._known)},
            filled,
        )

    def exchange(self, received: list[Received]) -> Exchange:
        sent: dict[tuple[int, ...], Floats] = {
            (p, one.receiver.worker): sent.encoder for one in received for p, sent in one.sent.items()
        }
        return exchange_of(self.problem, sent)

    def spent(self, received: list[Received]) -> float:
        return sum(sent.size * self.size[p, one.receiver.worker] for one in received for p, sent in one.sent.items())

    def for_budget(self) -> Iterator[Choice]:
        """The smallest λ whose numbers fit, and the best of the next for as long as they fit."""
        allowed = self.formulation.limit(self.problem)
        assert allowed is not None
        point = self.at(self.largest or 1.0)
        received = self.received(point)
        yield self.choice(point, received)
        high, low = point.penalty_weight, 0.0
        for _ in range(_MOST_BISECTIONS + round(np.log(_LEAST) / np.log(_STEP))):
            if high <= _LEAST * self.largest or high < low * (1 + _CLOSE) or self.out_of_time():
                break
            middle = _STEP * high if low == 0 else float(np.sqrt(low * high))
            tried = self.at(middle)
            codes = self.received(tried)
            if self.spent(codes) <= allowed:
                high, point, received = middle, tried, codes
                yield self.choice(point, received)
            else:
                low = middle
        yield self.choice(point, received, self._fill(received, limit=allowed))

    def for_price(self) -> Iterator[Choice]:
        """The point of the path with the least error after refit plus price · priced volume, and what is worth more."""
        price = self.formulation.transfer_price
        assert price is not None
        best, objectives = np.inf, []
        penalty_weight = self.largest or 1.0
        kept = None
        while penalty_weight > _LEAST * self.largest and not self.out_of_time():
            point = self.at(penalty_weight)
            received = self.received(point)
            objectives.append(sum(one.error for one in received) + price * self.spent(received))
            if objectives[-1] < best:
                best, kept = objectives[-1], point
                yield self.choice(point, received)
            if self.largest == 0 or (price > 0 and min(objectives[-_PATIENCE:]) > best):
                break
            penalty_weight *= _STEP
        if kept is None:
            return
        before = self.at(min(kept.penalty_weight / _STEP, self.largest or 1.0))
        filled = []
        for point in (kept, before):
            received = self.received(point)
            count = self._fill(received, least=price)
            objective = sum(one.error for one in received) + price * self.spent(received)
            filled.append((objective, self.choice(point, received, count)))
        yield min(filled, key=lambda found: found[0])[1]

    def for_nmse(self) -> Iterator[Choice]:
        """The largest λ that meets the limit, or the next above it, filled in until it does, where that sends less."""
        point = self.at(_LEAST * self.largest or 1.0)
        received = self.received(point)
        if not self._meets(received):
            yield self.choice(point, received, self._fill(received, until=self._meets))
            return
        yield self.choice(point, received)
        low, high, above = point.penalty_weight, self.largest or 1.0, self.at(self.largest or 1.0)
        if self._meets(self.received(above)):
            low, point = high, above
        for _ in range(2 * _MOST_BISECTIONS):
            if high <= low * (1 + _CLOSE) or self.out_of_time():
                break
            middle = float(np.sqrt(low * high))
            tried = self.at(middle)
            codes = self.received(tried)
            if self._meets(codes):
                low, point, received = middle, tried, codes
                yield self.choice(point, received)
            else:
                high, above = middle, tried
        received, other = self.received(point), self.received(above)
        count = self._fill(other, until=self._meets)
        if self._meets(other) and self.spent(other) < self.spent(received):
            yield self.choice(above, other, count)
        else:
            yield self.choice(point, received)

    def _meets(self, received: list[Received]) -> bool:
        return self.formulation.meets(self.problem, self.owner, self.exchange(received))

    def _fill(
        self,
        received: list[Received],
        *,
        limit: float = np.inf,
        least: float = 0.0,
        until: Callable[[list[Received]], bool] | None = None,
    ) -> int:
        """Add the number of greatest worth a size, again and again; how many were added."""
        left = limit - self.spent(received)
        offers: dict[tuple[int, int], tuple[float, Floats]] = {}
        added = 0
        while not self.out_of_time() and not (until is not None and until(received)):
            for one in received:
                for p in one.receiver.values:
                    if (p, one.receiver.worker) not in offers:
                        offers[p, one.receiver.worker] = next_number(one, p)
            fitting = {pair: offer for pair, offer in offers.items() if offer[0] > 0 and self.size[pair] <= left}
            rates = {pair: offer[0] / self.size[pair] if self.size[pair] else np.inf for pair, offer in fitting.items()}
            pair = max(rates, key=lambda pair: rates[pair], default=(-1, -1))
            if not rates or rates[pair] <= least:
                break
            receiver = next(one for one in received if one.receiver.worker == pair[1])
            self._add(receiver, pair[0], fitting[pair][1])
            left -= self.size[pair]
            added += 1
            offers = {known: offer for known, offer in offers.items() if known[1] != pair[1]}
        return added

    @staticmethod
    def _add(received: Received, p: int, combination: Floats) -> None:
        before = received.sent[p].encoder if p in received.sent else np.empty((0, len(combination)))
        received.set(p, Sent(np.vstack([before, combination])))


def next_number(received: Received, p: int) -> tuple[float, Floats]:
    """What the best further number of worker p is worth beside all that is sent, and its combination (n_p,)."""
    receiver = received.receiver
    residual, variance = received.beside(p)
    variance = np.diag(variance) if variance.ndim == 1 else variance
    if p in received.sent:
        numbers = expanded(received.sent[p].encoder, receiver.width)
        covariance = variance @ numbers
        known = np.linalg.solve(numbers.T @ covariance, covariance.T)
        residual = residual - (residual @ numbers) @ known
    return strongest(residual, variance, receiver.width, receiver.energy)
