"""`metis`: multilevel partitioning of the graph of inputs and neurons by pymetis, then an exact repair of the balance.

Inputs weigh nothing and are tied to a heavy terminal of their worker, so that METIS keeps the terminals apart; parts
are named by the terminals that they hold. METIS sees neither link prices nor `allowed`: the first are refused, the
second is honoured by the repair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume, incidence
from repurpose_opt.isolation import DeadlinePassed, call
from repurpose_opt.problem import LayerProblem
from repurpose_opt.repair import column_energy
from repurpose_opt.solver import Candidate, Prune, SolveOptions, Termination
from repurpose_opt_solvers.transport import nearest_placement

_LARGEST_WEIGHT = 1000
_LARGEST_LOAD = 1000


class Metis:
    """METIS on the bipartite graph of inputs and neurons, balance repaired exactly. All three formulations."""

    name = "metis"
    requires: tuple[str, ...] = ("pymetis",)

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, (Edge, Volume, Lossless)):
            return f"no graph is known for {formulation.name}"
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
        try:
            part = call(partition, graph(problem, formulation), options.seed, time_limit=options.time_limit)
        except DeadlinePassed:
            return Candidate(Termination.TIME_LIMIT, start, message="METIS was ended at the time limit")
        owner = _owner_of_part(problem, part)[part[: problem.m]]
        pruned = prune(owner)
        return nearest_placement(problem, owner, formulation.assignment_cost(problem, owner, pruned.exchange))


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
    load = problem.load
    if not problem.has_equal_loads:
        load = np.maximum(np.rint(load / load.max() * _LARGEST_LOAD), 1)
    else:
        load = np.ones(m)
    terminal = int(np.ceil(load.sum() / P)) + 2
    share = np.minimum(problem.capacity, problem.load.sum())
    target = terminal + share / share.sum() * load.sum()
    return {
        "xadj": adjacency.indptr.astype(np.int64),
        "adjncy": adjacency.indices.astype(np.int64),
        "eweights": adjacency.data.astype(np.int64),
        "vweights": np.concatenate([load, np.zeros(n), np.full(P, terminal)]).astype(np.int64),
        "tpwgts": list(target / target.sum()),
    }


def connection(problem: LayerProblem, formulation: Formulation) -> sparse.csr_array:
    """(m, n) what it saves to have neuron i beside input j: the weight of their edge."""
    if isinstance(formulation, Lossless):
        return incidence(problem).multiply(problem.value_bytes).tocsr()
    if isinstance(formulation, Edge):
        price = formulation.column_price(problem)
        columns = np.arange(problem.columns)
        at_home = price[columns, problem.column_home]
        elsewhere = price[columns, (problem.column_home + 1) % problem.P]
        energy = sparse.csr_array(column_energy(problem))
        saved = np.minimum(energy.data, elsewhere[energy.indices]) - np.minimum(energy.data, at_home[energy.indices])
        energy = sparse.csr_array((saved, energy.indices, energy.indptr), shape=energy.shape)
    else:
        energy = sparse.csr_array(column_energy(problem))
    entries = energy.tocoo()
    coordinates = (problem.row_neuron[entries.row], problem.column_value[entries.col])
    by_neuron = sparse.csr_array((entries.data, coordinates), shape=(problem.m, problem.n))
    by_neuron.sum_duplicates()
    by_neuron.data[by_neuron.data < 0] = 0.0
    by_neuron.eliminate_zeros()
    return by_neuron


def partition(data: dict[str, Any], seed: int) -> NDArray[np.int64]:
    """The part of each vertex. Recursive bisection up to 8 parts, k-way above, as METIS advises."""
    import pymetis

    parts = len(data["tpwgts"])
    options = pymetis.Options(seed=seed, ufactor=1 if parts <= 8 else 10)
    adjacency = pymetis.CSRAdjacency(data["xadj"], data["adjncy"])
    _, part = pymetis.part_graph(
        parts,
        adjacency,
        eweights=data["eweights"],
        vweights=data["vweights"],
        tpwgts=data["tpwgts"],
        options=options,
        recursive=parts <= 8,
    )
    return np.asarray(part, dtype=np.int64)


def _owner_of_part(problem: LayerProblem, part: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P,) the worker that each part stands for: the assignment that keeps most inputs and terminals at home."""
    P = problem.P
    held = np.zeros((P, P))
    np.add.at(held, (part[problem.m : problem.m + problem.n], problem.input_owner), 1.0)
    np.add.at(held, (part[problem.m + problem.n :], np.arange(P)), float(problem.n + 1))
    return np.asarray(linear_sum_assignment(held, maximize=True)[1])
