"""The verb `simulate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_platform import two_workers

from repurpose_opt import cli
from repurpose_opt.cli.simulate import _PICTURES, _PLATFORMS, _WIRES, _layers_table
from repurpose_opt.platform.machine import PLATFORMS, edge
from repurpose_opt.platform.picture import SUFFIXES
from repurpose_opt.platform.timeline import simulate, simulate_direct
from repurpose_opt.runtime.storage import read_manifest
from repurpose_opt.runtime.wire import WIRES

Run = Callable[..., tuple[int, str, str]]
PLAIN = "operations = 1e9\nmemory_bandwidth = 1e12\nbandwidth = 1e9\nlatency = 10e-9\nmemory = [1000, 1]\n"
"""An operation and a byte a nanosecond, 10 ns a message."""


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `simulate plan` in a folder with a plan and a platform."""
    monkeypatch.chdir(tmp_path)
    two_workers().save("plan")
    Path("plain.toml").write_text(PLAIN)

    def run(*arguments: object, plan: str = "plan") -> tuple[int, str, str]:
        try:
            code = cli.main(["simulate", plan, *map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def figures(run: Run, *arguments: object) -> dict[str, Any]:
    code, out, err = run(*arguments, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    found: dict[str, Any] = json.loads(out)
    return found


def test_choices_are_those_of_the_library() -> None:
    """They are written out, as the command loads no PyTorch before it has to."""
    assert set(_WIRES) == set(WIRES) - {"float64"}
    assert set(_PLATFORMS) == set(PLATFORMS)
    assert _PICTURES == SUFFIXES


def test_json_is_what_the_library_says(run: Run) -> None:
    found = figures(run, "--batch-size", 2, "--platform", "plain.toml")
    assert found["seconds"] == pytest.approx(54e-9)  # by hand in test_platform.py
    assert found["communication_share"] == pytest.approx(36 / 54)
    assert (found["bytes"], found["messages"]) == (24, 3)
    assert found["direct"]["seconds"] == pytest.approx(66e-9)
    assert (found["direct"]["bytes"], found["direct"]["messages"]) == (32, 3)
    assert [layer["step"] for layer in found["layers"]] == ["0", "2", None]
    assert found["layers"][0]["compute"] == pytest.approx([12e-9, 8e-9])
    assert found["layers"][1]["communication"] == pytest.approx([14e-9, 18e-9])
    assert found["layers"][2] == {"step": None, "compute": [2e-9, 2e-9], "communication": [0, 0]} | {
        "bytes": 0,
        "messages": 0,
    }
    assert [worker["nanoseconds"] for worker in found["workers"]] == [54, 46]
    assert [worker["fits"] for worker in found["workers"]] == [True, False]
    assert [(piece["worker"], piece["kind"]) for piece in found["critical_path"]] == [
        (1, "send"),
        (1, "compute"),
        (1, "compute"),
        (1, "send"),
        (0, "compute"),
    ]
    assert (found["wire"], found["sends"], found["platform"]["name"]) == ("float32", "serial", "plain")
    assert "overhead of 0: not given" in found["assumptions"]
    assert (found["chakra"], found["astra_sim"], found["picture"]) == (None, None, None)


def test_options_reach_the_library(run: Run) -> None:
    found = figures(run, "--batch-size", 3, "--sends", "parallel", "--wire", "int8", "--picture", "time.svg")
    manifest = read_manifest(Path("plan"))
    arguments: Any = (manifest, edge(2), 3, "parallel", "int8")
    direct = simulate_direct(*arguments)
    assert direct is not None
    assert (found["seconds"], found["direct"]["seconds"]) == (simulate(*arguments).total, direct.total)
    assert (found["bytes"], found["sends"], found["wire"]) == (3 * (3 + 4), "parallel", "int8")
    assert found["assumptions"] == list(simulate(*arguments).assumptions)
    assert found["picture"] == "time.svg"
    assert Path("time.svg").read_text().startswith("<?xml")


def test_text(run: Run) -> None:
    code, out, err = run("--batch-size", 2, "--platform", "plain.toml")
    assert (code, err) == (0, "")
    for expected in (
        "plan              plan, 2 workers, batches of 2\n",
        "platform          plain, fully connected, serial sends\n",
        "a batch           54 ns, 66.7% of it communication; 24 bytes in 3 messages\n",
        "every value sent  66 ns, 66.7% of it communication; 32 bytes in 3 messages: 1.22 × the time\n",
        "memory            worker 1 cannot hold its ",
        "2             0               8 ns      14 ns            8      1\n",
        "(all others)  0               2 ns      0 ns             0      0\n",
        "worker 1 sends to 0  0     18 ns  33.3%\n",
        "assumed\n  overhead of 0: not given\n",
    ):
        assert expected in out, out


def test_the_slowest_worker_is_the_one_that_takes_longest_in_all() -> None:
    layer = {"step": "a", "compute": [2e-6, 0.0], "communication": [0.0, 5e-6], "bytes": 3000, "messages": 1}
    assert _layers_table([layer]).splitlines()[1].split() == ["a", "1", "0", "ns", "5", "µs", "3,000", "1"]


def test_chakra_and_astra_sim(run: Run, tmp_path: Path) -> None:
    binary = tmp_path / "astra"
    binary.write_text(
        "#!/bin/sh\necho 'sys[1] finished, 46 cycles, exposed'\necho 'sys[0] finished, 50 cycles, exposed'\n"
    )
    binary.chmod(0o755)
    arguments = ("--platform", "plain.toml", "--batch-size", 2, "--chakra", "traces")
    code, out, err = run(*arguments, "--astra-sim", "astra")
    assert (code, err) == (0, "")
    assert "ASTRA-sim         50 ns; workers differ by at most 4 ns\n" in out
    assert f"--workload-configuration={tmp_path}/traces/plan " in out
    found = figures(run, *arguments, "--astra-sim", binary)
    assert found["astra_sim"] == {"nanoseconds": [50, 46], "largest_difference": 4}
    names = {"plan.0.et", "plan.1.et", "network.yml", "system.json", "memory.json"}
    assert {path.name for path in (tmp_path / "traces").iterdir()} == names
    assert {Path(file).name for file in found["chakra"]["files"]} == names
    assert found["chakra"]["command"][0] == "AstraSim_Analytical_Congestion_Unaware"

    binary.write_text("#!/bin/sh\necho 'sys[1] finished, 46 cycles, exposed'\n")
    code, out, err = run(*arguments, "--astra-sim", "astra")
    assert (code, out) == (1, "")
    assert err.startswith("repurpose-opt: error: astra: worker 0 did not finish")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--platform", "cloud"), 2, "allowed: datacenter, edge or a file .toml"),
        (("--picture", "a.pdf"), 2, "a file .png or .svg"),
        (("--batch-size", "0"), 2, "a whole number ≥ 1"),
        (("--chakra", "traces", "--sends", "parallel"), 2, "--chakra needs --sends serial"),
        (("--astra-sim", "astra"), 2, "--astra-sim needs --chakra"),
        (("--platform", "none.toml"), 1, "none.toml: cannot be read"),
        (("--chakra", "plain.toml"), 1, "plain.toml, a file"),
        (("--picture", "none/a.png"), 1, "No such file or directory"),
    ],
)
def test_what_goes_wrong(run: Run, arguments: tuple[str, ...], code: int, reason: str) -> None:
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert reason in err.splitlines()[-1]


def test_no_plan(run: Run) -> None:
    code, out, err = run(plan="none")
    assert (code, out) == (1, "")
    assert err == "repurpose-opt: error: none/manifest.json: missing; a plan folder has one\n"
