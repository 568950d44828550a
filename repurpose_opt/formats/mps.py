"""Free MPS, which HiGHS, SCIP, Gurobi, CPLEX and others read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formats.common import Written, write_lines
from repurpose_opt.linear_model import LinearModel


def write_mps(path: Path | str, model: LinearModel, *, is_exact: bool = True) -> Written:
    """The model in free MPS format, to be minimised; x_i_k, y_j_k and z_i_j_k as in `LinearModel`, rows r0, r1 …

    `is_exact` says whether the model's cost is the formulation's objective. The constant is the negated right-hand
    side of the objective row, as HiGHS, Gurobi and CPLEX read it; numbers are written so that they are read back bit
    for bit. O(nonzeros). Raises InvalidArgument for a row or variable without a value between its limits, OSError.
    """
    path = Path(path)
    for what, low, high in (("row", model.row_lower, model.row_upper), ("variable", model.lower, model.upper)):
        crossed = np.flatnonzero(~(low <= high))
        if len(crossed):
            i = crossed[0]
            raise InvalidArgument("model", f"{what} {i} between {low[i]:g} and {high[i]:g}", "lower ≤ upper")
    write_lines(path, _lines(model))
    size = {"variables": len(model.cost), "rows": len(model.row_lower), "nonzeros": model.matrix.nnz}
    return Written((path,), size, is_exact=is_exact, unit=1.0)


def _lines(model: LinearModel) -> Iterator[str]:
    low, high = model.row_lower.tolist(), model.row_upper.tolist()
    sense = list(map(_sense, low, high))
    yield "NAME repurpose-opt"
    yield "ROWS"
    yield " N cost"
    yield from (f" {letter} r{row}" for row, letter in enumerate(sense) if letter != "N")
    yield "COLUMNS"
    yield from _columns(model, sense)
    yield "RHS"
    if model.constant:
        yield f" RHS cost {-model.constant!r}"
    for row, letter in enumerate(sense):
        side = low[row] if letter == "G" else high[row]
        if letter != "N" and side:
            yield f" RHS r{row} {side!r}"
    yield "RANGES"
    for row, letter in enumerate(sense):
        if letter == "L" and low[row] > -np.inf:
            yield f" RNG r{row} {high[row] - low[row]!r}"
    yield "BOUNDS"
    for name, is_integer, least, most in zip(
        model.names, model.is_integer.tolist(), model.lower.tolist(), model.upper.tolist(), strict=True
    ):
        yield from (f" {kind} BND {name}{value}" for kind, value in _bounds(is_integer, least, most))
    yield "ENDATA"


def _sense(low: float, high: float) -> str:
    """Kind of a row; N for one without limits, which is not written. A row with two limits is an L with a range."""
    if low == high:
        return "E"
    if high < np.inf:
        return "L"
    return "G" if low > -np.inf else "N"


def _columns(model: LinearModel, sense: list[str]) -> Iterator[str]:
    by_column = model.matrix.tocsc()
    starts, rows, values = by_column.indptr.tolist(), by_column.indices.tolist(), by_column.data.tolist()
    inside = False
    for column, (name, is_integer, cost) in enumerate(
        zip(model.names, model.is_integer.tolist(), model.cost.tolist(), strict=True)
    ):
        if is_integer != inside:
            yield f" MARKER 'MARKER' '{'INTORG' if is_integer else 'INTEND'}'"
            inside = is_integer
        yield f" {name} cost {cost!r}"  # a zero too: a variable without an entry would not exist
        for entry in range(starts[column], starts[column + 1]):
            if sense[rows[entry]] != "N":
                yield f" {name} r{rows[entry]} {values[entry]!r}"
    if inside:
        yield " MARKER 'MARKER' 'INTEND'"


def _bounds(is_integer: bool, least: float, most: float) -> list[tuple[str, str]]:
    """(kind, value) of the bounds to write. The default is 0 … ∞; some readers take 0 … 1 for integers."""
    if least == most:
        return [("FX", f" {least!r}")]
    if (least, most) == (-np.inf, np.inf):
        return [("FR", "")]
    if is_integer and (least, most) == (0.0, 1.0):
        return [("BV", "")]
    lower = [("MI", "")] if least == -np.inf else [("LO", f" {least!r}")] if least else []
    upper = [("UP", f" {most!r}")] if most < np.inf else [("PL", "")] if is_integer else []
    return lower + upper
