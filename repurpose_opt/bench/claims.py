"""What the rows of an instance tell of it together, and which of their claims that refutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.solver import Termination

SAME = 1e-6
"""Relative difference of objectives, or of an objective and a bound, that counts as none."""
ZERO = 1e-12
"""Objectives up to this are 0, and relative differences are of at least this, as in `Row.gap`."""
AS_GOOD = 0.01
"""Gap to the least known objective, relative to the larger, up to which an answer is about as good."""


@dataclass(frozen=True)
class Known:
    """What all rows of an instance tell of it together."""

    objective: float | None
    """Least verified objective; None if no solve has one."""
    bound: float | None
    """Highest bound that no verified objective refutes."""
    direct_volume: int | None
    is_proved: bool
    """Objective and bound agree within SAME."""


def is_at_most(figure: float, objective: float) -> bool:
    """Whether a bound, or an objective, is at most this objective, within SAME."""
    return figure <= objective + SAME * max(abs(objective), ZERO)


def is_proved(row: Row) -> bool:
    """Whether the row's own bound proves its answer: `optimal` (within the gap asked for), or equal within SAME."""
    return row.termination == Termination.OPTIMAL or (row.gap is not None and row.gap <= SAME)


def judged(rows: Sequence[Row]) -> list[Row]:
    """The rows with claims refused that other rows refute: bounds above, and `infeasible` beside, a valid answer.

    A bound refuted is None, `optimal` by it becomes `heuristic`, `infeasible` becomes the failure `invalid`; `refused`
    says what was found. Only rows of the same fingerprint judge each other. Judging twice changes nothing.
    """
    least: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row.testset, row.instance, row.fingerprint)
        if row.objective is not None and (key not in least or row.objective < _objective(least[key])):
            least[key] = row
    return [_judged_by(row, least.get((row.testset, row.instance, row.fingerprint))) for row in rows]


def _judged_by(row: Row, least: Row | None) -> Row:
    """The row beside the row of its instance that has the least objective."""
    if least is None:
        return row
    objective = _objective(least)
    if row.termination == Termination.INFEASIBLE:
        refused = (*row.refused, f"infeasible, but {least.solver} has an answer of objective {objective:.9g}")
        return replace(row, termination=Termination.ERROR.value, failure=Failure.INVALID, refused=refused)
    if row.bound is None or is_at_most(row.bound, objective):
        return row
    termination = row.termination
    if termination == Termination.OPTIMAL:
        termination = Termination.HEURISTIC.value
    refused = (*row.refused, f"bound {row.bound:.9g} above the objective {objective:.9g} of {least.solver}")
    return replace(row, termination=termination, bound=None, refused=refused)


def known(rows: Sequence[Row]) -> dict[tuple[str, str], Known]:
    """By (testset, instance), of judged rows; InvalidArgument if the rows of an instance have two fingerprints."""
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.testset, row.instance), []).append(row)
    for (testset, instance), group in grouped.items():
        fingerprints = {row.fingerprint for row in group} - {""}
        if len(fingerprints) > 1:
            got = f"{len(fingerprints)} fingerprints of {instance} of {testset}"
            raise InvalidArgument("rows", got, "one for each instance: the problem changed between solves")
    return {instance: _known(group) for instance, group in grouped.items()}


def _known(group: Sequence[Row]) -> Known:
    objective = min((row.objective for row in group if row.objective is not None), default=None)
    bounds = [row.bound for row in group if row.bound is not None]
    if objective is not None:
        bounds = [bound for bound in bounds if is_at_most(bound, objective)]
    bound = max(bounds, default=None)
    return Known(
        objective,
        bound,
        next((row.direct_volume for row in group if row.direct_volume is not None), None),
        objective is not None and bound is not None and objective - bound <= SAME * max(abs(objective), ZERO),
    )


def _objective(row: Row) -> float:
    assert row.objective is not None
    return row.objective
