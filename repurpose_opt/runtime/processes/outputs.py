"""The outputs of a run: brought together from the workers that own them, and written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.processes import group
from repurpose_opt.runtime.splits import Split


def assembled(split: Split, rank: int, outputs: NDArray[Any], writer: int) -> NDArray[Any] | None:
    """All outputs, (samples, …), on worker `writer`; None elsewhere.

    `outputs` are those that this worker computed, (places held, samples, *positions).
    """
    owners = np.unique(split.places).tolist()
    if rank != writer:
        if rank in owners and outputs.size:
            group.send(torch.from_numpy(outputs), writer, "outputs")
        return None
    whole = np.empty((len(split.places), *outputs.shape[1:]), dtype=outputs.dtype)
    for owner in owners:
        part = outputs
        if owner != rank:
            part = np.empty((len(split.held(owner)), *outputs.shape[1:]), dtype=outputs.dtype)
            if part.size:
                group.receive(torch.from_numpy(part), owner, "outputs")
        whole[split.held(owner)] = part
    return np.ascontiguousarray(np.moveaxis(whole, 0, split.axis))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all. Raises RepurposeError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    except OSError as error:
        # Where a disk is full, NumPy says how many numbers it wrote, and no errno.
        reason = error.strerror or f"{error}: is the disk full?"
        raise RepurposeError(f"{path}: cannot be written ({reason})") from None
    finally:
        partial.unlink(missing_ok=True)
