"""Recomputes what an answer is worth. A process of its own does it, with a problem that no backend has touched."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from repurpose_opt.bench.answer import Answer
from repurpose_opt.bench.row import Failure
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solution import verify
from repurpose_opt.solver import Candidate, SolveOptions, Termination


@dataclass(frozen=True)
class Verdict:
    """The part of a row that is recomputed; None where there is no answer that holds."""

    termination: str
    failure: Failure | None
    message: str
    refused: tuple[str, ...] = ()
    objective: float | None = None
    bound: float | None = None
    surrogate_bound: float | None = None
    nmse: float | None = None
    volume: int | None = None
    busiest: int | None = None


def judge(problem: LayerProblem, formulation: Formulation, answer: Answer, relative_gap: float) -> Verdict:
    """Verify an answer against the problem. O(rows · columns²) for full moments, as the refit is done anew."""
    claims = answer.claims
    if answer.owner is None or answer.exchange is None:
        return _without_answer(answer)
    if answer.owner.dtype.kind not in "iu":
        message = f"owners of dtype {answer.owner.dtype}"
        return Verdict(Termination.ERROR, Failure.INVALID, message, claims.refused)
    candidate = Candidate(
        Termination(claims.termination),
        answer.owner.astype(np.int64),
        answer.exchange,
        claims.bound,
        claims.surrogate_bound,
        claims.objective,
        claims.message,
    )
    solution = verify(problem, formulation, candidate, SolveOptions(relative_gap=relative_gap))
    refused = tuple(dict.fromkeys((*claims.refused, *solution.stats.get("refused_claims", ()))))
    wrong = (solution.message,) if solution.owner is None else solution.violations
    if wrong:
        return Verdict(Termination.ERROR, Failure.INVALID, "; ".join(wrong), refused)
    if not math.isfinite(solution.objective):
        return Verdict(Termination.ERROR, Failure.INVALID, f"objective {solution.objective}", refused)
    return Verdict(
        str(solution.termination),
        None,
        claims.message,
        refused,
        solution.objective,
        _finite(solution.bound),
        _finite(solution.surrogate_bound),
        _finite(solution.nmse),
        solution.volume,
        solution.busiest,
    )


def _without_answer(answer: Answer) -> Verdict:
    claims = answer.claims
    termination, failure = claims.termination, None
    if claims.raised == "MemoryError":
        failure = Failure.MEMORY
    elif claims.raised is not None:
        failure = Failure.EXCEPTION
    elif termination == Termination.TIME_LIMIT:
        failure = Failure.NO_ANSWER
    elif termination not in (Termination.INFEASIBLE, Termination.UNSUPPORTED):
        termination, failure = Termination.ERROR, Failure.INVALID
    return Verdict(str(termination), failure, claims.message, claims.refused)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)
