"""A solved layer. Its figures are recomputed from owners, messages and weights, never taken from a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import metrics
from repurpose_opt.errors import NoSolution
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem, Weight
from repurpose_opt.repair import corrected_bias
from repurpose_opt.solver import Candidate, SolveOptions, Termination


@dataclass(frozen=True, eq=False)
class LayerSolution:
    """Owners, messages and weights of one layer, with what they cost.

    `owner` (m,), `exchange`, `weight` V (rows, columns; sparse in, sparse out) and `bias` (rows,) are None where
    the solve ended without an answer (infeasible, unsupported, error): `message` says why, `require()` raises it.
    """

    problem: LayerProblem
    formulation: Formulation
    termination: Termination
    owner: NDArray[np.int64] | None = None
    exchange: Exchange | None = None
    weight: Weight | None = None
    bias: NDArray[np.float64] | None = None
    bound: float | None = None
    surrogate_bound: float | None = None
    message: str = ""
    stats: Mapping[str, Any] = field(default_factory=dict)

    def restated(self, **claims: Any) -> LayerSolution:
        """The same owners, exchange and weights under other claims; figures that are computed already are kept."""
        copied = replace(self, **claims)
        for name in ("transfers", "objective", "nmse", "volume", "busiest", "violations"):
            if name in self.__dict__:
                copied.__dict__[name] = self.__dict__[name]
        return copied

    def require(self) -> LayerSolution:
        """This solution, or NoSolution if there are no owners."""
        if self.owner is None:
            raise NoSolution(f"the layer has no solution: {self.termination} ({self.message})")
        return self

    @cached_property
    def transfers(self) -> NDArray[np.bool_]:
        """(n, P) whether value j is sent to worker k."""
        return self._exchange.transfers

    @cached_property
    def objective(self) -> float:
        return float(self.formulation.objective(self.problem, self._owner, self._exchange, self._weight))

    @cached_property
    def nmse(self) -> float:
        """Relative squared error of the layer's output on the calibration moments."""
        return metrics.nmse(self.problem, self._owner, self._weight, self._bias, self._exchange)

    @cached_property
    def volume(self) -> int:
        """Bytes a sample."""
        return metrics.volume(self.problem, self._exchange)

    @cached_property
    def busiest(self) -> int:
        """Bytes a sample."""
        return metrics.busiest(self.problem, self._exchange)

    @property
    def gap(self) -> float | None:
        """(objective − bound) / |objective|; None without a bound."""
        return None if self.bound is None else _gap(self.objective, self.bound)

    @cached_property
    def violations(self) -> tuple[str, ...]:
        """What is wrong with this solution; empty for a valid one."""
        placement = metrics.violations(self.problem, self._owner, self._exchange, self._weight)
        return placement + self.formulation.violations(self.problem, self._owner, self._exchange, self._weight)

    @property
    def _owner(self) -> NDArray[np.int64]:
        owner = self.require().owner
        assert owner is not None
        return owner

    @property
    def _exchange(self) -> Exchange:
        exchange = self.require().exchange
        assert exchange is not None
        return exchange

    @property
    def _weight(self) -> Weight:
        weight = self.require().weight
        assert weight is not None
        return weight

    @property
    def _bias(self) -> NDArray[np.float64]:
        bias = self.require().bias
        assert bias is not None
        return bias


def rank(solution: LayerSolution) -> tuple[bool, float]:
    """Sorts solutions: valid before invalid, then by objective."""
    return bool(solution.violations), solution.objective


def verify(
    problem: LayerProblem, formulation: Formulation, candidate: Candidate, options: SolveOptions
) -> LayerSolution:
    """The solution that a candidate with owners and an exchange amounts to.

    A claim that does not hold is refused and recorded in stats: `optimal` without a bound within the tolerance
    becomes `heuristic`, a bound above the objective is dropped, invalid owners become `error`.
    """
    stats = dict(candidate.stats)
    if candidate.owner is None or candidate.exchange is None:
        termination, message = candidate.termination, candidate.message
        if termination in (Termination.OPTIMAL, Termination.HEURISTIC):
            missing = "owners" if candidate.owner is None else "an exchange"
            termination, message = Termination.ERROR, f"{termination} without {missing}; {message}"
        return LayerSolution(problem, formulation, termination, message=message, stats=stats)
    owner = np.array(candidate.owner)
    wrong = metrics.placement_violations(problem, owner) + metrics.exchange_violations(problem, candidate.exchange)
    if wrong:
        return LayerSolution(problem, formulation, Termination.ERROR, message="; ".join(wrong), stats=stats)
    weight = formulation.repair(problem, owner, candidate.exchange)
    solution = LayerSolution(
        problem,
        formulation,
        candidate.termination,
        owner,
        candidate.exchange,
        weight,
        corrected_bias(problem, weight),
        candidate.bound,
        candidate.surrogate_bound,
        candidate.message,
        stats,
    )
    return _without_false_claims(solution, candidate, options)


def _without_false_claims(solution: LayerSolution, candidate: Candidate, options: SolveOptions) -> LayerSolution:
    refused = []
    bound, termination = solution.bound, solution.termination
    objective = solution.objective
    if bound is not None and not bound <= objective + options.relative_gap * max(abs(objective), 1e-12):
        refused.append(f"bound {bound:.9g} above the objective {objective:.9g}")
        bound = None
    proved = bound is not None and _gap(objective, bound) <= options.relative_gap
    if termination is Termination.OPTIMAL and not proved:
        refused.append("optimal without a bound within the tolerance")
        termination = Termination.HEURISTIC
    claimed = candidate.claimed_objective
    if claimed is not None and not np.isclose(claimed, objective, rtol=1e-6, atol=1e-9):
        refused.append(f"objective {claimed:.9g}, recomputed as {objective:.9g}")
    if not refused:
        return solution
    stats = {**solution.stats, "refused_claims": tuple(refused)}
    return solution.restated(bound=bound, termination=termination, stats=stats)


def _gap(objective: float, bound: float) -> float:
    return max(0.0, objective - bound) / max(abs(objective), 1e-12)
