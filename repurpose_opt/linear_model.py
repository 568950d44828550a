"""Choosing the owners as a mixed-integer linear program, for solvers and for files that solvers read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.metrics import TOLERANCE
from repurpose_opt.problem import LayerProblem


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Minimise constant + cost·v subject to row_lower ≤ matrix v ≤ row_upper, lower ≤ v ≤ upper, some v whole.

    The variables are, in this order:

        x_i_k    neuron i is on worker k, for its places
        y_j_k    value j is sent to worker k
        z_i_j_k  share of the energy of pin (i, j) that is lost on worker k; none where nothing may be lost
        t        prices of the worker that sends or receives most; only where it is what counts

    Rows: one worker for each neuron; the load of each worker; y ≥ x (or z ≥ x − y) for each pin and worker; then the
    budget or, for each worker, t ≥ what it sends, t ≥ what it receives, where there are such. The y ≥ x are one row a
    pin: one row a value is far weaker.
    """

    cost: NDArray[np.float64]
    """(variables,)"""
    constant: float
    matrix: Any
    """csr_array (rows, variables)"""
    row_lower: NDArray[np.float64]
    row_upper: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    is_integer: NDArray[np.bool_]
    """(variables,)"""
    places: NDArray[np.int64]
    """(x variables, 2) neuron and worker of each."""
    transfers: NDArray[np.int64]
    """(y variables, 2) value and worker of each."""
    losses: NDArray[np.int64]
    """(z variables, 3) neuron, value and worker of each."""
    neurons: int
    workers: int
    links: int
    """How many rows of each of the first three kinds there are, in their order."""
    has_busiest: bool = False
    """Whether the last variable is t."""

    @cached_property
    def names(self) -> list[str]:
        """Names of the variables."""
        indices = (("x", self.places), ("y", self.transfers), ("z", self.losses))
        names = ["_".join([letter, *map(str, index)]) for letter, rows in indices for index in rows.tolist()]
        return names + ["t"] * self.has_busiest

    def owner(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """(m,) the worker of each neuron, by the largest of its x; `values` (variables,) or the x alone."""
        neuron, worker = self.places.T
        chosen = np.full((self.neurons, self.workers), -np.inf)
        chosen[neuron, worker] = values[: len(neuron)]
        return chosen.argmax(axis=1)

    def variables(self, owner: NDArray[np.int64], sent: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(variables,) the cheapest feasible values for owners (m,) and transfers (n, P) that serve them."""
        x = owner[self.places[:, 0]] == self.places[:, 1]
        y = sent[tuple(self.transfers.T)]
        neuron, value, worker = self.losses.T
        z = (owner[neuron] == worker) & ~sent[value, worker]
        values = np.concatenate([x, y, z, [0.0] * self.has_busiest])
        if self.has_busiest:
            first = self.neurons + self.workers + self.links
            values[-1] = -(self.matrix[first : first + 2 * self.workers] @ values).min()
        return values


def linear_model(problem: LayerProblem, hypergraph: Hypergraph, budget: float | None = None) -> LinearModel:
    """The owners of least `hypergraph.cost` as a mixed-integer linear program; O(pins · P) variables and rows.

    With a budget, in bytes a sample, transfers cost nothing and their bytes are limited instead: for hypergraphs that
    may lose energy. Raises InvalidArgument for a budget where everything is kept.
    """
    if budget is not None and hypergraph.keeps_all:
        raise InvalidArgument("budget", f"{budget:g}", "None for a hypergraph that keeps every value")
    weight = hypergraph.price if budget is None else problem.transfer_bytes.astype(np.float64)
    return model_of(hypergraph, possible_places(problem), whole_loads(problem), weight, budget)


def model_of(
    hypergraph: Hypergraph,
    places: NDArray[np.bool_],
    loads: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    weight: NDArray[np.float64],
    budget: float | None = None,
) -> LinearModel:
    """`linear_model` for places (m, P), `whole_loads` and what a transfer weighs (n, P): its price, or its bytes."""
    pins = hypergraph.pins.tocoo()
    may_send = (weight > 0) & np.isfinite(weight) & (hypergraph.pins.astype(bool).sum(axis=0) > 0)[:, None]
    is_charged = weight > 0

    x = np.full((hypergraph.m, hypergraph.P), -1)
    x[places] = np.arange(places.sum())
    y = np.full((hypergraph.n, hypergraph.P), -1)
    y[may_send] = places.sum() + np.arange(may_send.sum())
    count = places.sum() + may_send.sum()
    entry, worker = np.nonzero(places[pins.row] & is_charged[pins.col])
    neuron, value = pins.row[entry], pins.col[entry]
    if hypergraph.keeps_all and (y[value, worker] < 0).any():
        raise InvalidArgument("hypergraph", "an infinite price where nothing may be lost", "finite prices")
    links = np.arange(len(entry))
    columns, signs = [x[neuron, worker], y[value, worker]], [1.0, -1.0]
    if not hypergraph.keeps_all:
        columns, signs = [*columns, count + links], [*signs, -1.0]
    losses = np.empty((0, 3), dtype=np.int64)
    if not hypergraph.keeps_all:
        losses = np.stack([neuron, value, worker], axis=1).astype(np.int64)
    is_busiest = hypergraph.communication == "busiest"
    total = int(count + len(losses) + is_busiest)
    linked = _rows([links] * len(columns), columns, signs, (len(links), total))

    i, k = np.nonzero(places)
    once = sparse.csr_array((np.ones(len(i)), (i, np.arange(len(i)))), shape=(hypergraph.m, total))
    load, low, high = loads
    balance = sparse.csr_array((load[i].astype(float), (k, np.arange(len(i)))), shape=(hypergraph.P, total))
    blocks = [once, balance, linked]
    row_lower = [np.ones(hypergraph.m), low, np.full(len(links), -np.inf)]
    row_upper = [np.ones(hypergraph.m), high, np.zeros(len(links))]
    cost = np.zeros(total)
    if hypergraph.fixed_cost is not None:
        cost[: len(i)] = hypergraph.fixed_cost[i, k]
    cost[count : count + len(losses)] = pins.data[entry] if len(losses) else 0.0
    if is_busiest:
        cost[-1] = 1.0
        blocks.append(_busiest_rows(hypergraph, y, total))
        row_lower.append(np.zeros(2 * hypergraph.P))
        row_upper.append(np.full(2 * hypergraph.P, np.inf))
    elif budget is None:
        cost[y[may_send]] = hypergraph.price[may_send]
    else:
        blocks.append(_rows([np.zeros(may_send.sum(), dtype=int)], [y[may_send]], [weight[may_send]], (1, total)))
        row_lower.append(np.array([-np.inf]))
        row_upper.append(np.array([budget]))
    return LinearModel(
        cost=cost,
        constant=hypergraph.constant,
        matrix=sparse.vstack(blocks, format="csr"),
        row_lower=np.concatenate(row_lower).astype(np.float64),
        row_upper=np.concatenate(row_upper).astype(np.float64),
        lower=np.zeros(total),
        upper=np.concatenate([np.ones(total - is_busiest), [np.inf] * is_busiest]),
        is_integer=np.arange(total) < count,
        places=np.argwhere(places),
        transfers=np.argwhere(may_send),
        losses=losses,
        neurons=hypergraph.m,
        workers=hypergraph.P,
        links=len(links),
        has_busiest=is_busiest,
    )


def _busiest_rows(hypergraph: Hypergraph, y: NDArray[np.int64], variables: int) -> sparse.csr_array:
    """t − Σ price_jk y_jk over the values that a worker holds, P rows, and over those that it receives, P rows.

    `y` (n, P) is the variable of each transfer, −1 for none; t is the last variable.
    """
    assert hypergraph.input_owner is not None
    value, receiver = np.nonzero(y >= 0)
    sender = hypergraph.input_owner[value]
    price = hypergraph.price[value, receiver]
    every = np.arange(2 * hypergraph.P)
    rows = [every, sender, hypergraph.P + receiver]
    columns = [np.full(len(every), variables - 1), y[value, receiver], y[value, receiver]]
    return _rows(rows, columns, [1.0, -price, -price], (len(every), variables))


def possible_places(problem: LayerProblem) -> NDArray[np.bool_]:
    """(m, P) places that are allowed and have room for the neuron alone."""
    slack = TOLERANCE * problem.load.sum()
    return problem.allowed & (problem.load[:, None] <= problem.capacity + slack)


def whole_loads(problem: LayerProblem) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Loads (m,), smallest and largest load of each worker (P,), (P,), in whole units.

    A placement keeps within the whole limits if it keeps within the given ones, and only if it does so within the
    tolerance of `metrics.placement_violations`, a share of the total load. Where the loads have no common unit they
    are rounded to units so small that the rounding of all m together is below half that tolerance.
    """
    unit = common_unit(problem.load)
    doubt = 0.0
    if unit is None:
        unit = float(problem.load.sum()) * TOLERANCE / (2.0 * problem.m)
        doubt = problem.m / 2.0
    load = np.rint(problem.load / unit).astype(np.int64)
    slack = TOLERANCE * problem.load.sum() / 4 / unit + doubt
    high = np.floor(np.minimum(problem.capacity / unit + slack, load.sum()))
    low = np.ceil(problem.min_load / unit - slack)
    return load, np.maximum(low, 0).astype(np.int64), high.astype(np.int64)


def common_unit(numbers: NDArray[np.float64]) -> float | None:
    """The largest u of which all of the numbers ≥ 0 are whole multiples, of at most 1e6; None if there is none.

    Tried are the numbers' own least, and whole numbers of 1, ½, ¼, … or of decimal places.
    """
    numbers = np.unique(numbers[numbers > 0])
    if len(numbers) == 0:
        return 1.0
    for scale in (numbers[0], 1.0, 0.5, 0.25, 0.125, 0.1, 0.01, 0.001, 1e-4):
        multiples = numbers / scale
        whole = np.rint(multiples)
        if whole[-1] > 1e15 or not np.allclose(multiples, whole, rtol=1e-12, atol=0):
            continue
        divisor = int(np.gcd.reduce(whole.astype(np.int64)))
        if whole[-1] / divisor <= 1e6:
            return float(scale * divisor)
    return None


def _rows(rows: list[Any], columns: list[Any], values: list[Any], shape: tuple[int, int]) -> sparse.csr_array:
    """A matrix from its entries, those in column −1 left out."""
    row, column = np.concatenate(rows), np.concatenate(columns)
    value = np.concatenate([np.broadcast_to(v, r.shape) for v, r in zip(values, rows, strict=True)])
    there = column >= 0
    return sparse.csr_array((value[there], (row[there], column[there])), shape=shape)
