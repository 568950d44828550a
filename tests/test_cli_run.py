"""`repurpose-opt run`. Run as a script, this file is a run that is killed or interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from repurpose_opt import FineTuning, Plan, Volume, cli, repurpose
from repurpose_opt.cli.run import _LOSSES
from repurpose_opt.network.calibrate import LOSSES
from repurpose_opt.runtime.processes.launch import run_plan

Run = Callable[..., tuple[int, str, str]]

SOURCE = """
import torch
from torch import nn

class Dense(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(36, 4)

    def forward(self, x):
        return self.fc(torch.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1))

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return torch.erfinv(0.1 * self.fc(x).tanh())

class Space:
    made = Dense()

def broken():
    raise ValueError("first line\\nsecond line")

number = 3
def of_number():
    return number
"""


def dense() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)).eval()


def exported(model: nn.Module, example: torch.Tensor, path: Path, *, any_batch: bool = True) -> None:
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, weights and 100 samples."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny_networks.py").write_text(SOURCE)
    model, random = dense(), np.random.default_rng(0)
    inputs = random.normal(size=(100, 12)).astype(np.float32)
    labels = model(torch.from_numpy(inputs)).argmax(1).numpy()
    np.savez(folder / "train.npz", inputs=inputs, labels=labels)
    np.savez(folder / "images.npz", inputs=random.normal(size=(100, 2, 6, 6)).astype(np.float32))
    np.save(folder / "inputs.npy", inputs)
    save_file({"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}, folder / "train.safetensors")
    save_file(model.state_dict(), folder / "dense.safetensors")
    torch.save(model.state_dict(), folder / "dense.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "nested.pth")
    exported(model, torch.from_numpy(inputs[:2]), folder / "dense.pt2")
    return folder


@pytest.fixture
def run(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `run` with two workers in the folder of `made`: (exit code, standard output, standard error)."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "path", [str(made), *sys.path])

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main(["run", *map(str, arguments), "--workers", "2"])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def figures(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, ""), err
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def failed(run: Run, *arguments: object) -> str:
    """The message of a run that failed as it should."""
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("repurpose-opt: error: ")
    assert err.count("\n") == 1
    return err


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(made: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(made / "train.npz") as stored:
        return torch.from_numpy(stored["inputs"]), torch.from_numpy(stored["labels"])


PRICE = 2e-5
"""At which half of the values are sent."""
NAMED = ("tiny_networks:Dense", "--weights", "dense.safetensors", "--data", "train.npz")


@pytest.mark.parametrize(
    "model",
    [
        ("dense.pt2", "--data", "train.npz"),
        NAMED,
        ("tiny_networks:Dense", "--weights", "dense.pt", "--data", "train.safetensors"),
        ("tiny_networks:Space.made", "--weights", "nested.pth", "--data", "train.npz"),
    ],
)
def test_every_kind_of_model_gives_the_plan_of_the_library(
    model: tuple[str, ...], run: Run, made: Path, tmp_path: Path
):
    inputs, labels = samples(made)
    expected = repurpose(dense(), inputs[:1], 2, data=(inputs, labels), formulation=Volume(transfer_price=PRICE))
    found = figures(run, *model, "--price", PRICE, "--output", tmp_path / "plan")
    plan = Plan.load(tmp_path / "plan")
    assert found["volume"] == plan.volume == expected.volume
    assert 0 < plan.volume < plan.direct_volume
    assert torch.equal(plan.model(inputs), expected.model(inputs))
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_a_price_of_nothing_changes_nothing(run: Run, tmp_path: Path):
    found = figures(run, *NAMED, "--test", "train.npz", "--price", 0, "--output", tmp_path / "plan")
    assert found["test"]["samples"] == 100
    assert found["test"]["accuracy"] == {"original": 1.0, "plan": 1.0}
    assert found["test"]["output_nmse"] < 1e-9


def test_what_is_said_of_a_plan_is_what_it_is(run: Run, made: Path, tmp_path: Path):
    tuning = ("--finetune-steps", 30, "--batch-size", 20, "--learning-rate", 0.01, "--rounds", 2)
    arguments = (*NAMED, "--test", "train.npz", "--price", PRICE, *tuning, "--seed", 3, "--output", tmp_path / "plan")
    found = figures(run, *arguments)
    plan, (inputs, labels) = Plan.load(tmp_path / "plan"), samples(made)
    workers = found["per_worker"]
    assert [worker["worker"] for worker in workers] == [0, 1]
    assert sum(worker["neurons"] for worker in workers) == 9 + 7 + 4
    assert [worker["macs"] for worker in workers] == plan.worker_macs().tolist()
    for name in ("bytes_sent", "bytes_received"):
        assert sum(worker[name] for worker in workers) == found["volume"] == plan.volume
    assert [worker["memory_in_use"] for worker in workers] == [memory.total for memory in plan.memory(256)]
    for worker in workers:
        stored = load_file(tmp_path / "plan" / f"worker-{worker['worker']}.safetensors")
        assert worker["memory"] == sum(tensor.nbytes for tensor in stored.values())
    accuracy = float((plan.model(inputs).argmax(1) == labels).double().mean())
    assert found["test"]["accuracy"] == {"original": 1.0, "plan": accuracy}
    first, last = found["rounds"]
    assert (first["round"], last["round"], last["volume"]) == (1, 2, found["volume"])
    assert last["training_accuracy_after_finetuning"] == accuracy
    assert 0 < last["training_accuracy_before_finetuning"] < 1
    assert first["seconds"] > 0
    assert found["volume_fraction"] == plan.volume / plan.direct_volume == last["volume_fraction"]
    settings = FineTuning(steps=30, batch_size=20, learning_rate=0.01)
    expected = repurpose(
        dense(),
        inputs[:1],
        2,
        data=(inputs, labels),
        formulation=Volume(transfer_price=PRICE),
        finetune=settings,
        rounds=2,
        seed=3,
    )
    assert torch.equal(plan.model(inputs), expected.model(inputs))


def test_tables_for_people(run: Run, tmp_path: Path):
    arguments = ("--price", PRICE, "--finetune-steps", 2, "--output", tmp_path / "plan")
    code, out, err = run(*NAMED, "--test", "train.npz", *arguments)
    assert (code, err) == (0, "")
    summary, rounds, workers = out.split("\n\n")
    plan = Plan.load(tmp_path / "plan")
    assert (
        f"volume          {plan.volume:,} bytes a sample, {plan.volume / plan.direct_volume:.2%} of direct" in summary
    )
    assert "accuracy" in summary
    assert "original 100.00%" in summary
    names, row = rounds.splitlines()
    assert names.startswith("round  volume")
    assert row.split()[:2] == ["1", f"{plan.volume:,}"]
    assert len(workers.splitlines()) == 1 + 2
    assert str(plan.worker_macs()[1]) in workers.splitlines()[2].split()


def test_a_convolution_with_codes_runs_on_processes(run: Run, made: Path, tmp_path: Path):
    arguments = ("--data", "images.npz", "--budget", 0.3, "--messages", "codes", "--output", tmp_path / "plan")
    found = figures(run, "tiny_networks:Conv", *arguments, "--test", "images.npz")
    with np.load(made / "images.npz") as stored:
        inputs = stored["inputs"]
    plan = Plan.load(tmp_path / "plan")
    assert sum(worker["neurons"] for worker in found["per_worker"]) == 4 + 4
    assert 0 < found["volume"] <= 0.3 * found["direct_volume"]
    assert 0 < found["test"]["output_nmse"] < 1
    ran = run_plan(tmp_path / "plan", inputs[:20], timeout=100)
    assert np.allclose(ran.outputs, plan.model(torch.from_numpy(inputs[:20])).detach().numpy(), atol=1e-5)
    assert ran.bytes_sent.sum() == 20 * found["volume"]


def test_an_exported_model_of_token_ids(run: Run, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3)).eval()
    ids = torch.randint(0, 20, (100, 5))
    exported(model, ids[:2], tmp_path / "tokens.pt2")
    np.save(tmp_path / "ids.npy", ids.numpy())
    shared = (tmp_path / "tokens.pt2", "--data", tmp_path / "ids.npy", "--test", tmp_path / "ids.npy", "--price", 0)
    assert figures(run, *shared, "--output", tmp_path / "plan")["test"]["output_nmse"] < 1e-9


def test_a_factory_that_draws_its_weights_draws_the_same_ones_for_a_seed(run: Run, tmp_path: Path):
    def planned(seed: int) -> dict[str, bytes]:
        where = tmp_path / "plan"
        figures(run, "tiny_networks:Dense", "--data", "train.npz", "--budget", 0, "--seed", seed, "--output", where)
        return content(where)

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert planned(0) == planned(0) != planned(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_labels_may_be_missing(run: Run, made: Path, tmp_path: Path):
    model = ("dense.pt2", "--data", "inputs.npy", "--price", PRICE, "--output", tmp_path / "plan")
    found = figures(run, *model, "--test", "inputs.npy", "--finetune-steps", 5)
    assert not any("accuracy" in name for name in found["rounds"][0])
    inputs, _ = samples(made)
    with torch.no_grad():
        original, plan = dense()(inputs).double(), Plan.load(tmp_path / "plan").model(inputs).double()
    difference = float((original - plan).square().sum() / original.square().sum())
    assert found["test"] == {"samples": 100, "output_nmse": pytest.approx(difference, rel=1e-4)}
    error = failed(run, *model, "--finetune-steps", 5, "--distillation", 0.5)
    assert "--distillation: got 0.5; allowed: 1, since --data has no labels" in error


def test_regression(run: Run, made: Path, tmp_path: Path):
    inputs, _ = samples(made)
    np.savez(tmp_path / "numbers.npz", inputs=inputs, labels=dense()(inputs).detach() + 1)
    numbers = tmp_path / "numbers.npz"
    arguments = ("--loss", "squared_error", "--test", numbers, "--budget", 0, "--output", tmp_path / "plan")
    found = figures(run, "dense.pt2", "--data", numbers, *arguments)
    assert found["test"]["mean_squared_error"]["original"] == pytest.approx(1.0)
    with torch.no_grad():
        error = Plan.load(tmp_path / "plan").model(inputs) - dense()(inputs) - 1
    assert found["test"]["mean_squared_error"]["plan"] == pytest.approx(float(error.square().mean()), rel=1e-4)
    _, out, _ = run("dense.pt2", "--data", numbers, *arguments)
    assert "squared error" in out


def test_losses_are_the_librarys():
    assert _LOSSES == LOSSES


def test_options_of_workers(run: Run, tmp_path: Path):
    owner = np.arange(12) % 2
    np.save(tmp_path / "owner.npy", owner)
    np.save(tmp_path / "prices.npy", np.array([[0.0, 1.0], [5.0, 0.0]]))
    shared = (*NAMED, "--budget", 0, "--output", tmp_path / "plan")
    found = figures(run, *shared, "--input-owner", tmp_path / "owner.npy", "--worker-share", "1,2", "--output-owner", 1)
    plan = Plan.load(tmp_path / "plan")
    assert np.array_equal(plan.input_owner, owner)
    assert (plan.layers[-1].owner == 1).all()
    assert found["per_worker"][1]["neurons"] >= 6 + 5 + 4
    limit = found["per_worker"][1]["memory"] - 1
    less = figures(run, *shared, "--worker-share", "1,2", "--output-owner", 1, "--memory-limit", limit)
    assert max(worker["memory"] for worker in less["per_worker"]) <= limit
    assert "--memory-limit: got 8 bytes" in failed(run, *shared, "--memory-limit", 8)
    shared = (*NAMED, "--budget", 0, "--output", tmp_path / "priced")
    for prices in (3, tmp_path / "prices.npy"):
        figures(run, *shared, "--link-price", prices, "--partitioner", "contiguous", "--pruner", "threshold")


WRONG_USAGE = [
    (),
    ("--budget", "0.1", "--price", "1"),
    ("--budget", "1.1"),
    ("--price", "-1"),
    ("--budget", "0.1", "--messages", "words"),
    ("--budget", "0.1", "--loss", "hinge"),
    ("--budget", "0.1", "--rounds", "0"),
    ("--budget", "0.1", "--rounds", "2"),
    ("--max-nmse", "0.1", "--rounds", "2", "--finetune-steps", "9"),
    ("--budget", "0.1", "--batch-size", "8"),
    ("--budget", "0.1", "--finetune-steps", "9", "--patience", "2"),
    ("--budget", "0.1", "--output-owner", "a"),
    ("--budget", "0.1", "--weights", "dense.pt"),
]


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage(arguments: tuple[str, ...], run: Run, tmp_path: Path):
    code, out, err = run("dense.pt2", "--data", "train.npz", "--output", tmp_path / "plan", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: repurpose-opt run")
    assert "error: " in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nothing.pt2", "MODEL: got nothing.pt2, which is no file"),
        ("train.npz", "MODEL: got 'train.npz'; allowed: FILE.pt2 or PACKAGE.MODULE:NAME"),
        ("tiny_networks:", "MODEL: got 'tiny_networks:'"),
        ("no_such_module:Net", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("tiny_networks:Net", "has no attribute 'Net'"),
        ("tiny_networks:broken", "ValueError: first line second line"),
        ("tiny_networks:of_number", "which gives a value of type int; allowed: a torch.nn.Module"),
        ("tiny_networks:Odd", "erfinv) is of a kind that no plan folder can hold"),
        ("tiny_networks:Conv", "--data: got "),
    ],
)
def test_a_wrong_model_is_named(model: str, said: str, run: Run, tmp_path: Path):
    assert said in failed(run, model, "--data", "train.npz", "--budget", 0, "--output", tmp_path / "plan")
    assert not list(tmp_path.iterdir())


def test_an_exported_program_must_take_any_batch_and_be_in_evaluation_mode(run: Run, tmp_path: Path):
    example = torch.zeros(2, 12)
    exported(dense(), example, tmp_path / "static.pt2", any_batch=False)
    exported(nn.Sequential(*dense(), nn.Dropout()).train(), example, tmp_path / "training.pt2")
    (tmp_path / "damaged.pt2").write_bytes(b"not an archive")
    arguments = ("--data", "train.npz", "--budget", 0, "--output", tmp_path / "plan")
    assert "static.pt2, exported for batches of 2 only" in failed(run, tmp_path / "static.pt2", *arguments)
    assert "training.pt2, exported in training mode" in failed(run, tmp_path / "training.pt2", *arguments)
    assert "a complete .pt2 file" in failed(run, tmp_path / "damaged.pt2", *arguments)


class Payload:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickled_objects_are_refused(run: Run, made: Path, tmp_path: Path):
    mark = tmp_path / "mark"
    torch.save(Payload(mark), tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", inputs=np.array([Payload(mark)], dtype=object))
    pickled = io.BytesIO()
    torch.save(Payload(mark), pickled)
    with zipfile.ZipFile(made / "dense.pt2") as good, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as evil:
        for name in good.namelist():
            evil.writestr(name, pickled.getvalue() if "sample_inputs" in name else good.read(name))
    mark.unlink(missing_ok=True)
    arguments = ("--budget", 0, "--output", tmp_path / "plan")
    failed(run, tmp_path / "evil.pt2", "--data", "train.npz", *arguments)
    failed(run, "tiny_networks:Dense", "--weights", tmp_path / "evil.pt", "--data", "train.npz", *arguments)
    failed(run, "dense.pt2", "--data", tmp_path / "evil.npz", *arguments)
    assert not mark.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_weights_must_be_the_models(run: Run, tmp_path: Path):
    save_file({"0.weight": torch.zeros(9, 12)}, tmp_path / "few.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"optimizer": {"state": 1}}, tmp_path / "other.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    for name, said in [
        ("few.safetensors", "few.safetensors (Missing key(s) in state_dict"),
        ("list.pt", "list.pt, which is no state dict"),
        ("other.pt", "other.pt, which is no state dict"),
        ("cut.safetensors", "a complete .safetensors file"),
        ("absent.pt", "which is no file"),
        ("weights.bin", "a .safetensors, .pt or .pth file"),
    ]:
        model = ("tiny_networks:Dense", "--weights", tmp_path / name, "--data", "train.npz")
        error = failed(run, *model, "--budget", 0, "--output", tmp_path / "plan")
        assert "error: --weights: got" in error
        assert said in error


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": np.zeros((9, 12))}, "data.npz with x; allowed: the arrays inputs and, if there are any, labels"),
        ({"inputs": np.zeros((9, 12)), "label": np.zeros(9)}, "data.npz with inputs, label;"),
        ({"inputs": np.zeros((9, 12)), "labels": np.zeros(8, dtype=int)}, "8 labels for 9 inputs"),
        ({"inputs": np.zeros((9, 12)), "labels": np.full(9, 4)}, "labels 4 … 4; allowed: 0 … 3"),
        ({"inputs": np.full((9, 12), np.nan)}, "NaN or infinite inputs"),
        ({"inputs": np.zeros((9, 11))}, "got "),
    ],
)
def test_wrong_samples_are_named(arrays: dict[str, Any], said: str, run: Run, tmp_path: Path):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    for option, data in (("--data", path), ("--test", "train.npz")):
        arguments = ("--data", data, *(("--test", path) if option == "--test" else ()))
        error = failed(run, "dense.pt2", *arguments, "--budget", 0, "--output", tmp_path / "plan")
        assert f"error: {option}: got" in error
        assert said in error
    assert [found.name for found in tmp_path.iterdir()] == ["data.npz"]


def test_folders_with_other_files_are_left_alone(run: Run, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    plan = ("--output", tmp_path / "plan")
    for said, arguments in [
        ("--output: got", ("--output", tmp_path / "full")),
        ("--output: got", ("--output", tmp_path / "full" / "thesis.txt")),
        ("--output: got", ("--output", tmp_path / "absent" / "plan")),
        ("--checkpoint: got", (*plan, "--checkpoint", tmp_path / "full")),
        ("--checkpoint: got", (*plan, "--checkpoint", tmp_path / "plan")),
    ]:
        assert said in failed(run, *NAMED, "--budget", 0, *arguments)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]


def test_a_checkpoint_is_kept_on_request_and_deleted_without_what_is_not_its(run: Run, tmp_path: Path):
    arguments = (*NAMED, "--budget", 0, "--output", tmp_path / "plan")
    folder = tmp_path / "plan.checkpoint"
    found = figures(run, *arguments, "--keep-checkpoint")
    assert found["checkpoint"] == str(folder)
    assert (folder / "run.json").exists()
    assert "--checkpoint: got the folder of another run" in failed(run, *arguments, "--seed", 1)
    (folder / "notes.txt").touch()
    assert figures(run, *arguments)["checkpoint"] is None
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


# --- interrupted runs

LONG = (*NAMED, "--workers", "2", "--price", str(PRICE), "--rounds", "2", "--finetune-steps", "6")


def stopped_run(signal_name: str, stopped_at: int, arguments: list[str]) -> int:
    """A run that sends itself a signal just after its `stopped_at`-th part is kept."""
    replace, count = os.replace, 0

    def replace_and_stop(source: Any, target: Any) -> None:
        nonlocal count
        replace(source, target)
        count += Path(target).suffix == ".npz"
        if count == stopped_at:
            os.kill(os.getpid(), signal.Signals[signal_name])

    os.replace = replace_and_stop  # type: ignore[assignment]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    return cli.main(arguments)


def stopped(made: Path, output: Path, signal_name: str, stopped_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, signal_name, str(stopped_at), "run", *LONG, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(made), *sys.path])}
    return subprocess.run(command, cwd=made, env=environment, timeout=120, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The plan of the run without interruption."""
    output = tmp_path_factory.mktemp("whole") / "plan"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.setattr(sys, "path", [str(made), *sys.path])
        assert cli.main(["run", *LONG, "--output", str(output)]) == 0
    return content(output)


@pytest.mark.parametrize("stopped_at", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_the_same_command_goes_on_after_a_kill(
    stopped_at: int, whole: dict[str, bytes], run: Run, made: Path, tmp_path: Path
):
    output, checkpoint = tmp_path / "plan", tmp_path / "plan.checkpoint"
    ended = stopped(made, output, "SIGKILL", stopped_at)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not output.exists()
    kept = {path: path.stat().st_mtime_ns for path in checkpoint.glob("*.npz")}
    assert len(kept) == stopped_at
    found = figures(run, *LONG, "--output", output, "--keep-checkpoint")
    assert content(output) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(record["seconds"] > 0 for record in found["rounds"])


def test_an_interrupted_run_says_how_to_go_on(whole: dict[str, bytes], run: Run, made: Path, tmp_path: Path):
    output = tmp_path / "plan"
    ended = stopped(made, output, "SIGINT", 3)
    said = f"repurpose-opt: interrupted; the same command goes on from {tmp_path / 'plan.checkpoint'}\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", said)
    assert "--checkpoint: got the folder of another run" in failed(
        run, *LONG, "--pruner", "threshold", "--output", output
    )
    figures(run, *LONG, "--output", output)
    assert content(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


if __name__ == "__main__":
    sys.exit(stopped_run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
