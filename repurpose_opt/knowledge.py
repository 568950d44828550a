"""What a worker knows of a layer's inputs x̂: the values that it holds or receives, and the numbers of codes.

T_k (features, columns) makes them of x̂. For worker k, V_k = W̃_k C T_kᵀ (T_k C T_kᵀ)⁻¹ T_k is the refit, and M_k =
C − C T_kᵀ (T_k C T_kᵀ)⁻¹ T_k C is left of C. With chosen values only, T_k picks columns: `repair` has that case.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import LinAlgError, cholesky, solve_triangular

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.metrics import kept_columns
from repurpose_opt.problem import LayerProblem, Weight
from repurpose_opt.repair import sum_rows


def features(problem: LayerProblem, exchange: Exchange, worker: int) -> Any:
    """T_k, csr_array (features, columns): the columns that the worker has, then the codes it receives, by source."""
    kept = kept_columns(problem, exchange.chosen_values, worker)
    parts = [sparse.csr_array((np.ones(len(kept)), (np.arange(len(kept)), kept)), shape=(len(kept), problem.columns))]
    for source, code in exchange.codes_to(worker):
        assert problem.value_columns is not None
        columns = problem.value_columns[problem.input_owner == source]
        parts.append(_spread(np.asarray(code.encoder, dtype=np.float64), columns, problem.columns))
    return sparse.vstack(parts, format="csr")


def refit_with_codes(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
    """The weights V that minimise the error for these owners and messages, chosen values or codes.

    Dense in, dense out; dtype as the weight's. O(Σ_k f_k³ + m_k f_k columns) for f_k features.
    """
    row_owner = owner[problem.row_neuron]
    refitted = np.zeros((problem.rows, problem.columns), dtype=problem.weight.dtype)
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        known = features(problem, exchange, k)
        if len(rows) == 0 or known.shape[0] == 0:
            continue
        factor = _factor(problem, known)
        half = solve_triangular(factor, known @ problem.predicted_moment[rows].T, lower=True)
        refitted[rows] = (known.T @ solve_triangular(factor, half, lower=True, trans=1)).T
    return type(problem.weight)(refitted) if problem.is_sparse else refitted


def compensated_cost_with_codes(problem: LayerProblem, exchange: Exchange) -> NDArray[np.float64]:
    """(m, P) cost g w̃_i M_k w̃_iᵀ of neuron i on worker k after refit, with the messages fixed."""
    explained = np.zeros((problem.rows, problem.P))
    for k in range(problem.P):
        known = features(problem, exchange, k)
        if known.shape[0] > 0:
            half = solve_triangular(_factor(problem, known), known @ problem.predicted_moment.T, lower=True)
            explained[:, k] = np.einsum("fr,fr->r", half, half)
    cost = problem.output_weight[:, None] * (problem.output_energy[:, None] - explained)
    return sum_rows(problem, cost)


def _factor(problem: LayerProblem, known: Any) -> NDArray[np.float64]:
    """Lower Cholesky factor of T_k C T_kᵀ."""
    second = problem.moments.regularised
    gram = (known * second) @ known.T if second.ndim == 1 else known @ (known @ second).T
    try:
        return np.asarray(cholesky(gram.toarray() if sparse.issparse(gram) else gram, lower=True))
    except LinAlgError:
        raise InvalidArgument("second_moment", "an indefinite matrix", "a positive semidefinite one") from None


def _spread(encoder: NDArray[np.float64], columns: NDArray[np.int64], count: int) -> Any:
    """R ⊗ I on the unfolded columns, csr_array (r·b, count), of R (r, v) and the columns (v, b) of the values."""
    (r, v), b = encoder.shape, columns.shape[1]
    row = np.broadcast_to(np.arange(r)[:, None, None] * b + np.arange(b), (r, v, b))
    column = np.broadcast_to(columns, (r, v, b))
    data = np.broadcast_to(encoder[:, :, None], (r, v, b))
    return sparse.csr_array((data.ravel(), (row.ravel(), column.ravel())), shape=(r * b, count))
