"""RadiX-Nets (Robinett and Kepner 2019, arXiv 1905.00416): sparse layers of mixed-radix numeral systems."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np
from scipy import sparse


def radix_layer(neurons: int, radix: int, stride: int) -> sparse.csr_array:
    """(neurons, neurons) layer in which neuron i reads the inputs i − d·stride, d = 0 … radix−1, modulo `neurons`."""
    rows = np.repeat(np.arange(neurons), radix)
    columns = (rows - np.tile(np.arange(radix), neurons) * stride) % neurons
    return sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(neurons, neurons))


def radix_net(radices: tuple[int, ...], layers: int, *, seed: int) -> Iterator[sparse.csr_array]:
    """Layers of a RadiX-Net of the product of the radices, its numeral system repeated, every layer's neurons permuted.

    The first layer's inputs keep their order.
    """
    rng = np.random.default_rng(seed)
    neurons = prod(radices)
    strides = [prod(radices[:place]) for place in range(len(radices))]
    order = np.arange(neurons)
    for number in range(layers):
        place = number % len(radices)
        layer = radix_layer(neurons, radices[place], strides[place])
        following = rng.permutation(neurons)
        yield layer[following][:, order].tocsr()
        order = following
