"""Lossless placement as hypergraph partitioning with fixed terminals, for the backends that wrap a partitioner.

The vertices are the m neurons, then one terminal of weight 1 for each worker that can take a neuron, fixed to its
block. A value is a net of its readers and the terminal of the worker that holds it, so that it pays its price for
each further block that reads it: connectivity λ−1. A worker without a block has no terminal: what it holds is sent
to every block that reads it, which is λ−1 and a constant.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import metrics
from repurpose_opt.formulation import Formulation
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.isolation import DeadlinePassed, last
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, SolveOptions, Termination
from repurpose_opt.trajectory import Incumbents
from repurpose_opt_solvers.transport import Infeasible, assign, nearest_placement
from repurpose_opt_solvers.twins import twin_groups

_LARGEST_SUM = 2**30
"""Of integer weights, which the libraries add up in 32 bits."""

_SHARE_OF_SEARCH = 0.97
"""Of the time limit; the rest is for handing the problem over and for verifying the answer."""
_NO_LIMIT = 1e9
"""Seconds."""
_GROUPS_OF_A_WORKER = 8
"""Merged groups that the smallest worker has room for, at least."""

_NO_PARTITION = "no partition within the time limit"

Parts = NDArray[np.int64]


class Engine(Protocol):
    """A partitioner that can be pickled; it loads its library where it is called."""

    def partitions(
        self, terminals: TerminalHypergraph, turn: int, seed: int, start: Parts | None
    ) -> Iterator[tuple[Parts, int]]:
        """One partition and its improvements: (V,) block of each vertex, and λ−1 as the library counts it.

        It begins at the blocks of `start` if it can. `turn` counts the partitions of this hypergraph.
        """
        ...


@dataclass(frozen=True, eq=False)
class TerminalHypergraph:
    """Nets over V vertices, neurons and K terminals, in integers as the libraries want them."""

    start: NDArray[np.int64]
    """(nets + 1,) where the pins of each net begin."""
    pin: NDArray[np.int64]
    """(pins,) vertices of the nets, one net after the other; each net has two or more."""
    net_weight: NDArray[np.int64]
    """(nets,)"""
    vertex_weight: NDArray[np.int64]
    """(V,) loads; 1 for a terminal."""
    fixed_block: NDArray[np.int64]
    """(V,) block that a vertex must be in, −1 for any."""
    block_weight: NDArray[np.int64]
    """(K,) the most that a block may weigh, its terminal included."""
    worker: NDArray[np.int64]
    """(K,) worker of each block."""
    vertex: NDArray[np.int64]
    """(m,) vertex of each neuron; merged neurons share one."""

    def nets(self) -> list[list[int]]:
        """The vertices of each net."""
        pins, ends = self.pin.tolist(), self.start.tolist()
        return [pins[begin:end] for begin, end in pairwise(ends)]

    def owner(self, parts: Parts) -> NDArray[np.int64]:
        """(m,) owners for the block of each vertex."""
        return self.worker[parts[self.vertex]]

    def parts(self, owner: NDArray[np.int64]) -> Parts:
        """(V,) block of each vertex for owners that all have a block."""
        parts = self.fixed_block.copy()
        parts[self.vertex] = np.searchsorted(self.worker, owner)
        return parts

    def merged(self, group: NDArray[np.int64]) -> TerminalHypergraph:
        """The same with a vertex for each group (m,) of neurons that have the same nets; only for unmerged neurons."""
        K, count = len(self.worker), int(group.max()) + 1
        number = np.concatenate([group, count + np.arange(K)])
        nets = np.repeat(np.arange(len(self.net_weight)), np.diff(self.start))
        members = sparse.coo_array((np.ones(len(nets)), (number[self.pin], nets)), (count + K, len(self.net_weight)))
        members = members.tocsc()
        several = np.flatnonzero(np.diff(members.indptr) > 1)
        members = members[:, several]
        fixed = np.empty(count + K, dtype=np.int64)
        fixed[number] = self.fixed_block
        return replace(
            self,
            start=members.indptr.astype(np.int64),
            pin=members.indices.astype(np.int64),
            net_weight=self.net_weight[several],
            vertex_weight=np.bincount(number, self.vertex_weight).astype(np.int64),
            fixed_block=fixed,
            vertex=group,
        )

    def relabelled(self, rng: np.random.Generator) -> TerminalHypergraph:
        """The same with vertices and nets in random order: what makes partitioners with a fixed seed differ."""
        number = rng.permutation(len(self.vertex_weight))
        order = rng.permutation(len(self.net_weight))
        pins = sparse.csr_array((np.ones(len(self.pin)), number[self.pin], self.start), shape=(len(order), len(number)))
        pins = pins[order]
        old = np.argsort(number)
        return replace(
            self,
            start=pins.indptr.astype(np.int64),
            pin=pins.indices.astype(np.int64),
            net_weight=self.net_weight[order],
            vertex_weight=self.vertex_weight[old],
            fixed_block=self.fixed_block[old],
            vertex=number[self.vertex],
        )


def reason_against(problem: LayerProblem, formulation: Formulation) -> str | None:
    """Why a problem is not of this form, or None."""
    hypergraph = formulation.hypergraph(problem)
    if hypergraph is None or not hypergraph.keeps_all or hypergraph.communication != "total":
        return "only a sum of prices with nothing pruned (Lossless, communication total) is connectivity"
    least, most = _price_range(problem, hypergraph)
    return "prices from one worker to the others differ, and a net has one weight" if (least < most).any() else None


def terminal_hypergraph(problem: LayerProblem, hypergraph: Hypergraph) -> TerminalHypergraph:
    """The hypergraph with terminals. A neuron with one place is fixed to it; O(pins + m P)."""
    worker = _workers_with_block(problem)
    m, K = problem.m, len(worker)
    block = np.full(problem.P, -1)
    block[worker] = np.arange(K)
    home = block[problem.input_owner]
    held = np.flatnonzero(home >= 0)
    terminals = sparse.csr_array((np.ones(len(held)), (home[held], held)), shape=(K, problem.n))
    members = sparse.vstack([hypergraph.pins, terminals]).tocsc()
    price = _price_range(problem, hypergraph)[1]
    if hypergraph.fixed_cost is not None:  # what a neuron saves on a worker is a net of it and the terminal
        saved = hypergraph.fixed_cost[:, worker].max(axis=1, keepdims=True) - hypergraph.fixed_cost[:, worker]
        neuron, chosen = np.nonzero(saved)
        ends = np.stack([neuron, m + chosen], axis=1).ravel()
        pairs = sparse.csc_array((np.ones(len(ends)), ends, np.arange(0, len(ends) + 1, 2)), (m + K, len(neuron)))
        members = sparse.hstack([members, pairs]).tocsc()
        price = np.concatenate([price, saved[neuron, chosen]])
    paid = np.flatnonzero((np.diff(members.indptr) > 1) & (price > 0))
    members = members[:, paid]
    fixed = np.full(m, -1)
    choices = problem.allowed[:, worker]
    single = choices.sum(axis=1) == 1
    fixed[single] = choices[single].argmax(axis=1)
    load, room = _whole_loads(problem, worker)
    return TerminalHypergraph(
        start=members.indptr.astype(np.int64),
        pin=members.indices.astype(np.int64),
        net_weight=_whole_numbers(price[paid], _LARGEST_SUM // K),
        vertex_weight=np.concatenate([load, np.ones(K, dtype=np.int64)]),
        fixed_block=np.concatenate([fixed, np.arange(K)]),
        block_weight=room + 1,
        worker=worker,
        vertex=np.arange(m),
    )


def solve_by_repeats(
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions,
    start: NDArray[np.int64] | None,
    engine: Engine,
) -> Candidate:
    """The best of `repeats`, in a child process that is ended at the time limit.

    Without a limit in a child too: the libraries may end their process, and Mt-KaHyPar's answers depend on what was
    solved in it before, whatever the seed.
    """
    began = time.monotonic()
    worker = _workers_with_block(problem)
    if len(worker) <= 1:
        return nearest_placement(problem, np.full(problem.m, worker.max(initial=0)))
    hypergraph = formulation.hypergraph(problem)
    assert hypergraph is not None
    limit = _NO_LIMIT if options.time_limit is None else _SHARE_OF_SEARCH * options.time_limit
    try:
        candidate, is_finished = last(repeats, problem, hypergraph, options, start, engine, began, time_limit=limit)
    except DeadlinePassed:
        return Candidate(Termination.TIME_LIMIT, start, message=_NO_PARTITION)
    assert isinstance(candidate, Candidate)
    return candidate if is_finished else replace(candidate, termination=Termination.TIME_LIMIT)


def repeats(
    problem: LayerProblem,
    hypergraph: Hypergraph,
    options: SolveOptions,
    start: NDArray[np.int64] | None,
    engine: Engine,
    began: float | None = None,
) -> Iterator[Candidate]:
    """The best placement so far, its balance repaired: partitions without end if there is a time limit, else one.

    The first partition begins at `start`. Each sees vertices and nets in another order, drawn from options.seed.
    Under a time limit without a start, the cheapest placement by itself is there while there is no partition.
    `began` is when the trajectory begins, on `time.monotonic()`; now by default.
    """
    incumbents = Incumbents(began)
    best: Candidate | None = None
    least = np.inf
    if start is not None:
        best = Candidate(Termination.HEURISTIC, start)
    elif options.time_limit is not None:
        best = _cheapest(problem, hypergraph)
        if best.owner is None:
            yield best
            return
    if best is not None:
        assert best.owner is not None
        least = hypergraph.cost(best.owner)
        incumbents.add(least)
        yield replace(best, message=_NO_PARTITION, stats={"repeats": 0, "trajectory": incumbents.points})
    variants = _variants(problem, hypergraph)
    for repeat in count() if options.time_limit is not None else range(1):
        rng = np.random.default_rng([options.seed, repeat])
        turn, which = divmod(repeat, len(variants))
        if start is not None and repeat == 0:
            terminals = variants[-1].relabelled(rng)
            begin = terminals.parts(start)
        else:
            terminals, begin = variants[which].relabelled(rng), None
        for parts, claimed in engine.partitions(terminals, turn, int(rng.integers(2**31)), begin):
            found = _repaired(problem, hypergraph, terminals.owner(parts))
            if found.owner is not None and (cost := hypergraph.cost(found.owner)) < least:
                best, least = replace(found, stats={"claimed_km1": claimed}), cost
                incumbents.add(cost)
            if best is None:  # infeasible, or no balance was found
                yield found
            else:
                told = {"repeats": repeat + 1, "trajectory": incumbents.points}
                best = replace(best, stats={**best.stats, **told})
                yield best
        if found.termination is Termination.INFEASIBLE:
            return


def _variants(problem: LayerProblem, hypergraph: Hypergraph) -> list[TerminalHypergraph]:
    """The hypergraph with terminals, and with identical neurons merged if that removes half of its vertices.

    With eight copies of each of 128 neurons it lowered λ−1 by 7 %; with copies of a tenth of the neurons it raised it.
    """
    terminals = terminal_hypergraph(problem, hypergraph)
    group = twin_groups(problem, hypergraph, problem.capacity[terminals.worker].min() / _GROUPS_OF_A_WORKER)
    return [terminals.merged(group), terminals] if 2 * (group.max() + 1) <= problem.m else [terminals]


def _cheapest(problem: LayerProblem, hypergraph: Hypergraph) -> Candidate:
    """The placement of least cost where neurons share nothing."""
    alone = np.asarray(hypergraph.pins @ hypergraph.price)
    try:
        return Candidate(Termination.HEURISTIC, assign(problem, _with_fixed_cost(hypergraph, alone)))
    except Infeasible as reason:
        return reason.candidate()


def _repaired(problem: LayerProblem, hypergraph: Hypergraph, owner: NDArray[np.int64]) -> Candidate:
    """The owners if they are valid, else the valid ones nearest to them, the cheapest of those by what is shared."""
    if not metrics.placement_violations(problem, owner):
        return Candidate(Termination.HEURISTIC, owner)
    readers = np.asarray(hypergraph.pins.T @ np.eye(problem.P)[owner])
    cost = _with_fixed_cost(hypergraph, np.asarray(hypergraph.pins @ (hypergraph.price / (1 + readers))))
    return nearest_placement(problem, owner, cost)


def _with_fixed_cost(hypergraph: Hypergraph, cost: NDArray[np.float64]) -> NDArray[np.float64]:
    return cost if hypergraph.fixed_cost is None else cost + hypergraph.fixed_cost


def _workers_with_block(problem: LayerProblem) -> NDArray[np.int64]:
    """Workers that can take a neuron."""
    has_room = problem.capacity >= problem.load.min() * (1 - metrics.TOLERANCE)
    return np.flatnonzero(has_room & problem.allowed.any(axis=0))


def _price_range(problem: LayerProblem, hypergraph: Hypergraph) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n,) least and greatest price of sending each value to a worker with a block; both 0 if there is none."""
    worker = _workers_with_block(problem)
    is_remote = problem.input_owner[:, None] != worker
    price = hypergraph.price[:, worker]
    most = np.where(is_remote, price, 0.0).max(axis=1, initial=0.0)
    return np.where(is_remote, price, most[:, None]).min(axis=1, initial=np.inf), most


def _whole_loads(problem: LayerProblem, worker: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(m,) loads and (K,) capacities in whole numbers, that hold the loads in all."""
    load = _whole_numbers(problem.load, _LARGEST_SUM)
    unit = problem.load.sum() / load.sum()
    room = np.floor(np.minimum(problem.capacity[worker], problem.load.sum()) / unit * (1 + metrics.TOLERANCE))
    missing = max(0.0, load.sum() - room.sum())  # by rounding, or because a worker can take none
    return load, (room + np.ceil(missing / len(worker))).astype(np.int64)


def _whole_numbers(amounts: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Whole numbers ≥ 1 in proportion to positive amounts: exact if all are multiples of the least; sum near `most`."""
    multiples = amounts / amounts.min(initial=np.inf)
    if not np.allclose(multiples, np.rint(multiples), rtol=0, atol=1e-9) or multiples.sum() > most:
        multiples = amounts / amounts.sum() * most
    return np.maximum(np.rint(multiples), 1).astype(np.int64)
