"""What else one could do with the same model and workers: the rows that `ours` is compared with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.exchange import Code, Exchange
from repurpose_opt.network.columns import batches, column_value, columns_of
from repurpose_opt.network.owners import Owners, Placement, Wiring, fixed_traffic
from repurpose_opt.network.planned import plan_of
from repurpose_opt.network.sweep import SolvedLayer
from repurpose_opt.network.trace import Network
from repurpose_opt.runtime.coded import Product
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.layer import PlannedLayer
from repurpose_opt.runtime.plan import Plan

Transfers = Callable[[str, NDArray[np.bool_]], NDArray[np.bool_]]
"""(name of a product, (n, P) what every worker with neurons lacks) → (n, P) what is sent."""


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
    sent = sum(message.size * layer.positions for layer in plan.layers for message in layer.messages.values())
    messages = sum(len(layer.messages) for layer in plan.layers)
    macs = plan.worker_macs().max() / (_dense_macs(plan.layers) / plan.n_workers)
    return Cost(sent, plan.volume, plan.volume / max(plan.direct_volume, 1), messages, plan.busiest, float(macs))


def naive(direct: Plan) -> Cost:
    """All inputs to all workers; each computes everything."""
    P = direct.n_workers
    traffic = np.tile(_input_numbers(direct)[:, None], (1, P)) * ~np.eye(P, dtype=bool)
    return _cost_of_numbers(direct, [traffic], busiest_macs=float(P))


def central(direct: Plan, output_owner: int) -> Cost:
    """All inputs to the worker that wants the answer, which computes everything."""
    P = direct.n_workers
    traffic = np.zeros((P, P), dtype=np.int64)
    traffic[:, output_owner] = _input_numbers(direct)
    traffic[output_owner, output_owner] = 0
    return _cost_of_numbers(direct, [traffic], busiest_macs=float(P))


def partial_sums(direct: Plan) -> Cost:
    """Tensor parallelism's row split where a layer narrows: for each pair the fewer of values there and sums here."""
    P = direct.n_workers
    traffic = []
    macs = np.zeros(P)
    for layer in direct.layers:
        numbers = layer.traffic() // _itemsize(direct)
        if layer.weight_macs:
            here = np.bincount(layer.input_owner, minlength=P)
            there = np.bincount(layer.owner, minlength=P)
            values = here[:, None] * layer.positions * (there > 0)
            sums = np.broadcast_to(there * _output_positions(direct, layer), (P, P)) * (here[:, None] > 0)
            numbers = np.minimum(values, sums) * ~np.eye(P, dtype=bool)
            # A pair that narrows is summed where its inputs are, another where its outputs are.
            at_source = values > sums
            work = np.outer(here, there) * layer.weight_macs
            macs += (work * at_source).sum(axis=1) + (work * ~at_source).sum(axis=0)
        traffic.append(numbers)
    share = _dense_macs(direct.layers) / P
    return _cost_of_numbers(direct, traffic, busiest_macs=float(macs.max() / share))


def direct_plan(network: Network, placement: Placement) -> Plan:
    """The dense model split over the workers as it stands."""
    return contiguous_plan(network, placement, lambda name, lacking: lacking)


def late_fusion_plan(network: Network, placement: Placement) -> Plan:
    """Hidden layers block-diagonal as they stand; only the last product's inputs are sent."""
    last = network.products[-1]
    return contiguous_plan(network, placement, lambda name, lacking: lacking & (name == last))


@torch.no_grad()
def filled_late_fusion_plan(
    network: Network,
    placement: Placement,
    inputs: torch.Tensor,
    loss_weights: Mapping[str, NDArray[np.float64]],
    numbers: int,
) -> Plan:
    """Late fusion at a given volume: each worker's part of the answer, summed, and values between hidden layers.

    The parts are partial sums where these are fewer than the values. Up to `numbers` a sample in all, the values of
    most energy var(x_j) Σ g_i w_ij² a number (i on the receiving worker) are sent as well. `inputs` is (samples, …).
    """
    direct, last = direct_plan(network, placement), network.products[-1]
    variance = column_variance(network, inputs)
    gains, sizes = {}, {}
    for layer in direct.layers:
        if layer.weight_macs and layer.name != last:
            module = network.product(layer.name)
            squares = module.weight.double().flatten(1).square().numpy() * loss_weights[layer.name][:, None]
            by_column = squares.T @ np.eye(placement.n_workers)[layer.owner] * variance[layer.name][:, None]
            gain = np.zeros((len(layer.input_owner), placement.n_workers))
            np.add.at(gain, column_value(module), by_column / layer.positions)
            gains[layer.name] = np.where(layer.chosen_values, gain, -np.inf)
            sizes[layer.name] = np.full(gain.shape, layer.positions)

    def filled(least: float) -> Plan:
        def choose(name: str, lacking: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return lacking if name == last else lacking & (gains[name] >= least)

        return contiguous_plan(network, placement, choose, sums=(last,))

    left = numbers - cost_of(filled(np.inf)).values_per_sample
    if left < 1 or not gains:
        return filled(np.inf)
    every, size = (np.concatenate([part.ravel() for part in parts.values()]) for parts in (gains, sizes))
    order = np.argsort(-every, kind="stable")
    within = np.flatnonzero(np.cumsum(size[order]) <= left)
    return filled(float(every[order[within[-1]]]) if len(within) else np.inf)


@torch.no_grad()
def column_variance(network: Network, inputs: torch.Tensor) -> dict[str, NDArray[np.float64]]:
    """(columns,) variance of what each product sums over in the original network, over all positions."""
    sums: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    count: dict[str, int] = {}
    for batch in batches(len(inputs), network.batch_size):
        values = {INPUT: inputs[batch]}
        for step, output in network.graph.outputs(inputs[batch]):
            values[step.name] = output
            if step.name in network.products:
                columns = columns_of(network.product(step.name), values[step.inputs[0]]).double()
                zero = columns.new_zeros(columns.shape[1])
                sums[step.name] = sums.get(step.name, zero) + columns.sum(0)
                squares[step.name] = squares.get(step.name, zero) + columns.square().sum(0)
                count[step.name] = count.get(step.name, 0) + len(columns)
    return {name: (squares[name] / n - (sums[name] / n).square()).numpy() for name, n in count.items()}


def sparse_weights(network: Network, kept: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Magnitude pruning to so many weights in each product."""
    weights = {}
    for name, count in kept.items():
        weight = network.product(name).weight.detach().clone()
        smallest = weight.abs().flatten().argsort(descending=True, stable=True)[count:]
        weight.view(-1)[smallest] = 0.0
        weights[name] = weight
    return weights


def sparse_plan(
    network: Network,
    placement: Placement,
    kept: Mapping[str, int],
    owners: Mapping[str, NDArray[np.int64]] | None = None,
) -> Plan:
    """Magnitude pruning to `kept` weights in each product, sent what the weights read; owners as `contiguous_plan`."""
    weights = sparse_weights(network, kept)
    return contiguous_plan(network, placement, lambda name, lacking: lacking, weights, owners=owners)


@torch.no_grad()
def contiguous_plan(
    network: Network,
    placement: Placement,
    choose: Transfers,
    weights: Mapping[str, torch.Tensor] | None = None,
    sums: Collection[str] = (),
    owners: Mapping[str, NDArray[np.int64]] | None = None,
) -> Plan:
    """Owners in the neurons' order, the original weights (or `weights`) wherever their values are held or sent.

    In the products `sums`, partial sums are sent in place of all values of a worker wherever they are fewer. `owners`
    (m,) of the neurons of some products replace those in order.
    """
    P = placement.n_workers
    workers = Owners(network, placement)
    layers: dict[str, SolvedLayer] = {}
    direct = 0
    for step in network.graph.steps:
        name = step.name
        if name not in network.products:
            if network.is_source(name):
                workers.place_source(name)
            continue
        module, wiring = network.product(name), workers.wiring(name)
        weight = (module.weight if weights is None else weights[name]).numpy()
        neuron_owner = in_order(wiring) if owners is None or name not in owners else owners[name]
        workers.set(wiring.units, neuron_owner)
        owner = neuron_owner[wiring.row_neuron]
        remote = wiring.input_owner[:, None] != np.arange(P)
        positions = network.positions(step.inputs[0])
        direct += int(remote[:, wiring.capacity > 0].sum()) * positions * weight.itemsize
        is_read = (weight != 0).reshape(*weight.shape[:2], -1).any(axis=2)
        sent = choose(name, remote & (is_read.T @ np.eye(P, dtype=bool)[owner]))
        kept = (sent | ~remote).T[owner]
        weight = weight * kept.reshape(*kept.shape, *(1,) * (weight.ndim - 2))
        exchange = Exchange.of_transfers(sent, wiring.input_owner)
        if name in sums:
            exchange = _with_sums(exchange, wiring.input_owner, owner, weight)
        bias = np.zeros(len(weight), dtype=weight.dtype) if module.bias is None else module.bias.numpy()
        layers[name] = SolvedLayer(owner, exchange, weight, bias)
    return plan_of(network, placement, layers, workers.of_unit, int(direct + fixed_traffic(workers)), {})


def in_order(wiring: Wiring) -> NDArray[np.int64]:
    """(m,) owners in the neurons' order: each worker is filled before the next one; what is given stays.

    Neurons that only few workers may have come first, while there is room for them.
    """
    owner = np.full(len(wiring.units), -1)
    left = wiring.capacity.copy()
    given = wiring.allowed.sum(axis=1) == 1
    owner[given] = wiring.allowed[given].argmax(axis=1)
    np.subtract.at(left, owner[given], wiring.load[given])
    free = np.flatnonzero(~given)
    for neuron in free[np.argsort(wiring.allowed[free].sum(axis=1), kind="stable")]:
        fits = np.flatnonzero((left >= wiring.load[neuron] - 1e-9) & wiring.allowed[neuron])
        owner[neuron] = fits[0]
        left[fits[0]] -= wiring.load[neuron]
    return owner


def _with_sums(
    exchange: Exchange, input_owner: NDArray[np.int64], owner: NDArray[np.int64], weight: NDArray[np.floating]
) -> Exchange:
    """The same exchange, but with partial sums W_kp x_p where all values of worker p are sent and are more."""
    messages = dict(exchange.messages)
    for source, target in exchange.messages:
        held, rows = np.flatnonzero(input_owner == source), np.flatnonzero(owner == target)
        if weight.ndim == 2 and messages[source, target].size == len(held) > len(rows):
            messages[source, target] = Code.spanning(weight[np.ix_(rows, held)])
    return Exchange(exchange.n, exchange.P, messages)


def _itemsize(plan: Plan) -> int:
    return plan.layers[0].value_bytes // plan.layers[0].positions


def _output_positions(plan: Plan, layer: PlannedLayer) -> int:
    module = plan.model.get_submodule(layer.name)
    assert isinstance(module, Product)
    return layer.weight_macs // int(np.prod(module.weight.shape[2:]))


def _input_numbers(plan: Plan) -> NDArray[np.int64]:
    """(P,) numbers of a sample that each worker holds; none of an input that all of them have."""
    if plan.input_owner is None:
        return np.zeros(plan.n_workers, dtype=np.int64)
    each = int(np.prod(plan.input_shape)) // len(plan.input_owner)
    return np.bincount(plan.input_owner, minlength=plan.n_workers) * each


def _cost_of_numbers(direct: Plan, traffic: list[NDArray[np.int64]], busiest_macs: float) -> Cost:
    numbers = np.sum(traffic, axis=0)
    size = _itemsize(direct)
    sent = int(numbers.sum())
    busiest = int(max(numbers.sum(axis=0).max(), numbers.sum(axis=1).max())) * size
    messages = sum(int(np.count_nonzero(layer)) for layer in traffic)
    return Cost(sent, sent * size, sent * size / max(direct.direct_volume, 1), messages, busiest, busiest_macs)


def _dense_macs(layers: tuple[PlannedLayer, ...]) -> int:
    return sum(len(layer.owner) * len(layer.input_owner) * layer.weight_macs for layer in layers)
