"""`Lossless(messages="codes")`: the smallest linear exchange that changes nothing, and its placement."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import sparse

from repurpose_opt import Code, LayerProblem, Lossless, Termination, Values, solve_layer
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation.ranks import rank_price
from repurpose_opt.solve import solve_problem

FORMULATION = Lossless(messages="codes")


def low_rank(seed: int = 0, rank: int = 2) -> LayerProblem:
    """12 neurons of 3 workers on 9 values, blocks of the given rank as the owners of the identity placement have it."""
    random = np.random.default_rng(seed)
    weight = np.block(
        [[random.normal(size=(4, rank)) @ random.normal(size=(rank, 3)) for _ in range(3)] for _ in range(3)]
    )
    return LayerProblem.create(weight, 3, value_bytes=4)


OWNER = np.repeat(np.arange(3), 4)


@pytest.mark.parametrize("rank", [1, 2])
def test_each_pair_sends_as_many_numbers_as_its_block_has_rank(rank: int):
    problem = low_rank(rank=rank)
    exchange = FORMULATION.select(problem, OWNER)
    assert {pair: message.size for pair, message in exchange.messages.items()} == {
        (p, k): rank for p, k in product(range(3), repeat=2) if p != k
    }
    weight = FORMULATION.repair(problem, OWNER, exchange)
    np.testing.assert_allclose(weight, problem.weight, atol=1e-12)
    assert FORMULATION.violations(problem, OWNER, exchange, weight) == ()
    assert FORMULATION.objective(problem, OWNER, exchange, weight) == 6 * 4 * rank


def test_blocks_of_full_rank_send_their_values():
    problem = low_rank(rank=3)
    messages = FORMULATION.select(problem, OWNER).messages
    assert all(isinstance(message, Values) and message.size == 3 for message in messages.values())


def test_where_a_layer_narrows_it_sends_the_partial_sums():
    weight = np.random.default_rng(1).normal(size=(4, 40))
    solution = solve_layer(weight, 2, formulation=FORMULATION, value_bytes=1).require()
    assert solution.volume == 2 * 2  # min(rows of k, values of p) each way
    assert solution.termination is Termination.HEURISTIC
    assert all(isinstance(message, Code) for message in solution.exchange.messages.values())


def test_what_never_varies_is_not_sent_and_its_mean_is_in_the_bias():
    random = np.random.default_rng(2)
    weight = random.normal(size=(6, 8))
    varying = random.normal(size=(400, 2)) @ random.normal(size=(2, 4))  # the inputs of worker 1 have two dimensions
    inputs = np.hstack([random.normal(size=(400, 4)), varying + 3.0])
    inputs[:, 0] = 5.0
    solution = solve_layer(weight, 2, inputs=inputs, formulation=FORMULATION, value_bytes=1).require()
    sizes = {pair: message.size for pair, message in solution.exchange.messages.items()}
    assert sizes == {(0, 1): 3, (1, 0): 2}
    answer = inputs @ solution.weight.T + solution.bias
    np.testing.assert_allclose(answer, inputs @ weight.T, atol=1e-8)
    assert solution.violations == ()


def test_ranks_do_not_depend_on_the_units_of_the_inputs():
    random = np.random.default_rng(5)
    unit = np.logspace(-4, 4, 12)
    weight = random.normal(size=(8, 12)) / unit
    inputs = random.normal(size=(500, 12)) * unit
    solution = solve_layer(weight, 2, inputs=inputs, formulation=FORMULATION, value_bytes=1).require()
    assert solution.violations == ()
    assert solution.volume == 2 * 4


def test_a_tampered_weight_is_found():
    problem = low_rank()
    exchange = FORMULATION.select(problem, OWNER)
    weight = FORMULATION.repair(problem, OWNER, exchange)
    weight[0, 8] += 0.01
    assert FORMULATION.violations(problem, OWNER, exchange, weight)


def test_the_assignment_cost_is_what_the_ranks_say():
    """Against the ranks of NumPy: with and without each neuron."""
    random = np.random.default_rng(3)
    weight = np.round(random.normal(size=(7, 6)))
    weight[5:, :3] = 0
    prices = random.uniform(0.5, 2.0, (3, 3))
    problem = LayerProblem.create(weight, 3, value_bytes=1, link_price=prices)
    owner = np.array([0, 0, 1, 1, 1, 2, 2])
    cost, alone = rank_price(problem, owner), rank_price(problem, None)
    for i, k in product(range(7), range(3)):
        expected = expected_alone = 0.0
        for p in range(3):
            if p != k:
                block = weight[:, problem.input_owner == p]
                others = [j for j in range(7) if owner[j] == k and j != i]
                added = np.linalg.matrix_rank(block[[*others, i]]) - np.linalg.matrix_rank(block[others])
                expected += problem.link_price[p, k] * added
                expected_alone += problem.link_price[p, k] * np.linalg.matrix_rank(block[[i]])
        assert cost[i, k] == pytest.approx(expected)
        assert alone[i, k] == pytest.approx(expected_alone)


def test_placement_puts_neurons_of_one_row_space_together():
    random = np.random.default_rng(4)
    spaces = [random.normal(size=(1, 12)) for _ in range(4)]
    weight = np.vstack([random.normal(size=(3, 1)) @ space for space in spaces])
    order = random.permutation(12)
    start = np.arange(12) % 4
    problem = LayerProblem.create(weight[order], 4, value_bytes=1)
    solution = solve_problem(problem, FORMULATION, partitioner="alternate").require()
    scattered = FORMULATION.objective(problem, start, FORMULATION.select(problem, start), problem.weight)
    assert solution.objective == 12  # one number for each other worker
    assert scattered > 12


def test_a_sparse_weight_stays_sparse():
    weight = sparse.random_array((8, 8), density=0.4, random_state=0, format="csr")
    dense = solve_layer(weight.toarray(), 2, formulation=FORMULATION).require()
    solution = solve_layer(weight, 2, formulation=FORMULATION).require()
    assert sparse.issparse(solution.weight)
    assert solution.objective == dense.objective <= solve_layer(weight, 2, formulation=Lossless()).objective


def test_refused():
    with pytest.raises(InvalidArgument, match="messages"):
        Lossless(messages="mixed")
    with pytest.raises(InvalidArgument, match="messages"):
        Lossless(messages="codes", communication="busiest")
    problem = LayerProblem.create(np.eye(4), 2, value_bytes=[1, 2, 1, 1])
    assert "equal value_bytes" in solve_problem(problem, FORMULATION).message
