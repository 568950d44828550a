"""The experiments on codes at their quick sizes, and their bounds against what can be computed otherwise."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from repurpose_opt import LayerProblem, Termination, Volume, metrics
from repurpose_opt.exchange import Code, Exchange
from repurpose_opt.receiver import receivers
from repurpose_opt_benchmarks import code_bounds, codes, codes_large, codes_tiny

# The bound of merged sources


def error_of(problem: LayerProblem, owner: np.ndarray, exchange: Exchange) -> float:
    weight = Volume(budget=1.0, messages="codes").repair(problem, owner, exchange)
    return metrics.weighted_error(problem, owner, weight)


@pytest.mark.parametrize("seed", range(6))
def test_no_random_code_is_better_than_the_bound(seed: int) -> None:
    problem, _, owner = codes_tiny.correlated_case(seed)
    random = np.random.default_rng(seed)
    pairs = [(p, k) for p in range(problem.P) for k in range(problem.P) if p != k]
    for _ in range(10):
        messages: dict[tuple[int, int], Any] = {}
        for p, k in pairs:
            held = int((problem.input_owner == p).sum())
            count = int(random.integers(0, held + 1))
            if count:
                messages[p, k] = Code.spanning(random.normal(size=(count, held)))
        exchange = Exchange(problem.n, problem.P, messages)
        volume, priced = metrics.volume(problem, exchange), metrics.priced_volume(problem, exchange)
        error = error_of(problem, owner, exchange)
        budget = Volume(budget_bytes=float(volume), messages="codes")
        assert code_bounds.merged_source_bound(problem, budget, owner) <= error * (1 + 1e-9)
        price = Volume(transfer_price=0.01, messages="codes")
        assert code_bounds.merged_source_bound(problem, price, owner) <= (error + 0.01 * priced) * (1 + 1e-9)


def test_of_one_source_the_bound_is_the_least_error() -> None:
    problem, _, owner = next(
        case for case in map(codes_tiny.correlated_case, range(50)) if case[0].P == 2 and case[1].has_budget
    )
    formulation = Volume(budget=0.4, messages="codes")
    (first, second) = receivers(problem, owner)
    gains = [code_bounds.merged_gains(receiver) for receiver in (first, second)]
    limit = int(0.4 * problem.n)
    unsent = error_of(problem, owner, Exchange.nothing(problem.n, 2))
    least = min(unsent - gains[0][:r].sum() - gains[1][: limit - r].sum() for r in range(limit + 1))
    assert code_bounds.merged_source_bound(problem, formulation, owner) == pytest.approx(least, rel=1e-12)
    answer = codes.pruned("threshold", problem, formulation, owner)
    assert answer.objective == pytest.approx(least, rel=1e-9)


def test_merged_gains_are_what_all_remote_values_are_worth() -> None:
    """All remote columns known: what is left is the error with all values sent."""
    problem, _, owner = codes_tiny.correlated_case(3)
    everything = Exchange.of_transfers(problem.remote, problem.input_owner)
    worth = sum(code_bounds.merged_gains(receiver).sum() for receiver in receivers(problem, owner))
    unsent = error_of(problem, owner, Exchange.nothing(problem.n, problem.P))
    assert unsent - worth == pytest.approx(error_of(problem, owner, everything), rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_the_knapsack_is_above_every_choice_of_whole_items(seed: int) -> None:
    random = np.random.default_rng(seed)
    worth, size = random.uniform(0, 1, 7), random.integers(0, 4, 7).astype(float)
    limit = float(random.uniform(0, size.sum() + 1))
    chosen = [list(some) for count in range(8) for some in combinations(range(7), count)]
    best = max(worth[some].sum() for some in chosen if size[some].sum() <= limit)
    found = code_bounds._fractional_knapsack(worth, size, limit)
    assert best <= found + 1e-12
    assert found <= best + worth.max() + 1e-12  # less than one item more


# codes


@pytest.fixture(scope="module")
def codes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        assert codes.main(["--quick", "--jobs", "1", "--output", str(folder)]) == 0
    return folder


def run_here(patch: pytest.MonkeyPatch) -> None:
    """Tasks in this process: a process of their own would import everything anew."""

    class Here:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: Any) -> None: ...
        def submit(self, function: Any, *arguments: Any) -> Any:
            from concurrent.futures import Future

            future: Future[Any] = Future()
            future.set_result(function(*arguments))
            return future

    patch.setattr(codes.tasks, "ProcessPoolExecutor", Here)


def test_codes_are_never_worse_than_values_at_the_same_budget(codes_folder: Path) -> None:
    report = json.loads((codes_folder / "codes-mlxtend.json").read_text())
    assert all(bar["reached"] for bar in report["bars"])
    cells = codes.Cells(report["rows"])
    assert len(cells.names) == 4
    for cell in cells.names:
        for row in (row for row in report["rows"] if (row["layer"], row["P"], row["budget"]) == cell):
            assert row["violations"] == []
            assert (0 if row["messages"] == codes.MIXED else 1e-9) <= row["volume_fraction"] <= row["budget"]
            assert row["busiest_macs"] >= row["macs"] / row["P"]
            assert (row["bound"] is None) == (row["messages"] != codes.CODES)
            assert 0 < row["held_out_nmse"] < 1
        assert cells.row(cell, codes.SAME, codes.VALUES, codes.AUTO)["codes"] == 0
        assert cells.gap(cell, codes.SAME, codes.CHAIN) <= cells.gap(cell, codes.SAME, "code-greedy") + 1e-12


def test_the_work_falls_as_its_price_rises(codes_folder: Path) -> None:
    cells = codes.Cells(json.loads((codes_folder / "codes-mlxtend.json").read_text())["rows"])
    for cell in cells.having(codes.SAME, codes.MIXED, codes.AUTO, codes.MAC_PRICE_RATIOS[0]):
        mixed = [cells.row(cell, codes.SAME, codes.MIXED, codes.AUTO, ratio) for ratio in codes.MAC_PRICE_RATIOS]
        work = [row["message_macs"] for row in (cells.row(cell, codes.SAME, codes.CODES, codes.CHAIN), *mixed)]
        assert work[0] >= work[1] >= work[2]
        assert mixed[0]["mac_price"] * 5 == pytest.approx(mixed[1]["mac_price"])


def test_codes_are_resumed_and_written_as_text(codes_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (codes_folder / "codes-mlxtend.md").read_text()
    assert text.count(f"| {codes.GENERATED}, ") == 4 + 2  # cells, and those with mixed messages
    assert "Without a valid answer" not in text
    assert "group-lasso-fast" in text
    log = codes_folder / "codes-mlxtend.rows.jsonl"
    before = log.read_text()
    monkeypatch.setattr(codes.tasks, "_row", None)  # whatever is done again fails
    run_here(monkeypatch)
    assert codes.main(["--quick", "--jobs", "1", "--output", str(codes_folder)]) == 0
    assert log.read_text() == before


def test_rows_without_a_valid_answer_fail_the_bars(codes_folder: Path) -> None:
    rows = json.loads((codes_folder / "codes-mlxtend.json").read_text())["rows"]
    index = next(i for i, row in enumerate(rows) if row["messages"] == codes.CODES and row["pruner"] == codes.CHAIN)
    broken = [*rows[:index], {**rows[index], "violations": ["volume above the budget"]}, *rows[index + 1 :]]
    found = {bar["what"]: bar["reached"] for bar in codes.bars(broken)}
    assert not found["error of codes relative to values, same owners, largest"]
    assert not found["solves without a valid answer"]
    assert found["error of codes relative to values, own owners, largest"]
    assert "volume above the budget" in "\n".join(codes._failures(broken))


# codes-tiny


@pytest.fixture(scope="module")
def tiny_rows() -> list[dict[str, Any]]:
    cases = codes_tiny.every_case(codes_tiny.QUICK_SEEDS, codes_tiny.QUICK_PROOFS)
    return [{"kind": case.kind, "seed": case.seed, **codes_tiny.figures(case)} for case in cases]


def test_the_tiny_layers_reach_every_bar(tiny_rows: list[dict[str, Any]]) -> None:
    bars = list(codes_tiny.bars(tiny_rows))
    assert [bar["what"] for bar in bars if not bar["reached"]] == []
    exact = [row for row in tiny_rows if row["kind"] == codes_tiny.UNCORRELATED]
    assert {row["P"] for row in exact} == {2, 3, 4}
    assert {row["limit"] for row in exact} == {"budget", "price"}


def test_a_wrong_answer_fails_the_bars(tiny_rows: list[dict[str, Any]]) -> None:
    first = tiny_rows[0]
    above = [{**first, "objective": first["least"] * 1.001}, *tiny_rows[1:]]
    assert sum(not bar["reached"] for bar in codes_tiny.bars(above)) >= 1
    unproved = [{**first, "termination": str(Termination.HEURISTIC)}, *tiny_rows[1:]]
    assert sum(not bar["reached"] for bar in codes_tiny.bars(unproved)) == 1


def test_the_tiny_report_has_its_tables(tiny_rows: list[dict[str, Any]]) -> None:
    report = {
        "command": "",
        "environment": codes_tiny.environment(*codes_tiny.PACKAGES),
        "bars": list(codes_tiny.bars(tiny_rows)),
        "rows": tiny_rows,
    }
    text = codes_tiny.markdown(report)
    assert f"{codes_tiny.QUICK_SEEDS} uncorrelated cases" in text
    assert text.count(f"| {codes_tiny.DESCENT} |") == len(
        {row["P"] for row in tiny_rows if row["kind"] == "correlated"}
    )


@pytest.mark.parametrize("seed", range(4))
def test_all_ranks_give_what_random_codes_never_beat(seed: int) -> None:
    problem, formulation, owner = codes_tiny.uncorrelated_case(seed)
    least = codes_tiny.least_objective_over_ranks(problem, formulation, owner)
    random = np.random.default_rng(seed)
    for _ in range(30):
        messages: dict[tuple[int, int], Any] = {}
        for p in range(problem.P):
            held = int((problem.input_owner == p).sum())
            for k in set(range(problem.P)) - {p}:
                if random.integers(3) == 0:
                    messages[p, k] = Code.spanning(random.normal(size=(int(random.integers(1, held + 1)), held)))
        exchange = Exchange(problem.n, problem.P, messages)
        weight = formulation.repair(problem, owner, exchange)
        if not formulation.violations(problem, owner, exchange, weight):
            assert formulation.objective(problem, owner, exchange, weight) >= least * (1 - 1e-9)


# codes-large


@pytest.fixture(scope="module")
def large_rows() -> list[dict[str, Any]]:
    return [codes_large.measure(mode, n) for n in codes_large.QUICK_SIZES for mode in codes_large.MODES]


def test_every_size_and_stage_within_the_budget(large_rows: list[dict[str, Any]]) -> None:
    for row in large_rows:
        assert row["violations"] == 0
        assert 0 < row["volume_fraction"] <= codes_large.BUDGET
        assert row["numbers"] == int(codes_large.BUDGET * row["inputs"] * (codes_large.WORKERS - 1))
    for n in codes_large.QUICK_SIZES:
        threshold, greedy, chain, default = (row["objective"] for row in large_rows if row["inputs"] == n)
        assert chain <= greedy * (1 + 1e-9)
        assert greedy < threshold
        assert default < threshold


def test_the_parts_make_up_the_seconds(large_rows: list[dict[str, Any]]) -> None:
    for row in large_rows:
        assert row["calibration_seconds"] + sum(row["parts"].values()) == pytest.approx(row["seconds"])
        assert min(row["parts"].values()) >= 0
        assert {"products", "refit", "judging"} <= set(row["parts"])
        assert ("code-descent" in row["parts"]) == (row["mode"] in ("code-greedy+code-descent", codes_large.DEFAULT))


def test_the_large_table_has_the_growth_and_no_bar_for_small_layers(large_rows: list[dict[str, Any]]) -> None:
    by_mode = {mode: [row for row in large_rows if row["mode"] == mode] for mode in codes_large.MODES}
    report = {
        "command": "",
        "environment": codes_large.environment(),
        "bars": list(codes_large.bars(large_rows)),
        "exponents": {mode: codes_large.exponents(rows) for mode, rows in by_mode.items()},
        "rows": large_rows,
    }
    text = codes_large.markdown(report)
    assert text.count("| last two |") == len(codes_large.MODES)
    assert "reached" not in text


@pytest.mark.parametrize(("seconds", "reached"), [(299.0, True), (301.0, False)])
def test_the_bar_is_for_the_default_at_full_size(seconds: float, reached: bool) -> None:
    m, n = codes_large.SHAPE
    row = {"neurons": m, "inputs": n, "seconds": seconds, "volume_fraction": 0.01, "violations": 0}
    found = list(codes_large.bars([{**row, "mode": "threshold"}, {**row, "mode": codes_large.DEFAULT}]))
    assert [bar["reached"] for bar in found] == [reached, True, True]
