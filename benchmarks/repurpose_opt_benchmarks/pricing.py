"""`pricing`: `Volume` on the same layers at several budgets, prices and limits of the error, values and codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.formulation import Volume
from repurpose_opt.problem import LayerProblem
from repurpose_opt_benchmarks.dense_layers import correlated_moments, planted_weight, price_of
from repurpose_opt_benchmarks.pairs import Built, Case, pairs

_LAYERS = ((64, 64, 4), (256, 128, 4), (512, 512, 8), (1024, 256, 8))
"""(m, n, P)"""
_BUDGETS = (0.02, 0.05, 0.1, 0.3)
_SHARES = (1.0, 8.0)
"""Prices: sending all costs the outputs' energy divided by these."""
_LIMITS = (0.1, 0.03)
_CODE_BUDGETS = (0.02, 0.1)


def _case(size: tuple[int, int, int], limit: str, amount: float, messages: str = "values") -> Case:
    m, n, P = size

    def build(rng: np.random.Generator) -> Built:
        weight = planted_weight(m, n, P, rng)
        problem = LayerProblem.create(weight, P, moments=correlated_moments(n, rng))
        amounts: dict[str, Any] = {limit: price_of(problem, amount) if limit == "transfer_price" else amount}
        return problem, Volume(**amounts, messages=messages)

    layer = f"m{m}-n{n}-P{P}"
    word = {"transfer_price": "price", "budget": "budget", "max_nmse": "nmse"}[limit]
    name = "-".join([layer, *[messages] * (messages != "values"), f"{word}{amount:g}"])
    return Case(name, f"{messages}, {word}", build, layer)


def _cases() -> Iterator[Case]:
    for size in _LAYERS:
        yield from (_case(size, "budget", budget) for budget in _BUDGETS)
        yield from (_case(size, "transfer_price", share) for share in _SHARES)
        yield from (_case(size, "max_nmse", most) for most in _LIMITS)
        yield from (_case(size, "budget", budget, "codes") for budget in _CODE_BUDGETS)
        yield _case(size, "budget", _CODE_BUDGETS[1], "mixed")


_CASES = tuple(_cases())


class Pricing:
    """Volume at several budgets, prices and limits on a few layers with correlated inputs."""

    name = "pricing"
    requires: tuple[str, ...] = ()
    settings = Settings()
    title = "Volume at several budgets, prices and limits of the error"
    description = (
        "Layers of 64 × 64, 256 × 128, 512 × 512 and 1,024 × 256 on 4 or 8 workers, with a hidden worker for each "
        "neuron and full moments whose eigenvalues fall as 1/r: budgets of 2 to 30 % of direct, two prices, two limits "
        "of the NMSE, and codes. Cases of a size share their layers, so that curves can be drawn; the second of each "
        "pair, another layer, is judged once."
    )

    def __len__(self) -> int:
        return 2 * len(_CASES)

    def __iter__(self) -> Iterator[Instance]:
        return pairs(self.name, _CASES)
