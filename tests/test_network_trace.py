"""Reading a chain of layers out of a model, and refusing what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.network.trace import trace


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
def test_a_chain_computes_what_the_model_does(name: str) -> None:
    model, shape, count = ACCEPTED[name]
    chain = trace(model, torch.zeros(1, *shape))
    assert len(chain.linears) == count
    dtype = next(model.parameters()).dtype
    assert chain.dtype == dtype
    samples = torch.randn(8, *shape, dtype=dtype)
    given = samples.clone()
    with torch.no_grad():
        step_by_step = chain.before_first(samples)
        for index in range(count):
            step_by_step = chain.after(index, chain.linear(index)(step_by_step))
        assert torch.equal(samples, given), "in place on the caller's data"
        expected = model.eval()(given.clone())
    assert torch.equal(step_by_step, expected)
    assert torch.equal(chain.model(samples), expected)


def test_the_model_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(5, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chain = trace(model, torch.zeros(1, 6))
    with torch.no_grad():
        for parameter in chain.model.parameters():
            parameter.zero_()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model[1], nn.ReLU)
    assert model[1].inplace
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "convolution": (nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 3))), "'0.0' (Conv2d)"),
    "batch norm": (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), "'1' (BatchNorm1d)"),
    "softmax": (nn.Sequential(nn.Linear(6, 5), nn.Softmax(1)), "'1' (Softmax)"),
    "flatten inside": (nn.Sequential(nn.Linear(6, 5), nn.Flatten()), "'1' (Flatten)"),
    "another flatten": (nn.Sequential(nn.Flatten(2), nn.Linear(6, 5)), "'0' (Flatten)"),
    "subclass": (nn.Sequential(nn.Linear(6, 5), Wrapped(5, 5)), "'1' (Wrapped)"),
    "functional": (Forward(lambda self, x: self.b(functional.relu(self.a(x)))), "relu"),
    "tensor method": (Forward(lambda self, x: self.b(self.a(x).tanh())), "tanh"),
    "skip": (Forward(lambda self, x: self.b(x + self.a(x))), "add"),
    "branch": (Forward(lambda self, x: [self.a(x), self.b(x)][1]), "module 'b'"),
    "several outputs": (Forward(lambda self, x: (self.a(x), x)), "the output"),
    "control flow": (Forward(lambda self, x: self.a(x) if x.sum() > 0 else self.b(x)), "torch.fx cannot trace"),
    "own error": (Forward(lambda self, x: self.a(x[len(x)])), "torch.fx cannot trace"),
    "two inputs": (TwoInputs(), "'mask'"),
    "no linear layer": (nn.Sequential(nn.ReLU()), "no nn.Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(name: str) -> None:
    model, part = REFUSED[name]
    with pytest.raises(UnsupportedModule) as caught:
        trace(model, torch.zeros(1, 6))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


def test_a_weight_that_is_computed_is_refused() -> None:
    layer = nn.Linear(6, 5)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight * 2
    with pytest.raises(UnsupportedModule, match="'0'"):
        trace(nn.Sequential(layer), torch.zeros(1, 6))


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
    for example in (torch.zeros(1, 7), torch.zeros(1, 2, 6), torch.zeros(6), [0.0] * 6):
        with pytest.raises(InvalidArgument, match="example_input"):
            trace(model, example)  # type: ignore[arg-type]
    assert trace(model, torch.zeros(1, 6, dtype=torch.int64)).dtype == torch.float32
