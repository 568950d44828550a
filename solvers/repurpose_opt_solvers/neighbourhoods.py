"""Large neighbourhood search: frees some neurons, places them exactly by CP-SAT while the others stay, and repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import LinearModel, model_of
from repurpose_opt.solver import Deadline
from repurpose_opt_solvers.mip_engines import Effort, answers

FEWEST, MOST = 8, 120
"""Free neurons."""
_FIRST = 40
_LARGEST_MODEL = 12_000
"""Links of a subproblem: more take longer to build than to search."""
_GROWTH, _DECAY = 1.05, 0.85
"""Of the number of free neurons, where a subproblem is solved exactly, or not."""
_SECONDS = 3.0
_DETERMINISTIC_TIME = 0.15
"""The most a subproblem may take, in CP-SAT's units, of which one lasts a second or more."""
ROUNDS_WITHOUT_A_LIMIT = 30

Loads = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Neighbourhood:
    """Neurons that are freed, and the workers (P,) bool among which they are placed anew."""

    free: NDArray[np.int64]
    workers: NDArray[np.bool_]


def improvements(
    hypergraph: Hypergraph,
    places: NDArray[np.bool_],
    loads: Loads,
    owner: NDArray[np.int64],
    deadline: Deadline,
    *,
    seed: int = 0,
    rounds: int | None = None,
) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
    """Owners (m,), never dearer than those before, and counts, after each round; from the valid `owner` on.

    Ends after `rounds`, at the deadline, or when all neurons together are placed exactly. Subproblems are limited in
    CP-SAT's deterministic time, so that without a deadline a seed has one answer.
    """
    random = np.random.default_rng(seed)
    pins = hypergraph.pins.tocsr()
    by_value = pins.tocsc()
    held = np.asarray(pins.T @ np.eye(hypergraph.P)[owner])
    kinds: tuple[Callable[..., Neighbourhood], ...] = (_connected, _between_workers, _dearest)
    # Denser layers have harder subproblems of the same number of neurons.
    first = min(_FIRST, _LARGEST_MODEL * hypergraph.m / max(1, pins.nnz * hypergraph.P))
    size = np.full(len(kinds), np.clip(first, FEWEST, MOST))
    counts: dict[str, Any] = {"rounds": 0, "improved": 0, "moved": 0}
    score = np.ones(len(kinds))
    while (rounds is None or counts["rounds"] < rounds) and not deadline.passed:
        kind = int(random.choice(len(kinds), p=score / score.sum()))
        chosen = kinds[kind](random, pins, by_value, hypergraph, owner, held, round(size[kind]))
        former, rest = owner[chosen.free], pins[chosen.free]
        held_by_fixed = held - np.asarray(rest.T @ np.eye(hypergraph.P)[former])
        model = _model(hypergraph, places, loads, owner, chosen, held_by_fixed)
        found, is_exact = _solve(model, former, deadline, int(random.integers(1 << 31)))
        counts["rounds"] += 1
        saved = 0.0
        if found is not None and (found != former).any():
            saved = _cost(model, former) - _cost(model, found)
            if saved >= 0:
                owner = owner.copy()
                owner[chosen.free] = found
                held = held_by_fixed + np.asarray(rest.T @ np.eye(hypergraph.P)[found])
                counts["moved"] += 1
                counts["improved"] += saved > 0
        score[kind] = 0.9 * score[kind] + 0.1 * (1.0 if saved > 0 else 0.2)
        size[kind] = np.clip(
            size[kind] * (_GROWTH if is_exact else _DECAY), FEWEST, max(FEWEST, min(MOST, hypergraph.m))
        )
        counts["free_neurons"] = size.round().astype(int).tolist()
        yield owner, dict(counts)
        if is_exact and len(chosen.free) == hypergraph.m and chosen.workers.all():
            return


def _solve(
    model: LinearModel, former: NDArray[np.int64], deadline: Deadline, seed: int
) -> tuple[NDArray[np.int64] | None, bool]:
    """The best owners found of the free neurons, and whether they are the best there are."""
    left = deadline.remaining
    seconds = None if left is None else min(_SECONDS, left)
    effort = Effort(seconds=seconds, deterministic_time=_DETERMINISTIC_TIME, seed=seed)
    best, bound = None, -np.inf
    for answer in answers("cp-sat", model, _variables(model, former), effort):
        bound = max(bound, answer.bound)
        if answer.values is not None:
            best = model.owner(answer.values)
    least = np.inf if best is None else _cost(model, best)
    return best, bound >= least - 1e-6 * max(abs(least), 1e-12)


def _model(
    hypergraph: Hypergraph,
    places: NDArray[np.bool_],
    loads: Loads,
    owner: NDArray[np.int64],
    chosen: Neighbourhood,
    held_by_fixed: NDArray[np.float64],
) -> LinearModel:
    """The free neurons' model: what fixed ones need is sent already, or lost already up to the price."""
    free = chosen.free
    load, low, high = loads
    fixed = np.bincount(owner, load, hypergraph.P) - np.bincount(owner[free], load[free], hypergraph.P)
    price = hypergraph.price - held_by_fixed
    if hypergraph.keeps_all:
        price = np.where(held_by_fixed > 0, 0.0, hypergraph.price)
    around = replace(
        hypergraph,
        pins=hypergraph.pins[free],
        price=np.maximum(price, 0.0),
        fixed_cost=None if hypergraph.fixed_cost is None else hypergraph.fixed_cost[free],
        constant=0.0,
    )
    remaining = (load[free], np.maximum(low - fixed, 0).astype(np.int64), (high - fixed).astype(np.int64))
    return model_of(around, places[free] & chosen.workers, remaining, around.price)


def _variables(model: LinearModel, owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """(variables,) for owners of a model's neurons, with every value sent that a neuron reads."""
    x = (owner[model.places[:, 0]] == model.places[:, 1]).astype(np.float64)
    sent = _read_by(model, x)
    return np.concatenate([x, sent, np.zeros(len(model.losses))])


def _read_by(model: LinearModel, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """(y variables,) 1 where a neuron placed by x reads the value on its worker."""
    first = model.neurons + model.workers
    links = model.matrix[first : first + model.links]
    a, b = len(model.places), len(model.places) + len(model.transfers)
    placed = links[:, :a] @ x
    return np.asarray((-links[:, a:b]).T @ placed > 0).astype(np.float64)


def _cost(model: LinearModel, owner: NDArray[np.int64]) -> float:
    """The least cost for owners of a model's neurons."""
    a, b = len(model.places), len(model.places) + len(model.transfers)
    x = (owner[model.places[:, 0]] == model.places[:, 1]).astype(np.float64)
    first = model.neurons + model.workers
    links = model.matrix[first : first + model.links]
    fixed = float(model.cost[:a] @ x)
    if len(model.losses) == 0:
        return fixed + float(model.cost[a:b] @ _read_by(model, x))
    lost = model.cost[b:] * (links[:, :a] @ x)
    by_transfer = np.asarray((-links[:, a:b]).T @ lost)
    unsent = np.asarray(-links[:, a:b].sum(axis=1)) == 0
    return fixed + float(np.minimum(by_transfer, model.cost[a:b]).sum() + lost[unsent].sum())


def _connected(
    random: np.random.Generator,
    pins: Any,
    by_value: Any,
    hypergraph: Hypergraph,
    owner: NDArray[np.int64],
    held: NDArray[np.float64],
    size: int,
) -> Neighbourhood:
    """A neuron and those that share values with it, neighbours of neighbours next."""
    everywhere = np.ones(hypergraph.P, dtype=bool)
    return Neighbourhood(_grown(random, pins, by_value, np.ones(hypergraph.m, dtype=bool), size), everywhere)


def _between_workers(
    random: np.random.Generator,
    pins: Any,
    by_value: Any,
    hypergraph: Hypergraph,
    owner: NDArray[np.int64],
    held: NDArray[np.float64],
    size: int,
) -> Neighbourhood:
    """Connected neurons of two or three workers, exchanged between these only: more of them can be free."""
    count = min(hypergraph.P, int(random.integers(2, 4)))
    workers = np.zeros(hypergraph.P, dtype=bool)
    workers[random.choice(hypergraph.P, count, replace=False)] = True
    return Neighbourhood(_grown(random, pins, by_value, workers[owner], size), workers)


def _dearest(
    random: np.random.Generator,
    pins: Any,
    by_value: Any,
    hypergraph: Hypergraph,
    owner: NDArray[np.int64],
    held: NDArray[np.float64],
    size: int,
) -> Neighbourhood:
    """Neurons drawn in proportion to what their values cost on their worker, shared with the others there."""
    finite = np.where(np.isfinite(hypergraph.price), hypergraph.price, held)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(held > 0, (finite if hypergraph.keeps_all else np.minimum(finite, held)) / held, 0.0)
    entries = pins.tocoo()
    paid: NDArray[np.float64] = np.bincount(
        entries.row, entries.data * share[entries.col, owner[entries.row]], hypergraph.m
    ).astype(np.float64)
    if hypergraph.fixed_cost is not None:
        paid = paid + hypergraph.fixed_cost[np.arange(hypergraph.m), owner]
    paid = paid - paid.min() + 1e-3 * max(float(np.ptp(paid)), 1e-12)
    free = random.choice(hypergraph.m, min(size, hypergraph.m), replace=False, p=paid / paid.sum())
    return Neighbourhood(np.sort(free), np.ones(hypergraph.P, dtype=bool))


def _grown(
    random: np.random.Generator, pins: Any, by_value: Any, may_take: NDArray[np.bool_], size: int
) -> NDArray[np.int64]:
    """Up to `size` neurons out of (m,) bool, breadth first through shared values from a random one; sorted."""
    left = may_take.copy()
    size = min(size, int(left.sum()))
    taken: list[int] = []
    frontier: list[int] = []
    while len(taken) < size:
        if not frontier:
            frontier = [int(random.choice(np.flatnonzero(left)))]
            left[frontier] = False
        neuron = frontier.pop(0)
        taken.append(neuron)
        values = pins.indices[pins.indptr[neuron] : pins.indptr[neuron + 1]]
        for value in random.permutation(values):
            if len(frontier) + len(taken) >= size:
                break
            readers = by_value.indices[by_value.indptr[value] : by_value.indptr[value + 1]]
            fresh = random.permutation(readers[left[readers]])
            left[fresh] = False
            frontier.extend(fresh.tolist())
    return np.sort(np.array(taken, dtype=np.int64))
