"""`mt-kahypar` and `kahypar`: their hypergraph against a count by hand, their answers against the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from repurpose_opt import Lossless, Termination, metrics
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions
from repurpose_opt.testing import random_problem, registered
from repurpose_opt_solvers.kahypar_ import KaHyPar
from repurpose_opt_solvers.mt_kahypar_ import MtKaHyPar, MtKaHyParEngine
from repurpose_opt_solvers.terminals import TerminalHypergraph, terminal_hypergraph
from repurpose_opt_solvers.twins import twin_groups

BACKENDS = {
    backend.name: pytest.param(
        backend,
        id=backend.name,
        marks=pytest.mark.skipif(find_spec(backend.requires[0]) is None, reason=f"{backend.requires[0]} is missing"),
    )
    for backend in (MtKaHyPar(), KaHyPar())
}
each_backend = pytest.mark.parametrize("backend", BACKENDS.values())
needs_mt_kahypar = pytest.mark.skipif(find_spec("mtkahypar") is None, reason="mtkahypar is missing")


def solve(backend: Any, problem: LayerProblem, formulation: Any = None, start: Any = None, **options: Any) -> Any:
    with registered("partitioners", backend) as name:
        chosen = SolveOptions(**options)
        return solve_problem(problem, formulation or Lossless(), chosen, partitioner=name, start=start)


def thin(seed: int, m: int, n: int, P: int, density: float = 0.4, **arguments: Any) -> LayerProblem:
    weight = np.random.default_rng(seed).random((m, n)) < density
    return LayerProblem.create(sparse.csr_array(weight.astype(float)), P, **{"value_bytes": 1, **arguments})


# ---------------------------------------------------------------------------------------------------- the hypergraph


def connectivity(terminals: TerminalHypergraph, parts: np.ndarray) -> int:
    """λ−1 by hand."""
    blocks = [set(parts[net].tolist()) for net in terminals.nets()]
    return sum(int(weight) * (len(found) - 1) for weight, found in zip(terminals.net_weight, blocks, strict=True))


CASES: dict[str, Callable[[], LayerProblem]] = {
    "plain": lambda: thin(0, 12, 9, 3),
    "slack": lambda: thin(1, 12, 9, 3, capacity=12),
    "value_bytes": lambda: thin(2, 12, 9, 3, value_bytes=[0, 1, 2, 3, 4, 5, 6, 7, 8]),
    "input_of_a_worker_without_room": lambda: thin(3, 12, 9, 3, capacity=[6, 0, 6]),
    "forbidden_worker": lambda: thin(4, 12, 9, 3, capacity=12, allowed=np.tile([True, False, True], (12, 1))),
    "prices_by_sender": lambda: thin(5, 12, 9, 3, link_price=np.outer([1, 2, 3], [1, 1, 1]).astype(float)),
}


@pytest.mark.parametrize("case", CASES)
def test_connectivity_is_the_objective_but_for_a_constant(case: str):
    problem = CASES[case]()
    hypergraph = Lossless().hypergraph(problem)
    plain = terminal_hypergraph(problem, hypergraph)
    random = np.random.default_rng(0)
    for terminals in (plain, plain.relabelled(random)):
        constants = set()
        for _ in range(20):
            owner = random.choice(terminals.worker, problem.m)
            parts = terminals.parts(owner)
            np.testing.assert_array_equal(terminals.owner(parts), owner)
            fixed = terminals.fixed_block >= 0
            np.testing.assert_array_equal(parts[fixed], terminals.fixed_block[fixed])
            constants.add(hypergraph.cost(owner) - connectivity(terminals, parts))
        assert len(constants) == 1


def test_what_a_neuron_costs_by_itself_is_a_net_to_each_terminal():
    problem = thin(6, 6, 5, 3)
    fixed = np.random.default_rng(1).integers(0, 5, (6, 3)).astype(float)
    hypergraph = replace(Lossless().hypergraph(problem), fixed_cost=fixed)
    terminals = terminal_hypergraph(problem, hypergraph)
    owners = np.random.default_rng(2).integers(0, 3, (20, 6))
    constants = {hypergraph.cost(owner) - connectivity(terminals, terminals.parts(owner)) for owner in owners}
    assert len(constants) == 1


def test_weights_in_whole_numbers_keep_their_proportion_and_hold_the_loads():
    load = np.random.default_rng(3).uniform(0.2, 3.0, 12)
    problem = thin(7, 12, 9, 3, load=load, capacity=load.sum() / 3)
    terminals = terminal_hypergraph(problem, Lossless().hypergraph(problem))
    np.testing.assert_allclose(terminals.vertex_weight[:12] / terminals.vertex_weight[:12].sum(), load / load.sum())
    assert (terminals.vertex_weight[12:] == 1).all()
    assert terminals.block_weight.sum() >= terminals.vertex_weight.sum()
    whole = thin(7, 4, 9, 2, load=[0.3, 0.9, 0.6, 0.3], capacity=[1.2, 0.9])
    terminals = terminal_hypergraph(whole, Lossless().hypergraph(whole))
    assert terminals.vertex_weight.tolist() == [1, 3, 2, 1, 1, 1]
    assert terminals.block_weight.tolist() == [5, 4]


def test_a_pinned_neuron_is_fixed():
    allowed = np.ones((12, 3), dtype=bool)
    allowed[4] = (False, True, False)
    problem = thin(8, 12, 9, 3, allowed=allowed)
    fixed = terminal_hypergraph(problem, Lossless().hypergraph(problem)).fixed_block[:12]
    assert fixed.tolist() == [-1, -1, -1, -1, 1] + 7 * [-1]


# ------------------------------------------------------------------------------------------------- identical neurons


def with_copies(copies: int, m: int = 48, n: int = 24, P: int = 4, **arguments: Any) -> LayerProblem:
    random = np.random.default_rng(9)
    kinds = random.random((m // copies, n)) < 0.2
    kinds[0] = False  # neurons that read nothing
    weight = np.repeat(kinds, copies, axis=0)[random.permutation(m)]
    return LayerProblem.create(sparse.csr_array(weight.astype(float)), P, value_bytes=1, **arguments)


def test_groups_are_of_identical_neurons_and_of_bounded_load():
    problem = with_copies(6)
    hypergraph = Lossless().hypergraph(problem)
    reads = hypergraph.pins.toarray()
    group = twin_groups(problem, hypergraph, 4.0)
    assert np.array_equal(np.unique(group), np.arange(group.max() + 1))
    for members in (np.flatnonzero(group == number) for number in range(group.max() + 1)):
        assert len(members) <= 4
        assert (reads[members] == reads[members[0]]).all()
        assert len(members) == 1 or reads[members[0]].any()
    # Six copies in groups of four: a group of four and one of two for each kind that reads anything.
    assert sorted(np.bincount(group))[-1] == 4
    assert len(np.unique(twin_groups(problem, hypergraph, 1.0))) == problem.m


@pytest.mark.parametrize("what", ["allowed", "load", "fixed_cost"])
def test_neurons_that_differ_in_anything_are_no_twins(what: str):
    weight = np.ones((4, 2))
    arguments: dict[str, Any] = {}
    if what == "allowed":
        arguments["allowed"] = np.array([[True, True], [True, True], [True, False], [True, True]])
    if what == "load":
        arguments["load"] = [1.0, 1.0, 2.0, 1.0]
    problem = LayerProblem.create(weight, 2, capacity=4, **arguments)
    hypergraph = Lossless().hypergraph(problem)
    if what == "fixed_cost":
        hypergraph = replace(hypergraph, fixed_cost=np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]))
    assert twin_groups(problem, hypergraph, 10.0).tolist() == [0, 0, 1, 0]


def test_merged_vertices_carry_the_load_and_the_nets_of_their_neurons():
    problem = with_copies(6)
    hypergraph = Lossless().hypergraph(problem)
    plain = terminal_hypergraph(problem, hypergraph)
    before = plain.start.copy(), plain.pin.copy()
    group = twin_groups(problem, hypergraph, 6.0)
    merged = plain.merged(group)
    assert len(merged.vertex_weight) < len(plain.vertex_weight)
    assert merged.vertex_weight.sum() == plain.vertex_weight.sum()
    np.testing.assert_array_equal(merged.vertex_weight[:-4], np.bincount(group))
    random = np.random.default_rng(0)
    for terminals in (merged, merged.relabelled(random)):
        constants = set()
        for _ in range(20):
            owner = random.integers(0, 4, group.max() + 1)[group]
            constants.add(hypergraph.cost(owner) - connectivity(terminals, terminals.parts(owner)))
        assert len(constants) == 1
    np.testing.assert_array_equal(plain.start, before[0])
    np.testing.assert_array_equal(plain.pin, before[1])


# -------------------------------------------------------------------------------------------------------- the answers


@needs_mt_kahypar
def test_tiny_problems_are_near_the_least():
    gaps = []
    for seed in range(6):
        P = 2 + seed % 2
        problem = thin(seed, 6, 4, P, capacity=[4, 3] if P == 2 else [3, 2, 2])
        least = solve_problem(problem, Lossless(), partitioner="brute-force").objective
        found = solve(MtKaHyPar(), problem).objective
        assert found >= least
        gaps.append(found - least)
    assert np.mean(gaps) < 0.5


@each_backend
def test_planted_blocks_are_found_exactly(backend: Any):
    random = np.random.default_rng(0)
    hidden, input_owner = random.permutation(np.arange(64) % 4), random.permutation(np.arange(64) % 4)
    weight = (hidden[:, None] == input_owner) & (random.random((64, 64)) < 0.5)
    problem = LayerProblem.create(sparse.csr_array(weight.astype(float)), 4, input_owner=input_owner)
    solution = solve(backend, problem)
    assert solution.volume == 0
    np.testing.assert_array_equal(solution.owner, hidden)


@needs_mt_kahypar
def test_identical_neurons_stay_together():
    # Twelve kinds of four neurons, each of which reads inputs of its own: apart, they pay for those again.
    weight = np.kron(np.eye(12), np.ones((4, 2)))
    problem = LayerProblem.create(weight, 3, input_owner=np.arange(24) // 2 % 3, value_bytes=1)
    assert solve(MtKaHyPar(), problem).volume == 0


@each_backend
@pytest.mark.parametrize(
    "arguments",
    [
        {"capacity": [17, 9, 4]},
        {"capacity": [30, 30, 30], "min_load": [0, 12, 9]},
        {"capacity": [15, 0, 15]},
        {"load": np.random.default_rng(0).uniform(0.5, 2.0, 30), "capacity": 14.0, "min_load": [0.0, 10.0, 0.0]},
        {"allowed": np.random.default_rng(1).random((30, 3)) < [1.0, 0.5, 0.5]},
    ],
    ids=["uneven", "min_load", "worker_without_room", "loads", "allowed"],
)
def test_limits_are_kept(backend: Any, arguments: dict[str, Any]):
    problem = thin(10, 30, 20, 3, 0.15, **arguments)
    solution = solve(backend, problem)
    assert solution.violations == ()
    blind = solve_problem(problem, Lossless(), partitioner="random")
    assert solution.objective < blind.objective


@each_backend
def test_what_it_does_not_model_is_unsupported(backend: Any):
    uneven_links = thin(11, 6, 4, 3, link_price=[[0, 1, 2], [1, 0, 1], [1, 1, 0]])
    assert "prices" in solve(backend, uneven_links).message
    # No neuron can be on worker 2, so that what is sent there does not matter.
    without_it = thin(11, 6, 4, 3, capacity=[3, 3, 0], link_price=[[0, 1, 2], [1, 0, 1], [1, 1, 0]])
    assert solve(backend, without_it).termination is Termination.HEURISTIC
    assert solve(backend, thin(11, 6, 4, 3), Lossless(communication="busiest")).termination is Termination.UNSUPPORTED


class _FlatPrice(Lossless):
    """Lossless with a price for each neuron on each worker."""

    name = "flat-price"

    def hypergraph(self, problem: LayerProblem, owner: Any = None) -> Hypergraph:
        fixed = 100.0 * (np.arange(problem.m)[:, None] % problem.P != np.arange(problem.P))
        return replace(super().hypergraph(problem), fixed_cost=fixed)


@needs_mt_kahypar
def test_what_a_neuron_costs_by_itself_counts():
    owner = solve(MtKaHyPar(), thin(12, 12, 9, 3), _FlatPrice()).owner
    np.testing.assert_array_equal(owner, np.arange(12) % 3)


# ---------------------------------------------------------------------------------------------- start, time and seed


@needs_mt_kahypar
def test_a_start_is_improved_and_never_made_worse():
    problem = thin(13, 64, 64, 4, 0.06)
    fresh = solve(MtKaHyPar(), problem)
    start = np.random.default_rng(0).permutation(np.arange(64) // 16)
    before = Lossless().hypergraph(problem).cost(start)
    better = solve(MtKaHyPar(), problem, start=start)
    assert better.objective < 0.95 * before
    assert solve(MtKaHyPar(), problem, start=fresh.owner).objective <= fresh.objective


@needs_mt_kahypar
def test_the_first_partition_begins_at_the_start():
    problem = thin(13, 64, 64, 4, 0.06)
    start = np.random.default_rng(0).permutation(np.arange(64) // 16)
    terminals = terminal_hypergraph(problem, Lossless().hypergraph(problem))
    engine = MtKaHyParEngine(("QUALITY",), cycles=3, threads=1)
    (parts, claimed), *improved = engine.partitions(terminals, 0, 0, terminals.parts(start))
    np.testing.assert_array_equal(terminals.owner(parts), start)
    assert claimed == connectivity(terminals, parts)
    assert improved[-1][1] == connectivity(terminals, improved[-1][0]) < claimed


@each_backend
def test_a_solve_that_is_cut_short_returns_its_incumbent(backend: Any):
    problem = thin(14, 96, 96, 4, 0.05)
    once = solve(backend, problem)
    began = time.monotonic()
    solution = solve(backend, problem, time_limit=3.0)
    assert time.monotonic() - began < 3.0 * 1.1 + 1
    assert solution.termination is Termination.TIME_LIMIT
    if "repeats" in solution.stats:  # a busy machine may not even start the child
        cheapest = solve_problem(problem, Lossless(), partitioner="munkres")
        assert solution.objective <= cheapest.objective
    if solution.stats.get("repeats", 0) > 1:
        assert solution.objective <= once.objective
        assert solution.message == ""


@each_backend
def test_without_time_for_a_partition_the_start_is_returned(backend: Any):
    problem = thin(15, 32, 32, 4, 0.1)
    start = np.arange(32) // 8
    solution = solve(backend, problem, start=start, time_limit=1e-3)
    assert solution.termination is Termination.TIME_LIMIT
    np.testing.assert_array_equal(solution.owner, start)


@pytest.mark.parametrize("backend", [*BACKENDS.values(), pytest.param(MtKaHyPar(("DEFAULT",)), marks=needs_mt_kahypar)])
def test_one_answer_for_one_seed(backend: Any):
    problem = thin(16, 96, 96, 4, 0.08)
    owners = {seed: solve(backend, problem, seed=seed).owner for seed in range(2)}
    assert len({tuple(owner) for owner in owners.values()}) > 1
    for seed, owner in owners.items():
        np.testing.assert_array_equal(solve(backend, problem, seed=seed).owner, owner)


@needs_mt_kahypar
def test_presets_are_chosen_by_name():
    problem = thin(17, 64, 64, 4, 0.08)
    for presets in (("DEFAULT",), ("QUALITY", "DETERMINISTIC")):
        solution = solve(MtKaHyPar(presets), problem)
        assert solution.stats["presets"] == presets
        assert metrics.placement_violations(problem, solution.owner) == ()
    assert solve(MtKaHyPar(("NONE",)), problem).termination is Termination.ERROR


@needs_mt_kahypar
def test_what_the_library_claims_is_what_is_counted():
    problem = thin(18, 64, 64, 4, 0.08)
    solution = solve(MtKaHyPar(), problem)
    assert solution.stats["claimed_km1"] == solution.volume


@needs_mt_kahypar
def test_a_dense_layer_costs_what_direct_costs():
    problem = random_problem(19, m=12, n=6, P=3)
    assert solve(MtKaHyPar(), problem).volume == problem.direct_volume
