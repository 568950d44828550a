"""What a placement costs where the transfers of one value do not depend on those of another: nets with pins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Hypergraph:
    """Value j is a net, the neurons that read it are its pins. Owners (m,) cost

        constant + Σ_i fixed_cost[i, owner_i] + Σ_{j,k} min(price_jk, Σ_{i on k} pins_ij) :

    on worker k a value is either sent, or the energy of its pins there is lost. With `keeps_all` nothing may be lost:
    the second sum is of price_jk wherever value j has a pin on worker k (connectivity λ−1 for prices of 1).
    With communication "busiest" (`keeps_all` only) those prices are not added up over all: what counts is the largest
    sum of a worker, over the values that it holds (sent) or over those that it receives.
    """

    pins: Any
    """(m, n) csr_array of positive numbers; 1 each with `keeps_all`."""
    price: NDArray[np.float64]
    """(n, P) what it costs to send value j to worker k; 0 where the worker holds it; ∞ for never."""
    keeps_all: bool
    is_exact: bool
    """Whether these costs are the formulation's objective; else they stand in for it."""
    fixed_cost: NDArray[np.float64] | None = None
    """(m, P) what neuron i costs on worker k whatever the others do; None for nothing."""
    constant: float = 0.0
    communication: str = "total"
    """"total" or "busiest"."""
    input_owner: NDArray[np.int64] | None = None
    """(n,) worker that holds each value; needed for "busiest" only."""

    @property
    def m(self) -> int:
        """Neurons."""
        return int(self.pins.shape[0])

    @property
    def n(self) -> int:
        """Values."""
        return int(self.pins.shape[1])

    @property
    def P(self) -> int:  # noqa: N802
        """Workers."""
        return int(self.price.shape[1])

    def cost(self, owner: NDArray[np.int64]) -> float:
        """What these owners (m,) cost; O(pins + n P)."""
        held = np.asarray(self.pins.T @ np.eye(self.P)[owner])
        paid = np.where(held > 0, self.price, 0.0) if self.keeps_all else np.minimum(held, self.price)
        fixed = 0.0 if self.fixed_cost is None else self.fixed_cost[np.arange(self.m), owner].sum()
        return float(self.constant + fixed + self._communication(paid))

    def _communication(self, paid: NDArray[np.float64]) -> float:
        """What the transfers (n, P) with these prices cost together."""
        if self.communication == "total":
            return float(paid.sum())
        assert self.input_owner is not None
        sent = np.bincount(self.input_owner, paid.sum(axis=1), self.P)
        return float(max(sent.max(), paid.sum(axis=0).max()))
