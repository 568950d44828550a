"""Metrics against sums over the samples themselves, and against counts with sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import (
    BLOCKS,
    error_on_samples,
    nmse_on_samples,
    random_layer,
    random_owner,
    random_supported_weight,
    random_transfers,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from repurpose_opt import Edge, Exchange, Formulation, LayerProblem, Lossless, Moments, Values, Volume, metrics
from repurpose_opt import problem as problem_module
from repurpose_opt.testing import random_problem

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.3},
    "output_weight": {"noise": 0.3, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "blocks": {"noise": 0.3, **BLOCKS},
    "sparse": {"noise": 0.3, "is_sparse": True, "density": 0.5},
}


@pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("is_sparse", [False, True])
def test_errors_equal_the_mean_over_the_samples(arguments: dict[str, Any], is_sparse: bool):
    layer = random_layer(seed=3, **arguments)
    problem = layer.problem
    owner, transfers = random_owner(problem), random_transfers(problem)
    weight: Any = random_supported_weight(problem, owner, transfers)
    bias = np.random.default_rng(4).normal(size=problem.rows)
    weight = sparse.csr_array(weight) if is_sparse else weight
    assert metrics.weighted_error(problem, owner, weight) == pytest.approx(error_on_samples(layer, weight), rel=1e-9)
    assert metrics.nmse(problem, owner, weight, bias) == pytest.approx(nmse_on_samples(layer, weight, bias), rel=1e-9)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("scale", [None, [1.3, 0.7, 1.0]])
def test_diagonal_moments_equal_samples_that_are_uncorrelated(is_sparse: bool, scale: list[float] | None):
    """Samples ±√n·d_j along the axes have the covariance diag(d²) exactly; x̂ = scale · x."""
    spread, shift = np.array([0.5, 1.0, 2.0]), np.array([0.3, -1.0, 0.2])
    original = np.sqrt(3) * np.vstack([np.diag(spread), -np.diag(spread)]) + shift
    received = original if scale is None else original * scale
    in_full = Moments.from_samples(received, None if scale is None else original, shrinkage=0.0)
    moments = replace(
        in_full, second=np.diag(in_full.second), cross=np.diag(in_full.cross), target=np.diag(in_full.target)
    )
    if scale is None:
        moments = replace(moments, cross=moments.second, target=moments.second)
    dense_problem = random_problem(5, moments=moments)
    weight: Any = dense_problem.weight * (np.random.default_rng(6).random((5, 3)) < 0.6)
    difference = original @ dense_problem.weight.T - received @ weight.T
    centred = difference - difference.mean(axis=0)
    ridge = moments.ridge * np.square(dense_problem.weight - weight).sum()
    expected = np.square(centred).sum(axis=1).mean() + ridge
    shifted = np.square(difference + dense_problem.bias).sum(axis=1).mean()
    expected_nmse = shifted / np.square(original @ dense_problem.weight.T).sum(axis=1).mean()
    problem = replace(dense_problem, weight=sparse.csr_array(dense_problem.weight)) if is_sparse else dense_problem
    weight = sparse.csr_array(weight) if is_sparse else weight
    owner = random_owner(problem)
    assert metrics.weighted_error(problem, owner, weight) == pytest.approx(expected, rel=1e-9)
    assert metrics.nmse(problem, owner, weight, np.zeros(5)) == pytest.approx(expected_nmse, rel=1e-9)


@pytest.mark.parametrize("moments", ["same", "received"])
@pytest.mark.parametrize("height", [1, 3, 100])
def test_row_blocks_of_any_height_give_the_sums_over_whole_matrices(
    monkeypatch: pytest.MonkeyPatch, moments: str, height: int
):
    random = np.random.default_rng(height)
    monkeypatch.setattr(problem_module, "_CACHED_ENTRIES", height * 5)
    inputs = random.normal(size=(40, 5)) + 1.0
    received = None if moments == "same" else inputs + 0.3 * random.normal(size=inputs.shape)
    given = Moments.from_samples(
        inputs if received is None else received, None if received is None else inputs, diagonal=True
    )
    problem = random_problem(7, n=5, weight=random.normal(size=(7, 5)).astype(np.float32), moments=given)
    owner, transfers = random_owner(problem), random_transfers(problem)
    V = random_supported_weight(problem, owner, transfers).astype(np.float32)
    W, v, ridge = problem.weight.astype(np.float64), V.astype(np.float64), given.ridge
    second, cross, target = np.diag(given.second), np.diag(given.cross), np.diag(given.target)
    raw = W @ target @ W.T - 2 * v @ cross.T @ W.T + v @ second @ v.T
    expected = np.trace(raw) + ridge * np.square(W - v).sum()
    assert metrics.weighted_error(problem, owner, V) == pytest.approx(expected, rel=1e-6)
    shift = W @ given.target_mean + problem.bias - v @ given.mean
    scale = np.trace(W @ target @ W.T) + np.square(W @ given.target_mean).sum()
    expected = (np.trace(raw) + np.square(shift).sum()) / scale
    assert metrics.nmse(problem, owner, V, np.zeros(7)) == pytest.approx(expected, rel=1e-6)
    everywhere = np.ones((7, 5))
    lacking = 7 * 5 - np.count_nonzero(random_supported_weight(problem, owner, transfers))
    exchange = Exchange.of_transfers(transfers, problem.input_owner)
    assert metrics.weights_outside(problem, owner, exchange, everywhere) == lacking > 0


def test_nmse_of_float32_weights():
    layer = random_layer(seed=7, m=8, n=6)
    problem = replace(layer.problem, weight=layer.problem.weight.astype(np.float32))
    layer = replace(layer, problem=problem)
    weight = problem.weight * np.float32(1.01)
    expected = nmse_on_samples(layer, weight.astype(np.float64), problem.bias)
    assert metrics.nmse(problem, random_owner(problem), weight, problem.bias) == pytest.approx(expected, rel=1e-5)


def test_nmse_of_a_layer_without_output():
    problem = random_problem(weight=np.zeros((5, 3)))
    assert metrics.nmse(problem, random_owner(problem), np.zeros((5, 3)), problem.bias) == 0.0
    assert metrics.nmse(problem, random_owner(problem), np.zeros((5, 3)), problem.bias + 1) == np.inf


def sent(problem: LayerProblem, transfers: np.ndarray) -> set[tuple[int, int, int]]:
    """(value, source, target) of every transfer."""
    return {(j, int(problem.input_owner[j]), k) for j in range(problem.n) for k in range(problem.P) if transfers[j, k]}


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9), st.integers(1, 5))
def test_volume_counts_every_transfer_once(seed: int, m: int, n: int, P: int):
    random = np.random.default_rng(seed)
    problem = random_problem(
        seed, m, n, P,
        value_bytes=random.integers(0, 9, n), link_price=random.uniform(0, 3, (P, P)),
        input_owner=random.integers(0, P, n),
    )  # fmt: skip
    transfers = random_transfers(problem, seed)
    exchange = Exchange.of_transfers(transfers, problem.input_owner)
    messages = sent(problem, transfers)
    size = problem.value_bytes
    assert metrics.volume(problem, exchange) == sum(size[j] for j, _, _ in messages)
    assert metrics.volume(problem, exchange) == metrics.traffic(problem, exchange).sum()
    priced = sum(size[j] * problem.link_price[source, target] for j, source, target in messages)
    assert metrics.priced_volume(problem, exchange) == pytest.approx(priced)
    out = [sum(size[j] for j, source, _ in messages if source == k) for k in range(P)]
    into = [sum(size[j] for j, _, target in messages if target == k) for k in range(P)]
    assert metrics.busiest(problem, exchange) == max(out + into)
    price = problem.link_price
    out = [sum(size[j] * price[k, target] for j, source, target in messages if source == k) for k in range(P)]
    into = [sum(size[j] * price[source, k] for j, source, target in messages if target == k) for k in range(P)]
    assert metrics.priced_busiest(problem, exchange) == pytest.approx(max(out + into))
    assert metrics.priced_communication(problem, exchange, "busiest") == metrics.priced_busiest(problem, exchange)
    assert metrics.priced_communication(problem, exchange, "total") == metrics.priced_volume(problem, exchange)
    assert (exchange.transfers == transfers).all()


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9), st.integers(1, 5), st.floats(0.05, 1.0))
def test_lossless_volume_is_the_connectivity_of_the_hypergraph(seed: int, m: int, n: int, P: int, density: float):
    """One net per value: its owner and the neurons that read it; Σ (λ − 1) over the nets."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(m, n)) * (random.random((m, n)) < density)
    problem = random_problem(
        seed, m, n, P, weight=weight, value_bytes=1, input_owner=random.integers(0, P, n), capacity=m
    )
    owner = random.integers(0, P, m)
    nets = [{int(problem.input_owner[j])} | {int(owner[i]) for i in range(m) if weight[i, j]} for j in range(n)]
    exchange = Lossless().select(problem, owner)
    assert metrics.volume(problem, exchange) == sum(len(net) - 1 for net in nets)


FORMULATIONS: tuple[Formulation, ...] = (
    Edge(weight_price=0.1, transfer_price=0.03),
    Volume(transfer_price=0.03),
    Volume(budget=0.5),
    Lossless(),
    Volume(budget=0.5, communication="busiest"),
    Lossless(communication="busiest"),
)


@given(st.integers(0, 10**6), st.sampled_from(FORMULATIONS))
def test_renaming_the_workers_changes_no_objective(seed: int, formulation: Formulation):
    random = np.random.default_rng(seed)
    problem = random_layer(seed, 7, 6, 4, noise=0.2, link_price=random.uniform(0.5, 2, (4, 4)), capacity=7).problem
    name = random.permutation(4)
    prices = np.empty((4, 4))
    prices[np.ix_(name, name)] = problem.link_price
    renamed = replace(problem, input_owner=name[problem.input_owner], link_price=prices)
    owner = random.integers(0, 4, 7)
    expected = objective(problem, formulation, owner)
    assert objective(renamed, formulation, name[owner]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.integers(0, 10**6), st.floats(0.01, 100.0))
def test_scaling_the_output_weight_scales_the_error_and_changes_no_choice(seed: int, factor: float):
    problem = random_layer(seed, noise=0.2, output_weight=np.random.default_rng(seed).uniform(0.1, 3, 6)).problem
    scaled = replace(problem, output_weight=factor * problem.output_weight)
    owner = random_owner(problem, seed)
    formulation = Volume(budget=0.5)
    assert (formulation.select(scaled, owner).transfers == formulation.select(problem, owner).transfers).all()
    expected = factor * objective(problem, formulation, owner)
    assert objective(scaled, formulation, owner) == pytest.approx(expected, rel=1e-9)
    priced, rescaled = Volume(transfer_price=0.03), Volume(transfer_price=0.03 * factor)
    assert objective(scaled, rescaled, owner) == pytest.approx(factor * objective(problem, priced, owner), rel=1e-9)


def objective(problem: LayerProblem, formulation: Formulation, owner: np.ndarray) -> float:
    exchange = formulation.select(problem, owner)
    return formulation.objective(problem, owner, exchange, formulation.repair(problem, owner, exchange))


def test_macs_are_rows_held_times_columns_had():
    problem = random_layer(8, **BLOCKS).problem
    owner, transfers = random_owner(problem), random_transfers(problem)
    expected = []
    for k in range(problem.P):
        rows = [r for r in range(problem.rows) if owner[problem.row_neuron[r]] == k]
        values = {j for j in range(problem.n) if problem.input_owner[j] == k or transfers[j, k]}
        expected.append(len(rows) * sum(int(v) in values for v in problem.column_value))
    exchange = Exchange.of_transfers(transfers, problem.input_owner)
    assert metrics.worker_macs(problem, owner, exchange).tolist() == expected


def test_placement_violations_name_what_is_wrong():
    allowed = np.ones((4, 2), dtype=bool)
    allowed[3, 0] = False
    problem = random_problem(m=4, allowed=allowed, capacity=[3, 2], min_load=[0, 1])
    assert metrics.placement_violations(problem, np.array([0, 0, 0, 1])) == ()
    wrong = {
        (0, 0, 0, 0): ("worker 0 holds load 4, above its capacity 3", "worker 1 holds load 0, below", "neuron 3"),
        (0, 0, 0, 2): ("owner outside 0 … 1",),
        (0, 0, -1, 1): ("owner outside 0 … 1",),
        (0, 1, 1, 1): ("worker 1 holds load 3, above its capacity 2",),
        (0, 0, 0): ("owner has dtype int64 and shape (3,)",),
    }
    for owner, messages in wrong.items():
        found = metrics.placement_violations(problem, np.array(owner))
        assert len(found) == len(messages), found
        assert all(text.startswith(start) for text, start in zip(found, messages, strict=True)), found
    assert metrics.placement_violations(problem, np.array([0.0, 0.0, 0.0, 1.0]))[0].startswith(
        "owner has dtype float64"
    )


@pytest.mark.parametrize("is_sparse", [False, True])
def test_weights_that_read_what_their_worker_lacks_are_counted(is_sparse: bool):
    problem = random_problem(m=2, n=2, input_owner=[0, 1])
    owner = np.array([0, 1])
    weight: Any = np.array([[1.0, 1.0], [1.0, 0.0]])
    weight = sparse.csr_array(weight) if is_sparse else weight
    nothing = Exchange.nothing(2, 2)
    assert metrics.weights_outside(problem, owner, nothing, weight) == 2
    assert len(metrics.violations(problem, owner, nothing, weight)) == 1
    sends = Exchange.of_transfers(np.array([[False, True], [True, False]]), problem.input_owner)
    assert metrics.violations(problem, owner, sends, weight) == ()


WRONG_MESSAGES = {
    "not held by the sender": Exchange(3, 3, {(0, 1): Values(np.array([2]))}),
    "to itself": Exchange(3, 3, {(0, 0): Values(np.array([0]))}),
    "sent twice": Exchange(3, 3, {(0, 1): Values(np.array([0, 0]))}),
    "no such value": Exchange(3, 3, {(0, 1): Values(np.array([3]))}),
    "no such value from the end": Exchange(3, 3, {(2, 1): Values(np.array([-1]))}),
    "no such worker": Exchange(3, 3, {(0, 3): Values(np.array([0]))}),
    "another number of values": Exchange(4, 3, {}),
}


@pytest.mark.parametrize("exchange", WRONG_MESSAGES.values(), ids=WRONG_MESSAGES)
def test_impossible_messages_are_violations(exchange: Exchange):
    problem = random_problem(m=3, n=3, P=3, input_owner=[0, 1, 2])
    assert metrics.violations(problem, np.array([0, 1, 2]), exchange, np.zeros((3, 3)))


def test_a_value_is_never_sent_to_its_own_worker():
    with pytest.raises(ValueError, match="value 1 to its own owner"):
        Exchange.of_transfers(np.array([[False, True], [False, True]]), np.array([0, 1]))
