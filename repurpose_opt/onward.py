"""A formulation and, beside it, what each neuron costs on each worker for reasons outside its layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, incidence
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem, Weight


@dataclass(frozen=True, eq=False)
class Onward(Formulation):
    """`formulation`'s objective + Σ_i cost[i, owner_i], for instance of sending the neurons on to the next layer.

    `cost` is (m, P), finite, in the units of the objective. Every backend that goes by the assignment cost or by
    `Hypergraph.fixed_cost` serves it. Raises InvalidArgument.
    """

    formulation: Formulation
    cost: NDArray[np.float64]
    damping: float = field(init=False)
    name = "onward"

    def __post_init__(self) -> None:
        cost = np.asarray(self.cost, dtype=np.float64)
        if cost.ndim != 2 or not np.isfinite(cost).all():
            raise InvalidArgument("cost", f"shape {cost.shape}, finite: {np.isfinite(cost).all()}", "finite (m, P)")
        object.__setattr__(self, "cost", cost)
        object.__setattr__(self, "damping", self.formulation.damping)

    @property
    def sends_codes(self) -> bool:
        return self.formulation.sends_codes

    @property
    def selection(self) -> Formulation:
        return self.formulation.selection

    def supports(self, problem: LayerProblem) -> str | None:
        return self.formulation.supports(problem)

    @property
    def assignment_is_exact(self) -> bool:
        return self.formulation.assignment_is_exact

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        onward = float(self.cost[np.arange(problem.m), owner].sum())
        return self.formulation.objective(problem, owner, exchange, weight) + onward

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        return self.formulation.assignment_cost(problem, owner, exchange) + self.cost

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        return self.formulation.select(problem, owner)

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        return self.formulation.repair(problem, owner, exchange)

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight
    ) -> tuple[str, ...]:
        return self.formulation.violations(problem, owner, exchange, weight)

    def hypergraph(self, problem: LayerProblem, owner: NDArray[np.int64] | None = None) -> Hypergraph | None:
        hypergraph = self.formulation.hypergraph(problem, owner)
        if hypergraph is None:
            return None
        before = 0.0 if hypergraph.fixed_cost is None else hypergraph.fixed_cost
        return replace(hypergraph, fixed_cost=before + self.cost)

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        return self.formulation.selection_is_exact(problem)


def onward_cost(following: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, P) price of sending value i from worker k to every worker that reads it, with nothing pruned.

    `following` is the layer that reads the values, `owner` (its m,) where its neurons are. Value i on worker k costs
    Σ over workers w that read it of bytes_i · link_price[k, w], 0 where w = k.
    """
    is_read = np.asarray(incidence(following).T @ np.eye(following.P)[owner]) > 0
    return following.value_bytes[:, None] * (is_read @ following.link_price.T)
