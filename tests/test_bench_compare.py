"""Two runs compared: what counts as worse, as better and as not comparable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_rows import many, row
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repurpose_opt.bench.compare import Change, Ratio, SolverComparison, compare
from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.cli.compare_text import rendered
from repurpose_opt.errors import InvalidArgument

seeds = st.integers(0, 2**32 - 1)


def one(old: list[Row], new: list[Row], **arguments: Any) -> SolverComparison:
    (found,) = compare(old, new, **arguments).solvers
    return found


def instances(count: int, **changes: Any) -> list[Row]:
    return [row(**{"instance": f"{i}", "bound": None} | changes) for i in range(count)]


@given(seeds)
def test_a_run_is_no_worse_than_itself(seed: int) -> None:
    rows = many(3, 4, 2, np.random.default_rng(seed))
    found = compare(rows, rows[::-1])
    assert not found.regressed
    for solver in found.solvers:
        assert solver.tasks == 8
        assert solver.objective.mean in (1, None)
        assert solver.seconds.mean in (1, None)
        assert not solver.worst


@settings(max_examples=10)
@given(seeds)
def test_ratios_as_pandas_has_them(seed: int) -> None:
    pandas = pytest.importorskip("pandas")
    old, new = (many(2, 6, 3, np.random.default_rng(each)) for each in (seed, seed + 1))
    both = pandas.DataFrame([vars(each) for each in old]).merge(
        pandas.DataFrame([vars(each) for each in new]), on=["solver", "instance", "seed"]
    )
    both = both[both.objective_x.notna() & both.objective_y.notna()]
    both["objective"] = np.log(both.objective_y / both.objective_x)
    both["seconds"] = np.log((both.seconds_y + 0.1) / (both.seconds_x + 0.1))
    means = both.groupby(["solver", "instance"])[["objective", "seconds"]].mean().groupby("solver").mean()
    for found in compare(old, new).solvers:
        assert found.objective.mean == pytest.approx(np.exp(means.objective[found.solver]))
        assert found.seconds.mean == pytest.approx(np.exp(means.seconds[found.solver]))


def test_interval_is_over_instances() -> None:
    random = np.random.default_rng(0)
    logs = random.normal(0.02, 0.01, 40)
    old = [replace(each, seed=seed) for each in instances(40) for seed in range(3)]
    new = [replace(each, objective=10 * float(np.exp(logs[int(each.instance)]))) for each in old]
    found = one(old, new).objective
    assert found.instances == 40
    expected = stats.bootstrap((logs,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    assert found.low is not None
    assert found.high is not None
    assert (np.log(found.low), np.log(found.high)) == pytest.approx((expected.low, expected.high), abs=4e-4)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ([1.02] * 8, ("objective",)),
        ([1.009] * 8, ()),
        ([0.9] * 8, ()),
        ([1.5, 0.9, 0.9, 1.0, 1.1, 0.8, 1.2, 1.0], ()),  # the mean is above 1.01, the interval is not above 1
        ([1.02], ("objective",)),  # no interval
    ],
)
def test_objectives_regress(factors: list[float], expected: tuple[str, ...]) -> None:
    old = instances(len(factors))
    new = [replace(each, objective=10 * factor) for each, factor in zip(old, factors, strict=True)]
    assert one(old, new).reasons == expected
    assert one(old, new, objective_tolerance=1.0).reasons == ()


def test_seconds_regress() -> None:
    old = instances(5, seconds=1.0)
    assert one(old, instances(5, seconds=1.2)).reasons == ()
    assert one(old, instances(5, seconds=1.5)).reasons == ("seconds",)
    assert one(old, instances(5, seconds=1.2), seconds_tolerance=0.1).reasons == ("seconds",)
    short = one(instances(5, seconds=0.001), instances(5, seconds=0.01))
    assert short.reasons == ()
    assert short.seconds.mean == pytest.approx(0.11 / 0.101)


def test_ratio_without_tasks() -> None:
    assert not Ratio(None, None, None, 0).is_worse(0.0)
    found = one(instances(2, failure=Failure.CRASH), instances(2, failure=Failure.CRASH))
    assert found.objective == found.seconds == Ratio(None, None, None, 0)
    assert not found.regressed


def test_new_failures() -> None:
    old = [*instances(2), row(instance="old", failure=Failure.CRASH), row(instance="better", failure=Failure.CRASH)]
    new = [*instances(2), row(instance="old", failure=Failure.MEMORY), row(instance="better")]
    assert not one(old, new).regressed
    new[1] = row(instance="1", failure=Failure.CRASH, message="signal 11")
    found = one(old, new)
    assert found.new_failures == (Change(old[1].task, "heuristic", "crash (signal 11)"),)
    assert found.reasons == ("1 new failures",)


def test_an_instance_that_cannot_be_built_any_more_is_a_failure() -> None:
    found = one([row()], [row(fingerprint="", failure=Failure.INSTANCE)])
    assert (found.tasks, found.changed, len(found.new_failures)) == (1, 0, 1)


def test_lost_answers() -> None:
    found = one([row()], [row(termination="unsupported")])
    assert found.lost_answers == (Change(row().task, "heuristic", "unsupported"),)
    assert found.reasons == ("1 lost answers",)
    # That the old run has an answer refutes the new one's claim.
    found = one([row()], [row(termination="infeasible")])
    assert found.reasons == ("1 new failures", "1 newly refused claims")


def test_lost_proofs_count_where_all_seeds_were_proved() -> None:
    proved: dict[str, Any] = {"termination": "optimal", "bound": 10.0}
    old = [row(seed=seed, **proved) for seed in range(3)]
    new = [*old[:2], row(seed=2, bound=9.0)]
    found = one(old, new)
    assert found.lost_proofs == (Change(new[2].task, "objective 10, bound 10", "objective 10, bound 9"),)
    assert found.reasons == ("1 lost proofs of instances proved in all seeds",)
    sometimes = one([*old, row(seed=3)], [*new, row(seed=3, **proved)])
    assert len(sometimes.lost_proofs) == 1
    assert not sometimes.regressed
    # Another time limit is another matter.
    slower = [row(time_limit=0.1)]
    assert one([*old, *slower], [*new, *slower]).regressed


def test_newly_refused_claims() -> None:
    old, new = row(refused=()), row(refused=("objective 3, recomputed as 10",))
    assert one([old], [new]).reasons == ("1 newly refused claims",)
    assert one([new], [new]).reasons == ()
    assert one([new], [old]).reasons == ()


def test_a_new_bound_is_refuted_by_an_old_answer() -> None:
    old = [row(bound=6.0), row(solver="other/auto", objective=7.0, bound=None)]
    found = compare(old, [row(bound=9.0)]).solvers
    assert found[0].new_refused == (Change(row().task, "none refused", "bound 9 above the objective 7 of other/auto"),)
    # The old run made the same false claim: nothing is new.
    assert not compare([row(bound=9.0), old[1]], [row(bound=9.0)]).regressed


def test_objectives_of_zero() -> None:
    zero, more = instances(3, objective=0.0), instances(3, objective=2.0)
    same = one(zero, zero)
    assert (same.objective.mean, same.reasons) == (1, ())
    risen = one(zero, [*zero[:2], more[2]])
    assert (risen.risen_from_zero, risen.objective.instances) == (1, 2)
    assert risen.reasons == ("1 objectives rose from 0",)
    assert risen.worst[0].ratio == np.inf
    fallen = one(more, [zero[0], *more[1:]])
    assert (fallen.fallen_to_zero, fallen.objective.mean, fallen.reasons) == (1, 1, ())


def test_tasks_that_only_one_run_has_are_counted() -> None:
    old = [row(), row(seed=1), row(seed=2, fingerprint="a"), row(solver="gone/auto")]
    new = [row(), row(seed=2, fingerprint="b", failure=Failure.CRASH)]
    new += [row(time_limit=2.0), row(threads=2), row(testset="other"), row(solver="new/auto")]
    flow, gone, added = compare(old, new).solvers
    assert (flow.tasks, flow.changed, flow.only_old, flow.only_new) == (1, 1, 1, 3)
    assert (gone.tasks, gone.only_old, gone.only_new) == (0, 1, 0)
    assert (added.tasks, added.only_old, added.only_new) == (0, 0, 1)
    assert not any(solver.regressed for solver in (flow, gone, added))


def test_worst_instances() -> None:
    old = instances(6)
    new = [replace(each, objective=10.0 + i) for i, each in enumerate(old)]
    found = one(old, new, worst=2).worst
    assert [each.instance for each in found] == ["5", "4"]
    assert [each.ratio for each in found] == pytest.approx([1.5, 1.4])
    # A seed that falls to 0 does not hide one that rises.
    (hidden,) = one([row(), row(seed=1)], [row(objective=0.0, bound=0.0), row(seed=1, objective=40.0)]).worst
    assert hidden.ratio == pytest.approx(2.0)


@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(seed: int, random: Any) -> None:
    old, new = (many(2, 5, 2, np.random.default_rng(each)) for each in (seed, seed + 1))
    found = {solver.solver: solver for solver in compare(old, new).solvers}
    for solver in compare(random.sample(old, len(old)), random.sample(new, len(new))).solvers:
        expected = found[solver.solver]
        assert solver.reasons == expected.reasons
        assert set(solver.lost_proofs) == set(expected.lost_proofs)
        for name in ("mean", "low", "high"):
            assert getattr(solver.objective, name) == pytest.approx(getattr(expected.objective, name))


def test_negative_tolerances_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="seconds_tolerance: got -1"):
        compare([], [], seconds_tolerance=-1)


def test_text() -> None:
    old = [*instances(10), row(solver="gone/auto"), row(instance="x", fingerprint="a")]
    new = [*instances(7, objective=11.0), *(row(instance=f"{i}", failure=Failure.CRASH) for i in (7, 8, 9))]
    text = rendered(compare(old, [*new, row(instance="x", fingerprint="b")], worst=1), most=2)
    first, _, header, flow, gone, *_ = text.splitlines()
    assert first == "1 of 2 solvers regressed (tolerances: objective 0.01, seconds 0.25)"
    for title, cell in (("TASKS", "10 "), ("OBJECTIVE", "1.1000 [1.1000, 1.1000]"), ("FAILURES", "3 ")):
        assert flow[header.index(title) :].startswith(cell)
    assert flow.endswith("regressed")
    assert gone.endswith("not compared")
    for line in (
        "regressed: objective, 3 new failures",
        "tasks not comparable, as the instance changed: 1",
        "tasks only in the old run: 1",
        "tiny 7, seed 0, 1 s: heuristic → crash",
        "and 1 more",
        "1.1000  tiny 0",
    ):
        assert line in text
    assert "tiny 9" not in text


def test_text_of_equal_runs_is_a_table_only() -> None:
    text = rendered(compare(instances(3), instances(3)))
    assert text.startswith("0 of 1 solvers regressed")
    assert len(text.splitlines()) == 7
