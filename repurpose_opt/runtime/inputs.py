"""The input file of a run: memory-mapped, of which a worker reads the columns that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.manifest import Manifest

ROWS_AT_ONCE = 4096


def open_inputs(path: Path, manifest: Manifest) -> NDArray[Any]:
    """(samples, n) view of a .npy file; a plan that begins with Flatten takes more dimensions too.

    Raises RepurposeError, naming the file, where it is missing, is no such array or has another number of columns.
    """
    n = len(manifest.layers[0].input_owner)
    try:
        inputs = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise RepurposeError(f"{path}: missing; --input is a .npy file of shape (samples, {n})") from None
    except (OSError, ValueError) as error:
        raise RepurposeError(f"{path}: cannot be read as a .npy array ({error})") from None
    if inputs.dtype.kind not in "fiub":
        raise RepurposeError(f"{path}: dtype {inputs.dtype}; allowed: real numbers")
    begins_with_flatten = manifest.modules[0][1]["kind"] == "Flatten"
    fits = inputs.ndim >= 2 if begins_with_flatten else inputs.ndim == 2
    if not fits or np.prod(inputs.shape[1:]) != n:
        raise RepurposeError(f"{path}: shape {inputs.shape}; the plan reads {n} columns: (samples, {n})")
    return inputs.reshape(len(inputs), n)


def check_finite(path: Path, inputs: NDArray[Any], columns: Indices, dtype: str) -> None:
    """Raises RepurposeError where one of these columns holds NaN, or is infinite in the dtype of the plan."""
    for start in range(0, len(inputs), ROWS_AT_ONCE):
        finite = np.isfinite(read_columns(inputs, slice(start, start + ROWS_AT_ONCE), columns, dtype))
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            place = f"sample {start + row}, column {columns[column]}"
            raise RepurposeError(f"{path}: NaN or infinite at {place}; allowed: numbers that are finite in {dtype}")


def read_columns(inputs: NDArray[Any], samples: slice, columns: Indices, dtype: str) -> NDArray[Any]:
    """(samples, columns) as numbers of the plan's dtype."""
    # A number too large for the dtype becomes infinite, which check_finite reports; NumPy need not warn as well.
    with np.errstate(over="ignore"):
        return inputs[samples][:, columns].astype(dtype)
