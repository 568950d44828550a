"""The formulations against their formulas, written as loops over weights and sets of transfers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import BLOCKS, random_layer, random_owner
from scipy import sparse

from repurpose_opt import Edge, Exchange, Formulation, LayerProblem, Lossless, Moments, Volume, metrics
from repurpose_opt.formulation import incidence
from repurpose_opt.problem import dense
from repurpose_opt.repair import value_energy
from repurpose_opt.testing import random_problem

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
    monkeypatch.setattr("repurpose_opt.formulation.edge._CACHED_ENTRIES", 10)
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
