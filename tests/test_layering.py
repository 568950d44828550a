"""The direction of imports: a module of the core may import only those before it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "repurpose_opt"

ORDER = [
    {"errors"},
    {"isolation", "progress", "trajectory"},  # aside: they know nothing of the core but its errors
    {"accumulator"},
    {"moments"},
    {"problem"},
    {"exchange", "hypergraph"},
    {"knowledge"},
    {"metrics"},
    {"repair", "receiver"},
    {"formulation"},
    {"linear_model", "onward"},
    {"solver"},
    {"solution"},
    {"registry"},
    {"pruning"},
    {"auto"},
    {"solve"},
    {"network_solve"},
    {"network", "runtime", "platform", "testing", "files", "formats"},
    {"bench"},
    {"demo"},
    {"cli", "__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
BESIDE = {("network", "runtime"), ("platform", "runtime")}
"""Exceptions: the first may import the second although neither comes before the other."""


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path: Path) -> str:
    """The module or sub-package of the core that a file belongs to: `network` for network/sweep.py."""
    return path.relative_to(CORE).parts[0].removesuffix(".py")


def core_modules(path: Path) -> set[str]:
    """The modules of the core that a file imports."""
    names = {name.split(".")[1] for name in imported(path) if name.startswith("repurpose_opt.")}
    return {name for name in names if (CORE / f"{name}.py").exists() or (CORE / name).is_dir()}


FILES = sorted(CORE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CORE)))
def test_a_module_imports_only_what_comes_before_it(path: Path):
    module = module_of(path)
    assert module in RANK, f"say where {module} belongs, in ORDER of this test"
    for other in core_modules(path) - {module}:
        assert RANK[other] < RANK[module] or (module, other) in BESIDE, f"{path.name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_never_imports_a_backend_or_a_test_set(path: Path):
    for name in imported(path):
        assert name.split(".")[0] not in ("repurpose_opt_solvers", "repurpose_opt_benchmarks"), f"imports {name}"


HEAVY = {"torch", "cvxpy", "ortools", "pymetis", "mtkahypar", "kahypar", "numba", "safetensors", "hypothesis", "pytest"}
LIGHT = [path for path in FILES if RANK.get(module_of(path), 99) <= RANK["solve"] or module_of(path) == "testing"]


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(CORE)))
def test_the_core_needs_numpy_and_scipy_only(path: Path):
    assert not {name.split(".")[0] for name in imported(path)} & HEAVY


def test_the_core_is_read_at_all():
    """The checks above would pass on an empty list."""
    assert {"errors", "problem", "solve", "testing"} <= {module_of(path) for path in LIGHT}
    assert core_modules(CORE / "solve.py") >= {"errors", "metrics", "registry", "solution", "solver"}
    assert "testing" not in core_modules(CORE / "solve.py")


SOLVERS = sorted((ROOT / "solvers").rglob("*.py"))


@pytest.mark.parametrize("path", SOLVERS, ids=lambda path: path.name)
def test_backends_import_the_core_and_each_other_only(path: Path):
    assert core_modules(path) <= {name for name, rank in RANK.items() if rank <= RANK["solve"]}
    assert not [name for name in imported(path) if name.startswith("repurpose_opt_benchmarks")]


COMPILED = "_kernels.py"
"""End of the name of modules that numba compiles as a whole; backends import them when they solve."""


@pytest.mark.parametrize("path", SOLVERS, ids=lambda path: path.name)
def test_backends_load_their_package_only_when_they_solve(path: Path):
    if path.name.endswith(COMPILED):
        assert not any(path.stem in name for other in SOLVERS for name in imported(other)), "it loads with its backend"
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & HEAVY, f"{path.name} imports {names} when it is loaded"
