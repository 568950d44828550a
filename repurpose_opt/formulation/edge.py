"""`Edge`: a price for every weight that is kept, a higher one where its value must be sent."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import metrics
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation.busiest import Ranking, check_communication
from repurpose_opt.formulation.protocol import Formulation, check_price
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.knowledge import had_columns
from repurpose_opt.problem import LayerProblem, Weight, row_blocks
from repurpose_opt.repair import sum_rows


@dataclass(frozen=True)
class Edge(Formulation):
    """Diagonal-C error + Σ over kept weights of (weight_price + transfer_price · bytes · link_price · [remote]).

    RePurpose-style ℓ0 pruning, reconstructed from its abstract (Abdi et al., AAAI 2023). The optimum given the
    owners is a threshold per weight, so neuron i on worker k costs Σ_j min(g_i C_jj w̃_ij², price_jk) whatever the
    others do: choosing the owners is a transportation problem.

    With communication "busiest" it is error + Σ over kept weights of weight_price + transfer_price · the priced bytes
    of the worker that sends or receives most. Each transfer counts once there, not once for each weight that reads
    it; neither choosing the transfers nor choosing the owners is exact any more.
    """

    weight_price: float = 0.0
    transfer_price: float = 0.0
    communication: str = field(default="total", kw_only=True)
    name = "edge"

    def __post_init__(self) -> None:
        check_price("weight_price", self.weight_price)
        check_price("transfer_price", self.transfer_price)
        check_communication(self.communication)

    @property
    def assignment_is_exact(self) -> bool:
        return self.communication == "total"

    def column_price(self, problem: LayerProblem) -> NDArray[np.float64]:
        """(columns, P) price of keeping one weight of this column on worker k, seen from no owners.

        With "busiest" this stands in for it: a P-th of the transfer, since loads level out, and of that the share of
        one of the m/P neurons that may read the value there.
        """
        share = 1.0 if self.communication == "total" else 1.0 / problem.m
        by_value = self.weight_price + self.transfer_price * share * problem.transfer_price
        return by_value[problem.column_value]

    def _kept_price(self, problem: LayerProblem) -> NDArray[np.float64]:
        """(columns, P) price of keeping one weight whose value its worker has."""
        if self.communication == "total":
            return self.column_price(problem)
        return np.full((problem.columns, problem.P), self.weight_price)

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        error_and_weights = self._separable(problem, owner, weight)
        if self.communication == "total":
            return error_and_weights
        return error_and_weights + self.transfer_price * metrics.priced_busiest(problem, exchange)

    def _separable(self, problem: LayerProblem, owner: NDArray[np.int64], weight: Weight) -> float:
        """The error and the prices of the kept weights."""
        price = self._kept_price(problem)
        row_owner = owner[problem.row_neuron]
        target, variance = problem.target_weight, problem.moments.variance
        if problem.is_sparse:
            missing = (target - weight).tocsr()
            error = (missing.multiply(missing) @ variance) @ problem.output_weight
            kept = weight.tocoo()
            return float(error + price[kept.col, row_owner[kept.row]][kept.data != 0].sum())
        total = 0.0
        for rows in row_blocks(problem):
            difference = target[rows] - weight[rows]
            total += float(problem.output_weight[rows] @ (np.square(difference) @ variance))
            kept_price = (weight[rows] != 0) @ price
            total += float(kept_price[np.arange(len(kept_price)), row_owner[rows]].sum())
        return total

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        price = self.column_price(problem)
        if self.communication == "busiest" and exchange is not None:  # exact with these transfers
            price = np.where(had_columns(problem, exchange.transfers), self.weight_price, np.inf)
            return sum_rows(problem, (_sparse_capped_energy if problem.is_sparse else _capped_energy)(problem, price))
        if problem.is_sparse:
            return sum_rows(problem, _sparse_capped_energy(problem, price))
        links = problem.link_price[~np.eye(problem.P, dtype=bool)]
        uniform = links.size == 0 or bool((links == links[0]).all())
        return sum_rows(problem, (_uniform_capped_energy if uniform else _capped_energy)(problem, price))

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        """A value is sent to a worker if the dearest weight that reads it there is worth its price.

        With "busiest" greedily by gain per byte, under the best cap on what a worker sends and receives.
        """
        if self.communication == "busiest":
            ranking = Ranking.of_gains(self._gain(problem, owner), problem.transfer_price)
            taken = ranking.best_fill(problem, self.transfer_price)
            return Exchange.of_transfers(ranking.transfers(problem, taken), problem.input_owner)
        price = self.column_price(problem)
        row_owner = owner[problem.row_neuron]
        most = np.zeros((problem.P, problem.columns))
        if problem.is_sparse:
            entries = problem.target_weight.tocoo()
            np.maximum.at(most, (row_owner[entries.row], entries.col), _sparse_energy(problem, entries))
        else:
            for rows in row_blocks(problem):
                for k, energy in zip(row_owner[rows], _energy(problem, rows), strict=True):
                    np.maximum(most[k], energy, out=most[k])
        column, worker = np.nonzero(price < most.T)
        needed = np.zeros((problem.n, problem.P), dtype=bool)
        needed[problem.column_value[column], worker] = True
        return Exchange.of_transfers(needed & problem.remote, problem.input_owner)

    def _gain(self, problem: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, P) Σ over the weights on worker k that read value j of max(0, energy − weight_price); 0 at home."""
        row_owner = owner[problem.row_neuron]
        by_column = np.zeros((problem.P, problem.columns))
        if problem.is_sparse:
            entries = problem.target_weight.tocoo()
            gain = np.maximum(_sparse_energy(problem, entries) - self.weight_price, 0.0)
            np.add.at(by_column, (row_owner[entries.row], entries.col), gain)
        else:
            on_worker = np.eye(problem.P)[row_owner]
            for rows in row_blocks(problem):
                by_column += on_worker[rows].T @ np.maximum(_energy(problem, rows) - self.weight_price, 0.0)
        by_value = np.zeros((problem.n, problem.P))
        np.add.at(by_value, problem.column_value, by_column.T)
        return np.where(problem.remote, by_value, 0.0)

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        """W̃ with zeros where the worker does not have the value or the weight is worth less than its price."""
        price = np.where(had_columns(problem, exchange.transfers), self._kept_price(problem), np.inf)
        row_owner = owner[problem.row_neuron]
        if problem.is_sparse:
            entries = problem.target_weight.tocoo()
            keep = _sparse_energy(problem, entries) > price[entries.col, row_owner[entries.row]]
            coordinates = (entries.row[keep], entries.col[keep])
            return sparse.csr_array((entries.data[keep], coordinates), shape=problem.weight.shape)
        kept = np.empty_like(problem.weight)
        by_worker = np.ascontiguousarray(price.T)
        for rows in row_blocks(problem):
            worth = _energy(problem, rows) > by_worker[row_owner[rows]]
            np.multiply(problem.target_weight[rows], worth, out=kept[rows])
        return kept

    def hypergraph(self, problem: LayerProblem, owner: NDArray[np.int64] | None = None) -> Hypergraph | None:
        """No nets: what a neuron costs on a worker does not depend on the others. With "busiest" it does: None."""
        if self.communication == "busiest":
            return None
        no_pins = sparse.csr_array((problem.m, problem.n))
        cost = self.assignment_cost(problem, None, None)
        free = np.zeros((problem.n, problem.P))
        return Hypergraph(no_pins, free, keeps_all=False, is_exact=True, fixed_cost=cost)

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        return self.communication == "total"


def _energy(problem: LayerProblem, rows: slice) -> NDArray[np.float64]:
    """g_i C_jj w̃_ij² of some rows, in float64 whatever the weight is."""
    energy = np.square(problem.target_weight[rows], dtype=np.float64)
    energy *= problem.moments.variance
    energy *= problem.output_weight[rows, None]
    return energy


def _sparse_energy(problem: LayerProblem, entries: sparse.coo_array) -> NDArray[np.float64]:
    """The same for the entries of a sparse W̃, (entries,)."""
    energy = np.square(entries.data, dtype=np.float64)
    energy *= problem.moments.variance[entries.col] * problem.output_weight[entries.row]
    return energy


def _uniform_capped_energy(problem: LayerProblem, price: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, P) Σ_j min(energy_ij, price_jk) where a column has one price at home and one elsewhere.

    Two minima per weight instead of P.
    """
    columns = np.arange(problem.columns)
    at_home = price[columns, problem.column_home]
    elsewhere = price[columns, (problem.column_home + 1) % problem.P]
    held_by = np.eye(problem.P)[problem.column_home]
    capped = np.empty((problem.rows, problem.P))
    for rows in row_blocks(problem):
        energy = _energy(problem, rows)
        local = np.minimum(energy, at_home) @ held_by
        np.minimum(energy, elsewhere, out=energy)
        remote = energy @ held_by
        capped[rows] = remote.sum(axis=1, keepdims=True) - remote + local
    return capped


def _capped_energy(problem: LayerProblem, price: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, P) Σ_j min(energy_ij, price_jk) for any prices."""
    capped = np.empty((problem.rows, problem.P))
    for rows in row_blocks(problem):
        energy = _energy(problem, rows)
        for k in range(problem.P):
            capped[rows, k] = np.minimum(energy, price[:, k]).sum(axis=1)
    return capped


def _sparse_capped_energy(problem: LayerProblem, price: NDArray[np.float64]) -> NDArray[np.float64]:
    entries = problem.target_weight.tocoo()
    energy = _sparse_energy(problem, entries)
    capped = [
        np.bincount(entries.row, np.minimum(energy, price[entries.col, k]), minlength=problem.rows)
        for k in range(problem.P)
    ]
    return np.stack(capped, axis=1)
