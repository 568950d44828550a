"""METIS's own entry points by ctypes, for what pymetis does not hand on: several constraints, ubvec and vsize.

The shared object is the one that pymetis brings. Its integers are 64 bits wide and its reals 32 (measured for
pymetis 2025; the width of the integers is checked).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import SolverNotInstalled

_N_OPTIONS = 40
_OK = 1


@dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph with integer weights; each edge stands at both of its ends."""

    indptr: NDArray[np.int64]
    """(vertices + 1,)"""
    indices: NDArray[np.int64]
    """(edges,) neighbours of each vertex."""
    edge_weight: NDArray[np.int64]
    """(edges,) ≥ 1."""
    vertex_weight: NDArray[np.int64]
    """(vertices, constraints) ≥ 0."""
    vertex_size: NDArray[np.int64]
    """(vertices,) what it costs, in the volume objective, for each other part that a vertex has neighbours in."""


def partition_graph(
    graph: Graph,
    share: NDArray[np.float64],
    most_excess: NDArray[np.float64],
    *,
    minimise: str = "cut",
    recursive: bool = False,
    seed: int = 0,
) -> NDArray[np.int64]:
    """The part of each vertex, (vertices,).

    share        (parts, constraints) of each constraint's weight that a part is to hold; columns sum to 1
    most_excess  (constraints,) load of a part over its share, above 1, that METIS tolerates (its ubvec)
    minimise     "cut" (edge weights between parts) or "volume" (vertex sizes times foreign parts adjacent)

    METIS aims at the balance and may miss it. Raises SolverNotInstalled where pymetis or its symbols are missing,
    ValueError for what METIS refuses.
    """
    library, codes = _library()
    parts, constraints = share.shape
    options = np.empty(_N_OPTIONS, dtype=np.int64)
    library.METIS_SetDefaultOptions(_pointer(options))
    options[codes["SEED"]] = (seed + 1) % 2**31  # C's srand takes 0 and 1 for the same
    options[codes["OBJTYPE"]] = {"cut": 0, "volume": 1}[minimise]
    routine = library.METIS_PartGraphRecursive if recursive else library.METIS_PartGraphKway
    arrays = [
        np.ascontiguousarray(array, dtype=np.int64)
        for array in (graph.indptr, graph.indices, graph.vertex_weight, graph.vertex_size, graph.edge_weight)
    ]
    reals = [np.ascontiguousarray(array, dtype=np.float32) for array in (share, most_excess)]
    count = len(graph.indptr) - 1
    part = np.zeros(count, dtype=np.int64)
    value = ctypes.c_int64()
    status = routine(
        _reference(count),
        _reference(constraints),
        *map(_pointer, arrays),
        _reference(parts),
        *map(_pointer, reals),
        _pointer(options),
        ctypes.byref(value),
        _pointer(part),
    )
    if status != _OK:
        raise ValueError(f"METIS refused {count} vertices, {parts} parts, {constraints} constraints: status {status}")
    return part


@cache
def _library() -> tuple[ctypes.CDLL, dict[str, int]]:
    """METIS in pymetis's shared object, and the places of its options."""
    try:
        import pymetis
        from pymetis import _internal
    except ImportError as error:
        raise SolverNotInstalled("METIS needs pymetis: pip install pymetis") from error
    library = ctypes.CDLL(_internal.__file__)
    for symbol in ("METIS_PartGraphKway", "METIS_PartGraphRecursive", "METIS_SetDefaultOptions"):
        if not hasattr(library, symbol):
            raise SolverNotInstalled(f"pymetis {pymetis.version} does not export {symbol}")
        getattr(library, symbol).restype = ctypes.c_int
    if _internal._idx_type_width() != 64:
        raise SolverNotInstalled(f"pymetis has integers of {_internal._idx_type_width()} bits, not of 64")
    return library, {name: int(getattr(pymetis.OptionKey, name)) for name in ("SEED", "OBJTYPE")}


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _reference(value: int) -> Any:
    return ctypes.byref(ctypes.c_int64(value))
