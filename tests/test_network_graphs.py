"""Random networks of every kind: a plan computes what the model does, on workers that have their own parts only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from repurpose_opt import Lossless, Plan, Volume
from repurpose_opt.errors import NoSolution
from repurpose_opt.formulation import Formulation
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.simulate import simulate

P = 3
SAMPLES, UNSEEN = 40, 7
CLOSE = 1e-4
"""Largest difference of two outputs that are the same, relative to the largest output."""


@dataclass(frozen=True, eq=False)
class Case:
    """A network, inputs for it, and how it is to be planned."""

    model: nn.Module
    inputs: torch.Tensor
    """(SAMPLES + UNSEEN, …)"""
    seed: int
    share: Sequence[float]
    output_owner: int | tuple[int, ...]
    partitioner: str

    def __repr__(self) -> str:
        shape = tuple(self.inputs.shape[1:])
        return f"{self.model}\ninputs {shape}, seed {self.seed}, share {self.share}, output {self.output_owner}"


# Modules to build networks of


class Call(nn.Module):
    """A function, called by its name."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return FUNCTION_NAMES.get(self.function, "?")


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class InPlace(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        y += x
        return functional.relu(y, inplace=True)


class Beside(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=1)


class Gate(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.inner(x))


class Halves(nn.Module):
    """One half of the channels gates the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * gate.sigmoid()


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, hidden: int, dims: int, keeps: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.dims, self.keeps = dims, keeps
        self.conv_down, self.conv_up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dims == 2 and self.keeps:
            squeezed = functional.relu(self.conv_down(functional.adaptive_avg_pool2d(x, 1)))
            return x * self.conv_up(squeezed).sigmoid()
        squeezed = torch.sigmoid(self.up(torch.relu(self.down(x.mean(tuple(range(2, 2 + self.dims)))))))
        return x * (squeezed[:, :, None, None] if self.dims == 2 else squeezed.unsqueeze(-1))


class SelfAttention(nn.Module):
    def __init__(self, size: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.norm = randomised(nn.LayerNorm(size))
        self.attention = nn.MultiheadAttention(size, heads, bias=bias, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


class Tokens(nn.Module):
    """The positions of a map as tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


class Positions(nn.Module):
    def __init__(self, tokens: int, size: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, tokens, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.positions


class Unreadable(nn.Module):
    """torch.fx cannot tell how many axes there are; torch.export can."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x.shape) > 1:
            x = self.inner(x)
        return x


def randomised(norm: nn.Module) -> nn.Module:
    """A normalisation as training leaves it."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return norm


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
    "method": lambda x: x.sigmoid(),
    "scaled": lambda x: (2 * x - 0.5) / 3 + 1,
    "leaky": lambda x: functional.leaky_relu(x, 0.2),
    "silu": lambda x: functional.silu(x),
    "hardtanh": lambda x: functional.hardtanh(x, -0.5, 2.0),
    "softplus": lambda x: functional.softplus(x, beta=2),
    "dropout": lambda x: functional.dropout(x, 0.5, False),
}
UNKNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cumsum": lambda x: torch.cumsum(x, 1),
    "flip": lambda x: x.flip(1),
    "square": lambda x: x**2,
    "minus its mean": lambda x: x - x.mean(1, keepdim=True),
    "softmax": lambda x: x.softmax(1),
    "reversed": lambda x: 1 - x,
}
FUNCTION_NAMES = {function: name for name, function in {**FUNCTIONS, **UNKNOWN}.items()}
ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LeakyReLU(0.3),
    nn.ELU,
    lambda: nn.GELU("tanh"),
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
    nn.ReLU6,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Mish,
    nn.Identity,
    nn.Dropout,
    *(lambda function=function: Call(function) for function in FUNCTIONS.values()),
]
STRANGE: list[Callable[[], nn.Module]] = [
    nn.PReLU,
    nn.CELU,
    nn.Softsign,
    *(lambda function=function: Call(function) for function in UNKNOWN.values()),
]


def activation(draw: Any) -> nn.Module:
    return draw(st.sampled_from(ACTIVATIONS))()


def odd(draw: Any, most: int = 11) -> int:
    return draw(st.sampled_from([size for size in (2, 3, 5, 7, 9, 11) if size <= most]))


# Vectors


def vector_block(draw: Any, size: int) -> tuple[nn.Module, int]:
    """A module of (samples, size), and the size of its outputs."""
    kind = draw(st.sampled_from(["linear", "linear", "norm", "act", "residual", "beside", "gate", "halves", "strange"]))
    new = odd(draw)
    if kind == "norm":
        norms = [nn.BatchNorm1d(size), nn.LayerNorm(size), nn.LayerNorm(size, elementwise_affine=False)]
        return randomised(draw(st.sampled_from(norms))), size
    if kind == "act":
        return activation(draw), size
    if kind == "residual":
        inner = nn.Sequential(nn.Linear(size, new), activation(draw), nn.Linear(new, size))
        return draw(st.sampled_from([Residual, InPlace]))(inner), size
    if kind == "beside":
        parts = [nn.Identity(), nn.Linear(size, new), nn.Sequential(nn.Linear(size, 3), activation(draw))]
        return Beside(*parts), size + new + 3
    if kind == "gate":
        return Gate(nn.Linear(size, size)), size
    if kind == "halves":
        return nn.Sequential(nn.Linear(size, 2 * new), Halves()), new
    if kind == "strange":
        return draw(st.sampled_from(STRANGE))(), size
    bias = draw(st.booleans())
    return nn.Sequential(nn.Linear(size, new, bias=bias), activation(draw)), new


def vectors(draw: Any, size: int, most: int) -> list[nn.Module]:
    """Blocks and a last layer, of (samples, size)."""
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(0, most))):
        module, size = vector_block(draw, size)
        modules.append(module)
    modules.append(nn.Linear(size, odd(draw)))
    ends = [nn.Identity(), nn.Softmax(-1), nn.LogSoftmax(1), nn.ReLU(), Call(UNKNOWN["softmax"])]
    return [*modules, draw(st.sampled_from(ends))]


def perceptron(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    shape = draw(st.sampled_from([(7,), (11,), (3, 5)]))
    start = [nn.Flatten()] if len(shape) > 1 else []
    return nn.Sequential(*start, *vectors(draw, math.prod(shape), 4)), torch.randn(SAMPLES + UNSEEN, *shape)


# Maps: (samples, channels, length) and (samples, channels, height, width)


def convolution(draw: Any, channels: int, sides: Sequence[int], most_groups: int = 99) -> nn.Module:
    """Any that fits."""
    kind = nn.Conv1d if len(sides) == 1 else nn.Conv2d
    kernel = draw(st.integers(1, min(3, *sides)))
    dilation = draw(st.integers(1, 2)) if 2 * (kernel - 1) < min(sides) else 1
    groups = draw(st.sampled_from([1, 1, channels, *(g for g in (2, 3) if channels % g == 0)]))
    groups = min(groups, most_groups)
    new = odd(draw, 7) if groups == 1 else groups * draw(st.integers(1, 2))
    numbers: dict[str, Any] = {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 1))}
    if kernel != 2 and draw(st.booleans()):
        numbers = {"padding": draw(st.sampled_from(["same", "valid"]))}
    return kind(channels, new, kernel, dilation=dilation, groups=groups, bias=draw(st.booleans()), **numbers)


def pooling(draw: Any, sides: Sequence[int]) -> nn.Module:
    d = f"{len(sides)}d"
    size = draw(st.integers(1, 2))
    adaptive = draw(st.integers(1, 2))
    function = draw(st.booleans())
    kind = draw(st.sampled_from(["max", "avg", "adaptive avg", "adaptive max"]))
    if kind == "max" and min(sides) > 2:
        if function:
            pool = getattr(functional, f"max_pool{d}")
            return Call(lambda x: pool(x, 2, stride=1, padding=1))
        return getattr(nn, f"MaxPool{d}")(2, size, 1, ceil_mode=draw(st.booleans()))
    if kind == "avg" and min(sides) > 2:
        return getattr(nn, f"AvgPool{d}")(2, size, 1, count_include_pad=draw(st.booleans()))
    if kind == "adaptive max":
        return getattr(nn, f"AdaptiveMaxPool{d}")(adaptive)
    return getattr(nn, f"AdaptiveAvgPool{d}")(adaptive)


def map_block(draw: Any, channels: int, sides: Sequence[int]) -> nn.Module:
    conv, dims = (nn.Conv1d, 1) if len(sides) == 1 else (nn.Conv2d, 2)
    kinds = ["conv", "conv", "conv norm", "norm", "pool", "act", "residual", "beside", "excite", "halves", "strange"]
    kind = draw(st.sampled_from(kinds))
    norm = getattr(nn, f"BatchNorm{dims}d")
    if kind == "conv norm":
        found = convolution(draw, channels, sides)
        return nn.Sequential(found, randomised(norm(found.out_channels)), activation(draw))
    if kind == "norm":
        return randomised(norm(channels))
    if kind == "pool":
        return pooling(draw, sides)
    if kind == "act":
        return activation(draw)
    if kind == "residual":
        inner = nn.Sequential(conv(channels, 5, 3, padding=1), activation(draw), conv(5, channels, 1))
        return draw(st.sampled_from([Residual, InPlace]))(inner)
    if kind == "beside":
        return Beside(conv(channels, 3, 3, padding=1), nn.Identity(), conv(channels, 2, 1))
    if kind == "excite":
        return Excite(channels, odd(draw, 3), dims, draw(st.booleans()))
    if kind == "halves":
        return nn.Sequential(conv(channels, 6, 1), Halves())
    if kind == "strange":
        others = [
            nn.GroupNorm(1, channels),
            nn.LocalResponseNorm(2),
            nn.Upsample(scale_factor=2),
            *(f() for f in STRANGE),
        ]
        return draw(st.sampled_from(others))
    return convolution(draw, channels, sides)


def maps(draw: Any, shape: tuple[int, ...], most: int) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Blocks of (samples, *shape) that begin with a convolution, and the shape of their outputs."""
    model = nn.Sequential(convolution(draw, shape[0], shape[1:], most_groups=1))
    shape = shape_after(model, shape)
    for _ in range(draw(st.integers(0, most))):
        block = map_block(draw, shape[0], shape[1:])
        shape = shape_after(block, shape)
        model.append(block)
    return model, shape


@torch.no_grad()
def shape_after(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(module.eval()(torch.zeros(2, *shape)).shape[1:])


def convolutional(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    given = draw(st.sampled_from([(3, 7, 5), (4, 6, 6), (1, 7, 7), (5, 9), (2, 11)]))
    model, shape = maps(draw, given, 3)
    dims = len(shape) - 1
    inputs = torch.randn(SAMPLES + UNSEEN, *given)
    end = draw(st.sampled_from(["flatten", "view", "pool", "mean", "fully convolutional", "map"]))
    if end == "map":
        return model, inputs
    if end == "flatten":
        return model.extend([nn.Flatten(), *vectors(draw, math.prod(shape), 1)]), inputs
    if end == "view":
        flat = Call(lambda x: x.reshape(x.shape[0], -1))
        return model.extend([flat, *vectors(draw, math.prod(shape), 1)]), inputs
    if end == "pool":
        pool = nn.AdaptiveAvgPool1d(1) if dims == 1 else nn.AdaptiveAvgPool2d((1, 1))
        return model.extend([pool, nn.Flatten(1), *vectors(draw, shape[0], 1)]), inputs
    over = tuple(range(2, 2 + dims))
    mean = Call(lambda x: x.mean(over))
    if end == "mean":
        return model.extend([mean, *vectors(draw, shape[0], 1)]), inputs
    conv = nn.Conv1d if dims == 1 else nn.Conv2d
    return model.extend([conv(shape[0], 5, 1), mean]), inputs


# Tokens: (samples, tokens, size)


def token_block(draw: Any, size: int, heads: int, kinds: Sequence[str]) -> nn.Module:
    kind = draw(st.sampled_from(kinds))
    hidden = odd(draw)
    if kind == "encoder":
        act = draw(st.sampled_from(["relu", "gelu"]))
        first = draw(st.booleans())
        return nn.TransformerEncoderLayer(size, heads, hidden, activation=act, norm_first=first, batch_first=True)
    if kind == "attention":
        return SelfAttention(size, heads, draw(st.booleans()))
    if kind == "feed":
        return Residual(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, hidden), activation(draw), nn.Linear(hidden, size))
        )
    return randomised(nn.LayerNorm(size)) if kind == "norm" else activation(draw)


TOKEN_BLOCKS = ("encoder", "encoder", "attention", "feed", "norm", "act")


def transformer(draw: Any, kinds: Sequence[str] = TOKEN_BLOCKS) -> tuple[nn.Module, torch.Tensor]:
    heads, tokens = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    size = heads * draw(st.sampled_from([1, 2, 3]))
    size = size if size > 1 else 3 * heads
    start = draw(st.sampled_from(["tokens", "ids", "patches"]))
    if start == "tokens":
        inputs = torch.randn(SAMPLES + UNSEEN, tokens, 5)
        modules: list[nn.Module] = [nn.Linear(5, size)]
    elif start == "ids":
        inputs = torch.randint(13, (SAMPLES + UNSEEN, tokens))
        modules = [nn.Embedding(13, size)]
    else:
        inputs = torch.randn(SAMPLES + UNSEEN, 3, 4, 2 * tokens)
        modules, tokens = [nn.Conv2d(3, size, 2, stride=2), Tokens()], 2 * tokens
    if draw(st.booleans()):
        modules.append(Positions(tokens, size))
    modules += [token_block(draw, size, heads, kinds) for _ in range(draw(st.integers(1, 2)))]
    end = draw(st.sampled_from(["mean", "first", "last", "flatten", "tokens"]))
    if end == "tokens":
        return nn.Sequential(*modules, nn.Linear(size, 3)), inputs
    if end == "flatten":
        return nn.Sequential(*modules, nn.Flatten(), *vectors(draw, tokens * size, 1)), inputs
    take: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "mean": lambda x: x.mean(1),
        "first": lambda x: x[:, 0],
        "last": lambda x: x[:, -1],
    }
    return nn.Sequential(*modules, Call(take[end]), *vectors(draw, size, 1)), inputs


def unreadable(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    """torch.export makes of an attention what has samples on its second axis, which is refused."""
    kind = draw(st.sampled_from(["perceptron", "convolutional", "transformer"]))
    if kind == "transformer":
        model, inputs = transformer(draw, ("feed", "norm", "act"))
    else:
        model, inputs = KINDS[kind](draw)
    return Unreadable(model), inputs


# Plans

KINDS: dict[str, Callable[[Any], tuple[nn.Module, torch.Tensor]]] = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "transformer": transformer,
    "unreadable": unreadable,
}
WHOLE: list[Formulation] = [Volume(budget=1.0), Lossless(), Lossless(messages="codes")]
PRUNED: list[Formulation] = [
    Volume(budget=0.3),
    Volume(budget=0.3, messages="codes"),
    Volume(transfer_price=1e-3, messages="mixed"),
]


@st.composite
def cases(draw: Any, kind: str) -> Case:
    seed = draw(st.integers(0, 999))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = KINDS[kind](draw)
    return Case(
        model.eval(),
        inputs,
        seed,
        draw(st.sampled_from([(1, 1, 1), (1, 2, 3), (3, 1, 0)])),
        draw(st.sampled_from([0, 1, (0, 1)])),
        draw(st.sampled_from(["contiguous", "random"])),
    )


def planned(case: Case, formulation: Formulation) -> Plan:
    """At a price where norms and gatherings alone send more than the budget."""
    try:
        return repurposed(case, formulation)
    except NoSolution:
        assert isinstance(formulation, Volume)
        return repurposed(case, replace(formulation, budget=None, transfer_price=1e-3))


def repurposed(case: Case, formulation: Formulation) -> Plan:
    layout = trace(case.model, case.inputs[:1]).layouts[INPUT]
    owner = None if layout is None else np.random.default_rng(case.seed).integers(P, size=len(layout.places))
    return repurpose(
        case.model,
        case.inputs[:1],
        P,
        data=case.inputs[:SAMPLES],
        input_owner=owner,
        output_owner=case.output_owner,
        formulation=formulation,
        partitioner=case.partitioner,
        pruner="threshold",
        worker_share=case.share,
        loss="squared_error",
        seed=case.seed,
    )


@torch.no_grad()
def difference(found: Any, expected: torch.Tensor) -> float:
    """Largest, relative to the largest output."""
    found = torch.as_tensor(found)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


@torch.no_grad()
def check_workers(plan: Plan, inputs: torch.Tensor) -> None:
    """Workers with their own parts only answer as the plan's model does, and send what it says."""
    ran = simulate(plan, inputs.numpy())
    assert difference(ran.outputs, plan.model(inputs)) <= CLOSE
    assert np.array_equal(ran.bytes_sent, len(inputs) * plan.traffic())


def check(case: Case, whole: Formulation, pruned: Formulation) -> None:
    unseen = case.inputs[SAMPLES:]
    with torch.no_grad():
        expected = case.model(unseen.clone())
    plan = planned(case, whole)
    assert difference(plan.model(unseen), expected) <= CLOSE
    check_workers(plan, unseen)
    plan = planned(case, pruned)
    check_workers(plan, unseen)


@pytest.mark.parametrize(("kind", "examples"), [(kind, 8) for kind in KINDS])
def test_a_plan_computes_what_the_model_does(kind: str, examples: int) -> None:
    @settings(max_examples=examples)
    @given(cases(kind), st.sampled_from(WHOLE), st.sampled_from(PRUNED))
    def test(case: Case, whole: Formulation, pruned: Formulation) -> None:
        check(case, whole, pruned)

    test()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_plans_compute_what_the_model_does(kind: str) -> None:
    @settings(max_examples=300)
    @given(cases(kind), st.sampled_from(WHOLE), st.sampled_from(PRUNED))
    def test(case: Case, whole: Formulation, pruned: Formulation) -> None:
        check(case, whole, pruned)

    test()
