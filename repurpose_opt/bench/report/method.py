"""How things were measured, with what, and what the figures do not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from statistics import median
from typing import Any

from repurpose_opt.bench.report.document import EMPTY, Block, Bullets, Cell, Column, Command, Facts, Paragraph, Table
from repurpose_opt.bench.report.grouped import Grouped
from repurpose_opt.bench.report.solvers import imputations
from repurpose_opt.bench.report.text import counted, listed, memory, significant
from repurpose_opt.bench.row import Row
from repurpose_opt.bench.statistics import SAME, SHIFT_SECONDS

_MACHINE = ("machine", "processor", "memory_gib", "cores", "system", "python")
LIMITATIONS = (
    "Seconds of backends that run native code in a child process include the start of that process and the copy of "
    "the problem.",
    "Incumbents over time are what backends claim while they run; only the last of each solve is recomputed.",
    "A bound is its backend's claim. One that a verified objective refutes, of whichever solver, is dropped and listed "
    "as refused; one that nobody refutes is believed.",
    "The best known objective is the best of this run, not a proved optimum, unless an instance is called proved.",
    "Other work on the machine shows in the seconds: compare ratios and profiles rather than single times.",
    "Peak memory is without libraries and files, and sampled where a solve has several processes: a short peak between "
    "two samples is missed.",
    "A solve has one thread unless the command says otherwise; nothing here says how backends scale over cores.",
    "A gap on calibration moments says nothing of unseen data.",
)


def lead(rows: Sequence[Row], run: Mapping[str, Any]) -> str:
    """What was run, in one sentence."""
    if not rows:
        return "No solve was recorded."
    solvers, seeds = len({row.solver for row in rows}), len({row.seed for row in rows})
    instances = len({(row.testset, row.instance) for row in rows})
    testsets = listed(list(dict.fromkeys(row.testset for row in rows)), 4)
    environment = run.get("environment", {})
    cores = counted(environment["cores"], "core") if "cores" in environment else None
    machine = ", ".join(text for text in (environment.get("machine"), cores, environment.get("system")) if text)
    return (
        f"{counted(len(rows), 'solve')}: {counted(solvers, 'solver')} on {counted(instances, 'instance')} of "
        f"{testsets}, {_range({row.time_limit for row in rows})} s a solve, {counted(seeds, 'seed')}"
        f"{f'; {machine}' if machine else ''}."
    )


def blocks(grouped: Grouped, run: Mapping[str, Any]) -> tuple[Block, ...]:
    made: list[Block] = [Bullets(_rules(grouped))]
    for session in run.get("sessions", ()):
        commit = f"commit {str(session.get('commit') or 'unknown')[:12]}"
        changed = ", with uncommitted changes" if session.get("uncommitted_changes") else ""
        made += [
            Paragraph(f"Run on {session.get('started')}, {commit}{changed}:"),
            Command(str(session.get("command"))),
        ]
    environment = run.get("environment", {})
    facts = [(name, _fact(environment[name])) for name in _MACHINE if name in environment]
    packages = [
        f"{name} {version}" for name, version in sorted(environment.items()) if name not in _MACHINE and version
    ]
    if packages:
        facts.append(("packages", ", ".join(packages)))
    if facts:
        made.append(Facts(tuple(facts)))
    made += _testsets(run)
    made += _solvers(run)
    return tuple(made)


def _rules(grouped: Grouped) -> tuple[str, ...]:
    rows = grouped.rows
    rules = [
        "Objective, volume and feasibility are recomputed from the owners and the exchange of each answer; a backend's "
        "own figures are claims, and what does not hold is refused and listed.",
        f"Objectives within a relative {SAME:g} are the same. Proved optimal: the solve's own valid bound is within "
        "that, or within the tolerance of its test set; a heuristic is never called optimal.",
        f"Means of seconds are geometric, shifted by {SHIFT_SECONDS:g} s; {imputations(grouped.summaries)}. "
        "Unsupported solves are left out of a solver's own figures.",
        "Gaps are means over solves; one without an answer counts as 100 %. Medians are over seeds.",
    ]
    if rows:
        rules.append(_limits(rows))
    overheads = [row.overhead for row in rows if row.overhead is not None]
    if overheads:
        rules.append(f"The runner took {significant(median(overheads), 2)} s beside a solve (median).")
    return tuple(rules)


def _limits(rows: Sequence[Row]) -> str:
    seconds, threads = (_range({getattr(row, name) for row in rows}) for name in ("time_limit", "threads"))
    memories = " to ".join(dict.fromkeys(memory(of({row.memory_limit for row in rows})) for of in (min, max)))
    return (
        f"Each solve ran in a process of its own, with {seconds} s, {memories} of memory and threads: {threads}, and "
        "was ended beyond them. Seconds are wall time without imports and runner."
    )


def _range(values: Set[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:g}" for value in (min(values), max(values))))


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return EMPTY if value is None else str(value)


def _setting(name: str, value: Any) -> str:
    """`memory limit 4 GiB`."""
    printed = {"memory_limit": memory, "time_limit": lambda seconds: f"{seconds:g} s"}.get(name, _fact)
    return f"{name.replace('_', ' ')} {printed(value)}"


def _testsets(run: Mapping[str, Any]) -> list[Block]:
    columns = (
        Column("Test set", is_number=False),
        Column("What it holds", is_number=False),
        Column("Settings unless the command says otherwise", is_number=False),
    )
    lines = []
    for testset in run.get("testsets", ()):
        what = ": ".join(text for text in (testset.get("title", ""), testset.get("description", "")) if text)
        settings = ", ".join(_setting(*item) for item in testset.get("settings", {}).items())
        lines.append((Cell(testset["name"]), Cell(what or EMPTY), Cell(settings or EMPTY)))
    return [Table("Test sets", columns, tuple(lines), is_sortable=False)] if lines else []


def _solvers(run: Mapping[str, Any]) -> list[Block]:
    columns = (
        Column("Solver", is_number=False),
        Column("What it is", is_number=False),
        Column("Versions", is_number=False),
    )
    lines = []
    for name, solver in run.get("solvers", {}).items():
        versions = ", ".join(f"{package} {version}" for package, version in solver.get("versions", {}).items())
        lines.append((Cell(name), Cell(solver.get("summary") or EMPTY), Cell(versions or EMPTY)))
    return [Table("Solvers", columns, tuple(lines), is_sortable=False)] if lines else []
