"""Peers: other people's pruning methods, for comparison; against enumeration, direct solves and random choices."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from repurpose_opt import Edge, LayerProblem, Volume, metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.moments import Moments
from repurpose_opt.repair import refit
from repurpose_opt.solver import SolveOptions
from repurpose_opt.testing import (
    Check,
    correlated_samples,
    least_objective_given,
    pruner_checks,
    random_problem,
)
from repurpose_opt_benchmarks.peers import (
    PEERS,
    Alps,
    Magnitude,
    Osscar,
    Peer,
    SparseGPT,
    Wanda,
    WandaReduced,
    sparsegpt,
)
from repurpose_opt_benchmarks.peers.osscar import _Removal
from repurpose_opt_benchmarks.peers.peer import error, groups, largest

HALF = Volume(budget=0.5)
BUDGETS = {"volume-bytes": Volume(budget_bytes=9)}
every_peer = pytest.mark.parametrize("peer", PEERS, ids=[peer.name for peer in PEERS])


def checks() -> list:
    return [
        pytest.param(check, id=f"{peer.name}-{name}")
        for peer in PEERS
        for name, check in pruner_checks(peer(), BUDGETS)
    ]


def layer(seed: int, m: int = 12, n: int = 24, P: int = 3) -> tuple[LayerProblem, NDArray[np.int64]]:
    """A layer with correlated inputs and owners of its neurons."""
    samples = correlated_samples(n, seed, count=8 * n)
    problem = random_problem(seed, m, n, P, moments=Moments.from_samples(samples))
    return problem, np.random.default_rng(seed).permutation(np.arange(m) % P)


def chosen(peer: type[Peer], problem: LayerProblem, budget: float, owner: NDArray[np.int64]) -> Exchange:
    exchange = peer().solve(problem, Volume(budget=budget), SolveOptions(), owner).exchange
    assert exchange is not None
    return exchange


@cache
def enumerated(kind: str, seed: int, budget: float) -> tuple[LayerProblem, NDArray[np.int64], float]:
    """A layer with 8 possible transfers, owners of its neurons and the least error within the budget."""
    problem, owner = layer(seed, m=6, n=4)
    if kind == "uncorrelated":
        problem = replace(problem, moments=Moments.from_raw(np.eye(4)))
    return problem, owner, least_objective_given(problem, Volume(budget=budget), owner)


def refitted_error(problem: LayerProblem, owner: NDArray[np.int64], transfers: NDArray[np.bool_]) -> float:
    return metrics.weighted_error(problem, owner, refit(problem, owner, transfers))


@pytest.mark.parametrize("check", checks())
def test_conformance(check: Check) -> None:
    reason = check()
    if reason is not None:
        pytest.skip(reason)


@every_peer
@pytest.mark.parametrize("budget", [0, 0.021, 0.1, 0.5, 0.99, 1])
def test_the_budget_is_kept_and_used_up(peer: type[Peer], budget: float) -> None:
    problem, owner = layer(0)
    exchange = chosen(peer, problem, budget, owner)
    assert metrics.volume(problem, exchange) == 4 * int(budget * problem.direct_volume / 4 + 1e-9)
    assert metrics.exchange_violations(problem, exchange) == ()


@every_peer
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_exact_where_inputs_are_uncorrelated(peer: type[Peer], seed: int) -> None:
    for budget in (0.25, 0.5, 0.75):
        problem, owner, least = enumerated("uncorrelated", seed, budget)
        found = refitted_error(problem, owner, chosen(peer, problem, budget, owner).transfers)
        assert found == pytest.approx(least, rel=1e-9)


@every_peer
def test_nothing_beats_enumeration_and_the_searches_come_close(peer: type[Peer]) -> None:
    gaps = []
    for seed in range(6):
        for budget in (0.25, 0.5):
            problem, owner, least = enumerated("correlated", seed, budget)
            gaps.append(refitted_error(problem, owner, chosen(peer, problem, budget, owner).transfers) / least - 1)
    assert min(gaps) >= -1e-9
    assert np.median(gaps) <= (0.01 if peer in (Alps, Osscar) else 0.5)


@every_peer
@pytest.mark.parametrize("seed", range(3))
def test_most_random_choices_are_worse(peer: type[Peer], seed: int) -> None:
    problem, owner = layer(seed)
    transfers = chosen(peer, problem, 0.25, owner).transfers
    random = np.random.default_rng(seed)
    pairs = np.argwhere(problem.remote)
    errors = []
    for _ in range(20):
        drawn = np.zeros_like(transfers)
        drawn[tuple(random.permutation(pairs)[: transfers.sum()].T)] = True
        errors.append(refitted_error(problem, owner, drawn))
    assert refitted_error(problem, owner, transfers) < np.median(errors)


def test_the_error_of_given_weights_is_that_of_the_layer() -> None:
    """The reduced problem's error, with the local columns refitted by hand."""
    problem, owner = layer(1)
    second, weight = problem.moments.regularised, np.zeros_like(problem.weight)
    total = 0.0
    for worker in groups(problem, HALF, owner):
        k = worker.reduced.worker
        rows, own = np.flatnonzero(owner == k), np.flatnonzero(problem.input_owner == k)
        other = worker.reduced.column
        given = np.random.default_rng(k).normal(size=(len(rows), len(other))) * (np.arange(len(other)) % 3 == 0)
        weight[np.ix_(rows, other)] = given
        left = problem.weight[rows] @ second[:, own] - given @ second[np.ix_(other, own)]
        weight[np.ix_(rows, own)] = np.linalg.solve(second[np.ix_(own, own)], left.T).T
        total += error(worker.reduced, given)
    assert total == pytest.approx(metrics.weighted_error(problem, owner, weight), rel=1e-9)


def test_wanda_weighs_by_the_second_moment_with_the_mean() -> None:
    """A value of great mean and little variance: magnitude passes it over, wanda does not."""
    samples = np.random.default_rng(0).normal(size=(200, 4))
    samples[:, 3] += 50
    problem = random_problem(
        m=2, n=4, P=2, weight=np.array([[1.0, 1, 4, 2], [4, 1, 1, 1]]), moments=Moments.from_samples(samples)
    )
    owner = np.array([0, 1])
    assert chosen(Magnitude, problem, 0.25, owner).transfers[2:, 0].tolist() == [True, False]
    assert chosen(Wanda, problem, 0.25, owner).transfers[2:, 0].tolist() == [False, True]


def test_wanda_reduced_knows_what_the_worker_holds() -> None:
    """Worker 0 can tell value 2 from its own value 0, so it asks for value 3, which matters less."""
    samples = np.random.default_rng(0).normal(size=(200, 4))
    samples[:, 2] = 2 * samples[:, 0] + 0.01 * samples[:, 2]
    problem = random_problem(
        m=2, n=4, P=2, weight=np.array([[1.0, 1, 1, 1], [0, 0, 1, 1]]), moments=Moments.from_samples(samples)
    )
    owner = np.array([0, 1])
    assert chosen(Wanda, problem, 0.25, owner).transfers[2:, 0].tolist() == [True, False]
    assert chosen(WandaReduced, problem, 0.25, owner).transfers[2:, 0].tolist() == [False, True]


def test_the_largest_are_positive_and_the_first_of_ties() -> None:
    scores = [np.array([0.0, 2.0, 1.0]), np.array([1.0, 0.0])]
    kept = [largest(scores, count) for count in (1, 2, 5)]
    assert [[part.tolist() for part in parts] for parts in kept] == [
        [[False, True, False], [False, False]],
        [[False, True, True], [False, False]],
        [[False, True, True], [True, False]],
    ]


@pytest.mark.parametrize("block", [4, 5, 100])
def test_sparsegpt_updates_as_if_each_pruned_column_were_solved_for(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    """After each pruned column, the later ones are the best that they can be given those before."""
    monkeypatch.setattr(sparsegpt, "BLOCK", block)
    problem, owner = layer(2)
    worker = groups(problem, HALF, owner)[0]
    moment, residual = worker.reduced.moment, worker.reduced.residual
    quota = [1] * -(-len(moment) // block)
    found = sparsegpt._pruned(worker.weight.copy(), sparsegpt._factor_of_inverse(moment), quota)
    kept = found.any(axis=0)
    assert kept.sum() == len(quota)
    expected = worker.weight.copy()
    for j in np.flatnonzero(~kept):
        expected[:, j] = 0
        before, after = slice(0, j + 1), slice(j + 1, None)
        left = residual[:, after] - expected[:, before] @ moment[before, after]
        expected[:, after] = np.linalg.solve(moment[after, after], left.T).T
    assert np.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("peer", [Alps, SparseGPT])
def test_refit_lowers_the_error_of_the_peer_s_own_weights(peer: type[Peer]) -> None:
    for seed in range(3):
        problem, owner = layer(seed)
        candidate = peer().solve(problem, Volume(budget=0.25), SolveOptions(), owner)
        assert candidate.exchange is not None
        refitted = refitted_error(problem, owner, candidate.exchange.transfers)
        assert refitted <= candidate.stats["raw_error"] * (1 + 1e-9)
        assert candidate.stats["raw_error"] < refitted_error(problem, owner, np.zeros_like(problem.remote))


def test_alps_ends_below_where_it_starts() -> None:
    """It starts from the largest scaled columns, which is what wanda-reduced keeps."""
    found, started = [], []
    for seed in range(6):
        problem, owner = layer(seed)
        for peer, errors in ((Alps, found), (WandaReduced, started)):
            errors.append(refitted_error(problem, owner, chosen(peer, problem, 0.25, owner).transfers))
    assert np.mean(found) < 0.9 * np.mean(started)


def test_osscar_s_swaps_lower_the_error_that_they_start_from() -> None:
    swaps = 0
    for seed in range(6):
        problem, owner = layer(seed)
        candidate = Osscar().solve(problem, Volume(budget=0.25), SolveOptions(), owner)
        assert candidate.exchange is not None
        found = refitted_error(problem, owner, candidate.exchange.transfers)
        before = candidate.stats["error_before_swaps"]
        swaps += candidate.stats["swaps"]
        if candidate.stats["swaps"]:
            assert found < before * (1 - 1e-9)
        else:
            assert found == pytest.approx(before)
    assert swaps > 0


def test_osscar_s_costs_of_removal_are_what_the_error_rises_by() -> None:
    problem, owner = layer(3)
    worker = groups(problem, HALF, owner)[1]
    removal = _Removal(worker)
    removal.remove(np.array([1, 4, 7]))
    costs, left = removal.costs(), removal.left
    gain = worker.reduced.gain(left)
    rises = [gain - worker.reduced.gain(np.delete(left, position)) for position in range(len(left))]
    assert np.allclose(costs, rises)


@every_peer
def test_what_a_peer_does_not_take_is_said(peer: type[Peer]) -> None:
    problem, _ = layer(0)
    uneven, diagonal = random_problem(0, value_bytes=[1, 9, 4], moments=problem_moments()), random_problem(0)
    budget = Volume(budget=0.5)
    assert peer().supports(problem, budget) is None
    refused = [
        (problem, Edge(weight_price=1, transfer_price=1)),
        (problem, Volume(budget=0.5, communication="busiest")),
        (problem, Volume(transfer_price=1)),
        (problem, Volume(max_nmse=0.1)),
        (uneven, budget),
        (diagonal, budget),
    ]
    assert all(peer().supports(*arguments) for arguments in refused)


def problem_moments() -> Moments:
    return Moments.from_samples(correlated_samples(3))
