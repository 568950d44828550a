"""Runs that are killed and go on. Run as a script, this file is the run that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_network import P, calibration, network, planned, same
from torch import nn

from repurpose_opt import FineTuning, Plan, Volume
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.network import checkpoint
from repurpose_opt.network.sweep import Sweep

FORMULATION = Volume(budget=0.13)
TUNING = FineTuning(steps=5)


def run(folder: Path | None = None, **arguments: Any) -> Plan:
    return planned(FORMULATION, finetune=TUNING, checkpoint_dir=folder, seed=3, **arguments)


def killed_run(folder: Path, killed_at: int, moment: str) -> None:
    """The same run, which kills itself before or after the `killed_at`-th layer file appears."""
    replace, count = os.replace, 0

    def replace_and_kill(source: Any, target: Any) -> None:
        nonlocal count
        count += Path(target).suffix == ".npz"
        if count == killed_at and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.os.replace = replace_and_kill  # type: ignore[attr-defined]
    run(folder)


def layer_files(folder: Path) -> dict[str, int]:
    """Modification time of every layer file."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("round-1-trial-*-?.npz")}


@pytest.fixture(scope="module")
def whole() -> Plan:
    """The run without interruption."""
    return run()


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were solved."""
    names: list[str] = []
    solve = Sweep._solve

    def counted(self: Sweep, name: str, *arguments: Any) -> Any:
        names.append(name)
        return solve(self, name, *arguments)

    monkeypatch.setattr(Sweep, "_solve", counted)
    return names


@pytest.mark.parametrize(("killed_at", "moment", "finished"), [(2, "after", 2), (5, "before", 4)])
def test_a_killed_run_goes_on_from_its_last_finished_layer(
    killed_at: int, moment: str, finished: int, whole: Plan, solved: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, __file__, str(tmp_path), str(killed_at), moment]
    ended = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = layer_files(tmp_path)
    assert len(before) == finished
    resumed = run(tmp_path)
    assert same(resumed, whole)
    assert (resumed.volume, resumed.stats) == (whole.volume, whole.stats)
    after = layer_files(tmp_path)
    layers = 3 * len(whole.stats["trials"])
    assert len(after) == layers > killed_at
    assert {name: after[name] for name in before} == before
    assert len(solved) == layers - finished
    assert not list(tmp_path.glob("*.part"))


def test_a_finished_run_solves_nothing_again(whole: Plan, solved: list[str], tmp_path: Path) -> None:
    assert same(run(tmp_path / "new" / "folder"), whole)
    count = len(solved)
    assert count == 3 * len(whole.stats["trials"])
    assert same(run(tmp_path / "new" / "folder"), whole)
    assert len(solved) == count


def test_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    def start(**arguments: Any) -> Plan:
        given: dict[str, Any] = {"formulation": Volume(budget=0), "checkpoint_dir": tmp_path} | arguments
        return planned(**given)

    start()
    images, labels = calibration()
    tanh = nn.Sequential(*[nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in network()])
    others: list[dict[str, Any]] = [
        {"formulation": Volume(budget=0.1)},
        {"seed": 1},
        {"n_workers": P + 1},
        {"data": (images[1:], labels[1:])},
        {"output_owner": 1},
        {"worker_share": [1, 2, 1]},
        {"link_price": 2.0},
        {"input_owner": torch.arange(64) % P},
        {"pruner": "threshold"},
        {"finetune": TUNING},
        {"memory_limit": 1e9},
        {"look_ahead": False},
        {"partitioner": "contiguous"},
        {"loss": "squared_error", "data": images},
        {"model": tanh},
    ]
    for arguments in others:
        with pytest.raises(InvalidArgument, match="checkpoint_dir: got the folder of another run") as caught:
            start(**arguments)
        assert "\n" not in str(caught.value)


DAMAGE: list[Callable[[bytes], bytes]] = [
    lambda content: content[: len(content) // 2],
    lambda content: b"",
    lambda content: b"not an archive",
    lambda content: content[:200] + bytes(64) + content[264:],
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_layer_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    planned(Volume(budget=0), checkpoint_dir=tmp_path)
    (tmp_path / "round-1-plan.npz").rename(tmp_path / "kept")
    path = tmp_path / "round-1-trial-0-2.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidArgument, match=r"checkpoint_dir: got a damaged .*round-1-trial-0-2\.npz") as caught:
        planned(Volume(budget=0), checkpoint_dir=tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    assert planned(Volume(budget=0), checkpoint_dir=tmp_path).volume == 0


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe"])
def test_a_damaged_record_is_another_run(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(InvalidArgument, match="checkpoint_dir: got the folder of another run"):
        planned(Volume(budget=0), checkpoint_dir=tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="checkpoint_dir: got a file"):
        planned(Volume(budget=0), checkpoint_dir=tmp_path / "file")


if __name__ == "__main__":
    killed_run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
