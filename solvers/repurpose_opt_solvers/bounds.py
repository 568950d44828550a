"""Lower bounds on the linear model that go beyond its relaxation.

The relaxation puts a share of every neuron on every worker, which makes all neurons of a value meet everywhere at a
fraction of its price. What it misses is that a worker holds whole neurons, and as many as its load asks for. Dualising
"each neuron is on one worker" leaves a problem for each worker k that keeps just that:

    v_k(λ) = min over sets S of neurons within the limits of worker k  cost_k(S) − Σ_{i ∈ S} λ_i,
    L(λ) = Σ_i λ_i + Σ_k v_k(λ) ≤ least objective.

It is a Dantzig–Wolfe bound by worker; λ climbs by Polyak's subgradient steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog

from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import LinearModel
from repurpose_opt.solver import Deadline
from repurpose_opt_solvers.mip_engines import Effort, answers

_ROUNDS_WITHOUT_A_RISE = 4
_SHRINK = 0.6
_SMALLEST_STEP = 0.01
_DOUBT = 2e-7


@dataclass(frozen=True, eq=False)
class WorkerBound:
    """L(λ) and what it is made of."""

    bound: float
    multiplier: NDArray[np.float64]
    """λ, (m,)"""
    least: NDArray[np.float64]
    """v_k(λ) or a bound below it, (P,)"""


@dataclass(frozen=True, eq=False)
class _Worker:
    """The problem of one worker: its columns of the whole model, and a model of those alone."""

    columns: NDArray[np.int64]
    model: LinearModel

    @cached_property
    def neurons(self) -> NDArray[np.int64]:
        """Neurons of its x variables, which come first."""
        return self.model.places[:, 0]

    def priced(self, multiplier: NDArray[np.float64]) -> LinearModel:
        """Its problem with λ_i taken off the cost of neuron i."""
        cost = self.model.cost.copy()
        cost[: len(self.neurons)] -= multiplier[self.neurons]
        return replace(self.model, cost=cost)


def least_load(model: LinearModel) -> NDArray[np.float64]:
    """(P,) load that each worker holds at least: its minimum, or what does not fit on the others."""
    rows = slice(model.neurons, model.neurons + model.workers)
    load = np.zeros(model.neurons)
    load[model.places[:, 0]] = model.matrix[rows].sum(axis=0)[: len(model.places)]
    high = model.row_upper[rows]
    return np.asarray(np.maximum(model.row_lower[rows], load.sum() - (high.sum() - high)))


def spread(hypergraph: Hypergraph) -> NDArray[np.float64]:
    """(m, P) costs of neuron i on worker k whose least assignment is a bound, less the constant; O(pins · P).

    What a worker pays for a value is a concave function of the energy of its pins there, 0 at 0, so it is at least
    the chord: of all pins of value j together, E_j, each pays its share of min(price_jk, E_j), or of price_jk where
    nothing may be lost. With "busiest", the worker that sends most sends at least a P-th of the whole.
    """
    energy = np.asarray(hypergraph.pins.sum(axis=0)).ravel()
    whole = hypergraph.price if hypergraph.keeps_all else np.minimum(hypergraph.price, energy[:, None])
    whole = whole / np.maximum(energy, 1e-300)[:, None]
    if hypergraph.communication == "busiest":
        whole = whole / hypergraph.P
    cost = np.asarray(hypergraph.pins @ whole)
    return cost if hypergraph.fixed_cost is None else cost + hypergraph.fixed_cost


def relaxation(model: LinearModel) -> tuple[float, NDArray[np.float64]]:
    """The bound of the linear relaxation, and the multipliers (m,) of "each neuron is on one worker" there.

    By HiGHS's simplex through SciPy, whose dual solution is right to a tolerance of 1e-7.
    """
    m = model.neurons
    below, above = np.isfinite(model.row_upper[m:]), np.isfinite(model.row_lower[m:])
    result = linprog(
        model.cost,
        A_ub=sparse.vstack([model.matrix[m:][below], -model.matrix[m:][above]]),
        b_ub=np.concatenate([model.row_upper[m:][below], -model.row_lower[m:][above]]),
        A_eq=model.matrix[:m],
        b_eq=np.ones(m),
        bounds=np.stack([model.lower, model.upper], axis=1),
    )
    if result.x is None:
        return model.constant + float(np.minimum(model.cost, 0).sum()), np.zeros(m)
    doubt = _DOUBT * max(1.0, abs(float(result.fun)))
    return model.constant + float(result.fun) - doubt, np.asarray(result.eqlin.marginals)


def worker_bounds(
    model: LinearModel, objective: float, multiplier: NDArray[np.float64], deadline: Deadline, seed: int = 0
) -> Iterator[WorkerBound]:
    """L(λ) for one λ after another, from `multiplier` (m,) on; `objective` is that of the best placement known.

    Each round solves P models of m + n variables by SCIP. For models without a budget row, which would couple the
    workers.
    """
    workers = [_worker(model, k, low) for k, low in enumerate(least_load(model))]
    best: WorkerBound | None = None
    step, stalled = 1.0, 0
    while step > _SMALLEST_STEP and not deadline.passed:
        least = np.zeros(model.workers)
        held = np.zeros(model.neurons)
        for k, worker in enumerate(workers):
            effort = Effort(seconds=deadline.remaining, seed=seed, relative_gap=0.0)
            for answer in answers("scip", worker.priced(multiplier), None, effort):
                least[k] = answer.bound
                if answer.values is not None:
                    np.add.at(held, worker.neurons, np.rint(answer.values[: len(worker.neurons)]))
        found = WorkerBound(model.constant + float(multiplier.sum() + least.sum()), multiplier, least)
        if best is None or found.bound > best.bound:
            best, stalled = found, 0
        else:
            stalled += 1
        if np.isfinite(found.bound):
            yield found
        missing = 1 - held
        if not missing.any() or deadline.passed:
            return
        if stalled == _ROUNDS_WITHOUT_A_RISE:
            step, stalled, multiplier = step * _SHRINK, 0, best.multiplier
        length = step * max(objective - found.bound, 1e-3 * abs(objective)) / (missing**2).sum()
        multiplier = multiplier + length * missing


def with_worker_cuts(model: LinearModel, found: WorkerBound) -> LinearModel:
    """The model with cost_k − Σ_i λ_i x_ik ≥ v_k(λ) for each worker, which lifts its relaxation to L(λ)."""
    rows = np.zeros((model.workers, len(model.cost)))
    for k in range(model.workers):
        columns = _columns(model, k)
        rows[k, columns] = model.cost[columns]
    neuron, worker = model.places.T
    rows[worker, np.arange(len(neuron))] -= found.multiplier[neuron]
    slack = 1e-6 * np.maximum(1.0, np.abs(found.least))
    return _with_rows(model, sparse.csr_array(rows), found.least - slack)


def _columns(model: LinearModel, worker: int) -> NDArray[np.int64]:
    """The variables that belong to one worker."""
    return np.flatnonzero(np.concatenate([model.places[:, 1], model.transfers[:, 1], model.losses[:, 2]]) == worker)


def _worker(model: LinearModel, worker: int, low: float) -> _Worker:
    columns = _columns(model, worker)
    first_link = model.neurons + model.workers
    links = model.matrix[first_link : first_link + model.links][:, columns]
    links = links[np.diff(links.indptr) > 0]
    row = model.neurons + worker
    matrix = sparse.vstack([model.matrix[[row]][:, columns], links], format="csr")
    alone = replace(
        model,
        cost=model.cost[columns],
        constant=0.0,
        matrix=matrix,
        row_lower=np.concatenate([[low], np.full(links.shape[0], -np.inf)]),
        row_upper=np.concatenate([[model.row_upper[row]], np.zeros(links.shape[0])]),
        lower=model.lower[columns],
        upper=model.upper[columns],
        is_integer=model.is_integer[columns],
        places=model.places[model.places[:, 1] == worker],
        transfers=model.transfers[model.transfers[:, 1] == worker],
        losses=model.losses[model.losses[:, 2] == worker],
        neurons=0,
        workers=1,
        links=links.shape[0],
    )
    return _Worker(columns, alone)


def with_degree_cuts(model: LinearModel, pins: sparse.csr_array, load: NDArray[np.int64]) -> LinearModel:
    """The model with Σ_k y_jk ≥ r_j: the workers that the readers of value j need beside the one that holds it.

    r_j is the least number of other workers, of the largest capacities, that hold what does not fit on its own. For
    models in which nothing may be lost; `pins` (m, n) and the whole loads (m,) are those that it was made of.
    """
    high = model.row_upper[model.neurons : model.neurons + model.workers]
    value, worker = model.transfers.T
    n = pins.shape[1]
    is_remote = np.zeros((n, model.workers), dtype=bool)
    is_remote[value, worker] = True
    to_hold = np.asarray(pins.astype(bool).T @ load) - np.where(is_remote, 0.0, high).sum(axis=1)
    room = np.cumsum(-np.sort(-np.where(is_remote, high, 0.0), axis=1), axis=1)
    needed = (room < to_hold[:, None]).sum(axis=1) + (to_hold > 0)
    needed = np.minimum(needed, is_remote.sum(axis=1))
    useful = np.flatnonzero(needed > 0)
    number = np.full(n, -1)
    number[useful] = np.arange(len(useful))
    there = number[value] >= 0
    columns = len(model.places) + np.flatnonzero(there)
    shape = (len(useful), len(model.cost))
    rows = sparse.csr_array((np.ones(there.sum()), (number[value[there]], columns)), shape=shape)
    return _with_rows(model, rows, needed[useful].astype(np.float64))


def with_order(model: LinearModel, alike: NDArray[np.int64]) -> LinearModel:
    """The model with the owners of neurons that are alike in ascending order; `alike` (m,) numbers their classes."""
    neuron, worker = model.places.T
    order = np.argsort(alike, kind="stable")
    same = np.flatnonzero(alike[order[1:]] == alike[order[:-1]])
    first, second = order[same], order[same + 1]
    by_neuron = sparse.csr_array(
        (worker.astype(np.float64), (neuron, np.arange(len(neuron)))), shape=(model.neurons, len(model.cost))
    )
    return _with_rows(model, (by_neuron[second] - by_neuron[first]).tocsr(), np.zeros(len(same)))


def _with_rows(model: LinearModel, rows: sparse.csr_array, lower: NDArray[np.float64]) -> LinearModel:
    return replace(
        model,
        matrix=sparse.vstack([model.matrix, rows], format="csr"),
        row_lower=np.concatenate([model.row_lower, lower]),
        row_upper=np.concatenate([model.row_upper, np.full(len(lower), np.inf)]),
    )
