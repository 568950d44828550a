"""`metis`: multilevel partitioning of graphs of inputs and neurons by METIS, then an exact repair of the balance.

The graph of inputs and neurons: inputs weigh nothing and are tied to a heavy terminal of their worker, so that METIS
keeps the terminals apart; parts are named by the terminals that they hold. For `Lossless` there are more attempts,
and the one of least volume after the repair counts: the graph of neurons that share inputs, which shows what belongs
together where the inputs' places do not tell, and METIS's own communication volume (through `metis_library`). METIS
sees neither link prices nor `allowed`: the first are refused, the second is honoured by the repair.

`solve_network` places all layers at once, with one balance constraint a layer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from repurpose_opt.errors import NoSolution
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume, incidence, nets
from repurpose_opt.isolation import DeadlinePassed, call, last
from repurpose_opt.problem import LayerProblem
from repurpose_opt.repair import column_energy, value_pins
from repurpose_opt.solver import Candidate, Prune, SolveOptions, Termination
from repurpose_opt.trajectory import Incumbents
from repurpose_opt_solvers.metis_library import Graph, partition_graph
from repurpose_opt_solvers.transport import nearest_placement

_LARGEST_WEIGHT = 1000
_LARGEST_LOAD = 1000
_MOST_BY_BISECTION = 8
"""Parts up to which METIS advises recursive bisection; above, k-way."""
_EXCESS_BY_BISECTION, _EXCESS_BY_K_WAY = 1.001, 1.01
"""Load of a part over its share that METIS may leave: its ubvec, the nearest to none that it works with."""
_MOST_FOR_VOLUME = 2_000
"""Nonzeros up to which METIS's own volume objective is tried too: above, it is slow and never was the best."""
_MOST_SHARED = 5_000_000
"""Pairs of neurons and a common input, above which the graph of shared inputs is not built."""


class Metis:
    """METIS on the bipartite graph of inputs and neurons, balance repaired exactly. All three formulations."""

    name = "metis"
    requires: tuple[str, ...] = ("pymetis",)

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, (Edge, Volume, Lossless)):
            return f"no graph is known for {formulation.name}"
        if isinstance(formulation, Lossless) and formulation.sends_codes:
            return "no graph is known for the ranks of codes"
        links = problem.link_price[~np.eye(problem.P, dtype=bool)]
        return "link prices differ, METIS has one" if len(np.unique(links)) > 1 else None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        if problem.P == 1:
            return nearest_placement(problem, np.zeros(problem.m, dtype=np.int64))
        if isinstance(formulation, Lossless):
            return self._solve_lossless(problem, formulation, options, start)
        try:
            part = call(partition, graph(problem, formulation), options.seed, time_limit=options.time_limit)
        except DeadlinePassed:
            return Candidate(Termination.TIME_LIMIT, start, message="METIS was ended at the time limit")
        owner = _owner_of_part(problem, part)[part[: problem.m]]
        pruned = prune(owner)
        return nearest_placement(problem, owner, formulation.assignment_cost(problem, owner, pruned.exchange))

    def _solve_lossless(
        self, problem: LayerProblem, formulation: Lossless, options: SolveOptions, start: NDArray[np.int64] | None
    ) -> Candidate:
        began = time.monotonic()
        try:
            best, is_finished = last(search, problem, formulation, options.seed, began, time_limit=options.time_limit)
        except DeadlinePassed:
            return Candidate(Termination.TIME_LIMIT, start, message="METIS was ended at the time limit")
        found: Candidate = best
        return found if is_finished else replace(found, termination=Termination.TIME_LIMIT)

    def solve_network(
        self,
        problems: Sequence[LayerProblem],
        formulation: Formulation,
        options: SolveOptions,
        start: Sequence[NDArray[np.int64]],
    ) -> list[NDArray[np.int64]]:
        """(m,) owners of each layer, all placed at once; the balance is repaired layer by layer.

        The attempt of least volume counts. Raises NoSolution.
        """
        if problems[0].P == 1:
            return [np.zeros(problem.m, dtype=np.int64) for problem in problems]
        try:
            owners, _ = last(search_network, problems, formulation, options.seed, time_limit=options.time_limit)
        except DeadlinePassed as passed:
            raise NoSolution("METIS was ended at the time limit") from passed
        found: list[NDArray[np.int64]] = owners
        return found


@dataclass(frozen=True, eq=False)
class Attempt:
    """One call of METIS: the graph, whose first m vertices are the neurons, and what it is to minimise."""

    graph: Graph
    share: NDArray[np.float64]
    """(parts, constraints) of the vertex weights that each part is to hold; at most P parts."""
    minimise: str
    """ "cut" or "volume"."""
    recursive: bool
    """By bisection, else k-way."""

    def part(self, seed: int) -> NDArray[np.int64]:
        """(vertices,) as METIS has it: the balance is near the shares, not exact."""
        excess = _EXCESS_BY_BISECTION if self.recursive else _EXCESS_BY_K_WAY
        return partition_graph(
            self.graph,
            self.share,
            np.full(self.share.shape[1], excess),
            minimise=self.minimise,
            recursive=self.recursive,
            seed=seed,
        )


def search(problem: LayerProblem, formulation: Lossless, seed: int, began: float) -> Iterator[Candidate]:
    """After each attempt, the one of least volume after its repair so far; the trajectory from `began` on."""
    incumbents = Incumbents(began)
    hypergraph = nets(problem, formulation.communication)
    best: Candidate | None = None
    volumes: dict[str, float] = {}
    for name, attempt in attempts(problem).items():
        part = attempt.part(seed)[: problem.m]
        owner = worker_of_part(problem, part)[part]
        repaired = nearest_placement(problem, owner, formulation.assignment_cost(problem, owner, None))
        if repaired.owner is None:
            yield repaired
            return
        volume = hypergraph.cost(repaired.owner)
        if best is None or volume < min(volumes.values()):
            best = repaired
        volumes[name] = volume
        incumbents.add(volume)
        yield replace(best, stats={"volume_of_attempts": dict(volumes), "trajectory": incumbents.points})


def search_network(
    problems: Sequence[LayerProblem], formulation: Formulation, seed: int
) -> Iterator[list[NDArray[np.int64]]]:
    """After each attempt, the owners of all layers of least cost after the repair so far. Raises NoSolution."""
    least = np.inf
    owners: list[NDArray[np.int64]] = []
    for attempt in network_attempts(problems).values():
        repaired, cost = _repaired_layers(problems, formulation, attempt.part(seed))
        if cost < least:
            owners, least = repaired, cost
        yield owners


def attempts(problem: LayerProblem) -> dict[str, Attempt]:
    """The calls of METIS to make for `Lossless`, the quickest first."""
    by_inputs = graph(problem, Lossless())
    share = np.array(by_inputs["tpwgts"])[:, None]
    size = np.zeros(problem.m + problem.n + problem.P, dtype=np.int64)
    size[problem.m : problem.m + problem.n] = problem.value_bytes
    bipartite = Graph(
        by_inputs["xadj"], by_inputs["adjncy"], by_inputs["eweights"], by_inputs["vweights"][:, None], size
    )
    recursive = problem.P <= _MOST_BY_BISECTION
    found = {"cut": Attempt(bipartite, share, "cut", recursive)}
    reads = incidence(problem)
    readers = np.bincount(reads.indices, minlength=problem.n)
    if np.square(readers).sum() <= _MOST_SHARED:
        found |= _by_shared_inputs(problem, reads, readers)
    if len(found) > 1 and reads.nnz > _MOST_FOR_VOLUME:
        return found
    return found | {"volume": Attempt(bipartite, share, "volume", recursive=False)}


def _by_shared_inputs(problem: LayerProblem, reads: sparse.csr_array, readers: NDArray[np.int64]) -> dict[str, Attempt]:
    """Neurons joined by the bytes that they both read, an input's split over its pairs of readers (clique expansion).

    In "tied", neurons are joined to a terminal of each worker as well, by what they read there.
    """
    P = problem.P
    alike = _off_diagonal((reads * (problem.value_bytes / np.maximum(readers - 1, 1))) @ reads.T)
    at_home = (reads * (problem.value_bytes / np.maximum(readers, 1))) @ np.eye(P)[problem.input_owner]
    ties = sparse.csr_array(at_home - at_home.min(axis=1, keepdims=True))
    load, terminal, share = _balance(problem)
    alone = _integer_graph(alike, load)
    tied = _integer_graph(
        sparse.block_array([[alike, ties], [ties.T, None]]), np.concatenate([load, np.full(P, terminal)])
    )
    room = np.minimum(problem.capacity, problem.load.sum())
    room = room[room > 0]  # METIS has no parts without a share
    recursive = P <= _MOST_BY_BISECTION
    found = {"tied": Attempt(tied, share[:, None], "cut", recursive)}
    if 1 < len(room) <= problem.m:  # METIS divides by zero for one part, and prints for more parts than vertices
        found = {"shared": Attempt(alone, (room / room.sum())[:, None], "cut", recursive)} | found
    return found


def _off_diagonal(square: Any) -> sparse.csr_array:
    entries = sparse.coo_array(square)
    off = entries.row != entries.col
    return sparse.csr_array((entries.data[off], (entries.row[off], entries.col[off])), shape=entries.shape)


def network_attempts(problems: Sequence[LayerProblem]) -> dict[str, Attempt]:
    """All layers in one graph: the neurons of each layer in turn, then a terminal for each worker.

    Neuron i is joined to the neurons that it reads by the bytes of their values. The first layer's inputs, and
    neurons that have one place only, are one vertex with the terminal of their worker. Each layer is a constraint of
    its own; a terminal weighs as much as a worker's neurons in each, which keeps the terminals apart.
    """
    P = problems[0].P
    begin = np.cumsum([0, *(problem.m for problem in problems)])
    terminal = begin[-1]
    vertex = [terminal + problems[0].input_owner]
    load = np.zeros((terminal + P, len(problems)))
    share = np.zeros((P, len(problems)))
    size = np.zeros(terminal + P, dtype=np.int64)
    tails, heads, weights = [], [], []
    for number, problem in enumerate(problems):
        is_pinned = problem.allowed.sum(axis=1) == 1
        own = np.where(is_pinned, terminal + problem.allowed.argmax(axis=1), begin[number] + np.arange(problem.m))
        vertex.append(own)
        reads = incidence(problem).tocoo()
        tails.append(own[reads.row])
        heads.append(vertex[number][reads.col])
        weights.append(problem.value_bytes[reads.col])
        if number > 0:
            size[vertex[number]] = np.where(vertex[number] < terminal, problem.value_bytes, 0)
        loads, of_terminal, share[:, number] = _balance(problem)
        load[own[~is_pinned], number] = loads[~is_pinned]
        load[terminal:, number] = of_terminal + np.bincount(own[is_pinned] - terminal, loads[is_pinned], P)
    tail, head, weight = np.concatenate(tails), np.concatenate(heads), np.concatenate(weights)
    apart = tail != head
    shape = (terminal + P, terminal + P)
    upper = sparse.coo_array((weight[apart].astype(float), (tail[apart], head[apart])), shape=shape)
    alone = _integer_graph((upper + upper.T).tocsr(), load)
    together = replace(alone, vertex_size=size)
    by_bisection = {"cut": Attempt(together, share, "cut", recursive=True)} if P <= _MOST_BY_BISECTION else {}
    return by_bisection | {
        "k-way": Attempt(together, share, "cut", recursive=False),
        "volume": Attempt(together, share, "volume", recursive=False),
    }


def _repaired_layers(
    problems: Sequence[LayerProblem], formulation: Formulation, part: NDArray[np.int64]
) -> tuple[list[NDArray[np.int64]], float]:
    """Valid owners of each layer, near the parts of one graph of all layers, and what they cost. Raises NoSolution."""
    P = problems[0].P
    held = np.zeros((P, P))
    held[part[-P:], np.arange(P)] = 1.0
    worker = linear_sum_assignment(held, maximize=True)[1]
    ends = np.cumsum([problem.m for problem in problems])
    owners: list[NDArray[np.int64]] = []
    objective = 0.0
    for problem, labels in zip(problems, np.split(part[:-P], ends[:-1]), strict=True):
        here = replace(problem, input_owner=owners[-1]) if owners else problem
        near = worker[labels]
        candidate = nearest_placement(here, near, formulation.assignment_cost(here, near, None))
        if candidate.owner is None:
            raise NoSolution(f"layer {len(owners)}: {candidate.message}")
        owners.append(candidate.owner)
        exchange = formulation.select(here, candidate.owner)
        objective += formulation.objective(here, candidate.owner, exchange, here.weight)
    return owners, objective


def _integer_graph(adjacency: Any, load: NDArray[np.float64]) -> Graph:
    adjacency = sparse.csr_array(adjacency)
    adjacency.eliminate_zeros()
    most = adjacency.data.max(initial=0.0) or 1.0
    weight = np.maximum(np.rint(adjacency.data / most * _LARGEST_WEIGHT), 1).astype(np.int64)
    indptr, indices = adjacency.indptr.astype(np.int64), adjacency.indices.astype(np.int64)
    return Graph(
        indptr, indices, weight, load.reshape(len(load), -1).astype(np.int64), np.ones(len(load), dtype=np.int64)
    )


def worker_of_part(problem: LayerProblem, part: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) the worker that each part of neurons stands for, at least cost.

    What is read there costs its price, and load above the capacity as much as it costs on average.
    """
    P = problem.P
    is_read = np.asarray(incidence(problem).T @ np.eye(P)[part]) > 0
    price = is_read.T @ problem.transfer_price
    excess = np.maximum(np.bincount(part, problem.load, P)[:, None] - problem.capacity, 0.0)
    return np.asarray(linear_sum_assignment(price + excess * price.sum() / problem.load.sum())[1])


def graph(problem: LayerProblem, formulation: Formulation) -> dict[str, Any]:
    """The graph in METIS's terms: neurons 0 … m−1, then inputs, then terminals, with integer weights."""
    m, n, P = problem.m, problem.n, problem.P
    ties = connection(problem, formulation).tocoo()
    most = ties.data.max(initial=0.0) or 1.0
    scaled = np.maximum(np.rint(ties.data / most * _LARGEST_WEIGHT), 1)
    tails = np.concatenate([ties.row, m + np.arange(n)])
    heads = np.concatenate([m + ties.col, m + n + problem.input_owner])
    weights = np.concatenate([scaled, np.full(n, _LARGEST_WEIGHT)]).astype(np.int64)
    upper = sparse.coo_array((weights, (tails, heads)), shape=(m + n + P, m + n + P))
    adjacency = (upper + upper.T).tocsr()
    load, terminal, share = _balance(problem)
    return {
        "xadj": adjacency.indptr.astype(np.int64),
        "adjncy": adjacency.indices.astype(np.int64),
        "eweights": adjacency.data.astype(np.int64),
        "vweights": np.concatenate([load, np.zeros(n), np.full(P, terminal)]).astype(np.int64),
        "tpwgts": list(share),
    }


def _balance(problem: LayerProblem) -> tuple[NDArray[np.float64], int, NDArray[np.float64]]:
    """Whole-numbered loads (m,), the load of a terminal, and the (P,) share of each part, terminals included."""
    load = problem.load
    if not problem.has_equal_loads:
        load = np.maximum(np.rint(load / load.max() * _LARGEST_LOAD), 1)
    else:
        load = np.ones(problem.m)
    terminal = int(np.ceil(load.sum() / problem.P)) + 2
    share = np.minimum(problem.capacity, problem.load.sum())
    target = terminal + share / share.sum() * load.sum()
    return load, terminal, target / target.sum()


def connection(problem: LayerProblem, formulation: Formulation) -> sparse.csr_array:
    """(m, n) what it saves to have neuron i beside input j: the weight of their edge."""
    if isinstance(formulation, Lossless):
        return incidence(problem).multiply(problem.value_bytes).tocsr()
    if not isinstance(formulation, Edge):
        return value_pins(problem)
    price = formulation.column_price(problem)
    columns = np.arange(problem.columns)
    at_home = price[columns, problem.column_home]
    elsewhere = price[columns, (problem.column_home + 1) % problem.P]
    energy = sparse.coo_array(column_energy(problem))
    saved = np.minimum(energy.data, elsewhere[energy.col]) - np.minimum(energy.data, at_home[energy.col])
    coordinates = (problem.row_neuron[energy.row], problem.column_value[energy.col])
    by_neuron = sparse.csr_array((saved, coordinates), shape=(problem.m, problem.n))
    by_neuron.sum_duplicates()
    by_neuron.data[by_neuron.data < 0] = 0.0
    by_neuron.eliminate_zeros()
    return by_neuron


def partition(data: dict[str, Any], seed: int) -> NDArray[np.int64]:
    """The part of each vertex. Recursive bisection up to 8 parts, k-way above, as METIS advises."""
    import pymetis

    parts = len(data["tpwgts"])
    options = pymetis.Options(seed=int(seed), ufactor=1 if parts <= _MOST_BY_BISECTION else 10)
    adjacency = pymetis.CSRAdjacency(data["xadj"], data["adjncy"])
    _, part = pymetis.part_graph(
        parts,
        adjacency,
        eweights=data["eweights"],
        vweights=data["vweights"],
        tpwgts=data["tpwgts"],
        options=options,
        recursive=parts <= _MOST_BY_BISECTION,
    )
    return np.asarray(part, dtype=np.int64)


def _owner_of_part(problem: LayerProblem, part: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) the worker that each part stands for: the assignment that keeps most inputs and terminals at home."""
    P = problem.P
    held = np.zeros((P, P))
    np.add.at(held, (part[problem.m : problem.m + problem.n], problem.input_owner), 1.0)
    np.add.at(held, (part[problem.m + problem.n :], np.arange(P)), float(problem.n + 1))
    return np.asarray(linear_sum_assignment(held, maximize=True)[1])
