"""What a run is to do: the tasks of test sets and solvers, and the run.json that describes them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from repurpose_opt import registry
from repurpose_opt.bench.environment import distributions_of, environment, package_version
from repurpose_opt.bench.results import ResultsError
from repurpose_opt.bench.row import SCHEMA, Task
from repurpose_opt.bench.runner import Limits
from repurpose_opt.bench.testset import TestSet
from repurpose_opt.errors import InvalidArgument

_PLACES_FOR_PRUNERS = "compensated"
"""The partitioner by which pruners are compared."""


def tasks(
    testsets: Mapping[str, TestSet],
    solvers: Sequence[str],
    only: str,
    seeds: int | None,
    time_limit: float | None,
    threads: int,
) -> list[Task]:
    """Every solver on every instance whose name matches `only`, instance by instance.

    Seeds and time limit None are those of the test set. Raises InvalidArgument where no instance matches.
    """
    found = [
        Task(
            name,
            instance.name,
            solver,
            seed,
            testset.settings.time_limit if time_limit is None else time_limit,
            threads,
        )
        for name, testset in testsets.items()
        for instance in testset
        if fnmatch.fnmatch(instance.name, only)
        for seed in range(testset.settings.seeds if seeds is None else seeds)
        for solver in solvers
    ]
    if not found:
        raise InvalidArgument("--only", repr(only), f"a pattern that an instance of {', '.join(testsets)} matches")
    return found


def installed_solvers() -> list[str]:
    """`auto`, every partitioner that can run here, and every pruner, each with the same partitioner."""
    partitioners = [found.name for found in registry.registered("partitioners") if found.installed]
    pruners = [found.name for found in registry.registered("pruners") if found.installed]
    with_pruners = [f"{_PLACES_FOR_PRUNERS}/{name}" for name in pruners if _PLACES_FOR_PRUNERS in partitioners]
    return ["auto", *partitioners, *with_pruners]


def check_solvers(solvers: Sequence[str]) -> None:
    """Raises UnknownSolver, SolverNotInstalled, or InvalidArgument for one that is named twice."""
    for solver in solvers:
        if solvers.count(solver) > 1:
            raise InvalidArgument("--solvers", f"{solver!r} twice", "each once")
        _check_form(solver)
        for kind, name in _stages(solver):
            registry.load(kind, name)


def describe(
    command: str, testsets: Mapping[str, TestSet], solvers: Sequence[str], limits: Mapping[str, Limits]
) -> dict[str, Any]:
    """Contents of run.json."""
    described = environment()
    session = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": described.pop("commit"),
        "uncommitted_changes": described.pop("uncommitted_changes"),
    }
    return {
        "schema": SCHEMA,
        "sessions": [session],
        "testsets": [
            {
                "name": name,
                "title": testset.title,
                "description": testset.description,
                "instances": len(testset),
                "settings": asdict(testset.settings),
                "limits": asdict(limits[name]),
            }
            for name, testset in testsets.items()
        ],
        "solvers": {solver: _solver(solver) for solver in solvers},
        "environment": described,
    }


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """run.json of a run that is taken up again, with more test sets or solvers perhaps.

    Raises ResultsError where rows of the two could not be compared: another commit, other versions, another machine,
    other limits.
    """
    _check_same("commit", before["sessions"][-1].get("commit"), now["sessions"][0]["commit"])
    for what, then, here in differences(before, now):
        _check_same(what, then, here)
    limits = {entry["name"]: entry["limits"] for entry in before["testsets"]}
    for entry in now["testsets"]:
        for key, limit in entry["limits"].items():
            _check_same(f"{key} of {entry['name']}", limits.get(entry["name"], entry["limits"]).get(key), limit)
    testsets = {entry["name"]: entry for entry in (*before["testsets"], *now["testsets"])}
    return {
        **now,
        "sessions": [*before["sessions"], *now["sessions"]],
        "testsets": list(testsets.values()),
        "solvers": {**before["solvers"], **now["solvers"]},
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(what, before, now) of machine and versions in which two runs differ."""
    for key in sorted(set(old["environment"]) | set(new["environment"])):
        before, now = old["environment"].get(key), new["environment"].get(key)
        if before != now:
            yield key, before, now
    for solver in sorted(set(old["solvers"]) & set(new["solvers"])):
        for package, now in new["solvers"][solver]["versions"].items():
            before = old["solvers"][solver]["versions"].get(package)
            if before != now:
                yield f"{package} of {solver}", before, now


def _check_same(what: str, before: Any, now: Any) -> None:
    if before != now:
        raise ResultsError(f"the run in the folder had {what} {before}, this one has {now}: choose another --output")


def _check_form(solver: str) -> None:
    partitioner, slash, pruner = solver.partition("/")
    stages = [*partitioner.split("+"), *(pruner.split("+") if slash else ())]
    for stage in stages:
        name, at, share = stage.partition("@")
        if not name or (at and not _is_share(share)):
            raise InvalidArgument("--solvers", repr(solver), "PARTITIONER or PARTITIONER/PRUNER, chains joined by +")


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False


def _stages(solver: str) -> Iterator[tuple[str, str]]:
    """(kind, name) of all that a solver is made of; what "auto" stands for depends on the problem."""
    partitioner, _, pruner = solver.partition("/")
    for kind, chain in (("partitioners", partitioner), ("pruners", pruner)):
        for stage in filter(None, chain.split("+")):
            if (name := stage.partition("@")[0]) != "auto":
                yield kind, name


def _solver(solver: str) -> dict[str, Any]:
    """What the report says of a solver: its one line, and the versions of what it is made of."""
    stages = [registry.load(kind, name) for kind, name in _stages(solver)]
    summary = (stages[-1].__doc__ or "").strip().split("\n")[0] if stages else "What `repurpose_opt.auto` chooses."
    versions = {}
    for stage in stages:
        for module in (stage.__module__, *stage.requires):
            for distribution in distributions_of(module):
                versions[distribution] = package_version(distribution)
    return {"summary": summary, "versions": versions}
