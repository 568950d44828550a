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


def install(sources: list[Path], target: Path) -> list[Path]:
    """Build the wheels of some folders and install them into `target`; the wheels."""
    wheels = []
    for source in sources:
        folder = source.parent / f"{source.name}-wheels"
        build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
        checked(run_with(target, *build, cwd=source.parent))
        wheels += folder.glob("*.whl")
    assert len(wheels) == len(sources)
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-index", "--target", target)
    checked(run_with(target, *pip, *wheels, cwd=target.parent))
    return wheels


@pytest.fixture(scope="module")
def plug_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Installed]:
    """A package of each kind, side by side."""
    folder = tmp_path_factory.mktemp("plug-ins")
    sources = {kind: folder / name for kind, name in NAMES.items()}
    for kind, source in sources.items():
        assert cli.main(["new-solver", source.name, "--kind", kind, "--output", str(source)]) == 0
    wheels = install([*sources.values()], folder / "site")
    return {
        kind: Installed(source.name, kind, source, wheel, folder / "site")
        for (kind, source), wheel in zip(sources.items(), wheels, strict=True)
    }


@pytest.fixture(params=NAMES)
def plug_in(request: pytest.FixtureRequest, plug_ins: dict[str, Installed]) -> Installed:
    return plug_ins[request.param]


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


def test_they_are_listed(plug_ins: dict[str, Installed]):
    listed = json.loads(checked(plug_ins["pruner"].run("-m", "repurpose_opt.cli", "solvers", "--json")))
    for plug_in in plug_ins.values():
        (entry,) = (entry for entry in listed if entry["name"] == plug_in.name)
        assert entry["kind"] == plug_in.kind
        assert entry["installed"] is True
        assert 20 < len(entry["summary"]) < 120
    assert {"contiguous", "threshold"} <= {entry["name"] for entry in listed}


def test_it_solves(plug_in: Installed):
    assert checked(plug_in.run("-c", SOLVE, plug_in.kind, plug_in.name)) == "solved\n"


# Enumerating placements takes most of the time: a layer for each check, of two formulations.
SOME = "found or declared or " + " and ".join(
    ["(lossless or volume-price)", "not codes", "(not oracle or correlated)", "(not valid or plain)"]
)


@pytest.mark.parametrize(
    ("only", "least"), [(SOME, 60), pytest.param("test", 580, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_their_own_tests_pass(plug_ins: dict[str, Installed], only: str, least: int):
    tests = [test for plug_in in plug_ins.values() for test in plug_in.source.glob("test_*.py")]
    options = (
        "-q",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        f"--rootdir={tests[0].parents[1]}",
        "-k",
        only,
    )
    said = checked(plug_ins["pruner"].run("-m", "pytest", *options, *tests))
    passed = int(said.split(" passed")[0].split()[-1])
    assert passed > least


def test_their_own_tests_fail_once_they_are_wrong(plug_ins: dict[str, Installed], tmp_path: Path):
    """The same packages after a user's slip: nothing in their tests is for show."""
    for path in (path for plug_in in plug_ins.values() for path in plug_in.source.glob("*.py")):
        text = path.read_text()
        broken = text.replace("(termination, best.owner,", "(termination, 0 * owner,")
        broken = broken.replace("(termination, owner,", "(termination, 0 * owner,")
        (tmp_path / path.name).write_text(broken)
    options = ("-q", "-p", "no:cacheprovider", "-k", "valid-plain-volume-price", f"--rootdir={tmp_path}")
    result = run_with(tmp_path, "-m", "pytest", *options, *tmp_path.glob("test_*.py"), cwd=tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "AssertionError" in result.stdout
    for name in NAMES.values():
        assert f"FAILED test_{name.replace('-', '_')}.py" in result.stdout


def test_they_have_their_rows_in_the_report(plug_ins: dict[str, Installed], tmp_path: Path):
    pytest.importorskip("jinja2")
    bench = ("-m", "repurpose_opt.cli", "bench")
    solvers = (NAMES["partitioner"], f"compensated/{NAMES['pruner']}")
    run = ("run", "tiny", "--only", "volume-price-*", "--solvers", ",".join(solvers), "--seeds", "1", "--jobs", "1")
    python = plug_ins["partitioner"].run
    said = json.loads(checked(python(*bench, *run, "--json", "--output", "of", cwd=tmp_path)))
    checked(python(*bench, "report", "of", cwd=tmp_path))
    for solver in solvers:
        (own,) = (entry for entry in said["solvers"] if entry["solver"] == solver)
        assert (own["solves"], own["answered"], own["failures"], own["refused"]) == (3, 3, {}, 0)
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
    install([source], target)
    return lambda *command: run_with(target, *command, cwd=folder)


def test_a_name_that_two_packages_have_is_refused(
    run_with_a_clash: Callable[..., subprocess.CompletedProcess[str]],
):
    script = "import numpy as np, repurpose_opt as r\n"
    script += "for name in ('munkres', 'auto', 'random+contiguous'):\n"
    script += "    r.solve_layer(np.eye(4), 2, partitioner=name)\n    print(name)"
    result = run_with_a_clash("-c", script)
    assert (result.returncode, result.stdout.split()) == (1, ["munkres", "auto"])
    error = result.stderr.strip().split("\n")[-1]
    for part in ("DuplicateSolver", "'contiguous'", "contiguous_:Contiguous", "repurpose-opt-contiguous", "uninstall"):
        assert part in error


def test_a_name_that_two_packages_have_is_listed_as_such(
    run_with_a_clash: Callable[..., subprocess.CompletedProcess[str]],
):
    script = "from repurpose_opt.cli import main; main(['solvers', '--json']); main(['solvers'])"
    said = checked(run_with_a_clash("-c", script))
    listed, end = json.JSONDecoder().raw_decode(said)
    entries = {entry["name"]: entry for entry in listed}
    assert entries["munkres"]["installed"] is True
    assert entries["contiguous"]["installed"] is False
    assert "registered twice" in entries["contiguous"]["summary"]
    (line,) = (line for line in said[end:].split("\n") if line.split()[:2] == ["partitioner", "contiguous"])
    assert line.split()[2] == "unusable"
