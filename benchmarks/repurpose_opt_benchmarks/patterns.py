"""Patterns of nonzeros that the test sets are made of: functions (n, P, rng) → (m, n) csr_array of ones.

Inputs are held in contiguous equal runs; the neurons' order says nothing of their place unless a docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt_benchmarks.radix_net import radix_layer

Pattern: TypeAlias = Callable[[int, int, np.random.Generator], sparse.csr_array]


def random(density: float) -> Pattern:
    """Nonzeros anywhere."""
    return lambda n, P, rng: sparse_layer(n, P, density, None, rng)


def planted(density: float, noise: float) -> Pattern:
    """Most nonzeros of a neuron read the inputs of one hidden worker; the share `noise` lies anywhere."""
    return lambda n, P, rng: sparse_layer(n, P, density, noise, rng)


def sparse_layer(
    n: int, workers: int, density: float, noise: float | None, rng: np.random.Generator
) -> sparse.csr_array:
    """An n × n layer of ones; a planted one (noise given) has a hidden worker for each neuron, as many on each.

    O(n²): see `planted_degree` for large layers.
    """
    input_owner = np.arange(n) * workers // n
    chance = np.full((n, n), density)
    if noise is not None:
        hidden = rng.permutation(input_owner)
        at_home = hidden[:, None] == input_owner
        chance = density * (noise + (1 - noise) * workers * at_home)
    return sparse.csr_array((rng.random((n, n)) < chance).astype(np.float64))


def planted_degree(degree: int, noise: float) -> Pattern:
    """`degree` reads a neuron, of its hidden worker's inputs or, for the share `noise`, of any; O(n · degree)."""

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        hidden = rng.permutation(np.arange(n) * P // n)
        first, end = (-(-(hidden + step) * n // P) for step in (0, 1))
        at_home = first[:, None] + np.floor(rng.random((n, degree)) * (end - first)[:, None]).astype(np.int64)
        anywhere = rng.integers(0, n, (n, degree))
        columns = np.where(rng.random((n, degree)) < noise, anywhere, at_home)
        return of_reads(np.repeat(np.arange(n), degree), columns.ravel(), n)

    return build


def banded(width: int, degree: int) -> Pattern:
    """Neuron i reads `degree` inputs within `width` of its hidden place; neurons are shuffled."""

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        rows = np.repeat(np.arange(n), degree)
        columns = (rows + rng.integers(-width, width + 1, len(rows))) % n
        return of_reads(rng.permutation(n)[rows], columns, n)

    return build


def radix(number: int, stride: int) -> Pattern:
    """One layer of a RadiX-Net (2: a butterfly), neurons and inputs shuffled."""
    return lambda n, P, rng: radix_layer(n, number, stride)[rng.permutation(n)][:, rng.permutation(n)].tocsr()


def blocks(size: int, density: float, noise: float) -> Pattern:
    """Blocks of `size` neurons that read `size` inputs with this density, and `noise` reads a neuron anywhere.

    A block's inputs are spread over about three workers; neurons are shuffled.
    """

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        neurons, inputs = rng.permutation(n), _nearly_sorted(n, P, rng)
        inside = rng.random((n, size)) < density
        row, offset = np.nonzero(inside)
        column = row // size * size + offset
        valid = column < n
        extra = rng.integers(0, n, (2, round(noise * n)))
        rows = np.concatenate([neurons[row[valid]], extra[0]])
        return of_reads(rows, np.concatenate([inputs[column[valid]], extra[1]]), n)

    return build


def power_law(degree: float, exponent: float) -> Pattern:
    """Input j of a hidden order is read in proportion to (j+1)^−exponent: few by many neurons, many by few.

    `degree` reads a neuron on average, each neuron at least one.
    """

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        chance = np.arange(1, n + 1) ** -exponent
        ends = np.cumsum(chance) / chance.sum()
        rows = np.concatenate([np.arange(n), rng.integers(0, n, round((degree - 1) * n))])
        drawn = np.minimum(np.searchsorted(ends, rng.random(len(rows))), n - 1)
        return of_reads(rows, rng.permutation(n)[drawn], n)

    return build


def hypercube() -> Pattern:
    """All strides of a fast Fourier transform at once: neuron i reads i and i XOR 2^b; n a power of 2.

    Neurons are shuffled, inputs in order. Without limits on the load, subcubes are the best parts.
    """

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        assert n & (n - 1) == 0
        flips = np.array([0, *(1 << b for b in range(n.bit_length() - 1))])
        columns = np.arange(n)[:, None] ^ flips
        return of_reads(np.repeat(rng.permutation(n), len(flips)), columns.ravel(), n)

    return build


def butterfly(low: int, high: int) -> Pattern:
    """Stages `low` … `high`−1 of a fast Fourier transform as one layer: i reads what differs in these bits only."""

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        flips = np.arange(1 << (high - low)) << low
        columns = (np.arange(n)[:, None] ^ flips).ravel()
        assert columns.max() < n
        return of_reads(np.repeat(rng.permutation(n), len(flips)), columns, n)

    return build


def grid_convolution(side: int, kernel: int, dilation: int = 1, stride: int = 1) -> Pattern:
    """Every position of a side × side picture is an input, every output position a neuron: doubly-blocked Toeplitz.

    Inputs in rows of the picture, neurons shuffled; n = side², m = (side / stride)². No padding: neurons at the
    border read less.
    """

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        assert n == side * side
        centres = np.arange(0, side, stride)
        offsets = (np.arange(kernel) - kernel // 2) * dilation
        y = centres[:, None, None, None] + offsets[None, None, :, None]
        x = centres[None, :, None, None] + offsets[None, None, None, :]
        y, x = np.broadcast_arrays(y, x)
        m = len(centres) ** 2
        row = np.broadcast_to(np.arange(m).reshape(len(centres), len(centres), 1, 1), y.shape)
        inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
        return of_reads(rng.permutation(m)[row[inside]], (y * side + x)[inside], n, m)

    return build


def toeplitz(dilations: tuple[int, ...]) -> Pattern:
    """A convolution of a sequence: neuron i reads i − d for each dilation d, 0 included; neurons shuffled."""

    def build(n: int, P: int, rng: np.random.Generator) -> sparse.csr_array:
        columns = np.arange(n)[:, None] - np.array([0, *dilations])
        inside = columns >= 0
        rows = np.broadcast_to(rng.permutation(n)[:, None], columns.shape)
        return of_reads(rows[inside], columns[inside], n)

    return build


def of_reads(rows: NDArray[np.int64], columns: NDArray[np.int64], n: int, m: int | None = None) -> sparse.csr_array:
    """(m, n) ones where neuron rows[e] reads input columns[e]; repetitions count once; m = n by default."""
    weight = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(n if m is None else m, n))
    weight.sum_duplicates()
    weight.data[:] = 1.0
    return weight


def uneven_capacity(m: int, workers: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """(P,) capacities that differ by up to four times and hold m neurons exactly."""
    share = rng.uniform(0.5, 2.0, workers)
    ends = np.rint(np.cumsum(share) / share.sum() * m).astype(np.int64)
    return np.diff(ends, prepend=0)


def _nearly_sorted(n: int, P: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """A permutation in which most numbers are about a worker's run away from their place."""
    return np.argsort(np.arange(n) + rng.normal(scale=n / P, size=n), kind="stable")
