"""The wheel, built and installed into an empty environment."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("repurpose_opt", "repurpose_opt_solvers", "repurpose_opt_benchmarks")

SCRIPT = """
import sys
import numpy as np
import repurpose_opt
from repurpose_opt import Edge

weight = np.random.default_rng(0).normal(size=(12, 8))
before = weight.copy()
solution = repurpose_opt.solve_layer(
    weight, 4, formulation=Edge(weight_price=0.1, transfer_price=0.05), partitioner="munkres"
)
assert np.bincount(solution.owner, minlength=4).tolist() == [3, 3, 3, 3], solution.owner
assert np.isfinite(solution.objective)
assert not solution.violations, solution.violations
assert (weight == before).all()
assert not {"torch", "cvxpy", "ortools"} & set(sys.modules)
print("solved")
"""


def run(*command: object, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(n.split("/")[0] for n in names if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = configparser.ConfigParser(delimiters="=")
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())

    assert {n.split("/")[0] for n in names} == {*PACKAGES, info}
    assert {f"{p}/__init__.py" for p in PACKAGES} <= names
    assert {"repurpose_opt/py.typed", "repurpose_opt_solvers/py.typed"} <= names
    assert f"{info}/licenses/LICENSE" in names

    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(r.partition(">")[0].strip() for r in required) == ["numpy", "scipy"]

    groups = {"partitioners", "pruners", "formulations", "testsets"}
    assert {f"repurpose_opt.{g}" for g in groups} | {"console_scripts"} <= set(entry_points.sections())
    for group in entry_points.sections():
        for name, target in entry_points[group].items():
            module = target.partition(":")[0].replace(".", "/")
            assert {f"{module}.py", f"{module}/__init__.py"} & names, f"{group}: {name} = {target}"


@pytest.mark.timeout(900)
def test_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=cwd)
    python, command = (tmp_path / "venv" / "bin" / n for n in ("python", "repurpose-opt"))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel, cwd=cwd)

    installed = {p["name"]: p["version"] for p in json.loads(run(*pip, "list", "--format=json", cwd=cwd))}
    assert set(installed) == {"numpy", "scipy", "repurpose-opt"}
    assert installed["repurpose-opt"] in run(command, "--version", cwd=cwd)

    solvers = {s["name"]: s for s in json.loads(run(command, "solvers", "--json", cwd=cwd))}
    assert {"contiguous", "munkres", "flow", "metis", "threshold", "group-omp"} <= set(solvers)
    assert all(s["kind"] for s in solvers.values())
    assert solvers["munkres"]["installed"] is True
    assert solvers["flow"]["installed"] is False
    assert "install" in solvers["flow"]["install"]
    assert "ortools" in solvers["flow"]["install"]

    testsets = {t["name"]: t for t in json.loads(run(command, "bench", "list", "--json", cwd=cwd))}
    assert {"tiny", "edge-random", "lossless-random"} <= set(testsets)
    assert all(t["title"] and t["description"] for t in testsets.values())

    assert run(python, "-c", SCRIPT, cwd=cwd).strip() == "solved"
