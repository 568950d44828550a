"""group-omp against a greedy that recomputes the error of every possible next transfer, and what budgets mean."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner

from repurpose_opt import LayerProblem, Moments, SolveOptions, Termination, Volume, metrics, registry
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solver import Deadline
from repurpose_opt_solvers.group_omp_ import _pursue

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.4},
    "output_weight": {"noise": 0.4, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "blocks": {"noise": 0.4, "value_bytes": [4, 8, 4, 12, 4], **BLOCKS},
    "link_price": {"noise": 0.4, "link_price": [[0, 1, 4], [2, 0, 1], [1, 3, 0]]},
    "a_worker_without_inputs": {"noise": 0.4, "input_owner": [0, 0, 2, 2, 0]},
    "sparse": {"noise": 0.4, "is_sparse": True, "density": 0.5},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
pruners = pytest.mark.parametrize("pruner", ["group-omp", "threshold"])


def prune(problem: LayerProblem, owner: np.ndarray, pruner: str = "group-omp", **volume: float) -> np.ndarray:
    """(n, P) the transfers that a pruner chooses for a Volume with these arguments."""
    candidate = registry.load("pruners", pruner)().solve(problem, Volume(**volume), SolveOptions(), owner)
    assert candidate.exchange is not None
    return candidate.exchange.transfers


def error_after(problem: LayerProblem, owner: np.ndarray, transfers: np.ndarray) -> float:
    return metrics.weighted_error(problem, owner, refit(problem, owner, transfers))


def gains(problem: LayerProblem, owner: np.ndarray, transfers: np.ndarray) -> dict[tuple[int, int], float]:
    """By how much each transfer that is not made yet would lower the error."""
    before = error_after(problem, owner, transfers)
    found = {}
    for j, k in np.argwhere(problem.remote & ~transfers):
        transfers[j, k] = True
        found[int(j), int(k)] = before - error_after(problem, owner, transfers)
        transfers[j, k] = False
    return {pair: gain for pair, gain in found.items() if gain > 1e-12}


def greedy(
    problem: LayerProblem, owner: np.ndarray, cost: np.ndarray, *, least_rate: float = 0.0, budget: float = np.inf
) -> dict[tuple[int, int], float]:
    """(value, worker): rate, in the order of the largest decrease of the error per unit of cost.

    It goes on while the rate is above `least_rate`, among the transfers that the budget still allows.
    """
    transfers = np.zeros((problem.n, problem.P), dtype=bool)
    rates: dict[tuple[int, int], float] = {}
    while True:
        found = {pair: gain / cost[pair] for pair, gain in gains(problem, owner, transfers).items()}
        found = {pair: rate for pair, rate in found.items() if problem.transfer_bytes[pair] <= budget}
        pair = max(found, key=lambda pair: found[pair], default=(0, 0))
        if not found or found[pair] <= least_rate:
            return rates
        rates[pair] = found[pair]
        budget -= problem.transfer_bytes[pair]
        transfers[pair] = True


def pairs(transfers: np.ndarray) -> set[tuple[int, int]]:
    return {(int(j), int(k)) for j, k in np.argwhere(transfers)}


@each_layer
@pytest.mark.parametrize("seed", range(3))
def test_each_step_is_the_largest_decrease_of_the_error_a_byte(seed: int, arguments: dict[str, Any]):
    problem = random_layer(seed, **arguments).problem
    owner = random_owner(problem)
    expected = greedy(problem, owner, problem.transfer_bytes)
    assert len(expected) >= 6
    steps = {(j, k): rate for j, k, rate in _pursue(problem, Volume(budget=1.0), owner, Deadline(None)) if rate > 1e-12}
    assert list(steps) == list(expected)
    np.testing.assert_allclose(list(steps.values()), list(expected.values()), rtol=1e-6)


@each_layer
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.8])
def test_a_budget_is_spent_on_the_largest_decreases_that_it_still_allows(share: float, arguments: dict[str, Any]):
    problem = random_layer(seed=1, **{"value_bytes": [4, 11, 5, 9, 2], **arguments}).problem
    owner = random_owner(problem)
    budget = np.floor(share * problem.direct_volume + 1e-9)
    expected = greedy(problem, owner, problem.transfer_bytes, budget=budget)
    assert pairs(prune(problem, owner, budget=share)) == set(expected)


@each_layer
def test_a_price_is_paid_while_the_error_falls_by_more(arguments: dict[str, Any]):
    problem = random_layer(seed=2, **arguments).problem
    owner = random_owner(problem)
    counts = []
    for price in (0.0, 0.01, 0.1, 1.0, 1e3):
        expected = greedy(problem, owner, problem.transfer_price, least_rate=price)
        assert pairs(prune(problem, owner, transfer_price=price)) == set(expected)
        counts.append(len(expected))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert len(set(counts)) > 2


@pytest.mark.parametrize("seed", range(6))
def test_what_does_not_fit_a_budget_any_more_does_not_count_as_sent(seed: int):
    """Pairs of inputs that resemble each other, one of each dearer: without it, its twin is worth sending."""
    random = np.random.default_rng(seed)
    some = random.normal(size=(80, 5))
    inputs = np.hstack([some, some + 0.8 * random.normal(size=some.shape)])
    weight = np.hstack([2 * random.normal(size=(4, 5)), 0.2 * random.normal(size=(4, 5))])
    problem = LayerProblem.create(
        weight, 2, input_owner=0, moments=Moments.from_samples(inputs), value_bytes=[4] * 5 + [3] * 5
    )
    owner = np.array([0, 0, 1, 1])
    for budget in range(3, 30):
        expected = greedy(problem, owner, problem.transfer_bytes, budget=budget)
        assert pairs(prune(problem, owner, budget_bytes=budget)) == set(expected)


def test_blocks_of_two_columns_have_exact_gains_where_inputs_are_uncorrelated():
    """C = I as a full matrix: the greedy is then the ranking of the energies of the blocks."""
    layer = random_layer(seed=3, column_value=np.repeat(np.arange(4), 2))
    problem = replace(layer.problem, moments=Moments.from_raw(np.eye(8)))
    owner = random_owner(problem)
    energy = np.zeros((4, 3))
    np.add.at(energy, (problem.column_value[None, :], owner[:, None]), np.square(problem.weight))
    ranked = np.argsort(-np.where(problem.remote, energy, 0.0), axis=None)[:3]
    expected = {(int(j), int(k)) for j, k in zip(*np.unravel_index(ranked, energy.shape), strict=True)}
    assert pairs(prune(problem, owner, budget_bytes=24)) == expected


def test_more_transfers_than_are_set_aside_at_first():
    """150 values to one worker: the pursuit's memory of its steps has to grow, and the error still vanishes."""
    problem = random_layer(seed=4, m=6, n=160, P=2, input_owner=np.arange(160) // 150).problem
    problem = replace(problem, moments=Moments.from_samples(np.random.default_rng(5).normal(size=(400, 160))))
    owner = np.array([1, 1, 1, 0, 0, 0])
    transfers = prune(problem, owner, budget=1.0)
    assert transfers[:150, 1].all()
    before = error_after(problem, owner, np.zeros((160, 2), dtype=bool))
    for count in (50, 80, 120, 150):
        some = prune(problem, owner, budget_bytes=count * 8)
        assert some.sum() == count
        steps = islice(_pursue(problem, Volume(budget_bytes=count * 8), owner, Deadline(None)), count)
        gained = sum(8 * rate for _, _, rate in steps)
        assert before - error_after(problem, owner, some) == pytest.approx(gained, rel=1e-9)


@pruners
@each_layer
def test_a_budget_is_hard_and_filled(pruner: str, arguments: dict[str, Any]):
    problem = random_layer(seed=6, **{"value_bytes": [1, 5, 2, 7, 3], **arguments}).problem
    owner = random_owner(problem)
    for budget in (0.0, 0.1, 0.35, 0.7, 1.0):
        allowed = np.floor(budget * problem.direct_volume + 1e-9)
        transfers = prune(problem, owner, pruner, budget=budget)
        left = allowed - problem.transfer_bytes[transfers].sum()
        assert left >= 0
        useful = gains(problem, owner, transfers)
        assert not [pair for pair in useful if problem.transfer_bytes[pair] <= left], "it would still fit"


def test_a_larger_budget_never_makes_the_error_larger():
    problem = random_layer(seed=7, noise=0.4).problem
    owner = random_owner(problem)
    errors = [error_after(problem, owner, prune(problem, owner, budget=share)) for share in np.linspace(0, 1, 11)]
    assert (np.diff(errors) <= 1e-12).all()
    assert errors[0] > 2 * errors[-1]


@pruners
def test_a_higher_price_never_buys_more(pruner: str):
    problem = random_layer(seed=8, n=12).problem
    owner = random_owner(problem)
    volumes = [prune(problem, owner, pruner, transfer_price=price).sum() for price in np.geomspace(1e-4, 10, 20)]
    assert (np.diff(volumes) <= 0).all()
    assert volumes[0] > volumes[10] > volumes[-1]


@pruners
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_max_nmse_is_met_with_the_shortest_prefix_of_the_ranking(pruner: str, noise: float):
    problem = random_layer(seed=9, m=8, n=14, noise=noise).problem
    owner = random_owner(problem)

    def nmse_after(transfers: np.ndarray) -> float:
        weight = refit(problem, owner, transfers)
        return metrics.nmse(problem, owner, weight, corrected_bias(problem, weight))

    counts = []
    for max_nmse in (0.2, 0.1, 0.05, 0.03):
        transfers = prune(problem, owner, pruner, max_nmse=max_nmse)
        assert nmse_after(transfers) <= max_nmse
        count = int(transfers.sum())
        assert (prune(problem, owner, pruner, budget_bytes=8 * count) == transfers).all()
        assert nmse_after(prune(problem, owner, pruner, budget_bytes=8 * (count - 1))) > max_nmse
        counts.append(count)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


@pruners
def test_an_nmse_of_zero_sends_what_is_needed_and_no_more(pruner: str):
    layer = random_layer(seed=10)
    weight = layer.weight.copy()
    owner = random_owner(layer.problem)
    weight[owner == 0, 4] = 0.0  # held by worker 2: worker 0 has no use for it
    problem = replace(layer.problem, weight=weight)
    transfers = prune(problem, owner, pruner, max_nmse=0.0)
    assert error_after(problem, owner, transfers) == pytest.approx(0.0, abs=1e-9)
    assert not transfers[4, 0]


@pruners
def test_a_neuron_whose_output_weight_is_zero_still_counts_for_max_nmse(pruner: str):
    problem = random_layer(seed=11, output_weight=[0, 0, 0, 1, 1, 1]).problem
    owner = np.array([0, 0, 0, 1, 1, 1])
    transfers = prune(problem, owner, pruner, max_nmse=0.05)
    weight = refit(problem, owner, transfers)
    assert metrics.nmse(problem, owner, weight, corrected_bias(problem, weight)) <= 0.05


def test_a_time_limit_ends_the_pursuit():
    problem = random_layer(seed=12, n=40).problem
    candidate = registry.load("pruners", "group-omp")().solve(
        problem, Volume(budget=1.0), SolveOptions(time_limit=1e-9), random_owner(problem)
    )
    assert candidate.termination is Termination.TIME_LIMIT
    assert candidate.exchange is not None
    assert not candidate.exchange.transfers.all()


def test_group_omp_serves_volume_only():
    from repurpose_opt import Edge, Lossless

    supports = registry.load("pruners", "group-omp")().supports
    problem = random_layer().problem
    assert supports(problem, Volume(budget=0.1)) is None
    assert "Volume" in supports(problem, Edge())
    assert "Volume" in supports(problem, Lossless())
