"""`group-lasso`: the transfers by a convex group lasso in CVXPY, then the refit. The reference for group-lasso-fast.

A problem for each worker, compiled once with λ as a parameter. Solvers of cones return no exact zeros: what is below
1e-4 of the largest group is not sent. `stats` has the duality gap, computed from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.isolation import DeadlinePassed, last
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, SolveOptions, Termination
from repurpose_opt_solvers import lasso_path
from repurpose_opt_solvers.lasso_newton import Floats, LassoProblem, LassoSolution, certify
from repurpose_opt_solvers.lasso_path import Choice

THRESHOLD = 1e-4
"""Of the largest group: what is below is not sent."""
_SOLVER_NOISE = 1e-6
"""The same relative to the largest group on its own: close to λ_max the largest is no more than noise."""
SETTINGS: dict[str, dict[str, Any]] = {"SCS": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 100_000}}
"""Where a solver's own tolerance is too coarse to tell which groups are zero."""
_BEST = "SCS"
"""Accurate enough with the settings above, and faster than CLARABEL (benchmarks/results/lasso.md)."""


class GroupLasso:
    """Convex group lasso in CVXPY by its best solver, SCS, or another one by name; then the refit. Volume only."""

    requires: tuple[str, ...] = ("cvxpy",)

    def __init__(self, solver: str | None = None) -> None:
        """`solver`: the name of an installed solver of second-order cones, as CVXPY spells it."""
        self.name = "group-lasso" if solver is None else f"group-lasso:{solver.lower()}"
        self.solver = _BEST if solver is None else solver

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return lasso_path.supports(problem, formulation)

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        if problem.moments.is_diagonal:
            return Candidate(Termination.HEURISTIC, owner, formulation.select(problem, owner))
        arguments = (problem, formulation, owner, self.solver)
        try:
            answer, is_finished = last(choices, *arguments, time_limit=options.time_limit)
        except DeadlinePassed:
            exchange = formulation.select(problem, owner)
            stats = {"fallback": "threshold: the time was over before the first choice"}
            return Candidate(Termination.TIME_LIMIT, owner, exchange, stats=stats)
        if isinstance(answer, str):
            return Candidate(Termination.ERROR, owner, message=answer)
        termination = Termination.HEURISTIC if is_finished else Termination.TIME_LIMIT
        return Candidate(termination, owner, answer.exchange, stats={**answer.stats, "solver": self.solver})


class GroupLassoClarabel(GroupLasso):
    """Convex group lasso in CVXPY by CLARABEL (interior points); then the refit. Volume only."""

    def __init__(self) -> None:
        super().__init__("CLARABEL")


class GroupLassoScs(GroupLasso):
    """Convex group lasso in CVXPY by SCS (operator splitting); then the refit. Volume only."""

    def __init__(self) -> None:
        super().__init__("SCS")


class SolverFailed(Exception):
    """CVXPY's solver ended without a usable solution."""


def choices(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], solver: str
) -> Iterator[Choice | str]:
    """The choices of `lasso_path.search`; if the solver fails, last why."""
    try:
        for choice in lasso_path.search(problem, formulation, owner, ConvexSolver(solver)):
            # The weights are of no use to the process that receives this.
            solutions = None if choice.solutions is None else [_without_weights(found) for found in choice.solutions]
            yield replace(choice, solutions=solutions)
    except SolverFailed as reason:
        yield str(reason)


class ConvexSolver:
    """Solves group lassos with CVXPY; each compiled at its first λ."""

    def __init__(self, solver: str) -> None:
        cvxpy = _cvxpy()

        installed = cvxpy.installed_solvers()
        if solver not in installed:
            raise SolverFailed(f"solver {solver!r} is not installed; CVXPY has {', '.join(installed)}")
        self.solver = solver
        self._compiled: dict[int, CompiledLasso] = {}

    def __call__(self, index: int, problem: LassoProblem, penalty_weight: float, near: Floats | None) -> LassoSolution:
        if index not in self._compiled:
            self._compiled[index] = CompiledLasso(problem)
        return self._compiled[index].solve(self.solver, penalty_weight)


class CompiledLasso:
    """One group lasso in CVXPY, scaled so that its weights are about 1, with λ as a parameter."""

    def __init__(self, problem: LassoProblem) -> None:
        cvxpy = _cvxpy()

        self.problem = problem
        r, c = problem.residual.shape
        self.unit = np.sqrt(problem.energy / max(r * c, 1))
        self.weight = cvxpy.Variable((r, c))
        self.penalty_weight = cvxpy.Parameter(nonneg=True)
        moment = problem.rows(np.arange(c))
        rows = cvxpy.vec(self.weight, order="C")
        # As a quadratic form both solvers are faster than with the residual of a least squares problem.
        square = cvxpy.quad_form(rows, sparse.kron(sparse.eye_array(r), moment, format="csc"), assume_PSD=True)
        if len(problem.penalty) == c:
            norms = cvxpy.norm(self.weight, 2, axis=0)
        else:
            spans = zip(problem.first[:-1], problem.first[1:], strict=True)
            norms = cvxpy.hstack([cvxpy.norm(self.weight[:, a:b], "fro") for a, b in spans])
        linear = cvxpy.sum(cvxpy.multiply(problem.residual / self.unit, self.weight))
        self.model = cvxpy.Problem(
            cvxpy.Minimize(0.5 * square - linear + self.penalty_weight * (problem.penalty @ norms))
        )

    def solve(self, solver: str, penalty_weight: float, **settings: Any) -> LassoSolution:
        """`settings` of the solver, else those of SETTINGS. Raises SolverFailed."""
        cvxpy = _cvxpy()

        self.penalty_weight.value = penalty_weight / self.unit
        try:
            self.model.solve(solver=solver, **(settings or SETTINGS.get(solver, {})))
        except cvxpy.SolverError as error:
            raise SolverFailed(f"{solver} failed: {str(error).splitlines()[0]}") from None
        status = self.model.status
        if status not in (cvxpy.OPTIMAL, cvxpy.OPTIMAL_INACCURATE):
            raise SolverFailed(f"{solver} ended with status {status}")
        weight = self.weight.value * self.unit
        everything = np.arange(len(self.problem.penalty))
        found = certify(self.problem, penalty_weight, everything, weight, {"statuses": status})
        is_kept = is_nonzero(self.problem, found.norm)
        kept = everything[is_kept]
        return replace(
            found, group=kept, weight=weight[:, self.problem.columns_of(kept)], norm=np.where(is_kept, found.norm, 0.0)
        )


def is_nonzero(problem: LassoProblem, norms: Floats) -> NDArray[np.bool_]:
    """(groups,) which norms of an inexact solution count as weights, not as what the solver leaves of zeros."""
    alone = problem.norms(problem.residual).max(initial=0.0)
    return (norms > THRESHOLD * norms.max(initial=0.0)) & (norms > _SOLVER_NOISE * alone)


def _cvxpy() -> Any:
    """The package, whose annotations hide most of what it exports."""
    return import_module("cvxpy")


def _without_weights(solution: LassoSolution) -> LassoSolution:
    return replace(solution, weight=solution.weight[:, :0])
