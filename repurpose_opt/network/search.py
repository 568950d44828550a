"""One price for all layers: the search for the price at which the whole network just meets its budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from repurpose_opt.network.sweep import Trial

CLOSE_ENOUGH = 0.98
MOST_TRIALS = 14
NOTHING_SENT = 1e30
"""A price at which no value is worth sending."""
_SLOPE = 1.5
"""Typical fall of log price per rise of log volume, to step on until the budget is bracketed."""
_LOWEST = -40.0
"""Log of the lowest price that is tried, over the first: as good as nothing."""


def largest_within(run: Callable[[float], Trial], used: Callable[[Trial], float], first: float, sign: int) -> Trial:
    """The trial that uses the most of its budget without going above it.

    `run` makes a trial at a price; `used` is its share of the budget, which falls (sign −1) or rises (sign +1) with
    the price. The search is by regula falsi on log price, safeguarded by bisection; it ends at 98 % of the budget,
    or after 14 trials. What is used is only nearly monotone in the price: the best trial is kept, not the last.
    Where none is within the budget, the answer is the trial at the end that uses the least, whatever that is.
    """
    best: Trial | None = None
    inside: tuple[float, float] | None = None
    outside: tuple[float, float] | None = None
    position = math.log(first)
    lowest = position + _LOWEST
    step, before = 0.1, 0.0
    for _ in range(MOST_TRIALS - 1):
        trial = run(math.exp(position))
        share = used(trial)
        height = math.log(max(share, 1e-6))
        if share <= 1:
            if best is None or share > used(best):
                best = trial
            if share >= CLOSE_ENOUGH:
                break
            inside = (position, height)
        else:
            outside = (position, height)
        if inside is None or outside is None:
            if position == lowest:
                break
            step = min(max(abs(height) * _SLOPE, 2 * step), 4.0)
            if (share > 1) == (sign < 0):
                position += step
            elif share == before > 0:  # a lower price changed nothing: likely everything that helps is sent
                position = lowest
            else:
                position = max(position - step, lowest)
            before = share
            continue
        if abs(inside[0] - outside[0]) < 1e-3:
            break
        # Aim just inside the budget, and stay off the ends of the bracket.
        aim = (math.log(0.99) - inside[1]) / (outside[1] - inside[1])
        position = inside[0] + min(max(aim, 0.15), 0.85) * (outside[0] - inside[0])
    if best is None:
        best = run(NOTHING_SENT if sign < 0 else 0.0)
    return best
