"""Two solvers side by side: ratios with intervals, and who wins how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from repurpose_opt.bench.claims import SAME, ZERO
from repurpose_opt.bench.row import Row
from repurpose_opt.solver import Termination

RESAMPLES = 4000


@dataclass(frozen=True)
class Paired:
    """Two solvers on the instances that both answered; medians over seeds (those that have an answer)."""

    first: str
    second: str
    instances: int
    ratio: float | None
    """Geometric mean of first's objective over second's; None where only one is 0, or nothing is shared.

    An instance where both are 0 counts as 1.
    """
    low: float | None
    high: float | None
    """95 % interval of the ratio, by BCa bootstrap over instances; None with fewer than two."""
    wins: int
    """Instances where first's median is the lesser by more than SAME."""
    ties: int
    losses: int


def paired(rows: Sequence[Row], first: str, second: str, seed: int = 0) -> Paired:
    """Of judged rows; `seed` is that of the resampling. A solver without rows shares no instance."""
    medians = _medians([row for row in rows if row.solver in (first, second)], [first, second])
    ours, theirs = medians[:, np.isfinite(medians).all(axis=0)]
    wins, losses = int(_is_less(ours, theirs).sum()), int(_is_less(theirs, ours).sum())
    logs = log_ratios(ours, theirs)
    ratio = low = high = None
    if len(logs) and np.isfinite(logs).all():
        ratio = float(np.exp(logs.mean()))
        low, high = interval(logs, seed)
    return Paired(first, second, len(ours), ratio, low, high, wins, len(ours) - wins - losses, losses)


def win_tie_loss(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[int, int, int]]:
    """(first, second) → instances that first wins, ties and loses, by medians over seeds; no answer loses to one.

    Of judged rows; without instances that neither answered, or that one of the two does not support.
    """
    solvers = list(dict.fromkeys(row.solver for row in rows))
    medians = _medians(rows, solvers)
    medians[_is_declined(rows, solvers)] = np.nan  # neither less nor more than any
    is_answered = np.isfinite(medians)
    is_asked = ~np.isnan(medians)
    table = {}
    for i, first in enumerate(solvers):
        wins = _is_less(medians[i], medians).sum(axis=1)
        losses = _is_less(medians, medians[i]).sum(axis=1)
        is_shared = is_asked[i] & is_asked & (is_answered[i] | is_answered)
        ties = is_shared.sum(axis=1) - wins - losses
        for k, second in enumerate(solvers):
            if k != i:
                table[first, second] = (int(wins[k]), int(ties[k]), int(losses[k]))
    return table


def _is_declined(rows: Sequence[Row], solvers: Sequence[str]) -> NDArray[np.bool_]:
    """(solvers, instances) whether the solver supports the instance in no seed; instances as in `_medians`."""
    outcomes: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        outcomes.setdefault((row.solver, row.testset, row.instance), set()).add(row.termination)
    instances = dict.fromkeys((row.testset, row.instance) for row in rows)
    declined = [outcomes.get((solver, *its)) == {Termination.UNSUPPORTED} for solver in solvers for its in instances]
    return np.array(declined, dtype=bool).reshape(len(solvers), len(instances))


def _medians(rows: Sequence[Row], solvers: Sequence[str]) -> NDArray[np.float64]:
    """(solvers, instances) median objective over the solves that have an answer; inf where none has."""
    grouped: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.objective is not None:
            grouped.setdefault((row.solver, row.testset, row.instance), []).append(row.objective)
    instances = {instance: i for i, instance in enumerate(dict.fromkeys((row.testset, row.instance) for row in rows))}
    place = {solver: i for i, solver in enumerate(solvers)}
    medians = np.full((len(solvers), len(instances)), np.inf)
    for (solver, testset, instance), objectives in grouped.items():
        medians[place[solver], instances[testset, instance]] = median(objectives)
    return medians


def _is_less(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where first is the lesser by more than SAME; inf is no answer."""
    scale = np.maximum(np.abs(np.where(np.isfinite(second), second, 0.0)), ZERO)
    return first < second - SAME * scale


def log_ratios(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """log(first / second) of figures ≥ 0: 0 where both are 0, ±inf where one is."""
    with np.errstate(divide="ignore"):
        above, below = (np.log(np.where(figures > ZERO, figures, 0.0)) for figures in (first, second))
    is_same = above == below
    return np.where(is_same, 0.0, above - np.where(is_same, 0.0, below))


def interval(logs: NDArray[np.float64], seed: int = 0, level: float = 0.95) -> tuple[float | None, float | None]:
    """Ends of the interval of exp(mean of logs), logs (instances,) finite, by the bias-corrected accelerated bootstrap.

    Efron and Tibshirani, *An Introduction to the Bootstrap*, 1993, section 14.3. None with fewer than two instances.
    """
    n = len(logs)
    if n < 2:
        return None, None
    # Sorted, so that the order of the rows does not matter.
    logs = np.sort(logs)
    mean, spread = logs.mean(), logs - logs.mean()
    if np.ptp(logs) <= 1e-12:
        return float(np.exp(mean)), float(np.exp(mean))
    drawn = logs[np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))].mean(axis=1)
    below = (np.sum(drawn < mean) + np.sum(drawn <= mean)) / 2
    bias = ndtri(np.clip(below, 0.5, RESAMPLES - 0.5) / RESAMPLES)
    # The jackknife means of a mean are mean − spread/(n−1), hence (14.15) with the powers of n − 1 cancelled.
    acceleration = np.sum(spread**3) / (6 * np.sum(spread**2) ** 1.5)
    z = bias + ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.exp(np.quantile(drawn, ndtr(bias + z / (1 - acceleration * z))))
    return float(low), float(high)
