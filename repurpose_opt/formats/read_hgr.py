"""Reads hMETIS's hypergraphs, the format of most partitioning benchmarks, as layers to be placed without loss.

Every net is an input value whose bytes are the net's weight, every vertex a neuron that reads the values of its nets.
λ−1 of a net counts the blocks that hold its vertices but one. A layer counts the workers that read a value but its
owner. So the owner must be a worker that reads the value in any case, or one that never does:

- a net with a fixed vertex is held by that vertex's block. Its cost is then λ−1 whatever the others do.
- a net without one is held by an extra worker, the last, that has no room for neurons. Its cost is then λ, which is
  λ−1 and a constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formats.common import beside
from repurpose_opt.problem import LayerProblem

IMBALANCE = 0.03
"""Default ε of the largest weight of a block, (1+ε) ⌈total / P⌉, as in the experiments of KaHyPar and Mt-KaHyPar."""
_FORMATS = {"": (False, False), "0": (False, False), "1": (True, False), "10": (False, True), "11": (True, True)}
"""Whether nets, and vertices, have weights."""


@dataclass(frozen=True, eq=False)
class HypergraphLayer:
    """A hypergraph as a layer: the objective of `Lossless` is λ−1 (km1) + `constant`."""

    problem: LayerProblem
    """Vertices are neurons in the file's order, without the terminals of `write_hgr`."""
    constant: int
    """Total weight of the nets that the extra worker holds."""
    parts: int
    """Blocks; one less than the problem's workers where there is an extra one."""


@dataclass(frozen=True, eq=False)
class _File:
    pins: Any
    """(nets, vertices) csr_array of ones"""
    net_weight: NDArray[np.int64]
    vertex_weight: NDArray[np.int64]
    fixed: NDArray[np.int64]
    """(vertices,) block, or −1"""
    targets: NDArray[np.int64] | None
    """(blocks,)"""


def read_hgr(path: Path | str, n_workers: int | None = None, imbalance: float = IMBALANCE) -> HypergraphLayer:
    """The layer of an .hgr file: the inverse of `write_hgr`, or any hypergraph with or without fixed vertices.

    path           the hypergraph: comments (%), "nets vertices [format]", a line for each net, vertex weights
    path.fix       if it exists: a line for each vertex, its block or −1
    path.targets   if it exists: a line for each block, the largest weight of its vertices
    n_workers      blocks; by default as many as the files beside say
    imbalance      ε, where there are no targets: a block holds at most (1+ε) ⌈total weight / blocks⌉

    Where the last P vertices have weight 1 and are fixed to the P blocks in order, and every net has one of them, they
    are the terminals of `write_hgr` and no neurons. Where nets have several terminals (links of several prices), the
    terminals stay, as neurons with a single place.

    Raises InvalidArgument, naming file and line.
    """
    path = Path(path)
    file = _read(path)
    P = _blocks(path, file, n_workers)
    if _ends_in_terminals(file, P):
        return _of_terminals(file, P)
    return _of_vertices(file, P, imbalance)


def _of_terminals(file: _File, P: int) -> HypergraphLayer:
    assert file.targets is not None
    m = len(file.fixed) - P
    holder = file.pins[:, m:].indices
    problem = LayerProblem.create(
        file.pins[:, :m].T,
        P,
        input_owner=holder,
        capacity=file.targets - 1,
        load=file.vertex_weight[:m],
        allowed=_allowed(file.fixed[:m], P),
        value_bytes=file.net_weight,
    )
    return HypergraphLayer(problem, 0, P)


def _of_vertices(file: _File, P: int, imbalance: float) -> HypergraphLayer:
    holder = _holder(file, P)
    is_free = holder == P
    workers = P + bool(is_free.any())
    total = int(file.vertex_weight.sum())
    room = np.full(P, np.floor((1 + imbalance) * -(-total // P))) if file.targets is None else file.targets
    problem = LayerProblem.create(
        file.pins.T,
        workers,
        input_owner=holder,
        capacity=np.concatenate([room, np.zeros(workers - P)]),
        load=file.vertex_weight,
        allowed=_allowed(file.fixed, workers),
        value_bytes=file.net_weight,
    )
    return HypergraphLayer(problem, int(file.net_weight[is_free].sum()), P)


def _holder(file: _File, P: int) -> NDArray[np.int64]:
    """(nets,) the least block that a fixed vertex of the net is in, P where it has none."""
    block = np.where(file.fixed >= 0, file.fixed, P)[file.pins.indices]
    return np.minimum.reduceat(block, file.pins.indptr[:-1])


def _allowed(fixed: NDArray[np.int64], workers: int) -> NDArray[np.bool_]:
    return (fixed[:, None] < 0) | (fixed[:, None] == np.arange(workers))


def _ends_in_terminals(file: _File, P: int) -> bool:
    if file.targets is None or len(file.fixed) <= P:
        return False
    are_last = np.array_equal(file.fixed[-P:], np.arange(P)) and bool((file.vertex_weight[-P:] == 1).all())
    return are_last and bool((np.diff(file.pins[:, -P:].indptr) == 1).all())


def _blocks(path: Path, file: _File, n_workers: int | None) -> int:
    named = int(file.fixed.max(initial=-1)) + 1
    if file.targets is not None:
        P = len(file.targets)
        if n_workers not in (None, P):
            raise InvalidArgument("n_workers", n_workers, f"{P}, the lines of {beside(path, '.targets').name}")
        if named > P:
            allowed = f"0 … {P - 1}, as {beside(path, '.targets').name} has {P} lines"
            raise InvalidArgument("FILE", f"{beside(path, '.fix')} with block {named - 1}", allowed)
        return P
    if n_workers is None and named == 0:
        raise InvalidArgument("n_workers", None, f"a number of blocks: {path.name} has no fixed vertices")
    if n_workers is not None and n_workers < named:
        raise InvalidArgument("n_workers", n_workers, f"at least {named}: {path.name}.fix has block {named - 1}")
    return named if n_workers is None else n_workers


# The files


def _read(path: Path) -> _File:
    lines = iter(_numbers(path, is_commented=True))
    first, head = next(lines, (1, []))
    if not (2 <= len(head) <= 3) or (len(head) == 3 and str(head[2]) not in _FORMATS) or min(head[:2], default=0) < 1:
        allowed = 'a header "nets vertices [format]", both at least 1, format 1, 10 or 11'
        raise InvalidArgument("FILE", f"{path}, line {first}: {' '.join(map(str, head)) or 'nothing'}", allowed)
    n_nets, n_vertices = head[:2]
    has_net_weights, has_vertex_weights = _FORMATS[str(head[2]) if len(head) == 3 else ""]
    nets, net_weight = [], np.ones(n_nets, dtype=np.int64)
    for net in range(n_nets):
        number, found = _next(path, lines, f"{n_nets} nets, of which it has {net}")
        if has_net_weights:
            if found[0] < 0:
                raise InvalidArgument(
                    "FILE", f"{path}, line {number}: {_text(found)}", "the weight of a net, at least 0"
                )
            net_weight[net] = found[0]
        nets.append(_pins(path, number, found[has_net_weights:], n_vertices))
    vertex_weight = np.ones(n_vertices, dtype=np.int64)
    for vertex in range(n_vertices if has_vertex_weights else 0):
        number, found = _next(path, lines, f"weights of {n_vertices} vertices, of which it has {vertex}")
        if len(found) != 1 or found[0] < 1:
            raise InvalidArgument(
                "FILE", f"{path}, line {number}: {_text(found)}", "the weight of a vertex, at least 1"
            )
        vertex_weight[vertex] = found[0]
    for number, found in lines:
        raise InvalidArgument("FILE", f"{path}, line {number}: {_text(found)}", f"nothing after line {number - 1}")
    ends = np.cumsum([0, *map(len, nets)])
    pins = sparse.csr_array((np.ones(ends[-1]), np.concatenate(nets), ends), shape=(n_nets, n_vertices))
    fixed = _column(beside(path, ".fix"), n_vertices, -1)
    targets = _column(beside(path, ".targets"), None, 0)
    return _File(pins, net_weight, vertex_weight, np.full(n_vertices, -1) if fixed is None else fixed, targets)


def _pins(path: Path, number: int, found: list[int], n_vertices: int) -> NDArray[np.int64]:
    """The vertices of a net, from 0, ascending, none twice."""
    pins = np.unique(np.array(found, dtype=np.int64))
    if len(pins) == 0 or pins[0] < 1 or pins[-1] > n_vertices:
        raise InvalidArgument("FILE", f"{path}, line {number}: {_text(found)}", f"vertices, 1 … {n_vertices}")
    return pins - 1


def _column(path: Path, length: int | None, least: int) -> NDArray[np.int64] | None:
    """One number a line, or None where there is no such file."""
    if not path.exists():
        return None
    values = []
    for number, found in _numbers(path):
        if len(found) != 1 or found[0] < least:
            raise InvalidArgument("FILE", f"{path}, line {number}: {_text(found)}", f"one number, at least {least}")
        values.append(found[0])
    if not values or length not in (None, len(values)):
        allowed = "at least one" if length is None else f"{length}, one for each vertex"
        raise InvalidArgument("FILE", f"{path} with {len(values)} lines", allowed)
    return np.array(values, dtype=np.int64)


def _numbers(path: Path, is_commented: bool = False) -> Iterator[tuple[int, list[int]]]:
    """(line number, its whole numbers) of each line that is not blank or a comment."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise InvalidArgument("FILE", f"{path} ({reason})", "a text file of whole numbers") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or (is_commented and line.lstrip().startswith("%")):
            continue
        try:
            yield number, [int(word) for word in line.split()]
        except ValueError:
            raise InvalidArgument("FILE", f"{path}, line {number}: {line.strip()[:60]!r}", "whole numbers") from None


def _next(path: Path, lines: Iterator[tuple[int, list[int]]], what: str) -> tuple[int, list[int]]:
    found = next(lines, None)
    if found is None:
        raise InvalidArgument("FILE", f"{path}, which ends early", what)
    return found


def _text(found: list[int]) -> str:
    return repr(" ".join(map(str, found))[:60])
