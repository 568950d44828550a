"""What a run has finished, layer by layer, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repurpose_opt.errors import InvalidArgument

if TYPE_CHECKING:
    from repurpose_opt.network.sweep import SolvedLayer


class Checkpoint:
    """A folder with one .npz file per finished layer, tied to one run by its fingerprint; None keeps nothing."""

    def __init__(self, directory: str | Path | None, fingerprint: str) -> None:
        self.directory = None if directory is None else Path(directory)
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

    def read(self, key: str) -> SolvedLayer | None:
        """The layer finished under this key, or None. Raises InvalidArgument where its file is damaged."""
        from repurpose_opt.network.sweep import SolvedLayer

        if self.directory is None or not (self.directory / f"{key}.npz").exists():
            return None
        path = self.directory / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                return SolvedLayer(**{field.name: stored[field.name] for field in fields(SolvedLayer)})
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
            allowed = "whole files; delete this one and its layer is solved again"
            raise InvalidArgument("checkpoint_dir", f"a damaged {path}", allowed) from None

    def write(self, key: str, layer: SolvedLayer) -> SolvedLayer:
        """Keep a finished layer, whole or not at all; returns it."""
        if self.directory is not None:
            temporary = self.directory / f"{key}.part.npz"
            np.savez(temporary, **vars(layer))
            os.replace(temporary, self.directory / f"{key}.npz")
        return layer


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
