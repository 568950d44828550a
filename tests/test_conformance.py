"""Every registered backend and formulation through the public checks of `repurpose_opt.testing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from repurpose_opt import Termination, registry, testing
from repurpose_opt.solve import solve_problem

Check = Callable[[], str | None]

PARTITIONERS = [entry.name for entry in registry.registered("partitioners") if entry.installed]
PRUNERS = [entry.name for entry in registry.registered("pruners") if entry.installed]
FORMULATIONS = testing.standard_formulations()


MIP = ("mip", "mip:cp-sat", "mip:highs", "mip:scip")
ADDITIVE = {"edge", "volume-price", "lossless"}


VOLUMES = {label for label in FORMULATIONS if label.startswith("volume")}
TOTAL_VOLUMES = {label for label in VOLUMES if "busiest" not in label}
LOSSLESS_CODES = {"lossless-codes"}
CODES = {label for label in FORMULATIONS if label.startswith(("codes", "mixed"))}


# A check that is declined proves nothing: what each backend must serve, and where it must prove its answer.
SERVES = {
    "contiguous": set(FORMULATIONS),
    "random": set(FORMULATIONS),
    "brute-force": set(FORMULATIONS) - {"mixed-price", "lossless-codes"},
    "munkres": set(FORMULATIONS),
    "flow": set(FORMULATIONS),
    "metis": set(FORMULATIONS) - LOSSLESS_CODES,
    "alternate": set(FORMULATIONS),
    "compensated": VOLUMES | CODES,
    "generalised": set(FORMULATIONS),
    "local-search": set(FORMULATIONS)
    - CODES
    - LOSSLESS_CODES
    - {"edge-busiest", "volume-busiest-price", "volume-busiest-budget"},
    "mt-kahypar": {"lossless"},
    **{name: ADDITIVE | {"lossless-busiest", "volume-budget", "volume-bytes"} for name in MIP},
    "mip-lns": ADDITIVE,
}
PROVES = {
    "brute-force": set(FORMULATIONS) - {"mixed-price", "lossless-codes"},
    "munkres": {"edge"},
    "flow": {"edge"},
    "generalised": {"edge"},
    **{name: {"edge", "lossless", "lossless-busiest"} for name in MIP},
    "mip-lns": {"edge"},
}
PRUNER_SERVES = {
    "threshold": set(FORMULATIONS),
    "code-greedy": CODES,
    "code-descent": CODES,
    "nuclear-norm": CODES - {"mixed-price"},
    "nuclear-norm-fast": CODES - {"mixed-price"},
    "group-omp": VOLUMES,
    "group-lasso": TOTAL_VOLUMES,
    "group-lasso:clarabel": TOTAL_VOLUMES,
    "group-lasso:scs": TOTAL_VOLUMES,
    "group-lasso-fast": TOTAL_VOLUMES,
    "group-obs": TOTAL_VOLUMES,
    "group-l0": TOTAL_VOLUMES,
    "swaps": TOTAL_VOLUMES,
    "tabu": TOTAL_VOLUMES,
}


def backend_cases(kind: str, names: list[str]) -> list[Any]:
    """What each backend serves, or everything for one that is not listed."""
    checks = testing.partitioner_checks if kind == "partitioners" else testing.pruner_checks
    serves = SERVES if kind == "partitioners" else PRUNER_SERVES
    return [
        pytest.param(check, id=f"{backend}-{name}", marks=[pytest.mark.slow] if is_slow(backend, name) else [])
        for backend in names
        for name, check in checks(
            registry.load(kind, backend)(),
            {label: f for label, f in FORMULATIONS.items() if label in serves.get(backend, FORMULATIONS)},
        )
    ]


MOMENTS = ("diagonal", "received", "output_weight", "correlated", "correlated_blocks", "uncorrelated_blocks")
"""Problems that differ by what LOSSLESS does not count."""
DEAR_LOADS = ("load", "load_of_3", "link_price")
"""Larger problems that take an integer program seconds."""


def is_slow(backend: str, check: str) -> bool:
    """Integer programs of dense layers that are pruned take seconds each; of CVXPY's there is one that is checked.

    So do the larger lossless layers on HiGHS and SCIP alone; `mip`, which runs SCIP, takes most of them too and
    `mip:cp-sat` all. Mt-KaHyPar, which serves LOSSLESS only, starts a process for each solve.
    """
    is_costly = backend == "nuclear-norm" or backend.startswith("group-lasso:")
    is_large = check.startswith(("valid-", "same_seed")) and check.endswith(("-lossless", "-lossless-busiest"))
    return (
        is_costly
        or (backend.startswith("mip") and "-volume-" in check)
        or (backend in ("mip:highs", "mip:scip") and is_large)
        or (backend in ("mip", "mip-lns") and check in {f"valid-{case}-lossless" for case in DEAR_LOADS})
        or (backend == "mt-kahypar" and check.split("-")[0] in ("oracle", "sparse") and check.split("-")[1] in MOMENTS)
    )


FORMULATION_CASES = [
    pytest.param(check, id=f"{label}-{name}")
    for label, formulation in FORMULATIONS.items()
    for name, check in testing.formulation_checks(formulation)
]


def run(check: Check) -> None:
    declined = check()
    if declined is not None:
        pytest.skip(declined)


@pytest.mark.filterwarnings("ignore:Passing xadj/adjncy:DeprecationWarning")
@pytest.mark.parametrize("check", backend_cases("partitioners", PARTITIONERS))
def test_partitioner(check: Check):
    run(check)


@pytest.mark.parametrize("check", backend_cases("pruners", PRUNERS))
def test_pruner(check: Check):
    run(check)


@pytest.mark.parametrize("check", FORMULATION_CASES)
def test_formulation(check: Check):
    run(check)


@pytest.mark.filterwarnings("ignore:Passing xadj/adjncy:DeprecationWarning")
@pytest.mark.parametrize("label", FORMULATIONS)
@pytest.mark.parametrize("name", SERVES)
def test_what_a_partitioner_serves_and_proves(name: str, label: str):
    if name not in PARTITIONERS:
        pytest.skip(f"{name} is not installed")
    problem, formulation = testing.TINY_CASES["correlated"](), FORMULATIONS[label]
    solution = solve_problem(problem, formulation, partitioner=name)
    if label not in SERVES[name]:
        assert solution.termination is Termination.UNSUPPORTED
    elif label in PROVES.get(name, ()):
        assert solution.termination is Termination.OPTIMAL
        assert solution.objective == pytest.approx(testing.least_objective(problem, formulation), rel=1e-9)
    else:
        assert solution.termination is Termination.HEURISTIC


@pytest.mark.parametrize("label", FORMULATIONS)
@pytest.mark.parametrize("name", PRUNER_SERVES)
def test_what_a_pruner_serves(name: str, label: str):
    problem, formulation = testing.TINY_CASES["correlated"](), FORMULATIONS[label]
    solution = solve_problem(problem, formulation, partitioner="contiguous", pruner=name)
    if label not in PRUNER_SERVES[name]:
        assert solution.termination is Termination.UNSUPPORTED
        return
    assert solution.violations == ()
    assert solution.termination is Termination.HEURISTIC
    if name == "group-l0":
        least = testing.least_objective_given(problem, formulation, solution.owner)
        assert solution.objective == pytest.approx(least, rel=1e-9)
        assert solution.stats["bound_given_owners"] == pytest.approx(least, rel=1e-9)
