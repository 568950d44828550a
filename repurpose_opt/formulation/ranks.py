"""The smallest linear exchange that changes nothing: for each pair of workers, as many numbers as the rank of W_kp.

The rank is that of W_kp on the support of the source's inputs, the span of C_pp: what never varies is in the bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Code, Exchange, Message, Values
from repurpose_opt.knowledge import covered
from repurpose_opt.problem import LayerProblem, Weight, dense
from repurpose_opt.receiver import row_space
from repurpose_opt.repair import restrict

LARGEST_LOSS = 1e-9
"""Share of the output's variance that counts as rounding; float32 leaves 1e-13."""


def select_ranks(problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
    """A code of the row space of each W_kp on the support of its inputs, or the values it reads if they are as few."""
    messages: dict[tuple[int, int], Message] = {}
    for source, target, block in _blocks(problem, owner):
        unit = _unit(problem, source)
        basis = row_space(block * unit, max(block.shape) * float(np.finfo(problem.weight.dtype).eps)) / unit
        reads = np.flatnonzero(block.any(axis=0))
        if len(basis) == len(reads):
            if len(reads):
                messages[source, target] = Values(np.flatnonzero(problem.input_owner == source)[reads])
        else:
            messages[source, target] = Code.spanning(basis)
    return Exchange(problem.n, problem.P, messages)


def project_on_messages(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
    """W where a worker has the value, W_kp Rᵀ R where a code covers it, else 0; (rows, columns)."""
    row_owner = owner[problem.row_neuron]
    kept = restrict(problem, problem.weight, row_owner, exchange.chosen_values)
    if not exchange.has_codes:
        return kept
    projected = dense(kept).astype(np.float64)
    assert problem.value_columns is not None
    for target in range(problem.P):
        rows = np.flatnonzero(row_owner == target)
        for source, code in exchange.codes_to(target):
            columns = problem.value_columns[problem.input_owner == source]
            block = dense(problem.weight[rows])[:, columns].astype(np.float64)
            projected[np.ix_(rows, columns.ravel())] = covered(block, code.encoder).reshape(len(rows), -1)
    projected = projected.astype(problem.weight.dtype)
    return type(problem.weight)(projected) if problem.is_sparse else projected


def lost_share(problem: LayerProblem, weight: Weight) -> float:
    """tr((W−V) C (W−V)ᵀ) / tr(W C Wᵀ), without ridge: what of the output's variance on the received inputs is lost."""
    second = problem.moments.second
    original = dense(problem.weight).astype(np.float64)
    lost, whole = (
        float(np.einsum("rc,rc->", matrix * second if second.ndim == 1 else matrix @ second, matrix))
        for matrix in (original - dense(weight), original)
    )
    return lost / whole if whole > 0 else 0.0


def rank_price(problem: LayerProblem, owner: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """(m, P) priced numbers that neuron i adds on worker k to those that its other neurons need there already.

    Without owners: those that it needs alone. O(m n · numbers a pair).
    """
    price = problem.number_bytes[:, None] * problem.link_price
    cost = np.zeros((problem.m, problem.P))
    for source in np.unique(problem.input_owner).tolist():
        block = _on_support(problem, source, np.arange(problem.rows)) * _unit(problem, source)
        for target in np.flatnonzero(np.arange(problem.P) != source):
            there = np.zeros(problem.m, dtype=bool) if owner is None else owner == target
            adds = _added_rank(block, problem.row_neuron, there, float(np.finfo(problem.weight.dtype).eps))
            cost[:, target] += price[source, target] * adds
    return cost


def _blocks(problem: LayerProblem, owner: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.float64]]]:
    """(source, target, W_kp on the support (rows of k · b, n_p)) of each pair with values and neurons."""
    row_owner = owner[problem.row_neuron]
    for source in np.unique(problem.input_owner).tolist():
        for target in np.unique(row_owner).tolist():
            if source != target:
                block = _on_support(problem, source, np.flatnonzero(row_owner == target))
                yield source, target, block.reshape(-1, block.shape[2])


def _on_support(problem: LayerProblem, source: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """W of some rows on the values of a worker, projected on what of them varies, (rows, b, n_p)."""
    assert problem.value_columns is not None
    columns = problem.value_columns[problem.input_owner == source]
    block = dense(problem.weight[rows])[:, columns].astype(np.float64).swapaxes(1, 2)
    second = problem.moments.second
    if second.ndim == 1:
        return block * (second[columns].T > 0)
    if columns.shape[1] > 1:
        return block * (np.diagonal(second)[columns].T > 0)
    spread, axes = np.linalg.eigh(second[np.ix_(columns[:, 0], columns[:, 0])])
    varies = spread > len(spread) * np.finfo(float).eps * max(spread.max(initial=0.0), 0.0)
    if varies.all():
        return block
    left = block @ axes[:, varies] @ axes[:, varies].T
    rounding = len(spread) * np.finfo(float).eps * np.abs(block).max(initial=0.0)
    return np.where(np.abs(left) > rounding, left, 0.0)


def _unit(problem: LayerProblem, source: int) -> NDArray[np.float64]:
    """(n_p,) by how much each value of a worker varies, in which units the rank is judged; 1 where it does not."""
    assert problem.value_columns is not None
    columns = problem.value_columns[problem.input_owner == source]
    second = problem.moments.second
    unit = np.sqrt((second if second.ndim == 1 else np.diagonal(second))[columns].mean(axis=1))
    return np.where(unit > 0, unit, 1.0)


def _added_rank(
    block: NDArray[np.float64], row_neuron: NDArray[np.int64], there: NDArray[np.bool_], rounding: float
) -> NDArray[np.float64]:
    """(m,) by how much each neuron's rows raise the rank of the rows of the others that are there.

    `block` is (rows, b, n_p), `there` (m,). For neurons of several rows or columns an upper bound: that of each row.
    """
    is_there = there[row_neuron]
    flat = block.reshape(-1, block.shape[2])
    reads = block[is_there].reshape(-1, block.shape[2])
    basis = row_space(reads, max(reads.shape) * rounding)
    left = flat - (flat @ basis.T) @ basis
    size = np.linalg.norm(flat, axis=1)
    adds = np.linalg.norm(left, axis=1) > 1e-5 * np.maximum(size, np.finfo(float).tiny)
    # Of those that are there: a row that the others do not span has leverage 1.
    own = np.repeat(is_there, block.shape[1])
    if own.any() and len(basis):
        left_vectors = np.linalg.svd(flat[own], full_matrices=False)[0][:, : len(basis)]
        adds[own] = np.einsum("rk,rk->r", left_vectors, left_vectors) > 1 - 1e-5
    by_neuron = np.zeros(len(there))
    np.add.at(by_neuron, np.repeat(row_neuron, block.shape[1]), adds)
    return by_neuron
