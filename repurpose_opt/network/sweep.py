"""One forward sweep: product after product is calibrated on what it really receives, placed, pruned and repaired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt import metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.moments import Moments
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.columns import column_value, in_batches, moments_of, product
from repurpose_opt.network.lookahead import Reading, energies, onward
from repurpose_opt.network.owners import Owners, Placement, Wiring, fixed_traffic
from repurpose_opt.network.trace import Network
from repurpose_opt.problem import LayerProblem
from repurpose_opt.progress import Report
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.modules import Role, role_of
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """One product of a sweep: owners (m,) of its rows, messages, V (m, n, …) and bias (m,) in the model's dtype.

    V is the effective weight, U R in blocks that a code covers.
    """

    owner: NDArray[np.int64]
    exchange: Exchange
    weight: NDArray[np.floating]
    bias: NDArray[np.floating]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Flat arrays for a file."""
        own = {"owner": self.owner, "weight": self.weight, "bias": self.bias}
        sizes = np.array([self.exchange.n, self.exchange.P])
        return own | {"sizes": sizes} | {f"message-{name}": part for name, part in self.exchange.arrays().items()}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> SolvedLayer:
        """Raises ValueError or KeyError where the arrays are not those of a layer."""
        n, P = arrays["sizes"].tolist()
        messages = {name.removeprefix("message-"): arrays[name] for name in arrays if name.startswith("message-")}
        return SolvedLayer(arrays["owner"], Exchange.of_arrays(n, P, messages), arrays["weight"], arrays["bias"])


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved product, and what the trial needs of its problem."""

    layer: SolvedLayer
    neuron_owner: NDArray[np.int64]
    """(neurons,)"""
    energy: NDArray[np.float64]
    """(n, P) of `Reading`"""
    volume: int
    """Bytes a sample."""
    direct_volume: int
    """Bytes a sample."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        volumes = np.array([self.volume, self.direct_volume])
        return {"neuron_owner": self.neuron_owner, "energy": self.energy, "volumes": volumes} | self.layer.arrays()

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Solution:
        """Raises ValueError or KeyError where the arrays are not those of a solution."""
        volume, direct = arrays["volumes"].tolist()
        return Solution(SolvedLayer.of_arrays(arrays), arrays["neuron_owner"], arrays["energy"], volume, direct)


@dataclass(frozen=True, eq=False)
class Trial:
    """The whole network under one formulation for every product."""

    formulation: Formulation
    layers: dict[str, SolvedLayer]
    """By the name of the product."""
    unit_owner: NDArray[np.int64]
    """(n_units,)"""
    volume: int
    """Bytes a sample, of norms and gatherings too."""
    direct_volume: int
    """Bytes a sample."""
    output_nmse: float
    """E‖z − ẑ‖² / E‖z‖² of the network's outputs on the calibration data."""


@dataclass
class Sweep:
    """Runs trials on one calibration set.

    A trial starts each product from the owners of the trial before, and pays for what its values cost those that read
    them there (look-ahead), so the order of trials matters to the answer.
    """

    network: Network
    inputs: torch.Tensor
    """(samples, …) of the network."""
    loss_weights: dict[str, NDArray[np.float64]]
    """g (m,) of each product."""
    placement: Placement
    partitioner: str
    pruner: str
    options: SolveOptions
    checkpoint: Checkpoint
    report: Report
    looks_ahead: bool = True
    trials: list[Trial] = field(default_factory=list)
    owners: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """(m,) owners of each product's neurons in the trial before."""
    readings: dict[str, Reading] = field(default_factory=dict)
    """What each product read in the trial before."""
    exact_moments: dict[str, Moments] = field(default_factory=dict)
    """Of products that receive what they did in the original network, which no trial changes."""

    @cached_property
    def most_volume(self) -> int:
        """Bytes a sample that no trial can exceed: every value goes to every worker.

        Nor can codes, of which none has more numbers than the values that it combines.
        """
        network, others = self.network, self.placement.n_workers - 1
        sizes = [
            len(network.units(read)) * network.positions(read)
            for step in network.graph.steps
            if role_of(network.graph.module(step.name)) in (Role.PRODUCT, Role.GATHER, Role.NORM)
            for read in step.inputs
            if network.layouts[read] is not None
        ]
        return int(sum(sizes)) * others * network.dtype.itemsize * 2

    @torch.no_grad()
    def run(self, formulation: Formulation) -> Trial:
        """Sweep once with the same formulation for every product. Raises NoSolution."""
        network, graph = self.network, self.network.graph
        owners = Owners(network, self.placement)
        original, received = {INPUT: self.inputs}, {INPUT: self.inputs}
        layers: dict[str, SolvedLayer] = {}
        volume = direct = 0
        last_readers, size = graph.last_readers, network.batch_size
        for step in graph.steps:
            module, name = graph.module(step.name), step.name
            reads = [original[i] for i in step.inputs], [received[i] for i in step.inputs]
            original[name] = in_batches(module, size, *reads[0])
            if name in network.products:
                wiring = owners.wiring(name)
                found = self._found(name, wiring, reads[0][0], reads[1][0], formulation)
                layers[name] = solved = found.layer
                owners.set(wiring.units, found.neuron_owner)
                volume += found.volume
                direct += found.direct_volume
                weight, bias = torch.from_numpy(solved.weight), torch.from_numpy(solved.bias)
                received[name] = product(network.product(name), weight, bias, reads[1][0], size)
            else:
                if role_of(module) is Role.SOURCE:
                    owners.place_source(name)
                is_same = all(a is b for a, b in zip(*reads, strict=True))
                received[name] = original[name] if is_same else in_batches(module, size, *reads[1])
            for read in {i for i in step.inputs if last_readers[i] == name}:
                del original[read], received[read]
        fixed = fixed_traffic(owners)
        error = float((original[network.output] - received[network.output]).double().square().sum())
        nmse = error / max(float(original[network.output].double().square().sum()), np.finfo(float).tiny)
        trial = Trial(formulation, layers, owners.of_unit, volume + fixed, direct + fixed, nmse)
        self.trials.append(trial)
        return trial

    def _found(
        self,
        name: str,
        wiring: Wiring,
        original: torch.Tensor,
        received: torch.Tensor,
        formulation: Formulation,
    ) -> Solution:
        """The solution of a product, from the checkpoint if it is there; kept for the next trial as well."""
        key = f"trial-{len(self.trials)}-{name}"
        found = self.checkpoint.read(key, Solution.of_arrays)
        if found is None:
            problem = self._problem(name, wiring, original, received)
            self.report(f"trial {len(self.trials) + 1}, {name}")
            found = self._solve(name, problem, wiring, formulation)
            self.checkpoint.write(key, found.arrays())
        self.owners[name] = found.neuron_owner
        read = self.network.read(name)
        size = self.network.positions(read) * self.network.dtype.itemsize
        self.readings[name] = Reading(self.network.units(read), found.energy, size, self.placement.prices)
        return found

    def _problem(self, name: str, wiring: Wiring, original: torch.Tensor, received: torch.Tensor) -> LayerProblem:
        module = self.network.product(name)
        moments = self.exact_moments.get(name)
        if moments is None or received is not original:
            self.report(f"trial {len(self.trials) + 1}, {name}: calibrating")
            moments = moments_of(module, received, original, self.network.batch_size)
            if received is original:
                self.exact_moments[name] = moments
        weight = module.weight.numpy()
        value_bytes = self.network.positions(self.network.read(name)) * weight.itemsize
        return LayerProblem.create(
            weight.reshape(len(weight), -1),
            self.placement.n_workers,
            input_owner=wiring.input_owner,
            moments=moments,
            bias=None if module.bias is None else module.bias.numpy(),
            capacity=wiring.capacity,
            load=wiring.load,
            allowed=wiring.allowed,
            value_bytes=np.full(len(wiring.input_owner), value_bytes),
            link_price=self.placement.link_price,
            output_weight=self.loss_weights[name],
            column_value=column_value(module),
            row_neuron=wiring.row_neuron,
        )

    def _start(self, name: str, problem: LayerProblem) -> NDArray[np.int64] | None:
        """The owners of the trial before, where they are valid with what else of their units is placed by now."""
        owner = self.owners.get(name)
        return None if owner is None or metrics.placement_violations(problem, owner) else owner

    def _solve(self, name: str, problem: LayerProblem, wiring: Wiring, formulation: Formulation) -> Solution:
        price = getattr(formulation, "transfer_price", None)
        solved_for = formulation
        if self.looks_ahead and price:
            solved_for = onward(formulation, problem, wiring.units, self.readings, price)
        is_given = bool((wiring.allowed.sum(axis=1) == 1).all())
        solution = solve_problem(
            problem,
            solved_for,
            self.options,
            partitioner="contiguous" if is_given else self.partitioner,
            pruner=self.pruner,
            start=self._start(name, problem),
        ).require()
        assert solution.owner is not None
        assert solution.exchange is not None
        assert solution.weight is not None
        assert solution.bias is not None
        row_owner = solution.owner[problem.row_neuron]
        weight = np.ascontiguousarray(solution.weight).reshape(self.network.product(name).weight.shape)
        layer = SolvedLayer(row_owner, solution.exchange, weight, solution.bias.astype(problem.weight.dtype))
        volume = metrics.volume(problem, solution.exchange)
        return Solution(layer, solution.owner, energies(problem, row_owner), volume, problem.direct_volume)
