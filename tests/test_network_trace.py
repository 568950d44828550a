"""Reading a graph out of a model: what is split, what is coupled, what runs on one worker, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.network.builder import CENTRAL_UNIT
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.runtime.graph import INPUT


class Block(nn.Module):
    """A module that uses one activation twice, in an order other than that of its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 4, bias=False)
        self.act = nn.Tanh()
        self.first = nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.last(self.act(self.first(x))))


class Same(nn.Module):
    """One linear layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x))


class Forward(nn.Module):
    """Two layers and any forward function of them."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.run = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(self, x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.a(x)


class Wrapped(nn.Linear):
    """A subclass may compute anything; this one is a leaf to torch.fx, as those in torch.nn are."""

    __module__ = "torch.nn.wrapped"


ACCEPTED: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "nested": (nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.ReLU()), nn.Sequential(nn.Linear(5, 3))), (6,), 2),
    "module": (Block(), (6,), 2),
    "module in a sequence": (nn.Sequential(Block(), nn.Linear(4, 2)), (6,), 3),
    "flatten": (nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), (2, 3), 1),
    "dropout": (nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 5), nn.Dropout(0.9), nn.Linear(5, 2)), (6,), 2),
    "twice": (Same(), (6,), 2),
    "in place": (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ELU(0.3, inplace=True)), (6,), 1),
    "float64": (nn.Sequential(nn.Linear(6, 5), nn.GELU("tanh"), nn.Linear(5, 2)).double(), (6,), 2),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_graph_computes_what_the_model_does(name: str) -> None:
    model, shape, count = ACCEPTED[name]
    network = trace(model, torch.zeros(1, *shape))
    assert len(network.products) == count
    assert not network.central
    dtype = next(model.parameters()).dtype
    assert network.dtype == dtype
    samples = torch.randn(8, *shape, dtype=dtype)
    given = samples.clone()
    with torch.no_grad():
        found = network.graph(samples)
        assert torch.equal(samples, given), "in place on the caller's data"
        expected = model.eval()(given.clone())
    assert torch.equal(found, expected)


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = trace(model, torch.zeros(1, 6))
    with torch.no_grad():
        for parameter in network.graph.parameters():
            parameter.zero_()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model[1], nn.ReLU)
    assert model[1].inplace
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def units(network: Network, name: str) -> list[int]:
    return network.units(name).tolist()


def forward(function: Callable[..., Any], shape: tuple[int, ...] = (6,)) -> Network:
    return trace(Forward(function), torch.zeros(1, *shape))


# What is split


SPLIT: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "functions": (Forward(lambda self, x: self.b(functional.relu(self.a(x)).tanh())), (6,), 2),
    "skip": (Forward(lambda self, x: self.b(x + self.a(x))), (6,), 2),
    "batch norm": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (6,), 1),
    "convolution": (nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)), (2, 6, 6), 2),
    "layer norm": (nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)), (6,), 2),
    "attention": (nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), (4, 6), 4),
    "tokens of columns": (nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), (2, 3), 1),
    "layer norm without weights": (
        nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5, elementwise_affine=False), nn.Linear(5, 2)),
        (6,),
        2,
    ),
    "control flow on shapes": (Forward(lambda self, x: self.a(x) if x.shape[1] > 3 else self.b(x)), (6,), 1),
}


@pytest.mark.parametrize("name", SPLIT)
def test_what_is_known_is_split(name: str) -> None:
    model, shape, products = SPLIT[name]
    network = trace(model, torch.zeros(1, *shape))
    assert not network.central
    assert len(network.products) == products
    assert all(CENTRAL_UNIT not in network.units(name) for name in network.products)
    samples = torch.randn(5, *shape)
    with torch.no_grad():
        assert torch.allclose(network.graph(samples), model.eval()(samples), atol=1e-5)


def test_a_batch_norm_is_folded_into_the_product_before_it_unless_others_read_that() -> None:
    norm = nn.BatchNorm1d(6)
    folded = trace(nn.Sequential(nn.Linear(6, 6), norm), torch.zeros(1, 6))
    assert len(folded.graph.steps) == 1

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(6, 6), norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y * self.norm(y)

    assert len(trace(Both(), torch.zeros(1, 6)).graph.steps) == 3


def test_products_of_one_tensor_become_one() -> None:
    network = forward(lambda self, x: self.a(x).tanh() * self.b(x))
    assert network.products == ("a_and_b",)
    assert network.product("a_and_b").weight.shape == (12, 6)


# What is placed together


def test_what_is_added_or_multiplied_is_coupled() -> None:
    network = forward(lambda self, x: self.a(x) * self.b(torch.tanh(x)))
    assert units(network, "a") == units(network, "b")
    assert not set(units(network, "a")) & set(units(network, INPUT))
    skip = forward(lambda self, x: self.b(x) + x)
    assert units(skip, INPUT) == units(skip, "b")


def test_concatenation_puts_units_side_by_side() -> None:
    network = forward(lambda self, x: torch.cat([self.a(x), self.b(x.tanh())], 1))
    assert units(network, network.output) == units(network, "a") + units(network, "b")
    assert len(set(units(network, network.output))) == 12


def test_a_channel_becomes_a_block_of_columns() -> None:
    network = trace(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 4)), torch.zeros(1, 2, 4, 4))
    channels, columns = (network.units(name) for name in network.graph.steps[0].inputs + network.graph.steps[2].inputs)
    assert len(channels) == 2
    assert columns.tolist() == np.repeat(network.units("0"), 9).tolist()


def test_a_depthwise_convolution_stays_with_its_channel() -> None:
    network = trace(nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 6, 3, groups=3)), torch.zeros(1, 2, 4, 4))
    assert network.products == ("0",)
    assert units(network, "1") == np.repeat(network.units("0"), 2).tolist()


def test_query_key_and_value_of_a_head_are_one_unit() -> None:
    network = trace(nn.TransformerEncoderLayer(6, 3, 5, batch_first=True), torch.zeros(1, 4, 6))
    rows = network.units(network.products[0]).reshape(3, 3, 2)
    assert len(np.unique(rows)) == 3
    for head in range(3):
        assert len(np.unique(rows[:, head])) == 1


# What runs on one worker

CENTRAL: dict[str, tuple[nn.Module, str]] = {
    "softmax": (nn.Sequential(nn.Linear(6, 5), nn.Softmax(1), nn.Linear(5, 2)), "Softmax"),
    "unknown function": (Forward(lambda self, x: self.b(torch.cumsum(self.a(x), 1))), "cumsum"),
    "subclass": (nn.Sequential(nn.Linear(6, 5), Wrapped(5, 5)), "Wrapped"),
}


@pytest.mark.parametrize("name", CENTRAL)
def test_what_is_unknown_runs_on_one_worker_and_is_named(name: str) -> None:
    model, reason = CENTRAL[name]
    network = trace(model, torch.zeros(1, 6))
    assert len(network.central) == 1
    ((step, why),) = network.central.items()
    assert reason in why
    assert (network.units(step) == CENTRAL_UNIT).all()
    samples = torch.randn(5, 6)
    with torch.no_grad():
        assert torch.allclose(network.graph(samples), model.eval()(samples), atol=1e-5)


def test_a_weight_that_is_computed_is_taken_as_it_is() -> None:
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight * 2
    network = trace(nn.Sequential(layer, nn.Linear(5, 2)), torch.zeros(1, 6))
    assert not network.central
    assert torch.equal(network.product("0").weight, weight * 2)


# What is refused

REFUSED: dict[str, tuple[nn.Module, str]] = {
    "several outputs": (Forward(lambda self, x: (self.a(x), x)), "the output"),
    "control flow": (Forward(lambda self, x: self.a(x) if x.sum() > 0 else self.b(x)), "neither torch.fx"),
    "own error": (Forward(lambda self, x: self.a(x) if float(x.max()) > 0 else x), "neither torch.fx"),
    "no linear layer": (nn.Sequential(nn.ReLU()), "no nn.Linear"),
    "samples elsewhere": (Forward(lambda self, x: self.b(self.a(x).T.tanh().T)), "samples first"),
    "sums of samples": (Forward(lambda self, x: self.a(x) - x.mean()), "samples first"),
    "several tensors": (Forward(lambda self, x: self.b(self.a(x).max(1, keepdim=True)[0] + x)), "samples first"),
    "another number of samples": (Forward(lambda self, x: self.a(x).reshape(x.shape[0] * 2, 3)[:2]), "samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(name: str) -> None:
    model, part = REFUSED[name]
    with pytest.raises(UnsupportedModule) as caught:
        trace(model, torch.zeros(1, 6))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_a_second_input_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"example_input.*'mask'"):
        trace(TwoInputs(), torch.zeros(1, 6))


def test_a_number_of_samples_may_be_read() -> None:
    network = forward(lambda self, x: self.b(self.a(x).view(x.size(0), 2, -1).flip(1).reshape(x.shape[0], -1)))
    samples = torch.randn(11, 6)
    assert network.graph(samples).shape == (11, 6)


def test_weights_must_be_usable() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    with pytest.raises(InvalidArgument, match="float16 weights"):
        trace(nn.Sequential(nn.Linear(6, 5)).half(), torch.zeros(1, 6))
    with pytest.raises(InvalidArgument, match="float32 and float64"):
        trace(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2).double()), torch.zeros(1, 6))
    last = model[1]
    assert isinstance(last, nn.Linear)
    nn.init.constant_(last.bias, torch.nan)
    with pytest.raises(InvalidArgument, match="model: got NaN"):
        trace(model, torch.zeros(1, 6))
    with pytest.raises(InvalidArgument, match="model: got str"):
        trace("model", torch.zeros(1, 6))  # type: ignore[arg-type]


def test_an_example_that_does_not_fit_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    for example in (torch.zeros(1, 7), torch.zeros(0, 6), torch.zeros(6), [0.0] * 6):
        with pytest.raises(InvalidArgument, match="example_input"):
            trace(model, example)  # type: ignore[arg-type]
    assert trace(model, torch.zeros(1, 6, dtype=torch.int64)).dtype == torch.float32
