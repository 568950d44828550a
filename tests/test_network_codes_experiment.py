"""The bars, table and plot of the experiment `network-codes`, from runs that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from repurpose_opt_benchmarks import network_codes


def run(network: str, kind: str, at_most: int | None, seed: int, before: float, after: float | None = None) -> dict:
    figures = {"numbers": at_most or 0, "volume_fraction": 0.01, "busiest_macs": 0.3}
    return {
        "network": network,
        "kind": kind,
        "at_most": at_most,
        "seed": seed,
        "before": before,
        "after": after,
    } | figures


@pytest.fixture
def runs() -> list[dict]:
    found = []
    for seed in (0, 1):
        found.append(run("strips", "dense", 0, seed, 0.97, 0.975))
        found.append(run("sensors", "dense", 0, seed, 0.98))
        for kind in network_codes.KINDS:
            found += [
                run("strips", kind, n, seed, 0.96 + 0.001 * seed, 0.974 if n == 63 else None) for n in (30, 63, 160)
            ]
        found += [run("sensors", "codes", n, seed, 0.979) for n in (120, 75)]
    return found


def test_bars_compare_means_with_dense(runs: list[dict]):
    bars = {found["what"]: found for found in network_codes.bars(runs)}
    assert bars["strips, 30 numbers, no fine-tuning: points below dense"]["measured"] == pytest.approx(0.95)
    assert not bars["strips, 160 numbers, no fine-tuning: points below dense"]["reached"]
    assert bars["strips, 63 numbers, fine-tuned: points below the better dense"]["measured"] == pytest.approx(0.1)
    assert bars["six sensors, 75 numbers, no fine-tuning: points below dense"]["reached"]


def test_report_and_plot(runs: list[dict], tmp_path: Path):
    environment = {"cores": 2, "system": "s", "machine": "m", "commit": "c", "uncommitted_changes": False}
    environment |= dict.fromkeys(("python", "numpy", "scipy", "torch"), "1")
    report = {"runs": runs, "bars": list(network_codes.bars(runs)), "command": "x", "data": "d"}
    text = network_codes.markdown(report | {"environment": environment})
    assert "| strips | codes | 30 | 30 | 1.00% | 0.30 | 96.05% (96.00 – 96.10) | – |" in text
    network_codes.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
