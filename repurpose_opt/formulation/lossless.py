"""`Lossless`: the bytes that are sent where nothing is pruned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import metrics
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation.busiest import check_communication, pressure
from repurpose_opt.formulation.protocol import Formulation
from repurpose_opt.formulation.ranks import (
    LARGEST_LOSS,
    lost_share,
    project_on_messages,
    rank_price,
    select_ranks,
)
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem, Weight


@dataclass(frozen=True, kw_only=True)
class Lossless(Formulation):
    """Priced communication with nothing pruned.

    communication   "total": the priced volume, hypergraph partitioning (connectivity λ−1) with fixed terminals.
                    "busiest": the priced bytes of the worker that sends or receives most
    messages        "values": the values that are read. "codes": of each worker's values, as many combinations as the
                    rank of what the receiver computes of them on the data's support (`ranks`); "total" only
    """

    communication: str = "total"
    messages: str = "values"
    name = "lossless"
    damping = 0.5

    def __post_init__(self) -> None:
        check_communication(self.communication)
        if self.messages not in ("values", "codes"):
            raise InvalidArgument("messages", repr(self.messages), "'values' or 'codes'")
        if self.sends_codes and self.communication == "busiest":
            raise InvalidArgument("messages", "'codes' with communication=\"busiest\"", "'values'")

    @property
    def sends_codes(self) -> bool:
        return self.messages == "codes"

    def supports(self, problem: LayerProblem) -> str | None:
        reason = super().supports(problem)
        return metrics.codes_unsupported(problem) if reason is None and self.sends_codes else reason

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        return metrics.priced_communication(problem, exchange, self.communication)

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        """Price of the inputs that a neuron would need on each worker, shared with those that need them there.

        With owners given, input j on worker k costs price / (1 + other neurons there that read it). With "busiest"
        that price counts by how busy the two workers of the transfer are now. With codes: `rank_price`.
        """
        if self.sends_codes:
            return rank_price(problem, owner)
        reads = incidence(problem)
        if owner is None:
            return np.asarray(reads @ problem.transfer_price)
        count = np.asarray(reads.T @ np.eye(problem.P)[owner])
        price = problem.transfer_price
        if self.communication == "busiest":
            price = price * pressure(problem, count > 0) * problem.P  # on average 2, in the units of owner=None
        cost = np.asarray(reads @ (price / (1 + count)))
        staying = np.asarray(reads @ (price / np.maximum(count, 1)))
        neurons = np.arange(problem.m)
        cost[neurons, owner] = staying[neurons, owner]
        return cost

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        if self.sends_codes:
            return select_ranks(problem, owner)
        needed = np.asarray(incidence(problem).T @ np.eye(problem.P)[owner]) > 0
        return Exchange.of_transfers(needed & problem.remote, problem.input_owner)

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        return project_on_messages(problem, owner, exchange)

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight
    ) -> tuple[str, ...]:
        if self.sends_codes:
            lost = lost_share(problem, weight)
            return (f"{lost:.2g} of the output's variance is lost",) if lost > LARGEST_LOSS else ()
        missing = (problem.weight - weight).nnz if problem.is_sparse else np.count_nonzero(problem.weight != weight)
        return (f"{missing} weights differ from the original's",) if missing else ()

    def hypergraph(self, problem: LayerProblem, owner: NDArray[np.int64] | None = None) -> Hypergraph | None:
        if self.sends_codes:
            return None
        return nets(problem, self.communication)

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        return not self.sends_codes  # ranks are numerical, and correlated sources might do with less


def nets(problem: LayerProblem, communication: str = "total") -> Hypergraph:
    """Sending values with nothing pruned: a net for each value, a pin for each neuron that reads it."""
    return Hypergraph(
        incidence(problem),
        problem.transfer_price,
        keeps_all=True,
        is_exact=True,
        communication=communication,
        input_owner=problem.input_owner,
    )


def incidence(problem: LayerProblem) -> sparse.csr_array:
    """(m, n) 1 where neuron i reads value j."""
    entries = sparse.coo_array(problem.weight)
    nonzero = entries.data != 0
    coordinates = (problem.row_neuron[entries.row[nonzero]], problem.column_value[entries.col[nonzero]])
    reads = sparse.csr_array((np.ones(nonzero.sum()), coordinates), shape=(problem.m, problem.n))
    reads.sum_duplicates()
    reads.data[:] = 1.0
    return reads
