"""`brute-force`: every placement and, where needed, every set of transfers; the oracle for tiny problems."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import log10

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Deadline, Prune, SolveOptions, Termination
from repurpose_opt.trajectory import Incumbents, Point

_MOST_CASES = 300_000


class BruteForce:
    """Enumerates all placements and all transfers of a tiny problem: a proof, and the oracle of the tests."""

    name = "brute-force"
    requires: tuple[str, ...] = ()

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        digits = problem.m * log10(problem.P)
        if not formulation.selection_is_exact(problem):
            if formulation.sends_codes:
                return "codes cannot be enumerated, and their selection is not exact here"
            digits += int(problem.remote.sum()) * log10(2)
        return None if digits <= log10(_MOST_CASES) else f"10^{digits:.1f} cases to enumerate; at most {_MOST_CASES:,}"

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        deadline = Deadline(options.time_limit)
        best: tuple[float, NDArray[np.int64], Exchange] | None = None
        incumbents = Incumbents()
        for owner in _placements(problem):
            for exchange in _exchanges(problem, formulation, owner):
                if deadline.passed:
                    return _answer(best, Termination.TIME_LIMIT, incumbents.points)
                weight = formulation.repair(problem, owner, exchange)
                value = formulation.objective(problem, owner, exchange, weight)
                better = best is None or value < best[0]
                if better and not formulation.violations(problem, owner, exchange, weight):
                    best = value, owner, exchange
                    incumbents.add(value)
        return _answer(best, Termination.OPTIMAL, incumbents.points)


def _answer(
    best: tuple[float, NDArray[np.int64], Exchange] | None, termination: Termination, trajectory: list[Point]
) -> Candidate:
    if best is None:
        none_found = Termination.INFEASIBLE if termination is Termination.OPTIMAL else termination
        return Candidate(none_found, message="no placement satisfies the constraints")
    value, owner, exchange = best
    bound = value if termination is Termination.OPTIMAL else None
    stats = {"trajectory": trajectory}
    return Candidate(termination, owner, exchange, bound=bound, claimed_objective=value, stats=stats)


def _placements(problem: LayerProblem) -> Iterator[NDArray[np.int64]]:
    for labels in product(*(np.flatnonzero(row) for row in problem.allowed)):
        owner = np.array(labels, dtype=np.int64)
        if not metrics.placement_violations(problem, owner):
            yield owner


def _exchanges(problem: LayerProblem, formulation: Formulation, owner: NDArray[np.int64]) -> Iterator[Exchange]:
    if formulation.selection_is_exact(problem):
        yield formulation.select(problem, owner)
        return
    value, worker = np.nonzero(problem.remote)
    for chosen in product((False, True), repeat=len(value)):
        transfers = np.zeros((problem.n, problem.P), dtype=bool)
        transfers[value, worker] = chosen
        yield Exchange.of_transfers(transfers, problem.input_owner)
