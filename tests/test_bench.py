"""Test sets and the command that runs the experiments."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from scipy import sparse

from repurpose_opt import registry
from repurpose_opt.bench.testset import Instance
from repurpose_opt.bench.testsets import load_all
from repurpose_opt.problem import dense
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks.__main__ import EXPERIMENTS
from repurpose_opt_benchmarks.__main__ import main as run_experiments
from repurpose_opt_benchmarks.edge_random import EdgeRandom
from repurpose_opt_benchmarks.lossless_classes import LosslessClasses
from repurpose_opt_benchmarks.lossless_random import LosslessRandom
from repurpose_opt_benchmarks.radix_net import radix_net
from repurpose_opt_benchmarks.tiny import Tiny

SETS = (Tiny, EdgeRandom, LosslessRandom)
needs_minilm = pytest.mark.skipif(
    not registry.is_installed("testsets", "lossless-classes"), reason="the package with MiniLM's weights is absent"
)


def test_all_sets_are_listed() -> None:
    found = {testset.name: type(testset) for testset, _ in load_all()[0]}
    assert {testset.name: testset for testset in SETS}.items() <= found.items()
    assert list(found) == registry.names("testsets")


@pytest.mark.parametrize("testset", SETS)
def test_instances_are_as_many_as_announced_and_named_apart(testset: type) -> None:
    found = testset()
    assert found.title
    assert found.description
    names = [instance.name for instance in found]
    assert len(names) == len(set(names)) == len(found)


@pytest.mark.parametrize("testset", SETS)
def test_instances_are_the_same_every_time(testset: type) -> None:
    for first, second in zip(islice(testset(), 10), islice(testset(), 10), strict=True):
        assert first.name == second.name
        assert repr(first.formulation) == repr(second.formulation)
        assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("testset", SETS)
def test_instances_differ(testset: type) -> None:
    found = [fingerprint(instance) for instance in islice(testset(), 10)]
    assert len(set(found)) == len(found)


def fingerprint(instance: Instance) -> tuple[object, ...]:
    """All data of a problem, and its formulation."""
    problem = instance.problem
    arrays = (dense(problem.weight), problem.input_owner, problem.capacity, problem.load, problem.min_load)
    more = (problem.allowed, problem.value_bytes, problem.link_price, problem.moments.second, problem.output_weight)
    return (repr(instance.formulation), *(np.asarray(array).tobytes() for array in arrays + more))


@pytest.mark.parametrize("instance", list(Tiny()), ids=lambda instance: instance.name)
def test_tiny_instances_have_a_proved_optimum(instance: Instance) -> None:
    proved = solve_problem(instance.problem, instance.formulation, partitioner="brute-force")
    assert proved.termination == "optimal"
    assert not proved.violations
    found = solve_problem(instance.problem, instance.formulation)
    assert not found.violations
    assert found.objective >= proved.objective - 1e-6 * abs(proved.objective)


def test_edge_random_has_uneven_capacities_that_suffice() -> None:
    for instance in islice(EdgeRandom(), 6):
        problem = instance.problem
        assert len(set(problem.capacity)) > 1
        assert problem.capacity.max() < problem.m < problem.capacity.sum() <= 1.3 * problem.m
        assert solve_problem(problem, instance.formulation, partitioner="munkres").termination == "optimal"


def test_planted_layers_have_a_better_placement_than_random_ones() -> None:
    volumes = {}
    for instance in islice(LosslessRandom(), 6):
        assert sparse.issparse(instance.problem.weight)
        solved = {
            p: solve_problem(instance.problem, instance.formulation, partitioner=p) for p in ("random", "munkres")
        }
        volumes[instance.name] = solved["munkres"].volume / solved["random"].volume
    planted = [ratio for name, ratio in volumes.items() if name.startswith("planted")]
    rest = [ratio for name, ratio in volumes.items() if name.startswith("random")]
    assert len(planted) == 2
    assert max(planted) < 0.6 < min(rest)


def test_unknown_experiment_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_experiments(["nonsense"])
    assert ended.value.code == 2
    assert "known: " + ", ".join(EXPERIMENTS) in capsys.readouterr().err


def test_transport_measures_both_bars() -> None:
    pytest.importorskip("ortools")
    from repurpose_opt_benchmarks.transport import markdown, measure_alone

    report = measure_alone(64, 1, 1)
    assert [row["cost"] for row in report["assignment"]] == ["edge", "uniform"]
    assert all(row["relative_difference"] < 1e-6 for row in report["assignment"])
    assert [row["dtype"] for row in report["solve"]] == ["float64", "float32"]
    assert all(row["termination"] == "optimal" and row["violations"] == 0 for row in report["solve"])
    table = [line for line in markdown(report).splitlines() if line.startswith("| `")]
    assert len(table) == 4


@needs_minilm
def test_half_of_lossless_classes_is_judged_once() -> None:
    found = list(LosslessClasses())
    assert len(found) == len(LosslessClasses()) >= 24
    assert len({instance.name for instance in found}) == len(found)
    assert {instance.kind for instance in found} == {"random", "planted", "banded", "radix", "real"}
    for tuned, judged in zip(found[::2], found[1::2], strict=True):
        assert (tuned.judge_once, judged.judge_once) == (False, True)
        assert tuned.name[:-1] == judged.name[:-1]
        assert fingerprint(tuned) != fingerprint(judged)
        assert judged.problem.capacity.sum() == judged.problem.m, "capacities are tight"


def test_a_radix_net_connects_every_input_with_every_output_equally_often() -> None:
    """Robinett and Kepner 2019, theorem 1: a numeral system's layers multiply to a constant matrix."""
    first, second, third = radix_net((4, 4, 2), 3, seed=0)
    paths = (third @ second @ first).toarray()
    assert (paths == paths[0, 0]).all()
    assert paths[0, 0] == 1
    assert (first.sum(axis=1) == 4).all()
    assert (third.sum(axis=0) == 2).all()
