"""What else one could do with the same model and workers: the rows that `ours` is compared with."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.exchange import Exchange
from repurpose_opt.network.sweep import Placement
from repurpose_opt.network.trace import Chain
from repurpose_opt.runtime.plan import Plan, PlannedLayer

Transfers = Callable[[int, NDArray[np.bool_]], NDArray[np.bool_]]
"""(layer index, (n, P) what every worker with neurons lacks) → (n, P) what is sent."""


@dataclass(frozen=True)
class Cost:
    """What running a network once costs.

    `busiest_macs` is the multiply-accumulates of the busiest worker relative to 1/P of the dense network's.
    """

    values_per_sample: int
    bytes_per_sample: int
    volume_fraction: float
    messages: int
    busiest_bytes: int
    busiest_macs: float


def cost_of(plan: Plan) -> Cost:
    """The cost of a plan."""
    sent = sum(len(message.values) for layer in plan.layers for message in layer.exchange.messages.values())
    messages = sum(len(layer.exchange.messages) for layer in plan.layers)
    macs = plan.worker_macs().max() / (_dense_macs(plan.layers) / plan.n_workers)
    return Cost(sent, plan.volume, plan.volume / plan.direct_volume, messages, plan.busiest, float(macs))


def naive(direct: Plan) -> Cost:
    """All inputs to all workers; each computes everything."""
    first, P = direct.layers[0], direct.n_workers
    held = np.bincount(first.input_owner, minlength=P)
    traffic = np.tile(held[:, None], (1, P)) * ~np.eye(P, dtype=bool)
    return _cost_of_numbers(direct, [traffic], busiest_macs=float(P))


def central(direct: Plan, output_owner: int) -> Cost:
    """All inputs to the worker that wants the answer, which computes everything."""
    first, P = direct.layers[0], direct.n_workers
    traffic = np.zeros((P, P), dtype=np.int64)
    traffic[:, output_owner] = np.bincount(first.input_owner, minlength=P)
    traffic[output_owner, output_owner] = 0
    return _cost_of_numbers(direct, [traffic], busiest_macs=float(P))


def partial_sums(direct: Plan) -> Cost:
    """Tensor parallelism's row split where a layer narrows: for each pair min(neurons there, neurons here) numbers."""
    P = direct.n_workers
    traffic = []
    macs = np.zeros(P)
    for layer in direct.layers:
        here = np.bincount(layer.input_owner, minlength=P)
        there = np.bincount(layer.owner, minlength=P)
        traffic.append(np.minimum(here[:, None], there[None, :]) * ~np.eye(P, dtype=bool))
        # A pair that narrows is summed where its inputs are, another where its outputs are.
        at_source = here[:, None] > there[None, :]
        work = np.outer(here, there)
        macs += (work * at_source).sum(axis=1) + (work * ~at_source).sum(axis=0)
    share = _dense_macs(direct.layers) / P
    return _cost_of_numbers(direct, traffic, busiest_macs=float(macs.max() / share))


def direct_plan(chain: Chain, placement: Placement) -> Plan:
    """The dense model split over the workers as it stands."""
    return contiguous_plan(chain, placement, lambda index, lacking: lacking)


def late_fusion_plan(chain: Chain, placement: Placement) -> Plan:
    """Hidden layers block-diagonal as they stand; only the last layer's inputs are sent."""
    last = len(chain.linears) - 1
    return contiguous_plan(chain, placement, lambda index, lacking: lacking & (index == last))


def sparse_plan(chain: Chain, placement: Placement, kept: list[int]) -> Plan:
    """Magnitude pruning to `kept` weights in each layer, owners as they stand, sent what the weights read."""
    weights = []
    for index, count in enumerate(kept):
        weight = chain.linear(index).weight.detach().clone()
        smallest = weight.abs().flatten().argsort(descending=True, stable=True)[count:]
        weight.view(-1)[smallest] = 0.0
        weights.append(weight)
    return contiguous_plan(chain, placement, lambda index, lacking: lacking, weights)


def contiguous_plan(
    chain: Chain, placement: Placement, choose: Transfers, weights: list[torch.Tensor] | None = None
) -> Plan:
    """Owners in the neurons' order, the original weights (or `weights`) wherever their values are held or sent."""
    P = placement.n_workers
    modules = OrderedDict((str(i), copy.deepcopy(module)) for i, module in enumerate(chain.model))
    input_owner = placement.input_owner
    layers, direct = [], 0
    for index, position in enumerate(chain.linears):
        linear = chain.linear(index)
        weight = linear.weight.detach() if weights is None else weights[index]
        capacity = placement.capacity(linear.out_features, index + 1 == len(chain.linears))
        owner = np.searchsorted(np.cumsum(capacity), np.arange(linear.out_features), side="right")
        remote = input_owner[:, None] != np.arange(P)
        direct += int(remote[:, capacity > 0].sum()) * linear.weight.element_size()
        reads = (weight != 0).numpy().T @ np.eye(P, dtype=bool)[owner]
        sent = choose(index, remote & reads)
        exchange = Exchange.of_transfers(sent, input_owner)
        modules[str(position)] = _restricted(linear, weight, owner, sent | ~remote)
        layers.append(PlannedLayer(str(position), input_owner, owner, exchange, linear.weight.element_size()))
        input_owner = owner
    model = nn.Sequential(modules).eval().requires_grad_(False)
    return Plan(model, tuple(layers), P, direct, {})


@torch.no_grad()
def _restricted(linear: nn.Linear, weight: torch.Tensor, owner: NDArray[np.int64], has: NDArray[np.bool_]) -> nn.Linear:
    shape = (linear.in_features, linear.out_features)
    restricted = nn.utils.skip_init(nn.Linear, *shape, dtype=weight.dtype)  # draws no random numbers
    restricted.weight.copy_(weight * torch.from_numpy(has.T[owner]))
    restricted.bias.copy_(torch.zeros(linear.out_features) if linear.bias is None else linear.bias)
    return restricted


def _cost_of_numbers(direct: Plan, traffic: list[NDArray[np.int64]], busiest_macs: float) -> Cost:
    numbers = np.sum(traffic, axis=0)
    size = direct.layers[0].value_bytes
    sent = int(numbers.sum())
    busiest = int(max(numbers.sum(axis=0).max(), numbers.sum(axis=1).max())) * size
    messages = sum(int(np.count_nonzero(layer)) for layer in traffic)
    return Cost(sent, sent * size, sent * size / direct.direct_volume, messages, busiest, busiest_macs)


def _dense_macs(layers: tuple[PlannedLayer, ...]) -> int:
    return sum(len(layer.owner) * len(layer.input_owner) for layer in layers)
