"""The demo end to end at a small size: real digits, three sensors on real processes, the whole report."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from repurpose_opt.demo import rows, run, sensors
from repurpose_opt.demo.digits import load_digits
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime.plan import Plan

LOSSLESS = ["dense", "naive", "central", "direct", "partial_sums"]
ROWS = [*LOSSLESS, "sparse", "late_fusion", "late_fusion_filled", "ours", "ours_codes"]


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_digits", small_digits)
        for module in (sensors, rows, run):
            patch.setattr(module, "SENSORS", 3)
        patch.setattr(sensors, "PIXELS", 196)
        patch.setattr(sensors, "NOISE", 0.5)
        patch.setattr(sensors, "WIDTHS", (3 * 196, 48, 24, 12, 10))
        patch.setattr(sensors, "TRAINING", replace(sensors.TRAINING, steps=150))
        patch.setattr(rows, "FINE_TUNING", replace(rows.FINE_TUNING, steps=10))
        patch.setattr(rows, "CALIBRATION_GROUPS", 1000)
        patch.setattr(rows, "TEST_GROUPS", 1000)
        patch.setattr(rows, "CURVE", {"ours": (10.0, 1 / 3), "ours_codes": (1 / 3,)})
        patch.setattr("repurpose_opt.solve.auto_pruner", quickest_pruner)
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        run.run_demo(directory, budget=0.02, codes_budget=0.01, as_json=True)
    return directory, json.loads(printed[0])


def small_digits(mnist_directory):
    """The digits at half the resolution."""
    digits = load_digits(mnist_directory)
    halved = [
        avg_pool2d(images.reshape(-1, 1, 28, 28), 2).flatten(1) for images in (digits.train_images, digits.test_images)
    ]
    return replace(digits, train_images=halved[0], test_images=halved[1])


def quickest_pruner(problem, formulation):
    return "threshold" if formulation.sends_codes else "group-omp"


def test_each_row_has_its_figures(small_demo):
    _, result = small_demo
    assert list(result) == ROWS
    for row in result.values():
        for key in ("accuracy_before_finetuning", "accuracy", "values_per_sample", "volume_fraction", "busiest_macs"):
            assert np.isfinite(row[key])
    assert result["ours"]["volume_fraction"] <= 0.02
    assert result["ours_codes"]["volume_fraction"] <= 0.01
    # Sums of ten outputs of the 12 / 3 values a worker would be more numbers than the values, which are sent then.
    assert result["late_fusion"]["values_per_sample"] == 8
    filled, codes = result["late_fusion_filled"], result["ours_codes"]
    assert filled["values_per_sample"] == max(8, codes["values_per_sample"])
    assert result["direct"]["volume_fraction"] == 1.0
    assert result["dense"]["accuracy"] > 0.5
    for lossless in LOSSLESS:
        assert result[lossless]["accuracy"] == result["dense"]["accuracy"]


@pytest.mark.parametrize("name", ["ours", "ours_codes"])
def test_processes_answer_as_one_and_send_what_was_predicted(small_demo, name):
    _, result = small_demo
    ours = result[name]
    assert ours["values_per_sample"] > 0
    assert ours["max_abs_difference"] <= 1e-4
    assert ours["bytes_sent"] == ours["bytes_predicted"]
    assert np.sum(ours["bytes_sent"]) == 1000 * ours["bytes_per_sample"]


def test_the_report_and_the_plan_are_left_behind(small_demo):
    directory, result = small_demo
    report = (directory / "report.md").read_text()
    for name in ROWS:
        assert f"| {name} |" in report
    for picture in ("curve.png", "matrices.png", "traffic.png", "matrices-codes.png", "traffic-codes.png"):
        assert (directory / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in report
    assert Plan.load(directory / "plan").volume == result["ours"]["bytes_per_sample"]
    assert Plan.load(directory / "plan-codes").volume == result["ours_codes"]["bytes_per_sample"]


def test_groups_are_six_different_images_of_the_label():
    digits = load_digits(None)
    images = digits.test_images[:, :1] * 0 + torch.arange(len(digits.test_labels), dtype=torch.float32)[:, None]
    groups = sensors.Groups(images, digits.test_labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensors, "NOISE", 0.0)
        drawn, labels = groups.draw(300, torch.Generator().manual_seed(0))
    chosen = drawn.long()
    assert chosen.shape == (300, sensors.SENSORS)
    assert all(len(set(group.tolist())) == sensors.SENSORS for group in chosen)
    assert (digits.test_labels[chosen] == labels[:, None]).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"seeds": 0}, "seeds"), ({"budget": 1.5}, "budget"), ({"codes_budget": 0}, "codes_budget")],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, named):
    with pytest.raises(InvalidArgument, match=named) as error:
        run.run_demo(tmp_path, **arguments)
    assert "\n" not in str(error.value)
