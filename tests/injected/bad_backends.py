"""Backends that misbehave, one way each. A test registers them as a plug-in of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np

from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Termination


def contiguous(problem: LayerProblem) -> np.ndarray:
    """A valid placement of neurons of equal load."""
    return np.repeat(np.arange(problem.P), problem.slots)[: problem.m]


class Bad:
    """Answers with `contiguous`, a heuristic."""

    requires: tuple[str, ...] = ()
    name = "good"

    def supports(self, problem: LayerProblem, formulation: Any) -> str | None:
        # The tiny problems that load a backend are passed over: a fault there would end nothing that is measured.
        return "too small" if problem.m < 8 else None

    def solve(self, problem: LayerProblem, formulation: Any, options: Any, start: Any, prune: Any) -> Candidate:
        return Candidate(Termination.HEURISTIC, contiguous(problem))


class Crashes(Bad):
    name = "crashes"

    def solve(self, *arguments: Any) -> Candidate:
        ctypes.string_at(0)
        raise AssertionError("a null pointer was read")


class Exits(Bad):
    name = "exits"

    def solve(self, *arguments: Any) -> Candidate:
        os._exit(0)


class Raises(Bad):
    name = "raises"

    def solve(self, *arguments: Any) -> Candidate:
        raise KeyError("row 7")


class Hangs(Bad):
    """In a process of another session as well, which must not outlive it."""

    name = "hangs"

    def solve(self, problem: LayerProblem, formulation: Any, options: Any, start: Any, prune: Any) -> Candidate:
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(sleep, start_new_session=True)
        with open(os.environ["BAD_BACKENDS_PROCESS"], "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
        raise AssertionError("it was not ended")


class Eats(Bad):
    name = "eats"

    def solve(self, *arguments: Any) -> Candidate:
        held = []
        while True:
            held.append(np.ones(1 << 20))  # 8 MiB, touched


class EatsElsewhere(Bad):
    """In a process that it starts."""

    name = "eats-elsewhere"

    def solve(self, *arguments: Any) -> Candidate:
        subprocess.run([sys.executable, "-c", "held = []\nwhile True: held.append(b'x' * (8 << 20))"], check=True)
        raise AssertionError("its process was not ended")


class Overfills(Bad):
    """All neurons on one worker."""

    name = "overfills"

    def solve(self, problem: LayerProblem, *arguments: Any) -> Candidate:
        return Candidate(Termination.HEURISTIC, np.zeros(problem.m, dtype=np.int64))


class Mislabels(Bad):
    """Workers numbered from 1."""

    name = "mislabels"

    def solve(self, problem: LayerProblem, *arguments: Any) -> Candidate:
        return Candidate(Termination.HEURISTIC, contiguous(problem) + 1)


class TooShort(Bad):
    name = "too-short"

    def solve(self, problem: LayerProblem, *arguments: Any) -> Candidate:
        return Candidate(Termination.HEURISTIC, contiguous(problem)[:-1])


class ClaimsOptimal(Bad):
    """Without a bound."""

    name = "claims-optimal"

    def solve(self, problem: LayerProblem, *arguments: Any) -> Candidate:
        return Candidate(Termination.OPTIMAL, contiguous(problem))


class ClaimsBound(Bad):
    """A bound at its own objective, which others beat."""

    name = "claims-bound"

    def solve(self, problem: LayerProblem, formulation: Any, options: Any, start: Any, prune: Any) -> Candidate:
        owner = contiguous(problem)
        exchange = formulation.select(problem, owner)
        weight = formulation.repair(problem, owner, exchange)
        objective = formulation.objective(problem, owner, exchange, weight)
        return Candidate(Termination.OPTIMAL, owner, exchange, bound=objective)


class ClaimsObjective(Bad):
    name = "claims-objective"

    def solve(self, problem: LayerProblem, formulation: Any, options: Any, start: Any, prune: Any) -> Candidate:
        owner = contiguous(problem)
        return Candidate(Termination.HEURISTIC, owner, formulation.select(problem, owner), claimed_objective=1.0)


class ClaimsInfeasible(Bad):
    name = "claims-infeasible"

    def solve(self, *arguments: Any) -> Candidate:
        return Candidate(Termination.INFEASIBLE, message="no placement fits")


class Tampers(Bad):
    """Empties the weights, so that its placement seems to cost nothing."""

    name = "tampers"

    def solve(self, problem: LayerProblem, *arguments: Any) -> Candidate:
        problem.weight.data[:] = 0
        problem.weight.eliminate_zeros()
        return Candidate(Termination.HEURISTIC, contiguous(problem))


BACKENDS = (
    Bad, Crashes, Exits, Raises, Hangs, Eats, EatsElsewhere, Overfills, Mislabels, TooShort, ClaimsOptimal, ClaimsBound,
    ClaimsObjective, ClaimsInfeasible, Tampers,
)  # fmt: skip
