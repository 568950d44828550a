"""The formulations against their formulas, written as loops over weights and sets of transfers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from repurpose_opt import Edge, Exchange, Formulation, LayerProblem, Lossless, Moments, Volume, metrics
from repurpose_opt.formulation import incidence
from repurpose_opt.formulation.busiest import Ranking, direct_busiest, pressure
from repurpose_opt.problem import dense
from repurpose_opt.repair import value_energy
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import correlated_samples, least_objective_given, random_problem

PRICES = np.array([[0.0, 0.3, 2.0], [1.0, 0.0, 0.5], [0.2, 4.0, 0.0]])

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"noise": 0.4},
    "output_weight": {"output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "blocks": {"noise": 0.4, "value_bytes": [4, 1, 2, 9, 3], **BLOCKS},
    "link_price": {"link_price": PRICES, "value_bytes": [4, 1, 2, 9, 3]},
    "sparse": {"is_sparse": True, "density": 0.5, "link_price": PRICES},
    "permuted_rows": {"row_neuron": [3, 1, 0, 5, 4, 2]},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
EDGE = Edge(weight_price=0.1, transfer_price=0.05)


def solve_for(problem: LayerProblem, formulation: Formulation, owner: np.ndarray) -> tuple[Exchange, Any, float]:
    exchange = formulation.select(problem, owner)
    weight = formulation.repair(problem, owner, exchange)
    return exchange, weight, formulation.objective(problem, owner, exchange, weight)


def edge_terms(problem: LayerProblem, worker: int, row: int) -> list[tuple[float, float]]:
    """(what dropping it costs, what keeping it costs) of every weight of a row on a worker."""
    target, terms = dense(problem.target_weight), []
    for column in range(problem.columns):
        j = problem.column_value[column]
        variance = problem.moments.second[column, column] + problem.moments.ridge
        energy = problem.output_weight[row] * variance * target[row, column] ** 2
        link = problem.link_price[problem.input_owner[j], worker] if problem.input_owner[j] != worker else 0.0
        terms.append((energy, 0.1 + 0.05 * problem.value_bytes[j] * link))
    return terms


@each_layer
def test_edge_is_a_sum_of_minima_over_the_weights(arguments: dict[str, Any]):
    problem = random_layer(seed=1, **arguments).problem
    owner = random_owner(problem)
    _, weight, objective = solve_for(problem, EDGE, owner)
    expected = 0.0
    for row in range(problem.rows):
        terms = edge_terms(problem, owner[problem.row_neuron[row]], row)
        expected += sum(min(term) for term in terms)
        target = dense(problem.target_weight)[row]
        kept = np.where([energy > price for energy, price in terms], target, 0.0)
        np.testing.assert_allclose(dense(weight)[row], kept, rtol=1e-12)
    assert objective == pytest.approx(expected, rel=1e-9)


@each_layer
def test_edge_assignment_cost_is_the_sum_of_minima_of_each_neuron(arguments: dict[str, Any]):
    problem = random_layer(seed=2, **arguments).problem
    cost = EDGE.assignment_cost(problem, None, None)
    expected = np.zeros((problem.m, problem.P))
    for row, k in product(range(problem.rows), range(problem.P)):
        expected[problem.row_neuron[row], k] += sum(min(term) for term in edge_terms(problem, k, row))
    np.testing.assert_allclose(cost, expected, rtol=1e-9, atol=1e-12)


def test_edge_objective_charges_what_it_is_given_even_if_it_is_not_the_best():
    problem = random_layer(seed=3).problem
    owner = random_owner(problem)
    everything = Exchange.of_transfers(problem.remote, problem.input_owner)
    expected = sum(
        edge_terms(problem, owner[row], row)[column][1] for row in range(problem.rows) for column in range(5)
    )
    assert EDGE.objective(problem, owner, everything, problem.weight) == pytest.approx(expected)


def test_edge_blocks_of_rows_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch):
    problem = random_layer(seed=4, **LAYERS["link_price"]).problem
    owner = random_owner(problem)
    cost, (_, _, objective) = EDGE.assignment_cost(problem, None, None), solve_for(problem, EDGE, owner)
    monkeypatch.setattr("repurpose_opt.problem._CACHED_ENTRIES", 10)
    np.testing.assert_allclose(EDGE.assignment_cost(problem, None, None), cost, rtol=1e-12)
    assert solve_for(problem, EDGE, owner)[2] == pytest.approx(objective, rel=1e-12)


def test_incidence_says_who_reads_what_once():
    problem = random_layer(seed=4, density=0.6, **BLOCKS).problem
    expected = np.zeros((problem.m, problem.n))
    for row, column in zip(*np.nonzero(problem.weight), strict=True):
        expected[problem.row_neuron[row], problem.column_value[column]] = 1
    np.testing.assert_array_equal(incidence(problem).toarray(), expected)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_the_energy_of_a_value_on_a_worker_adds_up_over_its_columns_and_rows(is_sparse: bool):
    problem = random_layer(seed=5, density=0.7, output_weight=[1, 2, 0.5, 1, 3, 1, 2, 0], **BLOCKS).problem
    owner = random_owner(problem)
    variance = np.diag(problem.moments.second) + problem.moments.ridge
    expected = np.zeros((problem.n, problem.P))
    for row, column in np.ndindex(problem.weight.shape):
        energy = problem.output_weight[row] * variance[column] * problem.weight[row, column] ** 2
        expected[problem.column_value[column], owner[problem.row_neuron[row]]] += energy
    if is_sparse:
        problem = replace(problem, weight=sparse.csr_array(problem.weight))
    np.testing.assert_allclose(value_energy(problem, owner), expected)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_volume_on_a_diagonal_is_a_sum_of_minima_over_the_transfers(is_sparse: bool):
    moments = Moments.from_raw([0.5, 1.0, 2.0, 0.1])
    problem = random_problem(
        5, m=6, n=4, P=3, moments=moments, link_price=PRICES,
        value_bytes=[1, 4, 2, 3], output_weight=[1, 2, 0.5, 1, 3, 1],
    )  # fmt: skip
    owner = random_owner(problem)
    expected = 0.0
    for j, k in product(range(4), range(3)):
        rows = [i for i in range(6) if owner[i] == k]
        energy = sum(problem.output_weight[i] * problem.moments.variance[j] * problem.weight[i, j] ** 2 for i in rows)
        if problem.input_owner[j] != k:
            expected += min(energy, 0.2 * problem.value_bytes[j] * PRICES[problem.input_owner[j], k])
    if is_sparse:
        problem = replace(problem, weight=sparse.csr_array(problem.weight))
    exchange, _, objective = solve_for(problem, Volume(transfer_price=0.2), owner)
    assert objective == pytest.approx(expected, rel=1e-9)
    assert 0 < exchange.transfers.sum() < problem.remote.sum()


def test_volume_objective_is_the_error_or_the_volume_and_both_with_a_price():
    layer = random_layer(seed=6, noise=0.3, link_price=PRICES)
    problem, owner = layer.problem, random_owner(layer.problem)
    exchange, weight, error = solve_for(problem, Volume(budget=0.5), owner)
    priced = metrics.priced_volume(problem, exchange)
    assert error == pytest.approx(metrics.weighted_error(problem, owner, weight))
    assert Volume(budget_bytes=80).objective(problem, owner, exchange, weight) == error
    assert Volume(transfer_price=0.3).objective(problem, owner, exchange, weight) == pytest.approx(error + 0.3 * priced)
    assert Volume(max_nmse=0.5).objective(problem, owner, exchange, weight) == priced


def test_volume_violations_are_volume_above_budget_and_nmse_above_the_limit():
    problem = random_layer(seed=7).problem
    owner = random_owner(problem)
    everything = Exchange.of_transfers(problem.remote, problem.input_owner)
    nothing = Exchange.nothing(5, 3)
    poor = Volume(budget=0.0).repair(problem, owner, nothing)
    assert Volume(budget=1.0).violations(problem, owner, everything, problem.weight) == ()
    assert "budget" in Volume(budget=0.9).violations(problem, owner, everything, problem.weight)[0]
    assert "budget" in Volume(budget_bytes=79).violations(problem, owner, everything, problem.weight)[0]
    assert Volume(budget_bytes=80).violations(problem, owner, everything, problem.weight) == ()
    assert Volume(max_nmse=1e-3).violations(problem, owner, everything, problem.weight) == ()
    assert "max_nmse" in Volume(max_nmse=1e-3).violations(problem, owner, nothing, poor)[0]


def test_a_selection_by_energies_with_ridge_is_not_exact_for_an_nmse_without():
    """Value 0 hardly varies, so its large weight matters only to the ridge; value 1 is what the NMSE needs."""
    moments = Moments.from_raw([1e-6, 1.0, 1.0])
    weight = np.array([[100.0, 0.7, 1.0], [0.0, 0.0, 1.0]])
    problem = LayerProblem.create(weight, 2, input_owner=[1, 1, 0], moments=moments)
    owner, formulation = np.array([0, 1]), Volume(max_nmse=0.45)
    just_one = Exchange.of_transfers(np.array([[0, 0], [1, 0], [0, 0]], dtype=bool), problem.input_owner)
    refitted = formulation.repair(problem, owner, just_one)
    assert formulation.violations(problem, owner, just_one, refitted) == ()
    selected = formulation.select(problem, owner)
    assert metrics.volume(problem, selected) == metrics.volume(problem, just_one) or not (
        formulation.selection_is_exact(problem)
    )


def test_lossless_sends_what_is_read_elsewhere_and_prunes_nothing():
    for arguments in ({"density": 0.3, **BLOCKS}, {"density": 0.3, "is_sparse": True}):
        problem = random_layer(seed=8, link_price=PRICES, value_bytes=[4, 1, 2, 9, 3], **arguments).problem
        owner = random_owner(problem)
        exchange, weight, objective = solve_for(problem, Lossless(), owner)
        full = dense(problem.weight)
        read = {
            (int(problem.column_value[column]), int(owner[problem.row_neuron[row]]))
            for row, column in zip(*np.nonzero(full), strict=True)
        }
        expected = {(j, k) for j, k in read if problem.input_owner[j] != k}
        assert {(int(j), int(k)) for j, k in np.argwhere(exchange.transfers)} == expected
        price = sum(problem.value_bytes[j] * PRICES[problem.input_owner[j], k] for j, k in expected)
        assert objective == pytest.approx(price)
        np.testing.assert_array_equal(dense(weight), full)
        assert Lossless().violations(problem, owner, exchange, weight) == ()
        less = replace(problem, weight=weight * 0.5).weight
        assert "differ" in Lossless().violations(problem, owner, exchange, less)[0]


def test_lossless_cost_shares_an_input_with_the_other_neurons_that_read_it_there():
    """Input 0 is on worker 0; neurons 0 and 1 read it on worker 1, neuron 2 (on worker 0) reads input 1 of worker 1."""
    weight = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    problem = LayerProblem.create(weight, 2, input_owner=[0, 1], value_bytes=6, capacity=3)
    cost = Lossless().assignment_cost(problem, np.array([1, 1, 0]), Exchange.nothing(2, 2))
    assert cost.tolist() == [[0, 3], [0, 3], [6, 0]]  # 6 / 2 readers to stay; on worker 0 it is there already
    assert Lossless().assignment_cost(problem, None, None).tolist() == [[0, 6], [0, 6], [6, 0]]


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [({"budget": 0.25}, 20), ({"budget_bytes": 17.5}, 17.5), ({"transfer_price": 1}, None), ({"max_nmse": 0.1}, None)],
)
def test_the_budget_in_bytes(arguments: dict[str, float], allowed: float | None):
    problem = random_problem(m=6, n=10, P=3)
    assert problem.direct_volume == 80
    assert Volume(**arguments).allowed_bytes(problem.direct_volume) == allowed


@pytest.mark.parametrize("share", [0.07, 0.29, 0.57, 1.0])
def test_a_fraction_that_is_whole_bytes_but_for_rounding_counts_as_whole(share: float):
    problem = random_problem(m=6, n=100, P=2, value_bytes=1)
    assert Volume(budget=share).allowed_bytes(problem.direct_volume) == round(share * 100)


# ------------------------------------------------------------------------------------------ the busiest worker


def lopsided(seed: int, m: int = 24, n: int = 20, P: int = 4, density: float = 0.3, **arguments: Any) -> LayerProblem:
    """Most values are held by the first workers, so that these send most."""
    random = np.random.default_rng(seed)
    owner = np.minimum((P * random.random(n) ** 2).astype(int), P - 1)
    weight = random.normal(size=(m, n)) * (random.random((m, n)) < density)
    sizes = random.integers(1, 9, n)
    return random_problem(seed, m, n, P, weight=weight, input_owner=owner, value_bytes=sizes, **arguments)


def busiest_by_hand(problem: LayerProblem, transfers: np.ndarray, priced: bool) -> float:
    sent, received = np.zeros(problem.P), np.zeros(problem.P)
    for j, k in np.argwhere(transfers):
        source = problem.input_owner[j]
        amount = problem.value_bytes[j] * (problem.link_price[source, k] if priced else 1)
        sent[source] += amount
        received[k] += amount
    return float(max(sent.max(), received.max()))


@pytest.mark.parametrize("create", [Edge, Lossless, lambda **given: Volume(budget=0.1, **given)])
def test_communication_is_total_or_busiest(create: Any):
    assert create().communication == "total"
    assert create(communication="busiest").communication == "busiest"
    for wrong in ("volume", "", None, 1):
        with pytest.raises(ValueError, match=r"communication: got .*'total' or 'busiest'"):
            create(communication=wrong)


@each_layer
def test_with_busiest_the_objective_charges_the_busiest_worker_once_a_transfer(arguments: dict[str, Any]):
    problem = random_layer(seed=1, **arguments).problem
    owner = random_owner(problem)
    edge = Edge(weight_price=0.1, transfer_price=0.05, communication="busiest")
    exchange, weight, objective = solve_for(problem, edge, owner)
    target, full = dense(problem.target_weight), dense(weight)
    variance = problem.moments.variance
    error = (problem.output_weight[:, None] * variance * np.square(target - full)).sum()
    price = busiest_by_hand(problem, exchange.transfers, priced=True)
    assert objective == pytest.approx(error + 0.1 * np.count_nonzero(full) + 0.05 * price, rel=1e-9)
    worth = problem.output_weight[:, None] * variance * np.square(target) > 0.1
    has = (exchange.transfers | ~problem.remote)[problem.column_value][:, owner[problem.row_neuron]].T
    np.testing.assert_allclose(full, np.where(worth & has, target, 0.0), rtol=1e-12)
    volume = Volume(transfer_price=0.05, communication="busiest")
    exchange, weight, objective = solve_for(problem, volume, owner)
    price = busiest_by_hand(problem, exchange.transfers, priced=True)
    assert objective == pytest.approx(metrics.weighted_error(problem, owner, weight) + 0.05 * price)
    volume = Volume(max_nmse=0.3, communication="busiest")
    assert volume.objective(problem, owner, exchange, weight) == price
    exchange, _, objective = solve_for(problem, Lossless(communication="busiest"), owner)
    assert objective == busiest_by_hand(problem, exchange.transfers, priced=True)
    assert (exchange.transfers == Lossless().select(problem, owner).transfers).all()


def test_with_busiest_what_is_not_proved_is_not_claimed():
    problem = random_layer(seed=1).problem
    diagonal = replace(problem, moments=Moments.identity(problem.columns))
    for formulation in (Edge(communication="busiest"), Volume(transfer_price=0.1, communication="busiest")):
        assert not formulation.assignment_is_exact
        assert not formulation.selection_is_exact(diagonal)
        assert formulation.hypergraph(diagonal, random_owner(diagonal)) is None
    assert Edge().assignment_is_exact
    assert Lossless(communication="busiest").selection_is_exact(diagonal)


@pytest.mark.parametrize("seed", range(5))
def test_the_hypergraph_of_lossless_costs_the_busiest_worker(seed: int):
    problem = lopsided(seed, link_price=np.random.default_rng(seed).uniform(0, 2, (4, 4)))
    formulation = Lossless(communication="busiest")
    owner = random_owner(problem, seed)
    expected = solve_for(problem, formulation, owner)[2]
    assert formulation.hypergraph(problem).cost(owner) == pytest.approx(expected)
    assert expected < Lossless().hypergraph(problem).cost(owner)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 5), st.floats(0, 1), st.booleans())
def test_filling_under_a_cap_is_the_greedy_one_by_one(seed: int, n: int, P: int, share: float, equal: bool):
    random = np.random.default_rng(seed)
    sizes = 3 if equal else random.integers(0, 9, n)
    problem = random_problem(seed, 4, n, P, input_owner=random.integers(0, P, n), value_bytes=sizes)
    gain = np.where(problem.remote, random.random((n, P)), 0.0)
    ranking = Ranking.of_gains(gain, problem.transfer_price)
    cap = np.floor(share * direct_busiest(problem))
    left, expected = np.full((2, P), cap), []
    for j, k, size in zip(ranking.value, ranking.worker, ranking.size, strict=True):
        source = problem.input_owner[j]
        expected.append(bool(size <= left[0, source] and size <= left[1, k]))
        if expected[-1]:
            left[0, source] -= size
            left[1, k] -= size
    assert ranking.fill(problem, cap).tolist() == expected


def test_direct_s_busiest_worker():
    """Worker 0 holds three values of 2 bytes, worker 1 one of 5; worker 2 holds none, worker 3 takes no neuron."""
    problem = random_problem(m=6, n=4, P=4, input_owner=[0, 0, 0, 1], value_bytes=[2, 2, 2, 5], capacity=[2, 2, 2, 0])
    assert direct_busiest(problem) == max(3 * 2 * 2, 5 * 2, 5, 6, 3 * 2 + 5)
    assert Volume(budget=0.5, communication="busiest").limit(problem) == 6
    assert Volume(budget_bytes=7, communication="busiest").limit(problem) == 7
    assert Volume(budget=0.5).limit(problem) == problem.direct_volume // 2


@pytest.mark.parametrize("pruner", ["threshold", "group-omp"])
@pytest.mark.parametrize("correlated", [False, True])
def test_a_budget_of_the_busiest_worker_is_hard_and_filled(pruner: str, correlated: bool):
    moments = Moments.from_samples(correlated_samples(20, count=80)) if correlated else None
    problem = lopsided(3, density=0.8, moments=moments)
    errors = []
    for budget in (0.0, 0.1, 0.3, 0.6, 1.0):
        formulation = Volume(budget=budget, communication="busiest")
        solution = solve_problem(problem, formulation, partitioner="contiguous", pruner=pruner).require()
        allowed = np.floor(budget * direct_busiest(problem) + 1e-9)
        assert solution.busiest <= allowed
        assert solution.violations == ()
        sent = np.bincount(problem.input_owner, (solution.transfers * problem.transfer_bytes).sum(axis=1), problem.P)
        received = (solution.transfers * problem.transfer_bytes).sum(axis=0)
        energy = value_energy(problem, solution.owner)
        for j, k in np.argwhere(problem.remote & ~solution.transfers & (energy > 1e-9)):
            size = problem.value_bytes[j]
            assert sent[problem.input_owner[j]] + size > allowed or received[k] + size > allowed, "it would still fit"
        errors.append(solution.objective)
    assert errors == sorted(errors, reverse=True)
    everything = Exchange.of_transfers(problem.remote, problem.input_owner)
    broken = Volume(budget=0.3, communication="busiest").violations(problem, solution.owner, everything, problem.weight)
    assert "busiest" in broken[0]


BUSIEST = {
    "edge": lambda price: Edge(weight_price=0.05, transfer_price=price, communication="busiest"),
    "volume": lambda price: Volume(transfer_price=price, communication="busiest"),
}


@pytest.mark.parametrize("create", BUSIEST.values(), ids=BUSIEST)
def test_transfers_under_a_price_of_the_busiest_worker_are_close_to_the_best(create: Any):
    ratios = []
    for seed in range(8):
        problem = random_problem(seed, m=6, n=4, P=3, input_owner=[0, 0, 0, 1], value_bytes=[3, 1, 4, 2])
        owner = random_owner(problem, seed)
        for price in (0.0, 0.05, 0.2, 0.5, 100.0):
            least = least_objective_given(problem, create(price), owner)
            found = solve_for(problem, create(price), owner)[2]
            assert found >= least * (1 - 1e-9)
            ratios.append(found / least if least > 1e-9 else 1.0 + found)
    assert np.mean(ratios) < 1.01
    assert max(ratios) < 1.15


@pytest.mark.parametrize("create", BUSIEST.values(), ids=BUSIEST)
def test_what_is_free_beside_the_busiest_worker_is_sent(create: Any):
    """Worker 0 must send much anyway; worker 1's only value adds nothing to the busiest."""
    weight = np.ones((4, 5))
    problem = random_problem(weight=weight, P=2, input_owner=[0, 0, 0, 0, 1], value_bytes=1, capacity=2)
    owner = np.array([0, 0, 1, 1])
    transfers = create(0.4).select(problem, owner).transfers
    assert transfers.sum() == 5
    assert create(100.0).select(problem, owner).transfers.sum() == 0


@pytest.mark.parametrize("pruner", ["threshold", "group-omp"])
def test_max_nmse_is_met_with_a_less_busy_worker_than_by_volume(pruner: str):
    problem = lopsided(5, density=0.8, moments=Moments.from_samples(correlated_samples(20, count=80)))
    for max_nmse in (0.05, 0.2):
        by_volume, by_busiest = (
            solve_problem(problem, formulation, partitioner="contiguous", pruner=pruner).require()
            for formulation in (Volume(max_nmse=max_nmse), Volume(max_nmse=max_nmse, communication="busiest"))
        )
        assert by_busiest.violations == ()
        assert by_busiest.nmse <= max_nmse
        assert by_busiest.busiest < by_volume.busiest


def test_the_weights_of_the_workers_follow_their_load_and_add_up_to_1():
    problem = lopsided(6)
    none = pressure(problem, np.zeros((problem.n, problem.P), dtype=bool))
    np.testing.assert_allclose(none, 1 / problem.P)
    transfers = problem.remote & (problem.input_owner[:, None] == 0)
    weights = pressure(problem, transfers)
    assert weights[problem.input_owner == 0].min() > weights[problem.input_owner != 0].max()
    j, other = (int(np.flatnonzero(problem.input_owner == k)[0]) for k in (0, 1))
    by_sender = weights[j] - weights[other]
    np.testing.assert_allclose(by_sender, by_sender[0])


@pytest.mark.parametrize("partitioner", ["alternate", "compensated"])
def test_alternating_lowers_what_the_busiest_worker_costs(partitioner: str):
    formulations: list[Formulation] = [Volume(transfer_price=0.5, communication="busiest")]
    if partitioner == "alternate":
        formulations += [Edge(transfer_price=0.5, communication="busiest"), Lossless(communication="busiest")]
    for formulation in formulations:
        ratios = []
        for seed in range(4):
            problem = lopsided(seed, m=48, n=40, density=0.1)
            start = solve_problem(problem, formulation, partitioner="random")
            better = solve_problem(problem, formulation, partitioner=partitioner, start=start.owner)
            assert better.objective <= start.objective
            ratios.append(better.objective / start.objective)
        assert np.mean(ratios) < 0.9, formulation


def test_alternating_on_the_busiest_worker_beats_alternating_on_the_volume():
    ratios = []
    for seed in range(6):
        problem = lopsided(seed, m=64, n=64, density=0.05)
        on_volume = solve_problem(problem, Lossless(), partitioner="alternate")
        on_busiest = solve_problem(problem, Lossless(communication="busiest"), partitioner="alternate")
        ratios.append(on_busiest.busiest / on_volume.busiest)
    assert np.mean(ratios) < 0.9


def test_a_whole_network_takes_no_limit_on_its_busiest_worker():
    torch = pytest.importorskip("torch")
    from repurpose_opt.network.repurpose import repurpose

    model, inputs = torch.nn.Sequential(torch.nn.Linear(4, 3)), torch.randn(8, 4)
    for limit in ({"budget": 0.1}, {"budget_bytes": 8}, {"max_nmse": 0.1}):
        with pytest.raises(ValueError, match=r"formulation: got Volume.*busiest.*transfer_price"):
            repurpose(model, inputs[:1], 2, data=inputs, formulation=Volume(**limit, communication="busiest"))
    price = Volume(transfer_price=0.1, communication="busiest")
    labels = torch.randint(0, 3, (8,))
    assert repurpose(model, inputs[:1], 2, data=(inputs, labels), formulation=price).volume >= 0
