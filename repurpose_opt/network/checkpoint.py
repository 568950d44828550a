"""What a run has finished, layer by layer, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange

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
        if self.directory is None or not (self.directory / f"{key}.npz").exists():
            return None
        path = self.directory / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as stored:
                return _layer_of(stored)
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error):
            allowed = "whole files; delete this one and its layer is solved again"
            raise InvalidArgument("checkpoint_dir", f"a damaged {path}", allowed) from None

    def write(self, key: str, layer: SolvedLayer) -> SolvedLayer:
        """Keep a finished layer, whole or not at all; returns it."""
        if self.directory is not None:
            temporary = self.directory / f"{key}.part.npz"
            np.savez(temporary, **_arrays_of(layer))  # type: ignore[arg-type]
            os.replace(temporary, self.directory / f"{key}.npz")
        return layer


def _arrays_of(layer: SolvedLayer) -> dict[str, NDArray[Any]]:
    arrays = {"owner": layer.owner, "weight": layer.weight, "bias": layer.bias, "P": np.array(layer.exchange.P)}
    return arrays | layer.exchange.arrays()


def _layer_of(arrays: Mapping[str, NDArray[Any]]) -> SolvedLayer:
    """Raises ValueError or KeyError where the arrays are not those of a layer."""
    from repurpose_opt.network.sweep import SolvedLayer

    exchange = Exchange.of_arrays(arrays["weight"].shape[1], int(arrays["P"]), arrays)
    return SolvedLayer(arrays["owner"], exchange, arrays["weight"], arrays["bias"])


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
