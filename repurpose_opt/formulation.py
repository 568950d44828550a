"""What is minimised. A formulation is an objective, an assignment cost and a choice of transfers given the owners."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import metrics
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.problem import LayerProblem, Weight
from repurpose_opt.repair import compensated_cost, refit, restrict, sum_rows, value_energy

_CACHED_ENTRIES = 1 << 16


@runtime_checkable
class Formulation(Protocol):
    """What a backend needs of a formulation; subclass it explicitly to inherit the defaults."""

    name: str
    assignment_is_exact: bool = False
    """Whether the least assignment cost with owner=None is the least objective."""
    damping: float = 0.0
    """Share of the former assignment cost that the alternation keeps, where the cost is only marginal."""

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

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        """Whether `select` is optimal for every owner vector of this problem."""
        return False


@dataclass(frozen=True)
class Edge(Formulation):
    """Diagonal-C error + Σ over kept weights of (weight_price + transfer_price · bytes · link_price · [remote]).

    RePurpose-style ℓ0 pruning, reconstructed from its abstract (Abdi et al., AAAI 2023). The optimum given the
    owners is a threshold per weight, so neuron i on worker k costs Σ_j min(g_i C_jj w̃_ij², price_jk) whatever the
    others do: choosing the owners is a transportation problem.
    """

    weight_price: float = 0.0
    transfer_price: float = 0.0
    name = "edge"
    assignment_is_exact = True

    def __post_init__(self) -> None:
        _check_price("weight_price", self.weight_price)
        _check_price("transfer_price", self.transfer_price)

    def column_price(self, problem: LayerProblem) -> NDArray[np.float64]:
        """(columns, P) price of keeping one weight of this column on worker k."""
        by_value = self.weight_price + self.transfer_price * problem.transfer_price
        return by_value[problem.column_value]

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        price = self.column_price(problem)
        row_owner = owner[problem.row_neuron]
        target, variance = problem.target_weight, problem.moments.variance
        if problem.is_sparse:
            missing = (target - weight).tocsr()
            error = (missing.multiply(missing) @ variance) @ problem.output_weight
            kept = weight.tocoo()
            return float(error + price[kept.col, row_owner[kept.row]][kept.data != 0].sum())
        total = 0.0
        for rows in _row_blocks(problem):
            difference = target[rows] - weight[rows]
            total += float(problem.output_weight[rows] @ (np.square(difference) @ variance))
            kept_price = (weight[rows] != 0) @ price
            total += float(kept_price[np.arange(len(kept_price)), row_owner[rows]].sum())
        return total

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        price = self.column_price(problem)
        if problem.is_sparse:
            return sum_rows(problem, _sparse_capped_energy(problem, price))
        links = problem.link_price[~np.eye(problem.P, dtype=bool)]
        uniform = links.size == 0 or bool((links == links[0]).all())
        return sum_rows(problem, (_uniform_capped_energy if uniform else _capped_energy)(problem, price))

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        """A value is sent to a worker if the dearest weight that reads it there is worth its price."""
        price = self.column_price(problem)
        row_owner = owner[problem.row_neuron]
        most = np.zeros((problem.P, problem.columns))
        if problem.is_sparse:
            entries = problem.target_weight.tocoo()
            np.maximum.at(most, (row_owner[entries.row], entries.col), _sparse_energy(problem, entries))
        else:
            for rows in _row_blocks(problem):
                for k, energy in zip(row_owner[rows], _energy(problem, rows), strict=True):
                    np.maximum(most[k], energy, out=most[k])
        column, worker = np.nonzero(price < most.T)
        needed = np.zeros((problem.n, problem.P), dtype=bool)
        needed[problem.column_value[column], worker] = True
        return Exchange.of_transfers(needed & problem.remote, problem.input_owner)

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        """W̃ with zeros where the worker does not have the value or the weight is worth less than its price."""
        has = (exchange.transfers | ~problem.remote)[problem.column_value]
        price = np.where(has, self.column_price(problem), np.inf)
        row_owner = owner[problem.row_neuron]
        if problem.is_sparse:
            entries = problem.target_weight.tocoo()
            keep = _sparse_energy(problem, entries) > price[entries.col, row_owner[entries.row]]
            coordinates = (entries.row[keep], entries.col[keep])
            return sparse.csr_array((entries.data[keep], coordinates), shape=problem.weight.shape)
        kept = np.empty_like(problem.weight)
        by_worker = np.ascontiguousarray(price.T)
        for rows in _row_blocks(problem):
            worth = _energy(problem, rows) > by_worker[row_owner[rows]]
            np.multiply(problem.target_weight[rows], worth, out=kept[rows])
        return kept

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Volume(Formulation):
    """Error on the given C after refit, against the bytes that are sent; exactly one of the four limits.

    transfer_price  minimise error + transfer_price · priced volume
    budget          minimise the error with volume ≤ this fraction of direct, in [0, 1]
    budget_bytes    minimise the error with volume ≤ this many bytes a sample
    max_nmse        minimise the priced volume with an NMSE on the calibration moments of at most this; it
                    guarantees nothing beyond them
    """

    transfer_price: float | None = None
    budget: float | None = None
    budget_bytes: float | None = None
    max_nmse: float | None = None
    name = "volume"

    def __post_init__(self) -> None:
        given = {k: v for k, v in vars(self).items() if v is not None}
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise InvalidArgument("Volume", names, "exactly one of transfer_price, budget, budget_bytes, max_nmse")
        ((name, value),) = given.items()
        _check_price(name, value)
        if name == "budget" and value > 1:
            raise InvalidArgument("budget", f"{value:g}", "a fraction of direct, in [0, 1]")

    def judged(self, problem: LayerProblem) -> LayerProblem:
        """The problem with the weights g by which errors count: max_nmse is a limit on the NMSE, which has none."""
        return problem if self.max_nmse is None else problem.unweighted

    def allowed_bytes(self, problem: LayerProblem) -> float | None:
        """The budget in bytes; None where there is none."""
        if self.budget is not None:
            return np.floor(self.budget * problem.direct_volume + 1e-9)
        return self.budget_bytes

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        if self.max_nmse is not None:
            return metrics.priced_volume(problem, exchange)
        error = metrics.weighted_error(problem, owner, weight)
        if self.transfer_price is None:
            return error
        return error + self.transfer_price * metrics.priced_volume(problem, exchange)

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        return compensated_cost(self.judged(problem), _transfers(problem, exchange))

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        """Transfers by the energy of their weights on the diagonal of C, greatest gain a byte first."""
        gain = value_energy(self.judged(problem), owner)
        gain[~problem.remote] = 0.0
        cost = problem.transfer_price if self.allowed_bytes(problem) is None else problem.transfer_bytes
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(gain > 0, gain / cost, 0.0)
        order = np.argsort(-rate, axis=None, kind="stable")[: np.count_nonzero(rate)]
        value, worker = np.unravel_index(order, rate.shape)
        ranked = zip(value, worker, rate.ravel()[order], strict=True)
        return self.take(problem, owner, ranked)

    def take(
        self, problem: LayerProblem, owner: NDArray[np.int64], ranked: Iterator[tuple[int, int, float]]
    ) -> Exchange:
        """The transfers to make out of (value, worker, gain per byte or priced byte), greatest first."""
        allowed = self.allowed_bytes(problem)
        if self.max_nmse is not None:
            return self._take_until(problem, owner, ranked)
        taken = np.zeros((problem.n, problem.P), dtype=bool)
        left = allowed
        for j, k, rate in ranked:
            if self.transfer_price is not None:
                if rate <= self.transfer_price:
                    break
            elif problem.transfer_bytes[j, k] > left:
                continue
            else:
                left -= problem.transfer_bytes[j, k]
            taken[j, k] = True
        return Exchange.of_transfers(taken, problem.input_owner)

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        return refit(problem, owner, exchange.transfers)

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight
    ) -> tuple[str, ...]:
        allowed = self.allowed_bytes(problem)
        if allowed is not None and metrics.volume(problem, exchange) > allowed:
            return (f"volume {metrics.volume(problem, exchange)} bytes is above the budget, {allowed:g}",)
        if self.max_nmse is not None:
            reached = _nmse_after(problem, owner, weight)
            if not self._meets(reached):
                return (f"NMSE {reached:.4g} is above max_nmse, {self.max_nmse:g}",)
        return ()

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        if not problem.moments.is_diagonal:
            return False
        if self.transfer_price is not None:
            return True
        cost = problem.transfer_bytes if self.max_nmse is None else problem.transfer_price
        if self.max_nmse is not None and problem.moments.ridge > 0:
            return False  # energies have the ridge in them, the NMSE does not
        return len(np.unique(cost[problem.remote])) <= 1

    def _meets(self, nmse: float) -> bool:
        return self.max_nmse is None or nmse <= self.max_nmse + 1e-10

    def _take_until(
        self, problem: LayerProblem, owner: NDArray[np.int64], ranked: Iterator[tuple[int, int, float]]
    ) -> Exchange:
        """The shortest prefix of the ranking whose NMSE after refit is low enough (bisection; all if none is)."""
        pairs: list[tuple[int, int]] = []

        def exchange_of(count: int) -> Exchange:
            taken = np.zeros((problem.n, problem.P), dtype=bool)
            for j, k in pairs[:count]:
                taken[j, k] = True
            return Exchange.of_transfers(taken, problem.input_owner)

        def reaches(count: int) -> bool:
            weight = refit(problem, owner, exchange_of(count).transfers)
            return self._meets(_nmse_after(problem, owner, weight))

        low, step = -1, 1
        while not reaches(len(pairs)):
            low = len(pairs)
            pairs.extend((int(j), int(k)) for j, k, _ in islice(ranked, step))
            step *= 2
            if len(pairs) == low:
                return exchange_of(low)
        high = len(pairs)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(middle) else (middle, high)
        return exchange_of(high)


@dataclass(frozen=True)
class Lossless(Formulation):
    """Priced volume with nothing pruned: hypergraph partitioning (connectivity λ−1) with fixed terminals."""

    name = "lossless"
    damping = 0.5

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        return metrics.priced_volume(problem, exchange)

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        """Price of the inputs that a neuron would need on each worker, shared with those that need them there.

        With owners given, input j on worker k costs price / (1 + other neurons there that read it).
        """
        reads = incidence(problem)
        if owner is None:
            return np.asarray(reads @ problem.transfer_price)
        count = reads.T @ np.eye(problem.P)[owner]
        cost = np.asarray(reads @ (problem.transfer_price / (1 + count)))
        staying = np.asarray(reads @ (problem.transfer_price / np.maximum(count, 1)))
        neurons = np.arange(problem.m)
        cost[neurons, owner] = staying[neurons, owner]
        return cost

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        needed = np.asarray(incidence(problem).T @ np.eye(problem.P)[owner]) > 0
        return Exchange.of_transfers(needed & problem.remote, problem.input_owner)

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight
    ) -> tuple[str, ...]:
        missing = (problem.weight - weight).nnz if problem.is_sparse else np.count_nonzero(problem.weight != weight)
        return (f"{missing} weights differ from the original's",) if missing else ()

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        return True


def incidence(problem: LayerProblem) -> sparse.csr_array:
    """(m, n) 1 where neuron i reads value j."""
    entries = sparse.coo_array(problem.weight)
    nonzero = entries.data != 0
    coordinates = (problem.row_neuron[entries.row[nonzero]], problem.column_value[entries.col[nonzero]])
    reads = sparse.csr_array((np.ones(nonzero.sum()), coordinates), shape=(problem.m, problem.n))
    reads.sum_duplicates()
    reads.data[:] = 1.0
    return reads


def _transfers(problem: LayerProblem, exchange: Exchange | None) -> NDArray[np.bool_]:
    return np.zeros((problem.n, problem.P), dtype=bool) if exchange is None else exchange.transfers


def _nmse_after(problem: LayerProblem, owner: NDArray[np.int64], weight: Weight) -> float:
    return metrics.nmse(problem, owner, weight, corrected_bias(problem, weight))


def corrected_bias(problem: LayerProblem, weight: Weight) -> NDArray[np.float64]:
    """b' = b + W E[x] − V E[x̂], (rows,): the bias that leaves no error in the mean."""
    moments = problem.moments
    if not (moments.mean.any() or moments.target_mean.any()):
        return problem.bias
    return problem.bias + problem.weight @ moments.target_mean - weight @ moments.mean


def _row_blocks(problem: LayerProblem) -> Iterator[slice]:
    """Slices of rows small enough that a block of the weight stays in cache."""
    height = max(1, _CACHED_ENTRIES // problem.columns)
    return (slice(first, first + height) for first in range(0, problem.rows, height))


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
    for rows in _row_blocks(problem):
        energy = _energy(problem, rows)
        local = np.minimum(energy, at_home) @ held_by
        np.minimum(energy, elsewhere, out=energy)
        remote = energy @ held_by
        capped[rows] = remote.sum(axis=1, keepdims=True) - remote + local
    return capped


def _capped_energy(problem: LayerProblem, price: NDArray[np.float64]) -> NDArray[np.float64]:
    """(rows, P) Σ_j min(energy_ij, price_jk) for any prices."""
    capped = np.empty((problem.rows, problem.P))
    for rows in _row_blocks(problem):
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


def _check_price(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not 0 <= value < np.inf:
        raise InvalidArgument(name, repr(value), "a finite number ≥ 0")
