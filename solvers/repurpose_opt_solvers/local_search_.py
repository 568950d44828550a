"""`local-search`: simulated annealing on swaps and moves of neurons, from a given start, with incremental gains."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.isolation import DeadlinePassed, last
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, Prune, SolveOptions, Termination
from repurpose_opt.trajectory import Incumbents, Point
from repurpose_opt_solvers.alternate_ import Alternate

# Temperatures in units of the typical price of a transfer. A round cools from one of the hot ones to the cold one;
# higher ones find structure (bands, blocks), lower ones are enough for random layers.
_HOT = (0.6, 1.0, 1.5)
_COLD = 0.15
_STRICTEST = 3.0
"""What a unit of squared excess load counts at the end of a round, in temperatures; 1 at its begin."""
_STRICTER = 1.1
_EXCESS = 0.5
"""It counts more and more while the excess is above this many units a worker, or above 0 at the end."""
_PROPOSALS_PER_NEURON = 8_000
"""In each of the first rounds."""
_EXPLORED = 0.04
"""Share of the time limit that each of the first rounds may take."""
_LONGER = 4
"""Each later round has so many times the proposals of the one before."""
_STEPS_OF_TEMPERATURE = 400
_SHARE_OF_SEARCH = 0.9
"""Of the time that is left, where the transfers are still to be chosen afterwards."""
_CHEAP_READERS = 200
_MOST_ENERGIES = 50_000_000
_SHARE_OF_TOTAL = 0.1
"""Weight of the sum of squares in the busiest worker's cost, relative to where all workers are equally busy."""


class LocalSearch:
    """Annealing from a start, else from `alternate`: Lossless; Edge and Volume on the total. A heuristic."""

    name = "local-search"
    requires: tuple[str, ...] = ("numba",)

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        is_limited = isinstance(formulation, Volume) and formulation.communication == "total"
        is_limited &= not formulation.sends_codes
        seen = Volume(transfer_price=1.0) if is_limited else formulation  # the same pins; a limit's price takes long
        found = seen.hypergraph(problem, np.zeros(problem.m, dtype=np.int64))
        if found is None:
            return f"no incremental cost is known for {formulation}"
        if not found.keeps_all and found.m * found.n > _MOST_ENERGIES:
            return f"{found.m * found.n:,} energies of neurons and values; at most {_MOST_ENERGIES:,}"
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        began = time.monotonic()
        deadline = Deadline(options.time_limit)
        trajectory: list[Point] = []
        if start is None:
            first = Alternate().solve(problem, formulation, options, None, prune)
            if first.owner is None or deadline.passed:
                return first
            start = first.owner
            trajectory += first.stats.get("trajectory", ())
        hypergraph = formulation.hypergraph(problem, start)
        assert hypergraph is not None
        if problem.P == 1 or problem.m == 1:
            return Candidate(Termination.HEURISTIC, start)
        remaining = deadline.remaining
        if remaining is not None and not hypergraph.keeps_all:
            remaining *= _SHARE_OF_SEARCH
        # Where numba would compile first, a child does: it cannot be interrupted.
        enforced = None if remaining is None or is_compiled() else remaining
        try:
            answer, _ = last(search, problem, hypergraph, start, options.seed, remaining, began, time_limit=enforced)
        except DeadlinePassed:
            late = "numba had not compiled the search in time"
            return Candidate(Termination.TIME_LIMIT, start, message=late, stats={"trajectory": trajectory})
        owner, points, stats = answer
        if hypergraph.is_exact:
            trajectory += points
        return Candidate(Termination.HEURISTIC, owner, stats={**stats, "trajectory": trajectory})


@cache
def kernels() -> Any:
    """The compiled functions; numba is loaded here."""
    return import_module("repurpose_opt_solvers.local_search_kernels")


def is_compiled() -> bool:
    """Whether numba has all kernels in its cache, so that they load in a fraction of a second."""
    names = ("gains", "anneal_nets", "anneal_busiest", "anneal_energies")
    # The index is empty where it is of another numba, Python or source.
    return all(getattr(kernels(), name)._cache._cache_file._load_index() for name in names)


def search(
    problem: LayerProblem,
    hypergraph: Hypergraph,
    start: NDArray[np.int64],
    seed: int,
    time_limit: float | None,
    began: float,
) -> Iterator[tuple[NDArray[np.int64], list[Point], dict[str, Any]]]:
    """The best owners (m,) so far, the trajectory of costs since `began` and what was done, after each round.

    One round from each hot temperature, then longer ones from the temperature that did best: one, or as many as the
    limit allows. Deterministic without a limit.
    """
    deadline = Deadline(time_limit)
    annealing = _annealing(problem, hypergraph, start, seed, began)
    proposals = max(1, int(_PROPOSALS_PER_NEURON * problem.m / annealing.effort))
    reached: dict[float, float] = {}
    rounds = 0

    def answer() -> tuple[NDArray[np.int64], list[Point], dict[str, Any]]:
        stats = {"rounds": rounds, "proposals": annealing.done}
        return annealing.best_owner, annealing.incumbents.points, stats

    for hot in _HOT:
        share = None if time_limit is None else _EXPLORED * time_limit
        reached[hot] = annealing.cool(hot, proposals, share)
        rounds += 1
        yield answer()
    hot = min(reached, key=lambda tried: reached[tried])
    while not deadline.passed:
        proposals *= _LONGER
        annealing.cool(hot, proposals, deadline.remaining)
        rounds += 1
        yield answer()
        if time_limit is None:
            break


def _annealing(
    problem: LayerProblem, hypergraph: Hypergraph, start: NDArray[np.int64], seed: int, began: float | None = None
) -> _Annealing:
    if not hypergraph.keeps_all:
        return _Energies(problem, hypergraph, start, seed, began)
    return (_Nets if hypergraph.communication == "total" else _Busiest)(problem, hypergraph, start, seed, began)


class _Annealing(ABC):
    """The state of a search: owners, loads, and what a kernel keeps up to date beside them."""

    effort: float = 1
    """By how much fewer proposals a round has, since each costs more."""
    chunk = 1 << 16
    """Proposals between two looks at the clock: milliseconds."""
    knows_cost = True
    """Whether what it minimises is the hypergraph's cost; if not, incumbents are scored after each round only."""

    def __init__(
        self, problem: LayerProblem, hypergraph: Hypergraph, start: NDArray[np.int64], seed: int, began: float | None
    ) -> None:
        self.problem, self.hypergraph = problem, hypergraph
        self.incumbents = Incumbents(began)
        self.incumbents.add(hypergraph.cost(start))
        m, P = problem.m, problem.P
        self.fixed = np.zeros((m, P)) if hypergraph.fixed_cost is None else hypergraph.fixed_cost
        unit, slack = problem.load.mean(), 1e-9 * problem.m
        self.load_of_neuron = problem.load / unit
        self.limits = (self.load_of_neuron, problem.capacity / unit + slack, problem.min_load / unit - slack)
        self.state = np.random.default_rng(seed).integers(1, 2**63, 1, dtype=np.uint64)
        self.best_owner = start.astype(np.int64)
        self.best = np.inf
        self.done = 0
        self.rate: float | None = None

    @property
    @abstractmethod
    def typical(self) -> float:
        """What a transfer typically costs: the unit of temperature."""

    @abstractmethod
    def reset(self) -> float:
        """Fill the tables for `owner`; its cost."""

    @abstractmethod
    def run(self, cost: float, least: float, steps: int, temperature: float, strictness: float) -> tuple[float, float]:
        """(cost, least cost) after this many proposals; `strictness` is what a unit of squared excess load counts."""

    def cool(self, hot: float, proposals: int, allowed: float | None) -> float:
        """One round: from hot to cold over the proposals, or over the seconds allowed if that is shorter.

        Begins at the best owners; gives the least cost that this round met within the limits of the loads.
        """
        began = time.monotonic()
        if allowed is not None and self.rate is not None and allowed * self.rate < (1 + _LONGER) / 2 * proposals:
            proposals = max(proposals, int(2 * allowed * self.rate))  # the last round: it takes all the time left
        self.owner, self.incumbent = self.best_owner.copy(), self.best_owner.copy()
        self.load = np.bincount(self.owner, self.load_of_neuron, self.problem.P)
        cost, least = self.reset(), np.inf
        self.best = min(self.best, cost)
        done, progress, strictness = 0, 0.0, 1.0
        steps = max(1, min(self.chunk, proposals // _STEPS_OF_TEMPERATURE))
        while progress < 1.0:
            temperature = self.typical * hot * (_COLD / hot) ** progress
            cost, least = self.run(cost, least, steps, temperature, strictness)
            if self.knows_cost:
                self.incumbents.add(least)
            is_loose = self.excess > _EXCESS * self.problem.P * (1 - progress)
            strictness = max(_STRICTEST**progress, strictness * (_STRICTER if is_loose else 1 / _STRICTER))
            done += steps
            elapsed = time.monotonic() - began
            progress = max(done / proposals, 0.0 if allowed is None else elapsed / max(allowed, 1e-9))
        self.rate = done / max(elapsed, 1e-9)
        self.done += done
        if least < self.best:
            self.best, self.best_owner = least, self.incumbent
            if not self.knows_cost:
                self.incumbents.add(self.hypergraph.cost(self.best_owner))
        return least

    @property
    def excess(self) -> float:
        """Σ over workers of the squared load outside its limits, in neurons."""
        _, most, least = self.limits
        return float(np.square(np.maximum(0.0, np.maximum(self.load - most, least - self.load))).sum())


class _Nets(_Annealing):
    """`Lossless`: prices of nets; gains of all neurons and workers in tables, so that a refusal is O(1)."""

    @cached_property
    def typical(self) -> float:
        return _typical(self.hypergraph.price)

    @cached_property
    def effort(self) -> float:  # type: ignore[override]
        """An accepted move looks at the readers of each of a neuron's values."""
        readers = self.hypergraph.pins.nnz / self.problem.m * self.hypergraph.pins.nnz / self.problem.n
        return max(1.0, readers / _CHEAP_READERS)

    def reset(self) -> float:
        self.pins, self.nets = _adjacency(self.hypergraph.pins), _adjacency(self.hypergraph.pins.T)
        held = self.hypergraph.pins.T @ np.eye(self.problem.P)[self.owner]
        self.count = np.asarray(held).astype(np.int32)
        self.leave = np.zeros(self.problem.m)
        self.enter = np.where(self.problem.allowed, 0.0, np.inf)
        self.mark = np.zeros(self.problem.n + 1, dtype=np.int64)
        kernels().gains(*self.pins, self.hypergraph.price, self.fixed, self.owner, self.count, self.leave, self.enter)
        return self.hypergraph.cost(self.owner)

    def run(self, cost: float, least: float, steps: int, temperature: float, strictness: float) -> tuple[float, float]:
        tables = (self.count, self.leave, self.enter, self.mark)
        result: tuple[float, float] = kernels().anneal_nets(
            *self.pins, *self.nets, self.hypergraph.price, self.fixed, *self.limits, strictness,
            self.owner, self.load, *tables, self.state, cost, least, self.incumbent, steps, temperature,
        )  # fmt: skip
        return result


class _Busiest(_Annealing):
    """`Lossless` on the busiest worker: a proposal is made, judged and taken back."""

    effort = 16
    chunk = 1 << 12
    knows_cost = False

    @cached_property
    def typical(self) -> float:
        return _typical(self.hypergraph.price)

    def reset(self) -> float:
        problem, price = self.problem, self.hypergraph.price
        self.pins = _adjacency(self.hypergraph.pins)
        held = np.asarray(self.hypergraph.pins.T @ np.eye(problem.P)[self.owner])
        self.count = held.astype(np.int32)
        paid = np.where((held > 0) & problem.remote, price, 0.0)
        sent = np.bincount(problem.input_owner, paid.sum(axis=1), problem.P)
        self.traffic = np.stack([sent, paid.sum(axis=0)])
        if not hasattr(self, "evenness"):
            self.evenness = _SHARE_OF_TOTAL / (2 * problem.P * max(float(self.traffic.max()), 1e-12))
        fixed = self.fixed[np.arange(problem.m), self.owner].sum()
        return float(kernels().busiest_cost(self.traffic, self.evenness) + fixed)

    def run(self, cost: float, least: float, steps: int, temperature: float, strictness: float) -> tuple[float, float]:
        problem = self.problem
        result: tuple[float, float] = kernels().anneal_busiest(
            *self.pins, self.hypergraph.price, problem.input_owner, self.fixed, problem.allowed, *self.limits,
            strictness, self.evenness, self.owner, self.load, self.count, self.traffic, self.state, cost, least,
            self.incumbent, steps, temperature,
        )  # fmt: skip
        return result


class _Energies(_Annealing):
    """`Volume` and `Edge`: min(price, energy) for each value and worker; dense, since most layers are."""

    chunk = 1 << 9

    def __init__(
        self, problem: LayerProblem, hypergraph: Hypergraph, start: NDArray[np.int64], seed: int, began: float | None
    ) -> None:
        super().__init__(problem, hypergraph, start, seed, began)
        read = np.flatnonzero(np.diff(hypergraph.pins.tocsc().indptr))
        self.energy = np.zeros((problem.m + 1, len(read)))
        self.energy[:-1] = hypergraph.pins[:, read].toarray()
        self.price = np.ascontiguousarray(hypergraph.price[read].T)
        self.effort = max(1, len(read) // 4)

    @cached_property
    def typical(self) -> float:
        energy = self.energy.sum(axis=0) / self.problem.P
        at_stake = np.minimum(self.price, energy)
        per_neuron = at_stake.sum() / self.problem.m + np.abs(self.fixed - self.fixed.mean(axis=1)[:, None]).mean()
        return float(per_neuron) or 1.0

    def reset(self) -> float:
        self.held = np.eye(self.problem.P)[self.owner].T @ self.energy[:-1]
        return self.hypergraph.cost(self.owner)

    def run(self, cost: float, least: float, steps: int, temperature: float, strictness: float) -> tuple[float, float]:
        result: tuple[float, float] = kernels().anneal_energies(
            self.energy, self.price, self.fixed, self.problem.allowed, *self.limits, strictness,
            self.owner, self.load, self.held, self.state, cost, least, self.incumbent, steps, temperature,
        )  # fmt: skip
        return result


def _adjacency(matrix: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts, indices) of a sparse matrix's rows."""
    rows = matrix.tocsr()
    return rows.indptr.astype(np.int64), rows.indices.astype(np.int64)


def _typical(price: NDArray[np.float64]) -> float:
    paid = price[price > 0]
    return float(paid.mean()) if paid.size else 1.0
