"""Finds partitioners, pruners, formulations and test sets by entry point; the core imports none of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from repurpose_opt.errors import DuplicateSolver, SolverNotInstalled, UnknownSolver

KINDS = ("partitioners", "pruners", "formulations", "testsets")


@dataclass(frozen=True)
class Registered:
    """One entry: what it is called, whether it can run here and, if not, the command that installs it."""

    name: str
    kind: str
    summary: str
    requires: tuple[str, ...]
    missing: tuple[str, ...]
    is_clash: bool = False
    """Whether two installed packages have this name, so that neither can be used."""

    @property
    def installed(self) -> bool:
        return not self.missing and not self.is_clash

    @property
    def install(self) -> str | None:
        """The command that installs what is missing; None if nothing is."""
        return install_command(self.missing) if self.missing else None


def install_command(packages: tuple[str, ...]) -> str:
    return f"pip install {' '.join(packages)}"


def check_importable(what: str, *packages: str) -> None:
    """Import packages that something needs. Raises SolverNotInstalled, which names those that are missing."""
    missing = []
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            missing.append(package)
    if missing:
        raise SolverNotInstalled(f"{what} needs {', '.join(missing)}: {install_command(tuple(missing))}")


def names(kind: str) -> list[str]:
    return sorted(_entry_points(kind))


def load(kind: str, name: str) -> Any:
    """The class registered as `name`.

    Raises UnknownSolver, SolverNotInstalled (with the command that installs it), or DuplicateSolver for a name that two
    installed packages have.
    """
    solver = load_class(kind, name)
    missing = _missing(solver)
    if missing:
        raise SolverNotInstalled(f"{kind[:-1]} {name!r} needs {', '.join(missing)}: {install_command(missing)}")
    return solver


def load_class(kind: str, name: str) -> Any:
    """The same, whether the packages that it needs are there or not."""
    found = _entry_points(kind)
    if name not in found:
        known = ", ".join(sorted(found)) or "none (run `pip install -e .`: entry points exist once installed)"
        raise UnknownSolver(f"{kind[:-1]} {name!r} is unknown; known: {known}")
    return found[name].load()


def is_installed(kind: str, name: str) -> bool:
    found = _entry_points(kind)
    return name in found and not _missing(found[name].load())


def registered(kind: str) -> list[Registered]:
    """All entries of a kind, also those whose packages are missing."""
    listed = []
    for name, point in sorted(_entry_points(kind).items()):
        if isinstance(point, _Clash):
            listed.append(Registered(name, kind[:-1], point.message, (), (), is_clash=True))
            continue
        try:
            solver = point.load()
        except ImportError as error:  # one broken plug-in must not hide the others
            absent = error.name or point.module
            listed.append(Registered(name, kind[:-1], f"cannot be imported: {error}", (absent,), (absent,)))
            continue
        summary = (solver.__doc__ or "").strip().split("\n")[0]
        listed.append(Registered(name, kind[:-1], summary, tuple(getattr(solver, "requires", ())), _missing(solver)))
    return listed


def _missing(solver: Any) -> tuple[str, ...]:
    return tuple(package for package in getattr(solver, "requires", ()) if find_spec(package) is None)


@dataclass(frozen=True)
class _Clash:
    """Stands for the entry points of one name that say different things: none of them is loaded."""

    kind: str
    points: tuple[EntryPoint, ...]

    @property
    def message(self) -> str:
        sources = " and ".join(point.value + (f" of {point.dist.name}" if point.dist else "") for point in self.points)
        return f"{self.kind[:-1]} {self.points[0].name!r} is registered twice: {sources}; pip uninstall one of them"

    def load(self) -> Any:
        raise DuplicateSolver(self.message)


@cache
def _entry_points(kind: str) -> dict[str, EntryPoint | _Clash]:
    points: dict[str, dict[str, EntryPoint]] = {}
    for point in entry_points(group=f"repurpose_opt.{kind}"):
        points.setdefault(point.name, {}).setdefault(point.value, point)
    return {
        name: next(iter(same.values())) if len(same) == 1 else _Clash(kind, tuple(same.values()))
        for name, same in points.items()
    }
