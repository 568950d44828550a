"""`swaps`: exchanges one transfer for another, adds and removes single ones, while that lowers the objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.reduced import worker_problems
from repurpose_opt_solvers.tableau import Tableau

_LEAST_FALL = 1e-9
"""Relative to the error without transfers; below it a fall may be rounding."""


class Swaps:
    """Local search from the transfers of an earlier pruner: exact exchanges of one for another. Volume, total."""

    name = "swaps"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, Volume) or formulation.communication == "busiest":
            return "exchanges of transfers by the error after refit: Volume with total communication only"
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
        start = formulation.select(problem, owner) if start is None else start
        if problem.moments.is_diagonal:
            return Candidate(Termination.HEURISTIC, owner, start)
        deadline = Deadline(options.time_limit)
        search = _Search(problem, formulation, owner, start)
        search.fit()
        search.descend(deadline)
        exchange = search.exchange() if formulation.max_nmse is None else search.shortest(start, deadline)
        termination = Termination.TIME_LIMIT if deadline.passed else Termination.HEURISTIC
        return Candidate(termination, owner, exchange, stats={"moves": search.moves})


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
    """By how much the objective falls."""
    value: NDArray[np.int64]

    @staticmethod
    def of(size: NDArray[np.float64], fall: NDArray[np.float64], value: NDArray[np.int64]) -> _Choices:
        order = np.lexsort((-fall, size))
        sizes, first = np.unique(size[order], return_index=True)
        return _Choices(sizes, fall[order[first]], value[order[first]])


class _Offers:
    """What the changes of one worker's transfers are worth, computed once for each state of its tableau."""

    def __init__(self, tableau: Tableau, price: float) -> None:
        self.tableau, self.price = tableau, price
        self.size = tableau.problem.size
        self.received = np.array(tableau.values, dtype=np.int64)

    @cached_property
    def additions(self) -> _Choices:
        missing = np.flatnonzero(~self.tableau.is_received)
        fall = self.tableau.gains()[missing] - self.price * self.size[missing]
        return _Choices.of(self.size[missing], fall, missing)

    @cached_property
    def removals(self) -> _Choices:
        fall = self.price * self.size[self.received] - self.tableau.removal_costs()
        return _Choices.of(self.size[self.received], fall, self.received)

    def best_swap(self, left: float) -> tuple[float, int, int] | None:
        """(fall, removed, added) of the best exchange that counts at most `left` more."""
        if len(self.received) in (0, len(self.size)):
            return None
        falls = self._swaps if np.isinf(left) else np.where(self._more <= left, self._swaps, -np.inf)
        place, added = np.unravel_index(np.argmax(falls), falls.shape)
        return float(falls[place, added]), int(self.received[place]), int(added)

    @cached_property
    def _more(self) -> NDArray[np.float64]:
        return self.size - self.size[self.received][:, None]

    @cached_property
    def _swaps(self) -> NDArray[np.float64]:
        return self.tableau.swap_falls() - self.price * self._more


class _Search:
    """Best improvement over all workers: each move is the one with the largest fall of the objective."""

    def __init__(self, problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], start: Exchange) -> None:
        self.problem, self.formulation, self.owner = problem, formulation, owner
        workers = worker_problems(problem, formulation, owner)
        self.tableaux = [Tableau(w, np.flatnonzero(start.transfers[w.value, w.worker])) for w in workers]
        self.price = formulation.transfer_price or 0.0
        limit = formulation.limit(problem)
        self.left = np.inf if limit is None else limit - self._used()
        if formulation.max_nmse is not None:
            self.left = 0.0
        self.least = _LEAST_FALL * sum(worker.energy for worker in workers)
        self.offers = [_Offers(tableau, self.price) for tableau in self.tableaux]
        self.moves = 0

    def fit(self) -> None:
        """Gives up what is cheapest for its size until the budget is kept."""
        while self.left < 0:
            self._make(self._cheapest_removal())

    def descend(self, deadline: Deadline) -> None:
        """Until no move lowers the objective."""
        while not deadline.passed:
            move = max(self._moves(), key=lambda move: move.fall, default=_Move(0.0))
            if move.fall <= self.least:
                return
            self._make(move)

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
        return best

    def exchange(self) -> Exchange:
        transfers = np.zeros((self.problem.n, self.problem.P), dtype=bool)
        for tableau in self.tableaux:
            transfers[tableau.problem.value[tableau.values], tableau.problem.worker] = True
        return Exchange.of_transfers(transfers, self.problem.input_owner)

    def _cheapest_removal(self) -> _Move:
        removals = (move for move in self._removals() if self._size(move.removed) > 0)
        return max(removals, key=lambda move: move.fall / self._size(move.removed))

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

    def _moves(self) -> Iterator[_Move]:
        """The best move of every kind, for every worker or pair of workers."""
        yield from self._removals()
        for a, offers in enumerate(self.offers):
            choices = offers.additions
            for place in np.flatnonzero(choices.size <= self.left):
                yield _Move(float(choices.fall[place]), None, (a, int(choices.value[place])))
            swap = offers.best_swap(self.left)
            if swap is not None:
                yield _Move(swap[0], (a, swap[1]), (a, swap[2]))
        for a, b in permutations(range(len(self.offers)), 2):
            yield from self._moves_between(a, b)

    def _removals(self) -> Iterator[_Move]:
        for a, offers in enumerate(self.offers):
            for fall, value in zip(offers.removals.fall, offers.removals.value, strict=True):
                yield _Move(float(fall), (a, int(value)))

    def _moves_between(self, a: int, b: int) -> Iterator[_Move]:
        """The best that worker b receives instead of what worker a gives up."""
        given_up, received = self.offers[a].removals, self.offers[b].additions
        fits = received.size - given_up.size[:, None] <= self.left
        if fits.any():
            falls = np.where(fits, received.fall + given_up.fall[:, None], -np.inf)
            from_a, to_b = np.unravel_index(np.argmax(falls), falls.shape)
            removed, added = (a, int(given_up.value[from_a])), (b, int(received.value[to_b]))
            yield _Move(float(falls[from_a, to_b]), removed, added)
