"""The registry: what is installed, what is missing and the command that installs it, and names that clash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

import numpy as np
import pytest

from repurpose_opt import Edge, registry, solve_layer
from repurpose_opt.errors import DuplicateSolver, SolverNotInstalled, UnknownSolver
from repurpose_opt.testing import registered

W = np.random.default_rng(0).normal(size=(6, 4))


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no optional package were there."""
    monkeypatch.setattr(registry, "find_spec", lambda package: None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces the entry points of every installed distribution."""

    def replace(*points: tuple[str, str]) -> None:
        registry._entry_points.cache_clear()
        monkeypatch.setattr(
            registry, "entry_points", lambda group: [EntryPoint(name, value, group) for name, value in points]
        )

    yield replace
    monkeypatch.undo()
    registry._entry_points.cache_clear()


def test_what_comes_with_the_package_is_registered():
    partitioners = {"alternate", "brute-force", "compensated", "contiguous", "flow", "metis", "munkres", "random"}
    assert partitioners <= set(registry.names("partitioners"))
    assert {"group-omp", "threshold"} <= set(registry.names("pruners"))
    assert {"edge", "lossless", "volume"} <= set(registry.names("formulations"))
    assert registry.load("formulations", "edge") is Edge


@pytest.mark.parametrize("kind", ["partitioners", "pruners"])
def test_entries_carry_the_name_that_they_are_registered_under(kind: str):
    for name in registry.names(kind):
        backend = registry.load_class(kind, name)()
        assert backend.name == name
        assert isinstance(backend.requires, tuple)


@pytest.mark.parametrize("kind", ["partitioners", "pruners", "formulations"])
def test_every_entry_is_described(kind: str):
    for entry in registry.registered(kind):
        assert entry.kind == kind[:-1]
        assert entry.installed or entry.name == "kahypar"  # GPL: never a dependency
        assert (entry.install is None) == entry.installed
        assert 20 < len(entry.summary) < 120
        assert entry.summary == entry.summary.strip()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownSolver) as raised:
        solve_layer(W, 2, partitioner="magic")
    text = str(raised.value)
    assert "'magic'" in text
    assert "contiguous" in text
    assert "munkres" in text
    assert "\n" not in text


@pytest.mark.usefixtures("uninstalled")
def test_an_uninstalled_solver_comes_with_the_command_that_installs_it():
    with pytest.raises(SolverNotInstalled) as raised:
        solve_layer(W, 2, formulation=Edge(0.1, 0.1), partitioner="munkres+flow")
    text = str(raised.value)
    assert "'flow' needs ortools" in text
    assert "pip install ortools" in text
    assert "\n" not in text
    assert isinstance(raised.value, ImportError)
    assert solve_layer(W, 2, formulation=Edge(0.1, 0.1), partitioner="munkres").termination == "optimal"


@pytest.mark.usefixtures("uninstalled")
def test_what_is_missing_is_listed_and_not_offered():
    listed = {entry.name: entry for entry in registry.registered("partitioners")}
    assert not listed["flow"].installed
    assert listed["flow"].missing == ("ortools",)
    assert listed["metis"].install == "pip install pymetis"
    assert listed["munkres"].installed
    assert not registry.is_installed("partitioners", "flow")
    assert registry.is_installed("partitioners", "munkres")
    assert not registry.is_installed("partitioners", "magic")


def test_packages_that_are_no_extra_are_installed_by_their_own_name():
    command = registry.install_command(("ortools", "some_solver"))
    assert command == "pip install ortools some_solver"


def test_two_backends_of_one_name_are_refused(install: Callable[..., None]):
    other = ("theirs", "repurpose_opt_solvers.munkres_:Munkres")
    install(("ours", "one.module:Ours"), other, ("ours", "other.module:Ours"))
    with pytest.raises(DuplicateSolver) as raised:
        solve_layer(W, 2, partitioner="ours")
    text = str(raised.value)
    for part in ("'ours'", "one.module:Ours", "other.module:Ours", "uninstall"):
        assert part in text
    assert "\n" not in text
    listed = {entry.name: entry for entry in registry.registered("partitioners")}
    assert not listed["ours"].installed
    assert listed["ours"].install is None
    assert listed["theirs"].installed
    assert registry.load("partitioners", "theirs")().name == "munkres"


def test_one_backend_that_is_found_twice_is_one(install: Callable[..., None]):
    install(("ours", "one.module:Ours"), ("ours", "one.module:Ours"))
    assert registry.names("partitioners") == ["ours"]


def test_an_uninstalled_tree_says_how_to_install_it(install: Callable[..., None]):
    install()
    with pytest.raises(UnknownSolver, match=r"pip install -e \."):
        solve_layer(W, 2, partitioner="munkres")


def test_a_backend_for_the_time_of_a_block():
    before = registry.names("partitioners")
    munkres = registry.load("partitioners", "munkres")

    class Mine(munkres):  # type: ignore[misc,valid-type]
        """Mine."""

        name = "mine"
        requires = ("no_such_package",)

    with registered("partitioners", Mine()) as name:
        assert name == "mine"
        with pytest.raises(SolverNotInstalled, match="pip install no_such_package"):
            solve_layer(W, 2, partitioner="mine")
    assert registry.names("partitioners") == before
    with registered("partitioners", munkres()):
        pass
    assert registry.load("partitioners", "munkres") is munkres
