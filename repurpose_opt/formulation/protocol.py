"""A formulation is an objective, an assignment cost and a choice of transfers given the owners."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem, Weight
from repurpose_opt.repair import restrict


@runtime_checkable
class Formulation(Protocol):
    """What a backend needs of a formulation; subclass it explicitly to inherit the defaults."""

    name: str
    damping: float = 0.0
    """Share of the former assignment cost that the alternation keeps, where the cost is only marginal."""

    @property
    def sends_codes(self) -> bool:
        """Whether messages may be codes: for pruners that say so (`sends_codes = True`)."""
        return False

    @property
    def selection(self) -> Formulation:
        """The formulation by which messages are chosen given the owners: this one, or the one that it extends."""
        return self

    def supports(self, problem: LayerProblem) -> str | None:
        """Why the formulation has no meaning for a problem, or None."""
        return "on broadcast links only Volume with codes is served" if problem.broadcast else None

    @property
    def assignment_is_exact(self) -> bool:
        """Whether the least assignment cost with owner=None is the least objective; a class attribute will do."""
        return False

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        """What is minimised, for owners (m,), an exchange and weights V (rows, columns)."""
        ...

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        """(m, P) cost of neuron i on worker k, seen from the owners and transfers given (None: from nothing)."""
        ...

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        """The transfers to make for these owners."""
        ...

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        """The weights V for these owners and transfers; by default W where the worker has the value."""
        return restrict(problem, problem.weight, owner[problem.row_neuron], exchange.transfers)

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight
    ) -> tuple[str, ...]:
        """Constraints of this formulation that a solution breaks, one line each."""
        return ()

    def hypergraph(self, problem: LayerProblem, owner: NDArray[np.int64] | None = None) -> Hypergraph | None:
        """The cost of placements as nets and pins; None where it is not of that form.

        Where the costs depend on a limit (a budget), they are those that hold at `owner`; None without owners.
        """
        return None

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        """Whether `select` is optimal for every owner vector of this problem."""
        return False


def check_price(name: str, value: float) -> None:
    """Raises InvalidArgument unless a price or a limit is a finite number ≥ 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < np.inf:
        raise InvalidArgument(name, repr(value), "a finite number ≥ 0")
