"""Changes of transfers one at a time, by their exact effect on the error after refit: what local searches share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.reduced import worker_problems
from repurpose_opt_solvers.tableau import Tableau

_LEAST_FALL = 1e-9
"""Relative to the error without transfers; below it a fall is not worth a move."""
_ROUNDING = 1e-12
"""Relative to the outputs' energy and to a price; below it a fall may be none."""
_PATIENCE = 100
"""Moves of the tabu search without a new best before it ends."""
_MOVES_AWAY, _MOVES_HERE = 20, 10
"""For how many moves what was given up is not received again, and what was received is not given up."""


def search(
    problem: LayerProblem,
    formulation: Volume,
    options: SolveOptions,
    owner: NDArray[np.int64],
    start: Exchange | None,
    *,
    explores: bool,
) -> Candidate:
    """The transfers that local search ends at from `start` (`select` if None): descent, or tabu search as well."""
    start = formulation.select(problem, owner) if start is None else start
    if problem.moments.is_diagonal:
        return Candidate(Termination.HEURISTIC, owner, start)
    deadline = Deadline(options.time_limit)
    tableaux = []
    for worker in worker_problems(problem, formulation, owner):
        if deadline.passed:
            return Candidate(Termination.TIME_LIMIT, owner, start)
        tableaux.append(Tableau(worker, np.flatnonzero(start.transfers[worker.value, worker.worker])))
    found = TransferSearch(problem, formulation, owner, tableaux)
    found.fit()
    found.descend(deadline)
    if explores:
        found.explore(deadline)
        found.descend(deadline)
    exchange = found.exchange() if formulation.max_nmse is None else found.shortest(start, deadline)
    termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
    return Candidate(termination, owner, exchange, stats={"moves": found.moves})


@dataclass(frozen=True)
class _Move:
    """What changes, each as (tableau, value), and by how much the objective falls."""

    fall: float
    removed: tuple[int, int] | None = None
    added: tuple[int, int] | None = None


@dataclass(frozen=True)
class _Choices:
    """For each size of a transfer that occurs, the best value to add or to remove."""

    size: NDArray[np.float64]
    fall: NDArray[np.float64]
    """By how much the objective falls; −inf where no value of that size may change."""
    value: NDArray[np.int64]

    @staticmethod
    def of(size: NDArray[np.float64], fall: NDArray[np.float64], value: NDArray[np.int64]) -> _Choices:
        if len(size) and (size == size[0]).all():
            first = np.array([np.argmax(fall)])
        else:
            order = np.lexsort((-fall, size))
            first = order[np.unique(size[order], return_index=True)[1]]
        return _Choices(size[first], fall[first], value[first])


class _Offers:
    """What the changes of one worker's transfers are worth, computed once for each state of its tableau."""

    def __init__(self, tableau: Tableau, price: float) -> None:
        self.tableau, self.price = tableau, price
        self.size = tableau.problem.size
        self.received = np.array(tableau.values, dtype=np.int64)
        self.missing = np.flatnonzero(~tableau.is_received)

    def additions(self, may_change: NDArray[np.bool_]) -> _Choices:
        fall = np.where(may_change[self.missing], self._addition_falls, -np.inf)
        return _Choices.of(self.size[self.missing], fall, self.missing)

    def removals(self, may_change: NDArray[np.bool_]) -> _Choices:
        fall = np.where(may_change[self.received], self._removal_falls, -np.inf)
        return _Choices.of(self.size[self.received], fall, self.received)

    def best_swap(self, left: float, may_change: NDArray[np.bool_]) -> tuple[float, int, int] | None:
        """(fall, removed, added) of the best exchange that counts at most `left` more."""
        removed, added = self.received[may_change[self.received]], self.missing[may_change[self.missing]]
        if len(removed) == 0 or len(added) == 0:
            return None
        falls = self._swap_falls
        if len(removed) + len(added) < len(self.size):
            falls = np.where(may_change[self.received][:, None] & may_change, falls, -np.inf)
        if self._most_more > left:
            falls = np.where(self._more <= left, falls, -np.inf)
        place, value = np.unravel_index(np.argmax(falls), falls.shape)
        return float(falls[place, value]), int(self.received[place]), int(value)

    @cached_property
    def _addition_falls(self) -> NDArray[np.float64]:
        return self.tableau.gains()[self.missing] - self.price * self.size[self.missing]

    @cached_property
    def _removal_falls(self) -> NDArray[np.float64]:
        return self.price * self.size[self.received] - self.tableau.removal_costs()

    @cached_property
    def _swap_falls(self) -> NDArray[np.float64]:
        falls = self.tableau.swap_falls()
        return falls - self.price * self._more if self.price else falls

    @cached_property
    def _more(self) -> NDArray[np.float64]:
        return self.size - self.size[self.received][:, None]

    @cached_property
    def _most_more(self) -> float:
        return float(self.size[self.missing].max() - self.size[self.received].min())


class TransferSearch:
    """Transfers of all workers under one limit or price, changed by the move with the largest fall of the objective."""

    def __init__(
        self, problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], tableaux: list[Tableau]
    ) -> None:
        self.problem, self.formulation, self.owner, self.tableaux = problem, formulation, owner, tableaux
        self.price = formulation.transfer_price or 0.0
        limit = formulation.limit(problem)
        self.left = np.inf if limit is None else limit - self._used()
        if formulation.max_nmse is not None:
            self.left = 0.0
        judged = formulation.judged(problem)
        energy = sum(tableau.problem.energy for tableau in tableaux)
        largest = max((float(tableau.problem.size.max()) for tableau in tableaux), default=0.0)
        rounding = _ROUNDING * (float(judged.output_weight @ judged.output_energy) + self.price * largest)
        self.least = max(_LEAST_FALL * energy, rounding)
        """A fall that is no larger counts as none."""
        self.offers = [_Offers(tableau, self.price) for tableau in tableaux]
        self.held_until = [np.zeros(len(tableau.problem.value), dtype=np.int64) for tableau in tableaux]
        self.moves = 0

    def fit(self) -> None:
        """Gives up what is cheapest for its size until the budget is kept."""
        while self.left < 0:
            self._make(self._cheapest_removal())

    def descend(self, deadline: Deadline) -> None:
        """Until no move lowers the objective."""
        while not deadline.passed:
            move = self._best_move()
            if move.fall <= self.least:
                return
            self._make(move)

    def explore(self, deadline: Deadline) -> None:
        """Tabu search from here, back to the best that it came by.

        The best move is made even if it is for the worse, and what came or went lately stays as it is for some moves
        (Glover 1989, "Tabu search, part I"; Pacheco, Casado, Núñez 2009 choose variables that way).
        """
        made = sum(len(offers.received) for offers in self.offers)
        missing = sum(len(offers.missing) for offers in self.offers)
        away, here = min(_MOVES_AWAY, missing // 3), min(_MOVES_HERE, made // 3)
        since_best: list[_Move] = []
        fall = 0.0
        while len(since_best) < _PATIENCE and not deadline.passed:
            move = self._best_move()
            if not np.isfinite(move.fall) or (move.removed is None and move.added is None):
                break
            self._make(move)
            self._hold(move.removed, away)
            self._hold(move.added, here)
            since_best.append(move)
            fall += move.fall
            if fall > self.least:
                since_best, fall = [], 0.0
        for move in reversed(since_best):
            self._make(_Move(-move.fall, removed=move.added, added=move.removed))
        for held in self.held_until:
            held[:] = 0

    def shortest(self, start: Exchange, deadline: Deadline) -> Exchange:
        """Gives up the cheapest transfer, exchanges others, and so on, while max_nmse is met."""
        best = start
        while not deadline.passed and self._is_valid(exchange := self.exchange()):
            best = exchange
            if self._used() == 0:
                break
            self._make(self._cheapest_removal())
            self.left = 0.0
            self.descend(deadline)
        return self._without_spare(best, deadline)

    def _without_spare(self, exchange: Exchange, deadline: Deadline) -> Exchange:
        """The exchange without transfers that max_nmse can be met without, the dearest first."""
        price = self.formulation.paid(self.problem)
        while not deadline.passed and self._is_valid(exchange):
            made = np.argwhere(exchange.transfers & (price > 0))
            for j, k in made[np.argsort(-price[made[:, 0], made[:, 1]], kind="stable")]:
                transfers = exchange.transfers.copy()
                transfers[j, k] = False
                fewer = Exchange.of_transfers(transfers, self.problem.input_owner)
                if self._is_valid(fewer):
                    exchange = fewer
                    break
            else:
                break
        return exchange

    def exchange(self) -> Exchange:
        transfers = np.zeros((self.problem.n, self.problem.P), dtype=bool)
        for tableau in self.tableaux:
            transfers[tableau.problem.value[tableau.values], tableau.problem.worker] = True
        return Exchange.of_transfers(transfers, self.problem.input_owner)

    def _cheapest_removal(self) -> _Move:
        removals = [offers.removals(np.ones(len(offers.size), dtype=bool)) for offers in self.offers]
        moves = (move for move in self._single_moves(removals, []) if self._size(move.removed) > 0)
        return max(moves, key=lambda move: move.fall / self._size(move.removed))

    def _is_valid(self, exchange: Exchange) -> bool:
        weight = self.formulation.repair(self.problem, self.owner, exchange)
        return not self.formulation.violations(self.problem, self.owner, exchange, weight)

    def _used(self) -> float:
        return float(sum(tableau.problem.size[tableau.values].sum() for tableau in self.tableaux))

    def _size(self, place: tuple[int, int] | None) -> float:
        return 0.0 if place is None else float(self.tableaux[place[0]].problem.size[place[1]])

    def _make(self, move: _Move) -> None:
        self.moves += 1
        self.left += self._size(move.removed) - self._size(move.added)
        if move.removed is not None:
            self.tableaux[move.removed[0]].remove(move.removed[1])
        if move.added is not None:
            self.tableaux[move.added[0]].add(move.added[1])
        for a in {place[0] for place in (move.removed, move.added) if place is not None}:
            self.offers[a] = _Offers(self.tableaux[a], self.price)

    def _hold(self, place: tuple[int, int] | None, moves: int) -> None:
        """Let a value be as it is for some moves."""
        if place is not None:
            self.held_until[place[0]][place[1]] = self.moves + moves

    def _best_move(self) -> _Move:
        return max(self._moves(), key=lambda move: move.fall, default=_Move(0.0))

    def _moves(self) -> Iterator[_Move]:
        """The best move of every kind, for every worker or pair of workers."""
        free = [held <= self.moves for held in self.held_until]
        removals = [offers.removals(may_change) for offers, may_change in zip(self.offers, free, strict=True)]
        additions = [offers.additions(may_change) for offers, may_change in zip(self.offers, free, strict=True)]
        yield from self._single_moves(removals, additions)
        for a, offers in enumerate(self.offers):
            swap = offers.best_swap(self.left, free[a])
            if swap is not None:
                yield _Move(swap[0], (a, swap[1]), (a, swap[2]))
        if len(self.offers) > 1:
            yield from self._moves_between_workers(removals, additions)

    def _single_moves(self, removals: list[_Choices], additions: list[_Choices]) -> Iterator[_Move]:
        for a, choices in enumerate(removals):
            for fall, value in zip(choices.fall, choices.value, strict=True):
                yield _Move(float(fall), (a, int(value)))
        for a, choices in enumerate(additions):
            for place in np.flatnonzero(choices.size <= self.left):
                yield _Move(float(choices.fall[place]), None, (a, int(choices.value[place])))

    def _moves_between_workers(self, removals: list[_Choices], additions: list[_Choices]) -> Iterator[_Move]:
        """The best that one worker receives instead of what another gives up."""
        given_up, from_worker = _joined(removals)
        received, to_worker = _joined(additions)
        fits = received.size - given_up.size[:, None] <= self.left
        fits &= from_worker[:, None] != to_worker
        if fits.any():
            falls = np.where(fits, received.fall + given_up.fall[:, None], -np.inf)
            gone, new = np.unravel_index(np.argmax(falls), falls.shape)
            removed = int(from_worker[gone]), int(given_up.value[gone])
            added = int(to_worker[new]), int(received.value[new])
            yield _Move(float(falls[gone, new]), removed, added)


def _joined(choices: list[_Choices]) -> tuple[_Choices, NDArray[np.int64]]:
    """The choices of all workers one after the other, and whose each is."""
    whole = _Choices(*(np.concatenate([getattr(c, name) for c in choices]) for name in ("size", "fall", "value")))
    return whole, np.repeat(np.arange(len(choices)), [len(c.size) for c in choices])
