"""`group-l0`: the best transfers given the owners, proved by enumerating what each worker may receive.

With weights V_S on the received columns S (see `reduced`) the error of a worker changes by
tr(V_S Q_SS V_Sᵀ) − 2 tr(V_S N_Sᵀ), with Q = K and N = R for the error that the refit minimises. Deciding on one value
after the other doubles the sets. For each set and the columns j that are undecided let u_j be the unit vector less
its part in S, so that uᵀK vanishes on S, and r_j the residual R_j − (V K)_j. Then with M = uᵀKu, H = rᵀr, G = uᵀQu,
F = rᵀ(N − VQ)u and w = M_j/M_jj receiving column j

    changes the error by H_jj G_jj/M_jj² − 2 F_jj/M_jj, and
    makes each of the four X − X_j wᵀ − w X_jᵀ + X_jj wwᵀ; F less (H_j − H_jj w)(G_j − G_jj w)ᵀ/M_jj besides.

For Q = K and N = R two of them are enough: G is M, F is H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve

from repurpose_opt import metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem, dense
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination
from repurpose_opt_solvers.reduced import WorkerProblem, local_inputs, worker_problems

_MOST_STEPS = 2.0**27
"""Numbers computed for one worker: 24 values of one column, about 5 s."""
_MOST_NUMBERS = 2**21
"""Numbers in the matrices of the sets that are looked at together."""
_MOST_PAIRS = 2**20
_NMSE_SLACK = 1e-10
"""By how much `Volume` lets an NMSE exceed its limit, for rounding."""


class GroupL0:
    """Exact given the owners, by enumeration of the sets of up to 24 values a worker lacks. Volume only."""

    name = "group-l0"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, Volume):
            return "enumerates sets by the error after refit: Volume only"
        if formulation.communication == "busiest":
            return "adds up the bytes of the workers: not with communication='busiest'"
        if formulation.selection_is_exact(problem):
            return None
        columns = np.bincount(problem.column_value)
        steps, worker = max((_steps(columns[problem.remote[:, k]]), k) for k in range(problem.P))
        if steps <= _MOST_STEPS:
            return None
        values = np.count_nonzero(problem.remote[:, worker])
        return f"enumerates all sets of values of a worker: the {values} that worker {worker} lacks are too many"

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        if formulation.selection_is_exact(problem):
            return _proved(problem, formulation, owner, formulation.select(problem, owner))
        try:
            return _enumerated(problem, formulation, owner, Deadline(options.time_limit))
        except _OutOfTime:
            message = "no time to enumerate: the transfers are those of threshold"
            return Candidate(Termination.TIME_LIMIT, owner, formulation.select(problem, owner), message=message)


class _OutOfTime(Exception):
    pass


@dataclass(frozen=True, eq=False)
class _Front:
    """Choices of which none is as good as another in both respects; `limited` rises, `minimised` falls."""

    limited: NDArray[np.float64]
    """(choices,) size where the error is minimised, error where the size is."""
    minimised: NDArray[np.float64]
    """(choices,)"""
    sets: NDArray[np.int64]
    """(choices, workers) what each worker receives: bit q for its value q."""


def _enumerated(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], deadline: Deadline) -> Candidate:
    full = _with_full_moments(problem)
    workers = worker_problems(full, formulation, owner)
    by_error = formulation.max_nmse is not None
    fronts = [_front_of(worker, _matrices(full, formulation, owner, worker), by_error, deadline) for worker in workers]
    if not workers:
        sets: NDArray[np.int64] | None = np.empty(0, dtype=np.int64)
    elif formulation.transfer_price is not None:
        best = [np.argmin(front.minimised + formulation.transfer_price * front.limited) for front in fronts]
        sets = np.array([front.sets[choice, 0] for front, choice in zip(fronts, best, strict=True)])
    else:
        limit = formulation.limit(problem)
        sets = _best_within(fronts, _error_limit(full, formulation, owner) if limit is None else limit, deadline)
    if sets is None:  # a max_nmse that cannot be met: the least error of all
        sets = np.array([front.sets[0, 0] for front in fronts])
    return _proved(problem, formulation, owner, _exchange(problem, workers, sets))


def _proved(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], exchange: Exchange) -> Candidate:
    """The bound is the objective as it is recomputed from refitted weights of the layer's own precision."""
    weight = formulation.repair(problem, owner, exchange)
    broken = formulation.violations(problem, owner, exchange, weight)
    if broken:
        return Candidate(Termination.HEURISTIC, owner, exchange, message=f"for these owners at best {broken[0]}")
    objective = formulation.objective(problem, owner, exchange, weight)
    return Candidate(Termination.OPTIMAL, owner, exchange, bound=objective)


def _exchange(problem: LayerProblem, workers: list[WorkerProblem], sets: NDArray[np.int64]) -> Exchange:
    transfers = np.zeros((problem.n, problem.P), dtype=bool)
    for worker, bits in zip(workers, sets, strict=True):
        transfers[worker.value, worker.worker] = bits >> np.arange(len(worker.value)) & 1
    return Exchange.of_transfers(transfers, problem.input_owner)


# ------------------------------------------------------------------------------------------------ what is judged


def _matrices(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], worker: WorkerProblem
) -> NDArray[np.float64]:
    """M, H, and where the NMSE is judged G, F, before anything is received: (2 or 4, c, c).

    The NMSE has no ridge λ: its error is that of the refit less λ‖W − V‖². On local columns V is what the refit makes
    of V_S: A − V_S B with A = W̃ C[:,L] C_LL⁻¹, B = C[remote,L] C_LL⁻¹. So ‖W − V‖² changes by
    tr(V_S (I + B Bᵀ)_SS V_Sᵀ) − 2 tr(V_S Y_Sᵀ), Y = W[:,remote] − (W[:,L] − A) Bᵀ.
    """
    residual = worker.residual
    refit_error = [worker.moment, residual.T @ residual]
    if formulation.max_nmse is None:
        return np.stack(refit_error)
    judged, ridge = formulation.judged(problem), problem.moments.ridge
    rows = np.flatnonzero(owner[problem.row_neuron] == worker.worker)
    weight = dense(judged.weight[rows]).astype(np.float64)
    local, factor, _ = local_inputs(judged, worker.worker)
    onto = cho_solve((factor, True), judged.moments.regularised[np.ix_(local, worker.column)])
    fitted = cho_solve((factor, True), judged.predicted_moment[np.ix_(rows, local)].T).T
    pull = weight[:, worker.column] - (weight[:, local] - fitted) @ onto
    if worker.rotation is not None:
        pull = worker.rotation.T @ pull
    quadratic = worker.moment - ridge * (np.eye(len(worker.column)) + onto.T @ onto)
    return np.stack([*refit_error, quadratic, residual.T @ (residual - ridge * pull)])


def _error_limit(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> float:
    """By how much the error without ridge or g has to change at least, from that without transfers."""
    assert formulation.max_nmse is not None
    weight = dense(problem.weight).astype(np.float64)
    energy = problem.output_energy.sum() - problem.moments.ridge * np.square(weight).sum()
    scale = energy + np.square(weight @ problem.moments.target_mean).sum()
    nothing = _nmse(problem, owner, np.zeros((problem.n, problem.P), dtype=bool))
    return float((formulation.max_nmse + _NMSE_SLACK - nothing) * scale)


def _nmse(problem: LayerProblem, owner: NDArray[np.int64], transfers: NDArray[np.bool_]) -> float:
    weight = refit(problem, owner, transfers)
    return metrics.nmse(problem, owner, weight, corrected_bias(problem, weight))


def _with_full_moments(problem: LayerProblem) -> LayerProblem:
    moments = problem.moments
    if not moments.is_diagonal:
        return problem
    second = np.diag(moments.second)
    cross = second if moments.same_inputs else np.diag(moments.cross)  # one array where x̂ = x
    target = second if moments.target is moments.second else np.diag(moments.target)
    return replace(problem, moments=replace(moments, second=second, cross=cross, target=target))


# --------------------------------------------------------------------------------------------- the sets of a worker


@dataclass(frozen=True, eq=False)
class _Sets:
    """Sets out of the values that are decided, and what deciding on the others needs to know of them."""

    matrices: NDArray[np.float64]
    """(2 or 4, r, r, s) of the r columns that are undecided, for each of the s sets."""
    error: NDArray[np.float64]
    """(s,) change of the error, from that without transfers."""
    size: NDArray[np.float64]
    """(s,)"""
    values: NDArray[np.int64]
    """(s,) bit q for value q."""

    def doubled(self, value: int, size: float, width: int) -> _Sets:
        """Without and with the value that has the last `width` columns."""
        received, error = self.matrices, self.error
        for _ in range(width):  # one after the other is the block of them at once
            received, change = _receive_last(received)
            error = error + change
        return _Sets(
            np.concatenate([self.matrices[:, :-width, :-width], received], axis=-1),
            np.concatenate([self.error, error]),
            np.concatenate([self.size, self.size + size]),
            np.concatenate([self.values, self.values | 1 << value]),
        )

    def parts(self) -> Iterator[_Sets]:
        """The same in pieces that bound the memory."""
        count = len(self.error)
        step = max(1, _MOST_NUMBERS * count // max(self.matrices.size, 1))
        for start in range(0, count, step):
            inside = slice(start, start + step)
            yield _Sets(self.matrices[..., inside], self.error[inside], self.size[inside], self.values[inside])


def _front_of(worker: WorkerProblem, matrices: NDArray[np.float64], by_error: bool, deadline: Deadline) -> _Front:
    """The sets of one worker of which none is as good as another both by size and error. O(2^v) for v values."""
    nothing = _Sets(matrices[..., None], np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.int64))
    widths = np.bincount(worker.column_value)
    fronts = []
    for sets in _all_sets(nothing, worker.size, widths, deadline):
        limited, minimised = (sets.error, sets.size) if by_error else (sets.size, sets.error)
        fronts.append(_front(limited, minimised, sets.values[:, None]))
    return _union(fronts)


def _all_sets(sets: _Sets, size: NDArray[np.float64], widths: NDArray[np.int64], deadline: Deadline) -> Iterator[_Sets]:
    """All sets of the undecided values added to those given, the last value first, depth first."""
    if len(size) == 0:
        yield sets
        return
    if deadline.passed:
        raise _OutOfTime
    value = len(size) - 1
    for part in sets.doubled(value, float(size[value]), int(widths[value])).parts():
        yield from _all_sets(part, size[:value], widths[:value], deadline)


def _receive_last(matrices: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The matrices of the other columns if the last is received, and the change of the error, (s,)."""
    corner = matrices[:, -1, -1]
    pivot = corner[0]
    share = matrices[0, :-1, -1] / pivot
    row = matrices[:, -1, :-1] - corner[:, None] * share
    rest = matrices[:, :-1, :-1] - matrices[:, :-1, -1][:, :, None] * share - share[:, None] * row[:, None]
    if len(matrices) == 2:
        return rest, -corner[1] / pivot
    rest[3] -= row[1][:, None] * (row[2] / pivot)
    return rest, (corner[1] * corner[2] / pivot - 2 * corner[3]) / pivot


def _steps(widths: NDArray[np.int64]) -> float:
    """Numbers that `_all_sets` computes, for the values' numbers of columns."""
    undecided = np.cumsum(widths) - widths
    return float(np.sum(2.0 ** np.arange(len(widths))[::-1] * widths * np.square(undecided + widths)))


# ------------------------------------------------------------------------------------------ all workers together


def _front(limited: NDArray[np.float64], minimised: NDArray[np.float64], sets: NDArray[np.int64]) -> _Front:
    order = np.lexsort((minimised, limited))
    least = np.minimum.accumulate(minimised[order])
    order = order[np.concatenate([[True], least[1:] < least[:-1]])]
    return _Front(limited[order], minimised[order], sets[order])


def _union(fronts: list[_Front]) -> _Front:
    return _front(
        np.concatenate([front.limited for front in fronts]),
        np.concatenate([front.minimised for front in fronts]),
        np.concatenate([front.sets for front in fronts]),
    )


def _best_within(fronts: list[_Front], limit: float, deadline: Deadline) -> NDArray[np.int64] | None:
    """(workers,) the sets within the limit of the least sum of what is minimised; None if there are none."""
    slack = limit - sum(front.limited[0] for front in fronts)
    if slack < 0:
        return None
    # Each counts from its least, so that whatever is above the slack can be left out.
    above = [_Front(front.limited - front.limited[0], front.minimised, front.sets) for front in fronts]
    order = np.argsort([len(front.limited) for front in fronts], kind="stable")
    joined = _Front(np.zeros(1), np.zeros(1), np.empty((1, 0), dtype=np.int64))
    for position in order[:-1]:
        joined = _sums(joined, above[position], slack, deadline)
    last = above[order[-1]]
    choice = np.searchsorted(last.limited, slack - joined.limited, side="right") - 1
    best = int(np.argmin(joined.minimised + last.minimised[choice]))
    sets = np.empty(len(fronts), dtype=np.int64)
    sets[order] = [*joined.sets[best], last.sets[choice[best], 0]]
    return sets


def _sums(first: _Front, second: _Front, slack: float, deadline: Deadline) -> _Front:
    """The front of all pairs within the slack. O(pairs · log pairs), a piece of the pairs at a time."""
    fronts = []
    step = max(1, _MOST_PAIRS // len(second.limited))
    for start in range(0, len(first.limited), step):
        if deadline.passed:
            raise _OutOfTime
        limited = first.limited[start : start + step, None] + second.limited
        i, j = np.nonzero(limited <= slack)
        minimised = first.minimised[start + i] + second.minimised[j]
        sets = np.concatenate([first.sets[start + i], second.sets[j]], axis=1)
        fronts.append(_front(limited[i, j], minimised, sets))
    return _union(fronts)
