"""`code-greedy`: codes number by number, each the one that lowers the error most a byte beside those before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.formulation.codes import Cost, Link, cost_of_numbers, exchange_of
from repurpose_opt.moments import lower_factor
from repurpose_opt.problem import LayerProblem
from repurpose_opt.receiver import Receiver, Source, expanded, receivers, strongest
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.received import without_codes


class CodeGreedy:
    """Greedy rank-one steps: the next number is the best of all pairs beside what is known; Volume with codes."""

    name = "code-greedy"
    requires: tuple[str, ...] = ()
    sends_codes = True

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        alone = "it sends to each receiver by itself, links are broadcast" if problem.broadcast else None
        return without_codes(formulation) or alone

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
        if _has_room_for_everything(problem, formulation, owner):
            everything = Volume(transfer_price=0.0, messages=formulation.messages).select(problem, owner)
            return Candidate(Termination.HEURISTIC, owner, everything)
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


def _has_room_for_everything(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> bool:
    """Whether every pair may send as many numbers as V_kp can need, which would take a pursuit long."""
    if formulation.mac_price > 0 or formulation.max_nmse is not None:
        return False
    if formulation.transfer_price is not None:
        return formulation.transfer_price == 0
    limit = formulation.limit(problem)
    assert limit is not None
    sizes = cost_of_numbers(problem, formulation, owner).size
    most = np.zeros((problem.P, problem.P))
    for receiver in receivers(problem, owner):
        for p, held in receiver.values.items():
            most[p, receiver.worker] = min(len(receiver.rows) * receiver.width, len(held))
    return bool((most * sizes).sum() <= limit)


class Number(NamedTuple):
    """One number of a code, before it is sent."""

    link: Link
    combination: NDArray[np.float64]
    """(n_p,)"""
    rate: float
    """What it is worth, less its work, per size."""
    size: float
    """What it counts against the limit."""


def _exchange(problem: LayerProblem, numbers: list[Number]) -> Exchange:
    encoders: dict[Link, list[NDArray[np.float64]]] = {}
    for number in numbers:
        encoders.setdefault(number.link, []).append(number.combination)
    return exchange_of(problem, {link: np.array(rows) for link, rows in encoders.items()})


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
        numbers.extend(islice(takewhile(lambda _: not deadline.passed, ranked), step))
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
    halves: NDArray[np.float64] = field(init=False)
    """(columns, numbers·b) covariances of the numbers sent with all columns, whitened."""
    worths: NDArray[np.float64] = field(init=False)
    """(rows, numbers·b) covariances of the numbers sent with the outputs, whitened: B is less worths · halvesᵀ now."""

    def __post_init__(self) -> None:
        rows, columns = self.receiver.residual.shape
        self.halves, self.worths = np.empty((columns, 0)), np.empty((rows, 0))
        self._best: dict[int, tuple[float, NDArray[np.float64]]] = {}
        self._left: dict[int, _Left] = {p: _left_of(self.receiver, p) for p in self.receiver.values}

    def best(self) -> dict[int, tuple[float, NDArray[np.float64]]]:
        """For each source the gain and the combination (n_p,) of the best next number; absent where there is none."""
        for p in self._left.keys() - self._best.keys():
            self._best[p] = self._left[p].strongest(self)
        return {p: best for p, best in sorted(self._best.items()) if best[0] > 0}

    def residual(self, columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """B (rows, columns) as it is now."""
        return self.receiver.residual[:, columns] - self.worths @ self.halves[columns].T

    def send(self, number: Number) -> None:
        """Project on what is left beside this number: rank-b downdates of B and K. O(rows · columns)."""
        source, _ = number.link
        receiver = self.receiver
        columns = receiver.columns[source].ravel()
        numbers = expanded(number.combination[None, :], receiver.width)
        covariance = receiver.covariance_of(source, numbers)
        covariance -= self.halves @ (self.halves[columns].T @ numbers)
        factor = lower_factor(numbers.T @ covariance[columns])
        half = solve_triangular(factor, covariance.T, lower=True).T
        served = receiver.residual[:, columns] @ numbers - self.worths @ (self.halves[columns].T @ numbers)
        worth = solve_triangular(factor, served.T, lower=True).T
        image = receiver.residual.T @ worth - self.halves @ (self.worths.T @ worth)
        self.halves, self.worths = np.hstack([self.halves, half]), np.hstack([self.worths, worth])
        changed = [source] if receiver.local_half is None else list(receiver.values)  # uncorrelated sources
        for p in changed:
            columns = receiver.columns[p].ravel()
            self._left[p].send(half[columns], image[columns], worth, is_own=p == source)
            self._best.pop(p, None)


class _Left(Protocol):
    """What is left of B_p and K_pp of one source."""

    def strongest(self, pursued: _Pursued) -> tuple[float, NDArray[np.float64]]: ...

    def send(
        self, half: NDArray[np.float64], image: NDArray[np.float64], worth: NDArray[np.float64], is_own: bool
    ) -> None:
        """Leave out a number of covariance `half` (n_p·b, b) with the source, worth `worth` (rows, b).

        `image` is B_pᵀ worth before it, (n_p·b, b).
        """
        ...


def _left_of(receiver: Receiver, p: int) -> _Left:
    """The Gram matrix where there are more rows than values: of fewer rows B_p itself is the smaller."""
    is_wide = len(receiver.rows) < len(receiver.values[p])
    if receiver.width == 1 and receiver.local_half is not None and not is_wide:
        return _Gram(receiver.sources[p], receiver.energy)
    return _Dense(p, receiver.variances[p].copy())


@dataclass
class _Dense:
    """B_p and K_pp themselves."""

    source: int
    variance: NDArray[np.float64]

    def strongest(self, pursued: _Pursued) -> tuple[float, NDArray[np.float64]]:
        receiver = pursued.receiver
        residual = pursued.residual(receiver.columns[self.source].ravel())
        return strongest(residual, self.variance, receiver.width, receiver.energy)

    def send(
        self, half: NDArray[np.float64], image: NDArray[np.float64], worth: NDArray[np.float64], is_own: bool
    ) -> None:
        if not is_own:
            self.variance -= half @ half.T


class _Gram:
    """B_pᵀB_p of the values made uncorrelated, and the covariances of others' numbers with them; b = 1."""

    def __init__(self, source: Source, energy: float) -> None:
        self.source, self.energy = source, energy
        self.gram = source.gram.copy()
        self.shared = np.empty((0, len(source.gram)))

    def strongest(self, pursued: _Pursued) -> tuple[float, NDArray[np.float64]]:
        spectrum = self.source.leading(self.gram, self.shared, 1, self.energy)
        if len(spectrum.gains) == 0:
            return 0.0, np.zeros(len(self.gram))
        return float(spectrum.gains[0]), spectrum.encoder(1)[0]

    def send(
        self, half: NDArray[np.float64], image: NDArray[np.float64], worth: NDArray[np.float64], is_own: bool
    ) -> None:
        half, image = self.source.whitened(np.hstack([half, image])).T
        change = np.outer(image - (0.5 * np.vdot(worth, worth)) * half, half)
        self.gram -= change
        self.gram -= change.T
        if not is_own:
            self.shared = np.vstack([self.shared, half])
