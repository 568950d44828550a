"""The rows that `ours` is compared with: their numbers by hand, and their plans."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_network import linear
from torch import nn

from repurpose_opt.network import baselines
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.runtime.plan import Plan


def split(sizes: list[int], n_workers: int) -> tuple[Network, Placement]:
    """A network with random weights, its inputs in equal strips, the answer on worker 0."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for n, m in pairwise(sizes):
        modules += [nn.Linear(n, m), nn.Tanh()]
    network = trace(nn.Sequential(*modules[:-1]), torch.zeros(1, sizes[0]))
    input_owner = np.arange(sizes[0]) * n_workers // sizes[0]
    return network, Placement(n_workers, input_owner, (0,), np.full(n_workers, 1 / n_workers), None)


SMALL = split([4, 4, 1], 2)
DEMO = split([6 * 784, 384, 192, 96, 10], 6)


@pytest.fixture(scope="module")
def direct() -> Plan:
    return baselines.direct_plan(*DEMO)


def test_a_small_network_by_hand() -> None:
    """4 → 4 → 1 on 2 workers: inputs 0, 1 and hidden neurons 0, 1 on worker 0, the others on 1, the output on 0."""
    direct = baselines.direct_plan(*SMALL)
    cost = baselines.cost_of(direct)
    # Two values each way, then two from worker 1 to worker 0; worker 0 does 2 · 4 + 1 · 4 of 20 products.
    assert (cost.values_per_sample, cost.bytes_per_sample, cost.volume_fraction, cost.messages) == (6, 24, 1.0, 3)
    assert cost.busiest_bytes == 16
    assert cost.busiest_macs == 12 / 10
    naive = baselines.naive(direct)
    assert (naive.values_per_sample, naive.volume_fraction, naive.messages) == (4, 4 / 6, 2)
    assert (naive.busiest_bytes, naive.busiest_macs) == (8, 2.0)
    central = baselines.central(direct, 0)
    assert (central.values_per_sample, central.volume_fraction, central.messages) == (2, 2 / 6, 1)
    assert (central.busiest_bytes, central.busiest_macs) == (8, 2.0)
    # min(2, 2) each way, then min(2, 1) to worker 0; each sums its own part of the output: 2 · 4 + 1 · 2 products.
    partial = baselines.partial_sums(direct)
    assert (partial.values_per_sample, partial.volume_fraction, partial.messages) == (5, 5 / 6, 3)
    assert (partial.busiest_bytes, partial.busiest_macs) == (12, 1.0)


def test_the_demo_by_numbers(direct: Plan) -> None:
    cost = baselines.cost_of(direct)
    assert cost.values_per_sample == 5 * (6 * 784 + 384 + 192) + 80 == 26_480
    assert cost.bytes_per_sample == direct.volume == direct.direct_volume == 4 * 26_480
    assert cost.volume_fraction == 1
    assert cost.messages == 3 * 30 + 5
    partial = baselines.partial_sums(direct)
    assert partial.values_per_sample == 30 * (64 + 32 + 16) + 5 * 10
    assert round(partial.volume_fraction, 3) == 0.129
    assert partial.busiest_macs == pytest.approx(1, abs=0.01)
    central = baselines.central(direct, 0)
    assert central.values_per_sample == 5 * 784
    assert round(central.volume_fraction, 3) == 0.148
    assert baselines.naive(direct).values_per_sample == 5 * 6 * 784
    late = baselines.cost_of(baselines.late_fusion_plan(*DEMO))
    assert (late.values_per_sample, late.messages) == (80, 5)


def test_the_direct_plan_is_the_model(direct: Plan) -> None:
    samples = torch.randn(5, 6 * 784)
    assert torch.allclose(direct.model(samples), DEMO[0].graph(samples), atol=1e-5)
    for layer, m in zip(direct.layers, (384, 192, 96, 10), strict=True):
        assert (np.diff(layer.owner) >= 0).all(), "contiguous"
        sizes = np.bincount(layer.owner, minlength=6)
        assert sizes.tolist() == ([m // 6] * 6 if m > 10 else [10, 0, 0, 0, 0, 0])


def test_late_fusion_sends_the_last_layers_inputs_only() -> None:
    plan = baselines.late_fusion_plan(*DEMO)
    assert [layer.traffic().sum() for layer in plan.layers] == [0, 0, 0, 4 * 80]
    assert plan.layers[-1].traffic()[:, 0].tolist() == [0] + [64] * 5
    for layer in plan.layers[:-1]:
        weight, original = linear(plan.model, layer.name).weight, linear(DEMO[0].graph, layer.name).weight
        diagonal = torch.from_numpy(layer.owner[:, None] == layer.input_owner[None, :])
        assert torch.equal(weight, original * diagonal)
    last = DEMO[0].products[-1]
    assert torch.equal(linear(plan.model, last).weight, linear(DEMO[0].graph, last).weight)


def test_summed_late_fusion_answers_the_same_in_fewer_numbers() -> None:
    """Ten sums instead of 16 values from each of five workers."""
    network, placement = DEMO
    samples = torch.randn(20, 6 * 784)
    weights = {name: np.ones(len(network.product(name).weight)) for name in network.products}
    plan = baselines.filled_late_fusion_plan(network, placement, samples, weights, 0)
    assert [layer.traffic().sum() for layer in plan.layers] == [0, 0, 0, 4 * 50]
    assert torch.allclose(plan.model(samples), baselines.late_fusion_plan(network, placement).model(samples), atol=1e-5)


def test_late_fusion_is_filled_with_the_values_of_most_energy() -> None:
    network, placement = DEMO
    samples = torch.randn(50, 6 * 784)
    samples[:, [5, 1000]] *= 30
    weights = {
        name: np.full(len(network.product(name).weight), weight)
        for name, weight in zip(network.products, (1.0, 1e-6, 1e-6, 1.0), strict=True)
    }
    plan = baselines.filled_late_fusion_plan(network, placement, samples, weights, 60)
    assert baselines.cost_of(plan).values_per_sample == 60
    first, last = plan.layers[0], plan.layers[-1]
    assert np.argwhere(first.chosen_values).tolist() == [
        *[[5, k] for k in (1, 2, 3, 4, 5)],
        *[[1000, k] for k in (0, 2, 3, 4, 5)],
    ]
    assert last.numbers == 50


def test_sparse_keeps_the_largest_weights_and_sends_what_they_read() -> None:
    network, placement = SMALL
    numbers = dict(zip(network.products, (5, 2), strict=True))
    plan = baselines.sparse_plan(network, placement, numbers)
    for layer in plan.layers:
        weight, original = linear(plan.model, layer.name).weight, linear(network.graph, layer.name).weight
        kept = numbers[layer.name]
        assert torch.count_nonzero(weight) == kept
        assert torch.equal(weight[weight != 0], original[weight != 0])
        assert weight[weight != 0].abs().min() >= original[weight == 0].abs().max()
        reads = {
            (j, int(layer.owner[i])) for i, j in weight.nonzero().tolist() if layer.owner[i] != layer.input_owner[j]
        }
        assert {(int(j), int(k)) for j, k in np.argwhere(layer.chosen_values)} == reads


def test_the_network_is_not_shared_with_a_plan() -> None:
    network, placement = SMALL
    plan = baselines.direct_plan(network, placement)
    plan.model.train()
    assert not any(module.training for module in network.graph.modules())


def test_a_layer_without_bias_stays_without() -> None:
    network = trace(nn.Sequential(nn.Linear(4, 3, bias=False).double()), torch.zeros(1, 4))
    plan = baselines.direct_plan(network, SMALL[1])
    assert torch.equal(linear(plan.model, 0).bias, torch.zeros(3).double())
    assert plan.layers[0].value_bytes == 8
