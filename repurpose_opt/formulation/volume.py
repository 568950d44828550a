"""`Volume`: the error after refit against the bytes that are sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import metrics
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation.busiest import Allowance, Ranking, check_communication, direct_busiest
from repurpose_opt.formulation.codes import MESSAGES, codes_are_exact, select_codes
from repurpose_opt.formulation.protocol import Formulation, check_price
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.problem import LayerProblem, Weight
from repurpose_opt.repair import (
    compensated_cost,
    compensated_cost_with_codes,
    corrected_bias,
    refit,
    refit_with_codes,
    value_energy,
    value_pins,
)

_LEAST_SHARE = 0.1
_LOOK_AHEAD = 3


@dataclass(frozen=True, kw_only=True)
class Volume(Formulation):
    """Error on the given C after refit, against the bytes that are sent; exactly one of the four limits.

    transfer_price  minimise error + transfer_price · priced volume
    budget          minimise the error with volume ≤ this fraction of direct, in [0, 1]
    budget_bytes    minimise the error with volume ≤ this many bytes a sample
    max_nmse        minimise the priced volume with an NMSE on the calibration moments of at most this; it
                    guarantees nothing beyond them

    messages        "values": chosen values are sent. "codes": linear combinations of a worker's values, of which chosen
                    values are a special case; bytes are those of the numbers sent. "mixed": for each pair of workers
                    what costs less, also in multiply-accumulates
    mac_price       with "mixed", what a multiply-accumulate that messages cause (`metrics.message_macs`) adds to the
                    objective

    communication   "total": volume as it is. "busiest": wherever it says volume above, the bytes of the worker that
                    sends or receives most count instead (direct's busiest worker for `budget`). The transfers are
                    then chosen greedily with a cap on what each worker sends and receives; never exact, and
                    for values only
    """

    transfer_price: float | None = None
    budget: float | None = None
    budget_bytes: float | None = None
    max_nmse: float | None = None
    messages: str = "values"
    mac_price: float = 0.0
    communication: str = "total"
    name = "volume"

    def __post_init__(self) -> None:
        check_communication(self.communication)
        _check_messages(self)
        limits = ("transfer_price", "budget", "budget_bytes", "max_nmse")
        given = {name: getattr(self, name) for name in limits if getattr(self, name) is not None}
        if len(given) != 1:
            names = " and ".join(given) or "none"
            raise InvalidArgument("Volume", names, "exactly one of transfer_price, budget, budget_bytes, max_nmse")
        ((name, value),) = given.items()
        check_price(name, value)
        if name == "budget" and value > 1:
            raise InvalidArgument("budget", f"{value:g}", "a fraction of direct, in [0, 1]")

    @property
    def has_budget(self) -> bool:
        return self.budget is not None or self.budget_bytes is not None

    @property
    def sends_codes(self) -> bool:
        return self.messages != "values"

    def supports(self, problem: LayerProblem) -> str | None:
        if not self.sends_codes:
            return super().supports(problem)
        if problem.broadcast and self.mac_price > 0:
            return "a mac_price is not served on broadcast links"
        return metrics.codes_unsupported(problem)

    def judged(self, problem: LayerProblem) -> LayerProblem:
        """The problem with the weights g by which errors count: max_nmse is a limit on the NMSE, which has none."""
        return problem if self.max_nmse is None else problem.unweighted

    def allowed_bytes(self, direct: int) -> float | None:
        """The budget in bytes a sample; None where there is none.

        `direct`: bytes of the dense layer or network, in all or of its busiest worker, as `communication` says.
        """
        if self.budget is not None:
            return math.floor(self.budget * direct + 1e-9)
        return self.budget_bytes

    def limit(self, problem: LayerProblem) -> float | None:
        """The budget of this layer in bytes a sample, in all or for each worker; None where there is none."""
        return self.allowed_bytes(direct_busiest(problem) if self.communication == "busiest" else problem.direct_volume)

    def allowance(self, problem: LayerProblem) -> Allowance | None:
        """The budget to be spent transfer by transfer; None where there is none."""
        allowed = self.limit(problem)
        return None if allowed is None else Allowance(problem, allowed, self.communication)

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        work = 0.0
        if self.mac_price > 0:
            work = self.mac_price * float(metrics.message_macs(problem, owner, exchange).sum())
        if self.max_nmse is not None:
            return work + metrics.priced_communication(problem, exchange, self.communication)
        error = work + metrics.weighted_error(problem, owner, weight, exchange)
        if self.transfer_price is None:
            return error
        return error + self.transfer_price * metrics.priced_communication(problem, exchange, self.communication)

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        judged = self.judged(problem)
        if exchange is not None and exchange.has_codes:
            return compensated_cost_with_codes(judged, exchange)
        return compensated_cost(judged, _transfers(problem, exchange))

    def select(
        self, problem: LayerProblem, owner: NDArray[np.int64], out_of_time: Callable[[], bool] = lambda: False
    ) -> Exchange:
        """What is worth most a byte: transfers by their energy on the diagonal of C, or codes by `select_codes`."""
        if self.sends_codes:
            return select_codes(problem, self, owner, out_of_time)
        return self.take(problem, owner, self.ranking(problem, owner), out_of_time)

    def ranking(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Iterator[tuple[int, int, float]]:
        """(value, worker, energy per byte or priced byte) of the transfers that have any, greatest first."""
        rate = self._rate(problem, owner)
        order = np.argsort(-rate, axis=None, kind="stable")[: np.count_nonzero(rate)]
        value, worker = np.unravel_index(order, rate.shape)
        return zip(value, worker, rate.ravel()[order], strict=True)

    def paid(self, problem: LayerProblem) -> NDArray[np.float64]:
        """(n, P) what a transfer counts against the limit: bytes, or priced bytes."""
        return problem.transfer_bytes.astype(np.float64) if self.has_budget else problem.transfer_price

    def _rate(self, problem: LayerProblem, owner: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, P) energy that a transfer saves for each byte or priced byte, on the diagonal of C."""
        gain = value_energy(self.judged(problem), owner)
        gain[~problem.remote] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(gain > 0, gain / self.paid(problem), 0.0)

    def take(
        self,
        problem: LayerProblem,
        owner: NDArray[np.int64],
        ranked: Iterator[tuple[int, int, float]],
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> Exchange:
        """The transfers to make out of (value, worker, gain per byte or priced byte), greatest first."""
        if self.max_nmse is not None:
            return self._take_until(problem, owner, ranked, out_of_time)
        taken = np.zeros((problem.n, problem.P), dtype=bool)
        if self.transfer_price is None:
            allowance = self.allowance(problem)
            assert allowance is not None
            for j, k, _ in ranked:
                taken[j, k] = allowance.take(j, k)
        elif self.communication == "busiest":
            # Loads that are level share the price; below that, only what is free beside the busiest is worth it.
            least = _LEAST_SHARE * self.transfer_price / problem.P
            ranking = Ranking.of_rates(problem, list(takewhile(lambda transfer: transfer[2] > least, ranked)))
            taken = ranking.transfers(problem, ranking.best_fill(problem, self.transfer_price))
        else:
            for j, k, rate in ranked:
                if rate <= self.transfer_price:
                    break
                taken[j, k] = True
        return Exchange.of_transfers(taken, problem.input_owner)

    def repair(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> Weight:
        if exchange.has_codes:
            return refit_with_codes(problem, owner, exchange)
        return refit(problem, owner, exchange.transfers)

    def meets(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange) -> bool:
        """Whether the NMSE after refit is at most `max_nmse`."""
        return self._meets(_nmse_after(problem, owner, self.repair(problem, owner, exchange), exchange))

    def violations(
        self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight
    ) -> tuple[str, ...]:
        allowed = self.limit(problem)
        is_busiest = self.communication == "busiest"
        used = (metrics.busiest if is_busiest else metrics.volume)(problem, exchange)
        if allowed is not None and used > allowed:
            what = "busiest worker with" if is_busiest else "volume"
            return (f"{what} {used} bytes is above the budget, {allowed:g}",)
        if self.max_nmse is not None:
            reached = _nmse_after(problem, owner, weight, exchange)
            if not self._meets(reached):
                return (f"NMSE {reached:.4g} is above max_nmse, {self.max_nmse:g}",)
        return ()

    def hypergraph(self, problem: LayerProblem, owner: NDArray[np.int64] | None = None) -> Hypergraph | None:
        """Energies on the diagonal of C as pins. A limit becomes the price a byte of its last transfer at `owner`.

        None with "busiest", where what a transfer costs depends on the others, and for codes.
        """
        if self.communication == "busiest" or self.sends_codes:
            return None
        price = self.transfer_price
        if price is None:
            if owner is None:
                return None
            rate = self._rate(problem, owner)
            price = float(rate[self.select(problem, owner).transfers].min(initial=np.inf))
        judged = self.judged(problem)
        pins = value_pins(judged)
        energy = judged.output_weight @ judged.output_energy
        with np.errstate(invalid="ignore"):
            prices = np.where(problem.remote, price * self.paid(problem), 0.0)
        return Hypergraph(
            pins,
            np.nan_to_num(prices, nan=0.0, posinf=np.inf),  # a free transfer is free at any price
            keeps_all=False,
            is_exact=self.transfer_price is not None and problem.moments.is_diagonal,
            constant=float(energy - pins.sum()),
        )

    def selection_is_exact(self, problem: LayerProblem) -> bool:
        if self.sends_codes:
            return codes_are_exact(problem, self)
        if not problem.moments.is_diagonal or self.communication == "busiest":
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
        self,
        problem: LayerProblem,
        owner: NDArray[np.int64],
        ranked: Iterator[tuple[int, int, float]],
        out_of_time: Callable[[], bool],
    ) -> Exchange:
        """The shortest prefix of the ranking whose NMSE after refit is low enough (bisection; all if none is).

        With "busiest" then the lowest cap on each worker under which a greedy along the ranking reaches as much.
        """
        pairs: list[tuple[int, int, float]] = []

        def of_prefix(count: int) -> NDArray[np.bool_]:
            taken = np.zeros((problem.n, problem.P), dtype=bool)
            for j, k, _ in pairs[:count]:
                taken[j, k] = True
            return taken

        def reaches(transfers: NDArray[np.bool_]) -> bool:
            return self.meets(problem, owner, Exchange.of_transfers(transfers, problem.input_owner))

        low, step = -1, 1
        while not reaches(of_prefix(len(pairs))):
            low = len(pairs)
            pairs.extend(islice(ranked, None if out_of_time() else step))
            step *= 2
            if len(pairs) == low:
                return Exchange.of_transfers(of_prefix(low), problem.input_owner)
        high = len(pairs)
        while high - low > 1 and not out_of_time():
            middle = (low + high) // 2
            low, high = (low, middle) if reaches(of_prefix(middle)) else (middle, high)
        transfers = of_prefix(high)
        if self.communication == "busiest" and high > 0 and not out_of_time():
            pairs.extend(islice(ranked, _LOOK_AHEAD * high))
            transfers = _under_least_cap(problem, pairs, high, transfers, reaches, out_of_time)
        return Exchange.of_transfers(transfers, problem.input_owner)


def _check_messages(formulation: Volume) -> None:
    if formulation.messages not in MESSAGES:
        raise InvalidArgument("messages", repr(formulation.messages), " or ".join(repr(name) for name in MESSAGES))
    if formulation.sends_codes and formulation.communication == "busiest":
        raise InvalidArgument("messages", f'{formulation.messages!r} with communication="busiest"', '"values"')
    check_price("mac_price", formulation.mac_price)
    if formulation.mac_price > 0 and formulation.messages != "mixed":
        raise InvalidArgument("mac_price", f"{formulation.mac_price:g} with {formulation.messages!r}", '0, or "mixed"')


def _under_least_cap(
    problem: LayerProblem,
    pairs: list[tuple[int, int, float]],
    count: int,
    transfers: NDArray[np.bool_],
    reaches: Callable[[NDArray[np.bool_]], bool],
    out_of_time: Callable[[], bool],
) -> NDArray[np.bool_]:
    """(n, P) what the lowest cap takes that reaches the limit, below what the first `count` pairs, `transfers`, need.

    By bisection over the amounts of the busiest worker along those pairs.
    """
    ranking = Ranking.of_rates(problem, pairs)
    levels = np.concatenate([[0.0], np.unique(ranking.levels(problem)[:count])])
    low, high = -1, len(levels) - 1
    while high - low > 1 and not out_of_time():
        middle = (low + high) // 2
        tried = ranking.transfers(problem, ranking.fill(problem, levels[middle]))
        if reaches(tried):
            high, transfers = middle, tried
        else:
            low = middle
    return transfers


def _transfers(problem: LayerProblem, exchange: Exchange | None) -> NDArray[np.bool_]:
    return np.zeros((problem.n, problem.P), dtype=bool) if exchange is None else exchange.transfers


def _nmse_after(problem: LayerProblem, owner: NDArray[np.int64], weight: Weight, exchange: Exchange) -> float:
    return metrics.nmse(problem, owner, weight, corrected_bias(problem, weight), exchange)
