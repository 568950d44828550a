"""Where the units of a network are: what is given, what is still free, and what room there is for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.network.builder import CENTRAL_UNIT
from repurpose_opt.network.trace import Network
from repurpose_opt.problem import checked_numbers
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.modules import Role, role_of


@dataclass(frozen=True)
class Placement:
    """Where things may be: what stays the same over all sweeps of a run."""

    n_workers: int
    input_owner: NDArray[np.int64] | None
    """(size,) of each place of the input: column, channel or feature; None where every worker has it whole."""
    output_owner: tuple[int, ...]
    """Workers that may hold outputs; the first one computes what cannot be split."""
    share: NDArray[np.float64]
    """(P,) relative capacity, sums to 1."""
    link_price: NDArray[np.float64] | None

    @property
    def prices(self) -> NDArray[np.float64]:
        """(P, P) link prices, 0 on the diagonal."""
        P = self.n_workers
        prices = np.ones((P, P)) if self.link_price is None else np.array(self.link_price, dtype=np.float64)
        np.fill_diagonal(prices, 0.0)
        return prices

    def room(self, load: NDArray[np.float64], is_answer: bool) -> NDArray[np.float64]:
        """(P,) that each worker may take of neurons of these loads (m,); of the answer's, only who wants it."""
        share = self.share.copy()
        if is_answer:
            share[np.setdiff1d(np.arange(self.n_workers), self.output_owner)] = 0.0
            share = share / share.sum()
        if len(load) == 0:
            return np.zeros(self.n_workers)
        if (load == load[0]).all():
            return np.ceil(np.round(len(load) * share, 9)) * load[0]
        # Any list of loads fits with room for the largest above its share (Graham 1966).
        return np.where(share > 0, load.sum() * share + load.max(), 0.0)


@dataclass(frozen=True, eq=False)
class Wiring:
    """What a product's problem says of workers: its neurons are the units in its rows."""

    input_owner: NDArray[np.int64]
    """(n,)"""
    units: NDArray[np.int64]
    """(m,) ascending"""
    row_neuron: NDArray[np.int64]
    """(rows,)"""
    load: NDArray[np.float64]
    """(m,)"""
    capacity: NDArray[np.float64]
    """(P,)"""
    allowed: NDArray[np.bool_]
    """(m, P)"""


class Owners:
    """The worker of each unit, as far as it is known; −1 for a unit that is free."""

    def __init__(self, network: Network, placement: Placement) -> None:
        self.network, self.placement = network, placement
        self.of_unit = np.full(network.n_units, -1)
        self.of_unit[CENTRAL_UNIT] = placement.output_owner[0]
        if placement.input_owner is not None:
            self.of_unit[network.units(INPUT)] = placement.input_owner

    def at(self, name: str) -> NDArray[np.int64]:
        """(size,) worker of each place of an output."""
        return self.of_unit[self.network.units(name)]

    def set(self, units: NDArray[np.int64], owner: NDArray[np.int64]) -> None:
        self.of_unit[units] = owner

    def place_source(self, name: str) -> None:
        """Units of a source that are free, in order, each worker its share; the answer's, only who wants it."""
        units = np.unique(self.network.units(name))
        free = units[self.of_unit[units] < 0]
        is_wanted = np.isin(free, self.network.answer_units)
        for part, is_answer in ((free[is_wanted], True), (free[~is_wanted], False)):
            ends = np.cumsum(self.placement.room(np.ones(len(part)), is_answer))
            self.set(part, np.searchsorted(ends, np.arange(len(part)), side="right"))

    def wiring(self, name: str) -> Wiring:
        """Of a product all of whose inputs are placed."""
        P = self.placement.n_workers
        units, row_neuron = np.unique(self.network.units(name), return_inverse=True)
        rows = np.bincount(row_neuron).astype(np.float64)
        load = rows / rows[0] if (rows == rows[0]).all() else rows
        owner = self.of_unit[units]
        known = owner >= 0
        is_answer = np.isin(units, self.network.answer_units) & ~known
        allowed = np.ones((len(units), P), dtype=bool)
        allowed[known] = np.eye(P, dtype=bool)[owner[known]]
        allowed[is_answer] = np.isin(np.arange(P), self.placement.output_owner)
        pinned = np.bincount(owner[known], load[known], P)
        others = load[~known & ~is_answer]
        capacity = pinned + self.placement.room(load[is_answer], True) + self.placement.room(others, False)
        return Wiring(self.at(self.network.read(name)), units, row_neuron, load, capacity, allowed)


def fixed_traffic(owners: Owners) -> int:
    """Bytes a sample that norms and gatherings send: they are exact, so no formulation chooses them."""
    network, P = owners.network, owners.placement.n_workers
    total = 0
    for step in network.graph.steps:
        role = role_of(network.graph.module(step.name))
        if role not in (Role.NORM, Role.GATHER):
            continue
        held = np.bincount(owners.at(step.inputs[0]), minlength=P)
        size = network.positions(step.inputs[0]) * network.dtype.itemsize
        if role is Role.NORM:
            workers = int(np.count_nonzero(held))
            total += 2 * workers * (workers - 1) * size
        else:
            total += int(held.sum() - held[owners.placement.output_owner[0]]) * size
    return total


def placement_of(
    network: Network,
    n_workers: int,
    input_owner: ArrayLike | None,
    output_owner: int | Sequence[int],
    worker_share: ArrayLike | None,
    link_price: ArrayLike | None,
) -> Placement:
    """Checks every argument of `repurpose` about workers. Raises InvalidArgument."""
    if isinstance(n_workers, bool) or not isinstance(n_workers, (int, np.integer)) or n_workers < 1:
        raise InvalidArgument("n_workers", repr(n_workers), "a whole number ≥ 1")
    P = int(n_workers)
    owner = _input_owner(network, input_owner, P)
    outputs = tuple(np.unique(_workers("output_owner", output_owner, P)).tolist())
    share = _shares(worker_share, P, outputs)
    prices = checked_numbers("link_price", link_price, (P, P), default=1.0)
    return Placement(P, owner, outputs, share, prices)


def _input_owner(network: Network, given: ArrayLike | None, n_workers: int) -> NDArray[np.int64] | None:
    if network.layouts[INPUT] is None:
        if given is not None:
            raise InvalidArgument("input_owner", "owners of whole numbers, such as token ids", "None: all have them")
        return None
    n = len(network.units(INPUT))
    owner = np.arange(n) * n_workers // n if given is None else _workers("input_owner", given, n_workers)
    if owner.shape != (n,):
        what = "channel" if network.positions(INPUT) > 1 else "input"
        raise InvalidArgument("input_owner", f"shape {owner.shape}", f"({n},), one worker for each {what}")
    return owner


def _workers(name: str, value: ArrayLike, n_workers: int) -> NDArray[np.int64]:
    """At least one worker, each in 0 … P−1."""
    workers = np.asarray(value)
    allowed = f"whole numbers in 0 … {n_workers - 1}"
    if workers.size == 0 or workers.dtype.kind not in "iu":
        raise InvalidArgument(name, f"{workers.dtype} of shape {workers.shape}", allowed)
    outside = workers[(workers < 0) | (workers >= n_workers)]
    if len(outside):
        raise InvalidArgument(name, f"worker {outside[0]}", allowed)
    return workers.astype(np.int64)


def _shares(value: ArrayLike | None, n_workers: int, outputs: tuple[int, ...]) -> NDArray[np.float64]:
    """(P,) relative capacities that sum to 1, some of it where the outputs go."""
    share = checked_numbers("worker_share", value, (n_workers,), default=1.0)
    if share[list(outputs)].sum() == 0:
        raise InvalidArgument("worker_share", f"0 for output_owner {list(outputs)}", "above 0 for one of them")
    return share / share.sum()
