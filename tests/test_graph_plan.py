"""Plans of graphs: convolutions, residuals, transformers; on workers in one process, and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_plan import write_manifest
from torch import nn

from repurpose_opt.errors import InvalidArgument, PlanError, RepurposeError, UnsupportedModule
from repurpose_opt.exchange import Values
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import CodedConv, CodedLinear, effective_weight
from repurpose_opt.runtime.graph import INPUT, Graph
from repurpose_opt.runtime.layer import PlannedMessage, PlannedStatistics
from repurpose_opt.runtime.layout import Layout, carried, made
from repurpose_opt.runtime.modules import ELEMENTWISE, KINDS, Role, from_spec, materialised, role_of, to_spec
from repurpose_opt.runtime.plan import Plan, PlannedCode, PlannedLayer
from repurpose_opt.runtime.simulate import run_in_process, simulate

P = 3
Steps = Sequence[tuple[str, nn.Module, tuple[str, ...]]]


@dataclass(frozen=True)
class Model:
    """A network and where its pieces are."""

    steps: Steps
    input_shape: tuple[int, ...]
    input_owner: NDArray[np.int64] | None
    owners: Mapping[str, NDArray[np.int64]]
    """By step: of the outputs of products and embeddings."""
    input_axis: int = 1
    vocabulary: int = 0
    """Of a model that reads whole numbers."""


def chain(*named: tuple[str, nn.Module]) -> Steps:
    names = [INPUT, *(name for name, _ in named)]
    return [(name, module, (before,)) for (name, module), before in zip(named, names, strict=False)]


def spread(size: int, seed: int = 0, workers: Sequence[int] = (0, 1, 2), share: Sequence[float] = ()) -> Any:
    """(size,) uneven owners."""
    weights = np.array(share or [1.0, 2.0, 1.5][: len(workers)])
    return np.random.default_rng(seed).choice(workers, size, p=weights / weights.sum())


def hand_made(model: Model, *, seed: int = 0, density: float = 0.5) -> Plan:
    """A plan with random messages, of which the weights are zero wherever a value is not had."""
    rng = np.random.default_rng(seed)
    graph = Graph(model.steps).eval().requires_grad_(False)
    values = graph.outputs(torch.from_numpy(inputs_of(model, 2)))
    layouts: dict[str, Layout | None] = {INPUT: None}
    if model.input_owner is not None:
        layouts[INPUT] = Layout(model.input_axis, model.input_owner)
    shapes = {INPUT: (2, *model.input_shape)}
    layers = []
    for step, value in values:
        module, shape = graph.module(step.name), tuple(value.shape)
        reads = [layouts[name] for name in step.inputs]
        read, shapes[step.name] = reads[0], shape
        positions = 1 if read is None else int(np.prod(shapes[step.inputs[0]][1:])) // len(read.places)
        role, size = role_of(module), 4 * positions
        if role is Role.PRODUCT:
            assert read is not None
            owner = model.owners[step.name]
            layer = product(step.name, module, read.places, owner, positions, int(np.prod(shape[1:])), rng, density)
        elif role is Role.SOURCE:
            layer = PlannedLayer.source(step.name, model.owners[step.name], P, 4)
        elif role is Role.NORM:
            assert read is not None
            layer = PlannedLayer.norm(step.name, read.places, P, size, positions)
        elif role is Role.GATHER:
            assert read is not None
            layer = PlannedLayer.gather(step.name, read.places, 1, P, size, positions)
        elif role is Role.CENTRAL:
            axis = 1 if read is None else read.axis
            layer = PlannedLayer.central(step.name, 0 if read is None else len(read.places), shape[axis], 1, P, 4)
        else:
            assert all(read is not None for read in reads)
            layouts[step.name] = carried(module, [read for read in reads if read is not None], shape)
            continue
        layouts[step.name] = made(
            layer.owner, shape, 1 if isinstance(module, Conv) else -1 if read is None else read.axis
        )
        layers.append(layer)
    return Plan(graph, tuple(layers), P, 999, {}, model.input_owner, model.input_shape)


Conv = nn.Conv1d | nn.Conv2d | CodedConv


@torch.no_grad()
def product(
    name: str,
    module: Any,
    input_owner: NDArray[np.int64],
    owner: NDArray[np.int64],
    positions: int,
    outputs: int,
    rng: np.random.Generator,
    density: float,
) -> PlannedLayer:
    """Random values for every pair, or codes that share the module's numbers; the module is masked accordingly."""
    messages: dict[tuple[int, int], PlannedMessage] = {}
    pairs = [(p, k) for p in range(P) for k in range(P) if p != k and (input_owner == p).any() and (owner == k).any()]
    left = module.numbers if isinstance(module, CodedLinear | CodedConv) else 0
    for p, k in pairs:
        held = np.flatnonzero(input_owner == p)
        if left:
            messages[p, k] = PlannedCode(min(left, 1 + (p + k) % 2, len(held)))
            left -= messages[p, k].size
        else:
            chosen = rng.permutation(held[rng.random(len(held)) < density])
            if len(chosen):
                messages[p, k] = Values(chosen)
    assert left == 0
    macs = int(np.prod(module.weight.shape[2:])) * outputs // len(owner)
    layer = PlannedLayer(name, input_owner, owner, messages, P, 4 * positions, positions, macs)
    has = np.zeros((len(owner), len(input_owner) + layer.numbers), dtype=bool)
    for k in range(P):
        has[np.ix_(layer.rows(k), layer.columns(k))] = True
    n = len(input_owner)
    if isinstance(module, CodedLinear | CodedConv):
        for parameter in (module.weight, module.decoder, module.encoder, module.bias):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 3)
        module.decoder *= taps_alike(has[:, n:], module.decoder)
        for (p, k), message in messages.items():
            if isinstance(message, PlannedCode):
                numbers = layer.code_numbers(p, k)
                module.encoder[numbers] *= torch.from_numpy(input_owner == p)
    module.weight *= taps_alike(has[:, :n], module.weight)
    return layer


def taps_alike(mask: NDArray[np.bool_], weight: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(mask).view(*mask.shape, *(1 for _ in weight.shape[2:]))


def inputs_of(model: Model, samples: int, seed: int = 0) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if model.vocabulary:
        return rng.integers(0, model.vocabulary, (samples, *model.input_shape))
    return rng.normal(size=(samples, *model.input_shape)).astype(np.float32)


def affine(size: int) -> steps.Affine:
    module = steps.Affine(size)
    nn.init.normal_(module.scale)
    nn.init.normal_(module.shift)
    return module


def positions_of(tokens: int, size: int) -> steps.AddPositions:
    module = steps.AddPositions(tokens, size)
    nn.init.normal_(module.positions)
    return module


def norm(size: int, **options: Any) -> nn.LayerNorm:
    module = nn.LayerNorm(size, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def convolutions() -> Model:
    named: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(3, 7, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))),
        ("relu", nn.ReLU()),
        ("pool", nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)),
        ("second", nn.Conv2d(7, 5, 2, bias=False)),
        ("average", nn.AvgPool2d((1, 2), count_include_pad=False)),
        ("flat", nn.Flatten()),
        ("linear", nn.Linear(5 * 2 * 1, 6)),
    ]
    owners = {"conv": spread(7, 1), "second": spread(5, 2, [0, 2]), "linear": np.full(6, 2)}
    return Model(chain(*named), (3, 9, 8), np.array([0, 2, 2]), owners)


def signals() -> Model:
    named: list[tuple[str, nn.Module]] = [
        ("scaled", affine(5)),
        ("conv", nn.Conv1d(5, 8, 3, stride=2, padding=1)),
        ("normed", affine(8)),
        ("act", nn.GELU()),
        ("pool", nn.AvgPool1d(2, padding=1)),
        ("most", nn.AdaptiveMaxPool1d(3)),
        ("mean", steps.MeanPositions(1)),
        ("linear", nn.Linear(8, 4)),
    ]
    owners = {"conv": spread(8, 3), "linear": np.array([2, 0, 0, 1])}
    return Model(chain(*named), (5, 13), spread(5, 1), owners)


def residual() -> Model:
    """A block with a depthwise convolution of two maps a channel, a squeeze-and-excitation gate and a sum."""
    stem = spread(6, 4, [0, 1])
    steps_ = [
        ("stem", nn.Conv2d(2, 6, 3, padding=1), (INPUT,)),
        ("depth", nn.Conv2d(6, 12, 3, padding=1, groups=6), ("stem",)),
        ("act", nn.Hardswish(), ("depth",)),
        ("squeeze", nn.AdaptiveAvgPool2d(1), ("act",)),
        ("reduce", nn.Conv2d(12, 4, 1), ("squeeze",)),
        ("expand", nn.Conv2d(4, 12, 1), ("reduce",)),
        ("gate", nn.Sigmoid(), ("expand",)),
        ("gated", steps.Multiply(), ("act", "gate")),
        ("project", nn.Conv2d(12, 6, 1), ("gated",)),
        ("sum", steps.Add(), ("stem", "project", "stem")),
        ("shifted", steps.Linearly(0.5, -1.0), ("sum",)),
        ("flat", nn.Flatten(2), ("shifted",)),
        ("mean", steps.MeanPositions(1), ("flat",)),
        ("linear", nn.Linear(6, 3), ("mean",)),
    ]
    owners = {
        "stem": stem,
        "reduce": spread(4, 5),
        "expand": np.repeat(stem, 2),
        "project": stem,
        "linear": np.array([0, 0, 0]),
    }
    return Model(steps_, (2, 5, 7), np.array([1, 2]), owners)


def transformer(causal: bool = False, workers: Sequence[int] = (0, 1, 2)) -> Model:
    """Post-norm attention of 5 heads on uneven workers, a feed-forward part, a classifier on one worker."""
    heads = np.array([0, 2, 1, 2, 2])[:5] if 1 in workers else np.array([0, 2, 0, 2, 2])
    qkv, size = np.tile(np.repeat(heads, 3), 3), 15
    stream = spread(size, 6, workers)
    named = [
        ("embed", nn.Embedding(11, size), (INPUT,)),
        ("placed", positions_of(7, size), ("embed",)),
        ("first", norm(size), ("placed",)),
        ("qkv", nn.Linear(size, 3 * size), ("first",)),
        ("heads", steps.Attention(5, causal), ("qkv",)),
        ("out", nn.Linear(size, size), ("heads",)),
        ("sum", steps.Add(), ("placed", "out")),
        ("second", norm(size, eps=1e-3, bias=False), ("sum",)),
        ("up", nn.Linear(size, 21), ("second",)),
        ("act", nn.GELU("tanh"), ("up",)),
        ("down", nn.Linear(21, size), ("act",)),
        ("total", steps.Add(), ("sum", "down")),
        ("last", norm(size, elementwise_affine=False), ("total",)),
        ("token", steps.Token(0), ("last",)),
        ("classify", nn.Linear(size, 4), ("token",)),
        ("gathered", steps.Gather(), ("classify",)),
        ("softmax", nn.Softmax(-1), ("gathered",)),
    ]
    owners = {"embed": stream, "qkv": qkv, "out": stream, "up": spread(21, 8, workers), "down": stream}
    owners["classify"] = spread(4, 9)
    return Model(named, (7,), None, owners, vocabulary=11)


def coded() -> Model:
    """Codes in a convolution, and in a linear layer of tokens; the outputs have positions and several owners."""
    named: list[tuple[str, nn.Module]] = [
        ("conv", CodedConv(7, 9, 9, (3, 3), (1, 2), (1, 0), (1, 1))),
        ("act", nn.Tanh()),
        ("tokens", steps.ToTokens()),
        ("linear", CodedLinear(9, 6, 5)),
        ("end", nn.Sigmoid()),
    ]
    owners = {"conv": np.array([0, 1, 2, 0, 1, 2, 2, 2, 1]), "linear": np.array([2, 0, 1, 1, 0, 2])}
    return Model(chain(*named), (7, 5, 6), np.array([0, 1, 2, 1, 0, 2, 2]), owners)


def branches() -> Model:
    """Slices and what is put together again, channels and tokens; a norm of groups on one worker."""
    named = [
        ("conv", nn.Conv1d(3, 8, 1), (INPUT,)),
        ("left", steps.Slice(1, 0, 5), ("conv",)),
        ("right", steps.Slice(1, 3, 8), ("conv",)),
        ("both", steps.Concatenate(1), ("right", "left", "right")),
        ("tokens", steps.ToTokens(), ("both",)),
        ("part", steps.Slice(-1, 2, 11), ("tokens",)),
        ("joined", steps.Concatenate(-1), ("part", "tokens")),
        ("flat", nn.Flatten(), ("joined",)),
        ("linear", nn.Linear(4 * 24, 6), ("flat",)),
        ("gathered", steps.Gather(), ("linear",)),
        ("groups", nn.GroupNorm(2, 6), ("gathered",)),
        ("end", nn.Linear(6, 5), ("groups",)),
    ]
    owners = {"conv": spread(8, 1, [0, 2]), "linear": spread(6, 3), "end": spread(5, 4)}
    return Model(named, (3, 4), np.array([0, 2, 2]), owners)


def token_inputs() -> Model:
    """Features of tokens, of which worker 1 has none."""
    named: list[tuple[str, nn.Module]] = [
        ("norm", norm(6)),
        ("linear", nn.Linear(6, 9)),
        ("mean", steps.MeanPositions(-1)),
        ("end", nn.Linear(9, 2)),
    ]
    owners = {"linear": spread(9, 2), "end": np.array([1, 1])}
    return Model(chain(*named), (4, 6), np.array([0, 2, 0, 2, 2, 0]), owners, input_axis=-1)


def flattened() -> Model:
    """An image whose pixels are held one by one."""
    named: list[tuple[str, nn.Module]] = [("flat", nn.Flatten()), ("linear", nn.Linear(15, 4))]
    return Model(chain(*named), (3, 5), spread(15, 1), {"linear": spread(4, 2)})


def central_only() -> Model:
    """A worker that has the whole input computes part of it by itself; the rest is split."""
    named = [
        ("embed", nn.Embedding(9, 5), (INPUT,)),
        ("all", steps.Gather(), ("embed",)),
        ("odd", steps.Opaque("flip", Flip()), ("all",)),
        ("linear", nn.Linear(5, 4), ("odd",)),
    ]
    return Model(named, (6,), None, {"embed": spread(5, 3), "linear": spread(4, 1)}, vocabulary=9)


class Flip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.25))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.flip(1) * value.mean(-1, keepdim=True) + self.shift


MODELS: dict[str, Callable[[], Model]] = {
    "convolutions": convolutions,
    "signals": signals,
    "residual": residual,
    "transformer": transformer,
    "causal transformer": lambda: transformer(True),
    "transformer on two": lambda: transformer(workers=[0, 2]),
    "coded": coded,
    "branches": branches,
    "token inputs": token_inputs,
    "flattened": flattened,
    "central": central_only,
}
SAVED = [name for name in MODELS if name != "central"]


def built(name: str) -> tuple[Model, Plan]:
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, hand_made(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("samples", "batch_size"), [(7, 3), (1, 9)])
def test_workers_answer_as_the_model(name: str, samples: int, batch_size: int) -> None:
    model, plan = built(name)
    inputs = inputs_of(model, samples, seed=1)
    ran = simulate(plan, inputs, batch_size=batch_size)
    with torch.no_grad():
        expected = plan.model(torch.from_numpy(inputs)).numpy()
    assert ran.outputs.shape == expected.shape
    assert np.abs(expected).max() > 0.05
    assert np.abs(ran.outputs - expected).max() <= 1e-5
    assert np.array_equal(ran.bytes_sent, plan.traffic() * samples)
    assert plan.volume > 0


@pytest.mark.parametrize("name", MODELS)
def test_no_samples_give_no_outputs(name: str) -> None:
    model, plan = built(name)
    outputs = run_in_process(plan, inputs_of(model, 0))
    assert outputs.shape == plan.model(torch.from_numpy(inputs_of(model, 0))).shape


@pytest.mark.parametrize("name", SAVED)
def test_load_gives_back_what_was_saved(name: str, tmp_path: Path) -> None:
    model, plan = built(name)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.graph.steps == plan.graph.steps
    for (key, ours), (other, theirs) in zip(
        plan.model.state_dict().items(), loaded.model.state_dict().items(), strict=True
    ):
        assert key == other
        assert torch.equal(ours, theirs)
    inputs = torch.from_numpy(inputs_of(model, 5))
    with torch.no_grad():
        assert torch.allclose(loaded.model(inputs), plan.model(inputs), atol=1e-6)
    assert np.array_equal(loaded.traffic(), plan.traffic())
    assert np.array_equal(loaded.worker_macs(), plan.worker_macs())
    assert loaded.input_shape == plan.input_shape
    assert (
        loaded.input_owner is None if plan.input_owner is None else np.array_equal(loaded.input_owner, plan.input_owner)
    )
    assert loaded.manifest().digest() == plan.manifest().digest()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_where_it_is_needed_and_once(name: str) -> None:
    """Counted by what is not zero: a worker's block also has columns of which only some of its rows read."""
    _, plan = built(name)
    parts = [part for k in range(P) for part in plan.sub_model(k)]
    layers = {layer.name: layer for layer in plan.layers}
    for step in plan.graph.steps:
        module, name = plan.graph.module(step.name), step.name
        own = [part for part in parts if part.name == name]
        for key, parameter in module.named_parameters():
            if key == "decoder":
                continue
            cut = sum(int(part.tensors[key].count_nonzero()) for part in own if key in part.tensors)
            extra = module.decoder.count_nonzero() if key == "weight" and hasattr(module, "decoder") else 0
            assert cut == int(parameter.count_nonzero()) + int(extra), (name, key)
        if role_of(module) is Role.CENTRAL:
            central = int(layers[name].owner[0])
            assert all(
                not part.tensors for k in range(P) for part in plan.sub_model(k) if part.name == name and k != central
            )
    assert sum(part.nbytes for part in parts) >= 4 * sum(int(p.count_nonzero()) for p in plan.model.parameters())


def test_figures_of_a_convolution_equal_a_count_by_hand() -> None:
    _, plan = built("coded")
    conv, linear = plan.layers
    assert (conv.positions, conv.value_bytes, conv.weight_macs) == (30, 120, 9 * 5 * 2)
    assert (linear.positions, linear.value_bytes, linear.weight_macs) == (10, 40, 10)
    macs = np.zeros(P, dtype=int)
    for layer, taps in ((conv, 9), (linear, 1)):
        weight = effective_weight(plan.product(layer))
        assert weight.shape[:2] == (len(layer.owner), len(layer.input_owner))
        for k in range(P):
            columns = (layer.input_owner == k).sum() + sum(m.size for (_, t), m in layer.messages.items() if t == k)
            macs[k] += (layer.owner == k).sum() * columns * taps * 10
            encoded = sum(m.size for (p, _), m in layer.messages.items() if p == k and isinstance(m, PlannedCode))
            macs[k] += encoded * (layer.input_owner == k).sum() * layer.positions
    assert np.array_equal(plan.worker_macs(), macs)
    numbers = sum(message.size for message in conv.messages.values())
    assert conv.traffic().sum() == numbers * 120


def test_statistics_of_a_norm_are_two_numbers_a_token_and_pair() -> None:
    _, plan = built("transformer on two")
    norms = [layer for layer in plan.layers if layer.name in ("first", "second", "last")]
    for layer in norms:
        assert set(layer.messages) == {(0, 2), (2, 0)}
        assert layer.traffic()[0, 2] == layer.traffic()[2, 0] == 2 * 7 * 4
    assert sum(layer.worker_macs().sum() for layer in norms) == 0


def test_a_norm_of_large_numbers_stays_exact() -> None:
    """Sums of squares would lose all digits: a deviation of 1 around 3000."""
    model = Model(
        chain(("norm", nn.LayerNorm(10)), ("linear", nn.Linear(10, 3))), (10,), spread(10), {"linear": spread(3)}
    )
    plan = hand_made(model)
    inputs = inputs_of(model, 20) + np.float32(3000)
    with torch.no_grad():
        expected = plan.model.double()(torch.from_numpy(inputs).double()).numpy()
    plan.model.float()
    assert np.abs(run_in_process(plan, inputs) - expected).max() < 2e-3


def test_an_opaque_step_runs_in_one_process_and_is_not_saved(tmp_path: Path) -> None:
    _, plan = built("central")
    with pytest.raises(UnsupportedModule, match=r"step 'odd' \(flip\) cannot be saved"):
        plan.save(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_a_plan_does_not_run_on_other_inputs() -> None:
    cases: list[tuple[str, Any, str]] = [
        ("convolutions", np.zeros((4, 3, 9, 9), np.float32), r"shape \(4, 3, 9, 9\); .*\(samples, 3, 9, 8\)"),
        (
            "convolutions",
            np.full((4, 3, 9, 8), np.nan, np.float32),
            r"NaN or infinite at sample 0, column 0, position \(0, 0\)",
        ),
        ("transformer", np.zeros((4, 7), np.float32), "dtype float32; allowed: whole numbers"),
        ("transformer", np.full((4, 7), 11), r"no token at sample 0, place \(0,\); allowed: 0 … 10"),
        ("transformer", np.zeros((4, 8), np.int64), r"reads 7 columns: \(samples, 7\)"),
        ("flattened", np.zeros((4, 14), np.float32), r"shape \(4, 14\)"),
    ]
    for name, inputs, reason in cases:
        with pytest.raises(RepurposeError, match=reason) as caught:
            run_in_process(built(name)[1], inputs)
        assert "\n" not in str(caught.value)


def test_a_flattened_input_may_have_any_axes() -> None:
    _, plan = built("flattened")
    inputs = np.random.default_rng(0).normal(size=(4, 15)).astype(np.float32)
    assert np.array_equal(run_in_process(plan, inputs), run_in_process(plan, inputs.reshape(4, 5, 3)))


# Plans whose parts do not fit each other


def changed(plan: Plan, name: str, **changes: Any) -> dict[str, Any]:
    """The plan's layers, one of them with other fields."""
    return {"layers": tuple(replace(layer, **changes) if layer.name == name else layer for layer in plan.layers)}


def test_layers_that_do_not_fit_the_graph_are_refused() -> None:
    _, cnn = built("convolutions")
    _, block = built("residual")
    _, bert = built("transformer")
    _, code = built("coded")
    second, first = cnn.layers[1], bert.layers[1]
    other = (second.input_owner + 1) % 3
    gather = next(layer for layer in bert.layers if layer.name == "gathered")
    cases: list[tuple[Plan, dict[str, Any], str]] = [
        (
            cnn,
            {"layers": cnn.layers[:-1]},
            r"layers: got \['conv', 'second'\]; allowed: .*\['conv', 'second', 'linear'\]",
        ),
        (
            cnn,
            changed(cnn, "second", input_owner=other, messages={}),
            "'second': input_owner: got other .*owner of 'pool'",
        ),
        (cnn, changed(cnn, "conv", owner=cnn.layers[0].owner[:-1]), r"'conv': \(m, n\): got \(6, 3\)"),
        (cnn, changed(cnn, "conv", positions=1), "'conv': positions: got 1; allowed: 72"),
        (cnn, changed(cnn, "conv", value_bytes=4), "'conv': value_bytes: got 4; allowed: 288"),
        (cnn, changed(cnn, "conv", weight_macs=1), "'conv': weight_macs: got 1; allowed: 180"),
        (cnn, {"input_owner": np.zeros(4, int)}, r"input_owner: got shape \(4,\); allowed: \(3,\)"),
        (cnn, {"input_owner": np.full(3, 3)}, "input_owner: got worker 3; allowed: 0 … 2"),
        (cnn, {"input_owner": None}, "step 'conv': input: got one that every worker has"),
        (cnn, {"input_shape": (3, 9)}, "input_shape: .*at step"),
        (cnn, {"input_shape": (3, 20, 20)}, "input_shape: .*at step 'linear'"),
        (
            block,
            changed(block, "project", owner=(block.layers[0].owner + 1) % 2),
            "'project'|step 'sum': inputs: .*different ways",
        ),
        (bert, {"input_owner": np.zeros(7, int)}, "input_owner: got owners of token ids"),
        (bert, changed(bert, "first", owner=(first.owner + 1) % 3), "'first': owner: got other workers"),
        (bert, changed(bert, "first", messages={}), "'first': messages"),
        (bert, changed(bert, "first", messages={**first.messages, (0, 1): PlannedStatistics(3)}), "'first': messages"),
        (bert, changed(bert, "gathered", messages={}), "'gathered': messages: got .* values on worker 1; allowed: all"),
        (bert, changed(bert, "gathered", owner=gather.input_owner), r"'gathered': owner: got workers \["),
        (bert, changed(bert, "softmax", owner=np.zeros(4, int)), "step 'softmax': input: got split"),
        (code, changed(code, "conv", messages={(0, 1): PlannedStatistics()}), "numbers of all codes|PlannedStatistics"),
    ]
    for plan, changes, reason in cases:
        with pytest.raises(InvalidArgument, match=reason) as caught:
            replace(plan, **changes)
        assert "\n" not in str(caught.value)


def test_steps_that_cannot_run_where_things_are_are_refused() -> None:
    conv, linear = nn.Conv1d(6, 6, 1), nn.Linear(6, 6)
    owners = {"conv": np.array([0, 1, 1, 2, 0, 2]), "linear": spread(6, 1)}
    cases: list[tuple[Steps, tuple[int, ...], int, str]] = [
        (chain(("conv", conv), ("linear", linear)), (6, 6), 1, "step 'linear': input: got split along axis 1"),
        (chain(("conv", conv), ("softmax", nn.Softmax(1))), (6, 6), 1, "step 'softmax': input: got split over workers"),
        (chain(("conv", conv), ("flat", nn.Flatten(1, 1))), (6, 6), 1, "step 'flat': Flatten"),
        (chain(("linear", linear), ("pool", nn.MaxPool1d(2))), (6,), 1, r"step 'pool': input: got \(6,\) a sample"),
        (chain(("linear", linear), ("scaled", steps.Affine(4))), (4, 6), -1, "step 'scaled': input: got split along"),
        (chain(("conv", conv), ("deep", nn.AdaptiveAvgPool2d(1))), (6, 6), 1, "step 'deep': input"),
        (
            chain(("linear", linear), ("heads", steps.Attention(1))),
            (4, 6),
            -1,
            "step 'heads': input: got a head on several",
        ),
        (chain(("linear", linear), ("norm", nn.LayerNorm((4, 6)))), (4, 6), -1, "step 'norm': normalized_shape"),
    ]
    for named, shape, axis, reason in cases:
        size = shape[0] if axis == 1 else shape[-1]
        model = Model(named, shape, spread(size, 5), owners, input_axis=axis)
        with pytest.raises(InvalidArgument, match=reason) as caught:
            hand_made(model)
        assert "\n" not in str(caught.value)


def test_a_module_does_not_work_in_place_on_what_others_read() -> None:
    owner = np.zeros(3, dtype=np.int64)
    named = [
        ("conv", nn.Conv1d(3, 3, 1), (INPUT,)),
        ("relu", nn.ReLU(inplace=True), ("conv",)),
        ("sum", steps.Add(), ("conv", "relu")),
    ]
    layer = PlannedLayer("conv", owner, owner, {}, P, 16, 4, 4)
    with pytest.raises(InvalidArgument, match=r"step 'relu': inplace: got True; allowed: .*read 'conv' too"):
        Plan(Graph(named).eval(), (layer,), P, 0, {}, owner, (3, 4))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_what_works_in_place_does_not_reach_the_weights(batch_size: int) -> None:
    """A worker without an input of a convolution has its bias alone, and an activation in place behind it."""
    steps = chain(
        ("c", nn.Conv2d(2, 4, 2)), ("a", nn.LeakyReLU(inplace=True)), ("f", nn.Flatten()), ("l", nn.Linear(4, 2))
    )
    owners = {"c": np.array([0, 1, 0, 1]), "l": np.zeros(2, dtype=np.int64)}
    plan = hand_made(Model(steps, (2, 2, 2), np.zeros(2, dtype=np.int64), owners), density=1.0)
    convolution = plan.product(plan.layers[0])
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight[[1, 3]] = 0
        convolution.bias[[1, 3]] = torch.tensor([-100.0, -50.0])
    plan = replace(plan, layers=(replace(plan.layers[0], messages={}), *plan.layers[1:]))
    inputs = np.random.default_rng(0).normal(size=(5, 2, 2, 2)).astype(np.float32)
    with torch.no_grad():
        expected = plan.model(torch.from_numpy(inputs)).numpy()
    assert np.abs(simulate(plan, inputs, batch_size=batch_size).outputs - expected).max() <= 1e-5


def test_tensors_that_are_split_along_different_axes_are_not_added() -> None:
    owner = np.zeros(6, dtype=np.int64)
    graph = Graph(
        [
            ("conv", nn.Conv1d(6, 6, 1), (INPUT,)),
            ("tokens", steps.ToTokens(), ("conv",)),
            ("sum", steps.Add(), ("conv", "tokens")),
        ]
    ).eval()
    layer = PlannedLayer("conv", owner, owner, {}, P, 24, 6, 6)
    with pytest.raises(InvalidArgument, match="step 'sum': inputs: got 'conv' and 'tokens'; allowed: of one axis"):
        Plan(graph, (layer,), P, 0, {}, owner, (6, 6))


def test_kernels_that_read_a_channel_their_worker_lacks_are_refused() -> None:
    _, plan = built("convolutions")
    layer = plan.layers[1]
    row = 0
    k = int(layer.owner[row])
    j = int(np.setdiff1d(np.arange(7), layer.columns(k))[0])
    with torch.no_grad():
        plan.product(layer).weight[row, j, 1, 0] = 0.5
    with pytest.raises(InvalidArgument, match=rf"'second': weight: got reads value {j} on worker {k}"):
        plan.check()


def test_modules_whose_lost_arguments_matter_are_refused() -> None:
    for module, reason in [
        (nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.MaxPool1d(2, return_indices=True), "return_indices=True"),
        (nn.BatchNorm1d(3), "BatchNorm1d cannot be in a plan"),
    ]:
        graph = Graph(chain(("conv", nn.Conv1d(3, 3, 1)), ("odd", module))).eval()
        layer = PlannedLayer("conv", np.zeros(3, int), np.zeros(3, int), {}, P, 16, 4, 4)
        with pytest.raises(UnsupportedModule, match=reason):
            Plan(graph, (layer,), P, 0, {}, np.zeros(3, int), (3, 4))


KIND_SAMPLES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Flatten": (nn.Flatten(2), (2, 3, 4, 5)),
    "Linear": (nn.Linear(4, 3, bias=False), (2, 4)),
    "CodedLinear": (CodedLinear(4, 3, 2), (2, 4)),
    "Conv1d": (nn.Conv1d(4, 6, 3, 2, 1, 2, 2, bias=False), (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2), 2), (2, 4, 9, 8)),
    "CodedConv": (CodedConv(4, 3, 2, (3,), (2,), (1,), (1,)), (2, 4, 9)),
    "Embedding": (nn.Embedding(3, 5), ()),
    "LayerNorm": (nn.LayerNorm(4, 0.1, bias=False), (2, 4)),
    "Affine": (steps.Affine(4), (2, 4, 3)),
    "AddPositions": (steps.AddPositions(3, 4), (2, 3, 4)),
    "Linearly": (steps.Linearly(2.0, 0.5), (2, 4)),
    "MeanPositions": (steps.MeanPositions(-1), (2, 3, 4)),
    "Token": (steps.Token(1), (2, 3, 4)),
    "ToTokens": (steps.ToTokens(), (2, 3, 4)),
    "AsMap": (steps.AsMap(2), (2, 3)),
    "Concatenate": (steps.Concatenate(-1), (2, 3, 4)),
    "Slice": (steps.Slice(1, 1, 2), (2, 3, 4)),
    "Attention": (steps.Attention(2, True), (2, 3, 12)),
    "Softmax": (nn.Softmax(1), (2, 3)),
    "LogSoftmax": (nn.LogSoftmax(-1), (2, 3)),
    "GroupNorm": (nn.GroupNorm(2, 4, 0.1), (2, 4, 3)),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1, ceil_mode=True), (2, 3, 8)),
    "MaxPool2d": (nn.MaxPool2d((3, 2), 2, (1, 0), (1, 2)), (2, 3, 8, 9)),
    "AvgPool1d": (nn.AvgPool1d(3, 2, 1, True, False), (2, 3, 8)),
    "AvgPool2d": (nn.AvgPool2d(3, 2, 1, True, False, 5), (2, 3, 8, 8)),
    "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(3), (2, 3, 8)),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((3, None)), (2, 3, 8, 7)),
    "AdaptiveMaxPool1d": (nn.AdaptiveMaxPool1d(3), (2, 3, 8)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(3), (2, 3, 8, 7)),
}
"""A module of each kind, with arguments that are not the defaults, and the shape of an input."""


def test_every_kind_is_in_the_test_of_specs() -> None:
    assert KIND_SAMPLES.keys() == KINDS.keys() - ELEMENTWISE.keys() - {"Add", "Multiply", "Gather", "Opaque"}


@pytest.mark.parametrize("kind", KIND_SAMPLES)
def test_modules_survive_their_spec(kind: str) -> None:
    module, shape = KIND_SAMPLES[kind]
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    state = torch.get_rng_state()
    built_again = materialised(from_spec(json.loads(json.dumps(to_spec(module))), torch.float64))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(not parameter.any() and parameter.dtype == torch.float64 for parameter in built_again.parameters())
    built_again.load_state_dict(module.state_dict())
    values = torch.randn(shape, dtype=torch.float64) if shape else torch.tensor([[2, 0, 1]])
    with torch.no_grad():
        assert torch.equal(built_again(values), module.double().eval()(values))


@pytest.mark.parametrize("name", ["steps", "forward", "a.b", "", INPUT, "conv"])
def test_names_of_steps_are_checked(name: str) -> None:
    with pytest.raises(InvalidArgument, match="steps: got the name"):
        Graph([("conv", nn.Conv1d(3, 3, 1), (INPUT,)), (name, nn.ReLU(), ("conv",))])


def test_manifests_that_contradict_themselves_are_refused(tmp_path: Path) -> None:
    plan = built("transformer")[1]
    plan.save(tmp_path / "plan")
    original = json.loads((tmp_path / "plan" / "manifest.json").read_text())["plan"]

    def step(content: Any, name: str) -> Any:
        return next(item for item in content["steps"] + content["layers"] if item["name"] == name)

    edits: list[Callable[[Any], Any]] = [
        lambda content: step(content, "sum").update(inputs=["placed", "up"]),
        lambda content: step(content, "heads")["arguments"].update(heads=4),
        lambda content: step(content, "heads")["arguments"].update(heads="five"),
        lambda content: step(content, "first")["arguments"].update(normalized_shape=[3]),
        lambda content: step(content, "softmax").update(kind="Opaque", arguments={"name": "secret"}),
        lambda content: content["layers"][1]["messages"][0].update(statistics=1),
        lambda content: content["layers"][1]["messages"][0].update(values=[0]),
        lambda content: content["layers"][1].update(positions=-1),
        lambda content: content.update(input_shape=[6]),
        lambda content: content.update(input_owner=[0] * 7),
        lambda content: content.pop("input_owner"),
    ]
    for number, edit in enumerate(edits):
        content = json.loads(json.dumps(original))
        edit(content)
        write_manifest(tmp_path / "plan", content)
        with pytest.raises(PlanError) as caught:
            Plan.load(tmp_path / "plan")
        assert str(tmp_path / "plan" / "manifest.json") in str(caught.value), number
        assert "\n" not in str(caught.value)
    write_manifest(tmp_path / "plan", original)
    Plan.load(tmp_path / "plan")
