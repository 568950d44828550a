"""One layer as data: weights, owners of its inputs, capacities, moments. Validated once, in `LayerProblem.create`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.moments import Moments, with_ridge

_CACHED_ENTRIES = 1 << 16
Weight: TypeAlias = Any  # NDArray[np.floating] or sparse.csr_array; SciPy ships no types


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """m neurons to place on P workers, n input values with known owners; data only, trusted once created.

    The weight has rows and columns; row r belongs to neuron `row_neuron[r]`, column c to value `column_value[c]`
    (both the identity for a linear layer).
    """

    weight: Weight
    """W, (rows, columns), float32 or float64; dense, or csr_array."""
    input_owner: NDArray[np.int64]
    """(n,) worker that holds each input value."""
    capacity: NDArray[np.float64]
    """(P,) largest load of each worker; 0 for a worker that takes no neuron."""
    load: NDArray[np.float64]
    """(m,) load of each neuron."""
    min_load: NDArray[np.float64]
    """(P,) smallest load of each worker."""
    allowed: NDArray[np.bool_]
    """(m, P) places that each neuron may take."""
    value_bytes: NDArray[np.int64]
    """(n,) bytes of each input value."""
    link_price: NDArray[np.float64]
    """(P, P) price of a byte from worker p (row) to worker k (column); 0 on the diagonal."""
    bias: NDArray[np.float64]
    """(rows,)"""
    moments: Moments
    output_weight: NDArray[np.float64]
    """g, (rows,): what a squared error of each row counts."""
    column_value: NDArray[np.int64]
    """(columns,)"""
    row_neuron: NDArray[np.int64]
    """(rows,)"""
    broadcast: bool = False
    """Whether one send reaches all workers, so that a number that several receive counts once."""

    @property
    def m(self) -> int:
        """Neurons."""
        return len(self.load)

    @property
    def n(self) -> int:
        """Input values."""
        return len(self.input_owner)

    @property
    def P(self) -> int:  # noqa: N802
        """Workers."""
        return len(self.capacity)

    @property
    def rows(self) -> int:
        return int(self.weight.shape[0])

    @property
    def columns(self) -> int:
        return int(self.weight.shape[1])

    @property
    def is_sparse(self) -> bool:
        return sparse.issparse(self.weight)

    @cached_property
    def has_equal_loads(self) -> bool:
        return bool((self.load == self.load[0]).all())

    @cached_property
    def slots(self) -> NDArray[np.int64]:
        """(P,) neurons that fit on each worker; meaningful for equal loads."""
        return _whole(self.capacity / self.load[0], np.floor)

    @cached_property
    def min_slots(self) -> NDArray[np.int64]:
        """(P,) neurons that each worker must take; meaningful for equal loads."""
        return _whole(self.min_load / self.load[0], np.ceil)

    @cached_property
    def unweighted(self) -> LayerProblem:
        """The problem with g = 1, as the NMSE sees it."""
        if (self.output_weight == 1).all():
            return self
        return replace(self, output_weight=np.ones(self.rows))

    @cached_property
    def column_home(self) -> NDArray[np.int64]:
        """(columns,) worker that holds each column's value."""
        return self.input_owner[self.column_value]

    @cached_property
    def one_column_per_value(self) -> bool:
        return self.columns == self.n and bool((self.column_value == np.arange(self.n)).all())

    @cached_property
    def value_columns(self) -> NDArray[np.int64] | None:
        """(n, b) columns of each value, ascending; None where values have different numbers of columns."""
        counts = np.bincount(self.column_value, minlength=self.n)
        if (counts != counts[0]).any():
            return None
        return np.argsort(self.column_value, kind="stable").reshape(self.n, -1)

    @cached_property
    def number_bytes(self) -> NDArray[np.int64]:
        """(P,) bytes of one number of a code from each worker, as of its values; −1 where those differ in size."""
        largest, smallest = np.zeros(self.P, dtype=np.int64), np.full(self.P, np.iinfo(np.int64).max)
        np.maximum.at(largest, self.input_owner, self.value_bytes)
        np.minimum.at(smallest, self.input_owner, self.value_bytes)
        return np.where(largest > smallest, -1, largest)

    @cached_property
    def remote(self) -> NDArray[np.bool_]:
        """(n, P) whether value j is held by another worker than k."""
        return self.input_owner[:, None] != np.arange(self.P)

    @cached_property
    def transfer_bytes(self) -> NDArray[np.int64]:
        """(n, P) bytes of sending value j to worker k, 0 where k holds it."""
        return np.where(self.remote, self.value_bytes[:, None], 0)

    @cached_property
    def transfer_price(self) -> NDArray[np.float64]:
        """(n, P) value_bytes · link_price, 0 where worker k holds value j."""
        return self.value_bytes[:, None] * self.link_price[self.input_owner]

    @cached_property
    def direct_volume(self) -> int:
        """Bytes that the dense layer needs: every value to every other worker that has capacity."""
        needed = self.transfer_bytes[:, self.capacity > 0]
        return int(needed.max(axis=1, initial=0).sum() if self.broadcast else needed.sum())

    @cached_property
    def target_weight(self) -> Weight:
        """W̃ = W (D+λI)(C+λI)⁻¹, (rows, columns): what best predicts the original output from x̂."""
        moments = self.moments
        if moments.same_inputs:
            return self.weight
        if moments.is_diagonal:
            scale = (moments.cross + moments.ridge) / moments.variance
            if self.is_sparse:
                return self.weight.multiply(scale).tocsr()
            return by_row_blocks(self, lambda rows: (self.weight[rows] * scale).astype(self.weight.dtype, copy=False))
        target = np.linalg.solve(moments.regularised, self.predicted_moment.T).T
        return type(self.weight)(target) if self.is_sparse else target

    @cached_property
    def predicted_moment(self) -> NDArray[np.float64]:
        """W̃ (C+λI) = W (D+λI), (rows, columns), dense: covariance of the original output with x̂."""
        return np.asarray(_times(self.weight, with_ridge(self.moments.cross, self.moments.ridge)))

    @cached_property
    def output_energy(self) -> NDArray[np.float64]:
        """Diagonal of W (C₀+λI) Wᵀ, (rows,)."""
        moments = self.moments
        if moments.is_diagonal:
            return weighted_squares(self, self.weight, with_ridge(moments.target, moments.ridge))
        if moments.target is moments.cross:
            product = self.predicted_moment
        else:
            product = np.asarray(_times(self.weight, with_ridge(moments.target, moments.ridge)))
        return np.einsum("rc,rc->r", product, dense(self.weight))

    @staticmethod
    def create(
        weight: Any,
        n_workers: int,
        *,
        input_owner: ArrayLike | None = None,
        moments: Moments | None = None,
        bias: ArrayLike | None = None,
        capacity: ArrayLike | None = None,
        load: ArrayLike | None = None,
        min_load: ArrayLike | None = None,
        allowed: ArrayLike | None = None,
        value_bytes: ArrayLike | None = None,
        link_price: ArrayLike | None = None,
        output_weight: ArrayLike | None = None,
        column_value: ArrayLike | None = None,
        row_neuron: ArrayLike | None = None,
        broadcast: bool = False,
    ) -> LayerProblem:
        """Check every argument, fill in the defaults and copy nothing that need not be copied.

        `weight` is (rows, columns): NumPy, torch or SciPy sparse; or a convolution's (m, n, kh, kw), unfolded to
        n·kh·kw columns. Defaults: inputs held in contiguous equal runs, capacity ⌈total load / P⌉ each, loads of 1,
        every place allowed, value_bytes the weight's itemsize, link prices of 1.

        Raises InvalidArgument.
        """
        P = _count("n_workers", n_workers)
        matrix, itemsize, unfolded = _weight(weight)
        rows, columns = matrix.shape
        if unfolded is not None and column_value is None:
            column_value = unfolded
        values = _members("column_value", column_value, columns)
        neurons = _members("row_neuron", row_neuron, rows)
        n, m = int(values.max()) + 1, int(neurons.max()) + 1
        owner = np.arange(n) * P // n if input_owner is None else _integers("input_owner", input_owner, (n,))
        if ((owner < 0) | (owner >= P)).any():
            raise InvalidArgument("input_owner", f"worker {owner[(owner < 0) | (owner >= P)][0]}", f"0 … {P - 1}")
        loads = checked_numbers("load", load, (m,), default=1.0)
        if (loads <= 0).any():
            raise InvalidArgument("load", f"{loads.min():g}", "positive loads")
        share = float(loads.sum() / P + loads.max() * (1 - 1 / P))  # any list of loads fits (Graham 1966)
        if (loads == loads[0]).all():
            share = float(np.ceil(m / P) * loads[0])  # room for whole neurons
        capacities = checked_numbers("capacity", capacity, (P,), default=share, infinite=True)
        prices = checked_numbers("link_price", link_price, (P, P), default=1.0).copy()
        np.fill_diagonal(prices, 0.0)
        sizes = _integers("value_bytes", itemsize if value_bytes is None else value_bytes, (n,))
        if (sizes < 0).any():
            raise InvalidArgument("value_bytes", int(sizes.min()), "bytes ≥ 0")
        moments = Moments.identity(columns) if moments is None else moments
        if len(moments.second) != columns:
            raise InvalidArgument(
                "inputs or second_moment", f"{len(moments.second)} columns", f"the weight's {columns}"
            )
        problem = LayerProblem(
            weight=matrix,
            input_owner=owner,
            capacity=capacities,
            load=loads,
            min_load=checked_numbers("min_load", min_load, (P,), default=0.0),
            allowed=_allowed(allowed, m, P),
            value_bytes=sizes,
            link_price=prices,
            bias=checked_numbers("bias", bias, (rows,), default=0.0, negative=True),
            moments=moments,
            output_weight=checked_numbers("output_weight", output_weight, (rows,), default=1.0),
            column_value=values,
            row_neuron=neurons,
            broadcast=broadcast,
        )
        _check_capacities(problem)
        return problem


def dense(weight: Weight) -> NDArray[Any]:
    """The weight as an ndarray; no copy where it is one already."""
    return weight.toarray() if sparse.issparse(weight) else weight


def row_blocks(problem: LayerProblem) -> Iterator[slice]:
    """Slices of rows small enough that a block of the weight, in float64, stays in cache.

    Whatever is computed from a dense weight goes block by block: of a float32 weight, NumPy would make a float64 copy.
    """
    height = max(1, _CACHED_ENTRIES // problem.columns)
    return (slice(first, first + height) for first in range(0, problem.rows, height))


def by_row_blocks(problem: LayerProblem, of_block: Callable[[slice], NDArray[Any]]) -> NDArray[Any]:
    """(rows, …) what a function gives for each block of rows."""
    blocks = row_blocks(problem)
    first = of_block(next(blocks))
    whole = np.empty((problem.rows, *first.shape[1:]), dtype=first.dtype)
    whole[: len(first)] = first
    for rows in blocks:
        whole[rows] = of_block(rows)
    return whole


def times(problem: LayerProblem, weight: Weight, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows,) product of W or V with a vector (columns,)."""
    if sparse.issparse(weight):
        return np.asarray(weight @ vector, dtype=np.float64)
    return by_row_blocks(problem, lambda rows: weight[rows] @ vector)


def weighted_squares(problem: LayerProblem, weight: Weight, vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows,) product of the squares of W or V with a vector (columns,)."""
    if sparse.issparse(weight):
        return np.asarray(weight.multiply(weight) @ vector, dtype=np.float64)
    return by_row_blocks(problem, lambda rows: np.square(weight[rows], dtype=np.float64) @ vector)


def _times(weight: Weight, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """weight @ matrix, or weight @ diag(matrix), dense."""
    if matrix.ndim == 2:
        return weight @ matrix
    return weight.multiply(matrix).toarray() if sparse.issparse(weight) else weight * matrix


def _whole(ratio: NDArray[np.float64], rounding: Any) -> NDArray[np.int64]:
    # 0.3 / 0.1 is 2.999…: a ratio within rounding of a whole number is that number.
    nearest = np.round(ratio)
    exact = np.where(np.isclose(ratio, nearest, rtol=0, atol=1e-9), nearest, rounding(ratio))
    return np.minimum(exact, 2**31).astype(np.int64)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InvalidArgument(name, repr(value), "a whole number ≥ 1")
    return int(value)


def _weight(weight: Any) -> tuple[Weight, int, NDArray[np.int64] | None]:
    """The weight as float32/64 (rows, columns), its original itemsize, and the column_value of an unfolded one."""
    if hasattr(weight, "detach"):
        if str(weight.layout) != "torch.strided":
            raise InvalidArgument("weight", f"a {weight.layout} tensor", "a dense tensor, or a SciPy sparse matrix")
        tensor = weight.detach().cpu()
        itemsize = tensor.element_size()
        weight = (tensor.float() if itemsize < 4 else tensor).numpy()
    else:
        weight = sparse.csr_array(weight) if sparse.issparse(weight) else _array("weight", weight)
        itemsize = weight.dtype.itemsize
    if weight.dtype.kind not in "fiub":
        raise InvalidArgument("weight", f"dtype {weight.dtype}", "real numbers")
    entries = weight.data if sparse.issparse(weight) else weight
    if not np.isfinite(entries).all():
        raise InvalidArgument("weight", "NaN or infinite entries", "finite numbers")
    if weight.ndim not in (2, 4) or 0 in weight.shape:
        raise InvalidArgument("weight", f"shape {weight.shape}", "(rows, columns) or (m, n, kh, kw), none of them 0")
    precision = np.float32 if weight.dtype in (np.float32, np.float16) else np.float64
    if sparse.issparse(weight):
        matrix = sparse.csr_array(weight, dtype=precision, copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return matrix, itemsize, None
    unfolded = None
    if weight.ndim == 4:
        unfolded = np.repeat(np.arange(weight.shape[1]), weight.shape[2] * weight.shape[3])
        weight = weight.reshape(len(weight), -1)
    return weight.astype(precision, copy=False), itemsize, unfolded


def _members(name: str, value: ArrayLike | None, length: int) -> NDArray[np.int64]:
    if value is None:
        return np.arange(length)
    members = _integers(name, value, (length,))
    if not np.array_equal(np.unique(members), np.arange(members.max() + 1)):
        raise InvalidArgument(name, f"{members.min()} … {members.max()} with gaps", "every number from 0 without gaps")
    return members


def _array(name: str, value: Any, dtype: Any = None) -> NDArray[Any]:
    try:
        return np.asarray(value, dtype=dtype)
    except (TypeError, ValueError):
        raise InvalidArgument(name, f"a {type(value).__name__} that is no array of numbers", "numbers") from None


def _integers(name: str, value: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.int64]:
    array = _array(name, value)
    if array.dtype.kind not in "iu":
        raise InvalidArgument(name, f"dtype {array.dtype}", "whole numbers")
    if array.shape not in ((), shape):
        raise InvalidArgument(name, f"shape {array.shape}", f"shape {shape}")
    return np.broadcast_to(array, shape).astype(np.int64)


def checked_numbers(
    name: str,
    value: ArrayLike | None,
    shape: tuple[int, ...],
    *,
    default: float,
    negative: bool = False,
    infinite: bool = False,
) -> NDArray[np.float64]:
    if value is None:
        return np.full(shape, default)
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    array = _array(name, value, np.float64)
    if array.shape not in ((), shape):
        raise InvalidArgument(name, f"shape {array.shape}", f"shape {shape}")
    if np.isnan(array).any() or (not infinite and not np.isfinite(array).all()):
        raise InvalidArgument(name, "NaN or infinite entries", "finite numbers")
    if not negative and (array < 0).any():
        raise InvalidArgument(name, f"{array.min():g}", "numbers ≥ 0")
    return np.broadcast_to(array, shape).astype(np.float64)


def _allowed(value: ArrayLike | None, m: int, P: int) -> NDArray[np.bool_]:
    if value is None:
        return np.ones((m, P), dtype=bool)
    array = _array("allowed", value)
    if array.shape != (m, P) or array.dtype != bool:
        raise InvalidArgument("allowed", f"{array.dtype} of shape {array.shape}", f"bool of shape {(m, P)}")
    return array.copy()


def _check_capacities(problem: LayerProblem) -> None:
    """Refuse what no placement can satisfy by counting alone; `allowed` may still make it infeasible."""
    total, room = problem.load.sum(), problem.capacity.sum()
    if room < total * (1 - 1e-9):
        raise InvalidArgument("capacity", f"{room:g} in all", f"at least the total load, {total:g}")
    if (problem.min_load > problem.capacity).any():
        k = int(np.argmax(problem.min_load - problem.capacity))
        raise InvalidArgument("min_load", f"{problem.min_load[k]:g} on worker {k}", "at most its capacity")
    if problem.min_load.sum() > total * (1 + 1e-9):
        raise InvalidArgument("min_load", f"{problem.min_load.sum():g} in all", f"at most the total load, {total:g}")
    if problem.has_equal_loads and problem.slots.sum() < problem.m:
        raise InvalidArgument(
            "capacity", f"room for {problem.slots.sum()} neurons of load {problem.load[0]:g}", f"all {problem.m}"
        )
    if problem.has_equal_loads and (problem.min_slots.sum() > problem.m or (problem.min_slots > problem.slots).any()):
        raise InvalidArgument("min_load", "more neurons than there are or fit", "min_load ≤ what capacity holds")
    fits = problem.allowed & (problem.load[:, None] <= problem.capacity * (1 + 1e-9))
    if not fits.any(axis=1).all():
        i = int(np.flatnonzero(~fits.any(axis=1))[0])
        name = "allowed" if not problem.allowed[i].any() or problem.has_equal_loads else "capacity"
        raise InvalidArgument(name, f"no place for neuron {i}", "a worker with room for each neuron")
