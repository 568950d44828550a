"""Means and covariances of a layer's inputs, summed batch by batch in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repurpose_opt.errors import InvalidArgument

MOST_FULL_BYTES = 4 << 30
"""Three square float64 matrices, C, D and C₀, may take this much: 13,377 columns. Above, only diagonals are kept."""
_BLOCK_ENTRIES = 1 << 22
"""Samples are converted to float64, and multiplied, in blocks of about this many entries, 32 MB.

Adding the product of each small batch to a large matrix would take far longer than the products: 7 times as long for
batches of 32 samples of 4096 columns.
"""


class MomentAccumulator:
    """Sums over samples that are added batch by batch; `Moments.of` makes the moments out of them.

    float64, whatever the samples are. All sums are about the mean of the first block, so a large mean costs no
    digits (Chan, Golub, LeVeque 1983, "shifted data"). Memory O(columns²), or O(columns) where `diagonal` is true;
    None means diagonal above MOST_FULL_BYTES.
    """

    def __init__(self, diagonal: bool | None = None) -> None:
        self.samples = 0
        self.columns = 0
        self.diagonal = bool(diagonal)
        self.has_target = False
        self._decides = diagonal is None
        self._received, self._original = _Shifted(), _Shifted()
        self._second = self._cross = self._target = self._squares_times_inputs = np.zeros(0)
        self._fourth = 0.0
        self._waiting: list[tuple[NDArray[np.float64], ...]] = []
        """Shifted samples of x̂, or of x̂ and x, whose products are not in the sums yet."""

    def add(self, inputs: ArrayLike, target_inputs: ArrayLike | None = None) -> None:
        """Add samples (samples, columns) of x̂, and the same samples of x where they differ.

        NumPy or torch. Raises InvalidArgument, with nothing added.
        """
        received = _checked("inputs", inputs)
        original = None if target_inputs is None else _checked("target_inputs", target_inputs)
        if original is not None and original.shape != received.shape:
            raise InvalidArgument("target_inputs", f"shape {original.shape}", f"the shape of inputs, {received.shape}")
        if self.columns == 0:
            self._start(received.shape[1], original is not None)
        if received.shape[1] != self.columns:
            raise InvalidArgument("inputs", f"a batch of {received.shape[1]} columns", f"{self.columns}, as before")
        if self.has_target != (original is not None):
            raise InvalidArgument("target_inputs", "batches with and without it", "all with it, or none")
        for rows in _blocks(received):
            self._add(received[rows], None if original is None else original[rows])

    @property
    def mean(self) -> NDArray[np.float64]:
        """E[x̂], (columns,)."""
        return self._received.mean(self.samples)

    @property
    def target_mean(self) -> NDArray[np.float64]:
        """E[x], (columns,)."""
        return self._original.mean(self.samples) if self.has_target else self.mean

    def second(self) -> NDArray[np.float64]:
        """C, centred: (columns, columns), or its diagonal."""
        self._multiply()
        return self._centred(self._second, self._received, self._received)

    def cross(self) -> NDArray[np.float64]:
        """D, in the shape of C; only with `target_inputs`."""
        self._multiply()
        return self._centred(self._cross, self._original, self._received)

    def target(self) -> NDArray[np.float64]:
        """C₀, in the shape of C; only with `target_inputs`."""
        self._multiply()
        return self._centred(self._target, self._original, self._original)

    def ledoit_wolf(self, second: NDArray[np.float64]) -> float:
        """δ in [0, 1] that brings (1−δ) C + δ μ I closest to the covariance in expectation, μ the mean variance.

        Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
        Multivariate Analysis 2004: δ = (E‖c‖⁴ − ‖C‖²) / (samples · ‖C − μI‖²) for centred samples c. E‖c‖⁴ follows
        from E‖y‖⁴ and E[‖y‖² y] about any other point. `second` is C, full.
        """
        if self.samples == 2:  # ± one vector, whose direction says nothing about correlations
            return 1.0
        off = self._received.total / self.samples
        squared_norm = float(off @ off)
        trace = float(np.trace(second))
        fourth = (
            self._fourth / self.samples
            - 4 * float(off @ self._squares_times_inputs) / self.samples
            + 4 * float(off @ second @ off)
            + squared_norm * (2 * trace + 3 * squared_norm)
        )
        frobenius = float(np.vdot(second, second))
        distance = frobenius - trace**2 / self.columns
        if distance <= 0:
            return 0.0
        return float(np.clip((fourth - frobenius) / (self.samples * distance), 0.0, 1.0))

    def _start(self, columns: int, has_target: bool) -> None:
        self.columns, self.has_target = columns, has_target
        if self._decides:
            self.diagonal = 3 * columns**2 * np.dtype(np.float64).itemsize > MOST_FULL_BYTES
        shape = (columns,) if self.diagonal else (columns, columns)
        self._second = np.zeros(shape)
        self._squares_times_inputs = np.zeros(columns)
        if has_target:
            self._cross, self._target = np.zeros(shape), np.zeros(shape)

    def _add(self, received: NDArray[Any], original: NDArray[Any] | None) -> None:
        y = self._received.add(received)
        self.samples += len(y)
        self._waiting.append((y,) if original is None else (y, self._original.add(original)))
        if not self.diagonal:
            squares = np.einsum("sc,sc->s", y, y)
            self._squares_times_inputs += squares @ y
            self._fourth += float(squares @ squares)
        if self.diagonal or sum(waiting[0].size for waiting in self._waiting) >= _BLOCK_ENTRIES:
            self._multiply()

    def _multiply(self) -> None:
        """Adds the products of the samples that wait."""
        if not self._waiting:
            return
        y, *originals = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._second += self._product(y, y)
        for z in originals:
            self._cross += self._product(z, y)
            self._target += self._product(z, z)

    def _product(self, left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum("sc,sc->c", left, right) if self.diagonal else left.T @ right

    def _centred(self, total: NDArray[np.float64], left: _Shifted, right: _Shifted) -> NDArray[np.float64]:
        centred = total / self.samples
        centred -= outer(left.total / self.samples, right.total / self.samples, total.ndim)
        return centred


class _Shifted:
    """The sum of samples about the mean of the first block."""

    def __init__(self) -> None:
        self.shift: NDArray[np.float64] | None = None
        self.total: NDArray[np.float64] = np.zeros(0)

    def add(self, block: NDArray[Any]) -> NDArray[np.float64]:
        """The block's samples, shifted, in float64."""
        if self.shift is None:
            self.shift = block.mean(axis=0, dtype=np.float64)
            self.total = np.zeros_like(self.shift)
        shifted = block - self.shift
        self.total += shifted.sum(axis=0)
        return np.asarray(shifted, dtype=np.float64)

    def mean(self, samples: int) -> NDArray[np.float64]:
        assert self.shift is not None
        return self.shift + self.total / samples


def to_numpy(value: Any) -> Any:
    """A torch tensor as an array, half precision as float32; anything else as it is."""
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    return (tensor.float() if tensor.element_size() < 4 else tensor).numpy()


def outer(left: NDArray[np.float64], right: NDArray[np.float64], dimensions: int) -> NDArray[np.float64]:
    """left rightᵀ, or its diagonal where that is all that is kept."""
    return left * right if dimensions == 1 else np.outer(left, right)


def _checked(name: str, samples: ArrayLike) -> NDArray[Any]:
    """Finite numbers (samples, columns) in their own precision."""
    try:
        array = np.asarray(to_numpy(samples))
    except ValueError:
        raise InvalidArgument(name, "ragged samples", "(samples, columns)") from None
    if array.dtype.kind not in "fiub":
        raise InvalidArgument(name, f"samples of dtype {array.dtype}", "an array of numbers")
    if array.ndim != 2 or array.shape[1] == 0:
        raise InvalidArgument(name, f"shape {array.shape}", "(samples, columns)")
    if not all(np.isfinite(array[rows]).all() for rows in _blocks(array)):
        raise InvalidArgument(name, "NaN or infinite entries", "finite numbers")
    return array


def _blocks(samples: NDArray[Any]) -> Iterator[slice]:
    height = max(1, _BLOCK_ENTRIES // samples.shape[1])
    return (slice(first, first + height) for first in range(0, len(samples), height))
