"""group-l0 against the enumeration of all transfers with a refit each, and what it says of its answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner
from hypothesis import given, settings
from hypothesis import strategies as st

from repurpose_opt import Edge, Formulation, LayerProblem, Lossless, Moments, SolveOptions, Termination, Volume, metrics
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solver import Candidate, Deadline
from repurpose_opt.testing import (
    TINY_CASES,
    correlated_samples,
    least_objective_given,
    standard_formulations,
)
from repurpose_opt_solvers import group_l0_
from repurpose_opt_solvers.group_l0_ import GroupL0
from repurpose_opt_solvers.group_obs_ import GroupOBS
from repurpose_opt_solvers.group_omp_ import GroupOMP
from repurpose_opt_solvers.reduced import worker_problems
from repurpose_opt_solvers.threshold_ import Threshold

SERVED = {
    label: formulation
    for label, formulation in standard_formulations().items()
    if isinstance(formulation, Volume) and formulation.communication == "total" and not formulation.sends_codes
}


def solve(problem: LayerProblem, formulation: Formulation, owner: np.ndarray, pruner: Any = None) -> Candidate:
    return (GroupL0() if pruner is None else pruner).solve(problem, formulation, SolveOptions(), owner)


def objective_of(problem: LayerProblem, formulation: Formulation, owner: np.ndarray, candidate: Candidate) -> float:
    """The recomputed objective; infinite if a limit is broken."""
    assert candidate.exchange is not None
    weight = formulation.repair(problem, owner, candidate.exchange)
    if formulation.violations(problem, owner, candidate.exchange, weight):
        return np.inf
    return formulation.objective(problem, owner, candidate.exchange, weight)


def assert_least(problem: LayerProblem, formulation: Formulation, owner: np.ndarray) -> None:
    candidate = solve(problem, formulation, owner)
    least = least_objective_given(problem, formulation, owner)
    if np.isinf(least):
        assert candidate.termination is Termination.HEURISTIC
        assert candidate.bound is None
        assert "max_nmse" in candidate.message
        return
    objective = objective_of(problem, formulation, owner, candidate)
    assert objective == pytest.approx(least, rel=1e-7, abs=1e-10)
    assert candidate.termination is Termination.OPTIMAL
    assert candidate.bound == objective


@pytest.mark.parametrize("case", TINY_CASES)
@pytest.mark.parametrize("formulation", SERVED.values(), ids=SERVED)
def test_the_least_objective_of_every_tiny_case(case: str, formulation: Formulation):
    problem = TINY_CASES[case]()
    assert GroupL0().supports(problem, formulation) is None
    for seed in range(3):
        assert_least(problem, formulation, random_owner(problem, seed))


LIMITS = st.one_of(
    st.builds(lambda x: Volume(transfer_price=x), st.floats(0.0, 0.5)),
    st.builds(lambda x: Volume(budget=x), st.floats(0.0, 1.0)),
    st.builds(lambda x: Volume(budget_bytes=x), st.integers(0, 60)),
    st.builds(lambda x: Volume(max_nmse=x), st.floats(0.0, 0.6)),
)


@settings(max_examples=80)
@given(data=st.data(), seed=st.integers(0, 10**6), P=st.integers(1, 3), formulation=LIMITS)
def test_the_least_objective_of_any_small_problem(data: st.DataObject, seed: int, P: int, formulation: Volume):
    """Blocks, several rows a neuron, noise, prices of links, output weights, sparse weights, any owners."""
    n = data.draw(st.integers(1, {1: 6, 2: 7, 3: 4}[P]))
    random = np.random.default_rng(seed)
    arguments: dict[str, Any] = {
        "value_bytes": random.integers(0 if seed % 7 == 0 else 1, 12, n) if seed % 2 else 4,
        "link_price": random.uniform(0.2, 3.0, (P, P)) if seed % 3 else 1.0,
        "output_weight": random.choice([0.0, 0.3, 1.0, 4.0], 6),
        "input_owner": random.integers(0, P, n),
        "noise": data.draw(st.sampled_from([0.0, 0.5])),
        "is_sparse": data.draw(st.booleans()),
        "density": data.draw(st.sampled_from([0.4, 1.0])),
        "column_value": random.permutation(np.repeat(np.arange(n), random.integers(1, 4, n))),
        "row_neuron": [0, 1, 1, 2, 3, 4],
    }
    problem = random_layer(seed, P=P, **arguments).problem
    if data.draw(st.booleans()):
        problem = replace(problem, moments=replace(problem.moments, ridge=0.4))
    assert_least(problem, formulation, random.integers(0, P, problem.m))


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("formulation", [Volume(budget=0.3), Volume(max_nmse=0.3)], ids=["error", "nmse"])
def test_the_error_of_every_set_is_that_after_its_refit(rows: int, formulation: Volume):
    """With a ridge that shrinks the weights a lot, which the error counts and the NMSE does not."""
    random = np.random.default_rng(rows)
    layer = random_layer(
        9, P=2, noise=0.5, column_value=BLOCKS["column_value"], row_neuron=np.arange(rows),
        output_weight=random.uniform(0.5, 2.0, rows),
    )  # fmt: skip
    problem = replace(layer.problem, moments=replace(layer.problem.moments, ridge=0.7))
    owner = np.arange(rows) % 2

    def error(transfers: np.ndarray) -> float:
        weight = refit(problem, owner, transfers)
        if formulation.max_nmse is None:
            return metrics.weighted_error(problem, owner, weight)
        original = layer.original @ layer.weight.T
        difference = original - layer.received @ weight.T
        return float(np.square(difference - difference.mean(axis=0)).mean(axis=0).sum())

    nothing = np.zeros((problem.n, 2), dtype=bool)
    for worker in worker_problems(problem, formulation, owner):
        matrices = group_l0_._matrices(problem, formulation, owner, worker)
        start = group_l0_._Sets(matrices[..., None], np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.int64))
        widths = np.bincount(worker.column_value)
        (sets,) = group_l0_._all_sets(start, worker.size, widths, Deadline(None))
        assert sorted(sets.values) == list(range(2 ** len(worker.value)))
        for bits, change, size in zip(sets.values, sets.error, sets.size, strict=True):
            transfers = nothing.copy()
            transfers[worker.value, worker.worker] = (bits >> np.arange(len(worker.value))) & 1
            assert change == pytest.approx(error(transfers) - error(nothing), rel=1e-8, abs=1e-8)
            assert size == (problem.transfer_bytes * transfers).sum()


@pytest.mark.parametrize("formulation", [Volume(budget=0.45), Volume(max_nmse=0.12), Volume(transfer_price=0.05)])
@pytest.mark.parametrize("moments", ["diagonal", "received_diagonal"])
def test_uncorrelated_inputs_of_unequal_sizes_are_a_knapsack(formulation: Formulation, moments: str):
    random = np.random.default_rng(1)
    second = random.uniform(0.2, 3.0, 6)
    given = (second,) if moments == "diagonal" else (second + 0.2, second, None, second)
    problem = LayerProblem.create(
        random.normal(size=(6, 6)), 2, moments=Moments.from_raw(*given), value_bytes=[3, 7, 5, 4, 9, 2]
    )
    assert problem.moments.is_diagonal
    for seed in range(3):
        assert_least(problem, formulation, random_owner(problem, seed))


@pytest.mark.parametrize("formulation", [Volume(budget=0.4), Volume(max_nmse=0.1), Volume(transfer_price=0.01)])
def test_no_heuristic_is_better_with_many_values(formulation: Volume):
    """30 transfers, beyond the brute force: at most what the greedy pruners reach, and better somewhere."""
    better = 0
    for seed in range(4):
        problem = random_layer(seed, m=8, n=15, noise=0.2, value_bytes=np.arange(15) % 5 + 2).problem
        owner = random_owner(problem, seed)
        least = objective_of(problem, formulation, owner, solve(problem, formulation, owner))
        for pruner in (GroupOMP(), GroupOBS(), Threshold()):
            reached = objective_of(problem, formulation, owner, solve(problem, formulation, owner, pruner))
            assert least <= reached * (1 + 1e-9)
            better += least < 0.99 * reached
    assert better


def test_pieces_of_the_enumeration_and_of_the_pairs_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    problem = random_layer(3, m=8, n=12, P=4, noise=0.2, value_bytes=np.arange(12) % 7 + 1).problem
    owner = random_owner(problem)
    formulations = [Volume(budget=0.4), Volume(max_nmse=0.1)]
    whole = [solve(problem, formulation, owner) for formulation in formulations]
    monkeypatch.setattr(group_l0_, "_MOST_NUMBERS", 50)
    monkeypatch.setattr(group_l0_, "_MOST_PAIRS", 40)
    for formulation, expected in zip(formulations, whole, strict=True):
        again = solve(problem, formulation, owner)
        assert again.exchange is not None
        assert expected.exchange is not None
        assert (again.exchange.transfers == expected.exchange.transfers).all()


def test_an_nmse_that_cannot_be_met_is_said_with_the_least():
    problem = random_layer(5, noise=0.8).problem
    owner = random_owner(problem)
    candidate = solve(problem, Volume(max_nmse=0.0), owner)
    assert candidate.exchange is not None
    assert candidate.termination is Termination.HEURISTIC
    weight = refit(problem, owner, candidate.exchange.transfers)
    reached = metrics.nmse(problem, owner, weight, corrected_bias(problem, weight))
    assert f"{reached:.4g}" in candidate.message
    everything = refit(problem, owner, problem.remote)
    assert reached <= metrics.nmse(problem, owner, everything, corrected_bias(problem, everything)) + 1e-12


def test_no_time_is_no_proof():
    problem = random_layer(6, n=12).problem
    owner = random_owner(problem)
    candidate = GroupL0().solve(problem, Volume(budget=0.3), SolveOptions(time_limit=1e-9), owner)
    assert candidate.termination is Termination.TIME_LIMIT
    assert candidate.bound is None
    assert candidate.exchange is not None
    assert metrics.volume(problem, candidate.exchange) <= 0.3 * problem.direct_volume


def test_serves_small_problems_of_total_volume_only():
    supports = GroupL0().supports
    problem = random_layer().problem
    for other in (Edge(), Lossless()):
        assert "Volume" in str(supports(problem, other))
    assert "busiest" in str(supports(problem, Volume(budget=0.1, communication="busiest")))

    def with_values(count: int, **arguments: Any) -> LayerProblem:
        samples = correlated_samples(len(arguments.get("column_value", range(count))))
        weight = np.ones((4, samples.shape[1]))
        moments = Moments.from_samples(samples)
        return LayerProblem.create(weight, 2, input_owner=[0] * count, moments=moments, **arguments)

    assert supports(with_values(24), Volume(budget=0.1)) is None
    assert "25" in str(supports(with_values(25), Volume(budget=0.1)))
    wide = with_values(20, column_value=np.repeat(np.arange(20), 9))
    assert "too many" in str(supports(wide, Volume(budget=0.1)))
    uncorrelated = LayerProblem.create(np.ones((4, 500)), 2)
    assert supports(uncorrelated, Volume(budget=0.1)) is None  # a ranking is the proof
    ranked = solve(uncorrelated, Volume(budget=0.1), np.array([0, 0, 1, 1]))
    assert ranked.termination is Termination.OPTIMAL


def test_blocks_with_values_between_other_workers():
    """The values' columns are not side by side and not in order."""
    problem = random_layer(8, noise=0.3, **{**BLOCKS, "column_value": [3, 0, 2, 1, 3, 1, 0, 4]}).problem
    for formulation in SERVED.values():
        assert_least(problem, formulation, random_owner(problem, 1))
