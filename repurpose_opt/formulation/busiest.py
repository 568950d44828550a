"""What `communication="busiest"` shares between formulations: the worker that sends or receives most is what counts.

Given the gain of each transfer, the best set under a price is that of the largest gain − price · busiest. For a cap
on every worker it is a multiple knapsack problem, which a greedy by gain per byte fills; the cap is searched for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.problem import LayerProblem

COMMUNICATIONS = ("total", "busiest")
_CAPS = 12
_SHARPNESS = 8.0
_MOST_ROUNDS = 40


def check_communication(value: object) -> None:
    """Raises InvalidArgument unless it is "total" or "busiest"."""
    if value not in COMMUNICATIONS:
        raise InvalidArgument("communication", repr(value), " or ".join(repr(name) for name in COMMUNICATIONS))


def worker_totals(problem: LayerProblem, transferred: NDArray[Any]) -> NDArray[np.float64]:
    """(2, P) what each worker sends (row 0) and receives (row 1), of amounts (n, P) that go to worker k."""
    sent = np.bincount(problem.input_owner, transferred.sum(axis=1), problem.P)
    return np.stack([sent, transferred.sum(axis=0)])


def direct_busiest(problem: LayerProblem) -> int:
    """Bytes that the dense layer's busiest worker sends or receives: every value to every worker with capacity."""
    return int(worker_totals(problem, problem.transfer_bytes * (problem.capacity > 0)).max())


def pressure(problem: LayerProblem, transfers: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(n, P) derivative of a smooth busiest by the priced bytes of a transfer: soft-max weights of its two workers.

    The weights of all senders and receivers together are 1; without transfers all are equal.
    """
    totals = worker_totals(problem, np.where(transfers, problem.transfer_price, 0.0))
    share = np.exp(_SHARPNESS * (totals / max(totals.max(), np.finfo(float).tiny) - 1))
    share /= share.sum()
    return share[0][problem.input_owner][:, None] + share[1]


class Allowance:
    """The bytes of a budget that are left: in all, or to send and to receive for each worker."""

    def __init__(self, problem: LayerProblem, allowed: float, communication: str) -> None:
        self._problem = problem
        self._by_worker = communication == "busiest"
        self._left = [allowed] * (2 * problem.P if self._by_worker else 1)

    def fits(self, worker: int) -> NDArray[np.bool_]:
        """(n,) which values may still be sent to a worker."""
        left = np.array(self._left)
        size = self._problem.transfer_bytes[:, worker]
        if not self._by_worker:
            return size <= left[0]
        return (size <= left[self._problem.input_owner]) & (size <= left[self._problem.P + worker])

    def take(self, value: int, worker: int) -> bool:
        """Whether a transfer still fits; if so, it is accounted for."""
        size = self._problem.transfer_bytes[value, worker]
        accounts = (self._problem.input_owner[value], self._problem.P + worker) if self._by_worker else (0,)
        if any(size > self._left[account] for account in accounts):
            return False
        for account in accounts:
            self._left[account] -= size
        return True


@dataclass(frozen=True, eq=False)
class Ranking:
    """Transfers in the order in which a greedy looks at them."""

    value: NDArray[np.int64]
    """(transfers,)"""
    worker: NDArray[np.int64]
    """(transfers,) that it is sent to."""
    size: NDArray[np.float64]
    """(transfers,) bytes or priced bytes."""
    gain: NDArray[np.float64]
    """(transfers,) error that it saves."""

    @staticmethod
    def of_gains(gain: NDArray[np.float64], size: NDArray[np.float64]) -> Ranking:
        """The transfers (n, P) with a gain, greatest gain per size first."""
        value, worker = np.nonzero(gain > 0)
        gains, sizes = gain[value, worker], size[value, worker]
        with np.errstate(divide="ignore"):
            order = np.argsort(-gains / sizes, kind="stable")
        return Ranking(value[order], worker[order], sizes[order], gains[order])

    @staticmethod
    def of_rates(problem: LayerProblem, ranked: list[tuple[int, int, float]]) -> Ranking:
        """(value, worker, gain per priced byte) in their order. What is free counts no gain: it is always taken."""
        value = np.array([j for j, _, _ in ranked], dtype=np.int64)
        worker = np.array([k for _, k, _ in ranked], dtype=np.int64)
        size = problem.transfer_price[value, worker]
        rate = np.array([rate for _, _, rate in ranked], dtype=np.float64)
        return Ranking(value, worker, size, np.where(size > 0, rate, 0.0) * size)

    def transfers(self, problem: LayerProblem, taken: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """(n, P) the transfers that are taken."""
        chosen = np.zeros((problem.n, problem.P), dtype=bool)
        chosen[self.value[taken], self.worker[taken]] = True
        return chosen

    def levels(self, problem: LayerProblem) -> NDArray[np.float64]:
        """(transfers,) the busiest worker's amount after each transfer of the ranking."""
        everything = np.ones(len(self.size), dtype=bool)
        sent, received = (side.running(self.size, everything) for side in self._sides(problem))
        return np.asarray(np.maximum.accumulate(np.maximum(sent, received)))

    def fill(self, problem: LayerProblem, cap: float) -> NDArray[np.bool_]:
        """(transfers,) what a greedy takes that passes over what would put a worker above the cap.

        In rounds: a transfer that fits even if all undecided ones before it are taken is taken, one that does not fit
        even if none of them is, is not. The first undecided one is always decided; what is left after 40 rounds is
        passed over. O(transfers · rounds).
        """
        cap = cap * (1 + 1e-9)
        sides = self._sides(problem)
        taken, undecided = np.zeros(len(self.size), dtype=bool), np.ones(len(self.size), dtype=bool)
        for _ in range(_MOST_ROUNDS):
            if not undecided.any():
                break
            at_most = np.maximum(*(side.running(self.size, taken | undecided) for side in sides))
            at_least = np.maximum(*(side.running(self.size, taken) for side in sides)) + self.size
            fits = undecided & (at_most <= cap)
            passed = undecided & ~fits & (at_least > cap)
            passed[np.argmax(undecided)] |= not fits[np.argmax(undecided)]
            taken |= fits
            undecided &= ~(fits | passed)
        return taken

    def best_fill(self, problem: LayerProblem, price: float) -> NDArray[np.bool_]:
        """(transfers,) the fill of the largest gain − price · busiest, over a coarse and then a fine choice of caps."""
        levels = np.concatenate([[0.0], np.unique(self.levels(problem))])
        low, high = 0, len(levels) - 1
        best, best_worth = self.fill(problem, 0.0), -np.inf
        for _ in range(2):
            tried = np.unique(np.linspace(low, high, _CAPS).astype(int))
            fills = [self.fill(problem, levels[position]) for position in tried]
            worths = [self._worth(problem, taken, price) for taken in fills]
            first = int(np.argmax(worths))
            if worths[first] > best_worth:
                best, best_worth = fills[first], worths[first]
            low, high = tried[max(first - 1, 0)], tried[min(first + 1, len(tried) - 1)]
        return best

    def _worth(self, problem: LayerProblem, taken: NDArray[np.bool_], price: float) -> float:
        amounts = np.zeros((problem.n, problem.P))
        amounts[self.value[taken], self.worker[taken]] = self.size[taken]
        return float(self.gain[taken].sum() - price * worker_totals(problem, amounts).max())

    def _sides(self, problem: LayerProblem) -> tuple[_Side, _Side]:
        return _Side(problem.input_owner[self.value]), _Side(self.worker)


class _Side:
    """Sums along a ranking, for the worker at one end of each transfer."""

    def __init__(self, worker: NDArray[np.int64]) -> None:
        self.order = np.argsort(worker, kind="stable")
        ordered = worker[self.order]
        self.first = np.searchsorted(ordered, ordered)

    def running(self, size: NDArray[np.float64], counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(transfers,) what the worker of each transfer has, that transfer included, of those that are counted."""
        before = np.concatenate([[0.0], np.cumsum(np.where(counted, size, 0.0)[self.order])])
        sums = np.empty(len(size))
        sums[self.order] = before[1:] - before[self.first]
        return sums
