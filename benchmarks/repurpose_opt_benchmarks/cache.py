"""Arrays that take long to compute, kept in the user's cache folder: $XDG_CACHE_HOME/repurpose-opt, or ~/.cache/…"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def folder() -> Path:
    """Where they are; it need not exist."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # An XDG path that is not absolute is to be ignored, says the specification.
    base = Path(root) if Path(root).is_absolute() else Path.home() / ".cache"
    return base / "repurpose-opt"


def cached(name: str, settings: Mapping[str, Any], packages: tuple[str, ...], compute: Callable[[], Arrays]) -> Arrays:
    """The arrays of a file whose name has a fingerprint of the settings and of the packages' versions.

    Computed where there is no such file, or a damaged one, and written in one step: a reader never sees a part, and
    of two that compute at once the last one stays. Raises OSError where the folder cannot be written.
    """
    made_of = {"settings": dict(settings), "versions": {package: version(package) for package in packages}}
    fingerprint = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    path = folder() / f"{name}-{fingerprint}.npz"
    found = _read(path)
    if found is None:
        found = compute()
        _write(path, found)
    return found


def _read(path: Path) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):
        return None


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
