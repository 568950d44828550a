"""What both group-lasso backends share: each worker's lasso, and the search of λ for a price, a budget or an NMSE.

    ½ tr((W̃−V) C (W̃−V)ᵀ) + λ Σ over remote (j, k) of p_jk ‖V[owner=k, j] C_jj^½‖_F

splits by worker. p is the root of what a transfer counts against the limit: √(bytes·link_price), or √bytes where
there is a budget in bytes. Local columns are not penalised and neither are values that cost nothing: both are
eliminated by Schur complements. All workers share λ. The lasso gives the transfers only; the refit gives the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.knowledge import kept_columns
from repurpose_opt.problem import LayerProblem
from repurpose_opt_solvers.lasso_newton import LassoProblem, LassoSolution, OutOfTime, solve
from repurpose_opt_solvers.reduced import WorkerProblem, worker_problems

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Transfers = list[tuple[int, int]]
"""(value, worker) pairs."""

Solver = Callable[[int, LassoProblem, float, "Floats | None"], LassoSolution]
"""(which worker of the list, its problem, λ, norms of a solution near by) -> solution; may raise OutOfTime."""

_STEP = 0.7
"""Of λ, on the way down."""
_ENTRY_STEP = 0.85
"""The same where the order of entry is what counts."""
_LEAST = 1e-4
"""The end of the path, relative to λ_max."""
_PATIENCE = 3
"""Points of the path without a lower objective after which it is left."""
_REFINEMENTS = 3
_MOST_BISECTIONS = 14
_CLOSE = 1e-3
"""A bracket of λ that is narrower than this is not divided again."""
_NEGLIGIBLE = 1e-9
"""Weights without penalty, relative to the largest, that count as rounding."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Transfers that a point of the path stands for."""

    exchange: Exchange
    penalty_weight: float
    """λ; 0 for the least squares solution."""
    solutions: Sequence[LassoSolution] | None
    """The point, worker by worker; None where it is not one point, or not a lasso."""
    counted: Mapping[str, Any]
    """What was done so far, over all λ: `lambdas_tried`, and what the solver counts."""

    @property
    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = {"lambda": self.penalty_weight, **self.counted}
        if self.solutions is not None:
            found["lasso_objective"] = sum(solution.objective for solution in self.solutions)
            found["lasso_gap"] = sum(solution.gap for solution in self.solutions)
        return found


class WorkerLasso:
    """One worker's group lasso, whitened, and the way back to its values and columns."""

    def __init__(self, worker: WorkerProblem) -> None:
        self.worker = worker
        self.priced = np.flatnonzero(worker.size > 0)
        """(groups,) positions of the penalised values in `worker.value`."""
        self.free = np.flatnonzero(worker.size == 0)
        self.columns = worker.columns_of(self.priced)
        """(c,) their columns, as positions in `worker.column`."""
        self.free_columns = worker.columns_of(self.free)
        self.size = worker.size[self.priced]
        sizes = np.bincount(worker.column_value, minlength=len(worker.value))[self.priced]
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        free = worker.rows(self.free_columns)
        self._free_factor = cholesky(free[:, self.free_columns], lower=True)
        self._free_half = solve_triangular(self._free_factor, free[:, self.columns], lower=True)
        """L⁻¹ K[free, priced], K_free = L Lᵀ."""
        self._free_residual = solve_triangular(self._free_factor, worker.residual[:, self.free_columns].T, lower=True).T
        """R_free L⁻ᵀ."""
        self.lasso = LassoProblem(
            self._whitened(worker.residual[:, self.columns] - self._free_residual @ self._free_half),
            np.sqrt(self.size),
            self.first,
            worker.energy - float(np.square(self._free_residual).sum()),
            _KeptRows(len(self.columns), self._whitened_rows),
        )

    @cached_property
    def _unwhitening(self) -> Any:
        """Block-diagonal L_j⁻¹ of C_jj = L_j L_jᵀ, (c, c) sparse."""
        column = self.worker.column[self.columns]
        second = self.worker.second
        if len(self.first) - 1 == len(column):
            return sparse.diags_array(1 / np.sqrt(np.diagonal(second)[column])).tocsr()
        spans = [column[a:b] for a, b in zip(self.first[:-1], self.first[1:], strict=True)]
        blocks = [np.linalg.inv(np.linalg.cholesky(second[np.ix_(span, span)])) for span in spans]
        return sparse.block_diag(blocks, format="csr")

    def _whitened(self, matrix: Floats) -> Floats:
        """matrix (rows, c) times blockdiag(L_j⁻ᵀ)."""
        return np.ascontiguousarray((self._unwhitening @ matrix.T).T)

    def _whitened_rows(self, positions: Integers) -> Floats:
        """Rows of the whitened K without the free columns; the positions of whole groups."""
        rows = self.worker.rows(self.columns[positions])[:, self.columns]
        rows -= self._free_half[:, positions].T @ self._free_half
        left = self._unwhitening[positions][:, positions]
        return self._whitened(left @ rows)

    def values(self, groups: Integers) -> Integers:
        """The layer's values that some groups are."""
        return self.worker.value[self.priced[groups]]

    @cached_property
    def useful_free(self) -> Integers:
        """Positions in `worker.value` of the values that cost nothing and have weights once all are received."""
        if len(self.free) == 0:
            return self.free
        priced = self.least_squares
        weight = self._free_weight(self._raw(priced))
        column_value = self.worker.column_value[self.free_columns]
        energy = np.square(weight).sum(axis=0) * np.diagonal(self.worker.second)[self.worker.column[self.free_columns]]
        by_value = np.sqrt(np.bincount(column_value, energy, len(self.worker.value))[self.free])
        scale = max(by_value.max(), priced.norm.max(initial=0.0))
        return self.free[by_value > _NEGLIGIBLE * scale]

    @cached_property
    def least_squares(self) -> LassoSolution:
        """The solution without a penalty, only groups with weights beyond rounding. O(c³)."""
        moment = self.lasso.rows(np.arange(len(self.columns)))
        weight = cho_solve(cho_factor(moment, lower=True), self.lasso.residual.T).T
        norms = self.lasso.norms(weight)
        is_kept = norms > _NEGLIGIBLE * norms.max(initial=0.0)
        kept = np.flatnonzero(is_kept)
        left = self.lasso.energy - float(np.einsum("rc,rc->", weight, self.lasso.residual))
        return LassoSolution(
            group=kept,
            weight=weight[:, self.lasso.columns_of(kept)],
            norm=np.where(is_kept, norms, 0.0),
            pull=np.zeros(len(norms)),
            objective=0.5 * max(left, 0.0),
            gap=0.0,
            stats={},
        )

    def at_zero(self) -> LassoSolution:
        """V = 0, the optimum from λ_max on."""
        return LassoSolution(
            group=np.empty(0, dtype=np.int64),
            weight=self.lasso.residual[:, :0],
            norm=np.zeros(len(self.priced)),
            pull=self.lasso.norms(self.lasso.residual),
            objective=0.5 * self.lasso.energy,
            gap=0.0,
            stats={},
        )

    def _raw(self, solution: LassoSolution) -> Floats:
        """(r, c) the weights of a solution on the priced columns, no longer whitened."""
        weight = np.zeros_like(self.lasso.residual)
        weight[:, self.lasso.columns_of(solution.group)] = solution.weight
        return np.asarray((self._unwhitening.T @ weight.T).T)

    def _free_weight(self, priced: Floats) -> Floats:
        """(r, free columns) the best weights of the free columns beside those of the priced ones (r, c)."""
        left = self._free_residual - priced @ self._free_half.T
        return np.asarray(solve_triangular(self._free_factor, left.T, lower=True, trans=1).T)

    def remote_weight(self, solution: LassoSolution) -> Floats:
        """(rows of the worker, remote columns) √g V of a solution, in the order of `worker.column`."""
        priced = self._raw(solution)
        weight = np.zeros((len(priced), len(self.worker.column)))
        weight[:, self.columns] = priced
        weight[:, self.free_columns] = self._free_weight(priced)
        return weight if self.worker.rotation is None else self.worker.rotation @ weight

    def gain(self, solution: LassoSolution) -> float:
        """By how much the error after refit falls with a solution's values and the free ones."""
        return self.worker.gain(np.sort(np.concatenate([self.priced[solution.group], self.useful_free])))


class _KeptRows:
    """Rows of a matrix that are computed once, when they are asked for."""

    def __init__(self, columns: int, compute: Callable[[Integers], Floats]) -> None:
        self._compute = compute
        self._slot = np.full(columns, -1)
        self._kept = np.empty((0, columns))
        self._count = 0

    def __call__(self, positions: Integers) -> Floats:
        missing = positions[self._slot[positions] < 0]
        if len(missing):
            end = self._count + len(missing)
            if end > len(self._kept):
                room = np.empty((min(max(2 * len(self._kept), end), len(self._slot)), len(self._slot)))
                room[: self._count] = self._kept[: self._count]
                self._kept = room
            self._kept[self._count : end] = self._compute(missing)
            self._slot[missing] = np.arange(self._count, end)
            self._count = end
        return self._kept[self._slot[positions]]


class Path:
    """The solutions of all workers, λ by λ, each from the nearest one that is known."""

    def __init__(self, workers: Sequence[WorkerLasso], solver: Solver) -> None:
        self.workers, self.solver = workers, solver
        self.largest = max((worker.lasso.largest_useful for worker in workers), default=0.0)
        self._counted: dict[str, Any] = {"lambdas_tried": 0}
        self._known: dict[float, list[Floats]] = {}

    def at(self, penalty_weight: float) -> list[LassoSolution]:
        if penalty_weight >= self.largest:
            return [worker.at_zero() for worker in self.workers]
        near = min(self._known, key=lambda known: abs(np.log(known / penalty_weight)), default=None)
        starts = [None] * len(self.workers) if near is None else self._known[near]
        found = [
            self.solver(index, worker.lasso, penalty_weight, start)
            for index, (worker, start) in enumerate(zip(self.workers, starts, strict=True))
        ]
        self._counted["lambdas_tried"] += 1
        for solution in found:
            self._count(solution.stats)
        self._known[penalty_weight] = [solution.norm for solution in found]
        return found

    @property
    def counted(self) -> dict[str, Any]:
        return dict(self._counted)

    def _count(self, stats: Mapping[str, Any]) -> None:
        """Numbers add up; of words each is kept once."""
        for name, what in stats.items():
            if isinstance(what, str):
                self._counted[name] = sorted({*self._counted.get(name, ()), what})
            else:
                self._counted[name] = self._counted.get(name, 0) + what

    def size(self, solutions: Sequence[LassoSolution]) -> float:
        """What the transfers of a point count against the limit."""
        return float(sum(w.size[s.group].sum() for w, s in zip(self.workers, solutions, strict=True)))

    def transfers(self, solutions: Sequence[LassoSolution]) -> Transfers:
        """The transfers of a point; free ones that are of use first."""
        return self.free_transfers() + [
            (int(j), worker.worker.worker)
            for worker, solution in zip(self.workers, solutions, strict=True)
            for j in worker.values(solution.group)
        ]

    def free_transfers(self) -> Transfers:
        return [(int(j), w.worker.worker) for w in self.workers for j in w.worker.value[w.useful_free]]

    def nearest_to_entering(self, solutions: Sequence[LassoSolution]) -> Transfers:
        """The transfers outside a point that pull at all, those first that would enter at the largest λ."""
        offers = []
        for worker, solution in zip(self.workers, solutions, strict=True):
            tension = solution.pull / worker.lasso.penalty
            outside = np.setdiff1d(np.flatnonzero(tension > _NEGLIGIBLE * self.largest), solution.group)
            values = worker.values(outside)
            offers += [(-tension[g], worker.worker.worker, int(j)) for g, j in zip(outside, values, strict=True)]
        return [(j, k) for _, k, j in sorted(offers)]


def by_newton(index: int, problem: LassoProblem, penalty_weight: float, near: Floats | None) -> LassoSolution:
    """The solver of group-lasso-fast, without a deadline."""
    return solve(problem, penalty_weight, near)


def supports(problem: LayerProblem, formulation: Formulation) -> str | None:
    """Why the group lasso does not serve a formulation, or None."""
    if not isinstance(formulation, Volume):
        return "the penalty stands for the volume sent: Volume only"
    if formulation.communication == "busiest":
        return "the penalty adds up over workers: communication='total' only"
    return None


def search(
    problem: LayerProblem,
    formulation: Volume,
    owner: Integers,
    solver: Solver,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[Choice]:
    """Better and better choices of transfers; the last is the answer. Full moments only.

    The first one needs no lasso. Raises what the solver raises, OutOfTime for one.
    """
    path = Path([WorkerLasso(worker) for worker in worker_problems(problem, formulation, owner)], solver)
    choice = None
    for choice in _choices(problem, formulation, owner, path, out_of_time):
        yield choice
    assert choice is not None
    yield replace(choice, counted=path.counted)  # with what came after it


def _choices(
    problem: LayerProblem, formulation: Volume, owner: Integers, path: Path, out_of_time: Callable[[], bool]
) -> Iterator[Choice]:
    if formulation.max_nmse is not None:
        return _for_nmse(problem, formulation, owner, path, out_of_time)
    if formulation.transfer_price is not None:
        return _for_price(problem, formulation.transfer_price, path)
    return _for_budget(problem, formulation, path)


def raw_lasso(
    problem: LayerProblem, formulation: Volume, owner: Integers, solver: Solver = by_newton
) -> tuple[Choice, Floats]:
    """The choice for a budget or a price, and the weights (rows, columns) of the lasso itself, without refit.

    Any Volume but one with max_nmse. Rows of output weight 0 have local weights only.
    """
    path = Path([WorkerLasso(worker) for worker in worker_problems(problem, formulation, owner)], solver)
    *_, choice = _choices(problem, formulation, owner, path, lambda: False)
    assert choice.solutions is not None
    judged = formulation.judged(problem)
    row_owner = owner[problem.row_neuron]
    weight = np.zeros((problem.rows, problem.columns))
    solved = {w.worker.worker: (w, s) for w, s in zip(path.workers, choice.solutions, strict=True)}
    second = problem.moments.regularised
    for k in range(problem.P):
        rows = np.flatnonzero(row_owner == k)
        if k in solved and len(rows):
            worker, solution = solved[k]
            root = np.sqrt(judged.output_weight[rows])[:, None]
            remote = worker.remote_weight(solution)
            weight[np.ix_(rows, worker.worker.column)] = np.divide(
                remote, root, out=np.zeros_like(remote), where=root > 0
            )
        local = kept_columns(problem, np.zeros((problem.n, problem.P), dtype=bool), k)
        if len(rows) and len(local):
            left = problem.predicted_moment[np.ix_(rows, local)] - weight[rows] @ second[:, local]
            weight[np.ix_(rows, local)] = cho_solve(cho_factor(second[np.ix_(local, local)]), left.T).T
    return choice, weight


def _for_budget(problem: LayerProblem, formulation: Volume, path: Path) -> Iterator[Choice]:
    """The smallest λ whose transfers fit, and what would enter next for as long as it fits."""
    allowed = formulation.limit(problem)
    assert allowed is not None

    def filled(penalty_weight: float, solutions: Sequence[LassoSolution]) -> Choice:
        allowance = formulation.allowance(problem)
        assert allowance is not None
        pairs = path.transfers(solutions) + path.nearest_to_entering(solutions)
        taken = [(j, k) for j, k in pairs if allowance.take(j, k)]
        return Choice(_exchange(problem, taken), penalty_weight, solutions, path.counted)

    if sum(float(worker.size.sum()) for worker in path.workers) <= allowed:
        solutions = [worker.least_squares for worker in path.workers]
        yield Choice(_exchange(problem, path.transfers(solutions)), 0.0, solutions, path.counted)
        return
    high, fitting = path.largest, path.at(path.largest)
    yield filled(high, fitting)
    smallest = min(float(worker.size.min(initial=np.inf)) for worker in path.workers)
    low = None
    for _ in range(_MOST_BISECTIONS + round(np.log(_LEAST) / np.log(_STEP))):
        if allowed - path.size(fitting) < smallest or high <= _LEAST * path.largest:
            return
        if low is not None and high / low < 1 + _CLOSE:
            return
        middle = _STEP * high if low is None else float(np.sqrt(low * high))
        solutions = path.at(middle)
        if path.size(solutions) <= allowed:
            high, fitting = middle, solutions
            yield filled(high, fitting)
        else:
            low = middle


def _for_price(problem: LayerProblem, price: float, path: Path) -> Iterator[Choice]:
    """The point of the path with the least error after refit plus price · priced volume."""
    objective: dict[float, float] = {}
    best = np.inf

    def tried(penalty_weight: float, solutions: Sequence[LassoSolution]) -> Iterator[Choice]:
        nonlocal best
        gain = sum(worker.gain(solution) for worker, solution in zip(path.workers, solutions, strict=True))
        objective[penalty_weight] = price * path.size(solutions) - gain
        if objective[penalty_weight] < best:
            best = objective[penalty_weight]
            yield Choice(_exchange(problem, path.transfers(solutions)), penalty_weight, solutions, path.counted)

    if price == 0 or path.largest == 0:
        yield from tried(0.0, [worker.least_squares for worker in path.workers])
        return
    penalty_weight = path.largest
    while penalty_weight > _LEAST * path.largest:
        yield from tried(penalty_weight, path.at(penalty_weight))
        if min(list(objective.values())[-_PATIENCE:]) > best:
            break
        penalty_weight *= _STEP
    else:
        yield from tried(0.0, [worker.least_squares for worker in path.workers])
    for _ in range(_REFINEMENTS):
        lambdas = sorted(objective)
        at = lambdas.index(min(objective, key=lambda known: (objective[known], -known)))
        for one, other in ((at - 1, at), (at, at + 1)):
            if one >= 0 and other < len(lambdas) and lambdas[one] > 0:
                between = float(np.sqrt(lambdas[one] * lambdas[other]))
                yield from tried(between, path.at(between))


def _for_nmse(
    problem: LayerProblem, formulation: Volume, owner: Integers, path: Path, out_of_time: Callable[[], bool]
) -> Iterator[Choice]:
    """The shortest run of transfers, in the order in which they enter the path, that meets the limit."""
    everything = path.transfers([worker.least_squares for worker in path.workers])
    yield Choice(_exchange(problem, everything), 0.0, None, path.counted)
    entered: dict[tuple[int, int], float] = {}
    ranked = ((j, k, 1.0) for j, k in _entries(path, entered, everything))
    exchange = formulation.take(problem, owner, ranked, out_of_time)
    sent = exchange.transfers
    last = min((at for (j, k), at in entered.items() if sent[j, k]), default=path.largest)
    yield Choice(exchange, last, None, path.counted)


def _entries(path: Path, entered: dict[tuple[int, int], float], everything: Transfers) -> Iterator[tuple[int, int]]:
    """Transfers in the order in which they enter as λ falls; λ of each is noted in `entered`."""
    for pair in path.free_transfers():
        yield pair
        entered[pair] = path.largest
    penalty_weight, before = path.largest, path.at(path.largest)
    try:
        while penalty_weight > _LEAST * path.largest:
            penalty_weight *= _ENTRY_STEP
            solutions = path.at(penalty_weight)
            inside = set(path.transfers(solutions)) - entered.keys()
            for pair in path.nearest_to_entering(before):
                if pair in inside:
                    entered[pair] = penalty_weight
                    yield pair
            before = solutions
    except OutOfTime:
        pass  # the rest by how near it is to entering; the caller's deadline says that time was short
    useful = set(everything)
    for pair in chain(path.nearest_to_entering(before), everything):
        if pair in useful and pair not in entered:
            entered[pair] = 0.0
            yield pair


def _exchange(problem: LayerProblem, pairs: Transfers) -> Exchange:
    transfers = np.zeros((problem.n, problem.P), dtype=bool)
    for j, k in pairs:
        transfers[j, k] = True
    return Exchange.of_transfers(transfers, problem.input_owner)
