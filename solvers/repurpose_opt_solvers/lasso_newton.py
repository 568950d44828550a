"""Group lasso by Newton's method in the group norms: as many unknowns as active groups, however many rows there are.

    minimise over V (r, c)   f(V) = ½ tr(V K Vᵀ) − tr(R Vᵀ) + ½ energy + λ Σ_j p_j ‖V_j‖_F,   K ≻ 0, p > 0

With ‖v‖ = min over η ≥ 0 of ½ (‖v‖²/η + η) (Bach, Jenatton, Mairal and Obozinski 2012, *Optimization with
sparsity-inducing penalties*, section 5), V can be minimised out: V(η) = R (K + λ diag(p/η))⁻¹, and what is left,

    φ(η) = −½ tr(R (K + λ diag(p/η))⁻¹ Rᵀ) + ½ λ Σ_j p_j η_j,

is smooth and convex on η ≥ 0, the borders included. With G = R − V K and t_j = ‖G_j‖ / (λ p_j):

    ∂φ/∂η_j    = ½ λ p_j (1 − t_j²)
    ∂²φ/∂η_j∂η_l = Σ over columns a of j, b of l of (GᵀG)_ab N_ab / (λ² p_j p_l),   N = (K⁻¹ + diag(η/(λ p)))⁻¹

N is positive definite, so by Schur's product theorem the Hessian is too. The optimum has t_j = 1 where η_j > 0 (then
η_j = ‖V_j‖) and t_j ≤ 1 where η_j = 0: exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv, dpotrf, dtrtrs

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

TOLERANCE = 1e-10
"""Default duality gap, relative to half the energy."""
_MOST_ROUNDS = 200
"""Working sets."""
_MOST_STEPS = 100
"""Newton steps on one working set."""
_INNER_SHARE = 1e-3
_FEWEST_ENTER = 128
_MOST_HALVINGS = 30
_ARMIJO = 1e-4
_MOST_EXCHANGES = 100
_PATIENCE = 5
_ROUNDING = 1e-14


@dataclass(frozen=True, eq=False)
class LassoProblem:
    """The data of a group lasso whose groups are runs of columns, whitened: ‖V_j‖_F is what is penalised."""

    residual: Floats
    """R (r, c)."""
    penalty: Floats
    """p (groups,), all above 0."""
    first: Integers
    """(groups + 1,) group j has the columns first[j] … first[j+1] − 1."""
    energy: float
    """At least tr(R K⁻¹ Rᵀ): twice the objective at V = 0."""
    rows: Callable[[Integers], Floats] = field(repr=False)
    """Rows of K (positions, c)."""

    @staticmethod
    def of_arrays(moment: Floats, residual: Floats, penalty: Floats, first: Integers, energy: float) -> LassoProblem:
        """A problem with K (c, c) in memory."""
        return LassoProblem(residual, penalty, first, energy, lambda positions: moment[positions])

    def norms(self, matrix: Floats) -> Floats:
        """(groups,) Frobenius norm of each group's columns of a matrix (r, c)."""
        return group_norms(matrix, self.first)

    def columns_of(self, groups: Integers) -> Integers:
        """Columns of some groups, group after group."""
        return columns_of(self.first, groups)

    @property
    def largest_useful(self) -> float:
        """λ_max: the optimum is V = 0 from here on."""
        return float((self.norms(self.residual) / self.penalty).max(initial=0.0))


@dataclass(frozen=True, eq=False)
class LassoSolution:
    """An approximate minimiser, with its proof."""

    group: Integers
    """(a,) groups with nonzero weights."""
    weight: Floats
    """(r, columns of those groups) their weights."""
    norm: Floats
    """(groups,) ‖V_j‖_F, exactly 0 outside `group`. A start for another λ."""
    pull: Floats
    """(groups,) ‖(R − V K)_j‖_F: at the optimum λ p_j inside `group`, at most that outside."""
    objective: float
    gap: float
    """Objective minus the dual objective: how far from the optimum this may be."""
    stats: Mapping[str, Any]
    """What the solver counted, for instance working sets and Newton steps."""


class OutOfTime(Exception):
    """The deadline passed before the solution was accurate enough."""


def solve(
    problem: LassoProblem,
    penalty_weight: float,
    start: Floats | None = None,
    *,
    tolerance: float = TOLERANCE,
    out_of_time: Callable[[], bool] = lambda: False,
) -> LassoSolution:
    """The minimiser for λ = `penalty_weight` > 0, to a duality gap of tolerance · ½ energy where rounding allows it.

    `start` (groups,): norms of a solution near by. Works on a set of groups that grows by those that pull hardest.
    O(a³ + r a² + r a c) a step for a active columns; steps do not depend on the size. Raises OutOfTime.
    """
    count = len(problem.penalty)
    norm = np.zeros(count) if start is None else start.astype(np.float64)
    stats = {"working_sets": 0, "newton_steps": 0}
    target = tolerance * 0.5 * problem.energy
    best: LassoSolution | None = None
    inside = np.flatnonzero(norm > 0)
    for _ in range(_MOST_ROUNDS):
        part = _Part(problem, inside, penalty_weight)
        # The start is only looked at: groups that pull harder than λ p_j enter before the first step.
        wanted = np.inf if best is None else max(0.1 * target, _INNER_SHARE * best.gap)
        point = _newton(part, norm[inside], wanted, stats, out_of_time)
        stats["working_sets"] += 1
        found = certify(problem, penalty_weight, part.groups[point.active], point.weight, stats)
        best = found if best is None or found.gap < best.gap else best
        outside = np.setdiff1d(np.flatnonzero(found.pull > penalty_weight * problem.penalty), inside)
        if found.gap <= target or (len(outside) == 0 and wanted <= target):
            return best
        norm, support = found.norm, found.group
        hardest = np.argsort(-found.pull[outside] / problem.penalty[outside], kind="stable")
        entering = outside[hardest[: max(_FEWEST_ENTER, len(support))]]
        inside = np.sort(np.concatenate([support, entering]))
    assert best is not None
    return best


@dataclass(frozen=True, eq=False)
class _Point:
    """What is known at one η of a part."""

    norm: Floats
    """η (groups,)."""
    active: Integers
    """Groups with η > 0, and their columns."""
    columns: Integers
    scale: Floats
    """√(η/p) of those columns."""
    factor: Floats
    """Lower Cholesky factor of √(η/p) K √(η/p) + λI on those columns."""
    weight: Floats
    """(r, columns)."""
    value: float
    """φ(η)."""


class _Part:
    """The problem restricted to some groups."""

    def __init__(self, problem: LassoProblem, groups: Integers, penalty_weight: float) -> None:
        self.groups = groups
        self.columns = problem.columns_of(groups)
        self.rows = problem.rows(self.columns)
        self.moment = self.rows[:, self.columns]
        self.residual = problem.residual[:, self.columns]
        self.penalty = problem.penalty[groups]
        sizes = np.diff(problem.first)[groups]
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self.group_of = np.repeat(np.arange(len(groups)), sizes)
        self.penalty_weight = penalty_weight
        self.energy = problem.energy

    def at(self, norm: Floats) -> _Point:
        """O(a³ + r a²)."""
        active = np.flatnonzero(norm > 0)
        columns = np.flatnonzero(norm[self.group_of] > 0)
        scale = np.sqrt(norm / self.penalty)[self.group_of[columns]]
        damped = self.moment[np.ix_(columns, columns)] * scale
        damped *= scale[:, None]
        damped.ravel()[:: len(damped) + 1] += self.penalty_weight
        factor, info = dpotrf(damped.T, lower=1, overwrite_a=1)
        assert info == 0, "K is not positive semidefinite"
        half = _forward(factor, (self.residual[:, columns] * scale).T)
        weight = _backward(factor, half).T * scale
        value = 0.5 * (self.penalty_weight * self.penalty @ norm - np.einsum("ar,ar->", half, half))
        return _Point(norm, active, columns, scale, factor, weight, float(value))

    def remainder(self, point: _Point) -> Floats:
        """G = R − V K on this part's columns."""
        return self.residual - point.weight @ self.moment[point.columns]

    def hessian(self, point: _Point, remainder: Floats, free: NDArray[np.bool_]) -> Floats:
        """∂²φ/∂η² of the free groups."""
        columns = np.flatnonzero(free[self.group_of])
        lifted = _forward(point.factor, self.moment[np.ix_(point.columns, columns)] * point.scale[:, None])
        N = self.moment[np.ix_(columns, columns)] - lifted.T @ lifted
        G = remainder[:, columns] / (self.penalty_weight * self.penalty[self.group_of[columns]])
        product = (G.T @ G) * N
        if len(columns) == free.sum():
            return product
        first = np.flatnonzero(np.diff(self.group_of[columns], prepend=-1))
        return np.add.reduceat(np.add.reduceat(product, first, axis=0), first, axis=1)


def _newton(part: _Part, norm: Floats, target: float, stats: dict[str, int], out_of_time: Callable[[], bool]) -> _Point:
    """Minimises φ on a part by projected Newton steps."""
    point = part.at(norm)
    for _ in range(_MOST_STEPS):
        remainder = part.remainder(point)
        pull = group_norms(remainder, part.first)
        tension = pull / (part.penalty_weight * part.penalty)
        norms = group_norms(point.weight, _run_lengths(part.first, point.active))
        _, gap = _objective_and_gap(
            part.residual[:, point.columns],
            point.weight,
            remainder[:, point.columns],
            part.penalty_weight * float(part.penalty[point.active] @ norms),
            float(tension.max(initial=0.0)),
            part.energy,
        )
        if gap <= target:
            break
        if out_of_time():
            raise OutOfTime
        following = _step(part, point, remainder, tension, stats)
        if following is None:
            break
        point = following
    return point


def _step(part: _Part, point: _Point, remainder: Floats, tension: Floats, stats: dict[str, int]) -> _Point | None:
    """A point with a lower φ; None where rounding leaves none.

    The equations t_j = 1 are solved as 1/t_j = 1, which is linear in η for a group on its own (as Moré and Sorensen
    1983 do for trust regions). Where that does not lower φ, Newton's step for φ itself does, if short enough: it is
    the exact minimiser of a convex model within the borders.
    """
    stats["newton_steps"] += 1
    strength = part.penalty_weight * part.penalty
    slope = 0.5 * strength * (1 - tension**2)
    free = (point.norm > 0) | (tension > 1)
    hessian = part.hessian(point, remainder, free)
    noise = _ROUNDING * max(abs(point.value), 0.5 * part.energy)
    for force, halvings in ((strength * tension**2 * (tension - 1), 2), (-slope, _MOST_HALVINGS)):
        move = np.zeros(len(point.norm))
        move[free] = _move_within_borders(hessian, force[free], point.norm[free])
        for halving in range(halvings):
            norm = np.maximum(point.norm + move * 0.5**halving, 0.0)  # below 0 by rounding only
            following = part.at(norm)
            expected = float(slope @ (norm - point.norm))
            if expected < 0 and following.value <= point.value + _ARMIJO * expected + noise:
                return following
    return None


def _move_within_borders(hessian: Floats, force: Floats, norm: Floats) -> Floats:
    """Newton's step with norm + move ≥ 0: minimises ½ mᵀHm − force·m by exchanging what is at the border.

    What would fall below 0 goes to the border, what would be pulled off it comes back; all at once, as long as there
    are fewer and fewer wrong ones (Júdice and Pires 1994), then the last wrong one only, which always ends.
    """
    inner = np.ones(len(norm), dtype=bool)
    fewest, patience = len(norm) + 1, _PATIENCE
    for _ in range(_MOST_EXCHANGES):
        move = np.where(inner, 0.0, -norm)
        rest = force[inner] + hessian[np.ix_(inner, ~inner)] @ norm[~inner]
        move[inner] = _solve_positive(hessian[np.ix_(inner, inner)], rest)
        excess = hessian @ move - force
        slack = _ROUNDING * np.abs(force).max(initial=0.0)
        wrong = np.where(inner, norm + move < 0, excess < -slack)
        if not wrong.any():
            break
        if wrong.sum() < fewest:
            fewest, patience = int(wrong.sum()), _PATIENCE
        else:
            patience -= 1
        if patience < 0:
            wrong = np.arange(len(norm)) == np.flatnonzero(wrong)[-1]
        inner ^= wrong
    return move


def _solve_positive(matrix: Floats, right: Floats) -> Floats:
    if len(right) == 0:
        return right
    damping = max(1e-13 * float(np.diagonal(matrix).max()), np.finfo(np.float64).tiny)
    while True:
        _, solution, info = dposv(matrix + damping * np.eye(len(matrix)), right)
        if info == 0:
            return np.asarray(solution).ravel()
        damping *= 100  # indefinite by rounding only


def _objective_and_gap(
    residual: Floats,
    weight: Floats,
    remainder: Floats,
    size: float,
    tension: float,
    energy: float,
) -> tuple[float, float]:
    """f(V) and f(V) minus a dual objective, from the columns of the active groups; `size` is λΩ(V).

    With K = L Lᵀ and ‖Y‖² = energy, f = ½‖Y − V L‖² + λΩ(V) and its dual is max ½‖Y‖² − ½‖Y − Θ‖² subject to
    ‖(Θ Lᵀ)_j‖ ≤ λ p_j. Θ = α (Y − V L) with α = min(1, 1/max t) is feasible, and its gap is
    ½ (1−α)² ‖Y − V L‖² + λΩ(V) − α ⟨V, G⟩. More energy than tr(R K⁻¹ Rᵀ) is error that nothing explains.
    """
    onto = float(np.einsum("rc,rc->", weight, remainder))
    left = max(energy - float(np.einsum("rc,rc->", weight, residual)) - onto, 0.0)
    alpha = 1.0 if tension <= 1 else 1.0 / tension
    return 0.5 * left + size, 0.5 * (1 - alpha) ** 2 * left + size - alpha * onto


def certify(
    problem: LassoProblem, penalty_weight: float, group: Integers, weight: Floats, stats: Mapping[str, Any]
) -> LassoSolution:
    """Weights of some groups, from any solver, as a solution with its duality gap."""
    columns = problem.columns_of(group)
    remainder = problem.residual - weight @ problem.rows(columns)
    pull = problem.norms(remainder)
    norm = np.zeros(len(problem.penalty))
    norm[group] = group_norms(weight, _run_lengths(problem.first, group))
    objective, gap = _objective_and_gap(
        problem.residual[:, columns],
        weight,
        remainder[:, columns],
        penalty_weight * float(problem.penalty @ norm),
        float((pull / (penalty_weight * problem.penalty)).max(initial=0.0)),
        problem.energy,
    )
    return LassoSolution(group, weight, norm, pull, objective, max(gap, 0.0), dict(stats))


def _run_lengths(first: Integers, groups: Integers) -> Integers:
    """`first` of some of the groups, put side by side."""
    return np.concatenate([[0], np.cumsum(np.diff(first)[groups])])


def group_norms(matrix: Floats, first: Integers) -> Floats:
    """(groups,) Frobenius norms of runs of columns; `first` (groups + 1,) as in LassoProblem, no group empty."""
    squares = np.einsum("rc,rc->c", matrix, matrix)
    if len(first) - 1 == matrix.shape[1]:
        return np.asarray(np.sqrt(squares))
    return np.asarray(np.sqrt(np.add.reduceat(squares, first[:-1])))


def columns_of(first: Integers, groups: Integers) -> Integers:
    """Columns of some groups, group after group."""
    sizes = first[groups + 1] - first[groups]
    ends = np.cumsum(sizes)
    return np.repeat(first[groups] - ends + sizes, sizes) + np.arange(sizes.sum())


# LAPACK itself: SciPy's checks around it cost more than small systems do.


def _forward(factor: Floats, right: Floats) -> Floats:
    """L⁻¹ right."""
    return right if len(right) == 0 else np.asarray(dtrtrs(factor, right, lower=1)[0])


def _backward(factor: Floats, right: Floats) -> Floats:
    """L⁻ᵀ right."""
    return right if len(right) == 0 else np.asarray(dtrtrs(factor, right, lower=1, trans=1)[0])
