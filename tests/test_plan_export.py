"""Exported plans, run by a runtime that knows nothing but the files and exchange.json."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_coded_plan import coded_plan
from test_graph_plan import SAVED, Model, built, chain, hand_made, inputs_of
from torch import nn

from repurpose_opt import cli
from repurpose_opt.cli import export_plan as command
from repurpose_opt.errors import UnsupportedModule
from repurpose_opt.runtime import export
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.stages import Stage

ROOT = Path(__file__).resolve().parents[1]
Array = NDArray[Any]
Program = Callable[[Sequence[Array]], Sequence[Array]]
Run = Callable[..., tuple[int, str, str]]


# A runtime


def pt2(path: Path, stage: dict[str, Any]) -> Program:
    module = torch.export.load(path).module()
    return lambda inputs: [output.numpy() for output in module(*map(torch.from_numpy, inputs))]


def onnx(path: Path, stage: dict[str, Any]) -> Program:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for given, said in ((session.get_inputs(), stage["inputs"]), (session.get_outputs(), stage["outputs"])):
        assert [(one.name, list(one.shape)) for one in given] == [(one["name"], one["shape"]) for one in said]
    names = [one["name"] for one in stage["inputs"]]
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def loaded(folder: Path, load: Callable[[Path, dict[str, Any]], Program]) -> tuple[dict[str, Any], Any]:
    """exchange.json, and the programs by worker and stage."""
    exchange = json.loads((folder / "exchange.json").read_text())
    programs = [
        [stage["file"] and load(folder / stage["file"], stage) for stage in worker["stages"]]
        for worker in exchange["workers"]
    ]
    return exchange, programs


def parts_of(exchange: dict[str, Any], batch: Array) -> list[Array]:
    """What each worker holds of an input (samples, …)."""
    about = exchange["input"]
    batch = batch.reshape(len(batch), *about["shape"]).astype(about["dtype"])
    if about["places"] is None:
        return [batch] * exchange["n_workers"]
    return [
        np.ascontiguousarray(np.moveaxis(batch.take(held, about["axis"]), about["axis"], 0)) for held in about["places"]
    ]


def whole(exchange: dict[str, Any], outputs: Sequence[Array | None]) -> Array:
    """The answer (samples, …) from the workers' parts."""
    about = exchange["output"]
    held = [(places, part) for places, part in zip(about["places"], outputs, strict=True) if places]
    first = held[0][1]
    assert first is not None
    answer = np.full((sum(len(places) for places, _ in held), *first.shape[1:]), np.nan, about["dtype"])
    for places, part in held:
        answer[places] = part
    return np.moveaxis(answer, 0, about["axis"])


def answer_of(exchange: dict[str, Any], programs: Any, batch: Array) -> Array:
    """All workers in step, stage by stage; checks every shape against what exchange.json says."""
    P, samples = exchange["n_workers"], len(batch)
    held: list[dict[str, Array]] = [
        {"input": part, "samples": np.zeros(samples, exchange["dtype"])} for part in parts_of(exchange, batch)
    ]

    def check(values: dict[str, Array], said: Sequence[dict[str, Any]]) -> list[Array]:
        found = [values[one["name"]] for one in said]
        for array, one in zip(found, said, strict=True):
            assert list(array.shape) == [samples if size == "samples" else size for size in one["shape"]]
            assert array.dtype == one["dtype"]
            assert array.size > 0
        return found

    for number in range(len(exchange["exchanges"]) + 1):
        for k in range(P):
            stage = exchange["workers"][k]["stages"][number]
            if stage["file"] is not None:
                outputs = programs[k][number](check(held[k], stage["inputs"]))
                held[k].update(zip([one["name"] for one in stage["outputs"]], outputs, strict=True))
                check(held[k], stage["outputs"])
        if number < len(exchange["exchanges"]):
            pass_on(exchange["exchanges"][number], held, samples, exchange["dtype"])
    return whole(exchange, [values.get("output") for values in held])


def pass_on(about: dict[str, Any], held: Sequence[dict[str, Array]], samples: int, dtype: str) -> None:
    """What every worker has sent becomes what others have received: all of it, each row once."""
    sent = [values.pop("sent", None) for values in held]
    left = [0 if array is None else len(array) for array in sent]
    for k, values in enumerate(held):
        rows = sum(message["rows"] for message in about["messages"] if message["target"] == k)
        values["received"] = np.full((rows, samples, about["positions"]), np.nan, dtype)
    for message in about["messages"]:
        array, rows, first, to = (message[key] for key in ("source", "rows", "sent_offset", "received_offset"))
        values = sent[array]
        assert values is not None
        held[message["target"]]["received"][to : to + rows] = values[first : first + rows]
        left[array] -= rows
    assert not any(left)
    assert not any(np.isnan(values["received"]).any() for values in held)


# Plans


def expected(plan: Plan, batch: Array) -> Array:
    with torch.no_grad():
        return np.asarray(plan.model(torch.from_numpy(batch)))


def check_answers(plan: Plan, exchange: dict[str, Any], programs: Any, batches: Sequence[Array]) -> None:
    for batch in batches:
        answer, right = answer_of(exchange, programs, batch), expected(plan, batch)
        assert answer.shape == right.shape
        assert np.abs(right).max() > 0.05
        assert np.abs(answer - right).max() <= (1e-4 if exchange["dtype"] == "float32" else 1e-9)


def batches_of(model: Model) -> list[Array]:
    return [inputs_of(model, samples, seed=samples) for samples in (1, 7)]


def columns(count: int, dtype: Any = np.float32) -> list[Array]:
    return [np.random.default_rng(samples).normal(size=(samples, count)).astype(dtype) for samples in (1, 7)]


def exported(plan: Plan, folder: Path, programs: str = "torch-export") -> tuple[dict[str, Any], Any]:
    plan.save(folder / "plan")
    export.export_plan(folder / "plan", folder / "exported", programs)
    return loaded(folder / "exported", pt2 if programs == "torch-export" else onnx)


def lonely() -> Plan:
    """Workers 1 and 2 hold no input and are sent nothing: what they send onwards are their biases."""
    named: list[tuple[str, nn.Module]] = [
        ("sent", nn.Linear(3, 5)),
        ("act", nn.Sigmoid()),
        ("received", nn.Linear(5, 2)),
    ]
    owners = {"sent": np.array([1, 0, 2, 1, 0]), "received": np.zeros(2, dtype=np.int64)}
    model = Model(chain(*named), (3,), np.zeros(3, dtype=np.int64), owners)
    plan = hand_made(model, density=1.0)
    with torch.no_grad():
        plan.product(plan.layers[0]).weight[[0, 2, 3]] = 0
    silent = replace(plan.layers[0], messages={})
    return replace(plan, layers=(silent, *plan.layers[1:]))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """Modules that are kept in place of files that take long to write."""
    stages: dict[str, Stage] = {}

    def keep(stage: Stage, path: Path) -> None:
        stages[f"{path.parent.name}/{path.name}"] = stage

    monkeypatch.setitem(export.PROGRAMS, "torch-export", export.ProgramKind(".pt2", keep))
    return stages


@pytest.mark.parametrize("name", [*SAVED, "lonely"])
def test_stages_and_exchanges_make_the_network(name: str, tmp_path: Path, kept: dict[str, Stage]) -> None:
    """Of every model, without torch.export."""
    plan = lonely() if name == "lonely" else built(name)[1]
    batches = columns(3) if name == "lonely" else batches_of(built(name)[0])
    plan.save(tmp_path / "plan")
    export.export_plan(tmp_path / "plan", tmp_path / "exported", "torch-export")

    def load(path: Path, stage: dict[str, Any]) -> Program:
        module = kept[f"{path.parent.name}/{path.name}"]
        return lambda inputs: [output.numpy() for output in module(*map(torch.from_numpy, inputs))]

    exchange, programs = loaded(tmp_path / "exported", load)
    with torch.no_grad():
        check_answers(plan, exchange, programs, batches)
    rows = np.zeros((plan.n_workers, plan.n_workers), dtype=np.int64)
    for one in exchange["exchanges"]:
        for message in one["messages"]:
            rows[message["source"], message["target"]] += message["rows"] * one["positions"]
    assert np.array_equal(rows * 4, plan.traffic())


def test_torch_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command; codes and values; what is in the files; the loop in README.md."""
    plan, _ = coded_plan([9, 7, 5], 3, ["c", "v"], seed=1)
    plan.save(tmp_path / "plan")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "plan", "--to", "torch-export", "--output", "out", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    figures = json.loads(printed.out)
    paths = [path for path in Path("out").rglob("*") if path.is_file()]
    assert figures["files"] == sorted(path.relative_to("out").as_posix() for path in paths)
    assert figures["n_bytes"] == sum(path.stat().st_size for path in paths)
    assert not any(str(ROOT).encode() in path.read_bytes() for path in paths)
    exchange, programs = loaded(Path("out"), pt2)
    assert figures["n_programs"] == sum(program is not None for own in programs for program in own)
    check_answers(plan, exchange, programs, columns(9))
    check_small(plan, exchange)
    check_loop(plan, exchange, programs, columns(9)[1])


def check_small(plan: Plan, exchange: dict[str, Any]) -> None:
    """A worker's programs have the numbers of its own sub-model, each once."""
    for worker in exchange["workers"]:
        files = [stage["file"] for stage in worker["stages"] if stage["file"] is not None]
        programs = [torch.export.load(Path("out") / file) for file in files]
        tensors = [tensor for program in programs for tensor in (program.constants | program.state_dict).values()]
        there = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
        assert there == sum(t.numel() for part in plan.sub_model(worker["worker"]) for t in part.tensors.values())


def check_loop(plan: Plan, exchange: dict[str, Any], programs: Any, batch: Array) -> None:
    """The loop that README.md shows, a thread for each worker."""
    lines = Path("out/README.md").read_text().splitlines()
    first = lines.index("    def run(worker, exchange, programs, part, samples, send, receive):")
    code = lines[first : first + lines[first:].index("")]
    scope: dict[str, Any] = {"numpy": np}
    exec("\n".join(line[4:] for line in code), scope)
    P = exchange["n_workers"]
    mail: list[list[Queue[Array]]] = [[Queue() for _ in range(P)] for _ in range(P)]
    outputs: list[Any] = [None] * P

    def work(k: int, part: Array) -> None:
        def send(target: int, rows: Array) -> None:
            mail[k][target].put(rows)

        def receive(source: int) -> Array:
            return mail[source][k].get(timeout=60)

        outputs[k] = scope["run"](k, exchange, programs[k], part, len(batch), send, receive)

    threads = [threading.Thread(target=work, args=one) for one in enumerate(parts_of(exchange, batch))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.abs(whole(exchange, outputs) - expected(plan, batch)).max() <= 1e-4


def test_onnx(tmp_path: Path) -> None:
    """With a worker that reads nothing but the number of samples."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plan = lonely()
    exchange, programs = exported(plan, tmp_path, "onnx")
    stages = [stage for worker in exchange["workers"] for stage in worker["stages"]]
    assert any(one["role"] == "samples" for stage in stages for one in stage["inputs"])
    assert any(stage["file"] is None for stage in stages)
    check_answers(plan, exchange, programs, columns(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_torch_export_of_every_model(name: str, tmp_path: Path) -> None:
    model, plan = built(name)
    check_answers(plan, *exported(plan, tmp_path), batches_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SAVED if name != "signals"])
def test_onnx_of_every_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, plan = built(name)
    check_answers(plan, *exported(plan, tmp_path, "onnx"), batches_of(model))


@pytest.mark.slow
def test_what_onnx_has_no_operator_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.raises(UnsupportedModule, match=r"worker-0/stage-1\.onnx: cannot be .*adaptive_max_pool2d.*\)$"):
        exported(built("signals")[1], tmp_path, "onnx")
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
@pytest.mark.parametrize("programs", ["torch-export", "onnx"])
def test_double_precision(programs: str, tmp_path: Path) -> None:
    if programs == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    plan, _ = coded_plan([9, 7, 5], 3, ["cv-", "v"], dtype=np.float64, seed=2)
    exchange, loaded_programs = exported(plan, tmp_path, programs)
    assert exchange["dtype"] == "float64"
    check_answers(plan, exchange, loaded_programs, columns(9, np.float64))


# Errors


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `export` in a folder with a plan and a layer: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    coded_plan([6, 5, 4], 3, ["v", "v"], seed=1)[0].save("plan")
    np.save("layer.npy", np.eye(4))

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main(["export", *map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def failed(code: int, out: str, err: str) -> str:
    """The one line of a run that failed as it should."""
    assert (code, out, err.count("\n")) == (1, "", 1)
    return err


def test_errors_say_what_is_allowed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/mine.txt").write_text("precious")
    to = ("--to", "torch-export", "--output")
    assert "--to: got hgr for plan, a plan; allowed: torch-export, onnx" in failed(*run("plan", "--to", "hgr"))
    assert "--to: got onnx for layer.npy, a file; allowed: hgr, metis, mps" in failed(*run("layer.npy", "--to", "onnx"))
    assert "empty, a folder without manifest.json" in failed(*run("empty", *to, "out"))
    assert "--output: got " in (message := failed(*run("plan", *to, "full")))
    assert "full, which holds mine.txt" in message
    Path("mine").mkdir()
    Path("mine/README.md").write_text("precious")  # a name of ours, but no export
    assert "mine, which holds README.md" in failed(*run("plan", *to, "mine"))
    assert "--output: got " in (message := failed(*run("plan", *to, "nowhere/out")))
    assert "in a folder that does not exist" in message
    for arguments, wrong in (
        (("plan", "--to", "torch-export"), "needs --output"),
        (("plan", *to, "out", "--workers", 3), "--workers is for a layer"),
        (("plan", *to, "out", "--budget", 0.1), "--budget is for a layer"),
        (("layer.npy", "--to", "hgr"), "required: --workers"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert wrong in err
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = failed(*run("plan", "--to", "onnx", "--output", "out"))
    assert "onnx, onnxscript: pip install onnx onnxscript" in message
    assert not Path("out").exists()
    assert Path("full/mine.txt").read_text() == "precious"


def test_an_export_is_replaced_whole_or_not_at_all(
    tmp_path: Path, kept: dict[str, Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = coded_plan([9, 7, 5], 3, ["c", "v"], seed=1)
    plan.save(tmp_path / "plan")
    export.export_plan(tmp_path / "plan", tmp_path / "out", "torch-export")
    before = (tmp_path / "out/exchange.json").read_text()
    smaller, _ = coded_plan([4, 3], 2, ["v"], seed=1)
    smaller.save(tmp_path / "plan")

    def break_down(stage: Stage, path: Path) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setitem(export.PROGRAMS, "torch-export", export.ProgramKind(".pt2", break_down))
        with pytest.raises(OSError, match="no space left"):
            export.export_plan(tmp_path / "plan", tmp_path / "out", "torch-export")
    assert (tmp_path / "out/exchange.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan"]
    written = export.export_plan(tmp_path / "plan", tmp_path / "out", "torch-export")
    assert json.loads((tmp_path / "out/exchange.json").read_text())["n_workers"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan"]
    assert written.files == ("README.md", "exchange.json")


def test_the_command_knows_every_kind_of_program() -> None:
    assert tuple(export.PROGRAMS) == command.PROGRAMS
