"""`default`: the instances of the default benchmark, a selection from the other test sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from repurpose_opt.bench.testset import Instance, Settings, TestSet
from repurpose_opt_benchmarks.edge_random import EdgeRandom
from repurpose_opt_benchmarks.heterogeneous import Heterogeneous
from repurpose_opt_benchmarks.lossless_structured import LosslessStructured
from repurpose_opt_benchmarks.pricing import Pricing
from repurpose_opt_benchmarks.radix_set import RadixNet
from repurpose_opt_benchmarks.small_exact import SmallExact

_CHOSEN: dict[Callable[[], TestSet], tuple[str, ...]] = {
    SmallExact: (
        "lossless-n24-d3-P3-0",
        "lossless-n40-d4-P4-1",
        "edge-uneven-n32-P4-0",
        "edge-loads-n40-P4-1",
        "volume-price-m16-n16-P3-0",
        "volume-owners-given-budget-m24-n24-P3-1",
    ),
    LosslessStructured: (
        "planted-n64-P3-1",
        "convolution-3x3-n256-P4-0",
        "blocks-n512-P8-uneven-1",
        "convolution-5x5-stride3-n2025-P8-1",
        "power-law-n2048-P16-0",
    ),
    RadixNet: (
        "n256-4x4x4x4-layer2-P8-0",
        "n1024-32x32-layer1-P16-1",
        "n4096-8x8x8x8-layer3-P16-0",
    ),
    Pricing: (
        "m64-n64-P4-budget0.1-0",
        "m64-n64-P4-nmse0.1-0",
        "m256-n128-P4-budget0.05-1",
        "m256-n128-P4-codes-budget0.1-0",
        "m1024-n256-P8-budget0.02-0",
        "m1024-n256-P8-budget0.1-1",
        "m1024-n256-P8-price8-0",
    ),
    Heterogeneous: (
        "lossless-everything-n32-P3-1",
        "lossless-busiest-capacities-n256-P8-1",
        "lossless-links-n512-P8-0",
        "lossless-racks-n1024-P16-1",
        "edge-loads-n64-P4-0",
        "edge-everything-n128-P5-0",
        "edge-places-n256-P8-1",
        "edge-racks-n512-P8-0",
        "edge-loads-n512-P8-1",
        "edge-links-n1024-P8-0",
        "volume-price-everything-n64-P4-0",
        "volume-budget-everything-n96-P4-1",
        "volume-budget-values-n256-P6-1",
        "volume-price-racks-n256-P8-0",
    ),
    EdgeRandom: ("n1024-P8-1", "n2048-P8-0"),
}


class Default:
    """All three formulations, small to large, even and uneven: where to begin, and what the report shows."""

    name = "default"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "The default benchmark: all formulations, small to large"
    description = (
        "Instances of small-exact, lossless-structured, radix-net, pricing, heterogeneous and edge-random: at least "
        "three of each of Lossless, Edge and Volume with at most 64 neurons, with at most 512, and larger ones. They "
        "need NumPy and SciPy only."
    )

    def __len__(self) -> int:
        return sum(map(len, _CHOSEN.values()))

    def __iter__(self) -> Iterator[Instance]:
        for create, names in _CHOSEN.items():
            testset = create()
            found = {instance.name: instance for instance in testset}
            for name in names:
                yield replace(found[name], name=f"{testset.name}-{name}", kind=testset.name)
