"""`bench`: compares solvers on shared test sets."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repurpose_opt.cli.text import FAILED, PROGRAM, add_verb, aligned, gibibytes, positive, price, seconds
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.registry import check_importable

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from repurpose_opt.bench.row import Row
    from repurpose_opt.bench.runner import Limits, Progress
    from repurpose_opt.bench.testset import Settings

_GIB = 2**30
_FULL = {"time_limit": 10.0, "seeds": 5}
_GRACE = 5.0

_EPILOG = """\
examples:
  repurpose-opt bench list
  repurpose-opt bench run default --output bench-default
  repurpose-opt bench run lossless-random --solvers auto,metis,metis+local-search --seeds 5 --time-limit 10
  repurpose-opt bench run pricing --solvers compensated/group-omp,compensated/group-omp+swaps
  repurpose-opt bench run ./my-layers --executor dask://127.0.0.1:8786
  repurpose-opt bench report bench-default
  repurpose-opt bench compare bench-before bench-after"""

_RUN_EPILOG = """\
SET is a name of "bench list", or a folder of .npy, .npz, .safetensors, .mtx and .hgr files (with a separator in its
path: ./layers). A solver is PARTITIONER or PARTITIONER/PRUNER, each a name of "solvers" or several joined by +.

Each solve has a process of its own, which is ended, with all that it started, above the memory limit or so many
seconds after its time limit. Crashes, time-outs and wrong answers are rows. A run that was stopped goes on with the
same command; rows that are there are not solved again."""


def add(verbs: Any) -> None:
    bench = add_verb(verbs, "bench", "compare solvers on shared test sets", epilog=_EPILOG)
    actions = bench.add_subparsers(title="verbs", metavar="VERB", required=True)
    verb = add_verb(actions, "list", "list the test sets")
    verb.add_argument("--json", action="store_true", help="print a JSON list")
    verb.set_defaults(run=_list)
    _add_run(actions)
    verb = _add_of_folder(actions, "check", "recompute the figures of a run from its stored answers", _check)
    verb.add_argument("--json", action="store_true", help="print the differences as JSON")
    verb = _add_of_folder(actions, "report", "write report.md and report.html of a run", _report)
    verb.add_argument("--output", type=Path, metavar="DIR", help="where to; default: the folder of the run")
    verb.add_argument("--json", action="store_true", help="print the names of the files as JSON")
    verb = _add_of_folder(actions, "export", "write the rows of a run to a Parquet file", _export)
    verb.add_argument("file", type=Path, metavar="FILE.parquet", help="is replaced if it exists")
    verb = add_verb(actions, "compare", "find regressions between two runs; exit code 1 if there are any")
    verb.add_argument("old", type=Path, metavar="OLD", help="folder of the run before")
    verb.add_argument("new", type=Path, metavar="NEW", help="folder of the run after")
    verb.add_argument("--objective-tolerance", type=price, default=0.01, metavar="X", help="default: 0.01")
    verb.add_argument("--seconds-tolerance", type=price, default=0.25, metavar="X", help="default: 0.25")
    verb.add_argument("--json", action="store_true", help="print the comparison as JSON")
    verb.set_defaults(run=_compare)


def _add_of_folder(actions: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    verb = add_verb(actions, name, summary)
    verb.add_argument("folder", type=Path, metavar="DIR", help="the --output of a bench run")
    verb.set_defaults(run=run)
    return verb


def _add_run(actions: Any) -> None:
    verb = add_verb(actions, "run", "solve the instances of test sets with several solvers", epilog=_RUN_EPILOG)
    verb.add_argument("testsets", nargs="+", metavar="SET", help='a name of "bench list", or a folder: see below')
    verb.add_argument("--solvers", metavar="LIST", help="with commas; default: all that are installed")
    verb.add_argument("--only", default="*", metavar="PATTERN", help="instances by name, for instance 'random-n64*'")
    verb.add_argument("--seeds", type=positive, metavar="N", help="0 … N−1; default: the test set's, mostly 3")
    verb.add_argument(
        "--time-limit", type=seconds, metavar="S", help="of each solve; default: the test set's, mostly 1"
    )
    verb.add_argument("--full", action="store_true", help="10 s and 5 seeds, where nothing else is said")
    verb.add_argument(
        "--memory-limit", type=gibibytes, metavar="GIB", help="of each solve; default: the test set's, mostly 4"
    )
    verb.add_argument("--threads", type=positive, default=1, metavar="N", help="of each solve; default: 1")
    verb.add_argument("--jobs", type=positive, metavar="N", help="solves at a time; default: cores / threads")
    verb.add_argument(
        "--executor", metavar="ADDRESS", help="dask://HOST:PORT, or MODULE:FUNCTION that gives a concurrent.futures one"
    )
    verb.add_argument("--grace", type=price, default=_GRACE, metavar="S", help="to end a solve after; default: 5")
    verb.add_argument("--output", type=Path, metavar="DIR", help="default: bench-SET")
    verb.add_argument("--json", action="store_true", help="print a summary as JSON")
    verb.set_defaults(run=_run, usage_error=verb.error)


def _list(args: argparse.Namespace) -> int:
    from repurpose_opt.bench.testsets import load_all

    loaded, broken = load_all()
    listed: list[dict[str, Any]] = [
        {
            "name": found.name,
            "title": found.title,
            "description": found.description,
            "instances": len(found),
            "install": install,
            "error": None,
        }
        for found, install in loaded
    ]
    for name, error in broken.items():
        listed.append(dict.fromkeys(listed[0] if listed else ()) | {"name": name, "error": error})
    if args.json:
        print(json.dumps(listed, indent=2))
        return 0
    rows = [("NAME", "INSTANCES", "TITLE")]
    for entry in listed:
        title = f"to install: {entry['install']}" if entry["install"] else entry["title"]
        if entry["error"]:
            title = f"cannot be loaded: {entry['error']}"
        rows.append((entry["name"], str(entry.get("instances") or ""), title))
    print(aligned(rows))
    return 0


def _run(args: argparse.Namespace) -> int:
    from repurpose_opt.bench import plan, results
    from repurpose_opt.bench.runner import run
    from repurpose_opt.bench.testsets import canonical, test_set

    if args.jobs and args.executor:
        args.usage_error("--jobs is for this machine, --executor for others")
    solvers = plan.installed_solvers() if args.solvers is None else args.solvers.split(",")
    plan.check_solvers(solvers)
    testsets = {name: test_set(name) for name in dict.fromkeys(map(canonical, args.testsets))}
    if args.full:
        args.time_limit = args.time_limit or _FULL["time_limit"]
        args.seeds = args.seeds or _FULL["seeds"]
    tasks = plan.tasks(testsets, solvers, args.only, args.seeds, args.time_limit, args.threads)
    limits = {name: _limits(args, testset.settings) for name, testset in testsets.items()}
    folder = args.output or Path(f"bench-{Path(args.testsets[0]).resolve().name}")
    folder.mkdir(parents=True, exist_ok=True)
    described = plan.describe(_command(args), testsets, solvers, limits)
    with results.locked(folder):
        done = results.read_rows(folder) if (folder / results.ROWS).exists() else []
        if (folder / results.RUN).exists():
            described = plan.merged(results.read_run(folder), described)
        left = len(set(tasks) - {row.task for row in done})
        if left:
            results.write_run(folder, described)
        with _executor(args) as (executor, jobs), _progress(left) as progress:
            added = run(tasks, done, folder, executor, jobs, limits, progress)
    _say_summary(args, folder, [*done, *added], len(added))
    return 0


def _limits(args: argparse.Namespace, settings: Settings) -> Limits:
    from repurpose_opt.bench.runner import Limits

    memory_limit = settings.memory_limit if args.memory_limit is None else int(args.memory_limit * _GIB)
    return Limits(memory_limit, settings.relative_gap, args.grace)


def _command(args: argparse.Namespace) -> str:
    """The command as it can be given again, without what says where results go and how they are shown."""
    defaults = {"only": "*", "threads": 1, "grace": _GRACE}
    words = [PROGRAM, "bench", "run", *args.testsets]
    for name in ("solvers", "only", "seeds", "time_limit", "memory_limit", "threads", "jobs", "executor", "grace"):
        value = getattr(args, name)
        if value is not None and value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


@contextmanager
def _executor(args: argparse.Namespace) -> Iterator[tuple[Executor, int]]:
    import os

    from repurpose_opt.bench import executors

    if args.executor:
        with executors.named(args.executor) as (executor, jobs):
            yield executor, jobs
        return
    jobs = args.jobs or max(1, len(os.sched_getaffinity(0)) // args.threads)
    with executors.local(jobs) as executor:
        yield executor, jobs


@contextmanager
def _progress(left: int) -> Iterator[Progress]:
    """A bar with the time left, on a terminal."""
    check_importable("the progress bar", "rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda rows, seconds_left, last: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("", total=left, left="")

        def show(rows: int, seconds_left: float | None, last: str) -> None:
            told = "" if seconds_left is None else f"about {int(seconds_left) // 60}:{int(seconds_left) % 60:02d} left"
            bar.update(task, completed=rows, description=last, left=told)

        yield show


def _say_summary(args: argparse.Namespace, folder: Path, rows: Sequence[Row], added: int) -> None:
    from repurpose_opt.bench.statistics import judged, summaries

    found = summaries(judged(rows))
    if args.json:
        listed = [
            {
                "solver": each.solver,
                "solves": each.solves,
                "answered": each.answered,
                "unsupported": each.unsupported,
                "proved": each.proved,
                "failures": {str(kind): count for kind, count in each.failures.items()},
                "refused": each.refused,
                "gap_to_best": each.gap_to_best,
                "seconds": each.seconds,
            }
            for each in found
        ]
        print(json.dumps({"folder": str(folder), "rows": len(rows), "added": added, "solvers": listed}, indent=2))
        return
    table = [("SOLVER", "ANSWERED", "PROVED", "FAILED", "REFUSED", "GAP TO BEST", "SECONDS")]
    for each in found:
        table.append(
            (
                each.solver,
                f"{each.answered} of {each.solves}",
                str(each.proved),
                ", ".join(f"{count} {kind}" for kind, count in each.failures.items() if count) or "–",
                str(each.refused) if each.refused else "–",
                "–" if each.gap_to_best is None else f"{each.gap_to_best:.2%}",
                "–" if each.seconds is None else f"{each.seconds:.3g}",
            )
        )
    print(aligned(table))
    print(f"{len(rows)} rows in {folder} ({added} new); next: {PROGRAM} bench report {folder}")


def _check(args: argparse.Namespace) -> int:
    from repurpose_opt.bench import results
    from repurpose_opt.bench.check import check

    folder = results.check_folder(args.folder)
    rows = results.read_rows(folder)
    relative_gap = {entry["name"]: entry["limits"]["relative_gap"] for entry in results.read_run(folder)["testsets"]}
    if not (folder / results.ANSWERS).is_dir():
        raise InvalidArgument("DIR", f"{folder}, without its {results.ANSWERS}/", "a run with the answers to recompute")
    answered = sum(row.has_answer for row in rows)
    with _progress(answered) as progress:
        wrong = []
        for number, checked in enumerate(check(folder, rows, relative_gap), 1):
            progress(number, None, checked.row.instance)
            if checked.differences:
                wrong.append(checked)
    if args.json:
        listed = [
            {"instance": found.row.instance, "solver": found.row.solver, "seed": found.row.seed, "column": column,
             "stored": stored, "recomputed": now}
            for found in wrong
            for column, stored, now in found.differences
        ]  # fmt: skip
        print(json.dumps({"rows": len(rows), "answers": answered, "differences": listed}, indent=2))
    else:
        for found in wrong:
            for column, stored, now in found.differences:
                row = found.row
                print(f"{row.instance}, {row.solver}, seed {row.seed}: {column} {stored}, recomputed {now}")
        print(f"{answered} answers of {len(rows)} rows recomputed, {len(wrong)} differ")
    return FAILED if wrong else 0


def _export(args: argparse.Namespace) -> int:
    from repurpose_opt.bench import results

    if args.file.suffix != ".parquet":
        raise InvalidArgument("FILE", args.file.name, "a name that ends in .parquet")
    folder = results.check_folder(args.folder)
    rows = results.read_rows(folder)
    results.write_parquet(args.file, rows, results.read_run(folder))
    print(f"{len(rows)} rows in {args.file}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from repurpose_opt.bench import results
    from repurpose_opt.bench.report import write_report
    from repurpose_opt.bench.stored import BestAnswers

    folder = results.check_folder(args.folder)
    rows = results.read_rows(folder)
    answers = BestAnswers(folder, rows)
    written = write_report(args.output or folder, rows, results.read_run(folder), problem_and_owner=answers)
    for instance, reason in list(answers.missing.items())[:1]:
        rest = f" and of {len(answers.missing) - 1} more" if len(answers.missing) > 1 else ""
        print(f"{PROGRAM}: note: no picture of {instance}{rest}: {reason}", file=sys.stderr)
    if args.json:
        print(json.dumps([str(path) for path in written], indent=2))
    else:
        print("\n".join(map(str, written)))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from repurpose_opt.bench import plan, results
    from repurpose_opt.bench.compare import compare
    from repurpose_opt.cli.compare_text import rendered

    old, new = (results.read_rows(results.check_folder(folder)) for folder in (args.old, args.new))
    comparison = compare(
        old, new, objective_tolerance=args.objective_tolerance, seconds_tolerance=args.seconds_tolerance
    )
    if not any(solver.tasks for solver in comparison.solvers):
        raise InvalidArgument("NEW", f"{args.new}, which shares no task with {args.old}", "a run of the same tasks")
    for what, before, now in plan.differences(results.read_run(args.old), results.read_run(args.new)):
        print(f"{PROGRAM}: note: {what} was {before}, and is {now}: seconds may differ by that alone", file=sys.stderr)
    if args.json:
        told = asdict(comparison)
        for entry, solver in zip(told["solvers"], comparison.solvers, strict=True):
            entry |= {"regressed": solver.regressed, "reasons": solver.reasons}
        print(json.dumps(_finite({"regressed": comparison.regressed, **told}), indent=2))
    else:
        print(rendered(comparison))
    return FAILED if comparison.regressed else 0


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
