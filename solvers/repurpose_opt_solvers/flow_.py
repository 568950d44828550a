"""`flow`: the transportation problem as a min-cost flow by OR-Tools; the same optimum as `munkres`, much faster."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.problem import LayerProblem
from repurpose_opt_solvers.exact_assignment import ExactAssignment
from repurpose_opt_solvers.transport import Infeasible

_LARGEST_COST = 1e12


class Flow(ExactAssignment):
    """Exact assignment by OR-Tools' min-cost flow (equal loads): optimal for Edge, a start for the others."""

    name = "flow"
    requires: tuple[str, ...] = ("ortools",)
    resolution = 1 / _LARGEST_COST

    def assign(self, problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
        return assign_by_flow(problem, cost)


def assign_by_flow(problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """(m,) owners of least total cost (m, P), costs rounded to 1e-12 of their spread. Raises Infeasible.

    Nodes: neurons, workers, a sink. A worker absorbs its min_load itself and passes the rest on to the sink.
    """
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    m, P = problem.m, problem.P
    required = problem.min_slots
    neuron, worker = np.nonzero(problem.allowed)
    relative = cost - cost.min(axis=1, keepdims=True)
    most = relative.max()
    scaled = np.rint(relative * (_LARGEST_COST / most if most > 0 else 1.0)).astype(np.int64)
    sink = m + P
    flow = SimpleMinCostFlow()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(neuron, m + worker, np.ones_like(neuron), scaled[neuron, worker])
    spare = np.minimum(problem.slots, m) - required
    workers = m + np.arange(P)
    flow.add_arcs_with_capacity_and_unit_cost(workers, np.full(P, sink), spare, np.zeros(P, dtype=np.int64))
    supply = np.concatenate([np.ones(m, dtype=np.int64), -required, [required.sum() - m]])
    flow.set_nodes_supplies(np.arange(sink + 1), supply)
    status = flow.solve()
    if status == flow.INFEASIBLE:
        raise Infeasible("no placement satisfies capacity, min_load and allowed", proved=True)
    if status != flow.OPTIMAL:
        raise RuntimeError(f"OR-Tools' min-cost flow ended with {status.name}")
    used = flow.flows(arcs) > 0
    owner = np.empty(m, dtype=np.int64)
    owner[neuron[used]] = worker[used]
    return owner
