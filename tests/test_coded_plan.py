"""Plans with codes, in memory and on disk, without processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_plan import write_manifest
from torch import nn

from repurpose_opt.errors import InvalidArgument, PlanError, UnsupportedModule
from repurpose_opt.exchange import Code, Exchange, Message, Values
from repurpose_opt.network.owners import Owners, Placement
from repurpose_opt.network.planned import balanced_factors, product_of
from repurpose_opt.network.sweep import SolvedLayer
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime import storage
from repurpose_opt.runtime.coded import CodedLinear
from repurpose_opt.runtime.plan import Plan, PlannedCode, PlannedLayer


def random_layer(
    input_owner: NDArray[np.int64], owner: NDArray[np.int64], P: int, kinds: str, rng: np.random.Generator
) -> tuple[Exchange, NDArray[np.float64]]:
    """Messages of random kinds, "c"ode, "v"alues or "-" nothing, and random weights V (m, n) that they allow."""
    weight = rng.normal(size=(len(owner), len(input_owner))) / np.sqrt(len(input_owner))
    messages: dict[tuple[int, int], Message] = {}
    for source in range(P):
        held = np.flatnonzero(input_owner == source)
        for target in range(P):
            rows = np.flatnonzero(owner == target)
            if source == target or len(held) == 0 or len(rows) == 0:
                continue
            kind, size = rng.choice(list(kinds)), int(rng.integers(1, min(len(held), len(rows), 3) + 1))
            covered = np.zeros((len(held), len(held)))
            if kind == "c":
                code = Code.spanning(rng.normal(size=(size, len(held))))
                messages[source, target] = code
                covered = code.encoder.T @ code.encoder
            elif kind == "v":
                chosen = rng.permutation(len(held))[:size]
                messages[source, target] = Values(held[chosen])
                covered[chosen, chosen] = 1.0
            weight[np.ix_(rows, held)] @= covered
    return Exchange(len(input_owner), P, messages), weight


@torch.no_grad()
def coded_module(
    layer: PlannedLayer, exchange: Exchange, weight: NDArray[np.floating], bias: NDArray[np.floating]
) -> nn.Linear | CodedLinear:
    """The module of V (m, n), which in blocks that a code covers is U R: U decodes what R encodes."""
    direct, dtype = torch.from_numpy(weight.copy()), torch.from_numpy(weight).dtype
    module: nn.Linear | CodedLinear = nn.Linear(*weight.T.shape, dtype=dtype)
    if layer.numbers:
        module = CodedLinear(*weight.T.shape, layer.numbers, dtype=dtype)
    for (source, target), message in exchange.messages.items():
        if isinstance(message, Code):
            assert isinstance(module, CodedLinear)
            rows, held, numbers = layer.rows(target), layer.held(source), layer.code_numbers(source, target)
            decoder, encoder = balanced_factors(weight[np.ix_(rows, held)], message.encoder)
            module.decoder[np.ix_(rows, numbers)] = torch.from_numpy(decoder).to(dtype)
            module.encoder[np.ix_(numbers, held)] = torch.from_numpy(encoder).to(dtype)
            direct[np.ix_(rows, held)] = 0.0
    module.weight.copy_(direct)
    module.bias.copy_(torch.from_numpy(bias))
    return module


def coded_plan(
    sizes: Sequence[int],
    P: int,
    kinds: Sequence[str],
    *,
    dtype: Any = np.float32,
    seed: int = 0,
) -> tuple[Plan, list[NDArray[np.float64]]]:
    """A perceptron with random owners and messages, the answer on worker 0, and the V (m, n) that it was made from."""
    rng = np.random.default_rng(seed)
    input_owner = rng.integers(0, P, sizes[0])
    modules: list[nn.Module] = []
    layers, weights = [], []
    for number, (n, m) in enumerate(pairwise(sizes)):
        owner = rng.integers(0, P, m) if number + 2 < len(sizes) else np.zeros(m, dtype=np.int64)
        exchange, weight = random_layer(input_owner, owner, P, kinds[number], rng)
        bias = rng.normal(size=m).astype(dtype)
        layer = PlannedLayer.of_exchange(str(2 * number), input_owner, owner, exchange, bias.itemsize)
        module = coded_module(layer, exchange, weight.astype(dtype), bias)
        assert n == layer.chosen_values.shape[0]
        modules += [module, nn.Tanh()]
        layers.append(layer)
        weights.append(weight)
        input_owner = owner
    return Plan(nn.Sequential(*modules[:-1]).eval(), tuple(layers), P, 12345, {}), weights


@pytest.fixture
def plan() -> Plan:
    return coded_plan([14, 11, 9, 5], 3, ["c", "v", "cv-"], seed=3)[0]


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan")
    return tmp_path / "plan"


def coded(plan: Plan, number: int = 0) -> CodedLinear:
    module = plan.product(plan.layers[number])
    assert isinstance(module, CodedLinear)
    return module


# From V to modules


@pytest.mark.parametrize("kinds", ["c", "v", "-", "cv-"])
def test_a_plan_computes_what_its_weights_compute(kinds: str) -> None:
    plan, weights = coded_plan([14, 11, 9, 5], 4, [kinds] * 3, dtype=np.float64, seed=1)
    values = expected = torch.randn(7, 14, dtype=torch.float64)
    for layer, weight, activation in zip(plan.layers, weights, [nn.Tanh(), nn.Tanh(), nn.Identity()], strict=True):
        assert np.abs(plan.weight(layer).numpy() - weight).max() < 1e-12
        assert isinstance(plan.product(layer), CodedLinear) == any(
            isinstance(message, PlannedCode) for message in layer.messages.values()
        )
        expected = activation(expected @ torch.from_numpy(weight).T + plan.product(layer).bias)
    assert (plan.model(values) - expected).abs().max() < 1e-12


def test_factors_are_balanced_and_reach_only_their_pair(plan: Plan) -> None:
    layer, module = plan.layers[0], coded(plan)
    assert layer.numbers == module.numbers == sum(message.size for message in layer.messages.values())
    for (source, target), message in layer.messages.items():
        for number in layer.code_numbers(source, target):
            row, column = module.encoder[number], module.decoder[:, number]
            assert row.norm() > 0
            assert torch.allclose(row.norm(), column.norm(), rtol=1e-5)
            assert set(row.nonzero().ravel().tolist()) <= set(layer.held(source).tolist())
            assert set(column.nonzero().ravel().tolist()) <= set(layer.rows(target).tolist())
        assert not module.weight[np.ix_(layer.rows(target), layer.held(source))].any()
        assert len(layer.code_numbers(source, target)) == message.size


def test_factors_of_a_code_multiply_to_its_block() -> None:
    rng = np.random.default_rng(0)
    encoder = Code.spanning(rng.normal(size=(4, 9))).encoder
    block = rng.normal(size=(6, 4)) @ encoder
    left, right = balanced_factors(block, encoder)
    assert np.allclose(left @ right, block)
    assert np.allclose(np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_that_carry_nothing_are_not_sent(dtype: Any) -> None:
    """Their decoder of zeros could never learn anything, as zeros are held."""
    rng = np.random.default_rng(0)
    input_owner, owner = np.repeat([0, 1, 2], 6), np.repeat([0, 1, 2], 3)
    code = Code.spanning(rng.normal(size=(3, 6)))
    weight = np.zeros((9, 18))
    weight[:3, 6:12] = np.outer(rng.normal(size=3), rng.normal(size=3) @ code.encoder)  # one number would do
    messages: dict[tuple[int, int], Message] = {(1, 0): code, (2, 0): code, (0, 2): Values(np.array([4, 1]))}
    network = trace(nn.Sequential(nn.Linear(18, 9)), torch.zeros(1, 18))
    owners = Owners(network, Placement(3, input_owner, (0, 1, 2), np.full(3, 1 / 3), None))
    solved = SolvedLayer(owner, Exchange(18, 3, messages), weight.astype(dtype), np.zeros(9, dtype))
    module, layer = product_of(network, owners, network.products[0], solved)
    assert layer.messages.keys() == {(1, 0), (0, 2)}
    assert layer.messages[1, 0].size == layer.numbers == 1
    assert isinstance(module, CodedLinear)
    assert module.decoder[:3].all()


# What a layer says of itself


def test_figures_equal_a_count_by_hand(plan: Plan) -> None:
    traffic, macs = np.zeros((3, 3), dtype=int), np.zeros(3, dtype=int)
    for layer in plan.layers:
        macs += np.bincount(layer.owner, minlength=3) * np.bincount(layer.input_owner, minlength=3)
        for (source, target), message in layer.messages.items():
            traffic[source, target] += 4 * message.size
            macs[target] += (layer.owner == target).sum() * message.size
            if isinstance(message, PlannedCode):
                macs[source] += (layer.input_owner == source).sum() * message.size
    assert np.array_equal(plan.traffic(), traffic)
    assert np.array_equal(plan.worker_macs(), macs)


def test_sub_models_make_up_the_model(plan: Plan) -> None:
    for number, layer in enumerate(plan.layers):
        module = plan.product(layer)
        (m, n), numbers = module.weight.shape, layer.numbers
        joined, encoder = torch.zeros(m, n + numbers), torch.zeros(numbers, n)
        for worker in range(3):
            part = plan.sub_model(worker)[number]
            joined[np.ix_(part.rows, part.columns)] = part.weight
            assert (part.encoder is None) == (len(layer.encoded(worker)) == 0)
            if part.encoder is not None:
                encoder[np.ix_(layer.encoded(worker), layer.held(worker))] = part.encoder
        assert torch.equal(joined[:, :n], module.weight)
        if isinstance(module, CodedLinear):
            assert torch.equal(joined[:, n:], module.decoder)
            assert torch.equal(encoder, module.encoder)
    first = plan.layers[0]
    part = plan.sub_model(0)[0]
    assert part.encoder is not None
    assert part.encoder.shape == (len(first.encoded(0)), len(first.held(0)))
    assert part.nbytes == 4 * (part.weight.numel() + len(part.rows) + part.encoder.numel())


# On disk


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_load_gives_back_what_was_saved(dtype: Any, tmp_path: Path) -> None:
    saved, _ = coded_plan([14, 11, 9, 5], 3, ["c", "v", "cv-"], seed=3)
    model = saved.model.to(torch.from_numpy(np.zeros(0, dtype)).dtype)
    layers = tuple(replace(layer, value_bytes=np.dtype(dtype).itemsize) for layer in saved.layers)
    saved = replace(saved, model=model, layers=layers)
    saved.save(tmp_path / "plan")
    state = torch.get_rng_state()
    loaded = Plan.load(tmp_path / "plan")
    assert torch.equal(torch.get_rng_state(), state)
    for (name, ours), (other, theirs) in zip(
        model.state_dict().items(), loaded.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    samples = torch.randn(6, 14).to(next(model.parameters()).dtype)
    assert torch.equal(loaded.model(samples), model(samples))
    for layer, before in zip(loaded.layers, saved.layers, strict=True):
        assert layer.messages.keys() == before.messages.keys()
        for pair, message in layer.messages.items():
            assert type(message) is type(before.messages[pair])
            assert np.array_equal(layer.message(*pair), before.message(*pair))


def test_a_plan_of_version_1_is_read(tmp_path: Path) -> None:
    plan, _ = coded_plan([14, 11, 5], 3, ["v", "v"])
    plan.save(tmp_path / "plan")
    write_chain(tmp_path / "plan", 1)
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.volume == plan.volume
    values = torch.randn(5, 14)
    assert torch.equal(loaded.model(values), plan.model(values))


def test_a_plan_of_version_2_is_read(plan: Plan, folder: Path) -> None:
    write_chain(folder, 2)
    loaded = Plan.load(folder)
    assert np.array_equal(loaded.traffic(), plan.traffic())
    values = torch.randn(5, 14)
    assert torch.equal(loaded.model(values), plan.model(values))


def write_chain(folder: Path, version: int) -> None:
    """Make the manifest of a chain one of version 1 or 2: as those were, without what is new in version 3."""
    content = json.loads((folder / "manifest.json").read_text())["plan"]
    content["modules"] = [{key: step[key] for key in ("name", "kind", "arguments")} for step in content.pop("steps")]
    for layer in content["layers"]:
        del layer["positions"], layer["weight_macs"]
    del content["input_owner"], content["input_shape"]
    write_manifest(folder, content, version)


def test_manifests_with_wrong_codes_are_refused_in_one_line(plan: Plan, folder: Path) -> None:
    (source, target), message = min(plan.layers[0].messages.items())
    held = len(plan.layers[0].held(source))

    def in_message(**changes: Any) -> Callable[[Any], None]:
        return lambda content: content["layers"][0]["messages"][0].update(changes)

    edits: list[tuple[Callable[[Any], None], str]] = [
        (in_message(numbers=0), f"a code of 0 numbers; allowed: a whole number in 1 … {held}, the values of worker"),
        (in_message(numbers=-1), "a code of -1 numbers"),
        (in_message(numbers=held + 1), f"a code of {held + 1} numbers"),
        (in_message(numbers=1.0), r"a code of 1\.0 numbers"),
        (in_message(numbers=True), "a code of True numbers"),
        (in_message(numbers="2"), "a code of 2 numbers"),
        (in_message(numbers=None), "a code of None numbers"),
        (in_message(numbers=message.size % held + 1), "numbers of all codes: got .*; allowed: the module's"),
        (in_message(numbers=float("nan")), "Out of range float values"),
        (in_message(values=[0]), "without values or numbers, or with both"),
        (in_message(target=source), "two different workers of 0 … 2"),
        (in_message(target=7), "two different workers of 0 … 2"),
        (lambda content: content["layers"][0]["messages"][0].pop("numbers"), "without values or numbers"),
        (lambda content: content["layers"][0]["messages"].append(content["layers"][0]["messages"][0]), "two messages"),
        (lambda content: content["steps"][0]["arguments"].update(numbers=99), "the module's 99"),
        (lambda content: content["steps"][0]["arguments"].pop("numbers"), "CodedLinear has arguments"),
        (lambda content: content["steps"][0].update(kind="Linear"), "Linear has arguments"),
        (lambda content: content["steps"][0]["arguments"].update(in_features=3), "input_shape: .*at step '0'"),
    ]
    original = json.loads((folder / "manifest.json").read_text())["plan"]
    assert original["layers"][0]["messages"][0] == {"source": source, "target": target, "numbers": message.size}
    for edit, reason in edits:
        content = json.loads(json.dumps(original))
        edit(content)
        _write_unchecked(folder, content)
        with pytest.raises(PlanError, match=reason) as caught:
            Plan.load(folder)
        assert str(folder / "manifest.json") in str(caught.value), reason
        assert "\n" not in str(caught.value), reason
    write_manifest(folder, original)
    Plan.load(folder)


def _write_unchecked(folder: Path, content: Any) -> None:
    """A manifest with this content; one with NaN in it, which has no SHA-256, keeps that of another."""
    try:
        write_manifest(folder, content)
    except ValueError:
        document = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(document | {"plan": content}))


def test_encoders_that_do_not_fit_the_manifest_are_refused(plan: Plan, tmp_path: Path) -> None:
    layer = plan.layers[0]
    shape = (len(layer.encoded(2)), len(layer.held(2)))
    encoder = torch.ones(shape)
    poisoned = encoder.clone()
    poisoned[0, 0] = torch.nan
    cases: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({"0.encoder": None}, "tensors .*; the manifest says .*0.encoder"),
        ({"2.encoder": encoder}, "tensors .*2.encoder"),
        (
            {"0.encoder": encoder[:, :-1]},
            rf"0.encoder is \({shape[0]}, {shape[1] - 1}\) .* says \({shape[0]}, {shape[1]}\)",
        ),
        ({"0.encoder": torch.ones(shape[0] + 1, shape[1])}, rf"0.encoder is \({shape[0] + 1}, {shape[1]}\)"),
        ({"0.encoder": encoder.double()}, "0.encoder is .* of torch.float64"),
        ({"0.encoder": poisoned}, "0.encoder has NaN or infinity in it; allowed: finite numbers"),
    ]
    for changes, reason in cases:
        tensors: list[dict[str, torch.Tensor]] = []
        for worker in range(3):
            named: dict[str, Any] = {}
            for planned_layer, part in zip(plan.layers, plan.sub_model(worker), strict=True):
                named |= {storage.tensor_key(planned_layer.name, key): value for key, value in part.tensors.items()}
            named |= changes if worker == 2 else {}
            tensors.append({name: tensor for name, tensor in named.items() if tensor is not None})
        storage.write_folder(tmp_path / "plan", plan.manifest(), tensors)
        with pytest.raises(PlanError, match=reason) as caught:
            Plan.load(tmp_path / "plan")
        assert str(tmp_path / "plan" / "worker-2.safetensors") in str(caught.value)
        assert "\n" not in str(caught.value)


# Plans whose parts do not fit each other


def test_weights_that_reach_beyond_their_code_are_refused(plan: Plan, tmp_path: Path) -> None:
    layer = plan.layers[0]
    (source, target) = min(layer.messages)
    number = int(layer.code_numbers(source, target)[0])
    foreign_value = int(layer.held(target)[0])
    foreign_row = int(layer.rows(source)[0])
    covered = (int(layer.rows(target)[0]), int(layer.held(source)[0]))
    cases: list[tuple[str, tuple[int, int], float, str]] = [
        (
            "encoder",
            (number, foreign_value),
            0.5,
            f"encodes value {foreign_value} on worker {source}, which does not hold",
        ),
        ("decoder", (foreign_row, number), 0.5, f"reads number {number} on worker {source}, which does not have it"),
        ("weight", covered, 0.5, f"reads value {covered[1]} on worker {target}, which does not have it"),
        (
            "encoder",
            (number, int(layer.held(source)[0])),
            float("nan"),
            "encoder: got NaN or infinity; allowed: finite",
        ),
        ("decoder", (covered[0], number), float("inf"), "decoder: got NaN or infinity; allowed: finite"),
    ]
    for name, place, value, reason in cases:
        matrix = getattr(coded(plan), name)
        with torch.no_grad():
            before, matrix[place] = float(matrix[place]), value
            with pytest.raises(InvalidArgument, match=reason) as caught:
                plan.save(tmp_path / "plan")
            matrix[place] = before
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "plan").exists()
    plan.save(tmp_path / "plan")


def test_messages_that_do_not_fit_are_refused(plan: Plan) -> None:
    first = plan.layers[0]
    (source, target), message = min(first.messages.items())
    held = len(first.held(source))

    def with_message(pair: tuple[int, int], message: Any) -> tuple[PlannedLayer, ...]:
        return (replace(first, messages={**first.messages, pair: message}), *plan.layers[1:])

    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": with_message((source, source), PlannedCode(1))}, "two different workers"),
        (
            {"layers": with_message((source, target), PlannedCode(0))},
            f"0 numbers; allowed: a whole number in 1 … {held}",
        ),
        ({"layers": with_message((source, target), PlannedCode(held + 1))}, f"{held + 1} numbers"),
        ({"layers": with_message((source, target), PlannedCode(message.size % held + 1))}, "the module's"),
        ({"layers": with_message((source, target), "a code")}, "got str; allowed: Values or PlannedCode"),
        ({"layers": with_message((source, target), Code(np.eye(held)))}, "got Code; allowed: Values or PlannedCode"),
        ({"layers": (replace(first, n_workers=4), *plan.layers[1:])}, "n_workers: got 4; allowed: the plan's 3"),
    ]
    for changes, reason in cases:
        with pytest.raises(InvalidArgument, match=reason) as caught:
            replace(plan, **changes)
        assert "\n" not in str(caught.value)


def test_a_subclass_of_a_coded_layer_is_in_no_plan(plan: Plan) -> None:
    class Other(CodedLinear):
        pass

    plan.model.add_module("0", Other(14, 11, plan.layers[0].numbers).eval())
    with pytest.raises(UnsupportedModule, match="Other cannot be in a plan"):
        replace(plan)
