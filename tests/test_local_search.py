"""`local-search`: conformance, its incremental costs against the hypergraph's, and what it is worth."""

from __future__ import annotations

import time

import numpy as np
import pytest

from repurpose_opt import Edge, LayerProblem, Lossless, SolveOptions, Volume
from repurpose_opt.formulation import Formulation
from repurpose_opt.moments import Moments
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import random_problem
from repurpose_opt_benchmarks.lossless_random import lossless_problem

pytest.importorskip("numba")
from repurpose_opt_solvers import local_search_


def loose(seed: int) -> LayerProblem:
    """Room to move, uneven loads, prices, places and sizes: everything that a proposal must look at."""
    rng = np.random.default_rng(seed)
    weight = np.where(rng.random((30, 20)) < 0.3, rng.normal(size=(30, 20)), 0.0)
    allowed = rng.random((30, 4)) < 0.8
    allowed[np.arange(30), np.arange(30) % 4] = True
    return LayerProblem.create(
        weight,
        4,
        load=rng.integers(1, 4, 30),
        capacity=[25, 20, 20, 30],
        min_load=[5, 0, 10, 0],
        allowed=allowed,
        value_bytes=rng.integers(1, 5, 20),
        link_price=rng.uniform(0.0, 3.0, (4, 4)),
    )


FORMULATIONS: dict[str, Formulation] = {
    "lossless": Lossless(),
    "busiest": Lossless(communication="busiest"),
    "volume": Volume(transfer_price=0.05),
    "edge": Edge(weight_price=0.05, transfer_price=0.02),
}


@pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_the_cost_that_it_keeps_is_the_hypergraphs(formulation: Formulation, seed: int) -> None:
    """Thousands of accepted proposals at a high temperature, then the sum of changes against a fresh count."""
    problem = loose(seed)
    start = solve_problem(problem, formulation, partitioner="contiguous").require().owner
    assert start is not None
    hypergraph = formulation.hypergraph(problem, start)
    assert hypergraph is not None
    annealing = local_search_._annealing(problem, hypergraph, start, seed)
    annealing.owner = start.copy()
    annealing.load = np.bincount(start, annealing.load_of_neuron, problem.P)
    annealing.incumbent = start.copy()
    cost = annealing.reset()
    after, best = annealing.run(cost, cost, 5000, 10 * annealing.typical, 1.0)
    assert (annealing.owner != start).any()
    assert best <= min(cost, after) + 1e-9
    np.testing.assert_allclose(annealing.load, np.bincount(annealing.owner, annealing.load_of_neuron, problem.P))
    assert annealing.reset() == pytest.approx(after, abs=1e-6)
    annealing.owner = annealing.incumbent
    assert annealing.reset() == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("formulation", FORMULATIONS.values(), ids=FORMULATIONS)
def test_a_table_of_gains_is_what_a_fresh_one_would_be(formulation: Formulation) -> None:
    problem = loose(5)
    start = solve_problem(problem, Lossless(), partitioner="contiguous").require().owner
    assert start is not None
    annealing = local_search_._annealing(problem, Lossless().hypergraph(problem), start, 0)
    annealing.owner = start.copy()
    annealing.load = np.bincount(start, annealing.load_of_neuron, problem.P)
    annealing.incumbent = start.copy()
    annealing.run(annealing.reset(), np.inf, 2000, 5.0, 1.0)
    kept = annealing.leave.copy(), annealing.enter.copy(), annealing.count.copy()  # type: ignore[attr-defined]
    annealing.reset()
    fresh = annealing.leave, annealing.enter, annealing.count  # type: ignore[attr-defined]
    for before, after in zip(kept, fresh, strict=True):
        np.testing.assert_allclose(before, after, atol=1e-9)


def test_it_lowers_the_volume_of_the_alternation_on_random_layers() -> None:
    problem = lossless_problem(64, 4, 0.05, planted=False, seed=0)
    before = solve_problem(problem, Lossless(), partitioner="alternate")
    after = solve_problem(problem, Lossless(), partitioner="alternate+local-search")
    assert after.volume < 0.95 * before.volume


def test_it_searches_from_its_start_even_where_the_search_only_stands_in() -> None:
    """Volume with a budget and correlated inputs: the start is never lost, and there is nothing to prove."""
    samples = np.random.default_rng(3).normal(size=(200, 16)) @ np.random.default_rng(4).normal(size=(16, 16))
    problem = random_problem(3, 24, 16, 4, moments=Moments.from_samples(samples))
    before = solve_problem(problem, Volume(budget=0.2), partitioner="compensated")
    after = solve_problem(problem, Volume(budget=0.2), partitioner="compensated+local-search")
    assert not after.violations
    assert after.objective <= before.objective
    assert after.bound is None


def test_the_same_seed_gives_the_same_owners_and_another_one_others() -> None:
    problem = lossless_problem(64, 4, 0.08, planted=False, seed=1)
    found = [
        solve_problem(problem, Lossless(), SolveOptions(seed=seed), partitioner="local-search").owner
        for seed in (0, 0, 1)
    ]
    assert all(owner is not None for owner in found)
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_time_limit_ends_it_compiled_or_not(is_compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled: in a child that is ended, since numba cannot be interrupted."""
    problem = lossless_problem(256, 8, 0.05, planted=False, seed=1)
    monkeypatch.setattr(local_search_, "is_compiled", lambda: is_compiled)
    started = time.monotonic()
    solution = solve_problem(problem, Lossless(), SolveOptions(time_limit=2.0), partitioner="local-search")
    assert time.monotonic() - started < 20  # a hang, not a race
    assert solution.owner is not None
    assert not solution.violations


def test_the_pruner_has_time_left_after_a_search_under_a_limit() -> None:
    """A search that used the whole limit up left the transfers unchosen: everything was sent."""
    samples = np.random.default_rng(3).normal(size=(300, 60)) @ np.random.default_rng(4).normal(size=(60, 60))
    problem = random_problem(3, 40, 60, 4, moments=Moments.from_samples(samples))
    chain = "contiguous+local-search"
    limited = solve_problem(problem, Volume(max_nmse=0.3), SolveOptions(time_limit=4.0), partitioner=chain)
    assert not limited.violations
    assert limited.transfers.sum() < problem.remote.sum()


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e9])
def test_the_unit_of_prices_does_not_matter(unit: float) -> None:
    problem = lossless_problem(64, 4, 0.05, planted=False, seed=0)
    prices = unit * (1 - np.eye(4))
    scaled = LayerProblem.create(problem.weight, 4, value_bytes=1, link_price=prices)
    alternation = solve_problem(problem, Lossless(), partitioner="alternate").objective
    assert solve_problem(scaled, Lossless(), partitioner="local-search").objective / unit < 0.95 * alternation


def test_a_cache_of_another_numba_does_not_count_as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for formulation in FORMULATIONS.values():  # each compiles its kernel
        assert solve_problem(loose(0), formulation, partitioner="local-search").owner is not None
    assert local_search_.is_compiled()
    monkeypatch.setattr(local_search_.kernels().gains._cache._cache_file, "_version", "another")
    assert not local_search_.is_compiled()
