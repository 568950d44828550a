"""A comparison of two runs as plain text for terminals and logs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from repurpose_opt.bench.compare import Change, Comparison, Ratio, SolverComparison
from repurpose_opt.cli.text import aligned

HEADER = ("SOLVER", "TASKS", "OBJECTIVE", "SECONDS", "FAILURES", "ANSWERS", "PROOFS", "REFUSED", "VERDICT")


def rendered(comparison: Comparison, most: int = 5) -> str:
    """Aligned text: a table of all solvers, what was not compared, and for each solver what became worse.

    Of each kind of change at most `most` are listed; how many more there are is said.
    """
    table = aligned([HEADER, *(_line(solver) for solver in comparison.solvers)])
    explained = [
        "",
        "Objective and seconds: geometric mean of new / old with 95 % interval over instances. Others: new failures,",
        "lost answers, lost proofs and newly refused claims.",
    ]
    details = [line for solver in comparison.solvers for line in _details(solver, most)]
    return "\n".join([_verdict(comparison), "", table, *explained, *details])


def _verdict(comparison: Comparison) -> str:
    regressed = sum(solver.regressed for solver in comparison.solvers)
    tolerances = f"objective {comparison.objective_tolerance:.3g}, seconds {comparison.seconds_tolerance:.3g}"
    return f"{regressed} of {len(comparison.solvers)} solvers regressed (tolerances: {tolerances})"


def _line(solver: SolverComparison) -> tuple[str, ...]:
    changes = (solver.new_failures, solver.lost_answers, solver.lost_proofs, solver.new_refused)
    verdict = "regressed" if solver.regressed else "ok" if solver.tasks else "not compared"
    ratios = (_shown(solver.objective), _shown(solver.seconds))
    return (solver.solver, str(solver.tasks), *ratios, *(str(len(found)) for found in changes), verdict)


def _shown(ratio: Ratio) -> str:
    if ratio.mean is None:
        return "–"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.4f}"
    return f"{ratio.mean:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"


def _details(solver: SolverComparison, most: int) -> Iterator[str]:
    """What the table does not say of a solver; nothing if there is no more to say."""
    kinds = {
        "new failures": solver.new_failures,
        "lost answers": solver.lost_answers,
        "lost proofs": solver.lost_proofs,
        "newly refused claims": solver.new_refused,
    }
    found = [*_notes(solver), *(line for kind, changes in kinds.items() for line in _listed(kind, changes, most))]
    if solver.worst:
        found.append("worst objectives, new / old:")
        found += [f"  {its.ratio:.4f}  {its.testset} {its.instance}" for its in solver.worst]
    if found:
        yield from ("", solver.solver, *(f"  {line}" for line in found))


def _notes(solver: SolverComparison) -> Iterator[str]:
    if solver.reasons:
        yield f"regressed: {', '.join(solver.reasons)}"
    counts = {
        "only in the old run": solver.only_old,
        "only in the new run": solver.only_new,
        "not comparable, as the instance changed": solver.changed,
        "with an objective that fell to 0": solver.fallen_to_zero,
    }
    for what, count in counts.items():
        if count:
            yield f"tasks {what}: {count}"


def _listed(kind: str, changes: Sequence[Change], most: int) -> Iterator[str]:
    if not changes:
        return
    yield f"{kind}:"
    for change in changes[:most]:
        task = change.task
        yield f"  {task.testset} {task.instance}, seed {task.seed}, {task.time_limit:g} s: {change.old} → {change.new}"
    if len(changes) > most:
        yield f"  and {len(changes) - most} more"
