"""`radix-net`: Lossless on layers of RadiX-Nets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import prod

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Lossless
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.pairs import Built, Case, pairs
from repurpose_opt_benchmarks.patterns import uneven_capacity
from repurpose_opt_benchmarks.radix_net import radix_net


def _case(radices: tuple[int, ...], workers: int, layer: int, is_even: bool = True) -> Case:
    """The layer of this number, counted from 0, of a net; from 1 on its inputs are permuted."""

    def build(rng: np.random.Generator) -> Built:
        net = radix_net(radices, layer + 1, seed=int(rng.integers(2**31)))
        weight = next(islice(net, layer, None))
        capacity = None if is_even else uneven_capacity(weight.shape[0], workers, rng)
        return LayerProblem.create(weight, workers, capacity=capacity, value_bytes=1), Lossless()

    system = "x".join(map(str, radices))
    marks = (f"n{prod(radices)}", system, f"layer{layer}", f"P{workers}", "" if is_even else "uneven")
    return Case("-".join(filter(None, marks)), "first layer" if layer == 0 else "deeper layer", build)


_CASES = (
    _case((16, 16), 4, 0),
    _case((16, 16), 4, 1),
    _case((4, 4, 4, 4), 8, 2),
    _case((2,) * 8, 4, 7, is_even=False),
    _case((8, 8, 8), 8, 1),
    _case((6, 7, 8), 6, 2, is_even=False),
    _case((32, 32), 8, 0, is_even=False),
    _case((32, 32), 16, 1),
    _case((10, 10, 10), 10, 2),
    _case((2,) * 11, 8, 5),
    _case((16, 8, 16), 16, 1, is_even=False),
    _case((64, 64), 16, 0),
    _case((8, 8, 8, 8), 16, 3),
)


class RadixNet:
    """Layers of RadiX-Nets of several numeral systems, 256 to 4,096 neurons."""

    name = "radix-net"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Lossless on layers of RadiX-Nets"
    description = (
        "Layers of RadiX-Nets (Robinett and Kepner 2019, arXiv 1905.00416) with radices 2 to 64 and 256 to 4,096 "
        "neurons on 4 to 16 workers; capacities tight, some uneven by up to four. A first layer's inputs are in "
        "order, a deeper layer's permuted, as if nothing were known of where the layer before was placed. Every case "
        "comes twice with other permutations, the second judged once."
    )

    def __len__(self) -> int:
        return 2 * len(_CASES)

    def __iter__(self) -> Iterator[Instance]:
        return pairs(self.name, _CASES)
