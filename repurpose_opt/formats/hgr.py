"""hMETIS's hypergraph format, which Mt-KaHyPar and KaHyPar read too, with fixed terminals and block weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formats.common import (
    LARGEST_SUM,
    Written,
    beside,
    pinned_worker,
    vertex_loads,
    whole_weights,
    write_lines,
)
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem


def write_hgr(path: Path | str, problem: LayerProblem, hypergraph: Hypergraph) -> Written:
    """The placement problem as a hypergraph with weights of nets and vertices, for the connectivity metric λ−1 (km1).

    Vertices: neurons 0 … m−1, then one terminal of weight 1 for each worker (numbered from 1 in the file).

    path           the hypergraph, with comments only at the top
    path.fix       a line for each vertex: its block, or −1; terminals and neurons with a single place are fixed
    path.targets   a line for each block: its largest weight, the worker's capacity + 1 for the terminal

    Prices that differ by receiving worker are exact too: see `nets_of`. Where values may be lost (`Volume`), the nets
    are those of `without_losses`, which stand in; so does the total for the busiest worker. Other forbidden places,
    and min_load, are left out. O(nets · P). Raises InvalidArgument for infinite prices where nothing may be lost,
    OSError.
    """
    path = Path(path)
    kept = without_losses(hypergraph)
    nets, price, constant = nets_of(kept)
    weight, unit = whole_weights(price, LARGEST_SUM // problem.P)
    rounding = float(np.abs(weight * unit - price).sum() * (problem.P - 1))
    nets, weight = nets[weight > 0], weight[weight > 0]
    load, capacity = vertex_loads(problem, LARGEST_SUM // 2)
    pinned = pinned_worker(problem)
    fixed, targets = beside(path, ".fix"), beside(path, ".targets")
    written = Written(
        files=(path, fixed, targets),
        size={"vertices": nets.shape[1], "nets": nets.shape[0], "pins": nets.nnz},
        is_exact=kept.is_exact,
        unit=unit,
        constant=constant,
        rounding=rounding,
        left_out=_left_out(problem, pinned),
    )
    write_lines(path, _lines(problem, written, nets, weight, load))
    write_lines(fixed, map(str, [*pinned.tolist(), *range(problem.P)]))
    write_lines(targets, map(str, (capacity + 1).tolist()))
    return written


def without_losses(hypergraph: Hypergraph) -> Hypergraph:
    """A hypergraph that loses nothing, adds its prices up and never costs less: itself, if it does so anyway.

    The total stands in for the busiest worker. A pin whose energy is at least the value's dearest price stays a pin.
    Any other becomes a cost of its neuron, min(energy, price) on each worker, as if it could not share a transfer.
    Exact where all pins are of the first kind or of values that are never sent (infinite prices).
    """
    if hypergraph.communication != "total":
        hypergraph = replace(hypergraph, communication="total", is_exact=False)
    if hypergraph.keeps_all:
        return hypergraph
    pins = hypergraph.pins.tocoo()
    dearest = hypergraph.price.max(axis=1)
    stays = pins.data >= dearest[pins.col]
    neuron, value, energy = pins.row[~stays], pins.col[~stays], pins.data[~stays]
    fixed = np.zeros((hypergraph.m, hypergraph.P)) if hypergraph.fixed_cost is None else hypergraph.fixed_cost.copy()
    for k in range(hypergraph.P):
        fixed[:, k] += np.bincount(neuron, np.minimum(energy, hypergraph.price[value, k]), minlength=hypergraph.m)
    coordinates = (pins.row[stays], pins.col[stays])
    return replace(
        hypergraph,
        pins=sparse.csr_array((np.ones(stays.sum()), coordinates), shape=pins.shape),
        price=np.where(np.isfinite(hypergraph.price), hypergraph.price, 0.0),  # such values have no pins any more
        keeps_all=True,
        is_exact=hypergraph.is_exact and bool(np.isinf(dearest[value]).all()),
        fixed_cost=fixed,
    )


def nets_of(hypergraph: Hypergraph) -> tuple[Any, NDArray[np.float64], float]:
    """(nets, m + P) csr_array of pins, (nets,) weights and a constant: the cost is constant + Σ weight · (λ−1).

    λ−1 of a net with terminals T is |T| − 1 + the workers outside T that hold one of its neurons. So a value whose
    prices rise in steps p₁ < p₂ < … is a net for each step, of weight p_r − p_{r−1}, with the terminals of all workers
    that are cheaper: one net with the terminal of its worker, where all links have one price. What a neuron costs by
    itself on worker k is a net with k's terminal, of weight max − cost, which is cut unless the neuron is there.
    """
    if not np.isfinite(hypergraph.price).all():
        raise InvalidArgument("hypergraph", "an infinite price where nothing may be lost", "finite prices")
    P = hypergraph.P
    readers = hypergraph.pins.T.tocsr()
    is_read = np.diff(readers.indptr) > 0
    cheapest_first = np.argsort(hypergraph.price, axis=1, kind="stable")
    step = np.diff(np.take_along_axis(hypergraph.price, cheapest_first, axis=1), axis=1, prepend=0.0)
    blocks, weights = [sparse.csr_array((0, hypergraph.m + P))], [np.zeros(0)]
    constant = hypergraph.constant
    for cheaper in range(P):
        value = np.flatnonzero(is_read & (step[:, cheaper] > 0))
        row = np.repeat(np.arange(len(value)), cheaper)
        terminal = cheapest_first[value, :cheaper].ravel()
        terminals = sparse.csr_array((np.ones(len(row)), (row, terminal)), shape=(len(value), P))
        blocks.append(sparse.hstack([readers[value], terminals], format="csr"))
        weights.append(step[value, cheaper])
        constant -= (cheaper - 1) * float(step[value, cheaper].sum())
    if hypergraph.fixed_cost is not None:
        most = hypergraph.fixed_cost.max(axis=1)
        saved = most[:, None] - hypergraph.fixed_cost
        neuron, worker = np.nonzero(saved)
        net = np.arange(len(neuron))
        ends = (np.concatenate([net, net]), np.concatenate([neuron, hypergraph.m + worker]))
        blocks.append(sparse.csr_array((np.ones(2 * len(net)), ends), shape=(len(net), hypergraph.m + P)))
        weights.append(saved[neuron, worker])
        constant += float(most.sum() - saved.sum())
    return sparse.vstack(blocks, format="csr"), np.concatenate(weights), constant


def _left_out(problem: LayerProblem, pinned: NDArray[np.int64]) -> tuple[str, ...]:
    forbidden = not problem.allowed[pinned < 0].all()
    return ("allowed",) * forbidden + ("min_load",) * bool((problem.min_load > 0).any())


def _lines(
    problem: LayerProblem, written: Written, nets: Any, weight: NDArray[np.int64], load: NDArray[np.int64]
) -> Iterator[str]:
    m, P = problem.m, problem.P
    figure = "the objective" if written.is_exact else "a cost that stands in for the objective"
    yield f"% {m} neurons, then the terminals of {P} workers; fixed vertices and block weights are in the files beside"
    yield f"% {figure} = {written.constant!r} + {written.unit!r} * km1"
    if written.left_out:
        yield f"% not in these files: {', '.join(written.left_out)}"
    yield f"{nets.shape[0]} {nets.shape[1]} 11"
    pins = (nets.indices + 1).tolist()
    for heavy, first, end in zip(weight.tolist(), nets.indptr[:-1].tolist(), nets.indptr[1:].tolist(), strict=True):
        yield " ".join(map(str, [heavy, *pins[first:end]]))
    yield from map(str, load.tolist())
    yield from ["1"] * P
