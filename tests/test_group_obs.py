"""group-obs against an elimination that recomputes the error of every possible next removal, and what limits mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner

from repurpose_opt import Edge, LayerProblem, Lossless, Moments, SolveOptions, Termination, Volume, metrics
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solver import Candidate, Deadline
from repurpose_opt_solvers.group_obs_ import GroupOBS, removals
from repurpose_opt_solvers.reduced import worker_problems

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


def solve(problem: LayerProblem, owner: np.ndarray, time_limit: float | None = None, **volume: Any) -> Candidate:
    return GroupOBS().solve(problem, Volume(**volume), SolveOptions(time_limit=time_limit), owner)


def prune(problem: LayerProblem, owner: np.ndarray, **volume: float) -> np.ndarray:
    """(n, P) the transfers that group-obs chooses for a Volume with these arguments."""
    candidate = solve(problem, owner, **volume)
    assert candidate.termination is Termination.HEURISTIC
    assert candidate.exchange is not None
    return candidate.exchange.transfers


def error_after(problem: LayerProblem, owner: np.ndarray, transfers: np.ndarray) -> float:
    return metrics.weighted_error(problem, owner, refit(problem, owner, transfers))


def nmse_after(problem: LayerProblem, owner: np.ndarray, transfers: np.ndarray) -> float:
    weight = refit(problem, owner, transfers)
    return metrics.nmse(problem, owner, weight, corrected_bias(problem, weight))


def eliminate(problem: LayerProblem, owner: np.ndarray, cost: np.ndarray) -> list[tuple[tuple[int, int], float]]:
    """Every transfer and the increase of the error, in the order of the least increase per unit of cost."""
    transfers = problem.remote & np.isin(np.arange(problem.P), owner)
    removed = []
    while transfers.any():
        before = error_after(problem, owner, transfers)
        increase = {}
        for j, k in np.argwhere(transfers):
            transfers[j, k] = False
            increase[int(j), int(k)] = max(error_after(problem, owner, transfers) - before, 0.0)
            transfers[j, k] = True
        pair = min(increase, key=lambda pair: increase[pair] / cost[pair])
        removed.append((pair, increase[pair]))
        transfers[pair] = False
    return removed


def pairs(transfers: np.ndarray) -> set[tuple[int, int]]:
    return {(int(j), int(k)) for j, k in np.argwhere(transfers)}


def filled(problem: LayerProblem, removed: list[tuple[tuple[int, int], float]], budget: float) -> set[tuple[int, int]]:
    """The last removed that fit the budget, one after the other."""
    taken = set()
    for pair, _ in removed[::-1]:
        if problem.transfer_bytes[pair] <= budget:
            taken.add(pair)
            budget -= problem.transfer_bytes[pair]
    return taken


@each_layer
@pytest.mark.parametrize("seed", range(3))
def test_each_removal_is_the_least_increase_of_the_error_a_byte(seed: int, arguments: dict[str, Any]):
    problem = random_layer(seed, **arguments).problem
    owner = random_owner(problem)
    expected = eliminate(problem, owner, problem.transfer_bytes)
    assert len(expected) >= 10
    for worker in worker_problems(problem, Volume(budget=0.1), owner):
        found = removals(worker, Deadline(None))
        here = [(pair, increase) for pair, increase in expected if pair[1] == worker.worker]
        assert [(int(value), worker.worker) for value in found.value] == [pair for pair, _ in here]
        np.testing.assert_allclose(found.increase, [increase for _, increase in here], rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(found.increase.sum(), worker.energy - error_of_all(problem, owner, worker.worker))


def error_of_all(problem: LayerProblem, owner: np.ndarray, worker: int) -> float:
    """The error that is left on one worker if it receives everything."""
    weight = refit(problem, owner, problem.remote)
    is_here = owner[problem.row_neuron] == worker
    here = replace(problem, output_weight=np.where(is_here, problem.output_weight, 0.0))
    return metrics.weighted_error(here, owner, weight)


@each_layer
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4, 0.55, 0.8])
def test_a_budget_keeps_what_is_removed_last_of_all_workers(share: float, arguments: dict[str, Any]):
    problem = random_layer(seed=1, **{"value_bytes": [4, 11, 5, 9, 2], **arguments}).problem
    owner = random_owner(problem)
    budget = np.floor(share * problem.direct_volume + 1e-9)
    expected = filled(problem, eliminate(problem, owner, problem.transfer_bytes), budget)
    transfers = prune(problem, owner, budget=share)
    assert pairs(transfers) == expected
    assert metrics.volume(problem, solve(problem, owner, budget=share).exchange) <= budget


@each_layer
def test_a_price_stops_each_worker_where_error_and_price_are_least(arguments: dict[str, Any]):
    problem = random_layer(seed=2, **arguments).problem
    owner = random_owner(problem)
    counts = []
    for price in (0.0, 0.01, 0.1, 1.0, 1e3):
        removed = eliminate(problem, owner, problem.transfer_price)
        expected = set()
        for k in range(problem.P):
            here = [(pair, increase) for pair, increase in removed if pair[1] == k]
            costs = [
                sum(increase for _, increase in here[:stop])
                + price * sum(problem.transfer_price[pair] for pair, _ in here[stop:])
                for stop in range(len(here) + 1)
            ]
            expected |= {pair for pair, _ in here[int(np.argmin(costs)) :]}
        assert pairs(prune(problem, owner, transfer_price=price)) == expected
        counts.append(len(expected))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == int(problem.remote.sum())
    assert counts[-1] == 0
    assert len(set(counts)) > 2


def test_a_price_is_looked_for_beyond_the_first_removal_that_does_not_pay():
    """Two inputs that are worth much together, little alone: neither removal pays, both do."""
    generator = np.random.default_rng(0)
    common = generator.normal(size=(500, 1))
    inputs = np.hstack([common + 0.3 * generator.normal(size=(500, 1)), common, generator.normal(size=(500, 2))])
    problem = LayerProblem.create(
        np.array([[1.0, -1.0, 0.0, 0.0]] * 2), 2, input_owner=[0, 0, 1, 1], value_bytes=1,
        moments=Moments.from_samples(inputs),
    )  # fmt: skip
    owner = np.array([0, 1])
    both = error_after(problem, owner, np.zeros((4, 2), dtype=bool))
    first, second = (step for pair, step in eliminate(problem, owner, problem.transfer_bytes) if pair[1] == 1)
    assert second < first
    assert not prune(problem, owner, transfer_price=0.5 * (both / 2 + first))[:, 1].any()


@pytest.mark.parametrize("seed", range(4))
def test_a_higher_price_never_buys_more(seed: int):
    problem = random_layer(seed=seed, n=12).problem
    owner = random_owner(problem)
    volumes = [prune(problem, owner, transfer_price=price).sum() for price in np.geomspace(1e-4, 10, 20)]
    assert (np.diff(volumes) <= 0).all()
    assert volumes[0] > volumes[10] > volumes[-1]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_max_nmse_is_met_with_the_fewest_of_the_last_removed(noise: float):
    problem = random_layer(seed=9, m=8, n=14, noise=noise).problem
    owner = random_owner(problem)
    counts = []
    for max_nmse in (0.2, 0.1, 0.05, 0.03):
        transfers = prune(problem, owner, max_nmse=max_nmse)
        assert nmse_after(problem, owner, transfers) <= max_nmse
        count = int(transfers.sum())
        assert (prune(problem, owner, budget_bytes=8 * count) == transfers).all()
        assert nmse_after(problem, owner, prune(problem, owner, budget_bytes=8 * (count - 1))) > max_nmse
        counts.append(count)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_max_nmse_does_not_see_output_weights():
    problem = random_layer(seed=11, output_weight=[0, 0, 0, 1, 1, 1]).problem
    owner = np.array([0, 0, 0, 1, 1, 1])
    assert nmse_after(problem, owner, prune(problem, owner, max_nmse=0.05)) <= 0.05


@pytest.mark.parametrize("arguments", [{"n": 60}, {"n": 24, "column_value": np.repeat(np.arange(24), [1, 2, 5] * 8)}])
def test_delayed_downdates_remove_the_same_as_immediate_ones(arguments: dict[str, Any]):
    problem = random_layer(seed=4, m=20, P=2, noise=0.3, **arguments).problem
    for worker in worker_problems(problem, Volume(budget=0.1), random_owner(problem)):
        immediate = removals(worker, Deadline(None), delay=1)
        for delay in (2, 7, 48, 1000):
            delayed = removals(worker, Deadline(None), delay=delay)
            assert (delayed.value == immediate.value).all()
            np.testing.assert_allclose(delayed.increase, immediate.increase, rtol=1e-7)


def test_increases_add_up_to_the_error_of_many_values():
    """200 values of one worker, so that the matrices are applied to and cut several times."""
    problem = random_layer(seed=5, m=8, n=220, P=2, input_owner=np.arange(220) // 200).problem
    owner = np.arange(8) % 2
    worker = next(w for w in worker_problems(problem, Volume(budget=0.1), owner) if w.worker == 1)
    found = removals(worker, Deadline(None))
    assert sorted(found.value) == list(range(200))
    for removed in (0, 50, 120, 180, 199, 200):
        kept = np.searchsorted(worker.value, found.value[removed:])
        lost = worker.gain(np.arange(200)) - worker.gain(kept)
        assert found.increase[:removed].sum() == pytest.approx(lost, rel=1e-8, abs=1e-10)


def test_what_is_free_and_of_use_is_sent():
    problem = random_layer(seed=6, noise=0.4, value_bytes=[0, 4, 0, 4, 4]).problem
    owner = random_owner(problem)
    assert prune(problem, owner, budget_bytes=0)[[0, 2]].sum() == problem.remote[[0, 2]].sum()
    transfers = prune(problem, owner, transfer_price=1e6)
    assert transfers[[0, 2]].sum() == problem.remote[[0, 2]].sum()
    assert not transfers[[1, 3, 4]].any()


def test_what_is_of_no_use_is_not_sent():
    problem = random_layer(seed=7).problem
    problem.weight[:] = 0.0
    for volume in ({"budget": 1.0}, {"transfer_price": 0.0}, {"max_nmse": 0.0}):
        assert not prune(problem, random_owner(problem), **volume).any()


@pytest.mark.parametrize("volume", [{"budget": 0.3}, {"transfer_price": 0.1}])
def test_a_time_limit_cuts_by_the_scores_as_they_stand(volume: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    """Out of time after 20 looks at the clock: within the limit, and better than as many transfers at random."""
    problem = random_layer(seed=12, n=40, noise=0.4).problem
    owner = random_owner(problem)
    monkeypatch.setattr("repurpose_opt_solvers.group_obs_.Deadline", lambda limit: _Looks(20 if limit is None else 5))
    candidate = GroupOBS().solve(problem, Volume(**volume), SolveOptions(time_limit=1.0), owner)
    assert candidate.termination is Termination.TIME_LIMIT
    assert candidate.exchange is not None
    transfers = candidate.exchange.transfers
    assert 0 < transfers.sum() < problem.remote.sum()
    if "budget" in volume:
        assert metrics.volume(problem, candidate.exchange) <= volume["budget"] * problem.direct_volume
    random = np.random.default_rng(0)
    others = []
    for _ in range(20):
        other = np.zeros_like(transfers)
        for k in range(problem.P):
            remote = np.flatnonzero(problem.remote[:, k])
            other[random.choice(remote, transfers[:, k].sum(), replace=False), k] = True
        others.append(error_after(problem, owner, other))
    assert error_after(problem, owner, transfers) < min(others)


class _Looks:
    """A deadline that passes after so many looks at it."""

    def __init__(self, left: int) -> None:
        self.left = left

    @property
    def passed(self) -> bool:
        self.left -= 1
        return self.left < 0

    @property
    def remaining(self) -> float:
        return 1.0


@pytest.mark.parametrize("volume", [{"budget": 0.3}, {"transfer_price": 0.1}, {"max_nmse": 0.5}])
def test_no_time_at_all_is_an_answer_too(volume: dict[str, float]):
    problem = random_layer(seed=12, n=40).problem
    candidate = solve(problem, random_owner(problem), time_limit=1e-9, **volume)
    assert candidate.termination is Termination.TIME_LIMIT
    assert candidate.exchange is not None
    if "budget" in volume:
        assert metrics.volume(problem, candidate.exchange) <= volume["budget"] * problem.direct_volume


def test_serves_volume_of_total_bytes_only():
    problem = random_layer().problem
    supports = GroupOBS().supports
    assert supports(problem, Volume(budget=0.1)) is None
    for other in (Edge(), Lossless()):
        assert "Volume" in str(supports(problem, other))
    assert "busiest" in str(supports(problem, Volume(budget=0.1, communication="busiest")))
