"""METIS's graph format: neurons, inputs and terminals, with the block weights that gpmetis reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formats.common import LARGEST_SUM, Written, beside, vertex_loads, write_lines
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import common_unit
from repurpose_opt.problem import LayerProblem

_TERMINAL_SHARES = 10
"""Weight of a terminal, in mean loads. With 1 or 2, METIS 5.1 often puts two into one block."""
_HEAVIEST_EDGE = 100
"""METIS 5.1 gives balance up where edges weigh more than vertices, so that loads are scaled up to this as well."""


def write_metis(path: Path | str, problem: LayerProblem, hypergraph: Hypergraph) -> Written:
    """The placement problem as a graph with weights of edges and vertices; its cut only stands in for the objective.

    Vertices: neurons 0 … m−1, inputs (weight 0), then a heavy terminal for each worker (numbered from 1 in the file).
    An edge of neuron and input weighs what it saves to have both on one worker, in steps of a hundredth of the
    dearest; an input is tied to the terminal of its worker by the weight of the dearest. METIS fixes no vertices: their
    weight keeps the terminals apart, as a rule, and `read_partition` names the blocks by them.

    path           the graph, with comments only at the top
    path.tpwgts    a line for each block: the share of the weight that it is meant to get

    `allowed` and min_load are left out. O(pins + m P). Raises InvalidArgument as `edges` does, OSError.
    """
    path = Path(path)
    m, n, P = problem.m, problem.n, problem.P
    upper = edges(problem, hypergraph)
    upper.data = _edge_weights(upper.data)
    adjacency = (upper + upper.T).tocsr()
    adjacency.sort_indices()
    load, capacity = vertex_loads(problem, LARGEST_SUM // (2 * _TERMINAL_SHARES))
    finer = -(-int(upper.data.max()) * m // int(load.sum()))
    load, capacity = load * finer, capacity * finer
    terminal = -(-int(load.sum()) // P) * _TERMINAL_SHARES
    share = np.minimum(capacity, load.sum())
    target = terminal + share / share.sum() * load.sum()
    targets = beside(path, ".tpwgts")
    left_out = ("allowed",) * (not problem.allowed.all()) + ("min_load",) * bool((problem.min_load > 0).any())
    size = {"vertices": m + n + P, "edges": adjacency.nnz // 2}
    written = Written((path, targets), size, is_exact=False, unit=None, left_out=left_out)
    vertex_weight = np.concatenate([load, np.zeros(n, dtype=np.int64), np.full(P, terminal)])
    write_lines(path, _lines(problem, written, adjacency, vertex_weight))
    write_lines(targets, (f"{k} = {part:.9f}" for k, part in enumerate(target / target.sum())))
    return written


def edges(problem: LayerProblem, hypergraph: Hypergraph) -> Any:
    """(V, V) coo_array, V = m + n + P, of weights > 0 above the diagonal, in the unit of the hypergraph's costs.

    Raises InvalidArgument for infinite prices where nothing may be lost.
    """
    m, n, P = problem.m, problem.n, problem.P
    price = hypergraph.price.sum(axis=1) / max(P - 1, 1)  # the worker that holds a value pays nothing
    if hypergraph.keeps_all and not np.isfinite(price).all():
        raise InvalidArgument("hypergraph", "an infinite price where nothing may be lost", "finite prices")
    pins = hypergraph.pins.tocoo()
    saved = price[pins.col] if hypergraph.keeps_all else np.minimum(pins.data, price[pins.col])
    fixed = np.zeros((m, P)) if hypergraph.fixed_cost is None else hypergraph.fixed_cost
    of_neuron = sparse.coo_array(fixed.max(axis=1, keepdims=True) - fixed)
    tails = np.concatenate([pins.row, of_neuron.row, m + np.arange(n)])
    heads = np.concatenate([m + pins.col, m + n + of_neuron.col, m + n + problem.input_owner])
    tie = saved.max(initial=0.0) or of_neuron.data.max(initial=0.0) or 1.0
    weights = np.concatenate([saved, of_neuron.data, np.full(n, tie)])
    there = weights > 0
    return sparse.coo_array((weights[there], (tails[there], heads[there])), shape=(m + n + P, m + n + P))


def _edge_weights(saved: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole weights from 1 to at most `_HEAVIEST_EDGE`: without rounding where that is possible."""
    unit = common_unit(saved)
    if unit is None or saved.max() / unit > _HEAVIEST_EDGE:
        unit = saved.max() / _HEAVIEST_EDGE
    return np.maximum(np.rint(saved / unit), 1).astype(np.int64)


def _lines(problem: LayerProblem, written: Written, adjacency: Any, vertex_weight: NDArray[np.int64]) -> Iterator[str]:
    yield f"% {problem.m} neurons, {problem.n} inputs, then the terminals of {problem.P} workers"
    yield "% the cut stands in for the objective; block weights are in the file beside"
    if written.left_out:
        yield f"% not in these files: {', '.join(written.left_out)}"
    yield f"{written.size['vertices']} {written.size['edges']} 011"
    pairs = np.stack([adjacency.indices + 1, adjacency.data], axis=1)
    starts = adjacency.indptr.tolist()
    for vertex, weight in enumerate(vertex_weight.tolist()):
        yield " ".join(map(str, [weight, *pairs[starts[vertex] : starts[vertex + 1]].ravel().tolist()]))
