"""Convex relaxations of the choice of codes: the nuclear norm, and lower bounds on what any codes cost.

For worker k, K and B as in `repurpose_opt.receiver` on the columns of the others, e its error if it receives nothing
and V its weights there times √g, the error is e − 2⟨B, V⟩ + tr(V K Vᵀ). A code of r numbers from worker p is
V_p = U (R ⊗ I): folded to (rows·b, n_p) it has rank r, and so it has after whitening, X_p = V_p (F_p ⊗ G_p), where
F_p F_pᵀ ⊗ G_p G_pᵀ is a metric of worker p's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag, cho_factor, cho_solve, eigvalsh, solve_triangular

from repurpose_opt.receiver import Receiver, kronecker_factors

Floats = NDArray[np.float64]
TOLERANCE = 1e-9
"""Duality gap of a solution, relative to the error if nothing is received."""
_SOLVER_NOISE = 1e-6
"""Relative to the largest singular value if everything is received: what a solver leaves of zeros."""
_MOST_STEPS = 5000
_STEPS_A_CHECK = 10
_SETTLED = 1e-6
"""Relative rise of a bound between two checks that counts as none."""


class OutOfTime(Exception):
    """The time was over before the solution was as exact as it should be."""


@dataclass(frozen=True, eq=False)
class CodeProblem:
    """What one worker may receive, whitened source by source."""

    worker: int
    sources: tuple[int, ...]
    width: int
    """b, columns of a value."""
    size: Floats
    """(sources,) what a number counts against the limit."""
    first: NDArray[np.int64]
    """(sources + 1,) where the columns of each source begin."""
    factors: tuple[Floats, ...] = field(repr=False)
    """F_p (n_p, n_p), lower."""
    residual: Floats = field(repr=False)
    """B of the whitened columns (rows, c)."""
    moment: Floats = field(repr=False)
    """K of the whitened columns (c, c)."""
    energy: float
    """e"""

    @property
    def spans(self) -> Iterator[slice]:
        return (slice(a, b) for a, b in pairwise(self.first))

    def folded(self, matrix: Floats) -> list[Floats]:
        """(rows, c) as one (rows·b, n_p) for each source."""
        return [self.fold(matrix[:, span]) for span in self.spans]

    def fold(self, part: Floats) -> Floats:
        """(rows, n_p·b) as (rows·b, n_p)."""
        rows = len(part)
        return part.reshape(rows, -1, self.width).swapaxes(1, 2).reshape(rows * self.width, -1)

    def unfold(self, part: Floats) -> Floats:
        """(rows·b, n_p) as (rows, n_p·b)."""
        return part.reshape(-1, self.width, part.shape[1]).swapaxes(1, 2).reshape(len(part) // self.width, -1)

    def encoder(self, source: int, vectors: Floats) -> Floats:
        """R (r, n_p) of right singular vectors (r, n_p) of X_p; `source` is a position in `sources`."""
        return np.asarray(solve_triangular(self.factors[source], vectors.T, lower=True, trans=1).T)

    @cached_property
    def least_squares(self) -> Floats:
        """T (rows, c) with B = T K: the weights if everything is received."""
        return np.asarray(cho_solve(cho_factor(self.moment, lower=True), self.residual.T).T)

    @cached_property
    def least_error(self) -> float:
        """The error if everything is received."""
        return self.energy - float(np.einsum("rc,rc->", self.residual, self.least_squares))

    @cached_property
    def steepness(self) -> float:
        """Largest eigenvalue of K; at most the number of sources where the metric is K_pp and b is 1."""
        return float(eigvalsh(self.moment)[-1])

    @cached_property
    def _free(self) -> NDArray[np.bool_]:
        """(c,) the columns of sources whose numbers cost nothing."""
        return np.repeat(self.size == 0, np.diff(self.first))

    def with_best_free(self, weight: Floats) -> Floats:
        """X (rows, c) with the best weights on what costs nothing, beside those on what does."""
        free = self._free
        if not free.any():
            return weight
        left = self.residual[:, free] - weight[:, ~free] @ self.moment[np.ix_(~free, free)]
        found = weight.copy()
        found[:, free] = np.linalg.solve(self.moment[np.ix_(free, free)], left.T).T
        return found

    @staticmethod
    def of(receiver: Receiver, size: Floats) -> CodeProblem:
        """Whitened by K_pp; for b > 1 by a Kronecker product near it. `size` (P,) of a number, by source."""
        moment = _moment(receiver)
        return _whitened(receiver, size, moment, moment)

    @staticmethod
    def below(receiver: Receiver, size: Floats) -> CodeProblem:
        """Whitened by a block-diagonal metric D ≼ K, so that the whitened K is ≽ I.

        D is the covariance of each source beside all others, the inverse of a block of K⁻¹, times what D ≼ K allows.
        """
        moment = _moment(receiver)
        precision = cho_solve(cho_factor(moment, lower=True), np.eye(len(moment)))
        apart = [np.linalg.inv(precision[span, span]) for span in _spans(receiver)]
        found = _whitened(receiver, size, moment, block_diag(*apart))
        least = float(eigvalsh(found.moment)[0]) * (1 - 1e-9)
        return replace(
            found,
            factors=tuple(np.sqrt(least) * factor for factor in found.factors),
            residual=found.residual / np.sqrt(least),
            moment=found.moment / least,
        )


def _moment(receiver: Receiver) -> Floats:
    columns = np.concatenate([receiver.columns[p].ravel() for p in receiver.values])
    if receiver.local_half is None:
        return np.diag(receiver.second[columns])
    known = receiver.local_half[:, columns]
    return np.asarray(receiver.second[np.ix_(columns, columns)] - known.T @ known)


def _spans(receiver: Receiver) -> list[slice]:
    first = np.cumsum([0, *(columns.size for columns in receiver.columns.values())])
    return [slice(a, b) for a, b in pairwise(first)]


def _whitened(receiver: Receiver, size: Floats, moment: Floats, metric: Floats) -> CodeProblem:
    """By the blocks of `metric` (c, c), or for b > 1 Kronecker products near them; `moment` is K."""
    spans, sources = _spans(receiver), tuple(receiver.values)
    factors, whole = [], []
    for span in spans:
        values, within = kronecker_factors(metric[span, span], receiver.width)
        factors.append(values)
        whole.append(np.kron(values, within))
    root = block_diag(*whole)
    half = solve_triangular(root, moment, lower=True)
    columns = np.concatenate([receiver.columns[p].ravel() for p in sources])
    residual = solve_triangular(root, receiver.residual[:, columns].T, lower=True).T
    if len(residual) > len(columns):
        residual = np.linalg.qr(residual, mode="r")  # rotates the rows, which changes no singular value
    return CodeProblem(
        receiver.worker,
        sources,
        receiver.width,
        size[list(sources)].astype(np.float64),
        np.array([0, *(span.stop for span in spans)]),
        tuple(factors),
        residual,
        solve_triangular(root, half.T, lower=True),
        receiver.energy,
    )


# ------------------------------------------------------------------------------------------------- the nuclear norm


@dataclass(frozen=True, eq=False)
class NuclearSolution:
    """A solution of one worker's relaxation at one λ."""

    weight: Floats = field(repr=False)
    """X (rows, c)"""
    vectors: list[Floats] = field(repr=False)
    """(r_p, n_p) right singular vectors of each X_p, by falling singular value."""
    objective: float
    gap: float
    """Objective less a lower bound on the least one."""


def largest_useful(problem: CodeProblem) -> float:
    """The λ from which on nothing is received but what costs nothing."""
    left = problem.residual - problem.with_best_free(np.zeros_like(problem.residual)) @ problem.moment
    pulls = [2 * _norm(part) for part in problem.folded(left)]
    return max((pull / size for pull, size in zip(pulls, problem.size, strict=True) if size > 0), default=0.0)


def certified(problem: CodeProblem, penalty_weight: float, weight: Floats, threshold: float) -> NuclearSolution:
    """What X (rows, c) is worth; singular values below `threshold` of the largest, or solver noise, count as zero.

    What costs nothing is first set to the best beside the rest. The gap: for any Z with (ZK)_p = 0 where size_p = 0 and
    ‖2 (ZK)_p‖ ≤ λ size_p in the spectral norm elsewhere, error(X) − least error = tr((T−X) K (T−X)ᵀ) is at least
    2⟨ZK, T−X⟩ − tr(Z K Zᵀ), and ⟨2 ZK, X⟩ at most the penalty of X. So the least objective less the least error is at
    least 2⟨B, Z⟩ − tr(Z K Zᵀ); Z = θ (T − X) for the best θ.
    """
    weight = problem.with_best_free(weight)
    parts = [np.linalg.svd(part, full_matrices=False)[1:] for part in problem.folded(weight)]
    largest = max((float(values.max(initial=0.0)) for values, _ in parts), default=0.0)
    received = max(_norm(part) for part in problem.folded(problem.least_squares))
    least = max(threshold * largest, _SOLVER_NOISE * received)
    penalty = penalty_weight * problem.size
    left = problem.least_squares - weight
    pull = left @ problem.moment
    error = float(np.einsum("rc,rc->", left, pull))
    objective = error + float(sum(p * values.sum() for p, (values, _) in zip(penalty, parts, strict=True)))
    norms = [2 * _norm(part) for part in problem.folded(pull)]
    room = min((p / norm for p, norm in zip(penalty, norms, strict=True) if p > 0 and norm > 0), default=np.inf)
    worth = float(np.einsum("rc,rc->", left, problem.residual))
    theta = float(np.clip(worth / error, -room, room)) if error > 0 else 0.0
    return NuclearSolution(
        weight,
        [vectors[values > least] for values, vectors in parts],
        problem.least_error + objective,
        float(objective - (2 * theta * worth - theta**2 * error)),
    )


def solve(
    problem: CodeProblem, penalty_weight: float, start: Floats | None, out_of_time: Callable[[], bool]
) -> NuclearSolution:
    """min error(X) + λ Σ_p size_p ‖X_p‖_*, by singular value thresholding, warm from `start`.

    O(rows c (rows + c)) a step. Raises OutOfTime.
    """
    penalty = penalty_weight * problem.size

    def shrink(values: Floats, source: int) -> Floats:
        return np.maximum(values - penalty[source] / 2, 0.0) / problem.steepness

    steps = _descent(problem, problem.moment, problem.steepness, shrink, start)
    for weight in islice(steps, 0, _MOST_STEPS, _STEPS_A_CHECK):
        found = certified(problem, penalty_weight, weight, 1e-8)
        if found.gap <= TOLERANCE * problem.energy:
            break
        if out_of_time():
            raise OutOfTime
    return found


def _descent(
    problem: CodeProblem,
    moment: Floats,
    steepness: float,
    shrink: Callable[[Floats, int], Floats],
    start: Floats | None,
) -> Iterator[Floats]:
    """X (rows, c), step after step, minimising tr(X M Xᵀ) − 2⟨B, X⟩ + Σ_p a function of the singular values of X_p.

    The accelerated proximal gradient (Beck and Teboulle 2009, SIAM J. Imaging Sciences 2), its momentum given up where
    it points uphill (O'Donoghue and Candès 2015, Foundations of Computational Mathematics 15). `steepness` is at least
    the largest eigenvalue of M; `shrink` gives the singular values of X_p from those of steepness · X_p + (B − XM)_p.
    """
    before = problem.least_squares if start is None else start
    ahead, momentum = before, 1
    while True:
        step = steepness * ahead + problem.residual - ahead @ moment
        weight = np.empty_like(step)
        for source, span in enumerate(problem.spans):
            left, values, right = np.linalg.svd(problem.fold(step[:, span]), full_matrices=False)
            weight[:, span] = problem.unfold((left * shrink(values, source)) @ right)
        yield weight
        is_uphill = np.einsum("rc,rc->", ahead - weight, weight - before) > 0
        momentum = 1 if is_uphill else momentum + 1
        ahead = weight + (momentum - 1) / (momentum + 2) * (weight - before)
        before = weight


def _norm(part: Floats) -> float:
    return float(np.linalg.norm(part, 2))


# ------------------------------------------------------------------------------------------------------ lower bounds


@dataclass(frozen=True, eq=False)
class Bound:
    """A lower bound on error + Σ_p price · size_p · rank(V_p) over all V of one worker."""

    value: float
    spent: float
    """Σ size_p of the numbers, some of them in part, that the relaxation sends."""
    weight: Floats = field(repr=False)
    """X (rows, c) at which the bound was taken."""


def lower_bound(problem: CodeProblem, price: float, start: Floats | None, out_of_time: Callable[[], bool]) -> Bound:
    """For a problem whitened by D ≼ K (`CodeProblem.below`), so that K' = K − I ≽ 0. Valid at any X; X is improved.

    For all V (whitened: X), tr(X K' Xᵀ) ≥ 2⟨X⁰K', X⟩ − tr(X⁰ K' X⁰ᵀ) since K' ≽ 0. With Y = B − X⁰K' therefore
        error(X) + Σ τ_p rank(X_p) ≥ e − tr(X⁰ K' X⁰ᵀ) + Σ_p (‖X_p‖² − 2⟨Y_p, X_p⟩ + τ_p rank(X_p)),
    and each term of the sum is at least −Σ_i max(0, σ_i(Y_p)² − τ_p), which truncated singular value decompositions
    attain (Eckart–Young). Best is the X⁰ that minimises the relaxation with the convex envelope of ‖X_p‖² + τ rank:
    Σ_i 2√τ σ_i up to σ_i = √τ, then σ_i² + τ (reverse Huber; quadratic envelope of the rank, Larsson and Olsson 2016,
    Int. J. Computer Vision 120). Below √τ it is the nuclear norm. Exact where sources are uncorrelated: K' = 0.
    """
    coupling = problem.moment - np.eye(len(problem.moment))
    steepness = max(problem.steepness - 1.0, 0.0)
    prices = price * problem.size

    def shrink(values: Floats, source: int) -> Floats:
        return _towards_envelope(values, steepness, prices[source])

    best: Bound | None = None
    for weight in islice(_descent(problem, coupling, steepness, shrink, start), 0, _MOST_STEPS, _STEPS_A_CHECK):
        found = _bound_at(problem, coupling, prices, weight)
        rise = np.inf if best is None else found.value - best.value
        best = found if best is None or rise > 0 else best
        if abs(rise) <= _SETTLED * abs(found.value) or out_of_time():
            break
    assert best is not None
    return best


def merged_bound(problem: CodeProblem, price: float) -> Bound:
    """The same with all sources taken for one, each number at the least size: better where few numbers are sent.

    r numbers of b columns each, wherever they come from, are r·b combinations of the remote columns: they lower the
    error by at most the r·b largest eigenvalues of B K⁻¹ Bᵀ (Eckart–Young). For any metric. O(rows³).
    """
    gains = np.maximum(eigvalsh(problem.residual @ problem.least_squares.T)[::-1], 0.0)
    gains = np.append(gains, np.zeros(-len(gains) % problem.width)).reshape(-1, problem.width).sum(axis=1)
    size = float(problem.size.min())
    worth = np.maximum(gains - price * size, 0.0)
    return Bound(problem.energy - float(worth.sum()), size * int(np.count_nonzero(worth)), problem.least_squares)


def _bound_at(problem: CodeProblem, coupling: Floats, prices: Floats, weight: Floats) -> Bound:
    coupled = weight @ coupling
    value = problem.energy - float(np.einsum("rc,rc->", coupled, weight))
    spent = 0.0
    parts = zip(problem.folded(problem.residual - coupled), problem.folded(weight), prices, problem.size, strict=True)
    for pull, sent, price, size in parts:
        value -= float(np.maximum(np.linalg.svd(pull, compute_uv=False) ** 2 - price, 0.0).sum())
        if size > 0 and price > 0:
            spent += size * float(np.minimum(np.linalg.svd(sent, compute_uv=False) / np.sqrt(price), 1.0).sum())
    return Bound(value, spent, weight.copy())


def _towards_envelope(values: Floats, steep: float, price: float) -> Floats:
    """σ ≥ 0 that minimises steep·σ² − 2·values·σ + the envelope of σ² + price·[σ > 0]."""
    root = np.sqrt(price)
    beyond = values / (steep + 1.0)
    if steep == 0:
        return np.where(values > root, values, 0.0)
    return np.where(beyond >= root, beyond, np.maximum(values - root, 0.0) / steep)
