"""The forms that data may take, and what an error of each neuron costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.network.calibrate import check_loss, checked_labels, gather, loss_weights
from repurpose_opt.network.trace import trace

INPUTS = torch.arange(28.0).reshape(7, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])
TARGETS = torch.arange(14.0).reshape(7, 2)


def batches(*arrays: Any) -> Iterator[Any]:
    for part in (slice(0, 3), slice(3, 7)):
        yield tuple(array[part] for array in arrays) if len(arrays) > 1 else arrays[0][part]


WITHOUT_LABELS: dict[str, Any] = {
    "tensor": INPUTS,
    "array": INPUTS.numpy(),
    "with a gradient": INPUTS.clone().requires_grad_(),
    "list of batches": list(batches(INPUTS)),
    "list of two equal batches": [INPUTS[:4], INPUTS[4:]],
    "generator": batches(INPUTS.numpy()),
    "loader": DataLoader(INPUTS, batch_size=3),  # type: ignore[arg-type]
}
WITH_LABELS: dict[str, tuple[Any, torch.Tensor]] = {
    "tuple": ((INPUTS, LABELS), LABELS),
    "list": ([INPUTS, LABELS], LABELS),
    "arrays": ((INPUTS.numpy(), LABELS.numpy()), LABELS),
    "batches": (list(batches(INPUTS, LABELS)), LABELS),
    "generator": (batches(INPUTS.numpy(), LABELS.numpy()), LABELS),
    "loader": (DataLoader(TensorDataset(INPUTS, LABELS), batch_size=3), LABELS),
    "numbers": ((INPUTS, TARGETS), TARGETS),
    "list with numbers": ([INPUTS, TARGETS], TARGETS),
    "loader with numbers": (DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=4), TARGETS),
    "inputs to inputs": ((INPUTS, INPUTS), INPUTS),
    "batches of inputs to inputs": (DataLoader(TensorDataset(INPUTS, INPUTS), batch_size=4), INPUTS),
}


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_inputs_are_gathered(name: str) -> None:
    inputs, labels = gather(WITHOUT_LABELS[name])
    assert torch.equal(inputs, INPUTS)
    assert not inputs.requires_grad
    assert labels is None


@pytest.mark.parametrize("name", WITH_LABELS)
def test_labels_are_gathered(name: str) -> None:
    data, expected = WITH_LABELS[name]
    inputs, labels = gather(data)
    assert torch.equal(inputs, INPUTS)
    assert labels is not None
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float16, np.bool_])
def test_inputs_of_any_number_type_are_gathered(dtype: Any) -> None:
    inputs, _ = gather(np.ones((3, 2), dtype=dtype))
    assert torch.equal(inputs.double(), torch.ones(3, 2).double())


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": (None, "NoneType"),
    "text": ("digits.npz", "str"),
    "mapping": ({"inputs": INPUTS}, "dict"),
    "number": (3, "int"),
    "no batches": ([], "no batches"),
    "no samples": (INPUTS[:0], "no samples"),
    "one sample": (INPUTS[0], "shape (4,)"),
    "a data set of samples": (TensorDataset(INPUTS, LABELS), "TensorDataset"),
    "words": (np.array([["a", "b"]]), "ndarray"),
    "batches of words": (["a", "b"], "str"),
    "fewer labels": ((INPUTS, LABELS[:5]), "5 labels for 7 inputs"),
    "fewer labels in a batch": ([(INPUTS, LABELS), (INPUTS, LABELS[:5])], "5 labels for 7 inputs"),
    "labels here and there": ([(INPUTS, LABELS), INPUTS], "labels in 1 of 2 batches"),
    "other shapes": ([INPUTS, INPUTS, INPUTS[:, :3]], "samples of shapes [(3,), (4,)]"),
    "NaN": (torch.full((2, 2), torch.nan), "NaN"),
    "infinite": (np.full((2, 2), np.inf), "NaN or infinite"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_are_named(name: str) -> None:
    data, part = WRONG[name]
    with pytest.raises(InvalidArgument) as caught:
        gather(data)
    assert str(caught.value).startswith("data: got")
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_what_the_loss_takes() -> None:
    assert checked_labels(LABELS.to(torch.uint8), "cross_entropy", (3,)).dtype == torch.int64
    assert torch.equal(checked_labels(TARGETS, "squared_error", (2,)), TARGETS)
    assert checked_labels(TARGETS[:, 0], "squared_error", (1,)).shape == (7, 1)
    maps = torch.zeros(7, 3, 4, 5)
    assert checked_labels(maps, "squared_error", (3, 4, 5)).shape == maps.shape
    for labels, loss, outputs, part in (
        (LABELS, "cross_entropy", 2, "labels 0 … 2"),
        (LABELS - 1, "cross_entropy", 3, "labels -1 … 1"),
        (LABELS.float(), "cross_entropy", 3, "float32"),
        (TARGETS.long(), "cross_entropy", 99, r"\(7, 2\)"),
        (LABELS, "squared_error", 3, r"\(7,\)"),
        (TARGETS * torch.inf, "squared_error", 2, "finite"),
        (maps[:, 1:], "squared_error", (3, 4, 5), r"\(samples, 3, 4, 5\)"),
    ):
        with pytest.raises(InvalidArgument, match=part):
            checked_labels(labels, loss, (outputs,) if isinstance(outputs, int) else outputs)


def model_of(outputs: int) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 5),
        nn.ReLU(inplace=True),
        nn.Linear(5, 4, bias=False),
        nn.Tanh(),
        nn.Linear(4, outputs),
    ).double()


def per_sample_gradients(model: nn.Sequential, sample: torch.Tensor, loss: Any) -> list[torch.Tensor]:
    """∂loss/∂z at the three linear layers for one sample, by one differentiation per layer of the layers after it."""
    gradients = []
    for position in (1, 3, 5):
        z = model[: position + 1](sample[None]).detach()

        def rest(z: torch.Tensor, position: int = position) -> torch.Tensor:
            return loss(model[position + 1 :](z.clone()))

        gradients.append(torch.autograd.functional.jacobian(rest, z)[0])
    return gradients


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_loss_weights_are_the_mean_squares_of_per_sample_gradients(loss: str) -> None:
    model, samples = model_of(3), torch.randn(40, 2, 3).double()
    with torch.no_grad():
        outputs = model(samples)
    generator = torch.Generator().manual_seed(11)
    if loss == "cross_entropy":
        drawn = torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]
    else:
        drawn = outputs + torch.randn(outputs.shape, dtype=torch.float64, generator=generator)
    expected = [torch.zeros(width).double() for width in (5, 4, 3)]
    for sample, label in zip(samples, drawn, strict=True):

        def value(answer: torch.Tensor, label: torch.Tensor = label) -> torch.Tensor:
            if loss == "cross_entropy":
                return functional.cross_entropy(answer, label[None])
            return (answer - label).square().sum() / 2

        for total, gradient in zip(expected, per_sample_gradients(model, sample, value), strict=True):
            total += gradient.square() / len(samples)
    network = trace(model, samples[:1])
    with torch.no_grad():
        found = loss_weights(network, samples, 11, loss)
    assert tuple(found) == network.products
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert np.allclose(ours, theirs.numpy(), rtol=1e-9)


def test_loss_weights_approach_the_fisher_information() -> None:
    model, samples = model_of(3), torch.randn(1, 2, 3).double().expand(6000, -1, -1)
    z = model[:2](samples[:1]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: model[2:](z.clone()), z)[0, :, 0]
    chances = model(samples[:1])[0].softmax(0).detach()
    hessian = torch.diag(chances) - torch.outer(chances, chances)
    fisher = {
        "squared_error": jacobian.square().sum(0),
        "cross_entropy": torch.einsum("ci,cd,di->i", jacobian, hessian, jacobian),
    }
    network = trace(model, samples[:1])
    for loss, expected in fisher.items():
        found = loss_weights(network, samples, 0, loss)[network.products[0]]
        assert np.allclose(found, expected.numpy(), rtol=0.1, atol=1e-12), loss


def test_a_loss_that_says_nothing_is_refused() -> None:
    network = trace(model_of(1), torch.zeros(1, 2, 3))
    with pytest.raises(InvalidArgument, match=r"outputs of shape \(1,\); allowed: squared_error"):
        check_loss("cross_entropy", network)
    check_loss("squared_error", network)
    with pytest.raises(InvalidArgument, match="'hinge'; allowed: cross_entropy or squared_error"):
        check_loss("hinge", network)


def test_loss_weights_sum_over_the_positions_of_a_convolution() -> None:
    """By one differentiation a sample; the gradient of a channel at every position counts."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    samples = torch.randn(15, 2, 3, 3).double()
    noise = torch.randn(15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.zeros(3).double()
    for sample, drawn in zip(samples, noise, strict=True):
        z = model[0](sample[None]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad((model[1:](z) @ drawn).sum(), z)
        expected += gradient[0].square().sum((1, 2)) / len(samples)
    network = trace(model, samples[:1])
    found = loss_weights(network, samples, 3, "squared_error")[network.products[0]]
    assert np.allclose(found, expected.numpy(), rtol=1e-9)


def test_outputs_that_overflow_are_refused() -> None:
    layer = nn.Linear(2, 3)
    nn.init.constant_(layer.weight, 10.0)
    network = trace(nn.Sequential(layer), torch.zeros(1, 2))
    with pytest.raises(InvalidArgument, match="data: got inputs on which the model answers"):
        loss_weights(network, torch.full((2, 2), 3e38), 0)
