"""Which test sets there are: registered ones by name, and folders of files."""

from __future__ import annotations

import os
from pathlib import Path

from repurpose_opt import registry
from repurpose_opt.bench.testset import TestSet
from repurpose_opt.errors import DuplicateSolver


def load_all() -> tuple[list[tuple[TestSet, str | None]], dict[str, str]]:
    """Every registered test set by name, with the command that installs what its data come from if that is missing;
    and, by name, why others cannot be loaded."""
    loaded: list[tuple[TestSet, str | None]] = []
    broken = {}
    for found in registry.registered("testsets"):
        try:
            loaded.append((registry.load_class("testsets", found.name)(), found.install))
        except (ImportError, DuplicateSolver) as error:
            broken[found.name] = " ".join(str(error).split())
    return loaded, broken


def canonical(name: str) -> str:
    """One spelling of a folder's path, which is in the key of rows: ./layers/ is ./layers. Other names as they are."""
    if os.sep not in name:
        return name
    path = os.path.normpath(name)
    return path if os.path.isabs(path) else os.path.join(os.curdir, path)


def test_set(name: str) -> TestSet:
    """The registered test set of this name; that of a folder where the name is a path with a separator.

    Raises UnknownSolver, SolverNotInstalled, InvalidArgument.
    """
    if os.sep in name:
        from repurpose_opt.bench.folder import FolderTestSet

        return FolderTestSet(Path(name))
    found: TestSet = registry.load("testsets", name)()
    return found


test_set.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test
