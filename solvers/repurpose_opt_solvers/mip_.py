"""`mip`: the owners as a mixed-integer linear program, by OR-Tools: its best way, or one engine.

The engines are CP-SAT, and HiGHS and SCIP through MathOpt. `mip` proves small layers and searches neighbourhoods of
large ones; `stats` says which was done.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.isolation import DeadlinePassed, last
from repurpose_opt.linear_model import possible_places, whole_loads
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, Prune, SolveOptions, Termination
from repurpose_opt_solvers import mip_search
from repurpose_opt_solvers.alternate_ import Alternate
from repurpose_opt_solvers.bounds import spread
from repurpose_opt_solvers.mip_search import Found, Task, cost_with
from repurpose_opt_solvers.transport import Infeasible, assign_with_bound

_MOST_LINKS = 2_000_000
"""Pins times workers of the largest model that an engine is given: it takes gigabytes."""
_MARGIN = 0.95
"""Share of the time that a search is told, of which it may be late a little."""
_START_SHARE = 0.1
"""Of the time limit, for a start."""


class MixedInteger(ABC):
    """What the backends of this family share; a subclass says what to run."""

    name: str
    requires: tuple[str, ...] = ("ortools",)
    needs_whole_model: bool
    """Whether it is of no use where the whole model is too large."""
    betters_a_start: bool
    """Whether alternation is tried even where a start is given."""

    @abstractmethod
    def search(self) -> tuple[Callable[..., Iterator[Found]], tuple[str, ...]]:
        """A generator function of `mip_search`, and its arguments after the task."""

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        found = costs_of(problem, formulation)
        if isinstance(found, str):
            return found
        hypergraph, budget = found
        links = int(hypergraph.pins.nnz) * problem.P
        has_parts = budget is None and hypergraph.communication == "total"
        if links > _MOST_LINKS and (self.needs_whole_model or not has_parts):
            return f"{links:,} pins times workers; at most {_MOST_LINKS:,}"
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        deadline = Deadline(options.time_limit)
        began = time.monotonic()
        found = costs_of(problem, formulation)
        assert not isinstance(found, str)
        hypergraph, budget = found
        try:
            starts, bound = self._starts(problem, formulation, options, hypergraph, start, prune)
        except Infeasible as reason:
            return reason.candidate()
        weight = hypergraph.price if budget is None else problem.transfer_bytes.astype(np.float64)

        def sent_by(owner: NDArray[np.int64]) -> NDArray[np.bool_]:
            return formulation.select(problem, owner).transfers

        def cost(owner: NDArray[np.int64]) -> float:
            if budget is None:
                return hypergraph.cost(owner)
            return cost_with(hypergraph, owner, sent_by(owner) | (weight == 0))

        owner = min(starts, key=cost, default=None)
        left = deadline.remaining
        task = Task(
            hypergraph=hypergraph,
            places=possible_places(problem),
            loads=whole_loads(problem),
            weight=weight,
            budget=budget,
            start=owner,
            sent=None if budget is None or owner is None else sent_by(owner),
            bound=bound if budget is None else hypergraph.constant,
            began=began,
            until=None if left is None else time.monotonic() + _MARGIN * left,
            threads=options.threads,
            seed=options.seed,
            relative_gap=options.relative_gap,
        )
        function, arguments = self.search()
        try:
            answer, _ = last(function, task, *arguments, time_limit=left)
        except DeadlinePassed:
            answer = mip_search.before_a_search(task)
        return _candidate(problem, formulation, options, task, answer)

    def _starts(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        hypergraph: Hypergraph,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> tuple[list[NDArray[np.int64]], float]:
        """The given start, the assignment of the spread costs and the alternation; and a first bound."""
        limit = None if options.time_limit is None else _START_SHARE * options.time_limit
        bound = -np.inf
        starts = [] if start is None else [start]
        try:
            spread_out = assign_with_bound(problem, spread(hypergraph), time_limit=limit)
            bound = hypergraph.constant + spread_out.bound
            starts.append(spread_out.owner)
        except Infeasible as reason:
            if reason.proved:
                raise
        if start is None or self.betters_a_start:
            alternated = Alternate().solve(problem, formulation, replace(options, time_limit=limit), None, prune)
            starts += [] if alternated.owner is None else [alternated.owner]
        return starts, bound


class Mip(MixedInteger):
    """Mixed-integer program: small layers with a proof (SCIP), large ones by neighbourhoods, each with a bound."""

    name = "mip"
    needs_whole_model = False
    betters_a_start = True

    def search(self) -> tuple[Callable[..., Iterator[Found]], tuple[str, ...]]:
        return mip_search.by_best, ()


class MipCpSat(MixedInteger):
    """Mixed-integer program by CP-SAT alone; optimal when proved."""

    name = "mip:cp-sat"
    needs_whole_model = True
    betters_a_start = False

    def search(self) -> tuple[Callable[..., Iterator[Found]], tuple[str, ...]]:
        return mip_search.by_engine, ("cp-sat",)


class MipHighs(MixedInteger):
    """Mixed-integer program by HiGHS alone; optimal when proved."""

    name = "mip:highs"
    needs_whole_model = True
    betters_a_start = False

    def search(self) -> tuple[Callable[..., Iterator[Found]], tuple[str, ...]]:
        return mip_search.by_engine, ("highs",)


class MipScip(MixedInteger):
    """Mixed-integer program by SCIP alone; optimal when proved."""

    name = "mip:scip"
    needs_whole_model = True
    betters_a_start = False

    def search(self) -> tuple[Callable[..., Iterator[Found]], tuple[str, ...]]:
        return mip_search.by_engine, ("scip",)


def costs_of(problem: LayerProblem, formulation: Formulation) -> tuple[Hypergraph, float | None] | str:
    """The costs of placements and the budget in bytes, if there is one; or why they have no such form."""
    if isinstance(formulation, Volume):
        if formulation.communication == "busiest":
            return "what a transfer costs depends on the others"
        if formulation.sends_codes:
            return "what a code is worth is not linear in the placement"
        if formulation.max_nmse is not None:
            return "a limit on the NMSE is not linear in the transfers"
        budget = formulation.limit(problem)
        if budget is not None:
            energies = Volume(transfer_price=1.0).hypergraph(problem)
            assert energies is not None
            return energies, budget
    hypergraph = formulation.hypergraph(problem, None)
    if hypergraph is None:
        return f"the costs of {formulation.name} are not those of a hypergraph"
    return hypergraph, None


def _candidate(
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions,
    task: Task,
    found: Found,
) -> Candidate:
    """What a search has found as an answer: a bound on a stand-in for the objective is no proof."""
    if found.is_infeasible:
        return Candidate(Termination.INFEASIBLE, message="no placement satisfies capacity, min_load and allowed")
    is_late = options.time_limit is not None
    ended = Termination.TIME_LIMIT if is_late else Termination.HEURISTIC
    bound = found.bound if np.isfinite(found.bound) else None
    if found.owner is None:
        return Candidate(ended, message="no placement was found in time", stats=found.stats)
    if not task.hypergraph.is_exact:
        stats = {key: told for key, told in found.stats.items() if key != "trajectory"}  # of the stand-in's costs
        if found.cost - found.bound <= options.relative_gap * max(abs(found.cost), 1e-12):
            ended = Termination.HEURISTIC  # the stand-in is solved: time was not what ended it
        return Candidate(ended, found.owner, surrogate_bound=bound, stats=stats)
    if task.budget is None:
        exchange = formulation.select(problem, found.owner)
    else:
        assert found.sent is not None
        held = np.asarray(task.hypergraph.pins.T @ np.eye(problem.P)[found.owner])
        is_free = (task.weight == 0) & problem.remote & (held > 0)  # values of no bytes
        exchange = Exchange.of_transfers(found.sent | is_free, problem.input_owner)
    # The cost of the hypergraph has rounding errors of its own, which count where the objective is 0.
    weight = formulation.repair(problem, found.owner, exchange)
    objective = formulation.objective(problem, found.owner, exchange, weight)
    bound = None if bound is None else min(bound, objective)
    proved = bound is not None and objective - bound <= options.relative_gap * max(abs(objective), 1e-12)
    return Candidate(
        Termination.OPTIMAL if proved else ended,
        found.owner,
        exchange,
        bound=bound,
        claimed_objective=found.cost,
        stats=found.stats,
    )
