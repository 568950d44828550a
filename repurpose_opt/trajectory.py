"""Incumbents over time, for anytime curves: what a backend records, and how stages make one trajectory of a solve."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

Point = tuple[float, float]
"""(seconds, objective) of an incumbent."""

_ROUNDING = 1e-9
"""Costs that differ by less than this share are the same, added up in another order."""


class Incumbents:
    """What a backend records: each better incumbent, in seconds since its `solve` began.

    `began` is that moment on `time.monotonic()`, the same clock in a child process; now by default.
    """

    def __init__(self, began: float | None = None) -> None:
        self.began = time.monotonic() if began is None else began
        self.least = math.inf
        self.points: list[Point] = []

    def add(self, objective: float) -> None:
        """An incumbent that was found just now, in the units of the formulation's objective."""
        if objective < self.least:
            self.least = objective
            self.points.append((time.monotonic() - self.began, objective))


def extended(
    trajectory: list[Point], claims: Iterable[Point], began: float, ended: float, objective: float
) -> list[Point]:
    """A trajectory and the strict improvements of one more stage, which had verified `objective` when it ended.

    The stage's claims count in seconds since it `began`, within its time; those below its objective were not real.
    """
    points = list(trajectory)
    moment, least = began, points[-1][1] if points else math.inf
    for seconds, claimed in (*claims, (ended - began, objective)):
        cost = objective if math.isclose(claimed, objective, rel_tol=_ROUNDING) else float(claimed)
        moment = min(max(moment, began + seconds), ended)
        if objective <= cost < least:
            least = cost
            points.append((moment, cost))
    return points
