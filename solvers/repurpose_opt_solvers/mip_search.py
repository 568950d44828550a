"""What `mip` and `mip-lns` run, in a child process where there is a time limit: generators of ever better answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import LinearModel, model_of
from repurpose_opt.solver import Deadline
from repurpose_opt.trajectory import Incumbents
from repurpose_opt_solvers.bounds import relaxation, worker_bounds
from repurpose_opt_solvers.mip_engines import Answer, Effort, answers, raised
from repurpose_opt_solvers.neighbourhoods import ROUNDS_WITHOUT_A_LIMIT, Loads, improvements

MOST_PROVABLE_LINKS = 8_000
"""Pins times workers of the largest model whose proof is tried: larger ones have not been proved in a minute."""
_NODES_TIMES_LINKS = 300_000
_WORK_OF_LOSSES = 30
_DETERMINISTIC_TIME = 1.0
"""What an engine may take without a time limit, so that it ends, and the same way on any machine."""
_FIRST_ROUNDS = 10
_FIRST, _ENGINE, _BOUND = 0.05, 0.4, 0.75
"""Shares of the time that is left then: for neighbourhoods before the proof, for the proof, for the bound."""


@dataclass(frozen=True, eq=False)
class Task:
    """What to search, in arrays that a child process is sent."""

    hypergraph: Hypergraph
    places: NDArray[np.bool_]
    loads: Loads
    weight: NDArray[np.float64]
    """(n, P) price of each transfer, or its bytes where there is a budget."""
    budget: float | None
    start: NDArray[np.int64] | None
    sent: NDArray[np.bool_] | None
    """(n, P) transfers that go with the start where there is a budget."""
    bound: float
    began: float
    """Seconds of the system-wide monotonic clock, as is `until`."""
    until: float | None
    threads: int = 1
    seed: int = 0
    relative_gap: float = 1e-6

    @cached_property
    def model(self) -> LinearModel:
        return model_of(self.hypergraph, self.places, self.loads, self.weight, self.budget)

    @property
    def links(self) -> int:
        """At most so many rows y ≥ x has the model."""
        return int(self.hypergraph.pins.nnz) * self.hypergraph.P

    @property
    def splits(self) -> bool:
        """Whether what one worker costs does not depend on the others: no budget, no busiest worker."""
        return self.budget is None and self.hypergraph.communication == "total"

    @property
    def _nodes(self) -> int:
        work = max(1, self.links) * (1 if self.hypergraph.keeps_all else _WORK_OF_LOSSES)
        return max(5, _NODES_TIMES_LINKS // work)

    def deadline(self, share: float = 1.0) -> Deadline:
        """The end of this share of the time that is left."""
        return Deadline(None if self.until is None else share * max(0.0, self.until - time.monotonic()))

    def effort(self, share: float = 1.0) -> Effort:
        seconds = self.deadline(share).remaining
        is_free = seconds is None
        return Effort(
            seconds=seconds,
            deterministic_time=_DETERMINISTIC_TIME if is_free else None,
            nodes=self._nodes if is_free else None,
            threads=self.threads,
            seed=self.seed,
            relative_gap=self.relative_gap,
        )


@dataclass(frozen=True, eq=False)
class Found:
    """The best so far, with its transfers (n, P) where there is a budget, and a bound on what any costs."""

    owner: NDArray[np.int64] | None
    sent: NDArray[np.bool_] | None
    cost: float
    bound: float
    is_infeasible: bool
    stats: dict[str, Any]


def before_a_search(task: Task) -> Found:
    """What the task itself knows."""
    return _Search(task).found()


def by_engine(task: Task, engine: str) -> Iterator[Found]:
    """One engine on the whole model."""
    search = _Search(task)
    yield search.found()
    if not search.is_done:
        yield from search.engine(engine, 1.0)


def by_neighbourhoods(task: Task) -> Iterator[Found]:
    """Neighbourhoods from the start; without a time limit, a number of rounds."""
    search = _Search(task)
    yield search.found()
    if not search.is_done and search.owner is not None:
        yield from search.neighbourhoods(1.0, ROUNDS_WITHOUT_A_LIMIT)


def by_best(task: Task) -> Iterator[Found]:
    """A proof where the model is small enough, neighbourhoods where it is not, and the bound that the time allows.

    Small models: neighbourhoods for a start, SCIP on the whole model, the bound by worker, neighbourhoods again.
    Without a time limit SCIP has a limit of nodes, and the neighbourhoods one of rounds.
    """
    search = _Search(task)
    yield search.found()
    if search.is_done:
        return
    if not task.splits:
        yield from search.engine("scip" if task.links <= MOST_PROVABLE_LINKS else "cp-sat", 1.0)
        return
    if task.start is None:  # nothing to improve: unequal loads, and no placement was found at once
        yield from search.engine("cp-sat", 0.3 if task.until is not None else 1.0)
        if search.is_done or search.owner is None:
            return
    if task.links <= MOST_PROVABLE_LINKS:
        yield from search.neighbourhoods(_FIRST, _FIRST_ROUNDS)
        if not search.is_done:
            yield from search.engine("scip", _ENGINE)
    if not search.is_done and task.until is not None and task.links <= MOST_PROVABLE_LINKS:
        yield from search.bound_by_worker(_BOUND)
    if not search.is_done:
        yield from search.neighbourhoods(1.0, ROUNDS_WITHOUT_A_LIMIT)


class _Search:
    """The best placement and bound so far, and the parts of a search that better them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.owner, self.sent = task.start, task.sent
        self.bound = task.bound
        self.is_infeasible = False
        self.incumbents = Incumbents(task.began)
        self.parts: list[dict[str, Any]] = []
        self.cost = np.inf
        if task.start is not None:
            self._accept(task.start, task.sent, self._cost(task.start, task.sent))

    @property
    def is_done(self) -> bool:
        """Whether the best is proved to be within the gap, or there is none."""
        return self.is_infeasible or self.cost - self.bound <= self.task.relative_gap * max(abs(self.cost), 1e-12)

    def found(self) -> Found:
        stats = {"parts": [dict(part) for part in self.parts], "trajectory": list(self.incumbents.points)}
        return Found(self.owner, self.sent, self.cost, min(self.bound, self.cost), self.is_infeasible, stats)

    def engine(self, engine: str, share: float) -> Iterator[Found]:
        """The engine on the whole model, from the best so far."""
        task = self.task
        part = self._part(engine, share)
        model = task.model
        start = None
        if self.owner is not None:
            sent = cheapest_transfers(task.hypergraph, self.owner) if self.sent is None else self.sent
            start = model.variables(self.owner, sent)
        for answer in answers(engine, model, start, task.effort(share)):
            self._take(answer)
            yield self._told(part)

    def neighbourhoods(self, share: float, rounds: int) -> Iterator[Found]:
        """Neighbourhoods from the best so far; `rounds` count where there is no time limit."""
        task = self.task
        part = self._part("neighbourhoods", share)
        assert self.owner is not None
        deadline = task.deadline(share)
        most = rounds if task.until is None else None
        for owner, counts in improvements(
            task.hypergraph, task.places, task.loads, self.owner, deadline, seed=task.seed, rounds=most
        ):
            part.update(counts)
            cost = self._cost(owner, None)
            if cost < self.cost:
                self._accept(owner, None, cost)
            yield self._told(part)

    def bound_by_worker(self, share: float) -> Iterator[Found]:
        """The linear relaxation, then L(λ) from its multipliers on."""
        part = self._part("bound", share)
        bound, multiplier = relaxation(self.task.model)
        self._raise(bound)
        yield self._told(part)
        deadline = self.task.deadline(share)
        part["rounds"] = 0
        for found in worker_bounds(self.task.model, self.cost, multiplier, deadline, self.task.seed):
            part["rounds"] += 1
            self._raise(found.bound)
            yield self._told(part)
            if self.is_done:
                return

    def _part(self, name: str, share: float) -> dict[str, Any]:
        self.parts.append({"part": name})
        self._part_began = time.monotonic()
        return self.parts[-1]

    def _told(self, part: dict[str, Any]) -> Found:
        part["seconds"] = time.monotonic() - self._part_began
        part["cost"], part["bound"] = self.cost, self.bound
        return self.found()

    def _cost(self, owner: NDArray[np.int64], sent: NDArray[np.bool_] | None) -> float:
        if self.task.budget is None:
            return self.task.hypergraph.cost(owner)
        assert sent is not None
        return cost_with(self.task.hypergraph, owner, sent | (self.task.weight == 0))

    def _accept(self, owner: NDArray[np.int64], sent: NDArray[np.bool_] | None, cost: float) -> None:
        self.owner, self.sent, self.cost = owner, sent, cost
        self.incumbents.add(cost)

    def _raise(self, bound: float) -> None:
        if np.isfinite(bound):
            self.bound = max(self.bound, raised(self.task.model, bound))

    def _take(self, answer: Answer) -> None:
        if answer.is_infeasible:
            if self.owner is not None:
                raise RuntimeError("an engine calls a problem infeasible that has a placement")
            self.is_infeasible = True
            return
        if np.isfinite(answer.bound):
            self.bound = max(self.bound, answer.bound)
        if answer.values is None:
            return
        model = self.task.model
        owner = model.owner(answer.values)
        sent = None
        if self.task.budget is not None:
            sent = np.zeros(self.task.weight.shape, dtype=bool)
            first = len(model.places)
            chosen = answer.values[first : first + len(model.transfers)] > 0.5
            sent[tuple(model.transfers[chosen].T)] = True
            if self.task.weight[sent].sum() > self.task.budget * (1 + 1e-9):
                return
        if self._is_valid(owner):
            cost = self._cost(owner, sent)
            if cost < self.cost:
                self._accept(owner, sent, cost)

    def _is_valid(self, owner: NDArray[np.int64]) -> bool:
        """Engines work with tolerances, loads have none."""
        load, low, high = self.task.loads
        held = np.bincount(owner, load, self.task.hypergraph.P)
        neurons = np.arange(len(owner))
        return bool((held >= low).all() and (held <= high).all() and self.task.places[neurons, owner].all())


def cheapest_transfers(hypergraph: Hypergraph, owner: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(n, P) transfers that these owners cost least with."""
    held = np.asarray(hypergraph.pins.T @ np.eye(hypergraph.P)[owner])
    return held > 0 if hypergraph.keeps_all else held > hypergraph.price


def cost_with(hypergraph: Hypergraph, owner: NDArray[np.int64], had: NDArray[np.bool_]) -> float:
    """Fixed costs and lost energy of owners where a worker has the values `had` (n, P), and transfers are free."""
    return replace(hypergraph, price=np.where(had, 0.0, np.inf)).cost(owner)
