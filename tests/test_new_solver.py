"""`new-solver`: its skeletons built, installed beside the core, found, solved with and put through their own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from repurpose_opt import cli
from repurpose_opt.cli.new_solver import skeleton

NAMES = {"partitioner": "noisy-rounds", "pruner": "noisy-worth"}
SOLVE = """
import sys
import numpy as np
from repurpose_opt import Edge, Lossless, Volume, solve_layer
kind, name = sys.argv[1:]
W = np.random.default_rng(0).normal(size=(40, 24))
for formulation in (Volume(budget=0.2), *([Edge(0.1, 0.05), Lossless()] if kind == "partitioner" else [])):
    solution = solve_layer(
        W, 4, formulation=formulation, capacity=[20, 10, 10, 5], time_limit=10, **{"partitioner": "random", kind: name}
    )
    random = solve_layer(W, 4, formulation=formulation, capacity=[20, 10, 10, 5], partitioner="random")
    assert solution.termination == "heuristic", solution.message
    assert solution.violations == ()
    assert solution.stats["stages"][0]["stage"] == (name if kind == "partitioner" else "random")
    assert solution.stats["pruner"] == name or kind == "partitioner"
    assert solution.objective <= random.objective or kind == "pruner", (formulation, random.objective)
print("solved")
"""


@dataclass(frozen=True)
class Installed:
    """A package as a third party would have it: its sources, its wheel, and the folder where pip put that."""

    name: str
    kind: str
    source: Path
    wheel: Path
    target: Path

    def run(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return run_with(self.target, *command, cwd=cwd or self.target)


def run_with(target: Path, *command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with the packages in `target` beside its own, so that the environment of the tests stays as it is."""
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=250
    )


def checked(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, f"{result.args} ended with {result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


def install(source: Path, target: Path) -> Path:
    """Build the wheel of a folder and install it into `target`; the wheel."""
    wheels = source.parent / f"{source.name}-wheels"
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, source)
    checked(run_with(target, *build, cwd=source.parent))
    (wheel,) = wheels.glob("*.whl")
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index", "--target", target)
    checked(run_with(target, *pip, wheel, cwd=source.parent))
    return wheel


@pytest.fixture(scope="module", params=NAMES)
def plug_in(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    kind, name = request.param, NAMES[request.param]
    folder = tmp_path_factory.mktemp(kind)
    source, target = folder / name, folder / "site"
    assert cli.main(["new-solver", name, "--kind", kind, "--output", str(source)]) == 0
    return Installed(name, kind, source, install(source, target), target)


# --- from the empty folder to the report


def test_the_package_is_one_module_and_one_entry_point(plug_in: Installed):
    module = plug_in.name.replace("-", "_") + "_"
    assert {path.name for path in plug_in.source.iterdir()} == {
        "pyproject.toml",
        f"{module}.py",
        f"test_{module[:-1]}.py",
    }
    with zipfile.ZipFile(plug_in.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (entry_points,) = (wheel.read(name).decode() for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert names == {f"{module}.py"}  # nothing of the core
    class_name = "".join(map(str.capitalize, plug_in.name.split("-")))
    assert entry_points.split() == [
        f"[repurpose_opt.{plug_in.kind}s]",
        plug_in.name,
        "=",
        f"{module}:{class_name}",
    ]


def test_it_is_listed(plug_in: Installed):
    listed = json.loads(checked(plug_in.run("-m", "repurpose_opt.cli", "solvers", "--json")))
    (entry,) = (entry for entry in listed if entry["name"] == plug_in.name)
    assert entry["kind"] == plug_in.kind
    assert entry["installed"] is True
    assert 20 < len(entry["summary"]) < 120
    assert {"contiguous", "threshold"} <= {entry["name"] for entry in listed}


def test_it_solves(plug_in: Installed):
    assert checked(plug_in.run("-c", SOLVE, plug_in.kind, plug_in.name)) == "solved\n"


# Enumerating codes takes most of the time.
@pytest.mark.parametrize("only", ["not codes and not mixed", pytest.param("test", marks=pytest.mark.slow)])
def test_its_own_tests_pass(plug_in: Installed, only: str):
    (own,) = plug_in.source.glob("test_*.py")
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={plug_in.source}", "-k", only)
    said = checked(plug_in.run("-m", "pytest", *options, own))
    passed = int(said.split(" passed")[0].split()[-1])
    assert passed > (380 if plug_in.kind == "partitioner" else 200)


def test_its_own_tests_fail_once_it_is_wrong(plug_in: Installed, tmp_path: Path):
    """The same package after a user's slip: nothing in its tests is for show."""
    for path in plug_in.source.iterdir():
        text = path.read_text()
        broken = text.replace("(termination, best.owner,", "(termination, 0 * owner,")
        broken = broken.replace("(termination, owner,", "(termination, 0 * owner,")
        (tmp_path / path.name).write_text(broken)
    (own,) = tmp_path.glob("test_*.py")
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", "valid-plain-volume-price", f"--rootdir={tmp_path}")
    result = run_with(tmp_path, "-m", "pytest", *options, own, cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "AssertionError" in result.stdout


def test_it_has_its_row_in_the_report(plug_in: Installed, tmp_path: Path):
    pytest.importorskip("jinja2")
    solver = plug_in.name if plug_in.kind == "partitioner" else f"compensated/{plug_in.name}"
    run = ("run", "tiny", "--only", "volume-price-*", "--solvers", f"{solver},contiguous", "--seeds", "1", "--json")
    said = json.loads(checked(plug_in.run("-m", "repurpose_opt.cli", "bench", *run, "--output", "of", cwd=tmp_path)))
    (own,) = (entry for entry in said["solvers"] if entry["solver"] == solver)
    assert (own["solves"], own["answered"], own["failures"], own["refused"]) == (3, 3, {}, 0)
    checked(plug_in.run("-m", "repurpose_opt.cli", "bench", "report", "of", cwd=tmp_path))
    assert f"| {solver} |" in (tmp_path / "of" / "report.md").read_text()
    assert f">{solver}<" in (tmp_path / "of" / "report.html").read_text()


# --- what is refused


@pytest.mark.parametrize(
    "name", ["", "Mine", "my_solver", "my solver", "1st", "-mine", "mine-", "my--own", "a+b", "../x", "m@0.3", "größe"]
)
def test_names_that_cannot_be_one(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["new-solver", "--output", str(tmp_path / "new"), "--", name])
    assert ended.value.code == 2
    assert f"NAME: got {name!r}; allowed: lower-case letters" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("name", ["contiguous", "group-omp", "auto"])
def test_names_that_are_taken(name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["new-solver", name, "--kind", kind, "--output", str(tmp_path / "new")]) == 1
    err = capsys.readouterr().err
    assert f"NAME: got {name!r}, which is taken" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["pyproject.toml", "mine_.py", "test_mine.py"])
def test_nothing_is_overwritten(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / file).write_text("precious")
    assert cli.main(["new-solver", "mine", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert file in err
    assert err.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(file, "precious")]


def test_an_output_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").write_text("precious")
    assert cli.main(["new-solver", "mine", "--output", str(tmp_path / "mine")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "mine").read_text() == "precious"


# --- what is said


def test_it_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new-solver", "mine"]) == 0
    out = capsys.readouterr().out
    written = [f"mine/{name}" for name in ("pyproject.toml", "mine_.py", "test_mine.py")]
    assert all((tmp_path / name).is_file() for name in written)
    commands = ["cd mine", "pip install -e .", "pytest", "repurpose-opt bench run tiny --solvers mine,contiguous "]
    places = [out.index(f"  {text}") for text in [*written, *commands, "repurpose-opt bench report"]]
    assert places == sorted(places)


def test_files_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["new-solver", "mine", "--kind", "pruner", "--output", str(tmp_path / "a b"), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert sorted(listed) == sorted(str(path) for path in (tmp_path / "a b").iterdir())


# --- two packages of one name


@pytest.fixture(scope="module")
def run_with_a_clash(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python where a plug-in is installed that calls itself `contiguous`, as one of the core's does."""
    folder = tmp_path_factory.mktemp("clash")
    source, target = folder / "contiguous", folder / "site"
    source.mkdir()
    for name, text in skeleton("contiguous", "partitioner").items():
        (source / name).write_text(text)
    install(source, target)
    return lambda *command: run_with(target, *command, cwd=folder)


def test_a_name_that_two_packages_have_is_refused(
    run_with_a_clash: Callable[..., subprocess.CompletedProcess[str]],
):
    script = "import numpy as np, repurpose_opt as r; r.solve_layer(np.eye(4), 2, partitioner={!r})"
    result = run_with_a_clash("-c", script.format("random+contiguous"))
    assert result.returncode == 1
    error = result.stderr.strip().split("\n")[-1]
    for part in ("DuplicateSolver", "'contiguous'", "contiguous_:Contiguous", "repurpose-opt-contiguous", "uninstall"):
        assert part in error
    checked(run_with_a_clash("-c", script.format("munkres")))
    checked(run_with_a_clash("-c", script.format("auto")))


def test_a_name_that_two_packages_have_is_listed_as_such(
    run_with_a_clash: Callable[..., subprocess.CompletedProcess[str]],
):
    listed = json.loads(checked(run_with_a_clash("-m", "repurpose_opt.cli", "solvers", "--json")))
    entries = {entry["name"]: entry for entry in listed}
    assert entries["munkres"]["installed"] is True
    assert entries["contiguous"]["installed"] is False
    assert "registered twice" in entries["contiguous"]["summary"]
    table = checked(run_with_a_clash("-m", "repurpose_opt.cli", "solvers"))
    (line,) = (line for line in table.split("\n") if line.split()[:2] == ["partitioner", "contiguous"])
    assert line.split()[2] == "unusable"
