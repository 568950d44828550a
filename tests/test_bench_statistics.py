"""What is said of many rows: examples by hand, other libraries, the definitions written out, properties."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_rows import many, row
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from repurpose_opt.bench import statistics as s
from repurpose_opt.bench.pairs import interval
from repurpose_opt.bench.row import Failure, Row
from repurpose_opt.errors import InvalidArgument

seeds = st.integers(0, 2**32 - 1)


def some_rows(seed: int, solvers: int = 3, instances: int = 5, repeats: int = 3) -> list[Row]:
    return s.judged(many(solvers, instances, repeats, np.random.default_rng(seed)))


def test_a_false_bound_is_refuted_by_the_answer_of_another_solver() -> None:
    liar = row(solver="liar/auto", objective=10.0, bound=10.0, termination="optimal")
    judged = s.judged([liar, row(objective=8.0, bound=7.0), row(instance="second", objective=1.0, bound=1.0)])
    assert judged[0].bound is None
    assert judged[0].termination == "heuristic"
    assert judged[0].objective == 10.0
    assert judged[0].refused == ("bound 10 above the objective 8 of flow/auto",)
    assert judged[1:] == [row(objective=8.0, bound=7.0), row(instance="second", objective=1.0, bound=1.0)]
    assert s.known(judged)["tiny", "first"] == s.Known(8.0, 7.0, 48, False)
    assert [summary.proved for summary in s.summaries(judged)] == [0, 1]


def test_a_bound_that_rounding_lifts_above_the_objective_holds() -> None:
    rows = [row(objective=10.0, bound=10.0 * (1 + 0.9e-6), termination="optimal"), row(seed=1, objective=10.0)]
    assert s.judged(rows) == rows
    assert s.known(rows)["tiny", "first"].is_proved


def test_a_false_infeasible_is_a_failure() -> None:
    false, true = row(solver="liar/auto", termination="infeasible"), row(instance="second", termination="infeasible")
    judged = s.judged([false, row(), true])
    assert (judged[0].termination, judged[0].failure) == ("error", Failure.INVALID)
    assert judged[0].refused == ("infeasible, but flow/auto has an answer of objective 10",)
    assert judged[2] == true
    assert s.summaries(judged)[0].failures == {Failure.INVALID: 1}
    assert s.judged(judged) == judged


def test_rows_of_different_problems_do_not_judge_each_other() -> None:
    rows = [row(bound=9.0), row(seed=1, fingerprint="another", objective=5.0, bound=None)]
    assert s.judged(rows) == rows
    with pytest.raises(InvalidArgument, match="2 fingerprints of first of tiny"):
        s.known(rows)
    assert s.known([rows[0], row(seed=1, fingerprint="", failure=Failure.INSTANCE)])


def test_a_refuted_bound_is_not_known_even_before_it_is_judged() -> None:
    assert s.known([row(bound=9.5), row(seed=1, objective=9.0, bound=7.0)])["tiny", "first"].bound == 7.0


def test_known_of_instances_without_an_answer() -> None:
    rows = [row(failure=Failure.CRASH, direct_volume=None), row(seed=1, failure=Failure.MEMORY, bound=3.0)]
    assert s.known(rows) == {("tiny", "first"): s.Known(None, 3.0, 48, False)}


def test_summary_by_hand() -> None:
    rows = [
        row(objective=10.0, bound=8.0, seconds=0.3, cpu_seconds=0.6, peak_bytes=5),
        row(
            seed=1, objective=8.0, bound=8.0, termination="optimal", seconds=0.7, refused=("objective 7",), peak_bytes=6
        ),
        row(seed=2, failure=Failure.CRASH, time_limit=2.0, seconds=3.3, peak_bytes=7),
        row(instance="second", termination="unsupported", seconds=0.0),
        row(instance="third", termination="infeasible", seconds=0.2, cpu_seconds=None, peak_bytes=None),
    ]
    (found,) = s.summaries(rows)
    assert (found.solves, found.unsupported, found.answered, found.imputed) == (4, 1, 2, 1)
    assert (found.failures, found.refused, found.proved, found.best) == ({Failure.CRASH: 1}, 1, 1, 1)
    assert found.gap_to_best == pytest.approx((2 / 10 + 0 + 1) / 3)
    assert found.gap_to_bound == pytest.approx((2 / 10 + 0 + 1) / 3)
    assert found.seconds == pytest.approx((0.4 * 0.8 * 2.1 * 0.3) ** (1 / 4) - 0.1)
    assert (found.peak_bytes, found.most_cores, found.overruns) == (7, 2.0, 1)


def test_summary_of_a_solver_that_supports_nothing() -> None:
    (found,) = s.summaries([row(termination="unsupported", seconds=None, cpu_seconds=None, peak_bytes=None)])
    assert (found.solves, found.unsupported) == (0, 1)
    assert found.gap_to_best is found.gap_to_bound is found.seconds is found.peak_bytes is found.most_cores is None


@settings(max_examples=10)
@given(seeds)
def test_means_as_scipy_and_pandas_have_them(seed: int) -> None:
    pandas = pytest.importorskip("pandas")
    rows = some_rows(seed)
    table = pandas.DataFrame([vars(each) for each in rows])
    table["least"] = table.groupby("instance").objective.transform("min")
    table["gap"] = (1 - table.least / table.objective).fillna(1)
    table["shown"] = table.seconds.where(table.objective.notna(), table.time_limit)
    for found in s.summaries(rows):
        own = table[table.solver == found.solver]
        assert found.gap_to_best == pytest.approx(own.gap.mean())
        assert found.seconds == pytest.approx(stats.gmean(own.shown + s.SHIFT_SECONDS) - s.SHIFT_SECONDS)
        assert found.best == (own.objective <= own.least * (1 + s.SAME)).sum()
        assert found.answered + sum(found.failures.values()) == found.solves == len(own)


@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(seed: int, random: Any) -> None:
    rows = some_rows(seed)
    shuffled = random.sample(rows, len(rows))
    assert s.known(shuffled) == s.known(rows)
    assert s.profile(shuffled, "seconds") == s.profile(rows, "seconds")
    assert s.times_to_target(shuffled, 0.1) == s.times_to_target(rows, 0.1)
    assert s.win_tie_loss(shuffled) == s.win_tie_loss(rows)
    pair = ("solver-0/auto", "solver-1/auto")
    for name in ("ratio", "low", "high"):
        assert getattr(s.paired(shuffled, *pair), name) == pytest.approx(getattr(s.paired(rows, *pair), name))
    before = {found.solver: found for found in s.summaries(rows)}
    for found in s.summaries(shuffled):
        for name, figure in vars(found).items():
            expected = getattr(before[found.solver], name)
            assert figure == (pytest.approx(expected) if isinstance(figure, float) else expected)


@given(seeds, st.sampled_from([2.0**-20, 2.0**-3, 2.0**20]))
def test_the_unit_of_objectives_does_not_matter(seed: int, scale: float) -> None:
    rows = some_rows(seed)
    scaled = [
        replace(
            each,
            objective=each.objective and scale * each.objective,
            bound=each.bound and scale * each.bound,
            trajectory=tuple((at, scale * objective) for at, objective in each.trajectory),
        )
        for each in rows
    ]
    assert s.summaries(s.judged(scaled)) == s.summaries(rows)
    assert s.recommendations(scaled) == s.recommendations(rows)
    assert s.profile(scaled, "objective") == s.profile(rows, "objective")
    assert s.anytime(scaled) == s.anytime(rows)
    assert s.times_to_target(scaled, 0.1) == s.times_to_target(rows, 0.1)
    assert s.win_tie_loss(scaled) == s.win_tie_loss(rows)


def counts(each: Row, rows: list[Row], measure: str) -> bool:
    """Whether a row has a place in the profile: seconds only of answers within 1 % of the best."""
    if each.objective is None or measure == "objective":
        return each.objective is not None
    least = min(x.objective for x in rows if x.instance == each.instance and x.objective is not None)
    return each.objective - least <= 0.01 * each.objective


@given(seeds, st.sampled_from(["seconds", "objective"]))
def test_profile_by_its_definition(seed: int, measure: str) -> None:
    rows = some_rows(seed)
    found = s.profile(rows, measure)
    solvers = {each.solver for each in rows}
    assert found.solves == len(rows) / len(solvers)
    for solver in solvers:
        own = [each for each in rows if each.solver == solver and counts(each, rows, measure)]
        for tau in (1.0, 1.03, 1.5, 4.0):
            within = 0
            for each in own:
                of_instance = [x for x in rows if x.instance == each.instance and counts(x, rows, measure)]
                best = min(getattr(x, measure) for x in of_instance)
                within += getattr(each, measure) <= tau * best * (1 + 1e-12)
            assert sum(ratio <= tau * (1 + 1e-12) for ratio in found.ratios[solver]) == within
        assert sum(found.failed[solver].values()) + len(found.ratios[solver]) == found.solves
        assert list(found.ratios[solver]) == sorted(found.ratios[solver])


def test_profile_says_why_there_is_no_ratio() -> None:
    rows = [
        *(row(seed=seed) for seed in range(4)),
        row(solver="new/auto", objective=15.0),
        row(solver="new/auto", seed=1, failure=Failure.TIMEOUT),
        row(solver="new/auto", seed=2, termination="unsupported"),
    ]
    found = s.profile(rows, "objective")
    assert found.solves == 4
    assert found.ratios == {"flow/auto": (1.0,) * 4, "new/auto": (1.5,)}
    assert found.failed == {"flow/auto": {}, "new/auto": {"timeout": 1, "unsupported": 1, "missing": 1}}
    with pytest.raises(InvalidArgument, match="measure: got 'volume'"):
        s.profile(rows, "volume")


def test_objectives_of_zero() -> None:
    rows = [
        row(objective=0.0, bound=0.0, termination="optimal", trajectory=((0.1, 4.0), (0.2, 0.0))),
        row(solver="zero/auto", objective=0.0, bound=None, trajectory=((0.3, 0.0),)),
        row(solver="more/auto", objective=4.0, bound=None, trajectory=((0.1, 4.0),)),
    ]
    assert s.judged(rows) == rows
    assert s.known(rows)["tiny", "first"] == s.Known(0.0, 0.0, 48, True)
    found = {summary.solver.partition("/")[0]: summary for summary in s.summaries(rows)}
    assert [found[name].gap_to_best for name in ("flow", "zero", "more")] == [0, 0, 1]
    assert [found[name].best for name in ("flow", "zero", "more")] == [1, 1, 0]
    assert s.profile(rows, "objective").ratios == {"flow/auto": (1,), "zero/auto": (1,), "more/auto": (math.inf,)}
    assert set(s.anytime(rows).values()) == {((), ())}
    assert s.times_to_target(rows, 0.5) == {"flow/auto": ((0.2,), 0), "zero/auto": ((0.3,), 0), "more/auto": ((), 1)}
    assert s.paired(rows, "flow/auto", "zero/auto").ratio == 1
    assert s.paired(rows, "flow/auto", "more/auto") == s.Paired("flow/auto", "more/auto", 1, None, None, None, 1, 0, 0)
    assert s.win_tie_loss(rows)["more/auto", "flow/auto"] == (0, 0, 1)


def test_anytime_by_hand() -> None:
    rows = [
        row(objective=10.0, trajectory=((0.01, 20.0), (0.1, 10.0))),
        row(seed=1, objective=12.0, trajectory=((0.02, 30.0), (0.03, 9.0), (1.0, 12.0))),
        row(seed=2, failure=Failure.CRASH, trajectory=((0.001, 11.0),)),
        row(solver="late/auto", objective=10.0, seconds=2.0),
        row(solver="none/auto", failure=Failure.CRASH),
    ]
    found = s.anytime(rows, points=201)
    seconds, ratios = (np.array(each) for each in found["flow/auto"])
    assert (seconds[0], seconds[-1], len(seconds)) == (0.02, pytest.approx(2.0), 201)
    assert np.diff(np.log(seconds)) == pytest.approx(np.log(100) / 200)
    expected = np.select([seconds < 0.1, seconds < 1.0], [2.5, 2.0], 1.1)
    steps = np.isclose(seconds, 0.1) | np.isclose(seconds, 1.0)
    assert ratios[~steps] == pytest.approx(expected[~steps])
    assert set(found["late/auto"][1]) == {1.0}
    assert found["none/auto"] == ((), ())


@given(seeds)
def test_anytime_ends_with_the_mean_ratio_of_the_answers(seed: int) -> None:
    rows = some_rows(seed)
    least = {instance: its.objective or math.nan for (_, instance), its in s.known(rows).items()}
    for solver, (seconds, ratios) in s.anytime(rows).items():
        answers = [each.objective / least[each.instance] for each in rows if each.solver == solver and each.objective]
        assert ratios[-1] == pytest.approx(np.mean(answers))
        assert list(seconds) == sorted(seconds)
        assert list(ratios) == sorted(ratios, reverse=True)


def test_times_to_target_by_hand() -> None:
    rows = [
        row(objective=10.0, trajectory=((0.1, 3.0), (0.2, 10.9), (0.4, 10.0))),
        row(seed=1, objective=11.0, trajectory=(), seconds=0.15),
        row(seed=2, objective=12.0, trajectory=((0.1, 10.5), (0.5, 12.0))),
        row(seed=3, failure=Failure.CRASH),
        row(seed=4, termination="unsupported"),
    ]
    assert s.times_to_target(rows, 0.1) == {"flow/auto": ((0.15, 0.2), 2)}
    assert s.times_to_target(rows, 0.0) == {"flow/auto": ((0.4,), 3)}
    same = [row(objective=10.0, seconds=0.2), row(seed=1, objective=10.000005, seconds=0.1)]
    assert s.times_to_target(same, 0.0) == {"flow/auto": ((0.1, 0.2), 0)}
    with pytest.raises(InvalidArgument, match="within"):
        s.times_to_target(rows, -0.1)


def test_paired_takes_medians_over_seeds() -> None:
    rows = [row(solver="a/auto", seed=seed, objective=objective) for seed, objective in enumerate((1.0, 2.0, 90.0))]
    rows += [row(solver="b/auto", seed=0, objective=4.0), row(solver="b/auto", seed=1, failure=Failure.CRASH)]
    rows += [row(solver="a/auto", instance="second", objective=8.0), row(solver="b/auto", instance="second")]
    rows += [row(solver="a/auto", instance="third"), row(solver="b/auto", instance="third", objective=10.000001)]
    rows += [row(solver="a/auto", instance="fourth"), row(solver="b/auto", instance="fourth", failure=Failure.CRASH)]
    rows += [row(solver=f"{name}/auto", instance="fifth", failure=Failure.CRASH) for name in "ab"]
    found = s.paired(rows, "a/auto", "b/auto")
    assert (found.instances, found.wins, found.ties, found.losses) == (3, 2, 1, 0)
    assert found.ratio == pytest.approx((2 / 4 * 8 / 10 * 1) ** (1 / 3), rel=1e-6)
    assert s.win_tie_loss(rows) == {("a/auto", "b/auto"): (3, 1, 0), ("b/auto", "a/auto"): (0, 1, 3)}
    assert s.paired(rows, "a/auto", "none/auto") == s.Paired("a/auto", "none/auto", 0, None, None, None, 0, 0, 0)


@given(seeds)
def test_win_tie_loss_is_the_same_from_both_sides(seed: int) -> None:
    table = s.win_tie_loss(some_rows(seed))
    assert len(table) == 6
    for (first, second), counts in table.items():
        assert counts == table[second, first][::-1]
        assert sum(counts) <= 5


@pytest.mark.parametrize("n", [6, 40])
def test_interval_as_scipy_has_it(n: int) -> None:
    logs = np.random.default_rng(n).exponential(size=n)
    # Over many seeds, so that what is left is the method, not the draws.
    found = np.mean([np.log(np.array(interval(logs, seed), dtype=float)) for seed in range(30)], axis=0)
    expected = stats.bootstrap((logs,), np.mean, n_resamples=100_000, method="BCa", rng=1).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.05 * stats.sem(logs))
    # What BCa corrects is seen: the interval of skewed figures is not symmetric.
    assert found[1] - logs.mean() > 1.1 * (logs.mean() - found[0])


def test_interval_of_few_or_equal_figures() -> None:
    assert interval(np.array([0.1])) == (None, None)
    assert interval(np.full(7, 0.1)) == pytest.approx((math.exp(0.1),) * 2)


def test_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = interval(random.normal(0.3, 1.0, 30), seed)
        assert low is not None
        assert high is not None
        covered += low <= math.exp(0.3) <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_sizes() -> None:
    assert [s.size_of(row(m=m)) for m in (1, 64, 65, 512, 513, None)] == [
        "small",
        "small",
        "medium",
        "medium",
        "large",
        "unknown",
    ]


def test_recommendations_rank_all_on_the_same_solves() -> None:
    cell: dict[str, Any] = {"m": 600, "formulation": "edge"}
    rows = [
        row(solver="best/auto", objective=100.0, seconds=0.9, bound=None, **cell),
        row(solver="best/auto", instance="second", objective=100.0, seconds=0.9, bound=None, **cell),
        row(solver="fast/auto", objective=100.5, seconds=0.1, bound=None, **cell),
        row(solver="fast/auto", instance="second", objective=100.5, seconds=0.1, bound=None, **cell),
        row(solver="worse/auto", objective=110.0, seconds=0.01, bound=None, **cell),
        row(solver="worse/auto", instance="second", objective=110.0, seconds=0.01, bound=None, **cell),
        row(solver="partial/auto", objective=100.0, seconds=0.01, bound=None, **cell),
        row(solver="partial/auto", instance="second", termination="unsupported", **cell),
        row(solver="never/auto", termination="unsupported", **cell),
        row(solver="never/auto", instance="second", termination="unsupported", **cell),
        row(solver="crash/auto", failure=Failure.CRASH, **cell | {"m": None}),
        row(instance="other", m=5, formulation="edge"),
        row(instance="unbuilt", m=None, formulation="", failure=Failure.INSTANCE),
    ]
    small, large = s.recommendations(rows)
    assert (small.formulation, small.size, small.instances) == ("edge", "small", 1)
    assert (large.formulation, large.size, large.instances) == ("edge", "large", 2)
    names = [summary.solver.partition("/")[0] for summary in large.ranking]
    assert names == ["best", "fast", "worse", "partial", "crash"]
    assert large.fastest is not None
    assert large.fastest.solver == "fast/auto"


def test_nothing_is_known_of_no_rows() -> None:
    for function in (s.judged, s.summaries, s.recommendations, s.known, s.anytime, s.win_tie_loss):
        assert not function([])
    assert not s.times_to_target([], 0.1)
    assert s.profile([], "seconds") == s.Profile("seconds", {}, {}, 0)


def test_a_solver_is_not_beaten_where_it_is_not_asked() -> None:
    rows = [
        row(solver="a", instance="x", objective=5.0, bound=None),
        row(solver="b", instance="x", objective=6.0, bound=None),
        row(solver="a", instance="y", termination="unsupported"),
        row(solver="b", instance="y", objective=6.0, bound=None),
        row(solver="a", instance="z", termination="error", failure=Failure.CRASH),
        row(solver="b", instance="z", objective=6.0, bound=None),
    ]
    assert s.win_tie_loss(rows) == {("a", "b"): (1, 0, 1), ("b", "a"): (1, 0, 1)}


def test_bounds_are_said_of_how_many_instances() -> None:
    rows = [row(instance="x", bound=8.0), row(instance="y", bound=None)]
    (found,) = s.recommendations(rows)
    assert (found.bounded, found.instances) == (1, 2)


def test_of_two_equally_good_solvers_the_one_that_proves_is_recommended_and_the_fast_one_named() -> None:
    rows = [
        row(solver="fast", objective=10.0, bound=None, termination="heuristic", seconds=0.1),
        row(solver="proves", objective=10.0, bound=10.0, termination="optimal", seconds=0.9),
    ]
    (found,) = s.recommendations(rows)
    assert [each.solver for each in found.ranking] == ["proves", "fast"]
    assert found.fastest is not None
    assert found.fastest.solver == "fast"
