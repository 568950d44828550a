"""What a worker knows of a layer's inputs x̂: the values that it holds or receives, and the numbers of codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.exchange import Exchange
from repurpose_opt.problem import LayerProblem


def kept_columns(problem: LayerProblem, transfers: NDArray[np.bool_], worker: int) -> NDArray[np.int64]:
    """Columns that a worker has: those of the values it holds or receives."""
    return np.flatnonzero(had_columns(problem, transfers)[:, worker])


def had_columns(problem: LayerProblem, transfers: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(columns, P) whether worker k holds or receives the value of a column."""
    return (transfers | ~problem.remote)[problem.column_value]


@dataclass(frozen=True, eq=False)
class Features:
    """T_k (features, columns), of which T_k x̂ is all that a worker knows of x̂; its rows are orthonormal.

    The columns that it has, ascending, then the codes that it receives, by source. Products by it are those of its
    parts, since a sparse matrix of dense blocks is slow.
    """

    kept: NDArray[np.int64]
    codes: Sequence[tuple[NDArray[np.float64], NDArray[np.int64]]]
    """R (r, v) and the columns (v, b) of the source's values."""
    columns: int

    @cached_property
    def matrix(self) -> Any:
        """csr_array (features, columns)"""
        count = len(self.kept)
        kept = sparse.csr_array((np.ones(count), (np.arange(count), self.kept)), shape=(count, self.columns))
        spread = [_spread(encoder, columns, self.columns) for encoder, columns in self.codes]
        return sparse.vstack([kept, *spread], format="csr")

    def __len__(self) -> int:
        return len(self.kept) + sum(len(encoder) * columns.shape[1] for encoder, columns in self.codes)

    def of(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """(x, columns) @ Tᵀ, (x, features)"""
        parts = [rows[:, _slice(self.kept)]]
        for encoder, columns in self.codes:
            read = [rows[:, _slice(column)] @ encoder.T for column in columns.T]  # (x, r) of each column of a value
            parts.append(np.stack(read, axis=2).reshape(len(rows), -1))
        return np.hstack(parts)

    def back(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """(x, features) @ T, (x, columns)"""
        spread = np.zeros((len(rows), self.columns))
        first = len(self.kept)
        spread[:, _slice(self.kept)] = rows[:, :first]
        for encoder, columns in self.codes:
            r, b = len(encoder), columns.shape[1]
            numbers = rows[:, first : first + r * b].reshape(-1, r, b)
            for i, column in enumerate(columns.T):
                spread[:, _slice(column)] = numbers[:, :, i] @ encoder
            first += r * b
        return spread


def features(problem: LayerProblem, exchange: Exchange, worker: int) -> Features:
    """What a worker knows with these messages."""
    codes = []
    for source, code in exchange.codes_to(worker):
        assert problem.value_columns is not None
        columns = problem.value_columns[problem.input_owner == source]
        codes.append((np.asarray(code.encoder, dtype=np.float64), columns))
    return Features(kept_columns(problem, exchange.chosen_values, worker), codes, problem.columns)


def covered(block: NDArray[np.float64], encoder: NDArray[np.floating]) -> NDArray[np.float64]:
    """W (R ⊗ I)ᵀ (R ⊗ I), (rows, v, b): what a code R (r, v) of orthonormal rows covers of weights W (rows, v, b)."""
    decoder = np.einsum("mvb,rv->mrb", block, encoder)
    return np.asarray(np.einsum("mrb,rv->mvb", decoder, encoder))


def _slice(columns: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """The columns as a slice where they are a run, which spares a copy."""
    if len(columns) and columns[-1] - columns[0] == len(columns) - 1 and (np.diff(columns) == 1).all():
        return slice(int(columns[0]), int(columns[-1]) + 1)
    return columns


def _spread(encoder: NDArray[np.float64], columns: NDArray[np.int64], count: int) -> Any:
    """R ⊗ I on the unfolded columns, csr_array (r·b, count), of R (r, v) and the columns (v, b) of the values."""
    (r, v), b = encoder.shape, columns.shape[1]
    row = np.broadcast_to(np.arange(r)[:, None, None] * b + np.arange(b), (r, v, b))
    column = np.broadcast_to(columns, (r, v, b))
    data = np.broadcast_to(encoder[:, :, None], (r, v, b))
    return sparse.csr_array((data.ravel(), (row.ravel(), column.ravel())), shape=(r * b, count))
