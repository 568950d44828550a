"""Identical neurons: those that cost the same on every worker, whatever the others do, and may take the same places.

Where they are on one worker they share all that is sent. Merged, they are one vertex, so that a partitioner sees a
smaller problem; but heavy vertices fit worse into tight capacities, so that a group has a largest load.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem


def twin_groups(problem: LayerProblem, hypergraph: Hypergraph, most_load: float) -> NDArray[np.int64]:
    """(m,) group of each neuron, numbered without gaps; a group of two or more weighs `most_load` at most. O(pins).

    Neurons without pins stay alone: they are what fills up the workers.
    """
    pins = sparse.csr_array(hypergraph.pins, copy=True)
    pins.sort_indices()
    start = pins.indptr
    fixed = np.zeros((problem.m, 0)) if hypergraph.fixed_cost is None else hypergraph.fixed_cost
    group = np.empty(problem.m, dtype=np.int64)
    open_group: dict[tuple[bytes, ...], tuple[int, float]] = {}
    count = 0
    for i, load in enumerate(problem.load):
        row = slice(start[i], start[i + 1])
        parts = (pins.indices[row], pins.data[row], problem.allowed[i], fixed[i], problem.load[i])
        kind = tuple(part.tobytes() for part in parts)
        number, held = open_group.get(kind, (count, 0.0))
        if start[i] == start[i + 1] or held + load > most_load:
            number, held = count, 0.0
        count = max(count, number + 1)
        group[i] = number
        open_group[kind] = number, held + load
    return group
