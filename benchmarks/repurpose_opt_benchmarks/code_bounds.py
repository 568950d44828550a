"""What no code can be better than, for given owners: all values of others as those of one source."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, eigvalsh, solve_triangular

from repurpose_opt import LayerProblem, Volume, metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.receiver import Receiver, receivers


def merged_source_bound(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> float:
    """A lower bound on the objective of all codes for these owners, under a budget or a transfer price.

    What receiver k is sent, r numbers R_pk x̂_p of b columns each from all sources p together, are r·b linear
    combinations of its remote columns: a code of that many rows of one merged source. With K, B as in
    `repurpose_opt.receiver`, over all remote columns, such a code lowers the error of k by at most
    Σ_{i ≤ r·b} σ_i²(B K^-½) (Eckart–Young). So the b greatest σ² that are left are the most that the next number of k
    can be worth, and they fall from number to number; a number takes at least the least bytes, and the least price,
    of any source that k has. What a budget can buy is then at most what it buys if numbers are taken by worth a byte,
    the last one in part (a fractional knapsack), of the bytes that whole numbers can fill; at a price,
    Σ max(0, worth − price · least bytes). A price of multiply-accumulates is left out, which only lowers the bound.

    Tight with one source a receiver (P = 2). O(P columns³).
    """
    assert formulation.max_nmse is None
    nothing = Exchange.nothing(problem.n, problem.P)
    most = metrics.weighted_error(problem, owner, formulation.repair(problem, owner, nothing))
    found = [_numbers(problem, formulation, receiver) for receiver in receivers(problem, owner)]
    worth = np.concatenate([worth for worth, _ in found] or [np.empty(0)])
    size = np.concatenate([np.full(len(worth), size) for worth, size in found] or [np.empty(0)])
    if formulation.transfer_price is not None:
        return most - float(np.maximum(worth - formulation.transfer_price * size, 0.0).sum())
    limit = formulation.limit(problem)
    assert limit is not None
    step = int(np.gcd.reduce(problem.number_bytes))
    limit = limit // step * step if step > 0 else limit
    return most - _fractional_knapsack(worth, size, limit)


def merged_gains(receiver: Receiver) -> NDArray[np.float64]:
    """σ² of B K^-½ over all remote columns, falling, (min(rows, remote columns),)."""
    remote = np.concatenate([columns.ravel() for columns in receiver.columns.values()])
    residual = receiver.residual[:, remote]
    if receiver.local_half is None:
        whitened = residual / np.sqrt(receiver.second[remote])
    else:
        known = receiver.local_half[:, remote]
        factor = cholesky(receiver.second[np.ix_(remote, remote)] - known.T @ known, lower=True)
        whitened = solve_triangular(factor, residual.T, lower=True).T
    gram = whitened @ whitened.T if len(whitened) < len(remote) else whitened.T @ whitened
    return np.asarray(np.maximum(eigvalsh(gram)[::-1], 0.0))


def _numbers(problem: LayerProblem, formulation: Volume, receiver: Receiver) -> tuple[NDArray[np.float64], float]:
    """The most that the numbers of a receiver can be worth, one after the other, and the least that one takes."""
    gains = merged_gains(receiver)
    gains = np.append(gains, np.zeros(-len(gains) % receiver.width))
    sources = list(receiver.values)
    size = problem.number_bytes[sources].astype(np.float64)
    if not formulation.has_budget:
        size = size * problem.link_price[sources, receiver.worker]
    return gains.reshape(-1, receiver.width).sum(axis=1), float(size.min())


def _fractional_knapsack(worth: NDArray[np.float64], size: NDArray[np.float64], limit: float) -> float:
    """The most worth within the limit, the last item in part; items without a size are free."""
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(-np.where(worth > 0, worth / size, 0.0), kind="stable")
    worth, size = worth[order], size[order]
    room = np.clip(limit - (np.cumsum(size) - size), 0.0, size)
    share = np.divide(room, size, out=np.ones_like(size), where=size > 0)
    return float(worth @ share)
