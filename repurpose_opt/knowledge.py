"""What a worker knows of a layer's inputs x̂: the values that it holds or receives, and the numbers of codes."""

from __future__ import annotations

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


def features(problem: LayerProblem, exchange: Exchange, worker: int) -> Any:
    """T_k, csr_array (features, columns), of which T_k x̂ is all that a worker knows of x̂.

    The columns that it has, ascending, then the codes that it receives, by source.
    """
    kept = kept_columns(problem, exchange.chosen_values, worker)
    parts = [sparse.csr_array((np.ones(len(kept)), (np.arange(len(kept)), kept)), shape=(len(kept), problem.columns))]
    for source, code in exchange.codes_to(worker):
        assert problem.value_columns is not None
        columns = problem.value_columns[problem.input_owner == source]
        parts.append(_spread(np.asarray(code.encoder, dtype=np.float64), columns, problem.columns))
    return sparse.vstack(parts, format="csr")


def _spread(encoder: NDArray[np.float64], columns: NDArray[np.int64], count: int) -> Any:
    """R ⊗ I on the unfolded columns, csr_array (r·b, count), of R (r, v) and the columns (v, b) of the values."""
    (r, v), b = encoder.shape, columns.shape[1]
    row = np.broadcast_to(np.arange(r)[:, None, None] * b + np.arange(b), (r, v, b))
    column = np.broadcast_to(columns, (r, v, b))
    data = np.broadcast_to(encoder[:, :, None], (r, v, b))
    return sparse.csr_array((data.ravel(), (row.ravel(), column.ravel())), shape=(r * b, count))
