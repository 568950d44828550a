"""`nuclear-norm`: codes by a convex relaxation in CVXPY, then the refit. The reference for nuclear-norm-fast.

A problem for each receiver, compiled once with λ as a parameter. Solvers of cones return no exact zeros: singular
values below 1e-4 of the largest are not sent. `stats` has the duality gap, computed from the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.isolation import DeadlinePassed, last
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination, time_left
from repurpose_opt_solvers import nuclear_path
from repurpose_opt_solvers.nuclear import CodeProblem, Floats, NuclearSolution, certified
from repurpose_opt_solvers.nuclear_path import Choice

THRESHOLD = 1e-4
"""Of the largest singular value: what is below is not sent."""
SETTINGS: dict[str, dict[str, Any]] = {"SCS": {"eps_abs": 1e-8, "eps_rel": 1e-8, "max_iters": 100_000}}
"""Where a solver's own tolerance is too coarse to tell which singular values are zero."""
_BEST = "SCS"


class NuclearNorm:
    """Convex nuclear norm in CVXPY by SCS, or another solver by name; then refit, with a bound. Volume with codes."""

    requires: tuple[str, ...] = ("cvxpy",)
    sends_codes = True

    def __init__(self, solver: str | None = None) -> None:
        """`solver`: the name of an installed solver of semidefinite cones, as CVXPY spells it."""
        self.name = "nuclear-norm" if solver is None else f"nuclear-norm:{solver.lower()}"
        self.solver = _BEST if solver is None else solver

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return nuclear_path.supports(problem, formulation)

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        assert isinstance(formulation, Volume)
        deadline = Deadline(options.time_limit)
        exact = nuclear_path.delegated(problem, formulation, options, owner)
        if exact is not None:
            return exact
        limit = time_left(options, deadline).time_limit
        try:
            answer, is_finished = last(choices, problem, formulation, owner, self.solver, time_limit=limit)
        except DeadlinePassed:
            return nuclear_path.without_time(problem, formulation, owner)
        if isinstance(answer, str):
            return Candidate(Termination.ERROR, owner, message=answer)
        termination = Termination.HEURISTIC if is_finished else Termination.TIME_LIMIT
        candidate = Candidate(termination, owner, answer.exchange, stats={**answer.stats, "solver": self.solver})
        return nuclear_path.with_bound(problem, formulation, options, candidate, deadline)


class SolverFailed(Exception):
    """CVXPY's solver ended without a usable solution."""


def choices(
    problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64], solver: str
) -> Iterator[Choice | str]:
    """The choices of `nuclear_path.search`; if the solver fails, last why."""
    try:
        yield from nuclear_path.search(problem, formulation, owner, ConvexSolver(solver))
    except SolverFailed as reason:
        yield str(reason)


class ConvexSolver:
    """Solves the relaxations with CVXPY; each compiled at its first λ."""

    def __init__(self, solver: str) -> None:
        installed = _cvxpy().installed_solvers()
        if solver not in installed:
            raise SolverFailed(f"solver {solver!r} is not installed; CVXPY has {', '.join(installed)}")
        self.solver = solver
        self._compiled: dict[int, CompiledNuclear] = {}

    def __call__(self, index: int, problem: CodeProblem, penalty_weight: float, near: Floats | None) -> NuclearSolution:
        if index not in self._compiled:
            self._compiled[index] = CompiledNuclear(problem)
        return self._compiled[index].solve(self.solver, penalty_weight)


class CompiledNuclear:
    """One relaxation in CVXPY, scaled so that its weights are about 1, with λ as a parameter."""

    def __init__(self, problem: CodeProblem) -> None:
        cvxpy = _cvxpy()

        self.problem = problem
        b, (r, c) = problem.width, problem.residual.shape
        self.unit = np.sqrt(problem.energy / (r * c)) or 1.0
        self.penalty_weight = cvxpy.Parameter(nonneg=True)
        self.folded = [cvxpy.Variable((r * b, (span.stop - span.start) // b)) for span in problem.spans]
        order = np.concatenate([np.arange(s.start, s.stop).reshape(-1, b).T.ravel() for s in problem.spans])
        weight = cvxpy.hstack([part[i::b] for part in self.folded for i in range(b)])
        moment = problem.moment[np.ix_(order, order)]
        rows = cvxpy.vec(weight, order="C")
        square = cvxpy.quad_form(rows, sparse.kron(sparse.eye_array(r), moment, format="csc"), assume_PSD=True)
        linear = cvxpy.sum(cvxpy.multiply(2 * problem.residual[:, order] / self.unit, weight))
        parts = zip(problem.size, self.folded, strict=True)
        penalty = sum(size * cvxpy.normNuc(part) for size, part in parts if size > 0)
        self.model = cvxpy.Problem(cvxpy.Minimize(square - linear + self.penalty_weight * penalty))

    def solve(self, solver: str, penalty_weight: float, **settings: Any) -> NuclearSolution:
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
        weight = np.hstack([self.problem.unfold(part.value) for part in self.folded]) * self.unit
        return certified(self.problem, penalty_weight, weight, THRESHOLD)


def _cvxpy() -> Any:
    """The package, whose annotations hide most of what it exports."""
    return import_module("cvxpy")
