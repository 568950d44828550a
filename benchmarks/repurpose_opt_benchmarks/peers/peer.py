"""What the peers share: which problems they take, and the way from chosen groups to an exchange."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky, solve_triangular

from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.problem import LayerProblem, dense
from repurpose_opt.solver import Candidate, SolveOptions, Termination
from repurpose_opt_solvers.reduced import WorkerProblem, worker_problems


@dataclass(frozen=True, eq=False)
class Groups:
    """What one worker may receive, with the weights before pruning."""

    reduced: WorkerProblem
    weight: NDArray[np.float64]
    """√g W̃ (r, c) of the columns that the worker lacks, rotated as R is: the best weights if it received all."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The groups that a peer keeps."""

    kept: list[NDArray[np.bool_]]
    """(c,) for each worker."""
    stats: dict[str, Any] = field(default_factory=dict)


class Peer(ABC):
    """A pruner for a hard budget and inputs of one size, one column each. It pays no heed to a time limit."""

    name: str
    requires: tuple[str, ...] = ()

    @abstractmethod
    def choose(self, problem: LayerProblem, workers: Sequence[Groups], count: int) -> Choice:
        """At most `count` groups of all workers together; 0 < count < all of them, no worker without any gain."""

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        if not isinstance(formulation, Volume) or formulation.communication != "total":
            return "Volume only, with communication='total'"
        if formulation.budget is None and formulation.budget_bytes is None:
            return "a budget or budget_bytes only"
        if problem.moments.is_diagonal:
            return "full moments only"
        if not problem.one_column_per_value or len(np.unique(problem.value_bytes)) > 1 or problem.value_bytes[0] == 0:
            return "inputs of one column and of the same size only"
        return None

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        owner: NDArray[np.int64],
        start: Exchange | None = None,
    ) -> Candidate:
        """The same answer whatever the start."""
        assert isinstance(formulation, Volume)
        allowed = formulation.limit(problem)
        assert allowed is not None
        count = int(allowed // problem.value_bytes[0])
        transfers = np.zeros((problem.n, problem.P), dtype=bool)
        workers = groups(problem, formulation, owner)
        reduced = [worker.reduced for worker in workers]
        stats: dict[str, Any] = {}
        if count >= sum(len(worker.value) for worker in reduced):
            for worker in reduced:
                transfers[worker.value, worker.worker] = True
        elif count > 0:
            choice = self.choose(problem, workers, count)
            stats = choice.stats
            for worker, kept in zip(reduced, choice.kept, strict=True):
                transfers[worker.value[kept], worker.worker] = True
        exchange = Exchange.of_transfers(transfers, problem.input_owner)
        return Candidate(Termination.HEURISTIC, owner, exchange, stats=stats)


def groups(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> list[Groups]:
    """Of each worker that has anything to gain."""
    reduced = [worker for worker in worker_problems(problem, formulation, owner) if worker.residual.any()]
    return [Groups(worker, _weight(problem, owner, worker)) for worker in reduced]


def largest(scores: Sequence[NDArray[Any]], count: int) -> list[NDArray[np.bool_]]:
    """Which of the scores (c,) of each worker are positive and among the `count` largest of all; the first of ties."""
    joined = np.concatenate(scores)
    kept = np.zeros(len(joined), dtype=bool)
    kept[np.argsort(-joined, kind="stable")[:count]] = True
    return np.split(kept & (joined > 0), np.cumsum([len(score) for score in scores])[:-1])


def column_energy(matrix: NDArray[Any]) -> NDArray[Any]:
    """(c,) squared norm of each column of a matrix (r, c)."""
    return np.asarray(np.einsum("rc,rc->c", matrix, matrix))


def error(worker: WorkerProblem, weight: NDArray[np.float64]) -> float:
    """A worker's error, tr(V K Vᵀ) − 2 tr(R Vᵀ) + energy, for weights V (r, c) on the columns that it lacks, and the
    best ones on those that it holds. O(r s²) for s nonzero columns."""
    read = np.flatnonzero(weight.any(axis=0))
    kept = weight[:, read]
    moment = worker.moment[np.ix_(read, read)]
    return float(worker.energy + np.sum((kept @ moment - 2 * worker.residual[:, read]) * kept))


def refitted_error(worker: WorkerProblem, kept: NDArray[np.bool_]) -> float:
    """A worker's error after refit with the columns kept (c,). O(s³ + r s²) for s of them."""
    read = np.flatnonzero(kept)
    factor = cholesky(worker.moment[np.ix_(read, read)], lower=True)
    half = solve_triangular(factor, worker.residual[:, read].T, lower=True)
    return worker.energy - float(np.sum(np.square(half)))


def _weight(problem: LayerProblem, owner: NDArray[np.int64], worker: WorkerProblem) -> NDArray[np.float64]:
    rows = np.flatnonzero(owner[problem.row_neuron] == worker.worker)
    target = dense(problem.target_weight[rows])[:, worker.column] * np.sqrt(problem.output_weight[rows])[:, None]
    return target.astype(np.float64) if worker.rotation is None else worker.rotation.T @ target
