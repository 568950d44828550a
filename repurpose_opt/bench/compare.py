"""Two runs of the same tasks: what became better or worse, solver by solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.bench.claims import SAME, is_proved, judged
from repurpose_opt.bench.pairs import interval, log_ratios
from repurpose_opt.bench.row import Row, Task
from repurpose_opt.bench.summary import SHIFT_SECONDS
from repurpose_opt.errors import InvalidArgument

Pair = tuple[Row, Row]
"""The old and the new row of a task."""


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of new / old over instances, each the geometric mean over its tasks that both runs answered."""

    mean: float | None
    """None if there is no such instance."""
    low: float | None
    high: float | None
    """95 % interval by BCa bootstrap over instances (`pairs.interval`); None with fewer than two."""
    instances: int

    def is_worse(self, tolerance: float) -> bool:
        """Whether the mean is above 1 + tolerance and the interval, where there is one, above 1."""
        return self.mean is not None and self.mean > 1 + tolerance and (self.low is None or self.low > 1)


@dataclass(frozen=True)
class Change:
    """A task whose outcome is worse than before, and how."""

    task: Task
    old: str
    new: str


@dataclass(frozen=True)
class Worse:
    """An instance whose objective rose."""

    testset: str
    instance: str
    ratio: float
    """Geometric mean of new / old over the tasks that both runs answered; inf where an objective of 0 rose."""


@dataclass(frozen=True)
class SolverComparison:
    """A solver in two runs."""

    solver: str
    tasks: int
    """In both runs, and compared."""
    changed: int
    """In both runs, but not comparable: the fingerprint of the instance differs."""
    only_old: int
    only_new: int
    objective: Ratio
    """Without tasks where one objective is 0 and the other is not: these are counted below."""
    risen_from_zero: int
    fallen_to_zero: int
    seconds: Ratio
    """Of (new + SHIFT_SECONDS) / (old + SHIFT_SECONDS), so that short times weigh little."""
    new_failures: tuple[Change, ...]
    lost_answers: tuple[Change, ...]
    """Without failing: `unsupported` now, or an `infeasible` that nothing refutes."""
    lost_proofs: tuple[Change, ...]
    """Answered still."""
    new_refused: tuple[Change, ...]
    """No claim was refused before."""
    worst: tuple[Worse, ...]
    """The instances with the largest ratios of objectives above 1, worst first."""
    reasons: tuple[str, ...]
    """Why it counts as regressed; empty if it does not."""

    @property
    def regressed(self) -> bool:
        return bool(self.reasons)


@dataclass(frozen=True)
class Comparison:
    """Two runs, and the tolerances that they were compared with."""

    solvers: tuple[SolverComparison, ...]
    """In the order of their first rows, old before new."""
    objective_tolerance: float
    seconds_tolerance: float

    @property
    def regressed(self) -> bool:
        return any(solver.regressed for solver in self.solvers)


def compare(
    old: Sequence[Row],
    new: Sequence[Row],
    *,
    objective_tolerance: float = 0.01,
    seconds_tolerance: float = 0.25,
    worst: int = 5,
    seed: int = 0,
) -> Comparison:
    """Per solver, on the tasks that both runs have: the same but for its fingerprint is counted as changed.

    A solver regressed if its objectives or seconds are worse by more than the tolerance (`Ratio.is_worse`), if an
    objective of 0 rose, with any new failure, lost answer or newly refused claim, and if an instance that it proved in
    all seeds lost a proof. The rows of both runs judge each other's claims. `worst`: most instances to list; `seed`:
    of the resampling.
    """
    for name, tolerance in (("objective_tolerance", objective_tolerance), ("seconds_tolerance", seconds_tolerance)):
        if not tolerance >= 0:
            raise InvalidArgument(name, tolerance, "a number ≥ 0")
    rows = judged([*old, *new])
    before = {row.task: row for row in rows[: len(old)]}
    after = {row.task: row for row in rows[len(old) :]}
    pairs: dict[str, list[Pair]] = {row.solver: [] for row in rows}
    only_old, only_new, changed = (dict.fromkeys(pairs, 0) for _ in range(3))
    for task, row in before.items():
        if task not in after:
            only_old[task.solver] += 1
        elif _is_changed(row, after[task]):
            changed[task.solver] += 1
        else:
            pairs[task.solver].append((row, after[task]))
    for task in after.keys() - before.keys():
        only_new[task.solver] += 1
    tolerances = (objective_tolerance, seconds_tolerance)
    solvers = (
        _compared(solver, shared, (changed[solver], only_old[solver], only_new[solver]), tolerances, worst, seed)
        for solver, shared in pairs.items()
    )
    return Comparison(tuple(solvers), *tolerances)


def _is_changed(old: Row, new: Row) -> bool:
    """Whether the instance is another one; a fingerprint is empty where it could not be built, which is a failure."""
    return bool(old.fingerprint and new.fingerprint) and old.fingerprint != new.fingerprint


def _compared(
    solver: str,
    pairs: Sequence[Pair],
    elsewhere: tuple[int, int, int],
    tolerances: tuple[float, float],
    worst: int,
    seed: int,
) -> SolverComparison:
    answered = [(old, new) for old, new in pairs if old.objective is not None and new.objective is not None]
    objectives = np.array([(old.objective, new.objective) for old, new in answered], dtype=float).reshape(-1, 2)
    logs = log_ratios(objectives[:, 1], objectives[:, 0])
    finite = np.isfinite(logs)
    timed = [(old, new) for old, new in answered if old.seconds is not None and new.seconds is not None]
    seconds = np.array([(old.seconds, new.seconds) for old, new in timed], dtype=float).reshape(-1, 2) + SHIFT_SECONDS
    objective_ratio = _ratio([pair for pair, taken in zip(answered, finite, strict=True) if taken], logs[finite], seed)
    seconds_ratio = _ratio(timed, np.log(seconds[:, 1] / seconds[:, 0]), seed)
    risen = int(np.sum(logs == np.inf))
    failures = _changes(pairs, lambda old, new: old.failure is None and new.failure is not None, _outcome)
    answers = _changes(pairs, _loses_answer, _outcome)
    proofs = _changes(
        pairs, lambda old, new: is_proved(old) and new.objective is not None and not is_proved(new), _proof
    )
    refused = _changes(pairs, lambda old, new: bool(new.refused) and not old.refused, _refused)
    uncertain = {replace(old.task, seed=0) for old, _ in pairs if not is_proved(old)}
    sure = sum(replace(change.task, seed=0) not in uncertain for change in proofs)
    found = {
        "objective": objective_ratio.is_worse(tolerances[0]),
        f"{risen} objectives rose from 0": risen,
        "seconds": seconds_ratio.is_worse(tolerances[1]),
        f"{len(failures)} new failures": failures,
        f"{len(answers)} lost answers": answers,
        f"{sure} lost proofs of instances proved in all seeds": sure,
        f"{len(refused)} newly refused claims": refused,
    }
    return SolverComparison(
        solver,
        len(pairs),
        *elsewhere,
        objective_ratio,
        risen,
        int(np.sum(logs == -np.inf)),
        seconds_ratio,
        failures,
        answers,
        proofs,
        refused,
        _worst(answered, logs, worst),
        tuple(reason for reason, holds in found.items() if holds),
    )


def _instance(row: Row) -> tuple[str, str]:
    return row.testset, row.instance


def _by_instance(pairs: Sequence[Pair], logs: NDArray[np.float64]) -> dict[tuple[str, str], float]:
    """Mean of the logs (pairs,) of each instance."""
    grouped: dict[tuple[str, str], list[float]] = {}
    for (old, _), log in zip(pairs, logs.tolist(), strict=True):
        grouped.setdefault(_instance(old), []).append(log)
    return {instance: sum(found) / len(found) for instance, found in grouped.items()}


def _ratio(pairs: Sequence[Pair], logs: NDArray[np.float64], seed: int) -> Ratio:
    means = np.array(list(_by_instance(pairs, logs).values()))
    if not len(means):
        return Ratio(None, None, None, 0)
    return Ratio(float(np.exp(means.mean())), *interval(means, seed), len(means))


def _worst(pairs: Sequence[Pair], logs: NDArray[np.float64], most: int) -> tuple[Worse, ...]:
    # A fall to 0 in one seed must not hide a rise in another: it counts as no change here.
    means = _by_instance(pairs, np.where(logs == -np.inf, 0.0, logs))
    ranked = sorted((-log, instance) for instance, log in means.items() if log > SAME)
    return tuple(Worse(*instance, float(np.exp(-log))) for log, instance in ranked[:most])


def _changes(
    pairs: Sequence[Pair], is_worse: Callable[[Row, Row], bool], shown: Callable[[Row], str]
) -> tuple[Change, ...]:
    return tuple(Change(old.task, shown(old), shown(new)) for old, new in pairs if is_worse(old, new))


def _loses_answer(old: Row, new: Row) -> bool:
    return old.objective is not None and new.objective is None and new.failure is None


def _outcome(row: Row) -> str:
    outcome = str(row.failure or row.termination)
    return f"{outcome} ({row.message})" if row.failure is not None and row.message else outcome


def _proof(row: Row) -> str:
    return f"objective {row.objective:.6g}, bound {'none' if row.bound is None else f'{row.bound:.6g}'}"


def _refused(row: Row) -> str:
    return "; ".join(row.refused) or "none refused"
