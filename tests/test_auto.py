"""What "auto" chooses, and shares of the time in a chain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from repurpose_opt import Edge, Lossless, SolveOptions, Volume, registry
from repurpose_opt.auto import auto_partitioner, auto_pruner
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.moments import Moments
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Candidate, Termination
from repurpose_opt.testing import correlated_samples, random_problem, registered
from repurpose_opt_benchmarks.lossless_random import lossless_problem

EDGE = Edge(weight_price=0.05, transfer_price=0.02)
FULL = random_problem(moments=Moments.from_samples(correlated_samples(3)))
SMALL = lossless_problem(64, 4, 0.05, planted=False, seed=0)
LARGE = lossless_problem(512, 4, 0.05, planted=False, seed=0)


def test_exact_assignments_are_solved_as_such() -> None:
    assert auto_partitioner(FULL, EDGE) == "flow"
    assert auto_partitioner(random_problem(load=[1, 1, 1, 2, 2], capacity=5), EDGE) == "generalised"


def test_volume_is_placed_by_what_the_refit_leaves() -> None:
    assert auto_partitioner(FULL, Volume(budget=0.1)) == "compensated"
    assert auto_pruner(FULL, Volume(budget=0.1)) == "group-omp+swaps+tabu"
    assert auto_pruner(FULL, Volume(budget=0.1, communication="busiest")) == "group-omp"
    assert auto_pruner(random_problem(), Volume(budget=0.1)) == "threshold"
    assert auto_pruner(FULL, EDGE) == auto_pruner(FULL, Lossless()) == "threshold"


def test_nets_go_from_structure_to_annealing_and_small_ones_on_to_a_proof() -> None:
    assert auto_partitioner(SMALL, Lossless()) == "metis+alternate+local-search"
    assert auto_partitioner(SMALL, Lossless(), 10.0) == "metis@0.1+alternate@0.2+local-search@0.3+mip"
    assert auto_partitioner(LARGE, Lossless(), 10.0) == "metis@0.1+alternate@0.2+local-search"
    assert auto_partitioner(LARGE, Lossless(), 2.0) == "alternate@0.2+local-search"
    dense = lossless_problem(1024, 4, 0.2, planted=False, seed=0)
    assert auto_partitioner(dense, Lossless(), 10.0) == "alternate@0.2+local-search"


def test_a_backend_that_does_not_serve_a_problem_is_left_out() -> None:
    uneven = random_problem(link_price=[[0.0, 0.2], [4.0, 0.0]])
    assert "metis" not in auto_partitioner(uneven, Lossless())


def test_without_packages_there_is_still_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    assert auto_partitioner(FULL, EDGE) == "munkres"
    assert auto_partitioner(SMALL, Lossless(), 10.0) == "alternate@0.2"
    monkeypatch.setattr(registry, "find_spec", lambda package: None if package == "ortools" else package)
    assert auto_partitioner(SMALL, Lossless(), 10.0) == "metis@0.1+alternate@0.2+local-search"


def test_auto_beats_its_parts() -> None:
    pytest.importorskip("numba")
    volume = {name: solve_problem(SMALL, Lossless(), partitioner=name).volume for name in ("auto", "alternate")}
    assert volume["auto"] < volume["alternate"]


class _Clocked:
    """Remembers the time limits that it was given."""

    requires = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.limits: list[float | None] = []

    def supports(self, problem: Any, formulation: Any) -> str | None:
        return None

    def solve(self, problem: Any, formulation: Any, options: SolveOptions, start: Any, prune: Any) -> Candidate:
        self.limits.append(options.time_limit)
        return Candidate(Termination.HEURISTIC, np.arange(problem.m) % problem.P)


def test_a_stage_has_its_share_of_the_time_that_is_left() -> None:
    with registered("partitioners", _Clocked("first")) as first, registered("partitioners", _Clocked("second")):
        chain = f"{first}@0.25+second"
        backends = [registry.load("partitioners", name)() for name in ("first", "second")]
        solve_problem(SMALL, Lossless(), SolveOptions(time_limit=1000.0), partitioner=chain)
        solve_problem(SMALL, Lossless(), partitioner=chain)
    (quarter, unlimited), (rest, also_unlimited) = (backend.limits for backend in backends)
    assert quarter == pytest.approx(250, rel=0.05)
    assert rest == pytest.approx(1000, rel=0.05)
    assert unlimited is None
    assert also_unlimited is None


@pytest.mark.parametrize("chain", ["alternate@", "alternate@0", "alternate@1.5", "alternate@half"])
def test_a_bad_share_is_refused(chain: str) -> None:
    with pytest.raises(InvalidArgument, match=r"partitioner.*share"):
        solve_problem(SMALL, Lossless(), partitioner=chain)


def test_an_incumbent_refutes_a_claim_that_there_is_none() -> None:
    """A stage that is wrong about infeasibility does not keep the next one from its turn."""

    class Wrong(_Clocked):
        def solve(self, *arguments: Any) -> Candidate:
            return Candidate(Termination.INFEASIBLE, message="none")

    with registered("partitioners", Wrong("wrong")), registered("partitioners", _Clocked("second")):
        solution = solve_problem(SMALL, Lossless(), partitioner="contiguous+wrong+second")
    assert [stage["stage"] for stage in solution.stats["stages"]] == ["contiguous", "wrong", "second"]
    assert solution.termination is Termination.HEURISTIC
