"""Wires: what arrives of a number that is written in fewer bits, and how many bytes it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_graph_plan import SAVED, built, inputs_of
from test_plan import mlp, random_plan

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.runtime.exchange import ExchangeStep
from repurpose_opt.runtime.simulate import simulate
from repurpose_opt.runtime.wire import WIRES, traffic, wire_of

NARROW = ("float16", "bfloat16", "int8")


def arrived(name: str, numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the definition of each format makes of numbers (rows, samples), in NumPy."""
    if name == "float16":
        return numbers.astype(np.float16).astype(np.float32)
    if name == "bfloat16":  # the upper half of a float32, rounded to nearest, ties to even
        bits = numbers.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(numbers / np.where(scale > 0, scale, 1)).astype(np.float32) * scale


def written_and_read(name: str, numbers: torch.Tensor) -> torch.Tensor:
    wire = WIRES[name]
    message = torch.empty(len(numbers), wire.row_elements(numbers.shape[1]), dtype=wire.dtype)
    wire.write(numbers, message)
    assert message.nbytes == len(numbers) * wire.row_bytes(numbers.shape[1])
    result = torch.empty_like(numbers)
    wire.read(message, result)
    return result


@pytest.mark.parametrize("name", NARROW)
def test_numbers_arrive_as_the_format_says(name: str) -> None:
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=(7, 33)) * 10.0 ** rng.integers(-3, 4, (7, 1))).astype(np.float32)
    numbers[2] = 0.0
    np.testing.assert_allclose(written_and_read(name, torch.from_numpy(numbers)), arrived(name, numbers), rtol=1e-6)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_arrive_as_a_number(name: str, bad: float) -> None:
    numbers = torch.ones(2, 3)
    numbers[1, 1] = bad
    result = written_and_read(name, numbers)
    assert torch.equal(result[0], torch.ones(3))
    assert not torch.isfinite(result[1, 1])


@pytest.mark.parametrize("name", NARROW)
def test_workers_compute_with_what_arrives(name: str) -> None:
    """Against a forward pass in NumPy that rounds every value that goes to another worker, batch by batch."""
    plan = random_plan(mlp([13, 11, 5]), 3)
    inputs = np.random.default_rng(1).normal(size=(10, 13)).astype(np.float32)
    ran = simulate(plan, inputs, batch_size=4, wire=name)
    answers = []
    for batch in np.split(inputs, [4, 8]):
        value = batch.T.copy()
        for step in plan.graph.steps:
            module: Any = plan.graph.module(step.name)
            layer = {layer.name: layer for layer in plan.layers}.get(step.name)
            if layer is None:
                value = module(torch.from_numpy(value)).numpy()
                continue
            weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
            own = np.equal.outer(layer.owner, layer.input_owner)
            value = (weight * own) @ value + (weight * ~own) @ arrived(name, value) + bias[:, None]
        answers.append(value.T)
    np.testing.assert_allclose(ran.outputs, np.concatenate(answers), atol=1e-5)
    exact = simulate(plan, inputs, batch_size=4).outputs
    assert not np.allclose(ran.outputs, exact, atol=1e-6), "nothing was rounded"


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("wire", [*NARROW, "float32"])
def test_bytes_are_the_predicted_and_answers_near(name: str, wire: str) -> None:
    model, plan = built(name)
    inputs = inputs_of(model, 7, seed=3)
    ran = simulate(plan, inputs, batch_size=4, wire=wire)
    predicted = sum(traffic(layer, samples, wire) for layer in plan.layers for samples in (4, 3))
    assert np.array_equal(ran.bytes_sent, predicted)
    exact = simulate(plan, inputs, batch_size=4).outputs
    assert np.abs(ran.outputs - exact).max() <= (0.0 if wire == "float32" else 0.1 * np.abs(exact).max())


@pytest.mark.parametrize("wire", NARROW)
def test_no_samples_give_no_outputs(wire: str) -> None:
    plan = random_plan(mlp([13, 11, 5]), 3)
    assert simulate(plan, np.zeros((0, 13)), wire=wire).outputs.shape == (0, 5)


def test_a_number_too_large_for_the_wire_ends_the_run() -> None:
    plan = random_plan(mlp([13, 11, 5]), 3)
    inputs = np.full((4, 13), 1e6)
    with pytest.raises(RepurposeError, match=r"layer '0': the wire float16 has no number as large as 1e\+06; allowed"):
        simulate(plan, inputs, wire="float16")
    for wire in ("bfloat16", "int8"):
        assert np.isfinite(simulate(plan, inputs, wire=wire).outputs).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_error_of_the_first_batch_is_measured_in_double_precision(scale: float) -> None:
    layer = random_plan(mlp([13, 8]), 3).layers[0]
    values = (torch.randn(13, 6, generator=torch.Generator().manual_seed(0)) * scale).half()
    squares = np.zeros(2)
    for worker in range(3):
        step = ExchangeStep(layer, worker, 6, torch.float16, wire=WIRES["int8"])
        for batch in (values, values * 0):
            step.begin(batch[layer.held(worker)], lambda *_: lambda: None)
        squares += step.squares.numpy()
        exact = step.encode(values[layer.held(worker)]).float().numpy()
        rounded = arrived("int8", exact).astype(np.float16).astype(np.float64)
        squares -= [np.square(rounded - exact).sum(), np.square(exact.astype(np.float64)).sum()]
    np.testing.assert_allclose(squares, 0, atol=1e-5 * scale**2)


def test_statistics_of_a_norm_are_never_rounded() -> None:
    _, plan = built("transformer")
    norms = [layer for layer in plan.layers if layer.sends_statistics]
    assert norms
    for layer in norms:
        assert np.array_equal(traffic(layer, 5, "int8"), layer.traffic() * 5)


def test_a_wire_is_no_wider_than_the_plan() -> None:
    assert wire_of(None, torch.float64).name == "float64"
    for name, dtype in (("float64", torch.float32), ("float8", torch.float32)):
        with pytest.raises(InvalidArgument, match=f"wire: got {name}.*allowed: float32, float16, bfloat16, int8"):
            wire_of(name, dtype)
