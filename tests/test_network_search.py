"""The search for the price that just meets a budget, on made-up networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from repurpose_opt.network.search import CLOSE_ENOUGH, MOST_TRIALS, largest_within


@dataclass(frozen=True)
class Made:
    """A trial of a made-up network."""

    used: float


def search(used: Callable[[float], float], first: float, sign: int) -> tuple[float, int]:
    """What the answer uses of its budget, and the number of trials."""
    prices = []

    def run(price: float) -> Any:
        prices.append(price)
        return Made(used(price))

    best: Any = largest_within(run, lambda trial: trial.used, first, sign)  # type: ignore[attr-defined]
    return best.used, len(prices)


def logistic(price: float, middle: float, width: float) -> float:
    """From 1 at low prices to 0 at high ones."""
    if price == 0:
        return 1.0
    return 1 / (1 + math.exp(min((math.log(price) - middle) / width, 700.0)))


MIDDLE, WIDTH = st.floats(-20, 20), st.floats(0.3, 3)
OFF = st.floats(-7, 7)
"""How far off the first price is, on the log scale: a factor of a thousand either way."""


@given(middle=MIDDLE, width=WIDTH, off=OFF, budget=st.floats(0.003, 0.7))
def test_a_smooth_budget_is_filled(middle: float, width: float, off: float, budget: float) -> None:
    used, trials = search(lambda price: logistic(price, middle, width) / budget, math.exp(middle + off), -1)
    assert CLOSE_ENOUGH <= used <= 1
    assert trials <= MOST_TRIALS


@given(middle=MIDDLE, width=WIDTH, off=OFF, most=st.floats(0.01, 0.7))
def test_a_smooth_error_is_allowed_up_to_its_limit(middle: float, width: float, off: float, most: float) -> None:
    used, trials = search(lambda price: (1 - logistic(price, middle, width)) / most, math.exp(middle + off), +1)
    assert CLOSE_ENOUGH <= used <= 1
    assert trials <= MOST_TRIALS


@given(slope=st.floats(0.3, 3), off=OFF)
def test_a_power_law_is_filled(slope: float, off: float) -> None:
    used, trials = search(lambda price: price**-slope if price > 0 else math.inf, math.exp(off), -1)
    assert CLOSE_ENOUGH <= used <= 1
    assert trials <= MOST_TRIALS


@given(middle=MIDDLE, width=WIDTH, off=OFF, budget=st.floats(0.003, 0.7), seed=st.integers(0, 999), steps=st.booleans())
def test_noise_and_steps_never_take_it_above(
    middle: float, width: float, off: float, budget: float, seed: int, steps: bool
) -> None:
    random = np.random.default_rng(seed)

    def noisy(price: float) -> float:
        volume = logistic(price, middle, width) * math.exp(random.normal(scale=0.1))
        return (math.floor(20 * volume) / 20 if steps else volume) / budget

    used, trials = search(noisy, math.exp(middle + off), -1)
    assert used <= 1
    assert trials <= MOST_TRIALS


def test_a_first_price_far_down_a_flat_curve_is_left_behind() -> None:
    """Nearly everything is sent at the first price, and a little less at ten times it."""
    used, _ = search(lambda price: logistic(price, 0.0, 2.7) / 0.48, math.exp(-7.0), -1)
    assert CLOSE_ENOUGH <= used <= 1


def test_a_budget_that_nothing_fills_ends_early() -> None:
    """Everything that helps is sent long before the budget is used up."""
    used, trials = search(lambda price: 0.7 if price < 1 else 0.1, 1e-3, -1)
    assert used == 0.7
    assert trials <= 4


def test_a_step_over_the_budget_leaves_the_best_below_it() -> None:
    used, trials = search(lambda price: 3.0 if price < 1 else 0.4, 50.0, -1)
    assert used == 0.4
    assert trials <= MOST_TRIALS


def test_where_nothing_fits_the_end_is_tried() -> None:
    seen = []

    def used(price: float) -> float:
        seen.append(price)
        return 5.0

    assert search(used, 1.0, -1)[0] == 5.0
    assert seen[-1] > 1e20
    assert search(used, 1.0, +1)[0] == 5.0
    assert seen[-1] == 0
