"""Plans in memory and on disk, without processes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument, PlanError, UnsupportedModule
from repurpose_opt.exchange import Exchange, Values
from repurpose_opt.runtime import manifest, storage
from repurpose_opt.runtime.modules import ELEMENTWISE, from_spec, to_spec
from repurpose_opt.runtime.plan import Plan, PlannedLayer

ARGUMENTS: dict[str, dict[str, Any]] = {
    "LeakyReLU": {"negative_slope": 0.3},
    "ELU": {"alpha": 0.4},
    "GELU": {"approximate": "tanh"},
    "Softplus": {"beta": 2.5, "threshold": 3.0},
    "Hardtanh": {"min_val": -0.3, "max_val": 0.4},
    "Dropout": {"p": 0.7},
    "Dropout1d": {"p": 0.7},
    "Dropout2d": {"p": 0.7},
}


def mlp(sizes: Sequence[int], seed: int = 0) -> nn.Sequential:
    """Linear, ReLU, …, Linear with random weights."""
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for n, m in pairwise(sizes):
        modules += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def random_plan(
    model: nn.Sequential,
    n_workers: int,
    seed: int = 0,
    *,
    density: Sequence[float] = (),
    workers: Sequence[Sequence[int]] = (),
) -> Plan:
    """Random owners and transfers for a model, whose weights outside them are set to zero.

    `density`: the fraction of the possible transfers, layer by layer (0.4). `workers`: who may hold the inputs, and
    the neurons of each layer (all, and worker 0 the outputs).
    """
    rng = np.random.default_rng(seed)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    density = density or [0.4] * len(linears)
    workers = workers or [*[range(n_workers)] * len(linears), [0]]
    input_owner = rng.choice(workers[0], linears[0][1].in_features)
    layers = []
    for (name, linear), fraction, places in zip(linears, density, workers[1:], strict=True):
        owner = rng.choice(places, linear.out_features)
        transfers = rng.random((linear.in_features, n_workers)) < fraction
        transfers[np.arange(linear.in_features), input_owner] = False
        has = transfers | (input_owner[:, None] == np.arange(n_workers))
        with torch.no_grad():
            linear.weight *= torch.from_numpy(has[:, owner].T)
        exchange = Exchange.of_transfers(transfers, input_owner)
        layers.append(PlannedLayer.of_exchange(name, input_owner, owner, exchange, linear.weight.element_size()))
        input_owner = owner
    return Plan(model.eval(), tuple(layers), n_workers, 12345, {"seed": seed, "volumes": [1.5, None]})


def rich_model() -> nn.Sequential:
    """Flatten, names, a module in two places, a layer without bias, arguments."""
    relu = nn.ReLU(inplace=True)
    first, second, third = nn.Linear(15, 9), nn.Linear(9, 11, bias=False), nn.Linear(11, 4)
    named = [("flat", nn.Flatten()), ("drop", nn.Dropout(0.25)), ("a", first), ("relu", relu), ("b", second)]
    named += [
        ("again", relu),
        ("gelu", nn.GELU(approximate="tanh")),
        ("c", third),
        ("end", nn.LeakyReLU(0.2)),
    ]
    return nn.Sequential(OrderedDict(named))


@pytest.fixture
def plan() -> Plan:
    return random_plan(mlp([13, 8, 7, 5]), 3)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    plan.save(tmp_path / "plan")
    return tmp_path / "plan"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_load_gives_back_what_was_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = random_plan(rich_model().to(dtype), 3)
    saved.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.graph.steps == saved.graph.steps
    for ours, theirs in zip(loaded.model.state_dict().items(), saved.model.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert ours[1].dtype == dtype
        assert torch.equal(ours[1], theirs[1])
    samples = torch.randn(6, 3, 5, dtype=dtype)
    assert torch.equal(loaded.model(samples), saved.model(samples))
    for layer, before in zip(loaded.layers, saved.layers, strict=True):
        assert (layer.name, layer.value_bytes) == (before.name, before.value_bytes)
        assert np.array_equal(layer.owner, before.owner)
        assert np.array_equal(layer.input_owner, before.input_owner)
        assert np.array_equal(layer.chosen_values, before.chosen_values)
    assert (loaded.n_workers, loaded.direct_volume, loaded.stats) == (3, 12345, saved.stats)
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {
        "manifest.json",
        *[f"worker-{k}.safetensors" for k in range(3)],
    }


def test_messages_keep_their_order(tmp_path: Path) -> None:
    linear = nn.Linear(4, 2)
    messages = {(1, 0): Values(np.array([3, 1]))}
    layer = PlannedLayer("0", np.array([0, 1, 1, 1]), np.array([0, 0]), messages, 2, 4)
    with torch.no_grad():
        linear.weight[:, 2] = 0
    Plan(nn.Sequential(linear).eval(), (layer,), 2, 0, {}).save(tmp_path / "plan")
    part = Plan.load(tmp_path / "plan").sub_model(0)[0]
    assert part.columns.tolist() == [0, 3, 1]
    assert torch.equal(part.weight, linear.weight[:, [0, 3, 1]])


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    Plan.load(folder)
    assert torch.equal(before, torch.get_rng_state())


def test_figures_equal_a_count_by_hand(plan: Plan) -> None:
    traffic, macs = np.zeros((3, 3), dtype=int), np.zeros(3, dtype=int)
    for layer in plan.layers:
        for k in range(3):
            received = np.flatnonzero(layer.chosen_values[:, k])
            for j in received:
                traffic[layer.input_owner[j], k] += 4
            macs[k] += (layer.owner == k).sum() * ((layer.input_owner == k).sum() + len(received))
    assert traffic.sum() > 0
    assert np.array_equal(plan.traffic(), traffic)
    assert plan.volume == traffic.sum()
    assert plan.busiest == max(traffic.sum(axis=0).max(), traffic.sum(axis=1).max())
    assert np.array_equal(plan.worker_macs(), macs)


def test_sub_models_are_small_and_make_up_the_model(plan: Plan) -> None:
    for number, layer in enumerate(plan.layers):
        linear = plan.model.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        rebuilt = torch.zeros_like(linear.weight)
        for k in range(3):
            part = plan.sub_model(k)[number]
            assert part.weight.shape == (len(part.rows), len(part.columns))
            assert part.bias is not None
            assert torch.equal(part.bias, linear.bias[part.rows])
            rebuilt[np.ix_(part.rows, part.columns)] = part.weight
        assert torch.equal(rebuilt, linear.weight)
    with pytest.raises(InvalidArgument, match=r"worker: got 3; allowed: 0 … 2"):
        plan.sub_model(3)


def test_stats_may_have_numbers_as_keys(plan: Plan, tmp_path: Path) -> None:
    stats: dict[Any, Any] = {2: "two", 10: (1, 2)}
    replace(plan, stats=stats).save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").stats == {"2": "two", "10": [1, 2]}


# Saving


def test_save_replaces_a_plan_whole(folder: Path) -> None:
    other = random_plan(mlp([13, 5]), 2, seed=1)
    other.save(folder)
    assert Plan.load(folder).n_workers == 2
    assert not (folder / "worker-2.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["plan"]


def test_save_into_an_empty_or_new_folder(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    plan.save(tmp_path / "empty")
    plan.save(str(tmp_path / "new" / "deeper"))
    assert Plan.load(str(tmp_path / "empty")).volume == Plan.load(tmp_path / "new" / "deeper").volume


@pytest.mark.parametrize("names", [["thesis.tex"], ["manifest.json", "notes.md"], ["worker-0.safetensors"]])
def test_save_refuses_a_folder_of_something_else(names: list[str], plan: Plan, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(InvalidArgument, match=r"directory: got .*; allowed: a new or empty folder"):
        plan.save(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)
    with pytest.raises(InvalidArgument, match="a file; allowed"):
        plan.save(tmp_path / names[0])


def test_an_interrupted_save_leaves_the_plan_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(tensors: dict[str, torch.Tensor]) -> bytes:
        calls.append(tensors)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return b"partial"

    monkeypatch.setattr(storage, "bytes_of", interrupted)
    for target in (folder, folder.parent / "new"):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            random_plan(mlp([13, 5]), 2, seed=1).save(target)
    assert Plan.load(folder).n_workers == 3
    assert [path.name for path in folder.parent.iterdir()] == ["plan"]


def test_a_plan_that_cannot_take_its_place_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def full(path: Path, target: Path) -> Path:
        if path.name.endswith(".new"):
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space left"):
        random_plan(mlp([13, 5]), 2, seed=1).save(folder)
    assert Plan.load(folder).n_workers == 3
    assert [path.name for path in folder.parent.iterdir()] == ["plan"]


# Damaged folders


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _edit(old: str, new: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no manifest": ("manifest.json", Path.unlink, "missing"),
    "no worker file": ("worker-1.safetensors", Path.unlink, "missing; a plan for 3 workers has one for each"),
    "worker file cut": ("worker-1.safetensors", _cut, "the manifest says .* bytes|bytes, the manifest says"),
    "worker file altered": ("worker-1.safetensors", _flip, "altered"),
    "manifest cut": ("manifest.json", _cut, "not valid JSON.*truncated"),
    "manifest is text": ("manifest.json", lambda path: path.write_text("hello"), "not valid JSON"),
    "manifest is binary": ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe\xfa"), "not valid JSON"),
    "manifest is a list": ("manifest.json", lambda path: path.write_text("[]"), "not the manifest of a plan"),
    "manifest altered": ("manifest.json", _edit('"direct_volume":12345', '"direct_volume":12346'), "altered"),
    "later version": ("manifest.json", _edit('"version":3', '"version":7'), "version 7; .* reads versions 1, 2, 3"),
    "other format": ("manifest.json", _edit("repurpose-opt plan", "song"), "not the manifest of a plan"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage: str, folder: Path) -> None:
    name, action, reason = DAMAGES[damage]
    action(folder / name)
    with pytest.raises(PlanError, match=reason) as caught:
        Plan.load(folder)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_contradicts_itself_is_refused(folder: Path) -> None:
    edits: list[tuple[str, Callable[[Any], Any]]] = [
        ("n_workers", lambda content: content.update(n_workers=4)),
        ("owner", lambda content: content["layers"][0]["owner"].__setitem__(0, 9)),
        ("input_owner", lambda content: content["layers"][1]["input_owner"].__setitem__(0, 0.5)),
        ("message", lambda content: content["layers"][0]["messages"][0]["values"].__setitem__(0, 99)),
        ("source", lambda content: content["layers"][0]["messages"][0].update(source=0.5)),
        ("direct_volume", lambda content: content.update(direct_volume=-5)),
        ("dtype", lambda content: content.update(dtype="float8")),
        ("Linear", lambda content: content["steps"][0]["arguments"].update(in_features=12)),
        ("sizes", lambda content: content["steps"][0]["arguments"].update(in_features=-1)),
        ("no number", lambda content: content["steps"][0]["arguments"].update(in_features="many")),
        ("kind", lambda content: content["steps"][1].update(kind="exec")),
        ("names", lambda content: content["steps"].pop()),
        ("name", lambda content: content["steps"][0].update(name=7)),
        ("attribute", lambda content: content["steps"][1].update(name="forward")),
        ("reads", lambda content: content["steps"][0].update(inputs=["4"])),
        ("reads nothing", lambda content: content["steps"][1].update(inputs=[])),
        ("input_owner", lambda content: content.update(input_owner=None)),
        ("input_shape", lambda content: content.update(input_shape=[12])),
        ("no shape", lambda content: content.update(input_shape=[-13])),
        ("positions", lambda content: content["layers"][0].update(positions=2)),
        ("weight_macs", lambda content: content["layers"][0].update(weight_macs=2)),
        ("missing key", lambda content: content.pop("layers")),
    ]
    original = json.loads((folder / "manifest.json").read_text())["plan"]
    for name, edit in edits:
        content = json.loads(json.dumps(original))
        edit(content)
        write_manifest(folder, content)
        with pytest.raises(PlanError) as caught:
            Plan.load(folder)
        assert str(folder / "manifest.json") in str(caught.value), name
        assert "\n" not in str(caught.value), name
    write_manifest(folder, original)
    Plan.load(folder)


def write_manifest(folder: Path, content: Any, version: int = manifest.VERSION) -> None:
    """A manifest with this content and the SHA-256 that fits it."""
    head = {"format": manifest.FORMAT, "version": version, "sha256": manifest._digest(content)}
    (folder / "manifest.json").write_text(json.dumps(head | {"plan": content}))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"0.bias": torch.zeros(99)}, r"0.bias is \(99,\)"),
        ({"0.bias": torch.zeros(3, dtype=torch.float64)}, "0.bias is .* of torch.float64; the manifest says"),
        ({"extra": torch.zeros(1)}, "tensors .*extra"),
    ],
)
def test_tensors_that_do_not_fit_the_manifest_are_refused(
    wrong: dict[str, torch.Tensor], reason: str, plan: Plan, tmp_path: Path
) -> None:
    tensors = []
    for k in range(3):
        parts = dict(zip(["0", "2", "4"], plan.sub_model(k), strict=True))
        named = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.tensors.items()}
        tensors.append(named | (wrong if k == 2 else {}))
    storage.write_folder(tmp_path / "plan", plan.manifest(), tensors)
    with pytest.raises(PlanError, match=reason) as caught:
        Plan.load(tmp_path / "plan")
    assert str(tmp_path / "plan" / "worker-2.safetensors") in str(caught.value)


# Plans whose parts do not fit each other


def test_a_weight_that_reads_a_value_its_worker_lacks_is_refused(plan: Plan, tmp_path: Path) -> None:
    layer, linear = plan.layers[0], plan.product(plan.layers[0])
    k = int(layer.owner[0])
    j = np.setdiff1d(np.arange(13), layer.columns(k))[0]
    with torch.no_grad():
        linear.weight[0, j] = 0.5
    with pytest.raises(InvalidArgument, match=rf"'0': weight: got reads value {j} on worker {k}"):
        plan.save(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()


def test_plans_that_do_not_fit_are_refused(plan: Plan) -> None:
    first, second, third = plan.layers
    (p, k), message = next(iter(first.messages.items()))

    def with_first(**changes: Any) -> tuple[PlannedLayer, ...]:
        return (replace(first, **changes), second, third)

    def with_message(pair: tuple[int, int], values: Any) -> tuple[PlannedLayer, ...]:
        return with_first(messages={pair: Values(np.array(values))})

    cases: list[tuple[dict[str, Any], str]] = [
        ({"layers": ()}, "layers: got none"),
        ({"layers": (first, second)}, r"one for each step that .*, in order: \['0', '2', '4'\]"),
        (
            {"layers": (first, replace(second, input_owner=(second.input_owner + 1) % 3), third)},
            "message|owner of",
        ),
        ({"layers": with_first(owner=first.owner + 2)}, "owner: got worker"),
        ({"layers": with_first(owner=first.owner.astype(float))}, "whole number"),
        ({"layers": with_first(value_bytes=8)}, "value_bytes: got 8; allowed: 4"),
        ({"layers": with_message((p, p), message.values)}, "two different workers"),
        ({"layers": with_message((p, 3), message.values)}, "two different workers of 0 … 2"),
        ({"layers": with_message((p, k), [99])}, "values 0 … 12"),
        ({"layers": with_message((p, k), [message.values[0]] * 2)}, "each once"),
        ({"layers": with_message(((p + 1) % 3, p), message.values)}, f"values of worker {(p + 1) % 3}"),
        ({"n_workers": 4}, "n_workers: got 3; allowed: the plan's 4"),
        ({"stats": {"time": float("nan")}}, "stats"),
        ({"stats": {"owner": first.owner}}, "stats"),
    ]
    for changes, reason in cases:
        with pytest.raises(InvalidArgument, match=reason):
            replace(plan, **changes)


class MyReLU(nn.ReLU):
    pass


@pytest.mark.parametrize(
    ("module", "error", "reason"),
    [
        (
            nn.Tanhshrink().eval(),
            UnsupportedModule,
            "Tanhshrink cannot be in a plan; allowed: Flatten, Linear, CodedLinear, Conv1d",
        ),
        (nn.BatchNorm1d(8).eval(), UnsupportedModule, "BatchNorm1d"),
        (MyReLU().eval(), UnsupportedModule, "MyReLU"),
        (nn.Hardtanh(0.0, float("inf")).eval(), UnsupportedModule, "max_val=inf"),
        (nn.Sequential(nn.ReLU()).eval(), UnsupportedModule, "Sequential"),
        (nn.Softmax(1).eval(), InvalidArgument, "layers: got .*one for each"),
        (nn.ReLU().train(), InvalidArgument, "training mode"),
    ],
)
def test_modules_that_no_plan_holds_are_refused(
    module: nn.Module, error: type[Exception], reason: str, plan: Plan
) -> None:
    plan.model.add_module("1", module)
    with pytest.raises(error, match=reason):
        replace(plan)


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_modules_survive_their_spec(kind: str) -> None:
    arguments = ARGUMENTS.get(kind, {})
    module = ELEMENTWISE[kind].module(**arguments).eval()
    spec = to_spec(module)
    assert spec == {"kind": kind, "arguments": arguments}
    values = torch.linspace(-9, 9, 181).reshape(1, 1, -1)
    assert torch.equal(from_spec(json.loads(json.dumps(spec)))(values), module(values))
    assert torch.allclose(module(values.flip(-1)).flip(-1), module(values))


def test_every_argument_of_an_elementwise_module_is_in_the_test() -> None:
    assert {kind: set(known.arguments) for kind, known in ELEMENTWISE.items() if known.arguments} == {
        kind: set(arguments) for kind, arguments in ARGUMENTS.items()
    }
