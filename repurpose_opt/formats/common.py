"""What the writers share: the description of what was written, and whole numbers that fit into 32 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.linear_model import common_unit, possible_places, whole_loads
from repurpose_opt.problem import LayerProblem

LARGEST_SUM = 2**31 - 1
"""Partitioners add weights up in 32 bits."""


@dataclass(frozen=True)
class Written:
    """Files that were written, and what a solver's figure for them means."""

    files: tuple[Path, ...]
    """The instance first, then what goes with it."""
    size: Mapping[str, int]
    """How many vertices, nets, variables and so on there are."""
    is_exact: bool
    """Whether the solver's figure is the formulation's objective, as `unit` and `constant` say; else it stands in."""
    unit: float | None
    """objective = constant + unit · figure, to within `rounding`; None where the figure has no such relation."""
    constant: float = 0.0
    rounding: float = 0.0
    left_out: tuple[str, ...] = ()
    """Limits of the problem that the format cannot express."""


def whole_weights(weights: NDArray[np.float64], largest_sum: float) -> tuple[NDArray[np.int64], float]:
    """Weights ≥ 0 as whole multiples of a unit: of 1 or of a common unit where they are such, else rounded.

    The unit is as fine as a sum of at most `largest_sum` permits. Returns the multiples, and the unit.
    """
    total = float(weights.sum())
    for unit in (1.0, common_unit(weights)):
        if unit is None or total / unit > largest_sum:
            continue
        multiples = np.rint(weights / unit)
        if np.allclose(multiples * unit, weights, rtol=1e-12, atol=0):
            return multiples.astype(np.int64), unit
    unit = total / (largest_sum - len(weights))  # rounding adds at most ½ to each
    return np.rint(weights / unit).astype(np.int64), unit


def vertex_loads(problem: LayerProblem, largest_sum: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whole loads (m,) and capacities (P,) whose total loads are at most about `largest_sum`.

    Loads are rounded up and capacities down, so that a partition within these capacities is within the given ones.
    """
    load, _, capacity = whole_loads(problem)
    coarser = -(-int(load.sum()) // largest_sum)
    return -(-load // coarser), capacity // coarser


def pinned_worker(problem: LayerProblem) -> NDArray[np.int64]:
    """(m,) the only worker that has a place for a neuron, −1 where there are several."""
    places = possible_places(problem)
    return np.where(places.sum(axis=1) == 1, places.argmax(axis=1), -1)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="ascii", newline="\n") as stream:
        stream.writelines(f"{line}\n" for line in lines)


def beside(path: Path, suffix: str) -> Path:
    """The file that goes with `path`: layer.hgr.fix for layer.hgr."""
    return path.with_name(path.name + suffix)
