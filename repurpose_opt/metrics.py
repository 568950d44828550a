"""What a solution costs and whether it is valid, computed from owners, messages and weights alone."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.exchange import Code, Exchange, Values
from repurpose_opt.knowledge import covered, features, had_columns
from repurpose_opt.problem import LayerProblem, Weight, by_row_blocks, dense, row_blocks, times, weighted_squares

TOLERANCE = 1e-9


def worker_load(problem: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """(P,) load that each worker holds."""
    return np.asarray(np.bincount(owner, problem.load, problem.P), dtype=np.float64)


def traffic(problem: LayerProblem, exchange: Exchange) -> NDArray[np.int64]:
    """(P, P) bytes a sample from worker p (row) to worker k (column)."""
    sent = np.zeros((problem.P, problem.P), dtype=np.int64)
    for (source, target), message in exchange.messages.items():
        if isinstance(message, Code):
            sent[source, target] = message.size * problem.number_bytes[source]
        else:
            sent[source, target] = problem.value_bytes[message.values].sum()
    return sent


def sent_bytes(problem: LayerProblem, exchange: Exchange) -> NDArray[np.int64]:
    """(P,) bytes a sample that each worker sends. On broadcast links, what goes to several workers counts once."""
    if not problem.broadcast:
        return np.asarray(traffic(problem, exchange).sum(axis=1))
    chosen = exchange.chosen_values.any(axis=1)
    sent = np.bincount(problem.input_owner, problem.value_bytes * chosen, problem.P).astype(np.int64)
    codes: dict[int, list[Code]] = {}
    for (source, _), message in exchange.messages.items():
        known = codes.setdefault(source, [])
        if isinstance(message, Code) and not any(np.array_equal(message.encoder, code.encoder) for code in known):
            known.append(message)
            sent[source] += message.size * problem.number_bytes[source]
    return sent


def volume(problem: LayerProblem, exchange: Exchange) -> int:
    """Bytes of all messages for one sample."""
    return int(sent_bytes(problem, exchange).sum())


def priced_volume(problem: LayerProblem, exchange: Exchange) -> float:
    """Σ over messages of bytes · link_price; on broadcast links Σ over workers of bytes · their dearest link_price."""
    if problem.broadcast:
        return float(sent_bytes(problem, exchange) @ problem.link_price.max(axis=1))
    return float((traffic(problem, exchange) * problem.link_price).sum())


def busiest(problem: LayerProblem, exchange: Exchange) -> int:
    """Max over workers of max(bytes sent, bytes received) for one sample."""
    received = traffic(problem, exchange).sum(axis=0)
    return int(max(sent_bytes(problem, exchange).max(), received.max()))


def priced_busiest(problem: LayerProblem, exchange: Exchange) -> float:
    """Max over workers of max(Σ bytes · link_price sent, Σ bytes · link_price received) for one sample."""
    priced = traffic(problem, exchange) * problem.link_price
    return float(max(priced.sum(axis=1).max(), priced.sum(axis=0).max()))


def priced_communication(problem: LayerProblem, exchange: Exchange, communication: str) -> float:
    """The priced volume where communication is "total", the priced busiest where it is "busiest"."""
    return (priced_busiest if communication == "busiest" else priced_volume)(problem, exchange)


def worker_macs(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> NDArray[np.int64]:
    """(P,) multiply-accumulates a sample, as dense matrices compute them: rows times columns held, and `message_macs`.

    For unfolded columns: at a position of the map.
    """
    rows = np.bincount(owner[problem.row_neuron], minlength=problem.P)
    columns = np.bincount(problem.column_home, minlength=problem.P)
    return np.asarray(rows * columns + message_macs(problem, owner, exchange), dtype=np.int64)


def message_macs(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> NDArray[np.int64]:
    """(P,) those that messages cause: rows times columns received, and r · n_p at the source of a code of r numbers."""
    rows = np.bincount(owner[problem.row_neuron], minlength=problem.P)
    held = np.bincount(problem.input_owner, minlength=problem.P)
    columns = np.bincount(problem.column_value, minlength=problem.n)
    macs = np.zeros(problem.P, dtype=np.int64)
    for (source, target), message in exchange.messages.items():
        if isinstance(message, Code):
            width = columns[np.argmax(problem.input_owner == source)]
            macs[target] += rows[target] * message.size * width
            macs[source] += message.size * held[source]
        else:
            macs[target] += rows[target] * columns[message.values].sum()
    return macs


def weighted_error(
    problem: LayerProblem, owner: NDArray[np.int64], weight: Weight, exchange: Exchange | None = None
) -> float:
    """E Σ_i g_i (Wx − Vx̂)_i² for centred inputs, plus the ridge term λ Σ_i g_i ‖W_i − V_i‖².

    O(m |S|²) for weights V that read |S| columns on each worker. With an exchange with codes, V counts as what they
    cover of it (`weights_outside` is what they do not), which takes O(m f²) for f features instead of columns.
    """
    rows = _squared_error(problem, owner, weight, problem.moments.ridge, exchange)
    return float(np.maximum(rows, 0.0) @ problem.output_weight)


def nmse(
    problem: LayerProblem,
    owner: NDArray[np.int64],
    weight: Weight,
    bias: NDArray[np.float64],
    exchange: Exchange | None = None,
) -> float:
    """E‖Wx + b − Vx̂ − b'‖² / E‖Wx‖² on the calibration moments: uncentred, without g or ridge.

    `exchange` as for `weighted_error`.
    """
    moments = problem.moments
    centred = np.maximum(_squared_error(problem, owner, weight, 0.0, exchange), 0.0).sum()
    output_mean = times(problem, problem.weight, moments.target_mean)
    shift = output_mean + problem.bias - times(problem, weight, moments.mean) - bias
    scale = _energy(problem, 0.0).sum() + np.square(output_mean).sum()
    error = centred + np.square(shift).sum()
    return float(error / scale) if scale > 0 else (0.0 if error <= TOLERANCE else float("inf"))


def violations(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> tuple[str, ...]:
    """What is wrong with a solution, one line each; empty for a valid one."""
    found = placement_violations(problem, owner) + exchange_violations(problem, exchange)
    if found:
        return found
    outside = weights_outside(problem, owner, exchange, weight)
    return (f"{outside} nonzero weights read values that their worker does not have",) if outside else ()


def placement_violations(problem: LayerProblem, owner: NDArray[np.int64]) -> tuple[str, ...]:
    """What is wrong with the owners alone: range, capacity, min_load, allowed."""
    if owner.shape != (problem.m,) or owner.dtype.kind not in "iu":
        return (f"owner has dtype {owner.dtype} and shape {owner.shape}, not ({problem.m},) whole numbers",)
    if ((owner < 0) | (owner >= problem.P)).any():
        return (f"owner outside 0 … {problem.P - 1}",)
    found = []
    load = worker_load(problem, owner)
    slack = TOLERANCE * problem.load.sum()
    for k in np.flatnonzero(load > problem.capacity + slack):
        found.append(f"worker {k} holds load {load[k]:g}, above its capacity {problem.capacity[k]:g}")
    for k in np.flatnonzero(load < problem.min_load - slack):
        found.append(f"worker {k} holds load {load[k]:g}, below its min_load {problem.min_load[k]:g}")
    forbidden = ~problem.allowed[np.arange(problem.m), owner]
    if forbidden.any():
        i = int(np.flatnonzero(forbidden)[0])
        found.append(f"neuron {i} is on worker {owner[i]}, which is not allowed")
    return tuple(found)


def exchange_violations(problem: LayerProblem, exchange: Exchange) -> tuple[str, ...]:
    """What is wrong with the messages: their shape, who sends and what."""
    if (exchange.n, exchange.P) != (problem.n, problem.P):
        return (f"exchange of {exchange.n} values on {exchange.P} workers, not {problem.n} on {problem.P}",)
    for (source, target), message in exchange.messages.items():
        if not (0 <= source < problem.P and 0 <= target < problem.P and source != target):
            return (f"message from worker {source} to {target}",)
        if isinstance(message, Values):
            wrong = _values_violation(problem, source, target, message)
        else:
            wrong = _code_violation(problem, source, target, message)
        if wrong is not None:
            return (wrong,)
    return ()


def _values_violation(problem: LayerProblem, source: int, target: int, message: Values) -> str | None:
    values = message.values
    inside = (values >= 0) & (values < problem.n)
    if not inside.all() or (problem.input_owner[values] != source).any():
        return f"worker {source} sends values that it does not hold"
    if len(np.unique(values)) < len(values):
        return f"worker {source} sends a value to worker {target} twice"
    return None


def _code_violation(problem: LayerProblem, source: int, target: int, message: Code) -> str | None:
    reason = codes_unsupported(problem)
    if reason is not None:
        return reason
    name, shape = f"the code from worker {source} to {target}", message.encoder.shape
    held = int((problem.input_owner == source).sum())
    if len(shape) != 2 or shape[1] != held or not 0 < shape[0] <= held:
        return f"{name} has an encoder of shape {shape}, not (1 … {held}, {held})"
    if not np.allclose(message.encoder @ message.encoder.T, np.eye(len(message.encoder)), atol=1e-4):
        return f"{name} has an encoder without orthonormal rows"
    return None


def codes_unsupported(problem: LayerProblem) -> str | None:
    """Why values of this problem cannot be combined, or None."""
    if problem.value_columns is None:
        return "codes combine values of equally many columns; these differ"
    if (problem.number_bytes < 0).any():
        return "codes combine values of equal value_bytes; those of one worker differ"
    return None


def weights_outside(problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> int:
    """Nonzeros of V whose value is neither held by their worker nor sent to it, nor is covered by a code."""
    missing = ~had_columns(problem, exchange.chosen_values)
    row_owner = owner[problem.row_neuron]
    if exchange.has_codes:
        return sum(
            _outside_codes(problem, np.flatnonzero(row_owner == k), exchange, weight, k) for k in range(problem.P)
        )
    if sparse.issparse(weight):
        entries = weight.tocoo()
        return int((missing[entries.col, row_owner[entries.row]] & (entries.data != 0)).sum())
    by_worker = np.ascontiguousarray(missing.T)
    return sum(
        int(np.count_nonzero(weight[rows].astype(bool) & by_worker[row_owner[rows]])) for rows in row_blocks(problem)
    )


def _outside_codes(
    problem: LayerProblem, rows: NDArray[np.int64], exchange: Exchange, weight: Weight, worker: int
) -> int:
    """`weights_outside` of one worker, up to the rounding of V = U R in the precision of V."""
    block = dense(weight[rows]).astype(np.float64)
    block[:, had_columns(problem, exchange.chosen_values)[:, worker]] = 0.0
    assert problem.value_columns is not None
    for source, code in exchange.codes_to(worker):
        columns = problem.value_columns[problem.input_owner == source]
        rounding = 1e3 * np.finfo(weight.dtype).eps * np.abs(block[:, columns]).max(initial=0.0)
        left = block[:, columns] - covered(block[:, columns], code.encoder)
        block[:, columns] = np.where(np.abs(left) > rounding, left, 0.0)
    return int(np.count_nonzero(block))


def _energy(problem: LayerProblem, ridge: float) -> NDArray[np.float64]:
    """Diagonal of W (C₀+ridge·I) Wᵀ, (rows,)."""
    excess = problem.moments.ridge - ridge
    if excess == 0:
        return problem.output_energy
    return problem.output_energy - excess * weighted_squares(problem, problem.weight, np.ones(problem.columns))


def _squared_error(
    problem: LayerProblem, owner: NDArray[np.int64], weight: Weight, ridge: float, exchange: Exchange | None = None
) -> NDArray[np.float64]:
    """(rows,) diagonal of W C₀ Wᵀ − 2 V Dᵀ Wᵀ + V C Vᵀ, each matrix with ridge·I added."""
    moments = problem.moments
    if moments.is_diagonal:
        return _diagonal_squared_error(problem, weight, ridge)
    second = moments.regularised if ridge == moments.ridge else moments.second
    excess = moments.ridge - ridge
    row_owner = owner[problem.row_neuron]
    error = _energy(problem, ridge).copy()
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        block = dense(weight[rows]).astype(np.float64)
        read: Callable[[NDArray[Any]], NDArray[Any]]
        if exchange is not None and exchange.has_codes:
            read = features(problem, exchange, k).of  # its rows are orthonormal, so of(block) reads V
            variance = read(read(second).T)
        else:
            columns = np.flatnonzero(block.any(axis=0))
            read, variance = itemgetter((slice(None), columns)), second[np.ix_(columns, columns)]
        block, cross = read(block), read(problem.predicted_moment[rows])
        if excess:
            cross = cross - excess * read(dense(problem.weight[rows]))
        product = block @ variance
        product -= 2 * cross
        error[rows] += np.einsum("rc,rc->r", product, block)
    return error


def _diagonal_squared_error(problem: LayerProblem, weight: Weight, ridge: float) -> NDArray[np.float64]:
    moments = problem.moments
    second, cross = moments.second + ridge, moments.cross + ridge
    if sparse.issparse(weight):
        if moments.same_inputs:
            difference = sparse.csr_array(problem.weight - weight)
            return weighted_squares(problem, difference, second)
        product = np.asarray(weight.multiply(problem.weight) @ cross)
        return _energy(problem, ridge) - 2 * product + weighted_squares(problem, weight, second)

    def of_same_inputs(rows: slice) -> NDArray[np.float64]:
        return np.square(dense(problem.weight[rows]) - weight[rows], dtype=np.float64) @ second

    def of_both(rows: slice) -> NDArray[np.float64]:
        mixed = np.multiply(dense(problem.weight[rows]), weight[rows], dtype=np.float64)
        return np.square(weight[rows], dtype=np.float64) @ second - 2 * (mixed @ cross)

    if moments.same_inputs:
        return by_row_blocks(problem, of_same_inputs)
    return _energy(problem, ridge) + by_row_blocks(problem, of_both)
