"""What else one could do with the same model and workers: the rows that `ours` is compared with."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.exchange import Code, Exchange
from repurpose_opt.network.calibrate import outputs_of
from repurpose_opt.network.planned import planned
from repurpose_opt.network.sweep import Placement
from repurpose_opt.network.trace import Chain
from repurpose_opt.runtime.layer import PlannedLayer
from repurpose_opt.runtime.plan import Plan

Transfers = Callable[[int, NDArray[np.bool_]], NDArray[np.bool_]]
"""(layer index, (n, P) what every worker with neurons lacks) → (n, P) what is sent."""


@dataclass(frozen=True)
class Cost:
    """What running a network once costs.

    `values_per_sample` counts the numbers sent: values, and linear combinations of them.
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
    sent = sum(message.size for layer in plan.layers for message in layer.messages.values())
    messages = sum(len(layer.messages) for layer in plan.layers)
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


@torch.no_grad()
def filled_late_fusion_plan(
    chain: Chain, placement: Placement, inputs: torch.Tensor, loss_weights: list[NDArray[np.float64]], numbers: int
) -> Plan:
    """Late fusion at a given volume: each worker's part of the answer, summed, and values between hidden layers.

    The parts are partial sums where these are fewer than the values. Up to `numbers` a sample in all, the values of
    most energy var(x_j) Σ g_i w_ij² (i on the receiving worker) are sent as well. `inputs` is (samples, n).
    """
    direct, last = direct_plan(chain, placement), len(chain.linears) - 1
    values, gains = inputs, []
    for index, layer in enumerate(direct.layers[:-1]):
        linear = chain.linear(index)
        row_energy = linear.weight.double().square().numpy() * loss_weights[index][:, None]
        gain = row_energy.T @ np.eye(placement.n_workers)[layer.owner] * values.double().var(0).numpy()[:, None]
        gains.append(np.where(layer.chosen_values, gain, -np.inf))
        values = chain.after(index, outputs_of(linear.weight, linear.bias, values))

    def filled(least: float) -> Plan:
        def choose(index: int, lacking: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return lacking & (index == last or gains[index] >= least)

        return contiguous_plan(chain, placement, choose, sums=(last,))

    left = numbers - cost_of(filled(np.inf)).values_per_sample
    if left < 1 or not gains:
        return filled(np.inf)
    ranked = np.sort(np.concatenate([gain.ravel() for gain in gains]))[::-1]
    return filled(float(ranked[min(left, len(ranked)) - 1]))


def sparse_plan(chain: Chain, placement: Placement, kept: list[int]) -> Plan:
    """Magnitude pruning to `kept` weights in each layer, owners as they stand, sent what the weights read."""
    weights = []
    for index, count in enumerate(kept):
        weight = chain.linear(index).weight.detach().clone()
        smallest = weight.abs().flatten().argsort(descending=True, stable=True)[count:]
        weight.view(-1)[smallest] = 0.0
        weights.append(weight)
    return contiguous_plan(chain, placement, lambda index, lacking: lacking, weights)


@torch.no_grad()
def contiguous_plan(
    chain: Chain,
    placement: Placement,
    choose: Transfers,
    weights: list[torch.Tensor] | None = None,
    sums: Collection[int] = (),
) -> Plan:
    """Owners in the neurons' order, the original weights (or `weights`) wherever their values are held or sent.

    In the layers `sums`, partial sums are sent in place of all values of a worker wherever they are fewer.
    """
    P = placement.n_workers
    modules = OrderedDict((str(i), copy.deepcopy(module)) for i, module in enumerate(chain.model))
    input_owner = placement.input_owner
    layers: list[PlannedLayer] = []
    direct = 0
    for index, position in enumerate(chain.linears):
        linear = chain.linear(index)
        weight = (linear.weight if weights is None else weights[index]).numpy()
        capacity = placement.capacity(linear.out_features, index + 1 == len(chain.linears))
        owner = np.searchsorted(np.cumsum(capacity), np.arange(linear.out_features), side="right")
        remote = input_owner[:, None] != np.arange(P)
        direct += int(remote[:, capacity > 0].sum()) * linear.weight.element_size()
        sent = choose(index, remote & ((weight != 0).T @ np.eye(P, dtype=bool)[owner]))
        weight = weight * (sent | ~remote).T[owner]
        exchange = Exchange.of_transfers(sent, input_owner)
        if index in sums:
            exchange = _with_sums(exchange, input_owner, owner, weight)
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        name = str(position)
        modules[name], layer = planned(name, input_owner, owner, exchange, weight, bias.numpy())
        layers.append(layer)
        input_owner = owner
    model = nn.Sequential(modules).eval().requires_grad_(False)
    return Plan(model, tuple(layers), P, direct, {})


def _with_sums(
    exchange: Exchange, input_owner: NDArray[np.int64], owner: NDArray[np.int64], weight: NDArray[np.floating]
) -> Exchange:
    """The same exchange, but with partial sums W_kp x_p where all values of worker p are sent and are more."""
    messages = dict(exchange.messages)
    for source, target in exchange.messages:
        held, rows = np.flatnonzero(input_owner == source), np.flatnonzero(owner == target)
        if messages[source, target].size == len(held) > len(rows):
            messages[source, target] = Code.spanning(weight[np.ix_(rows, held)])
    return Exchange(exchange.n, exchange.P, messages)


def _cost_of_numbers(direct: Plan, traffic: list[NDArray[np.int64]], busiest_macs: float) -> Cost:
    numbers = np.sum(traffic, axis=0)
    size = direct.layers[0].value_bytes
    sent = int(numbers.sum())
    busiest = int(max(numbers.sum(axis=0).max(), numbers.sum(axis=1).max())) * size
    messages = sum(int(np.count_nonzero(layer)) for layer in traffic)
    return Cost(sent, sent * size, sent * size / direct.direct_volume, messages, busiest, busiest_macs)


def _dense_macs(layers: tuple[PlannedLayer, ...]) -> int:
    return sum(len(layer.owner) * len(layer.input_owner) for layer in layers)
