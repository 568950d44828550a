"""LayerProblem: defaults, derived quantities, and every way to give a weight. Bad input: test_bad_input.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import random_layer
from scipy import sparse

from repurpose_opt import LayerProblem, Moments, solve_layer
from repurpose_opt.problem import dense

W = np.random.default_rng(0).normal(size=(6, 4))


def test_defaults():
    problem = LayerProblem.create(W, 4)
    assert (problem.m, problem.n, problem.P, problem.rows, problem.columns) == (6, 4, 4, 6, 4)
    assert problem.input_owner.tolist() == [0, 1, 2, 3]
    assert problem.capacity.tolist() == [2, 2, 2, 2]
    assert problem.min_load.tolist() == [0, 0, 0, 0]
    assert problem.load.tolist() == [1] * 6
    assert problem.allowed.all()
    assert problem.value_bytes.tolist() == [8] * 4
    assert problem.link_price.tolist() == (1 - np.eye(4)).tolist()
    assert problem.bias.tolist() == [0] * 6
    assert problem.output_weight.tolist() == [1] * 6
    assert problem.one_column_per_value


def test_inputs_are_in_equal_runs_where_they_do_not_divide():
    assert LayerProblem.create(np.ones((2, 7)), 3).input_owner.tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("m", "load"), [(3, 3.0), (5, 0.5), (7, 1.0), (2, 64.0)])
def test_the_default_capacity_holds_the_neurons(m: int, load: float):
    """⌈total load / P⌉ may be too little for whole neurons of one load."""
    problem = LayerProblem.create(np.ones((m, 2)), 2, load=load)
    assert problem.slots.sum() >= m


def test_a_number_stands_for_one_of_each():
    problem = LayerProblem.create(
        W, 2, input_owner=1, capacity=5, load=1, value_bytes=3, link_price=2, bias=1, output_weight=4, min_load=1
    )
    assert problem.input_owner.tolist() == [1] * 4
    assert problem.capacity.tolist() == [5, 5]
    assert problem.value_bytes.tolist() == [3] * 4
    assert problem.link_price.tolist() == [[0, 2], [2, 0]]
    assert problem.bias.tolist() == [1] * 6
    assert problem.output_weight.tolist() == [4] * 6
    assert problem.min_load.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("capacity", "load", "slots"), [(0.3, 0.1, 3), (0.7, 0.1, 7), (2.9, 1, 2), (np.inf, 1, 2**31), (1e6, 1e5, 10)]
)
def test_slots_count_whole_neurons_in_spite_of_rounding(capacity: float, load: float, slots: int):
    problem = LayerProblem.create(np.ones((2, 2)), 1, load=load, capacity=capacity)
    assert problem.slots.tolist() == [slots]


def test_min_slots_round_up():
    problem = LayerProblem.create(W, 2, load=2.0, capacity=12, min_load=[3.0, 4.0])
    assert problem.min_slots.tolist() == [2, 2]


def test_direct_volume_leaves_out_workers_without_capacity():
    problem = LayerProblem.create(W, 3, input_owner=[0, 0, 1, 2], capacity=[6, 6, 0], value_bytes=[1, 2, 4, 8])
    assert problem.direct_volume == 1 + 2 + 4 + 8 + 8  # 0 → 1: 1, 2; 1 → 0: 4; 2 → both: 8


def test_transfer_price_is_bytes_times_the_price_from_the_holder():
    price = np.arange(9.0).reshape(3, 3)
    problem = LayerProblem.create(W, 3, input_owner=[2, 0, 1, 2], value_bytes=[1, 2, 3, 4], link_price=price)
    expected = [[6, 7, 0], [0, 2, 4], [9, 0, 15], [24, 28, 0]]
    assert problem.transfer_price.tolist() == expected


@pytest.mark.parametrize("is_sparse", [False, True])
def test_target_weight_best_predicts_the_original_output_from_what_is_received(is_sparse: bool):
    layer = random_layer(seed=1, noise=0.4, is_sparse=is_sparse, density=0.5)
    received = layer.received - layer.received.mean(axis=0)
    original = layer.original - layer.original.mean(axis=0)
    scale = np.sqrt(len(received))
    left = np.vstack([received / scale, np.sqrt(layer.ridge) * np.eye(5)])
    right = np.vstack([original @ layer.weight.T / scale, np.sqrt(layer.ridge) * layer.weight.T])
    expected = np.linalg.lstsq(left, right, rcond=None)[0].T
    np.testing.assert_allclose(dense(layer.problem.target_weight), expected, rtol=1e-9)
    assert sparse.issparse(layer.problem.target_weight) == is_sparse


@pytest.mark.parametrize("is_sparse", [False, True])
def test_output_energy_is_the_variance_of_each_output(is_sparse: bool):
    layer = random_layer(seed=2, noise=0.4, is_sparse=is_sparse)
    variance = (layer.original @ layer.weight.T).var(axis=0)
    expected = variance + layer.ridge * np.square(layer.weight).sum(axis=1)
    np.testing.assert_allclose(layer.problem.output_energy, expected, rtol=1e-10)


def test_a_convolution_is_unfolded_value_by_value():
    kernel = np.random.default_rng(3).normal(size=(5, 3, 2, 2)).astype(np.float32)
    problem = LayerProblem.create(kernel, 2)
    assert problem.weight.shape == (5, 12)
    assert problem.column_value.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    np.testing.assert_array_equal(problem.weight[:, problem.column_value == 1], kernel[:, 1].reshape(5, 4))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_precision_is_kept_from_float32_on(dtype: Any):
    problem = LayerProblem.create(W.astype(dtype), 2)
    assert problem.weight.dtype == (np.float32 if dtype in (np.float16, np.float32) else np.float64)
    assert problem.value_bytes[0] == np.dtype(dtype).itemsize


def test_torch_tensors_are_taken_as_they_are():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor(W, dtype=torch.float32))
    problem = LayerProblem.create(weight, 2, bias=torch.ones(6, requires_grad=True), capacity=torch.tensor([4, 3]))
    np.testing.assert_array_equal(problem.weight, W.astype(np.float32))
    assert problem.bias.tolist() == [1] * 6
    half = LayerProblem.create(weight.detach().bfloat16(), 2)
    assert half.weight.dtype == np.float32
    assert half.value_bytes.tolist() == [2] * 4


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"])
def test_every_kind_of_sparse_matrix_is_the_same_matrix(kind: str):
    thin = np.where(np.abs(W) > 0.5, W, 0.0)
    for make in (f"{kind}_array", f"{kind}_matrix"):
        problem = LayerProblem.create(getattr(sparse, make)(thin), 2)
        assert isinstance(problem.weight, sparse.csr_array)
        np.testing.assert_array_equal(problem.weight.toarray(), thin)


def test_repeated_entries_of_a_sparse_matrix_are_one_weight():
    """Three entries, the first two of them at one place."""
    entries, columns, rows = np.array([2.0, -1.0, 1.0]), np.array([1, 1, 0]), np.array([0, 2, 3])
    repeated = sparse.csr_array((entries, columns, rows), shape=(2, 2))
    for moments in (Moments.identity(2), Moments.from_samples(np.random.default_rng(4).normal(size=(9, 2)))):
        problem = LayerProblem.create(repeated, 2, moments=moments)
        in_full = replace(problem, weight=problem.weight.toarray())
        np.testing.assert_allclose(problem.output_energy, in_full.output_energy)
        assert problem.weight.nnz == 2


def test_nothing_that_was_given_is_changed():
    weight = sparse.csr_array(W)
    weight.data[[2, 7]] = 0.0  # entries that are stored, and zero
    given: dict[str, Any] = {
        "capacity": np.array([3.0, 3.0]),
        "link_price": np.full((2, 2), 2.0),
        "allowed": np.ones((6, 2), dtype=bool),
        "input_owner": np.array([0, 1, 0, 1]),
        "inputs": np.random.default_rng(5).normal(size=(20, 4)),
    }
    stored = (weight.data.copy(), weight.indices.copy(), weight.indptr.copy())
    before = {name: value.copy() for name, value in given.items()}
    solve_layer(weight, 2, **given).require()
    for array, original in zip((weight.data, weight.indices, weight.indptr), stored, strict=True):
        np.testing.assert_array_equal(array, original)
    for name, value in given.items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_what_is_given_later_does_not_change_the_problem():
    owner, capacity, allowed = np.array([0, 1, 0, 1]), np.array([4.0, 4.0]), np.ones((6, 2), dtype=bool)
    problem = LayerProblem.create(W, 2, input_owner=owner, capacity=capacity, allowed=allowed)
    owner[:], capacity[:], allowed[:] = 0, 0, False
    assert problem.input_owner.tolist() == [0, 1, 0, 1]
    assert problem.capacity.tolist() == [4, 4]
    assert problem.allowed.all()
