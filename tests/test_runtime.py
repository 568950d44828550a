"""Plans on real processes over gloo. Run as a script, this file is one of those processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_plan import mlp, random_plan, rich_model

from repurpose_opt.errors import PlanError, RepurposeError
from repurpose_opt.runtime.exchange import LARGE_MESSAGE, ExchangeStep, Wait, goes_at_once
from repurpose_opt.runtime.manifest import Manifest
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.processes import worker
from repurpose_opt.runtime.processes.agreement import Readiness, byte_mismatch, disagreement, version_mismatch
from repurpose_opt.runtime.processes.console import ERROR_PREFIX
from repurpose_opt.runtime.processes.launch import RunResult, loopback, run_plan
from repurpose_opt.runtime.processes.members import Member
from repurpose_opt.runtime.simulate import simulate

P = 3
SAMPLES = 23
TIMEOUT = 20.0
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"} | loopback()


def samples(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def expected(plan: Plan, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    dtype = next(plan.model.parameters()).dtype
    values = torch.from_numpy(inputs)
    with torch.no_grad():
        return plan.model(values.to(dtype) if values.is_floating_point() else values).numpy()


# One exchange step, in this process


@pytest.mark.parametrize("workers", [[[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [0]]])
@pytest.mark.parametrize("batch", [5, 2, 0])
def test_an_exchange_step_hands_over_exactly_the_messages(batch: int, workers: list[list[int]]) -> None:
    layer = random_plan(mlp([13, 8]), P, workers=workers).layers[0]
    is_all_to_all: list[bool] = []
    values = torch.randn(13, batch)
    steps = [ExchangeStep(layer, k, 5, torch.float32) for k in range(P)]
    held = [values[layer.held(k)] for k in range(P)]
    parts = [steps[k].encode(held[k]).clone().split(steps[k].sent_counts) for k in range(P)]
    for k in range(P):

        def start(received: torch.Tensor, _: Any, __: Any, ___: Any, every_pair: bool, k: int = k) -> Wait:
            is_all_to_all.append(every_pair)

            def wait() -> None:
                torch.cat([parts[source][k] for source in range(P)], out=received)

            return wait

        is_all_to_all.clear()
        steps[k].begin(held[k], start)
        assert is_all_to_all == [all(len(layer.message(a, b)) for a in range(P) for b in range(P) if a != b)]
        inputs = torch.cat([held[k], steps[k].end(batch)])
        assert torch.equal(inputs, values[layer.columns(k)])
        assert np.array_equal(steps[k].bytes_sent, layer.traffic()[k] * batch)


def test_large_messages_go_one_by_one() -> None:
    layer = random_plan(mlp([13, 8]), P, density=[1.0]).layers[0]
    assert len(layer.messages) == P * (P - 1)
    largest = max(message.size for message in layer.messages.values())
    assert goes_at_once(layer, (LARGE_MESSAGE - 1) // largest)
    assert not goes_at_once(layer, -(-LARGE_MESSAGE // largest))


# What the workers compare


def test_workers_that_agree() -> None:
    sent = [((0, 2),), ((1, 0),)]
    received = [((0, 1),), ((2, 0),)]
    ready = [Readiness(None, "a", "", ((4, 3),), 2, sent[k], received[k]) for k in range(2)]
    assert disagreement(ready) is None


@pytest.mark.parametrize(
    ("workers", "reason"),
    [
        ([Readiness(), Readiness("no file"), Readiness("no disk")], "worker 1: no file (and on worker 2 too)"),
        ([Readiness("no plan"), Readiness("no plan")], "no plan"),
        (
            [Readiness(digest="a"), Readiness(digest="b"), Readiness(digest="b")],
            "the plan (SHA-256 of its manifest) of worker 1 and 2 is b, that of worker 0 is a",
        ),
        (
            [Readiness(inputs=((4, 3),)), Readiness(inputs=((5, 3),))],
            "the input (samples, …) of worker 1 is (5, 3), that of worker 0 is (4, 3)",
        ),
        (
            [Readiness(mode="--serve --feed rank0"), Readiness(mode="a run over one file")],
            "the way to get inputs (--serve, --listen, --feed) of worker 1 is a run over one file, "
            "that of worker 0 is --serve --feed rank0",
        ),
        (
            [Readiness(wire="int8"), Readiness(wire="float16")],
            "the wire of worker 1 is float16, that of worker 0 is int8",
        ),
        (
            [Readiness(sent_counts=((0, 2),), received_counts=((0, 1),)),
             Readiness(sent_counts=((1, 0),), received_counts=((3, 0),))],
            "workers 0 and 1 disagree on layer number 0: 0 sends 2 numbers, 1 expects 3",
        ),
    ],
)  # fmt: skip
def test_workers_that_disagree(workers: Sequence[Readiness], reason: str) -> None:
    assert disagreement(workers) == reason


def test_workers_of_another_version_are_named() -> None:
    here = Member.here()
    assert version_mismatch([here, here]) is None
    odd = version_mismatch([here, replace(here, version="7"), here, replace(here, version="7")])
    assert odd == f"the version of repurpose-opt of worker 1 and 3 is 7, that of worker 0 is {here.version}"


def test_a_byte_more_or_less_is_found() -> None:
    layers = random_plan(mlp([13, 8, 5]), P).layers
    predicted = np.array([layer.traffic() for layer in layers])
    assert byte_mismatch(layers, predicted.copy(), predicted) is None
    counted = predicted.copy()
    counted[1, 2, 0] += 1
    mismatch = byte_mismatch(layers, counted, predicted)
    assert mismatch is not None
    assert f"worker 2 sent {counted[1, 2, 0]} bytes to worker 0 for layer '2'" in mismatch


# torchrun


@pytest.fixture(scope="module")
def odd_plan() -> Plan:
    """Odd sizes, a worker without neurons, a layer without messages, a Flatten, a layer without bias."""
    return random_plan(rich_model(), P, density=[0.3, 0.0, 0.5], workers=[[0, 1, 2], [0, 2], [0, 2], [0]], seed=3)


@pytest.fixture(scope="module")
def odd_folder(odd_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "plan"
    odd_plan.save(folder)
    return folder


@pytest.fixture(scope="module")
def odd_inputs() -> np.ndarray[Any, Any]:
    return samples(SAMPLES, 3, 5)


@pytest.fixture(scope="module")
def result(odd_folder: Path, odd_inputs: np.ndarray[Any, Any]) -> RunResult:
    return run_plan(odd_folder, odd_inputs, batch_size=7, timeout=60)


def test_processes_answer_as_the_model_in_one_process(
    odd_plan: Plan, odd_inputs: np.ndarray[Any, Any], result: RunResult
) -> None:
    assert result.outputs.dtype == np.float32
    assert np.abs(result.outputs - expected(odd_plan, odd_inputs)).max() <= 1e-4


def test_bytes_sent_are_the_bytes_predicted(odd_plan: Plan, result: RunResult) -> None:
    assert odd_plan.layers[1].messages == {}
    assert result.bytes_sent.sum() > 0
    assert np.array_equal(result.bytes_sent, odd_plan.traffic() * SAMPLES)
    assert np.array_equal(result.bytes_predicted, result.bytes_sent)
    assert result.messages == sum(len(layer.messages) for layer in odd_plan.layers)
    assert result.seconds > 0


def test_a_wrong_number_of_processes_is_one_line(odd_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--log-dir={tmp_path / 'logs'}", "--no-python"]
    command += [str(Path(sys.executable).with_name("repurpose-opt")), "worker", str(odd_folder)]
    command += [f"--input={tmp_path / 'none.npy'}", f"--output={tmp_path / 'output.npy'}"]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert [line for line in run.stderr.splitlines() if line.startswith(ERROR_PREFIX)] == [
        f"{ERROR_PREFIX}{odd_folder} is a plan for 3 workers, started with 2 processes: use torchrun --nproc-per-node=3"
    ]
    assert not (tmp_path / "output.npy").exists()


def test_run_plan_raises_the_line_of_the_worker(odd_folder: Path) -> None:
    with pytest.raises(RepurposeError, match=r"input.npy: shape \(4, 14\); the plan reads 15 columns") as caught:
        run_plan(odd_folder, samples(4, 14), timeout=60)
    assert "\n" not in str(caught.value)


def test_run_plan_ends_all_processes_at_its_timeout(odd_folder: Path) -> None:
    with pytest.raises(RepurposeError, match="no answer within 4 seconds"):
        run_plan(odd_folder, samples(200_000, 15), batch_size=1, timeout=4)
    if Path("/proc/self/cmdline").exists():
        commands = [path.read_bytes() for path in _readable(Path("/proc").glob("[0-9]*/cmdline"))]
        assert not [command for command in commands if str(odd_folder).encode() in command]


def test_run_plan_finds_a_damaged_plan_before_it_starts(tmp_path: Path) -> None:
    random_plan(mlp([5, 3]), 2).save(tmp_path / "plan")
    (tmp_path / "plan" / "worker-1.safetensors").unlink()
    with pytest.raises(PlanError, match=r"worker-1.safetensors: missing"):
        run_plan(tmp_path / "plan", samples(4, 5))


def _readable(paths: Iterator[Path]) -> Iterator[Path]:
    for path in paths:
        with contextlib.suppress(OSError):
            path.read_bytes()
            yield path


# Processes of our own: several runs in each, as torch takes long to import


def test_a_worker_needs_torchrun(
    odd_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert worker.main([str(odd_folder), "--input=x.npy", "--output=y.npy"]) == 1
    message = capsys.readouterr().err
    assert message.startswith(ERROR_PREFIX)
    assert "torchrun --nproc-per-node=P" in message
    assert message.count("\n") == 1


def test_usage_errors_have_code_2(odd_folder: Path) -> None:
    options = (
        "--batch-size=0",
        "--timeout=-1",
        "--batch-size=x",
        "--rate=3",
        "--listen=path",
        "--feed=owners",
        "--json",
    )
    for option in options:
        with pytest.raises(SystemExit) as caught:
            worker.main([str(odd_folder), "--input=x.npy", "--output=y.npy", option])
        assert caught.value.code == 2


class Runs:
    """Plans and inputs in a folder, runs of them in one set of P processes, and what came of each run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = random_plan(mlp([11, 9, 6]).double(), P, workers=[[0, 1, 2], [0, 1, 2], [1, 2]])
        self.runs: list[dict[str, Any]] = []
        self.codes: dict[str, list[int]] = {}
        self.errors: dict[str, list[str]] = {}
        self._prepare_plans()
        self._prepare_inputs()

    def _prepare_plans(self) -> None:
        self.plan.save(self.folder / "good")
        self.plan.save(self.folder / "incomplete")
        (self.folder / "incomplete" / "worker-1.safetensors").unlink()
        random_plan(mlp([11, 9, 6]).double(), P, seed=1).save(self.folder / "other")
        random_plan(mlp([11, 6]), P, workers=[[0, 1, 2], [2]]).save(self.folder / "answer-on-2")

    def _prepare_inputs(self) -> None:
        good, nan = samples(SAMPLES, 11), samples(SAMPLES, 11)
        self.column = int(self.plan.layers[0].held(2)[0])
        nan[5, self.column] = np.nan
        arrays = {
            "good": good,
            "nan": nan,
            "none": good[:0],
            "narrow": good[:, :10],
            "text": np.array([["a"] * 11]),
        }
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array)
        (self.folder / "broken.npy").write_bytes((self.folder / "good.npy").read_bytes()[:200])

    def add(self, name: str, plan: str = "good", inputs: str = "good", output: str = "", **options: Any) -> None:
        """Options: `odd` and `odd_wire`, what worker 1 is given; `wire`; `timeout` in seconds; `sabotage`, a kind."""
        files = [f"--input={self.folder / inputs}.npy", f"--output={self.folder / (output or name)}.out.npy"]
        files += [f"--report={self.folder / (output or name)}.json", "--batch-size=7"]
        files += [f"--timeout={options.get('timeout', TIMEOUT)}"]
        plans = {rank: str(self.folder / plan) for rank in range(P)}
        plans[1] = str(self.folder / options.get("odd", plan))
        wires = dict.fromkeys(range(P), options.get("wire", "float64"))
        wires[1] = options.get("odd_wire", wires[1])
        arguments = [[plans[rank], *files] for rank in range(P)]
        for rank, given in enumerate(arguments):
            given += [f"--wire={wires[rank]}"] if wires[rank] != "float64" else []
        self.runs.append({"name": name, "arguments": arguments, "sabotage": options.get("sabotage"), "port": _port()})

    def start(self) -> list[int]:
        """Run all that was added; returns the exit codes of the processes."""
        (self.folder / "runs.json").write_text(json.dumps(self.runs))
        processes = []
        for rank in range(P):
            environment = ENVIRONMENT | {"RANK": str(rank), "WORLD_SIZE": str(P), "MASTER_ADDR": "127.0.0.1"}
            command = [sys.executable, __file__, str(self.folder / "runs.json")]
            processes.append(subprocess.Popen(command, env=environment))
        try:
            codes = [process.wait(60) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for run in self.runs:
            paths = [self.folder / f"{run['name']}.{rank}.json" for rank in range(P)]
            ends = [json.loads(path.read_text()) if path.exists() else {} for path in paths]
            self.codes[run["name"]] = [end.get("code") for end in ends]
            self.errors[run["name"]] = [line for end in ends for line in end.get("stderr", "").splitlines()]
        self.runs = []
        return codes

    def report(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("runs"))
    runs.add("several-owners")
    runs.add("no-samples", inputs="none")
    runs.add("answer-on-2", plan="answer-on-2")
    runs.add("incomplete", plan="incomplete")
    runs.add("no-plan", plan="nowhere")
    runs.add("two-plans", odd="other")
    runs.add("int8", wire="int8")
    runs.add("two-wires", odd_wire="float16")
    for name in ("nan", "narrow", "text", "broken", "missing"):
        runs.add(name, inputs=name)
    runs.add("no-folder", output="nowhere/file")
    runs.add("prediction-changed", sabotage="prediction")
    runs.add("counts-changed", sabotage="counts")
    assert runs.start() == [0] * P
    return runs


def test_outputs_of_several_owners_are_gathered(runs: Runs) -> None:
    assert runs.codes["several-owners"] == [0] * P
    assert runs.errors["several-owners"] == []
    outputs = np.load(runs.folder / "several-owners.out.npy")
    assert outputs.dtype == np.float64
    assert np.abs(outputs - expected(runs.plan, samples(SAMPLES, 11))).max() <= 1e-12


def test_the_report_says_what_was_sent(runs: Runs) -> None:
    report = runs.report("several-owners")
    traffic = runs.plan.traffic() * SAMPLES
    assert traffic.sum() > 0
    assert (report["samples"], report["batches"], report["outputs_gathered_on_worker_0"]) == (
        SAMPLES,
        4,
        True,
    )
    assert report["bytes_sent"] == report["bytes_predicted"] == traffic.tolist()
    assert report["messages_per_batch"] == sum(len(layer.messages) for layer in runs.plan.layers)
    for layer, part in zip(runs.plan.layers, report["layers"], strict=True):
        assert part["name"] == layer.name
        assert part["bytes_sent"] == part["bytes_predicted"] == (layer.traffic() * SAMPLES).tolist()


def test_no_samples_give_no_outputs(runs: Runs) -> None:
    assert runs.codes["no-samples"] == [0] * P
    assert np.load(runs.folder / "no-samples.out.npy").shape == (0, 6)
    assert np.sum(runs.report("no-samples")["bytes_sent"]) == 0


def test_the_only_owner_of_the_outputs_writes_them(runs: Runs) -> None:
    assert runs.codes["answer-on-2"] == [0] * P
    plan = Plan.load(runs.folder / "answer-on-2")
    outputs = np.load(runs.folder / "answer-on-2.out.npy")
    assert np.abs(outputs - expected(plan, samples(SAMPLES, 11))).max() <= 1e-4
    assert runs.report("answer-on-2")["outputs_gathered_on_worker_0"] is False


def test_messages_in_fewer_bits(runs: Runs) -> None:
    assert runs.codes["int8"] == [0] * P
    ran = simulate(runs.plan, samples(SAMPLES, 11), batch_size=7, wire="int8")
    outputs, report = np.load(runs.folder / "int8.out.npy"), runs.report("int8")
    assert np.abs(outputs - ran.outputs).max() <= 1e-12
    assert report["wire"] == "int8"
    assert report["bytes_sent"] == report["bytes_predicted"] == ran.bytes_sent.tolist()
    errors = [layer["wire_nmse"] for layer in report["layers"]]
    assert all(0 < error < 1e-3 for error in errors)
    assert [layer["wire_nmse"] for layer in runs.report("several-owners")["layers"]] == [0.0, 0.0]


FAILURES = {
    "two-wires": "the wire of worker 1 is float16, that of worker 0 is float64",
    "incomplete": "worker 1: {folder}/incomplete/worker-1.safetensors: missing; a plan for 3 workers has one for each",
    "no-plan": "{folder}/nowhere/manifest.json: missing; a plan folder has one",
    "two-plans": "the plan (SHA-256 of its manifest) of worker 1 is ",
    "nan": "worker 2: {folder}/nan.npy: NaN or infinite at sample 5, column {column}; "
    "allowed: numbers that are finite in float64",
    "narrow": "{folder}/narrow.npy: shape (23, 10); the plan reads 11 columns: (samples, 11)",
    "text": "{folder}/text.npy: dtype <U1; allowed: real numbers",
    "broken": "{folder}/broken.npy: cannot be read as a .npy array",
    "missing": "{folder}/missing.npy: missing; --input is a .npy file of shape (samples, 11)",
    "no-folder": "{folder}/nowhere/file.out.npy: cannot be written; its folder does not exist",
    "prediction-changed": "worker {source} sent {bytes} bytes to worker {target} for layer '0', the plan predicts 0",
    "counts-changed": "disagree on layer number 0",
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_worker_fails_and_one_says_why(name: str, runs: Runs) -> None:
    (source, target), message = min(runs.plan.layers[0].messages.items())
    line = FAILURES[name].format(
        folder=runs.folder,
        column=runs.column,
        source=source,
        target=target,
        bytes=message.size * 8 * SAMPLES,
    )
    assert runs.codes[name] == [1] * P
    assert len(runs.errors[name]) == 1
    assert runs.errors[name][0].startswith(ERROR_PREFIX)
    assert line in runs.errors[name][0]
    assert not (runs.folder / f"{name}.out.npy").exists()


# What a process of `Runs` does


def _sabotage(kind: str | None, rank: int) -> contextlib.AbstractContextManager[pytest.MonkeyPatch]:
    """What is done to worker 1, or to all, in the middle of a run."""
    context = pytest.MonkeyPatch.context()
    if kind == "prediction":
        return _patched(context, worker, "build_part", _forget_a_message(worker.build_part))
    if kind == "counts" and rank == 1:
        return _patched(context, ExchangeStep, "__init__", _expect_one_more(ExchangeStep.__init__))
    return context


@contextlib.contextmanager
def _patched(context: Any, target: Any, name: str, replacement: Any) -> Iterator[pytest.MonkeyPatch]:
    with context as patch:
        patch.setattr(target, name, replacement)
        yield patch


def _forget_a_message(build_part: Any) -> Any:
    """The encoders are fixed; then the plan that predicts the bytes loses a message."""

    def build(manifest: Manifest, *rest: Any) -> Any:
        built = build_part(manifest, *rest)
        messages = manifest.layers[0].messages
        assert isinstance(messages, dict)
        del messages[min(messages)]
        return built

    return build


def _expect_one_more(create: Any) -> Any:
    def init(step: ExchangeStep, *arguments: Any) -> None:
        create(step, *arguments)
        step.received_counts[0] += 1

    return init


def _process(path: Path, rank: int) -> None:
    for run in json.loads(path.read_text()):
        os.environ["MASTER_PORT"] = str(run["port"])
        with _sabotage(run["sabotage"], rank), contextlib.redirect_stderr(io.StringIO()) as stderr:
            code = worker.main(run["arguments"][rank])
        end = {"code": code, "stderr": stderr.getvalue()}
        (path.parent / f"{run['name']}.{rank}.json").write_text(json.dumps(end))


if __name__ == "__main__":
    _process(Path(sys.argv[1]), int(os.environ["RANK"]))
