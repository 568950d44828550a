"""Assignment of neurons with unequal loads: generalised assignment, NP-hard; a placement with a lower bound.

    minimise Σ c_ik x_ik   subject to   Σ_k x_ik = 1,   min_load_k ≤ Σ_i load_i x_ik ≤ capacity_k,   x binary

A neuron's load is the same on every worker, so the linear relaxation is a transportation problem of loads. Its
multipliers λ (P,) give a bound and reduced costs r_ik = c_ik + λ_k load_i − min. Its solution is rounded, repaired and
improved by moves and swaps. No better placement uses a place whose r_ik is above cost − bound: what is left is solved
as a mixed-integer program where it is small (reduced-cost fixing; Martello and Toth, Knapsack Problems, 1990, ch. 7).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from repurpose_opt.metrics import TOLERANCE
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Deadline
from repurpose_opt.trajectory import Incumbents
from repurpose_opt_solvers.transport import Assignment, Infeasible

_HIGHS_INFEASIBLE = 2
_UNITS_OF_LOAD = 2.0**28
_UNITS_OF_COST = 1e10
_HIGHS_LOAD = 3000.0
"""Total load in HiGHS's units: its absolute tolerance of 1e-6 is then below what a placement may be above."""
_HIGHS_DOUBT = 1e-8
"""Error of HiGHS's bound, relative to the largest cost."""
_PARTNERS = 48
_MOST_PASSES = 200
_PLACES_TO_BE_VALID = 1000
_NODES_TO_BE_VALID = 2000
_NODES_OF_A_PART = 50


def assign_uneven(
    problem: LayerProblem,
    cost: NDArray[np.float64],
    *,
    time_limit: float | None,
    relative_gap: float,
    node_limit: int,
    most_places: int,
) -> Assignment:
    """A placement of low total cost (m, P), and a bound. Raises Infeasible, proved or not.

    The search is over when the cost is within `relative_gap` of the bound. Integer programs are solved over ever more
    pairs of neuron and worker, those of least reduced cost first, up to `most_places` of them: only one over all that
    a better placement may use raises the bound above that of the relaxation. Each ends after `node_limit` nodes, not
    seconds, so that the same problem has the same answer on any machine unless there is a `time_limit`.
    """
    deadline = Deadline(time_limit)
    incumbents = Incumbents()
    instance = _Instance.of(problem, cost)
    shares = _relaxation(instance, deadline)
    multiplier = _multipliers(instance, shares)
    bound, reduced = _bound(instance, multiplier), _reduced(instance, multiplier)
    owner = _repaired(instance, _rounded(instance, shares, reduced), reduced, deadline)
    least = np.inf
    if instance.is_valid(owner):
        owner = _improved(instance, owner, reduced, deadline)
        least = instance.total(owner)
        incumbents.add(least)
    stats: dict[str, Any] = {"relaxation": bound, "rounded": least}
    for size in _sizes(most_places):
        is_close = np.isfinite(least) and least - bound <= relative_gap * abs(least)
        if is_close or deadline.passed:
            break
        must_be_valid = least == np.inf
        places, is_whole = _places(
            reduced, owner, least - bound, max(size, _PLACES_TO_BE_VALID) if must_be_valid else size
        )
        nodes = node_limit if is_whole else min(node_limit, _NODES_OF_A_PART)
        nodes = max(nodes, _NODES_TO_BE_VALID) if must_be_valid else nodes
        found, proved = _by_integer_program(instance, owner, places, relative_gap, nodes, deadline)
        stats |= {"places": int(places.sum()), "all_places": is_whole}
        if found is not None and instance.is_valid(found) and instance.total(found) < least:
            owner, least = found, instance.total(found)
            incumbents.add(least)
        if is_whole:  # any placement that uses another place costs at least as much
            bound = max(bound, min(proved, least))
            break
    if bound == np.inf:
        raise Infeasible("no placement satisfies capacity, min_load and allowed", proved=True)
    if least == np.inf:
        raise Infeasible("no placement of unequal loads was found", proved=False, out_of_time=deadline.passed)
    return Assignment(owner, bound, deadline.passed, stats, incumbents.points)


def _sizes(most_places: int) -> list[int]:
    """How many places the integer programs are over, one after the other."""
    return [size for size in (60, 300, 1000) if size < most_places] + [most_places]


def bound_of(problem: LayerProblem, cost: NDArray[np.float64], owner: NDArray[np.int64]) -> float:
    """A lower bound on the cost of any placement, which is that of `owner` (m,) if it is an optimal one of equal loads.

    By the multipliers of the relaxation that belong to this placement. O(m P² + P³).
    """
    instance = _Instance.of(problem, cost)
    shares = np.eye(problem.P)[owner]
    return _bound(instance, _multipliers(instance, shares))


@dataclass(frozen=True, eq=False)
class _Instance:
    """The numbers of a generalised assignment problem, limits widened by half of what metrics tolerate."""

    cost: NDArray[np.float64]
    """(m, P), ∞ where a neuron may not be."""
    load: NDArray[np.float64]
    """(m,)"""
    least: NDArray[np.float64]
    """(P,)"""
    most: NDArray[np.float64]
    """(P,)"""

    @staticmethod
    def of(problem: LayerProblem, cost: NDArray[np.float64]) -> _Instance:
        total = problem.load.sum()
        slack = 0.5 * TOLERANCE * total
        capacity, min_load = problem.capacity, problem.min_load
        if problem.has_equal_loads:  # room for whole neurons
            capacity, min_load = problem.slots * problem.load[0], problem.min_slots * problem.load[0]
        most = np.minimum(capacity, total) + slack
        fits = problem.allowed & (problem.load[:, None] <= most)
        return _Instance(np.where(fits, cost, np.inf), problem.load, np.maximum(min_load - slack, 0.0), most)

    def total(self, owner: NDArray[np.int64]) -> float:
        return float(self.cost[np.arange(len(owner)), owner].sum())

    def held(self, owner: NDArray[np.int64]) -> NDArray[np.float64]:
        return _held_load(owner, self.load, len(self.most))

    def excess(self, held: NDArray[np.float64], worker: Any = slice(None)) -> NDArray[np.float64]:
        """What loads `held` by workers are above or below what they may be."""
        return np.maximum(held - self.most[worker], 0.0) + np.maximum(self.least[worker] - held, 0.0)

    def is_valid(self, owner: NDArray[np.int64]) -> bool:
        """Whether metrics call these owners (m,) a placement."""
        beyond = 0.4 * TOLERANCE * self.load.sum()  # HiGHS may be above the widened limits by its own tolerance
        return bool((self.excess(self.held(owner)) <= beyond).all()) and bool(np.isfinite(self.total(owner)))


def _held_load(owner: NDArray[np.int64], load: NDArray[np.float64], workers: int) -> NDArray[np.float64]:
    """(workers,) load of each worker."""
    return np.asarray(np.bincount(owner, load, workers), dtype=np.float64)


# ------------------------------------------------------------------------------------------------- the relaxation


def _relaxation(instance: _Instance, deadline: Deadline) -> NDArray[np.float64]:
    """(m, P) share of each neuron on each worker in an optimum of the relaxation. Raises Infeasible."""
    if find_spec("ortools") is not None:
        return _by_flow(instance)
    return _by_linear_program(instance, deadline)


def _by_flow(instance: _Instance) -> NDArray[np.float64]:
    """The relaxation as a min-cost flow of loads by OR-Tools, loads and costs rounded to whole units."""
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    m, P = instance.cost.shape
    unit = _UNITS_OF_LOAD / instance.load.sum()
    load = np.maximum(np.rint(instance.load * unit), 1).astype(np.int64)
    rounding = m + 1  # rounded loads must not make a problem infeasible
    most = np.minimum(np.floor(instance.most * unit) + rounding, load.sum()).astype(np.int64)
    least = np.maximum(np.ceil(instance.least * unit) - rounding, 0).astype(np.int64)
    neuron, worker = np.nonzero(np.isfinite(instance.cost))
    price = ((instance.cost - instance.cost.min(axis=1, keepdims=True)) / instance.load[:, None])[neuron, worker]
    scaled = np.rint(price * (_UNITS_OF_COST / price.max() if price.max() > 0 else 1.0)).astype(np.int64)
    flow, sink = SimpleMinCostFlow(), m + P
    arcs = flow.add_arcs_with_capacity_and_unit_cost(neuron, m + worker, load[neuron], scaled)
    free = np.zeros(P, dtype=np.int64)
    flow.add_arcs_with_capacity_and_unit_cost(m + np.arange(P), np.full(P, sink), most - least, free)
    flow.set_nodes_supplies(np.arange(sink + 1), np.concatenate([load, -least, [least.sum() - load.sum()]]))
    status = flow.solve()
    if status == flow.INFEASIBLE:
        raise Infeasible("no placement satisfies capacity, min_load and allowed", proved=True)
    if status != flow.OPTIMAL:
        raise RuntimeError(f"OR-Tools' min-cost flow ended with {status.name}")
    shares = np.zeros((m, P))
    shares[neuron, worker] = flow.flows(arcs) / load[neuron]
    return shares


def _by_linear_program(instance: _Instance, deadline: Deadline) -> NDArray[np.float64]:
    """The relaxation by SciPy's HiGHS."""
    neuron, worker = np.nonzero(np.isfinite(instance.cost))
    program = _Program.of(instance, neuron, worker, np.zeros(len(instance.most)))
    result = linprog(
        program.cost,
        A_ub=sparse.vstack([program.loads, -program.loads]),
        b_ub=np.concatenate([program.most, -program.least]),
        A_eq=program.once,
        b_eq=np.ones(program.once.shape[0]),
        bounds=(0, 1),
        method="highs",
        options={} if deadline.remaining is None else {"time_limit": deadline.remaining},
    )
    if result.x is None:
        is_proved = result.status == _HIGHS_INFEASIBLE
        raise Infeasible(f"HiGHS: {result.message}", proved=is_proved, out_of_time=deadline.passed)
    shares = np.zeros(instance.cost.shape)
    shares[neuron, worker] = result.x
    return shares


def _multipliers(instance: _Instance, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """λ (P,), price of a unit of load on each worker: shortest paths over the exchanges that the shares leave open.

    In an optimum, λ_a − λ_b is at most what it costs to move a unit of load from worker a to b. A worker with room
    has λ ≤ 0, one above its min_load λ ≥ 0 (node P stands for no worker, with λ = 0). O(m P² + P³).
    """
    P = len(instance.most)
    price = instance.cost / instance.load[:, None]
    length = np.full((P + 1, P + 1), np.inf)
    for a in range(P):
        here = price[shares[:, a] > 1e-9]
        if len(here):
            length[a, :P] = (here - here[:, a : a + 1]).min(axis=0)
    held = instance.load @ shares
    margin = 1e-6 * instance.load.sum() / P
    length[P, :P] = np.where(held > instance.least + margin, 0.0, np.inf)
    length[:P, P] = np.where(held < instance.most - margin, 0.0, np.inf)
    distance = np.zeros(P + 1)
    for _ in range(P + 1):
        distance = np.minimum(distance, (distance[:, None] + length).min(axis=0))
    return distance[P] - distance[:P]


def _bound(instance: _Instance, multiplier: NDArray[np.float64]) -> float:
    """Σ_i min_k (c_ik + λ_k load_i) − Σ_k λ_k · (capacity_k, or min_load_k for λ_k < 0): valid for every λ (P,)."""
    priced = (instance.cost + multiplier * instance.load[:, None]).min(axis=1)
    paid_back = multiplier * np.where(multiplier > 0, instance.most, instance.least)
    rounding = 1e-13 * (np.abs(priced).sum() + np.abs(paid_back).sum())
    return float(priced.sum() - paid_back.sum() - rounding)


def _reduced(instance: _Instance, multiplier: NDArray[np.float64]) -> NDArray[np.float64]:
    """(m, P) reduced costs: 0 for each neuron's best place, ∞ where it may not be."""
    priced = instance.cost + multiplier * instance.load[:, None]
    return np.asarray(priced - priced.min(axis=1, keepdims=True))


# ------------------------------------------------------------------------------------------ rounding and local search


def _rounded(instance: _Instance, shares: NDArray[np.float64], reduced: NDArray[np.float64]) -> NDArray[np.int64]:
    """(m,) each neuron where the whole of it is; split ones, largest first, where there is room at least cost."""
    owner = np.argmax(shares, axis=1)
    is_split = shares.max(axis=1) < 1 - 1e-6
    held = _held_load(owner[~is_split], instance.load[~is_split], len(instance.most))
    split = np.flatnonzero(is_split)
    for i in split[np.argsort(-instance.load[split], kind="stable")]:
        above = np.maximum(held + instance.load[i] - instance.most, 0.0)
        owner[i] = np.lexsort((reduced[i], above, np.isinf(reduced[i])))[0]
        held[owner[i]] += instance.load[i]
    return owner


def _repaired(
    instance: _Instance, owner: NDArray[np.int64], reduced: NDArray[np.float64], deadline: Deadline
) -> NDArray[np.int64]:
    """Moves, or swaps where no move helps, that lower what loads are beyond their limits, cheapest a unit first.

    Ends where none is left: the loads may then still break a limit. O(m P + m²/P) a step.
    """
    owner, load, neurons = owner.copy(), instance.load, np.arange(len(owner))
    for _ in range(_MOST_PASSES + len(owner)):
        held = instance.held(owner)
        excess = instance.excess(held)
        if not excess.any() or deadline.passed:
            break
        leaving = excess[owner] - instance.excess(held[owner] - load, owner)
        fall = leaving[:, None] + excess - instance.excess(held + load[:, None])
        fall[neurons, owner] = 0.0
        move = _cheapest(reduced - reduced[neurons, owner][:, None], fall)
        if move is not None:
            owner[move[0]] = move[1]
            continue
        a = int(np.argmax(excess))
        here, there = np.flatnonzero(owner == a), np.flatnonzero(owner != a)
        b, more = owner[there], load[there] - load[here][:, None]
        fall = excess[a] + excess[b] - instance.excess(held[a] + more, a) - instance.excess(held[b] - more, b)
        rise = reduced[here][:, b] - reduced[here, a][:, None] + reduced[there, a] - reduced[there, b]
        swap = _cheapest(rise, fall)
        if swap is None:
            break
        i, j = here[swap[0]], there[swap[1]]
        owner[i], owner[j] = owner[j], owner[i]
    return owner


def _cheapest(rise: NDArray[np.float64], fall: NDArray[np.float64]) -> tuple[int, int] | None:
    """Where the rise of cost for each unit of fall is least, among finite rises with a fall."""
    possible = np.isfinite(rise) & (fall > 1e-12 * np.abs(fall).max(initial=0.0))
    if not possible.any():
        return None
    usual = float(np.median(np.abs(rise[possible])))  # so that a large fall counts even where nothing costs much
    ratio = np.where(possible, rise + usual, np.inf) / np.where(possible, fall, 1.0)
    first, second = np.unravel_index(int(np.argmin(ratio)), rise.shape)
    return int(first), int(second)


def _improved(
    instance: _Instance, owner: NDArray[np.int64], reduced: NDArray[np.float64], deadline: Deadline
) -> NDArray[np.int64]:
    """Moves and swaps of two neurons that lower the cost and keep the limits, until there is none or time is up.

    For swaps between two workers, the 48 neurons of each that lose least by it are looked at. O(m P + 48² P²) a pass.
    """
    owner, P = owner.copy(), len(instance.most)
    for _ in range(_MOST_PASSES):
        changed = _improving_moves(instance, owner)
        for a, b in combinations(range(P), 2):
            if deadline.passed:
                return owner
            changed |= _improving_swap(instance, owner, reduced, a, b)
        if not changed:
            break
    return owner


def _improving_moves(instance: _Instance, owner: NDArray[np.int64]) -> bool:
    """Makes moves that lower the cost, best first, each if it still fits; whether there was any."""
    load, held = instance.load, instance.held(owner)
    gain = instance.cost[np.arange(len(owner)), owner][:, None] - instance.cost
    gain[(held + load[:, None] > instance.most) | (held[owner] - load < instance.least[owner])[:, None]] = 0.0
    neuron, worker = np.nonzero(gain > 0)
    moved = np.zeros(len(owner), dtype=bool)
    for position in np.argsort(-gain[neuron, worker], kind="stable"):
        i, a, b = neuron[position], owner[neuron[position]], worker[position]
        if moved[i] or held[b] + load[i] > instance.most[b] or held[a] - load[i] < instance.least[a]:
            continue
        owner[i], moved[i] = b, True
        held[a] -= load[i]
        held[b] += load[i]
    return bool(moved.any())


def _improving_swap(
    instance: _Instance, owner: NDArray[np.int64], reduced: NDArray[np.float64], a: int, b: int
) -> bool:
    """Makes the swap between two workers that lowers the cost most; whether there was one."""
    ours, theirs = (_partners(reduced, owner, here, there) for here, there in ((a, b), (b, a)))
    cost, load = instance.cost, instance.load
    rise = (cost[ours, b] - cost[ours, a])[:, None] + cost[theirs, a] - cost[theirs, b]
    more = load[theirs] - load[ours][:, None]
    held = instance.held(owner)
    valid = (held[a] + more <= instance.most[a]) & (held[a] + more >= instance.least[a])
    valid &= (held[b] - more <= instance.most[b]) & (held[b] - more >= instance.least[b])
    rise = np.where(valid, rise, np.inf)
    if rise.min(initial=np.inf) >= -1e-12 * np.abs(cost[ours, a]).max(initial=0.0):
        return False
    i, j = np.unravel_index(int(np.argmin(rise)), rise.shape)
    owner[ours[i]], owner[theirs[j]] = b, a
    return True


def _partners(reduced: NDArray[np.float64], owner: NDArray[np.int64], here: int, there: int) -> NDArray[np.int64]:
    """The neurons of one worker that lose least by going to another."""
    neurons = np.flatnonzero((owner == here) & np.isfinite(reduced[:, there]))
    if len(neurons) <= _PARTNERS:
        return neurons
    loss = reduced[neurons, there] - reduced[neurons, here]
    return neurons[np.argpartition(loss, _PARTNERS)[:_PARTNERS]]


# ----------------------------------------------------------------------------------------------- the integer program


def _places(
    reduced: NDArray[np.float64], owner: NDArray[np.int64], gap: float, most_places: int
) -> tuple[NDArray[np.bool_], bool]:
    """(m, P) places that a better placement may use, and whether these are all of them.

    Each neuron's best place and its present one are among them.
    """
    possible = np.isfinite(reduced) & (reduced <= gap * (1 + 1e-9))
    others = reduced[possible & (reduced > 0)]
    is_whole = len(others) <= most_places
    if not is_whole:
        possible &= reduced <= np.partition(others, most_places)[most_places]
    neurons = np.arange(len(owner))
    possible[neurons, np.argmin(reduced, axis=1)] = True
    if np.isfinite(reduced[neurons, owner]).all():
        possible[neurons, owner] = True
    return possible, is_whole


def _by_integer_program(
    instance: _Instance,
    owner: NDArray[np.int64],
    places: NDArray[np.bool_],
    relative_gap: float,
    node_limit: int,
    deadline: Deadline,
) -> tuple[NDArray[np.int64] | None, float]:
    """The best placement within these places (m, P) that HiGHS finds, and its bound; ∞ where there is none."""
    is_free = places.sum(axis=1) > 1
    fixed = np.argmax(places, axis=1)
    if not is_free.any():
        return fixed, instance.total(fixed) if instance.is_valid(fixed) else np.inf
    free = np.flatnonzero(is_free)
    held = _held_load(fixed[~is_free], instance.load[~is_free], len(instance.most))
    base = float(instance.cost[~is_free, fixed[~is_free]].sum())
    neuron, worker = np.nonzero(places[free])
    program = _Program.of(instance, free[neuron], worker, held)
    options = {"mip_rel_gap": relative_gap, "node_limit": node_limit}
    if deadline.remaining is not None:
        options["time_limit"] = max(deadline.remaining, 1e-3)
    result = milp(
        program.cost,
        integrality=np.ones(len(neuron)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(program.once, 1, 1),
            LinearConstraint(program.loads, program.least, program.most),
        ],
        options=options,
    )
    if result.status == _HIGHS_INFEASIBLE:
        return None, np.inf
    claimed = -np.inf if result.mip_dual_bound is None else result.mip_dual_bound
    bound = base + program.constant + program.scale * (claimed - _HIGHS_DOUBT)
    if result.x is None:
        return None, bound
    found = fixed.copy()
    chosen = result.x > 0.5
    found[free[neuron[chosen]]] = worker[chosen]
    return found, bound


@dataclass(frozen=True, eq=False)
class _Program:
    """Costs and constraints over pairs of neuron and worker, scaled for HiGHS, whose tolerances are absolute.

    Cost of a solution: constant + scale · cost.
    """

    cost: NDArray[np.float64]
    scale: float
    constant: float
    once: Any
    """(neurons, pairs) 1 where a pair is of a neuron."""
    loads: Any
    """(P, pairs)"""
    least: NDArray[np.float64]
    most: NDArray[np.float64]

    @staticmethod
    def of(
        instance: _Instance, neuron: NDArray[np.int64], worker: NDArray[np.int64], held: NDArray[np.float64]
    ) -> _Program:
        """For these pairs; workers hold loads (P,) of other neurons already."""
        pairs = np.arange(len(neuron))
        names, row = np.unique(neuron, return_inverse=True)
        cost = instance.cost[neuron, worker]
        lowest = np.full(len(names), np.inf)
        np.minimum.at(lowest, row, cost)
        relative = cost - lowest[row]
        scale = float(relative.max(initial=0.0)) or 1.0
        unit = instance.load.sum() / _HIGHS_LOAD
        ones = np.ones(len(pairs))
        shape = (len(instance.most), len(pairs))
        return _Program(
            relative / scale,
            scale,
            float(lowest.sum()),
            sparse.csr_array((ones, (row, pairs)), shape=(len(names), len(pairs))),
            sparse.csr_array((instance.load[neuron] / unit, (worker, pairs)), shape=shape),
            (instance.least - held) / unit,
            (instance.most - held) / unit,
        )
