"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import io, sparse

import repurpose_opt
from repurpose_opt import Edge, LayerProblem, Lossless, Volume, cli, solve_layer
from repurpose_opt.formats import write_hgr, write_metis, write_mps
from repurpose_opt.linear_model import linear_model

COMMAND = (sys.executable, "-m", "repurpose_opt.cli")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs the command in a folder of its own: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def weight(tmp_path: Path) -> np.ndarray:
    """(12, 10), also in layer.npy."""
    made = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)
    np.save(tmp_path / "layer.npy", made)
    return made


def failed(code: int, out: str, err: str) -> str:
    """The message of a run that failed as it should."""
    assert code == 1
    assert out == ""
    assert err.startswith("repurpose-opt: error: ")
    assert err.count("\n") == 1
    return err


# --- all verbs


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from parsers(verb)


@pytest.mark.parametrize("parser", list(parsers(cli._parser())), ids=lambda parser: parser.prog)
def test_help_explains_every_option(parser: argparse.ArgumentParser, run: Run) -> None:
    code, out, err = run(*parser.prog.split()[1:], "--help")
    assert (code, err) == (0, "")
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action
        assert all(option in out for option in action.option_strings)


def test_verbs() -> None:
    verbs = [parser.prog for parser in parsers(cli._parser())]
    expected = ["", " demo", " solve", " run", " worker", " simulate", " export", " solvers"]
    expected += [" bench", *(f" bench {verb}" for verb in ("list", "run", "check", "report", "export", "compare"))]
    expected += [" new-solver"]
    assert verbs == [f"repurpose-opt{verb}" for verb in expected]


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"repurpose-opt {repurpose_opt.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("bench",),
        ("solve", "layer.npy"),
        ("solve", "--workers", "2"),
        ("solve", "layer.npy", "--workers", "0"),
        ("solve", "layer.npy", "--workers", "two"),
        ("solve", "layer.npy", "--workers", "2", "--budget", "0.1", "--max-nmse", "0.1"),
        ("solve", "layer.npy", "--workers", "2", "--budget-bytes", "8", "--transfer-price", "1"),
        ("solve", "layer.npy", "--workers", "2", "--inputs", "x.npy", "--second-moment", "c.npy"),
        ("solve", "layer.npy", "--workers", "2", "--budget", "1.1"),
        ("solve", "layer.npy", "--workers", "2", "--budget", "nan"),
        ("solve", "layer.npy", "--workers", "2", "--transfer-price", "-1"),
        ("solve", "layer.npy", "--workers", "2", "--weight-price", "inf"),
        ("solve", "layer.npy", "--workers", "2", "--time-limit", "0"),
        ("solve", "layer.npy", "--workers", "2", "--seed", "-1"),
        ("solve", "layer.npy", "--workers", "2", "--capacity", "3,x"),
        ("solve", "layer.npy", "--workers", "2", "--formulation", "nonsense"),
        ("solve", "layer.npy", "--workers", "2", "--formulation", "edge"),
        ("solve", "layer.npy", "--workers", "2", "--formulation", "edge", "--budget", "0.1"),
        ("solve", "layer.npy", "--workers", "2", "--formulation", "lossless", "--budget", "0.1"),
        ("solve", "layer.npy", "--workers", "2", "--formulation", "volume", "--weight-price", "1"),
        ("solve", "layer.npy", "--workers", "2", "--output", "layer.npy"),
        ("solve", "layer.npy", "--workers", "2", "--rebalance"),
        ("solve", "layer.npy", "--workers", "2", "--read-partition", "p", "--start", "s.npy"),
        ("export", "layer.npy", "--workers", "2"),
        ("export", "layer.npy", "--workers", "2", "--to", "nonsense"),
        ("export", "layer.npy", "--workers", "2", "--to", "hgr", "--output", "layer.npy"),
        ("demo", "--budget", "2"),
        ("demo", "--seeds", "0"),
    ],
)
@pytest.mark.usefixtures("weight")
def test_wrong_usage(arguments: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: repurpose-opt")
    assert "error: " in err.splitlines()[-1]


def test_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, weight: np.ndarray) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("repurpose_opt.cli.solve.solve_problem", interrupted)
    assert run("solve", "layer.npy", "--workers", 2) == (130, "", "repurpose-opt: interrupted\n")


def test_reader_that_leaves_early() -> None:
    with subprocess.Popen([*COMMAND, "solvers"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_command_loads_no_backend(tmp_path: Path) -> None:
    code = (
        "import sys, repurpose_opt.cli as cli; cli.main(['solvers']); cli.main(['bench', 'list']);"
        "sys.exit(', '.join({'torch', 'cvxpy', 'ortools', 'pymetis', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


# --- solvers, bench, demo


def test_solvers_as_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repurpose_opt.registry.find_spec", lambda name: None if name == "ortools" else name)
    code, out, err = run("solvers", "--json")
    assert (code, err) == (0, "")
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert {"flow", "munkres", "metis", "threshold", "group-omp", "edge", "volume", "lossless"} <= set(found)
    assert all(set(e) == {"name", "kind", "summary", "installed", "requires", "install"} for e in found.values())
    assert all(entry["summary"] for entry in found.values())
    assert {entry["kind"] for entry in found.values()} == {"partitioner", "pruner", "formulation"}
    assert (found["munkres"]["installed"], found["munkres"]["install"]) == (True, None)
    assert (found["flow"]["installed"], found["flow"]["requires"]) == (False, ["ortools"])
    assert found["flow"]["install"] == "pip install ortools"


def test_solvers_as_text(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repurpose_opt.registry.find_spec", lambda name: None if name == "ortools" else name)
    code, out, err = run("solvers")
    assert (code, err) == (0, "")
    assert any(line.split()[:3] == ["partitioner", "flow", "missing"] for line in out.splitlines())
    assert any(line.split()[:3] == ["partitioner", "munkres", "installed"] for line in out.splitlines())
    assert "pip install ortools" in out


def test_bench_list(run: Run) -> None:
    code, out, err = run("bench", "list", "--json")
    assert (code, err) == (0, "")
    found = {entry["name"]: entry for entry in json.loads(out)}
    assert {"tiny", "edge-random", "lossless-random"} <= set(found)
    columns = {"name", "title", "description", "instances", "install", "error"}
    assert all(set(entry) == columns for entry in found.values())
    assert all(isinstance(entry["instances"], int) and entry["instances"] > 0 for entry in found.values())
    code, out, err = run("bench", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", *sorted(found)]


def test_demo_hands_its_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    fake = types.ModuleType("repurpose_opt.demo.run")
    fake.run_demo = lambda *args, **kwargs: calls.append((args, kwargs))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "repurpose_opt.demo.run", fake)
    assert run("demo") == (0, "", "")
    budgets = ("--budget", 0.05, "--codes-budget", 0.02)
    assert run("demo", "--output", "d", "--mnist-dir", "m", *budgets, "--seeds", 3, "--seed", 7, "--json")[0] == 0
    defaults = {"mnist_directory": None, "budget": 0.01, "codes_budget": 0.0045, "seeds": 1, "seed": 0}
    given = {"mnist_directory": Path("m"), "budget": 0.05, "codes_budget": 0.02, "seeds": 3, "seed": 7}
    defaults, given = defaults | {"as_json": False}, given | {"as_json": True}
    assert calls == [((Path("demo-report"),), defaults), ((Path("d"),), given)]


def test_demo_without_its_packages_names_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "repurpose_opt.demo.run":
                raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.delitem(sys.modules, "repurpose_opt.demo.run", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    assert "demo needs torch: pip install torch" in failed(*run("demo"))


# --- solve


def test_solve_prints_a_table_and_writes_the_solution(run: Run, weight: np.ndarray) -> None:
    code, out, err = run("solve", "layer.npy", "--workers", 3, "--budget", 0.2)
    assert (code, err) == (0, "")
    for word in ("termination", "objective", "bound", "gap", "NMSE", "of direct", "busiest", "violations", "seconds"):
        assert word in out
    assert "compensated" in out
    with np.load("layer.npy.solution.npz") as written:
        assert written["owner"].shape == (12,)
        assert written["transfers"].shape == (10, 3)
        assert written["transfers"].dtype == bool
        assert written["weight"].shape == weight.shape
        assert written["weight"].dtype == weight.dtype
        assert written["bias"].shape == (12,)
        assert json.loads(str(written["metadata"]))["volume_fraction"] <= 0.2
    assert [path.name for path in Path().iterdir() if path.suffix == ".part"] == []


def test_solve_as_json_equals_solve_layer(run: Run, weight: np.ndarray) -> None:
    arguments = ("solve", "layer.npy", "--workers", 3, "--weight-price", 0.01, "--transfer-price", 0.05)
    code, out, err = run(*arguments, "--partitioner", "munkres", "--json", "--output", "s.npz")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    expected = solve_layer(weight, 3, formulation=Edge(0.01, 0.05), partitioner="munkres")
    assert figures["termination"] == "optimal"
    assert figures["objective"] == pytest.approx(expected.objective)
    assert figures["gap"] == pytest.approx(0, abs=1e-9)
    assert figures["nmse"] == pytest.approx(expected.nmse)
    assert (figures["volume"], figures["busiest"]) == (expected.volume, expected.busiest)
    assert figures["volume_fraction"] == expected.volume / expected.problem.direct_volume
    assert figures["violations"] == []
    assert [stage["stage"] for stage in figures["stages"]] == ["munkres"]
    assert all(stage["seconds"] >= 0 for stage in figures["stages"])
    with np.load("s.npz") as written:
        np.testing.assert_array_equal(written["owner"], expected.owner)
        np.testing.assert_array_equal(written["transfers"], expected.transfers)
        np.testing.assert_array_equal(written["weight"], expected.weight)
        assert json.loads(str(written["metadata"])) == figures


@pytest.mark.parametrize(
    ("options", "formulation"),
    [
        ((), {"name": "volume", "budget": 0.1}),
        (("--formulation", "volume"), {"name": "volume", "budget": 0.1}),
        (("--budget-bytes", 16), {"name": "volume", "budget_bytes": 16.0}),
        (("--transfer-price", 0.1), {"name": "volume", "transfer_price": 0.1}),
        (("--max-nmse", 0.5), {"name": "volume", "max_nmse": 0.5}),
        (("--weight-price", 0.1), {"name": "edge", "weight_price": 0.1, "transfer_price": 0.0}),
        (
            ("--formulation", "edge", "--transfer-price", 0.1),
            {"name": "edge", "weight_price": 0.0, "transfer_price": 0.1},
        ),
        (("--formulation", "lossless"), {"name": "lossless"}),
    ],
)
@pytest.mark.usefixtures("weight")
def test_formulation_follows_from_the_options(
    options: tuple[object, ...], formulation: dict[str, object], run: Run
) -> None:
    code, out, _ = run("solve", "layer.npy", "--workers", 2, *options, "--json")
    assert code == 0
    defaults: dict[str, object] = {"communication": "total"}
    if formulation["name"] != "edge":
        defaults |= {"messages": "values"}
    if formulation["name"] == "volume":
        defaults |= {"mac_price": 0.0}
    assert json.loads(out)["formulation"] == {**defaults, **formulation}


def test_solve_uses_all_its_files(run: Run, weight: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    owner, start = rng.permutation([0] * 5 + [1] * 5), np.array([0] * 4 + [1] * 8)
    allowed = np.ones((12, 2), dtype=bool)
    allowed[0, 0] = False
    start[0] = 1
    files = {"input-owner": owner, "allowed": allowed, "start": start, "bias": rng.normal(size=12)}
    files["inputs"] = rng.normal(size=(50, 10)) + 1
    files["link-price"] = rng.uniform(1, 2, size=(2, 2))
    options: list[object] = []
    for name, array in files.items():
        np.save(f"{name}.npy", array)
        options += [f"--{name}", f"{name}.npy"]
    code, out, err = run("solve", "layer.npy", "--workers", 2, "--capacity", "4,10", *options, "--json")
    assert (code, err) == (0, "")
    keywords: dict[str, Any] = {name.replace("-", "_"): array for name, array in files.items()}
    expected = solve_layer(weight, 2, capacity=[4, 10], **keywords)
    assert expected.bias is not None
    assert json.loads(out)["objective"] == pytest.approx(expected.objective)
    with np.load("layer.npy.solution.npz") as written:
        np.testing.assert_array_equal(written["owner"], expected.owner)
        np.testing.assert_allclose(written["bias"], expected.bias)


def test_one_capacity_counts_for_every_worker(run: Run, weight: np.ndarray) -> None:
    code, out, _ = run("solve", "layer.npy", "--workers", 3, "--capacity", 6, "--json")
    assert code == 0
    assert max(json.loads(out)["neurons_per_worker"]) <= 6


def test_second_moment(run: Run, weight: np.ndarray) -> None:
    np.save("c.npy", np.arange(1.0, 11.0))
    code, out, _ = run("solve", "layer.npy", "--workers", 3, "--second-moment", "c.npy", "--json")
    assert code == 0
    assert json.loads(out)["nmse"] == pytest.approx(solve_layer(weight, 3, second_moment=np.arange(1.0, 11.0)).nmse)


def test_kinds_of_files(run: Run, weight: np.ndarray) -> None:
    np.savez("one.npz", anything=weight)
    np.savez("two.npz", weight=weight, bias=weight[:, 0])
    np.savez("more.npz", first=weight, second=weight.T)
    sparse.save_npz("sparse.npz", sparse.csr_array(weight))
    io.mmwrite("market.mtx", sparse.coo_array(weight))
    io.mmwrite("dense.mtx", weight)
    files: list[tuple[object, ...]] = [("layer.npy",), ("one.npz",), ("two.npz",), ("two.npz", "--key", "weight")]
    files += [("more.npz", "--key", "first"), ("sparse.npz",), ("market.mtx",), ("dense.mtx",)]
    nmse = []
    for file in files:
        code, out, err = run("solve", *file, "--workers", 3, "--partitioner", "contiguous", "--json")
        assert (code, err) == (0, ""), file
        nmse.append(json.loads(out)["nmse"])
    np.testing.assert_allclose(nmse, nmse[0], rtol=1e-6)
    with np.load("sparse.npz.solution.npz") as written:
        parts = tuple(written[f"weight_{name}"] for name in ("data", "indices", "indptr"))
        kept = sparse.csr_array(parts, shape=tuple(written["weight_shape"])).toarray()
    with np.load("layer.npy.solution.npz") as written:
        np.testing.assert_allclose(kept, written["weight"], rtol=1e-6)


def test_safetensors(run: Run, weight: np.ndarray) -> None:
    numpy_files = pytest.importorskip("safetensors.numpy")
    numpy_files.save_file({"fc.weight": weight, "fc.bias": weight[:, 0].copy()}, "model.safetensors")
    code, out, err = run("solve", "model.safetensors", "--workers", 3, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["neurons"] == 12
    numpy_files.save_file({"a": weight, "b": weight}, "two.safetensors")
    assert run("solve", "two.safetensors", "--key", "b", "--workers", 3)[0] == 0
    assert "--key: got none; allowed: one of a, b" in failed(*run("solve", "two.safetensors", "--workers", 3))
    assert "'c'" in failed(*run("solve", "two.safetensors", "--workers", 3, "--key", "c"))


@pytest.mark.parametrize("numpy_knows", [False, True])
def test_bfloat16_safetensors(run: Run, weight: np.ndarray, numpy_knows: bool) -> None:
    if numpy_knows:
        pytest.importorskip("ml_dtypes", reason="adds bfloat16 to NumPy")
    torch = pytest.importorskip("torch")
    torch_files = pytest.importorskip("safetensors.torch")
    torch_files.save_file({"w": torch.from_numpy(weight).bfloat16()}, "half.safetensors")
    code, out, err = run("solve", "half.safetensors", "--workers", 2, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["direct_volume"] == 10 * 2


@pytest.mark.usefixtures("weight")
class TestBadFiles:
    def test_weight(self, run: Run, tmp_path: Path) -> None:
        good = (tmp_path / "layer.npy").read_bytes()
        np.savez("good.npz", w=np.ones((2, 2)), v=np.ones((2, 2)))
        np.save("objects.npy", np.array([{}, None], dtype=object), allow_pickle=True)
        np.savez("objects.npz", w=np.array([{}, None], dtype=object))
        np.save("complex.npy", np.ones((2, 2), dtype=complex))
        np.save("text.npy", np.array([["a"]]))
        np.save("flat.npy", np.ones(4))
        np.save("nan.npy", np.full((2, 2), np.nan))
        content = {
            "truncated.npy": good[:-5],
            "headless.npy": good[:9],
            "empty.npy": b"",
            "noise.npy": b"no array at all",
            "noise.npz": b"PK\x03\x04 no archive",
            "truncated.npz": Path("good.npz").read_bytes()[:-30],
            "archive.npy": Path("good.npz").read_bytes(),
            "noise.safetensors": b"\xff" * 40,
            "empty.safetensors": b"",
            "noise.mtx": b"no matrix",
            "truncated.mtx": b"%%MatrixMarket matrix coordinate real general\n3 3 3\n1 1 1.0\n",
            "layer.pt": b"",
        }
        for name, data in content.items():
            Path(name).write_bytes(data)
        Path("folder.npy").mkdir()
        others = ["absent.npy", "folder.npy", "layer", "good.npz", "objects.npy", "objects.npz", "complex.npy"]
        for name in [*content, *others, "text.npy", "flat.npy", "nan.npy"]:
            message = failed(*run("solve", name, "--workers", 2))
            assert "allowed: " in message, message
        assert list(tmp_path.glob("*.solution.npz")) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("good.npz", "--key", "x"), "--key: got 'x'; allowed: one of w, v"),
            (("layer.npy", "--key", "x"), "--key: got 'x' for layer.npy; allowed: keys for .npz and .safetensors"),
            (("layer.npy", "--inputs", "absent.npy"), "--inputs: got absent.npy, which is no file"),
            (("layer.npy", "--inputs", "good.npz"), "--inputs: got good.npz; allowed: a .npy file"),
            (("layer.npy", "--inputs", "text.npy"), "--inputs: got dtype <U1"),
            (("layer.npy", "--inputs", "layer.npy", "--input-owner", "layer.npy"), "input_owner: got dtype float32"),
            (("layer.npy", "--second-moment", "layer.npy"), "second_moment: got shape (12, 10)"),
            (("layer.npy", "--capacity", "1,1"), "capacity: got 2 in all; allowed: at least the total load, 12"),
            (("layer.npy", "--capacity", "1,1,1"), "capacity: got shape (3,); allowed: shape (2,)"),
            (("layer.npy", "--partitioner", "nonsense"), "partitioner 'nonsense' is unknown; known: "),
            (("layer.npy", "--partitioner", "brute-force+"), "partitioner '' is unknown"),
            (("layer.npy", "--pruner", "nonsense"), "pruner 'nonsense' is unknown"),
            (("layer.npy", "--output", "no/where.npz"), "--output: got no/where.npz, in a folder that does not exist"),
            (("layer.npy", "--output", "."), "--output: "),
        ],
    )
    def test_other_arguments(self, arguments: tuple[str, ...], message: str, run: Run) -> None:
        np.savez("good.npz", w=np.ones((2, 2)), v=np.ones((2, 2)))
        np.save("text.npy", np.array([["a"]]))
        assert message in failed(*run("solve", *arguments, "--workers", 2))


def test_solve_without_an_answer_fails(run: Run, weight: np.ndarray) -> None:
    np.save("big.npy", np.ones((40, 4)))
    message = failed(*run("solve", "big.npy", "--workers", 4, "--partitioner", "brute-force"))
    assert "unsupported" in message
    assert "cases to enumerate" in message
    allowed = np.ones((12, 2), dtype=bool)
    allowed[:7, 1] = False
    np.save("allowed.npy", allowed)
    assert "infeasible" in failed(*run("solve", "layer.npy", "--workers", 2, "--allowed", "allowed.npy"))
    assert not Path("layer.npy.solution.npz").exists()


def test_solution_that_breaks_a_limit_is_written_and_fails(
    run: Run, weight: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends_much = solve_layer(weight, 2, formulation=Volume(budget=1.0))
    broken = replace(sends_much, formulation=Volume(budget=0.0))
    monkeypatch.setattr("repurpose_opt.cli.solve.solve_problem", lambda *_, **__: broken)
    code, out, err = run("solve", "layer.npy", "--workers", 2, "--budget", 0, "--json")
    assert code == 1
    assert "above the budget" in json.loads(out)["violations"][0]
    assert err.startswith("repurpose-opt: error: the solution is not valid: volume ")
    assert err.count("\n") == 1
    assert Path("layer.npy.solution.npz").exists()


# --- export, and reading an answer back


LOSSLESS = ("layer.npy", "--workers", 3, "--formulation", "lossless")


@pytest.mark.usefixtures("weight")
def test_export_writes_what_the_library_writes(run: Run, weight: np.ndarray) -> None:
    problem = LayerProblem.create(weight, 3)
    hypergraph = Lossless().hypergraph(problem)
    writers: dict[str, Callable[[str], Any]] = {
        "hgr": lambda path: write_hgr(path, problem, hypergraph),
        "metis": lambda path: write_metis(path, problem, hypergraph),
        "mps": lambda path: write_mps(path, linear_model(problem, hypergraph)),
    }
    for kind, write in writers.items():
        code, out, err = run("export", *LOSSLESS, "--to", kind, "--output", "written", "--json")
        assert (code, err) == (0, "")
        figures = json.loads(out)
        expected = write("expected")
        assert figures["files"] == [file.name.replace("expected", "written") for file in expected.files]
        for name, file in zip(figures["files"], expected.files, strict=True):
            assert Path(name).read_bytes() == file.read_bytes()
        assert figures.items() >= expected.size.items()
        assert (figures["format"], figures["is_exact"], figures["unit"]) == (kind, expected.is_exact, expected.unit)


@pytest.mark.usefixtures("weight")
def test_export_names_and_prints_its_files(run: Run) -> None:
    names = {"hgr": [".hgr", ".hgr.fix", ".hgr.targets"], "metis": [".graph", ".graph.tpwgts"], "mps": [".mps"]}
    for kind, suffixes in names.items():
        code, out, err = run("export", *LOSSLESS, "--to", kind, "--min-load", 1)
        assert (code, err) == (0, "")
        for suffix in suffixes:
            assert f"layer.npy{suffix}" in out.split()
            assert Path(f"layer.npy{suffix}").is_file()
        assert ("left out" in out) == (kind != "mps")


def test_export_takes_the_whole_instance(run: Run, weight: np.ndarray) -> None:
    arrays: dict[str, Any] = {
        "input_owner": np.arange(10) % 2,
        "load": 1 + np.arange(12) % 2,
        "allowed": np.arange(24).reshape(12, 2) != 5,
        "value_bytes": np.arange(10),
        "link_price": np.array([[0, 2], [3, 0]]),
    }
    options: list[object] = []
    for name, array in arrays.items():
        np.save(f"{name}.npy", array)
        options += [f"--{name.replace('_', '-')}", f"{name}.npy"]
    command = ("export", "layer.npy", "--workers", 2, "--to", "mps", "--transfer-price", 0.1, "--output", "written.mps")
    assert run(*command, *options, "--capacity", "12,9", "--min-load", "0,3")[0] == 0
    problem = LayerProblem.create(weight, 2, **arrays, capacity=[12, 9], min_load=[0, 3])
    hypergraph = Volume(transfer_price=0.1).hypergraph(problem)
    assert hypergraph is not None
    write_mps("expected.mps", linear_model(problem, hypergraph))
    assert Path("written.mps").read_bytes() == Path("expected.mps").read_bytes()


def test_export_of_a_budget(run: Run, weight: np.ndarray) -> None:
    command = ("export", "layer.npy", "--workers", 2, "--budget-bytes", 12)
    code, out, _ = run(*command, "--to", "mps", "--json")
    assert (code, json.loads(out)["is_exact"]) == (0, True)
    assert " 12.0" in Path("layer.npy.mps").read_text()
    message = failed(*run(*command, "--to", "hgr"))
    assert "--formulation: got volume, whose costs are no sum over values and neurons as given" in message
    np.save("start.npy", np.arange(12) % 2)
    code, out, _ = run(*command, "--to", "hgr", "--start", "start.npy", "--json")
    assert (code, json.loads(out)["is_exact"]) == (0, False)
    np.save("start.npy", np.zeros(12, dtype=int))
    assert "--start: got worker 0 holds load 12" in failed(*run(*command, "--to", "hgr", "--start", "start.npy"))


def test_correlated_inputs_are_no_exact_model(run: Run, weight: np.ndarray) -> None:
    np.save("x.npy", np.random.default_rng(0).normal(size=(50, 10)))
    for price in (("--transfer-price", 0.1), ("--budget", 0.3)):
        _, out, _ = run("export", "layer.npy", "--workers", 2, "--inputs", "x.npy", *price, "--to", "mps", "--json")
        assert json.loads(out)["is_exact"] is False


@pytest.mark.usefixtures("weight")
def test_a_partition_is_judged_as_it_stands(run: Run, weight: np.ndarray) -> None:
    owner = np.random.default_rng(3).permutation(np.arange(12) % 3)
    terminals = [2, 0, 1]
    Path("answer.part").write_text("\n".join(map(str, [*np.array(terminals)[owner], *terminals])))
    for options, formulation in ((LOSSLESS, Lossless()), (("layer.npy", "--workers", 3), Volume(budget=0.1))):
        code, out, err = run("solve", *options, "--read-partition", "answer.part", "--json")
        assert (code, err) == (0, "")
        figures = json.loads(out)
        expected = solve_layer(weight, 3, formulation=formulation, partitioner="contiguous", start=owner)
        assert (figures["partitioner"], figures["partition_file"], figures["rebalanced"]) == ("file", "answer.part", 0)
        assert figures["stages"][0]["objective"] == expected.stats["stages"][0]["objective"] == figures["objective"]
        assert (figures["termination"], len(figures["stages"])) == ("heuristic", 1)
        with np.load("layer.npy.solution.npz") as written:
            np.testing.assert_array_equal(written["owner"], owner)


@pytest.mark.usefixtures("weight")
def test_an_exact_choice_for_a_partition_proves_nothing_for_the_layer(run: Run) -> None:
    Path("answer.part").write_text("0\n1\n2\n" * 4)
    np.save("x.npy", np.random.default_rng(0).normal(size=(50, 10)))
    command = ("solve", "layer.npy", "--workers", 3, "--inputs", "x.npy", "--budget", 0.3, "--pruner", "group-l0")
    code, out, err = run(*command, "--read-partition", "answer.part", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert (figures["termination"], figures["bound"], figures["gap"]) == ("heuristic", None, None)
    assert (figures["moments"], figures["samples"]) == ("full", 50)


@pytest.mark.usefixtures("weight")
def test_a_partition_is_improved_on_demand(run: Run) -> None:
    Path("answer.part").write_text("0\n1\n2\n" * 4)
    command = ("solve", "layer.npy", "--workers", 3, "--transfer-price", 0.2, "--read-partition", "answer.part")
    _, out, _ = run(*command, "--json")
    before = json.loads(out)["objective"]
    code, out, err = run(*command, "--partitioner", "alternate", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert [stage["stage"] for stage in figures["stages"]] == ["start", "alternate"]
    assert figures["stages"][0]["objective"] == before > figures["objective"]
    assert (figures["partitioner"], figures["partition_file"]) == ("alternate", "answer.part")


@pytest.mark.usefixtures("weight")
def test_an_unbalanced_partition_is_refused_or_moved(run: Run) -> None:
    Path("answer.part").write_text("0\n" * 6 + "1\n" * 4 + "2\n" * 2)
    command = ("solve", *LOSSLESS, "--read-partition", "answer.part")
    message = "--read-partition: got answer.part: worker 0 holds load 6, above its capacity 4; allowed: a valid one, or"
    assert message in failed(*run(*command))
    assert not Path("layer.npy.solution.npz").exists()
    code, out, err = run(*command, "--rebalance", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert (figures["rebalanced"], figures["violations"], figures["neurons_per_worker"]) == (2, [], [4, 4, 4])
    assert "2 neurons moved from where answer.part has them" in run(*command, "--rebalance")[1]


@pytest.mark.usefixtures("weight")
def test_a_wrong_block_and_a_forbidden_place_are_named(run: Run) -> None:
    allowed = np.ones((12, 3), dtype=bool)
    allowed[4, 1] = False
    np.save("allowed.npy", allowed)
    Path("answer.part").write_text("0\n1\n2\n" * 4)
    command = ("solve", *LOSSLESS, "--allowed", "allowed.npy", "--read-partition", "answer.part")
    assert "answer.part: neuron 4 is on worker 1, which is not allowed" in failed(*run(*command))
    assert run(*command, "--rebalance")[0] == 0
    Path("answer.part").write_text("0\n1\n7\n" * 4)
    assert "answer.part, line 3: '7'; allowed: a block, 0 … 2" in failed(*run(*command))


def test_solution_of_a_mip_solver_is_read_back(run: Run, weight: np.ndarray) -> None:
    highspy = pytest.importorskip("highspy")
    command = ("layer.npy", "--workers", 2, "--transfer-price", 0.5)
    assert run("export", *command, "--to", "mps", "--output", "layer.mps")[0] == 0
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.readModel("layer.mps")
    assert "kOk" in str(solver.run())
    solver.writeSolution("layer.sol", 0)
    code, out, err = run("solve", *command, "--read-partition", "layer.sol", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["objective"] == pytest.approx(solver.getInfo().objective_function_value)
