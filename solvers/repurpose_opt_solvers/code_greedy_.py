"""`code-greedy`: codes number by number, each the one that lowers the error most a byte beside those before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import Cost, Pair, cost_of_numbers, exchange_of
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import Receiver, expanded, receivers, strongest
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination


class CodeGreedy:
    """Greedy rank-one steps: the next number is the best of all pairs beside what is known; Volume with codes."""

    name = "code-greedy"
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
        if formulation.transfer_price == 0 and formulation.mac_price == 0:
            return Candidate(
                Termination.HEURISTIC, owner, formulation.select(problem, owner)
            )  # all that is worth anything
        pursuit = _Pursuit.of(problem, formulation, owner)
        if formulation.max_nmse is not None:
            numbers = _until_met(problem, formulation, owner, pursuit.numbers(np.inf), deadline)
        else:
            numbers = []
            limit = formulation.limit(problem)
            for number in pursuit.numbers(np.inf if limit is None else limit):
                if number.rate <= (formulation.transfer_price or 0.0) or deadline.passed:
                    break
                numbers.append(number)
        termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
        return Candidate(termination, owner, _exchange(problem, numbers))


class Number(NamedTuple):
    """One number of a code, before it is sent."""

    pair: Pair
    combination: NDArray[np.float64]
    """(n_p,)"""
    rate: float
    """What it is worth, less its work, per size."""
    size: float
    """What it counts against the limit."""


def _exchange(problem: LayerProblem, numbers: list[Number]) -> Exchange:
    encoders: dict[Pair, list[NDArray[np.float64]]] = {}
    for number in numbers:
        encoders.setdefault(number.pair, []).append(number.combination)
    return exchange_of(problem, {pair: np.array(rows) for pair, rows in encoders.items()})


def _until_met(
    problem: LayerProblem,
    formulation: Volume,
    owner: NDArray[np.int64],
    ranked: Iterator[Number],
    deadline: Deadline,
) -> list[Number]:
    """The shortest prefix whose NMSE after refit is low enough (bisection; all if none is)."""

    def reaches(count: int) -> bool:
        return formulation.meets(problem, owner, _exchange(problem, numbers[:count]))

    numbers: list[Number] = []
    low, step = -1, 1
    while not reaches(len(numbers)):
        low = len(numbers)
        numbers.extend(islice(ranked, 0 if deadline.passed else step))
        step *= 2
        if len(numbers) == low:
            return numbers
    high = len(numbers)
    while high - low > 1 and not deadline.passed:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return numbers[:high]


@dataclass(frozen=True)
class _Pursuit:
    """The numbers sent so far, receiver by receiver: what one receives is worth nothing to the others."""

    pursued: list[_Pursued]
    cost: Cost

    @staticmethod
    def of(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> _Pursuit:
        pursued = [_Pursued(receiver) for receiver in receivers(formulation.judged(problem), owner)]
        return _Pursuit(pursued, cost_of_numbers(problem, formulation, owner))

    def numbers(self, limit: float) -> Iterator[Number]:
        """The number of greatest worth a byte or priced byte that fits, again and again; each given counts as sent."""
        left = limit
        while True:
            candidates = [(number, pursued) for pursued in self.pursued for number in self._next(pursued)]
            candidates = [(number, pursued) for number, pursued in candidates if number.size <= left]
            if not candidates:
                return
            number, pursued = max(candidates, key=lambda candidate: candidate[0].rate)
            yield number
            pursued.send(number)
            left -= number.size

    def _next(self, pursued: _Pursued) -> Iterator[Number]:
        for p, (gain, combination) in pursued.best().items():
            pair = (p, pursued.receiver.worker)
            worth, size = gain - self.cost.work[pair], self.cost.size[pair]
            if worth > 0:
                yield Number(pair, combination, worth / size if size > 0 else np.inf, size)


@dataclass(eq=False)
class _Pursued:
    """One receiver's state. K_pp leaves out what others have sent but not what p has.

    B_p Rᵀ = 0 for what p has sent already, so the best next number beside it is uncorrelated with it in this K_pp.
    """

    receiver: Receiver
    halves: list[NDArray[np.float64]] = field(default_factory=list)
    """(columns, b) covariances of the numbers sent with all columns, whitened."""

    def __post_init__(self) -> None:
        self._residual = self.receiver.residual.copy()
        self._variance = {p: variance.copy() for p, variance in self.receiver.variances.items()}
        self._best: dict[int, tuple[float, NDArray[np.float64]]] = {}

    def best(self) -> dict[int, tuple[float, NDArray[np.float64]]]:
        """For each source the gain and the combination (n_p,) of the best next number; absent where there is none."""
        receiver = self.receiver
        for p in receiver.values.keys() - self._best.keys():
            residual = self._residual[:, receiver.columns[p].ravel()]
            self._best[p] = strongest(residual, self._variance[p], receiver.width, receiver.energy)
        return {p: best for p, best in sorted(self._best.items()) if best[0] > 0}

    def send(self, number: Number) -> None:
        """Project on what is left beside this number: rank-b downdates of B and K. O(rows · columns)."""
        source, _ = number.pair
        receiver = self.receiver
        columns = receiver.columns[source].ravel()
        numbers = expanded(number.combination[None, :], receiver.width)
        covariance = receiver.covariance_of(source, numbers)
        for half in self.halves:
            covariance -= half @ (half[columns].T @ numbers)
        factor = cholesky(numbers.T @ covariance[columns], lower=True)
        half = solve_triangular(factor, covariance.T, lower=True).T
        worth = solve_triangular(factor, (self._residual[:, columns] @ numbers).T, lower=True).T
        self._residual -= worth @ half.T
        self.halves.append(half)
        self._best.pop(source, None)
        if receiver.local_half is None:
            return  # uncorrelated sources: nothing else changes
        for p in receiver.values:
            if p != source:
                shared = half[receiver.columns[p].ravel()]
                self._variance[p] -= shared @ shared.T
                self._best.pop(p, None)
