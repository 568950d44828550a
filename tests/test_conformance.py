"""Every registered backend and formulation through the public checks of `repurpose_opt.testing`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from repurpose_opt import registry, testing
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Termination

Check = Callable[[], str | None]

PARTITIONERS = [entry.name for entry in registry.registered("partitioners") if entry.installed]
PRUNERS = [entry.name for entry in registry.registered("pruners") if entry.installed]


def cases(kind: str, names: list[str]) -> Iterator[object]:
    checks = testing.partitioner_checks if kind == "partitioners" else testing.pruner_checks
    for backend in names:
        for name, check in checks(registry.load(kind, backend)()):
            yield pytest.param(check, id=f"{backend}-{name}")


def formulation_cases() -> Iterator[object]:
    for label, formulation in testing.standard_formulations().items():
        for name, check in testing.formulation_checks(formulation):
            yield pytest.param(check, id=f"{label}-{name}")


def run(check: Check) -> None:
    declined = check()
    if declined is not None:
        pytest.skip(declined)


@pytest.mark.parametrize("check", cases("partitioners", PARTITIONERS))
def test_partitioner(check: Check) -> None:
    run(check)


@pytest.mark.parametrize("check", cases("pruners", PRUNERS))
def test_pruner(check: Check) -> None:
    run(check)


@pytest.mark.parametrize("check", formulation_cases())
def test_formulation(check: Check) -> None:
    run(check)
