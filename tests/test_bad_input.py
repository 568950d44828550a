"""Bad input: one line that names the argument and says what is allowed, never a traceback from inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from repurpose_opt import Edge, Lossless, RepurposeError, Volume, solve_layer
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.solver import SolveOptions

m, n, P = 6, 4, 3
W = np.random.default_rng(0).normal(size=(m, n))
SAMPLES = np.random.default_rng(1).normal(size=(20, n))
C = SAMPLES.T @ SAMPLES / 20
NAN, INF = np.nan, np.inf


def changed(array: np.ndarray, value: float) -> np.ndarray:
    array = np.array(array, dtype=float)
    array.flat[0] = value
    return array


def forbidding(*neurons: int) -> np.ndarray:
    allowed = np.ones((m, P), dtype=bool)
    allowed[list(neurons)] = False
    return allowed


def forbidding_worker_0(neuron: int) -> np.ndarray:
    allowed = np.ones((m, P), dtype=bool)
    allowed[neuron, 0] = False
    return allowed


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    # weight
    "NaN weight": ("weight", {"weight": changed(W, NAN)}),
    "infinite weight": ("weight", {"weight": changed(W, INF)}),
    "infinite sparse weight": ("weight", {"weight": sparse.csr_array(changed(W, INF))}),
    "weight of 1 dimension": ("weight", {"weight": W[0]}),
    "weight of 3 dimensions": ("weight", {"weight": W[None]}),
    "empty weight": ("weight", {"weight": W[:0]}),
    "weight of words": ("weight", {"weight": "many"}),
    "no weight": ("weight", {"weight": None}),
    "complex weight": ("weight", {"weight": W * 1j}),
    "ragged weight": ("weight", {"weight": [[1.0, 2.0], [3.0]]}),
    # workers and owners
    "no workers": ("n_workers", {"n_workers": 0}),
    "negative workers": ("n_workers", {"n_workers": -2}),
    "half a worker": ("n_workers", {"n_workers": 2.5}),
    "workers that are true": ("n_workers", {"n_workers": True}),
    "input_owner too large": ("input_owner", {"input_owner": [0, 1, 2, 3]}),
    "input_owner negative": ("input_owner", {"input_owner": [0, 1, -1, 2]}),
    "input_owner too short": ("input_owner", {"input_owner": [0, 1]}),
    "input_owner of fractions": ("input_owner", {"input_owner": [0.0, 1.0, 2.0, 2.0]}),
    "input_owner of words": ("input_owner", {"input_owner": ["a", "b", "c", "d"]}),
    "input_owner ragged": ("input_owner", {"input_owner": [[0, 1], [2]]}),
    # capacities and loads
    "capacity too small": ("capacity", {"capacity": 1}),
    "capacity too small for whole neurons": ("capacity", {"capacity": [2.9, 1.9, 1.9]}),
    "capacity negative": ("capacity", {"capacity": [9, 9, -1]}),
    "capacity NaN": ("capacity", {"capacity": [9, 9, NAN]}),
    "capacity of the wrong shape": ("capacity", {"capacity": [9, 9]}),
    "capacity of words": ("capacity", {"capacity": "many"}),
    "no worker large enough for a neuron": ("capacity", {"load": [1, 1, 1, 1, 1, 5], "capacity": 4}),
    "load zero": ("load", {"load": 0}),
    "load negative": ("load", {"load": [1, 1, 1, 1, 1, -1]}),
    "load infinite": ("load", {"load": INF}),
    "load of the wrong shape": ("load", {"load": [1, 1]}),
    "min_load above capacity": ("min_load", {"min_load": [3, 0, 0]}),
    "min_load above the total": ("min_load", {"min_load": 3, "capacity": 6}),
    "min_load above the total in whole neurons": (
        "min_load",
        {"min_load": 1.5, "capacity": 6, "load": 1.0, "n_workers": 4},
    ),
    "min_load negative": ("min_load", {"min_load": [-1, 0, 0]}),
    "min_load infinite": ("min_load", {"min_load": INF, "capacity": INF}),
    "min_load of the wrong shape": ("min_load", {"min_load": [1, 1]}),
    "a neuron with no place": ("allowed", {"allowed": forbidding(2)}),
    "a neuron allowed only where there is no capacity": (
        "allowed",
        {"allowed": np.array([[False, False, True]] + [[True] * 3] * 5), "capacity": [3, 3, 0]},
    ),
    "allowed of the wrong shape": ("allowed", {"allowed": np.ones((P, m), dtype=bool)}),
    "allowed of numbers": ("allowed", {"allowed": np.ones((m, P))}),
    # bytes, prices, other vectors
    "value_bytes negative": ("value_bytes", {"value_bytes": -1}),
    "value_bytes of fractions": ("value_bytes", {"value_bytes": 2.5}),
    "value_bytes of the wrong shape": ("value_bytes", {"value_bytes": [4, 4]}),
    "link_price negative": ("link_price", {"link_price": -1.0}),
    "link_price infinite": ("link_price", {"link_price": INF}),
    "link_price of the wrong shape": ("link_price", {"link_price": np.ones((2, 2))}),
    "bias of the wrong shape": ("bias", {"bias": np.ones(n)}),
    "bias NaN": ("bias", {"bias": changed(np.ones(m), NAN)}),
    "output_weight negative": ("output_weight", {"output_weight": -np.ones(m)}),
    "output_weight of the wrong shape": ("output_weight", {"output_weight": np.ones(n)}),
    "column_value of the wrong shape": ("column_value", {"column_value": [0, 1]}),
    "column_value with gaps": ("column_value", {"column_value": [0, 0, 2, 3]}),
    "column_value negative": ("column_value", {"column_value": [0, 1, 2, -1]}),
    "row_neuron with gaps": ("row_neuron", {"row_neuron": [0, 1, 2, 3, 4, 6]}),
    "row_neuron negative": ("row_neuron", {"row_neuron": [-1, 0, 1, 2, 3, 4]}),
    "row_neuron of fractions": ("row_neuron", {"row_neuron": np.arange(6.0)}),
    # data
    "inputs together with moments": ("inputs", {"inputs": SAMPLES, "second_moment": C}),
    "inputs together with a mean": ("inputs", {"inputs": SAMPLES, "input_mean": np.zeros(n)}),
    "inputs with NaN": ("inputs", {"inputs": changed(SAMPLES, NAN)}),
    "inputs of other columns": ("inputs", {"inputs": SAMPLES[:, :3]}),
    "inputs of one dimension": ("inputs", {"inputs": SAMPLES[0]}),
    "no samples": ("inputs", {"inputs": SAMPLES[:0]}),
    "inputs of words": ("inputs", {"inputs": "many"}),
    "target_inputs alone": ("target_inputs", {"target_inputs": SAMPLES}),
    "target_inputs of another shape": ("target_inputs", {"inputs": SAMPLES, "target_inputs": SAMPLES[:5]}),
    "target_inputs infinite": ("target_inputs", {"inputs": SAMPLES, "target_inputs": changed(SAMPLES, INF)}),
    "second_moment of other columns": ("second_moment", {"second_moment": np.eye(3)}),
    "second_moment not square": ("second_moment", {"second_moment": np.ones((4, 3))}),
    "second_moment unsymmetric": ("second_moment", {"second_moment": np.triu(np.ones((4, 4)))}),
    "second_moment with a negative diagonal": ("second_moment", {"second_moment": -np.ones(4)}),
    "second_moment indefinite": ("second_moment", {"second_moment": 2 * np.ones((4, 4)) - np.eye(4)}),
    "second_moment indefinite where no worker has both inputs": (
        "second_moment",
        {"weight": W[:, :2], "n_workers": 2, "second_moment": [[1.0, 2.0], [2.0, 1.0]]},
    ),
    "second_moment NaN": ("second_moment", {"second_moment": changed(C, NAN)}),
    "input_mean alone": ("input_mean", {"input_mean": np.zeros(n)}),
    "input_mean of the wrong shape": ("input_mean", {"second_moment": C, "input_mean": np.zeros(3)}),
    "input_mean that the moment contradicts": ("input_mean", {"second_moment": np.ones(4), "input_mean": [5, 0, 0, 0]}),
    "cross_moment alone": ("cross_moment", {"cross_moment": C}),
    "cross_moment without target_moment": ("target_moment", {"second_moment": C, "cross_moment": C}),
    "cross_moment of the wrong shape": (
        "cross_moment",
        {"second_moment": C, "cross_moment": np.eye(3), "target_moment": C},
    ),
    "target_moment without cross_moment": ("target_moment", {"second_moment": C, "target_moment": C}),
    "target_mean without cross_moment": ("target_mean", {"second_moment": C, "target_mean": np.zeros(n)}),
    # the solve
    "formulation by name": ("formulation", {"formulation": "edge"}),
    "formulation as a class": ("formulation", {"formulation": Lossless}),
    "formulation as a class with arguments": ("formulation", {"formulation": Volume}),
    "unknown partitioner": ("partitioner", {"partitioner": "magic"}),
    "unknown stage": ("partitioner", {"partitioner": "munkres+magic"}),
    "empty stage": ("partitioner", {"partitioner": "munkres+"}),
    "partitioner that is no name": ("partitioner", {"partitioner": 5}),
    "unknown pruner": ("pruner", {"pruner": "magic"}),
    "pruner that is no name": ("pruner", {"pruner": 5}),
    "start above capacity": ("start", {"start": [0, 0, 0, 0, 1, 2]}),
    "start out of range": ("start", {"start": [0, 0, 1, 1, 2, 3]}),
    "start of the wrong shape": ("start", {"start": [0, 1, 2]}),
    "start of fractions": ("start", {"start": [0.0, 0, 1, 1, 2, 2]}),
    "start where it is not allowed": ("start", {"start": [0, 0, 1, 1, 2, 2], "allowed": forbidding_worker_0(0)}),
    "time_limit zero": ("time_limit", {"time_limit": 0}),
    "time_limit negative": ("time_limit", {"time_limit": -1.0}),
    "time_limit NaN": ("time_limit", {"time_limit": NAN}),
    "time_limit of words": ("time_limit", {"time_limit": "10"}),
    "seed negative": ("seed", {"seed": -1}),
    "seed of fractions": ("seed", {"seed": 1.5}),
    "seed true": ("seed", {"seed": True}),
    "seed None": ("seed", {"seed": None}),
}  # fmt: skip


@pytest.mark.parametrize(("argument", "arguments"), BAD.values(), ids=BAD)
def test_a_bad_argument_of_solve_layer_is_one_line_that_names_it(argument: str, arguments: dict[str, Any]):
    with pytest.raises(RepurposeError) as raised:
        solve_layer(**{"weight": W, "n_workers": P, **arguments})
    check_message(raised.value, argument)


BAD_FORMULATIONS: dict[str, tuple[str, Any]] = {
    "two of the exclusive arguments": ("budget", lambda: Volume(budget=0.1, transfer_price=1.0)),
    "three of them": ("max_nmse", lambda: Volume(budget=0.1, transfer_price=1.0, max_nmse=0.1)),
    "none of them": ("exactly one of transfer_price, budget, budget_bytes, max_nmse", Volume),
    "budget above 1": ("budget", lambda: Volume(budget=1.5)),
    "budget negative": ("budget", lambda: Volume(budget=-0.1)),
    "budget NaN": ("budget", lambda: Volume(budget=NAN)),
    "budget of words": ("budget", lambda: Volume(budget="10%")),  # type: ignore[arg-type]
    "budget_bytes negative": ("budget_bytes", lambda: Volume(budget_bytes=-1)),
    "max_nmse negative": ("max_nmse", lambda: Volume(max_nmse=-1)),
    "transfer_price negative": ("transfer_price", lambda: Volume(transfer_price=-1)),
    "transfer_price infinite": ("transfer_price", lambda: Volume(transfer_price=INF)),
    "weight_price negative": ("weight_price", lambda: Edge(weight_price=-1)),
    "weight_price NaN": ("weight_price", lambda: Edge(weight_price=NAN)),
    "Edge's transfer_price negative": ("transfer_price", lambda: Edge(transfer_price=-1)),
    "threads": ("threads", lambda: SolveOptions(threads=0)),
    "relative_gap": ("relative_gap", lambda: SolveOptions(relative_gap=1.0)),
}


@pytest.mark.parametrize(("argument", "make"), BAD_FORMULATIONS.values(), ids=BAD_FORMULATIONS)
def test_a_bad_formulation_or_option_is_one_line_that_names_the_argument(argument: str, make: Any):
    with pytest.raises(InvalidArgument) as raised:
        make()
    check_message(raised.value, argument)


def check_message(error: RepurposeError, argument: str) -> None:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 300
    assert argument in text
    if isinstance(error, InvalidArgument):
        got, allowed = text.split("; allowed: ")
        assert ": got " in got
        assert allowed


@pytest.mark.parametrize("name", ["budget", "no_such_option"])
def test_unknown_keywords_raise(name: str):
    arguments: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=name):
        SolveOptions(**arguments)
    with pytest.raises(TypeError, match=name):
        solve_layer(W, P, **arguments)


def test_errors_are_also_the_builtin_ones():
    with pytest.raises(ValueError, match="n_workers"):
        solve_layer(W, 0)
    with pytest.raises(LookupError, match="magic"):
        solve_layer(W, P, partitioner="magic")
