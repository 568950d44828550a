"""One price for all layers: the search for the price at which the whole network just meets its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from repurpose_opt.errors import NoSolution
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.network.columns import batches
from repurpose_opt.network.sweep import Sweep, Trial

CLOSE_ENOUGH = 0.98
MOST_TRIALS = 14
NOTHING_SENT = 1e30
"""A price at which no value is worth sending."""
_SLOPE = 1.5
"""Typical fall of log price per rise of log volume, to step on until the budget is bracketed."""
_NARROW = 0.03
"""Of log price, a bracket between whose ends a trial would hardly differ from both."""
_LOWEST = -40.0
"""Log of the lowest price that is tried, over the first: as good as nothing."""


def best_trial(sweep: Sweep, formulation: Formulation) -> Trial:
    """The trial that meets the formulation over the whole network, by one price for all layers.

    Whatever else the formulation says, such as what messages may be, holds for every layer as it is.

    Raises NoSolution where no price reaches `max_nmse`, or what norms and gatherings send is above the budget.
    """
    if not isinstance(formulation, Volume) or formulation.transfer_price is not None:
        return sweep.run(formulation)

    unlimited = replace(formulation, transfer_price=0.0, budget=None, budget_bytes=None, max_nmse=None)

    def at_price(price: float) -> Trial:
        return sweep.run(replace(unlimited, transfer_price=price))

    def nothing_sent() -> Trial:
        return sweep.run(replace(unlimited, transfer_price=None, budget_bytes=0))

    first = _first_price(sweep)
    if formulation.max_nmse is not None:
        return _least_volume(sweep, at_price, first, formulation.max_nmse)
    if formulation.budget == 0 or formulation.budget_bytes == 0:
        return _checked(nothing_sent(), formulation)
    if formulation.budget == 1 or (formulation.budget_bytes or 0) >= sweep.most_volume:
        return at_price(0.0)
    trial = largest_within(at_price, lambda trial: _used(trial, formulation), first, -1)
    # No price keeps values off a link that costs nothing; a budget counts their bytes all the same.
    return trial if _used(trial, formulation) <= 1 else _checked(nothing_sent(), formulation)


def _checked(trial: Trial, formulation: Volume) -> Trial:
    """A trial in which no product is sent anything. Raises NoSolution where it is above the budget all the same."""
    allowed = formulation.allowed_bytes(trial.direct_volume)
    assert allowed is not None
    if trial.volume > allowed:
        got = f"{trial.volume} of {trial.direct_volume} bytes a sample"
        raise NoSolution(f"the budget, {allowed:g} bytes, cannot be met: norms and gatherings alone send {got}")
    return trial


def curve(trials: Sequence[Trial]) -> list[dict[str, float]]:
    """Price, volume and output NMSE of every trial of a run."""
    return [
        {
            "transfer_price": getattr(trial.formulation, "transfer_price", None) or 0.0,
            "volume_fraction": trial.volume / max(trial.direct_volume, 1),
            "output_nmse": trial.output_nmse,
        }
        for trial in trials
    ]


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
    step, before, is_renewed = 0.1, 0.0, False
    for _ in range(MOST_TRIALS - 1):
        trial = run(math.exp(position))
        share = used(trial)
        height = math.log(max(share, 1e-6))
        is_inside = share <= 1
        if is_inside:
            if best is None or share > used(best):
                best = trial
            if share >= CLOSE_ENOUGH:
                break
            inside = (position, height)
        else:
            outside = (position, height)
        if inside and outside and not is_renewed and abs(inside[0] - outside[0]) < _NARROW:
            # The other end was measured from other owners than there are by now: it may be elsewhere.
            inside, outside = (inside, None) if is_inside else (None, outside)
            step, before, is_renewed = 0.1, 0.0, True
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


def _first_price(sweep: Sweep) -> float:
    """A price in the order of magnitude of what a byte is worth: the loss-weighted energy over the direct bytes."""
    network = sweep.network
    energy = total = 0.0
    inputs = sweep.inputs[:4096]
    with torch.no_grad():
        for batch in batches(len(inputs), network.batch_size):
            for step, outputs in network.graph.outputs(inputs[batch]):
                if step.name in network.products:
                    layout = network.layouts[step.name]
                    assert layout is not None
                    rows = outputs.double().movedim(layout.axis, 0).flatten(1)
                    energy += float(rows.var(1, correction=0).numpy() @ sweep.loss_weights[step.name])
    energy /= len(batches(len(inputs), network.batch_size))
    for name in network.products:
        total += len(network.units(network.read(name))) * network.positions(network.read(name))
    return max(0.1 * energy / (total * network.dtype.itemsize), 1e-30)


def _used(trial: Trial, formulation: Volume) -> float:
    """Share of the budget that a trial uses."""
    allowed = formulation.allowed_bytes(trial.direct_volume)
    assert allowed is not None
    if allowed == 0:
        return math.inf if trial.volume > 0 else 1.0
    return trial.volume / allowed


def _least_volume(sweep: Sweep, at_price: Callable[[float], Trial], first: float, max_nmse: float) -> Trial:
    """The trial of least volume whose output NMSE is at most `max_nmse`. Raises NoSolution."""

    def used(trial: Trial) -> float:
        if trial.volume == 0 and trial.output_nmse <= max_nmse:
            return 1.0  # nothing is left to save
        return trial.output_nmse / max(max_nmse, 1e-12)

    largest_within(at_price, used, first, +1)
    good = [trial for trial in sweep.trials if trial.output_nmse <= max_nmse]
    if not good:
        least = min(trial.output_nmse for trial in sweep.trials)
        raise NoSolution(f"max_nmse {max_nmse:g} cannot be met: the least that was reached is {least:.4g}")
    return min(good, key=lambda trial: trial.volume)
