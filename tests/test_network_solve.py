"""METIS by ctypes, the cost of sending onwards, and the placement of whole networks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import Edge, Formulation, LayerProblem, Lossless, Volume, metrics
from repurpose_opt.errors import InvalidArgument, NoSolution, SolverNotInstalled
from repurpose_opt.network_solve import solve_network, solve_problems
from repurpose_opt.onward import Onward, onward_cost
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions, Termination
from repurpose_opt.testing import formulation_checks, random_problem, registered
from repurpose_opt_benchmarks.lossless_random import lossless_problem
from repurpose_opt_benchmarks.patterns import sparse_layer
from repurpose_opt_benchmarks.radix import main as run_radix
from repurpose_opt_benchmarks.radix import structured
from repurpose_opt_benchmarks.radix_net import radix_net
from repurpose_opt_solvers.contiguous_ import Contiguous

LONG = 60.0


def sparse_weight(rng: np.random.Generator, m: int, n: int, density: float) -> NDArray[np.float64]:
    return (rng.random((m, n)) < density).astype(float)


def counted_volume(weights: Sequence[Any], owners: Sequence[NDArray[np.int64]]) -> int:
    """Values sent, counted one by one; `owners` starts with those of the inputs."""
    sent = set()
    for number, weight in enumerate(weights):
        for i, j in zip(*np.nonzero(sparse.coo_array(weight).toarray()), strict=True):
            if owners[number + 1][i] != owners[number][j]:
                sent.add((number, j, owners[number + 1][i]))
    return len(sent)


# ------------------------------------------------------------------------------------------------- METIS by ctypes


@pytest.fixture
def metis() -> Any:
    pytest.importorskip("pymetis")
    from repurpose_opt_solvers import metis_

    return metis_


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_ctypes_and_pymetis_agree_on_one_constraint(metis: Any, seed: int) -> None:
    problem = lossless_problem(256, 8, 0.05, planted=False, seed=1)
    found = metis.attempts(problem)["cut"].part(seed)
    expected = metis.partition(metis.graph(problem, Lossless()), seed + 1)  # METIS's own seeds start at 1
    np.testing.assert_array_equal(found, expected)


def test_every_constraint_is_balanced(metis: Any) -> None:
    from repurpose_opt_solvers.metis_library import Graph, partition_graph

    rng = np.random.default_rng(0)
    count, parts, constraints = 600, 4, 3
    pairs = sparse.csr_array(np.triu(rng.random((count, count)) < 0.02, 1).astype(float))
    adjacency = (pairs + pairs.T).tocsr()
    load = rng.integers(1, 9, (count, constraints))
    share = np.array([0.1, 0.2, 0.3, 0.4])[:, None].repeat(constraints, axis=1)
    ones = np.ones(adjacency.nnz, dtype=np.int64)
    graph = Graph(adjacency.indptr, adjacency.indices, ones, load, np.ones(count))
    part = partition_graph(graph, share, np.full(constraints, 1.05), seed=3)
    held = np.stack([np.bincount(part, load[:, number], parts) for number in range(constraints)], axis=1)
    assert (held <= 1.05 * share * load.sum(axis=0) + load.max()).all()
    cut = (part[adjacency.tocoo().row] != part[adjacency.tocoo().col]).mean()
    assert cut < 0.65  # 1 − Σ share² = .7 for parts drawn at random


def test_without_the_symbol_the_error_says_so(metis: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from repurpose_opt_solvers import metis_library

    monkeypatch.setattr(metis_library.ctypes, "CDLL", lambda path: object())
    with pytest.raises(SolverNotInstalled, match="does not export METIS_PartGraphKway"):
        metis_library._library.__wrapped__()


def test_metis_keeps_the_best_of_its_attempts(metis: Any) -> None:
    for seed, planted, n in product(range(2), (False, True), (128, 512)):
        problem = lossless_problem(n, 8, 0.03, planted=planted, seed=seed)
        solution = solve_problem(problem, Lossless(), SolveOptions(seed=seed), partitioner="metis").require()
        volumes = solution.stats["volume_of_attempts"]
        assert set(volumes) == {"cut", "shared", "tied"} | ({"volume"} if n == 128 else set())
        assert solution.volume == min(volumes.values())


def test_metis_answers_the_same_in_a_child_under_a_time_limit(metis: Any) -> None:
    problem = lossless_problem(64, 4, 0.05, planted=False, seed=0)
    here, there = (
        solve_problem(problem, Lossless(), SolveOptions(time_limit=limit), partitioner="metis").require()
        for limit in (None, LONG)
    )
    np.testing.assert_array_equal(here.owner, there.owner)


def test_metis_balances_unequal_loads(metis: Any) -> None:
    rng = np.random.default_rng(4)
    load = rng.integers(1, 20, 96)
    weight = sparse_weight(rng, 96, 64, 0.05)
    problem = LayerProblem.create(weight, 4, load=load, value_bytes=1)
    solution = solve_problem(problem, Lossless(), partitioner="metis").require()
    assert solution.violations == ()
    assert solution.volume < solve_problem(problem, Lossless(), partitioner="random").volume


def test_metis_places_all_layers_at_once(metis: Any) -> None:
    rng = np.random.default_rng(5)
    P, n = 4, 64
    weights = [sparse_layer(n, P, 0.06, 0.2, rng) for _ in range(3)]
    pinned = np.arange(n)[:, None] % P == np.arange(P)
    problems = [
        LayerProblem.create(weight, P, value_bytes=1, allowed=pinned if number == 2 else None)
        for number, weight in enumerate(weights)
    ]
    start = [np.arange(n) * P // n] * 3
    for limit in (None, LONG):
        owners = metis.Metis().solve_network(problems, Lossless(), SolveOptions(time_limit=limit), start)
        for problem, owner in zip(problems, owners, strict=True):
            assert metrics.placement_violations(problem, owner) == ()
        np.testing.assert_array_equal(owners[2], np.arange(n) % P)
        first = problems[0].input_owner
        assert counted_volume(weights, [first, *owners]) < 0.8 * counted_volume(weights, [first, *start[:2], owners[2]])


def test_each_layer_is_balanced_for_itself(metis: Any) -> None:
    """Inputs on one worker, outputs on the other: a whole layer on each would be balanced, and cheaper."""
    n = 60
    rng = np.random.default_rng(13)
    allowed = np.tile([False, True], (n, 1))
    problems = [
        LayerProblem.create(sparse_weight(rng, n, n, 0.1), 2, input_owner=0, value_bytes=1),
        LayerProblem.create(sparse_weight(rng, n, n, 0.01), 2, value_bytes=1),
        LayerProblem.create(sparse_weight(rng, n, n, 0.1), 2, value_bytes=1, allowed=allowed, capacity=[0, n]),
    ]
    for attempt in metis.network_attempts(problems).values():
        part = attempt.part(0)
        for hidden in (part[:n], part[n : 2 * n]):
            assert np.bincount(hidden, minlength=2).max() <= n / 2 + 5


def test_metis_at_once_ends_at_the_time_limit(metis: Any) -> None:
    problems = [LayerProblem.create(np.ones((8, 8)), 2)] * 2
    with pytest.raises(NoSolution, match="time limit"):
        metis.Metis().solve_network(problems, Lossless(), SolveOptions(time_limit=1e-3), [])


# ---------------------------------------------------------------------------------------------------------- Onward

COST = np.random.default_rng(6).uniform(0, 9, (5, 2))
ONWARD: dict[str, Formulation] = {
    "lossless": Onward(Lossless(), COST),
    "lossless-busiest": Onward(Lossless(communication="busiest"), COST),
    "edge": Onward(Edge(weight_price=0.05, transfer_price=0.02), COST),
    "volume": Onward(Volume(transfer_price=0.04), COST),
}
CHECKS = [
    pytest.param(check, id=f"{kind}-{name}")
    for kind, formulation in ONWARD.items()
    for name, check in formulation_checks(formulation)
    if not name.endswith("-single")  # the one case of four neurons
]


@pytest.mark.parametrize("check", CHECKS)
def test_onward_is_a_formulation(check: Callable[[], str | None]) -> None:
    reason = check()
    if reason is not None:
        pytest.skip(reason)


def test_onward_cost_is_what_the_next_layer_pays() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        owner, before = rng.integers(0, 3, 6), rng.integers(0, 3, 5)
        following = LayerProblem.create(
            sparse_weight(rng, 6, 5, 0.4),
            3,
            input_owner=before,
            capacity=6,
            value_bytes=rng.integers(1, 9, 5),
            link_price=rng.uniform(0.1, 3, (3, 3)),
        )
        paid = metrics.priced_volume(following, Lossless().select(following, owner))
        assert onward_cost(following, owner)[np.arange(5), before].sum() == pytest.approx(paid)


def test_a_backend_that_knows_nothing_of_onward_serves_it() -> None:
    problem = random_problem(8, value_bytes=1)
    cost = np.zeros((5, 2))
    cost[:3, 0] = cost[3:, 1] = 100.0
    solution = solve_problem(problem, Onward(Lossless(), cost), partitioner="alternate").require()
    np.testing.assert_array_equal(solution.owner, [1, 1, 1, 0, 0])
    assert solution.objective == solution.volume


@pytest.mark.parametrize("cost", [np.zeros(5), np.full((5, 2), np.inf)])
def test_onward_refuses_costs_that_are_none(cost: NDArray[np.float64]) -> None:
    with pytest.raises(InvalidArgument, match=r"cost: .* allowed: finite \(m, P\)"):
        Onward(Lossless(), cost)


# --------------------------------------------------------------------------------------------------- whole networks


def least_volume(weights: Sequence[NDArray[np.float64]], first: NDArray[np.int64]) -> int:
    """Over all placements with half of the neurons on each of two workers."""
    halves = sorted(set(permutations([0, 0, 1, 1])))
    return min(
        counted_volume(weights, [first, *map(np.array, owners)]) for owners in product(halves, repeat=len(weights))
    )


def test_tiny_networks_against_brute_force() -> None:
    rng = np.random.default_rng(9)
    first = np.array([0, 0, 1, 1])
    count, reached, gained = 40, 0, 0
    for seed in range(count):
        weights = [sparse_weight(rng, 4, 4, 0.4) for _ in range(2)]
        solution = solve_network(weights, 2, input_owner=first, value_bytes=1, partitioner="alternate", seed=seed)
        least = least_volume(weights, first)
        assert solution.volume >= least
        assert solution.volume == counted_volume(weights, [first, *solution.owners])
        assert solution.violations == ()
        forward = solution.stats["volume"]["forward"]
        assert solution.volume <= forward[0]
        reached += solution.volume == least
        gained += solution.volume < forward[0]
    assert reached >= 0.75 * count
    assert gained > 0


def test_looking_ahead_sees_what_the_forward_sweep_cannot() -> None:
    """Neurons that read nothing may be anywhere: only their readers, which are pinned, tell where."""
    nothing, order = np.zeros((8, 4)), np.array([5, 2, 7, 0, 1, 6, 3, 4])
    solution = solve_network(
        [nothing, np.eye(8)[order]], 2, output_owner=np.arange(8) % 2, value_bytes=1, partitioner="alternate"
    )
    assert solution.volume == 0
    np.testing.assert_array_equal(solution.owners[0][order], np.arange(8) % 2)


def test_figures_of_a_network_are_those_of_its_layers() -> None:
    rng = np.random.default_rng(10)
    weights = [sparse_weight(rng, m, n, 0.1) for m, n in ((30, 20), (25, 30), (7, 25))]
    prices = rng.uniform(0.5, 2, (3, 3))
    solution = solve_network(
        weights, 3, output_owner=1, link_price=prices, worker_share=[1, 2, 1], value_bytes=3, partitioner="alternate"
    )
    first = solution.layers[0].problem.input_owner
    assert solution.volume == 3 * counted_volume(weights, [first, *solution.owners])
    assert solution.objective == pytest.approx(
        sum(
            metrics.priced_volume(layer.problem, Lossless().select(layer.problem, layer.owner))
            for layer in solution.layers
        )
    )
    for before, layer in zip(solution.layers, solution.layers[1:], strict=False):
        np.testing.assert_array_equal(layer.problem.input_owner, before.owner)
    assert (solution.owners[2] == 1).all()
    for owner, capacity in ((solution.owners[0], [8, 15, 8]), (solution.owners[1], [7, 13, 7])):
        assert (np.bincount(owner, minlength=3) <= capacity).all()
    received, sent = np.zeros(3), np.zeros(3)
    for layer in solution.layers:
        for (source, target), message in layer.exchange.messages.items():
            sent[source] += 3 * len(message.values)
            received[target] += 3 * len(message.values)
    assert solution.busiest == max(sent.max(), received.max())


@pytest.mark.parametrize("partitioner", ["alternate", "metis+alternate"])
def test_look_ahead_is_never_worse_and_the_same_for_a_seed(partitioner: str) -> None:
    if partitioner != "alternate":
        pytest.importorskip("pymetis")
    rng = np.random.default_rng(11)
    weights = [sparse_layer(48, 4, 0.05, None, rng) for _ in range(3)]
    solution, again = (solve_network(weights, 4, value_bytes=1, partitioner=partitioner, seed=2) for _ in range(2))
    for volumes in solution.stats["volume"].values():
        assert volumes == sorted(volumes, reverse=True)
    assert solution.volume == min(volumes[-1] for volumes in solution.stats["volume"].values())
    assert solution.volume < solution.stats["volume"]["forward"][0]
    for one, other in zip(solution.owners, again.owners, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_passed_deadline_still_gives_the_forward_sweep() -> None:
    rng = np.random.default_rng(12)
    weights = [sparse_layer(48, 4, 0.05, None, rng) for _ in range(3)]
    solution = solve_network(weights, 4, time_limit=1e-3, partitioner="alternate")
    assert solution.violations == ()
    assert solution.termination is Termination.TIME_LIMIT


class AllAtOnce(Contiguous):
    """Places a layer contiguously, and all layers as it is told."""

    name = "all-at-once"

    def __init__(self, owners: list[NDArray[np.int64]], reason: str | None = None) -> None:
        self.owners, self.reason = owners, reason

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return self.reason if problem.n == 8 else None

    def solve_network(self, *_: Any) -> list[NDArray[np.int64]]:
        return self.owners


def test_the_placement_of_all_layers_counts_where_it_is_better() -> None:
    weights = [np.ones((8, 1)), np.eye(8)]
    crossed = np.arange(8) % 2
    with registered("partitioners", AllAtOnce([crossed, crossed])) as name:
        solution = solve_network(weights, 2, partitioner=f"{name}@0.5+contiguous", output_owner=crossed, value_bytes=1)
    assert solution.stats["start"] == "all-at-once"
    assert solution.volume == 1


def test_a_placement_of_all_layers_that_is_wrong_is_refused_and_recorded() -> None:
    weights = [np.ones((8, 1)), np.eye(8)]
    with registered("partitioners", AllAtOnce([np.zeros(8, dtype=np.int64)] * 2)) as name:
        solution = solve_network(weights, 2, partitioner=name)
    assert solution.stats["start"] == "forward"
    assert "above its capacity" in solution.stats["starts"][name]
    with registered("partitioners", AllAtOnce([], reason="not this one")) as name:
        solution = solve_network([np.ones((8, 1)), np.eye(8)], 2, partitioner=f"{name}+contiguous")
    assert solution.stats["starts"] == {name: "not this one"}


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("weights", {"weights": []}),
        ("n_workers", {"n_workers": 0}),
        ("n_workers", {"n_workers": "2"}),
        ("weights", {"weights": [np.ones((4, 3)), np.ones((4, 3))]}),
        ("output_owner", {"output_owner": 2}),
        ("output_owner", {"output_owner": [0, 1]}),
        ("worker_share", {"worker_share": [0, 0]}),
        ("formulation", {"formulation": Volume(budget=0.5)}),
        ("formulation", {"formulation": Lossless(communication="busiest")}),
        ("time_limit", {"time_limit": -1}),
    ],
)
def test_bad_input_is_one_line(argument: str, arguments: dict[str, Any]) -> None:
    arguments = {"weights": [np.ones((4, 3))], "n_workers": 2, "partitioner": "contiguous", **arguments}
    with pytest.raises(InvalidArgument, match=f"^{argument}: got [^\n]*; allowed: [^\n]*$"):
        solve_network(**arguments)


def test_a_layer_that_cannot_be_placed_is_an_error() -> None:
    allowed = np.array([[True, False]] * 3)
    problems = [LayerProblem.create(np.ones((3, 3)), 2), LayerProblem.create(np.ones((3, 3)), 2, allowed=allowed)]
    with pytest.raises(NoSolution, match="infeasible"):
        solve_problems(problems, Lossless(), partitioner="alternate")


# --------------------------------------------------------------------------------------------------------- RadiX-Net


def test_radix_layers_are_cut_by_their_structure(metis: Any) -> None:
    owner = np.arange(1024) * 8 // 1024
    for weight, volume in zip(radix_net((32, 32), 3, seed=1), structured(3), strict=True):
        problem = LayerProblem.create(weight, 8, input_owner=owner, value_bytes=1)
        solution = solve_problem(problem, Lossless(), partitioner="metis").require()
        assert solution.volume <= volume
        assert solution.owner is not None
        owner = solution.owner
    assert structured(3) == [248, 896, 1113]  # 8 · 31; 32 groups of 32 inputs, 4 at home; 8 · 159 − 159


@pytest.mark.slow
def test_radix_experiment_writes_its_report(metis: Any, tmp_path: Path) -> None:
    assert run_radix(["--quick", "--layers", "2", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "radix.json").read_text())
    assert {"by its structure", "metis", "METIS, one cut"} <= {row["row"] for row in report["rows"]}
    for row in report["rows"]:
        assert row["volume"] == row["first"] + row["odd"]
    for row in report["chains"]:
        assert row["violations"] == 0
        assert row["best"] <= row["forward"]
    assert report["command"] in (tmp_path / "radix.md").read_text()


def test_the_answer_may_be_wanted_on_one_of_many_workers() -> None:
    """METIS divides by zero when it is asked for one part."""
    weights = [np.random.default_rng(seed).random(shape) for seed, shape in enumerate([(24, 24), (10, 24)])]
    solution = solve_network(weights, 12, output_owner=0, partitioner="metis")
    assert not solution.violations
    assert (solution.layers[-1].owner == 0).all()


def test_one_worker_holds_everything() -> None:
    weights = [np.random.default_rng(seed).random(shape) for seed, shape in enumerate([(6, 5), (4, 6)])]
    assert solve_network(weights, 1).volume == 0


def test_a_backend_that_fails_on_all_layers_at_once_does_not_cost_the_forward_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("died")

    monkeypatch.setattr("repurpose_opt_solvers.metis_.Metis.solve_network", fail)
    weights = [np.random.default_rng(seed).random(shape) for seed, shape in enumerate([(6, 5), (4, 6)])]
    solution = solve_network(weights, 2, partitioner="metis")
    assert not solution.violations
    assert "died" in str(solution.stats)
