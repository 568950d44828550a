"""Refit of the remaining weights, and the exact cost of a neuron on a worker after it (Schur complement).

For worker k with columns S: V_k[:,S] = W̃_k C[:,S] C_SS⁻¹, the error left is W̃_k M_k W̃_kᵀ with
M_k = C − C[:,S] C_SS⁻¹ C[S,:]. Both follow from G = W̃ C = W D, so W̃ itself is never formed (C, D with ridge).
With codes, `features` T_k take the place of the columns S: V_k = W̃_k C T_kᵀ (T_k C T_kᵀ)⁻¹ T_k, M_k likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import solve_triangular

from repurpose_opt.exchange import Exchange
from repurpose_opt.knowledge import Features, features, had_columns, kept_columns
from repurpose_opt.moments import lower_factor
from repurpose_opt.problem import LayerProblem, Weight, by_row_blocks, dense, row_blocks, times


def refit(problem: LayerProblem, owner: NDArray[np.int64], transfers: NDArray[np.bool_]) -> Weight:
    """The weights V, supported by the transfers, that minimise the error for these owners.

    Sparse in, sparse out where moments are diagonal; dtype as the weight's. O(Σ_k |S_k|³ + m_k |S_k|²).
    """
    row_owner = owner[problem.row_neuron]
    if problem.moments.is_diagonal:
        return restrict(problem, problem.target_weight, row_owner, transfers)
    refitted = np.zeros((problem.rows, problem.columns), dtype=problem.weight.dtype)
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        columns = kept_columns(problem, transfers, k)
        if len(rows) == 0 or len(columns) == 0:
            continue
        factor = _factor(problem, columns)
        half = solve_triangular(factor, problem.predicted_moment[np.ix_(rows, columns)].T, lower=True)
        refitted[np.ix_(rows, columns)] = solve_triangular(factor, half, lower=True, trans=1).T
    return type(problem.weight)(refitted) if problem.is_sparse else refitted


def corrected_bias(problem: LayerProblem, weight: Weight) -> NDArray[np.float64]:
    """b' = b + W E[x] − V E[x̂], (rows,): the bias that leaves no error in the mean."""
    moments = problem.moments
    if not (moments.mean.any() or moments.target_mean.any()):
        return problem.bias
    return problem.bias + times(problem, problem.weight, moments.target_mean) - times(problem, weight, moments.mean)


def restrict(
    problem: LayerProblem, weight: Weight, row_owner: NDArray[np.int64], transfers: NDArray[np.bool_]
) -> Weight:
    """The weight with zeros wherever a worker does not have the value."""
    has = had_columns(problem, transfers)
    if problem.is_sparse:
        entries = weight.tocoo()
        kept = has[entries.col, row_owner[entries.row]]
        coordinates = (entries.row[kept], entries.col[kept])
        return type(problem.weight)((entries.data[kept], coordinates), shape=weight.shape)
    by_worker = np.ascontiguousarray(has.T)

    def of_block(rows: slice) -> NDArray[Any]:
        return np.where(by_worker[row_owner[rows]], weight[rows], 0).astype(problem.weight.dtype, copy=False)

    return by_row_blocks(problem, of_block)


def compensated_cost(problem: LayerProblem, transfers: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(m, P) cost g w̃_i M_k w̃_iᵀ of neuron i on worker k after refit, with the transfers fixed.

    Costs are relative to what no worker can explain: they may differ from the error by a constant per neuron.
    O(Σ_k |S_k|³ + m |S_k|²) for full moments, O(m n) for diagonal ones.
    """
    explained = np.empty((problem.rows, problem.P))
    if problem.moments.is_diagonal:
        had = had_columns(problem, transfers) * problem.moments.variance[:, None]
        for rows, squared in _squared_target(problem):
            explained[rows] = squared @ had
    else:
        for k in range(problem.P):
            columns = kept_columns(problem, transfers, k)
            half = solve_triangular(_factor(problem, columns), problem.predicted_moment[:, columns].T, lower=True)
            explained[:, k] = np.einsum("cr,cr->r", half, half)
    explained *= problem.output_weight[:, None]
    total = problem.output_weight * problem.output_energy
    return sum_rows(problem, total[:, None] - explained)


def refit_with_codes(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
    """The weights V that minimise the error for these owners and messages, chosen values or codes.

    Dense in, dense out; dtype as the weight's. O(Σ_k f_k³ + m_k f_k columns) for f_k features.
    """
    row_owner = owner[problem.row_neuron]
    refitted = np.zeros((problem.rows, problem.columns), dtype=problem.weight.dtype)
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        known = features(problem, exchange, k)
        if len(rows) == 0 or len(known) == 0:
            continue
        factor = _factor_of(problem, known)
        half = solve_triangular(factor, known.of(problem.predicted_moment[rows]).T, lower=True)
        refitted[rows] = known.back(solve_triangular(factor, half, lower=True, trans=1).T)
    return type(problem.weight)(refitted) if problem.is_sparse else refitted


def compensated_cost_with_codes(problem: LayerProblem, exchange: Exchange) -> NDArray[np.float64]:
    """(m, P) cost g w̃_i M_k w̃_iᵀ of neuron i on worker k after refit, with the messages fixed."""
    explained = np.zeros((problem.rows, problem.P))
    for k in range(problem.P):
        known = features(problem, exchange, k)
        if len(known) > 0:
            half = solve_triangular(_factor_of(problem, known), known.of(problem.predicted_moment).T, lower=True)
            explained[:, k] = np.einsum("fr,fr->r", half, half)
    cost = problem.output_weight[:, None] * (problem.output_energy[:, None] - explained)
    return sum_rows(problem, cost)


def column_energy(problem: LayerProblem) -> Weight:
    """g_i C_jj w̃_ij², (rows, columns): the error, on the diagonal of C, of dropping one weight."""
    target, variance = problem.target_weight, problem.moments.variance
    if problem.is_sparse and problem.moments.is_diagonal:
        return target.multiply(target).multiply(variance).multiply(problem.output_weight[:, None]).tocsr()
    energy = np.square(dense(target), dtype=np.float64)
    energy *= variance
    energy *= problem.output_weight[:, None]
    return energy


def value_energy(problem: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """E_jk, (n, P): energy of value j over the neurons of worker k, on the diagonal of C."""
    on_worker = np.eye(problem.P)[owner[problem.row_neuron]] * problem.output_weight[:, None]
    by_column = np.zeros((problem.columns, problem.P))
    for rows, squared in _squared_target(problem):
        by_column += squared.T @ on_worker[rows]
    by_column *= problem.moments.variance[:, None]
    if problem.one_column_per_value:
        return by_column
    by_value = np.zeros((problem.n, problem.P))
    np.add.at(by_value, problem.column_value, by_column)
    return by_value


def value_pins(problem: LayerProblem) -> Weight:
    """e_ij, (m, n) csr_array: energy of neuron i's weights on value j, on the diagonal of C; zeros left out."""
    entries = sparse.coo_array(column_energy(problem))
    coordinates = (problem.row_neuron[entries.row], problem.column_value[entries.col])
    pins = sparse.csr_array((entries.data.astype(np.float64), coordinates), shape=(problem.m, problem.n))
    pins.sum_duplicates()
    pins.eliminate_zeros()
    return pins


def sum_rows(problem: LayerProblem, by_row: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, P) summed over the rows of each neuron, (m, P)."""
    if problem.rows == problem.m:
        order = np.argsort(problem.row_neuron)
        return by_row[order]
    by_neuron = np.zeros((problem.m, by_row.shape[1]))
    np.add.at(by_neuron, problem.row_neuron, by_row)
    return by_neuron


def _squared_target(problem: LayerProblem) -> Iterator[tuple[slice, Weight]]:
    """Some rows and their w̃_ij²: block by block, or all at once where the weight is sparse."""
    target = problem.target_weight
    if problem.is_sparse:
        yield slice(None), target.multiply(target).tocsr()
        return
    for rows in row_blocks(problem):
        yield rows, np.square(target[rows], dtype=np.float64)


def _factor(problem: LayerProblem, columns: NDArray[np.int64]) -> NDArray[np.float64]:
    return lower_factor(problem.moments.regularised[np.ix_(columns, columns)])


def _factor_of(problem: LayerProblem, known: Features) -> NDArray[np.float64]:
    """Lower Cholesky factor of T_k C T_kᵀ."""
    second = problem.moments.regularised
    if second.ndim == 1:
        second = np.where(second > 0, second, 1.0)
        return lower_factor(((known.matrix * second) @ known.matrix.T).toarray())
    return lower_factor(known.of(known.of(second).T))
