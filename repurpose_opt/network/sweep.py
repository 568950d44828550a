"""One forward sweep: layer after layer is calibrated on what it really receives, placed, pruned and repaired."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt import metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.moments import Moments
from repurpose_opt.network.calibrate import outputs_of
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.trace import Chain
from repurpose_opt.problem import LayerProblem
from repurpose_opt.progress import Report
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """One layer of a sweep: owners (m,), messages, weights V (m, n) and bias (m,) in the model's dtype.

    V is the effective weight, U R in blocks that a code covers.
    """

    owner: NDArray[np.int64]
    exchange: Exchange
    weight: NDArray[np.floating]
    bias: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Trial:
    """The whole network under one formulation for every layer."""

    formulation: Formulation
    layers: tuple[SolvedLayer, ...]
    volume: int
    """Bytes a sample."""
    direct_volume: int
    """Bytes a sample."""
    output_nmse: float
    """E‖z − ẑ‖² / E‖z‖² of the network's outputs on the calibration data."""


@dataclass(frozen=True)
class Placement:
    """Where things may be: what stays the same over all sweeps of a run."""

    n_workers: int
    input_owner: NDArray[np.int64]
    """(n,) of the first linear layer."""
    output_owner: tuple[int, ...]
    """Workers that may hold outputs."""
    share: NDArray[np.float64]
    """(P,) relative capacity, sums to 1."""
    link_price: NDArray[np.float64] | None

    def capacity(self, neurons: int, is_last: bool) -> NDArray[np.float64]:
        """(P,) neurons that each worker may hold."""
        share = self.share.copy()
        if is_last:
            share[np.setdiff1d(np.arange(self.n_workers), self.output_owner)] = 0.0
            share = share / share.sum()
        return np.ceil(np.round(neurons * share, 9))


@dataclass
class Sweep:
    """Runs trials on one calibration set. The first layer's moments are computed once: its inputs never change.

    A trial starts each layer from the owners of the trial before, so the order of trials matters to the answer.
    """

    chain: Chain
    inputs: torch.Tensor
    """(samples, n) of the first linear layer."""
    loss_weights: list[NDArray[np.float64]]
    placement: Placement
    partitioner: str
    pruner: str
    options: SolveOptions
    checkpoint: Checkpoint
    report: Report
    trials: list[Trial] = field(default_factory=list)
    owners: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    @cached_property
    def first_moments(self) -> Moments:
        self.report("calibrating")
        return Moments.from_samples(self.inputs.numpy())

    @property
    def most_volume(self) -> int:
        """Bytes a sample that no trial can exceed: every value goes to every worker that may need it.

        Nor can codes, of which none has more numbers than the values that it combines.
        """
        others = [self.placement.n_workers - 1] * len(self.chain.linears)
        others[-1] = min(others[-1], len(self.placement.output_owner))
        linears = [self.chain.linear(index) for index in range(len(others))]
        return sum(
            linear.in_features * linear.weight.element_size() * count
            for linear, count in zip(linears, others, strict=True)
        )

    @torch.no_grad()
    def run(self, formulation: Formulation) -> Trial:
        """Sweep once with the same formulation for every layer. Raises NoSolution."""
        original = received = self.inputs
        input_owner = self.placement.input_owner
        layers: list[SolvedLayer] = []
        volume = direct = 0
        count = len(self.chain.linears)
        for index in range(count):
            self.report(f"trial {len(self.trials) + 1}, layer {index + 1} of {count}")
            linear = self.chain.linear(index)
            problem = self._problem(index, linear, original, received, input_owner)
            key = f"trial-{len(self.trials)}-layer-{index}"
            solved = self.checkpoint.read(key) or self.checkpoint.write(key, self._solve(index, problem, formulation))
            layers.append(solved)
            volume += metrics.volume(problem, solved.exchange)
            direct += problem.direct_volume
            self.owners[index] = input_owner = solved.owner
            original = outputs_of(linear.weight, linear.bias, original)
            received = outputs_of(torch.from_numpy(solved.weight), torch.from_numpy(solved.bias), received)
            original, received = self.chain.after(index, original), self.chain.after(index, received)
        error = float((original - received).double().square().sum())
        nmse = error / max(float(original.double().square().sum()), np.finfo(float).tiny)
        trial = Trial(formulation, tuple(layers), volume, direct, nmse)
        self.trials.append(trial)
        return trial

    def _problem(
        self,
        index: int,
        linear: nn.Linear,
        original: torch.Tensor,
        received: torch.Tensor,
        input_owner: NDArray[np.int64],
    ) -> LayerProblem:
        is_first = index == 0
        moments = self.first_moments if is_first else Moments.from_samples(received.numpy(), original.numpy())
        is_last = index + 1 == len(self.chain.linears)
        return LayerProblem.create(
            linear.weight,
            self.placement.n_workers,
            input_owner=input_owner,
            moments=moments,
            bias=None if linear.bias is None else linear.bias.numpy(),
            capacity=self.placement.capacity(linear.out_features, is_last),
            link_price=self.placement.link_price,
            output_weight=self.loss_weights[index],
        )

    def _solve(self, index: int, problem: LayerProblem, formulation: Formulation) -> SolvedLayer:
        solution = solve_problem(
            problem,
            formulation,
            self.options,
            partitioner=self.partitioner,
            pruner=self.pruner,
            start=self.owners.get(index),
        ).require()
        assert solution.owner is not None
        assert solution.exchange is not None
        assert solution.weight is not None
        assert solution.bias is not None
        return SolvedLayer(
            solution.owner,
            solution.exchange,
            solution.weight,
            solution.bias.astype(problem.weight.dtype),
        )
