"""First and second moments of a layer's inputs: all that placement and pruning need of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cholesky

from repurpose_opt.accumulator import MomentAccumulator, outer
from repurpose_opt.errors import InvalidArgument

RELATIVE_RIDGE = 1e-3
"""Default λ, as a fraction of the mean variance of an input."""
FEW_SAMPLES = 4
"""Full moments of fewer samples than this many a column are shrunk, unless the caller says otherwise.

On layers of an MNIST network the error on other images falls to a third with a quarter of a sample a column, by an
eighth with one, by 1 to 3 % with four, and not with six.
"""


@dataclass(frozen=True)
class Moments:
    """Centred moments of the inputs x (original network) and x̂ (what the layer really receives).

    Each matrix is (columns, columns), or (columns,) where only the diagonal is known.
    `second` is C = E[x̂x̂ᵀ], `cross` is D = E[xx̂ᵀ], `target` is C₀ = E[xxᵀ], all centred;
    `mean` is E[x̂], `target_mean` is E[x], each (columns,). Where x̂ = x the three are one array.
    `ridge` is λ ≥ 0: optimisation uses C+λI, D+λI, C₀+λI, which adds λ‖W−V‖² to the error.
    `samples` is how many they were taken from (None: not known), `shrinkage` the δ that is in C, D and C₀ already:
    each is (1−δ) times what was measured plus δ μ I, μ the mean measured variance of x̂. The error is then (1−δ) times
    the measured one plus δ μ ‖W−V‖², so like the ridge it pulls V towards W, not towards 0.
    """

    second: NDArray[np.float64]
    cross: NDArray[np.float64]
    target: NDArray[np.float64]
    mean: NDArray[np.float64]
    target_mean: NDArray[np.float64]
    ridge: float = 0.0
    samples: int | None = None
    shrinkage: float = 0.0

    @property
    def is_diagonal(self) -> bool:
        return self.second.ndim == 1

    @property
    def same_inputs(self) -> bool:
        """Whether x̂ = x, so that the target weights are the given ones."""
        return self.cross is self.second

    @property
    def choice(self) -> dict[str, Any]:
        """What was chosen for the caller: `moments` ("full", "diagonal", "identity"), samples, shrinkage, ridge."""
        kind = "diagonal" if self.is_diagonal else "full"
        if self.is_diagonal and self.same_inputs and self.ridge == 0 and (self.second == 1).all():
            kind = "identity"
        return {"moments": kind, "samples": self.samples, "shrinkage": self.shrinkage, "ridge": self.ridge}

    @cached_property
    def variance(self) -> NDArray[np.float64]:
        """Diagonal of C+λI, (columns,)."""
        diagonal = self.second if self.is_diagonal else np.diagonal(self.second)
        return diagonal + self.ridge

    @cached_property
    def regularised(self) -> NDArray[np.float64]:
        """C+λI, in the shape of `second`."""
        return with_ridge(self.second, self.ridge)

    @staticmethod
    def identity(columns: int) -> Moments:
        """C = D = C₀ = I and zero means: the error is then ‖W−V‖²."""
        ones, zeros = np.ones(columns), np.zeros(columns)
        return Moments(ones, ones, ones, zeros, zeros)

    @staticmethod
    def from_samples(
        inputs: ArrayLike,
        target_inputs: ArrayLike | None = None,
        *,
        shrinkage: float | None = None,
        diagonal: bool | None = None,
    ) -> Moments:
        """Moments of samples: `inputs` (samples, columns) is x̂, `target_inputs` is x (x̂ if omitted).

        `shrinkage` and `diagonal` are those of `of`. Raises InvalidArgument.
        """
        sums = MomentAccumulator(diagonal)
        sums.add(inputs, target_inputs)
        return Moments.of(sums, shrinkage)

    @staticmethod
    def from_batches(
        batches: Iterable[Any], *, shrinkage: float | None = None, diagonal: bool | None = None
    ) -> Moments:
        """Moments of any iterable of batches, a torch DataLoader for instance, read once and never held together.

        A batch is (samples, columns), NumPy or torch; or a tuple or list of one, or of two such arrays: x̂ and x.
        `shrinkage` and `diagonal` are those of `of`. Raises InvalidArgument.
        """
        sums = MomentAccumulator(diagonal)
        for batch in batches:
            sums.add(*_parts(batch))
        return Moments.of(sums, shrinkage)

    @staticmethod
    def of(sums: MomentAccumulator, shrinkage: float | None = None) -> Moments:
        """The moments of what was summed, with the default ridge.

        `shrinkage` δ in [0, 1] moves C, D and C₀ towards μI. None: Ledoit and Wolf's δ for full moments of fewer
        than FEW_SAMPLES samples a column, else 0. Raises InvalidArgument.
        """
        if sums.samples < 2:
            got = "no samples" if sums.samples == 0 else "one sample"
            raise InvalidArgument("inputs", got, "two samples or more: one has no variance")
        if shrinkage is not None and not (isinstance(shrinkage, (int, float, np.number)) and 0 <= shrinkage <= 1):
            raise InvalidArgument("shrinkage", repr(shrinkage), "a number in [0, 1], or None")
        second = sums.second()
        cross, target = (sums.cross(), sums.target()) if sums.has_target else (second, second)
        if shrinkage is None:
            few = not sums.diagonal and sums.samples < FEW_SAMPLES * sums.columns
            shrinkage = sums.ledoit_wolf(second) if few else 0.0
        if shrinkage > 0:
            added = shrinkage * float(_diagonal(second).mean())
            for matrix in (second, cross, target) if sums.has_target else (second,):
                matrix *= 1 - shrinkage
                _diagonal(matrix)[:] += added
        moments = with_default_ridge(second, cross, target, sums.mean, sums.target_mean)
        return replace(moments, samples=sums.samples, shrinkage=shrinkage)

    @staticmethod
    def from_raw(
        second_moment: ArrayLike,
        cross_moment: ArrayLike | None = None,
        input_mean: ArrayLike | None = None,
        target_moment: ArrayLike | None = None,
        target_mean: ArrayLike | None = None,
    ) -> Moments:
        """Centre raw moments E[x̂x̂ᵀ], E[xx̂ᵀ], E[xxᵀ] (square, or their diagonals) by the means given."""
        second = _finite("second_moment", second_moment)
        if second.ndim not in (1, 2) or (second.ndim == 2 and second.shape[0] != second.shape[1]):
            raise InvalidArgument("second_moment", f"shape {second.shape}", "(columns, columns) or (columns,)")
        _check_symmetric_nonnegative("second_moment", second)
        columns = len(second)
        mean = np.zeros(columns) if input_mean is None else _finite("input_mean", input_mean, (columns,))
        centred = second - outer(mean, mean, second.ndim)
        _check_semidefinite("second_moment or input_mean", centred, mean)
        if cross_moment is None:
            for name, given in (("target_moment", target_moment), ("target_mean", target_mean)):
                if given is not None:
                    raise InvalidArgument(name, "a value without cross_moment", "cross_moment with it, or neither")
            return with_default_ridge(centred, centred, centred, mean, mean)
        if target_moment is None:
            raise InvalidArgument("target_moment", None, "E[xxᵀ] whenever cross_moment is given")
        original = mean if target_mean is None else _finite("target_mean", target_mean, (columns,))
        cross = _finite("cross_moment", cross_moment, second.shape) - outer(original, mean, second.ndim)
        target = _finite("target_moment", target_moment, second.shape)
        _check_symmetric_nonnegative("target_moment", target)
        target = target - outer(original, original, second.ndim)
        _check_semidefinite("target_moment or target_mean", target, original)
        return with_default_ridge(centred, cross, target, mean, original)


def with_ridge(matrix: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """matrix + λI for a square matrix, matrix + λ for a diagonal."""
    if ridge == 0:
        return matrix
    if matrix.ndim == 1:
        return matrix + ridge
    regularised = matrix.copy()
    np.fill_diagonal(regularised, np.diagonal(matrix) + ridge)
    return regularised


def lower_factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Its lower Cholesky factor. Raises InvalidArgument where it is not positive definite."""
    try:
        return np.asarray(cholesky(covariance, lower=True))
    except LinAlgError:
        raise InvalidArgument("second_moment", "an indefinite matrix", "a positive semidefinite one") from None


def with_default_ridge(
    second: NDArray[np.float64],
    cross: NDArray[np.float64],
    target: NDArray[np.float64],
    mean: NDArray[np.float64],
    target_mean: NDArray[np.float64],
) -> Moments:
    """Moments with λ = RELATIVE_RIDGE · mean variance (tiny but positive where all inputs are constant)."""
    return Moments(second, cross, target, mean, target_mean, _default_ridge(second, mean))


def _default_ridge(second: NDArray[np.float64], mean: NDArray[np.float64]) -> float:
    variance = second if second.ndim == 1 else np.diagonal(second)
    rounding = 1e-13 * float(np.square(mean).mean())  # what centring leaves of constant inputs
    return max(RELATIVE_RIDGE * float(variance.mean()), rounding) or 1e-12


def _finite(name: str, value: ArrayLike, shape: tuple[int, ...] | None = None) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidArgument(name, "something that is not numbers", "an array of numbers") from None
    if shape is not None and array.shape != shape:
        raise InvalidArgument(name, f"shape {array.shape}", f"shape {shape}")
    if not np.isfinite(array).all():
        raise InvalidArgument(name, "NaN or infinite entries", "finite numbers")
    return array


def _parts(batch: Any) -> tuple[Any, ...]:
    """The arrays of a batch: x̂, or x̂ and x."""
    is_pair = isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2 and _dimensions(batch[0]) == 2
    return tuple(batch) if is_pair else (batch,)


def are_batches(inputs: Any) -> bool:
    """Whether inputs are an iterable of batches, not one array (or nested lists) of samples."""
    if hasattr(inputs, "ndim") or isinstance(inputs, (str, bytes)):
        return False
    return _dimensions(inputs) > 2 if isinstance(inputs, (tuple, list)) else isinstance(inputs, Iterable)


def _dimensions(value: Any) -> int:
    if hasattr(value, "ndim"):
        return int(value.ndim)
    return 1 + _dimensions(value[0]) if isinstance(value, (tuple, list)) and value else 0


def _diagonal(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The diagonal as a view that can be written."""
    return matrix if matrix.ndim == 1 else np.einsum("cc->c", matrix)


def _check_symmetric_nonnegative(name: str, matrix: NDArray[np.float64]) -> None:
    diagonal = matrix if matrix.ndim == 1 else np.diagonal(matrix)
    if (diagonal < 0).any():
        raise InvalidArgument(name, f"{diagonal.min():.3g} on its diagonal", "non-negative second moments")
    if matrix.ndim == 2 and not np.allclose(matrix, matrix.T, rtol=1e-5, atol=1e-8 * max(diagonal.max(), 1e-300)):
        raise InvalidArgument(name, "an unsymmetric matrix", "a symmetric one")


def _check_semidefinite(name: str, centred: NDArray[np.float64], mean: NDArray[np.float64]) -> None:
    """Up to rounding: with the ridge it must have a Cholesky factor."""
    variance = centred if centred.ndim == 1 else np.diagonal(centred)
    slack = _default_ridge(centred, mean)
    try:
        wrong = variance.min() < -slack
        if not wrong and centred.ndim == 2:
            np.linalg.cholesky(with_ridge(centred, slack))
    except np.linalg.LinAlgError:
        wrong = True
    if wrong:
        raise InvalidArgument(name, "no covariance once centred", "E[xxᵀ] ≽ E[x]E[x]ᵀ of the same samples")
