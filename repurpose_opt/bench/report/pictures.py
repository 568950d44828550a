"""A layer's matrix before and after its neurons are placed, as small pictures."""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.bench.report.document import Picture
from repurpose_opt.problem import LayerProblem

_MOST_SIDE, _LEAST_SIDE = 200, 64
"""Pixels."""
_MOST_BYTES = 1500
_GREYS = tuple(level for level in (255, 185, 115, 30) for _ in range(3))
"""Palette: zero (transparent) and three thirds of the weights."""


def before_and_after(problem: LayerProblem, owner: NDArray[np.int64]) -> tuple[Picture, Picture]:
    """|W| with its columns by the worker that holds them, and with its rows, too, by `owner` (m,)."""
    column_owner, row_owner = problem.input_owner[problem.column_value], owner[problem.row_neuron]
    columns, rows = np.argsort(column_owner, kind="stable"), np.argsort(row_owner, kind="stable")
    column_ends, row_ends = (_ends(of, problem.P) for of in (column_owner, row_owner))
    size = f"{problem.rows} × {problem.columns} weights, {problem.P} workers"
    return (
        Picture(
            "Before",
            f"Weights before placement ({size}): neurons in their order, columns grouped by worker.",
            _png(problem, np.arange(problem.rows), columns),
            (),
            _borders(column_ends),
        ),
        Picture(
            "After",
            f"Weights after placement ({size}): neurons grouped by owner; blocks on the diagonal stay within a worker.",
            _png(problem, rows, columns),
            _borders(row_ends),
            _borders(column_ends),
            _local(row_ends, column_ends),
        ),
    )


def _ends(owner: NDArray[np.int64], n_workers: int) -> NDArray[np.float64]:
    """(P + 1,) where each worker's part begins and the last ends, as fractions."""
    return np.concatenate([[0.0], np.cumsum(np.bincount(owner, minlength=n_workers))]) / max(1, len(owner))


def _borders(ends: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(end) for end in np.unique(ends) if 0 < end < 1)


def _local(rows: NDArray[np.float64], columns: NDArray[np.float64]) -> tuple[tuple[float, float, float, float], ...]:
    blocks = zip(columns[:-1], rows[:-1], np.diff(columns), np.diff(rows), strict=True)
    return tuple((float(x), float(y), float(w), float(h)) for x, y, w, h in blocks if w > 0 and h > 0)


def _png(problem: LayerProblem, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> bytes:
    """The sharpest picture that is small enough; of noise, which cannot be compressed, the smallest."""
    weights = sparse.coo_array(problem.weight)
    row_place, column_place = np.argsort(rows)[weights.coords[0]], np.argsort(columns)[weights.coords[1]]
    magnitude = np.abs(weights.data)
    side = min(_MOST_SIDE, max(problem.rows, problem.columns))
    while True:
        encoded = _encoded(_levels(_pooled(problem, row_place, column_place, magnitude, side)))
        if len(encoded) <= _MOST_BYTES or side <= _LEAST_SIDE:
            return encoded
        # The bytes of noise grow with the area.
        side = max(_LEAST_SIDE, int(0.97 * side * math.sqrt(_MOST_BYTES / len(encoded))))


def _pooled(
    problem: LayerProblem,
    row_place: NDArray[np.int64],
    column_place: NDArray[np.int64],
    magnitude: NDArray[np.floating],
    side: int,
) -> NDArray[np.floating]:
    """The largest weight that each pixel covers; a matrix is never enlarged."""
    height, width = min(side, problem.rows), min(side, problem.columns)
    pixels = np.zeros(height * width, dtype=magnitude.dtype)
    pixel = row_place * height // problem.rows * width + column_place * width // problem.columns
    np.maximum.at(pixels, pixel, magnitude)
    return pixels.reshape(height, width)


def _levels(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """0 for zero, else 1, 2 or 3 by thirds of what is not zero."""
    nonzero = pixels[pixels > 0]
    if not len(nonzero):
        return np.zeros(pixels.shape, dtype=np.uint8)
    thirds = np.quantile(nonzero, (1 / 3, 2 / 3))
    levels = 1 + np.searchsorted(thirds, pixels, side="right")
    return np.where(pixels > 0, levels, 0).astype(np.uint8)


def _encoded(levels: NDArray[np.uint8]) -> bytes:
    from PIL import Image  # a dependency of matplotlib

    image = Image.fromarray(levels, mode="P")
    image.putpalette(_GREYS)
    file = io.BytesIO()
    image.save(file, "PNG", bits=2, optimize=True, transparency=0)
    return file.getvalue()
