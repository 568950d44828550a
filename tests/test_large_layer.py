"""The large generated layer at its quick sizes: what is in the report, and that its figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from repurpose_opt_benchmarks import large_layer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large-layer")
    assert large_layer.main(["--quick", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "large-layer.json").read_text())["rows"]
    return found


def test_every_size_in_every_mode_within_the_budget(rows: list[dict[str, Any]]) -> None:
    expected = [(n, mode) for n in large_layer.QUICK_SIZES for mode in large_layer.MODES]
    assert [(row["inputs"], row["mode"]) for row in rows] == expected
    for row in rows:
        assert row["violations"] == 0
        assert 0 < row["volume_fraction"] <= large_layer.BUDGET


def test_a_better_choice_has_a_lower_error(rows: list[dict[str, Any]]) -> None:
    for n in large_layer.QUICK_SIZES:
        of = {row["mode"]: row for row in rows if row["inputs"] == n}
        full = of["full"]
        assert full["objective"] <= of["group-omp"]["objective"] * (1 + 1e-9)
        assert full["nmse"] < full["refitted_diagonal_nmse"]
        assert full["refitted_diagonal_held_out_nmse"] < of["diagonal"]["held_out_nmse"]


def test_the_parts_make_up_the_seconds(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["mode"] != "diagonal":
            assert set(row["parts"]) >= {"products", "group-omp", "rest"}
            assert min(row["parts"].values()) >= 0
            assert row["calibration_seconds"] + sum(row["parts"].values()) <= row["seconds"]
            assert row["calibration_seconds"] + row["solve_seconds"] == pytest.approx(row["seconds"])


def test_the_table_has_the_growth_and_no_bar_for_small_layers(folder: Path) -> None:
    text = (folder / "large-layer.md").read_text()
    assert text.count("| last two |") == len(large_layer.MODES)
    assert "reached" not in text


def test_bars_are_for_the_full_size() -> None:
    m, n = large_layer.SHAPE
    rows = [
        {"mode": mode, "neurons": m, "inputs": n, "seconds": seconds, "peak_per_weight_bytes": 2.5}
        for mode, seconds in (("diagonal", 31.0), ("full", 500.0))
    ]
    assert [bar["reached"] for bar in large_layer._bars(rows)] == [False, True, True]


def test_time_that_grows_with_the_cube_has_exponent_3() -> None:
    rows = [
        {"inputs": n, "calibration_seconds": float(n), "solve_seconds": n**3 / 1e6, "cpu_seconds": n**2}
        for n in (9, 10, 40)
    ]
    expected = {"calibration_seconds": 1, "solve_seconds": 3, "cpu_seconds": 2}
    assert large_layer.exponents(rows) == pytest.approx(expected)


def test_the_layer_has_the_shape_and_the_spectra_that_it_states() -> None:
    layer = large_layer.generate(128)
    assert layer.weight.shape == (344, 128)
    assert layer.weight.dtype == layer.samples.dtype == np.float32
    assert [len(batch) for batch in layer.batches()] == [256]
    eigenvalues = np.linalg.eigvalsh(np.cov(layer.samples.T))[::-1]
    assert eigenvalues[0] / eigenvalues[9] == pytest.approx(10, rel=0.6)
    again = large_layer.generate(128)
    np.testing.assert_array_equal(layer.weight, again.weight)
    np.testing.assert_array_equal(layer.held_out, again.held_out)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_the_peak_is_what_was_allocated_since() -> None:
    before = large_layer.restart_peak()
    array = np.ones(8 << 20)  # 64 MB: above what glibc would take from memory that was freed before
    del array
    assert 60e6 < large_layer.resident("VmHWM") - before < 90e6


def test_the_error_on_samples_is_that_of_the_outputs() -> None:
    samples = np.array([[1.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    weight, pruned = np.eye(2, dtype=np.float32), np.diag([1.0, 0.0]).astype(np.float32)
    # Outputs (1, 0), (0, 2) against (1, 0), (0, 0), with a bias of 1 on the second: errors 1 and 1 of energy 5.
    assert large_layer.nmse_on(samples, weight, pruned, np.array([0.0, 1.0])) == pytest.approx(2 / 5)
