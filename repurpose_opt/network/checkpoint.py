"""What a run has finished, product by product and round by round, so that an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument

Arrays = Mapping[str, NDArray[Any]]
T = TypeVar("T")
LONGEST_NAME = 150
"""Characters of a file's name before a digest stands for the rest: file systems allow 255 bytes."""


class Checkpoint:
    """A folder with an .npz file for each finished part, tied to one run by its fingerprint; None keeps nothing."""

    def __init__(self, directory: str | Path | None, fingerprint: str) -> None:
        self.directory = None if directory is None else Path(directory)
        self.prefix = ""
        if self.directory is None:
            return
        if self.directory.exists() and not self.directory.is_dir():
            raise InvalidArgument("checkpoint_dir", f"a file, {self.directory}", "a folder")
        self.directory.mkdir(parents=True, exist_ok=True)
        record = self.directory / "run.json"
        content = json.dumps({"fingerprint": fingerprint}).encode()
        if not record.exists():
            _write_whole(record, content)
        elif record.read_bytes() != content:
            allowed = "an empty folder, or the same model, data and arguments as before"
            raise InvalidArgument("checkpoint_dir", f"the folder of another run, {self.directory}", allowed)

    def part(self, prefix: str) -> Checkpoint:
        """The same folder, for parts whose names begin with a prefix."""
        part = Checkpoint(None, "")
        part.directory, part.prefix = self.directory, f"{self.prefix}{prefix}-"
        return part

    def path(self, key: str) -> Path | None:
        name = f"{self.prefix}{key}"
        if len(name) > LONGEST_NAME:
            name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return None if self.directory is None else self.directory / f"{name}.npz"

    def read(self, key: str, of_arrays: Callable[[Arrays], T]) -> T | None:
        """What was finished under this key, or None. Raises InvalidArgument where its file is damaged."""
        path = self.path(key)
        if path is None or not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return of_arrays({name: stored[name] for name in stored.files})
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
            allowed = "whole files; delete this one and its part is computed again"
            raise InvalidArgument("checkpoint_dir", f"a damaged {path}", allowed) from None

    def write(self, key: str, arrays: Arrays) -> None:
        """Keep what is finished, whole or not at all."""
        path = self.path(key)
        if path is not None:
            temporary = path.with_suffix(".part.npz")
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
