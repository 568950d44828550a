"""`lossless-structured`: Lossless on patterns with a structure that a partitioner can find."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Lossless
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.pairs import Built, Case, pairs
from repurpose_opt_benchmarks.patterns import (
    Pattern,
    banded,
    blocks,
    butterfly,
    grid_convolution,
    hypercube,
    planted_degree,
    power_law,
    toeplitz,
    uneven_capacity,
)


def _case(kind: str, n: int, workers: int, pattern: Pattern, detail: str = "", is_even: bool = True) -> Case:
    def build(rng: np.random.Generator) -> Built:
        weight = pattern(n, workers, rng)
        capacity = None if is_even else uneven_capacity(weight.shape[0], workers, rng)
        return LayerProblem.create(weight, workers, capacity=capacity, value_bytes=1), Lossless()

    marks = (kind, detail, f"n{n}", f"P{workers}", "" if is_even else "uneven")
    return Case("-".join(filter(None, marks)), kind, build)


_CASES = (
    _case("planted", 64, 3, planted_degree(6, 0.3)),
    _case("planted", 512, 6, planted_degree(8, 0.4), is_even=False),
    _case("planted", 2048, 16, planted_degree(10, 0.4)),
    _case("banded", 128, 4, banded(12, 5)),
    _case("banded", 1024, 8, banded(60, 8), is_even=False),
    _case("blocks", 128, 4, blocks(8, 0.5, 1.0)),
    _case("blocks", 512, 8, blocks(16, 0.4, 1.5), is_even=False),
    _case("blocks", 2048, 8, blocks(32, 0.2, 2.0)),
    _case("power-law", 256, 4, power_law(4, 0.8)),
    _case("power-law", 1024, 8, power_law(6, 1.0), is_even=False),
    _case("power-law", 2048, 16, power_law(5, 0.6)),
    _case("fft", 64, 4, hypercube(), "hypercube"),
    _case("fft", 256, 8, butterfly(3, 6), "stages", is_even=False),
    _case("fft", 1024, 8, hypercube(), "hypercube"),
    _case("fft", 2048, 16, butterfly(5, 9), "stages"),
    _case("convolution", 256, 4, grid_convolution(16, 3), "3x3"),
    _case("convolution", 1024, 6, grid_convolution(32, 3, dilation=2), "3x3-dilated", is_even=False),
    _case("convolution", 2025, 8, grid_convolution(45, 5, stride=3), "5x5-stride3"),
    _case("toeplitz", 512, 5, toeplitz((1, 2, 4, 8, 16)), is_even=False),
    _case("toeplitz", 2048, 8, toeplitz((1, 33, 197, 730))),
)


class LosslessStructured:
    """Planted, banded, block, power-law, FFT and convolution patterns, n = 64 to 2,048."""

    name = "lossless-structured"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Lossless on structured layers: planted, banded, blocks, power law, FFT, convolutions"
    description = (
        "Layers of 64 to 2,048 inputs on 3 to 16 workers, values of one byte, neurons shuffled, capacities tight: "
        "each the same, or uneven by up to four. Most have a placement far better than a random one. Every case comes "
        "twice, the second judged once; those of fft, convolution and toeplitz differ in the order of neurons and in "
        "uneven capacities only."
    )

    def __len__(self) -> int:
        return 2 * len(_CASES)

    def __iter__(self) -> Iterator[Instance]:
        return pairs(self.name, _CASES)
