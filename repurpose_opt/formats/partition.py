"""What other people's solvers answer: a partition file, or the values of a linear model's variables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem, Weight
from repurpose_opt.solve import solve_problem

_PLACE = re.compile(r"x_(\d+)_(\d+)\s+(\S+)")
_END_OF_PRIMAL = ("# Rows", "# Dual")


def read_partition(path: Path | str, problem: LayerProblem) -> NDArray[np.int64]:
    """(m,) the worker of each neuron, from a file that a solver wrote; it may break capacity, min_load and allowed.

    A partition file has a block, 0 … P−1, on each line: of the m neurons, whose blocks are then the workers; or of
    the m + P vertices of `write_hgr`, or the m + n + P of `write_metis`. With terminals, blocks are named by those
    they hold (and the inputs): the assignment of blocks to workers that has most of them at home.
    A file that ends in .sol has `variable value` on each line, as HiGHS, SCIP and Gurobi write it; the x_i_k count.

    Raises InvalidArgument, naming file and line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise InvalidArgument("partition", f"{path} ({reason})", "a partition file, or a .sol") from None
    if path.suffix.lower() == ".sol":
        return _of_solution(path, lines, problem)
    while lines and not lines[-1].strip():
        lines.pop()
    m, n, P = problem.m, problem.n, problem.P
    if len(lines) not in (m, m + P, m + n + P):
        allowed = f"{m} (neurons), {m + P} (and terminals) or {m + n + P} (neurons, inputs and terminals)"
        raise InvalidArgument("partition", f"{path} with {len(lines)} lines", allowed)
    block = np.array([_block(path, number, line, P) for number, line in enumerate(lines, 1)])
    worker_of_block = np.arange(P) if len(block) == m else _worker_of_block(problem, block[m:-P], block[-P:])
    return worker_of_block[block[:m]]


def nearest_placement(
    problem: LayerProblem, owner: NDArray[np.int64], cost: NDArray[np.float64] | None = None
) -> NDArray[np.int64]:
    """(m,) the valid placement that moves the least load away from `owner`; of least cost (m, P) among those.

    Exact for equal loads, a heuristic for others. Raises NoSolution.
    """
    away = np.repeat(problem.load[:, None], problem.P, axis=1)
    away[np.arange(problem.m), owner] = 0.0
    if cost is not None:
        relative = cost - cost.min(axis=1, keepdims=True)
        most = relative.max()
        away += relative * (problem.load.min() / (2 * problem.m * most) if most > 0 else 0.0)
    nearest = solve_problem(problem, _Nearest(away), partitioner="alternate", pruner="threshold").require().owner
    assert nearest is not None
    return nearest


@dataclass(frozen=True, eq=False)
class _Nearest(Formulation):
    """What it costs to place each neuron by itself; nothing is sent."""

    cost: NDArray[np.float64]
    """(m, P)"""
    name = "nearest"
    assignment_is_exact = True

    def objective(self, problem: LayerProblem, owner: NDArray[np.int64], exchange: Exchange, weight: Weight) -> float:
        return float(self.cost[np.arange(problem.m), owner].sum())

    def assignment_cost(
        self, problem: LayerProblem, owner: NDArray[np.int64] | None, exchange: Exchange | None
    ) -> NDArray[np.float64]:
        return self.cost

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        return Exchange.of_transfers(np.zeros((problem.n, problem.P), dtype=bool), problem.input_owner)


def _block(path: Path, number: int, line: str, P: int) -> int:
    text = line.strip()
    if not text.isdecimal() or int(text) >= P:
        raise InvalidArgument("partition", f"{path}, line {number}: {text!r}", f"a block, 0 … {P - 1}")
    return int(text)


def _worker_of_block(
    problem: LayerProblem, inputs: NDArray[np.int64], terminals: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(P,) one worker for each block, from the blocks of inputs, (n,) or (0,), and of terminals, (P,).

    A terminal counts more than all inputs.
    """
    held = np.zeros((problem.P, problem.P))
    if len(inputs):
        np.add.at(held, (inputs, problem.input_owner), 1.0)
    np.add.at(held, (terminals, np.arange(problem.P)), problem.n + 1.0)
    return np.asarray(linear_sum_assignment(held, maximize=True)[1])


def _of_solution(path: Path, lines: list[str], problem: LayerProblem) -> NDArray[np.int64]:
    chosen = np.zeros((problem.m, problem.P))
    for number, line in enumerate(lines, 1):
        if line.startswith(_END_OF_PRIMAL):
            break
        found = _PLACE.match(line.strip())
        if found is None:
            continue
        neuron, worker = int(found[1]), int(found[2])
        if neuron >= problem.m or worker >= problem.P:
            allowed = f"x_0_0 … x_{problem.m - 1}_{problem.P - 1}"
            raise InvalidArgument("partition", f"{path}, line {number}: {found[0]!r}", allowed)
        try:
            chosen[neuron, worker] = float(found[3])
        except ValueError:
            raise InvalidArgument("partition", f"{path}, line {number}: {found[3]!r}", "a number") from None
    undecided = np.flatnonzero(~(chosen.max(axis=1) > 0.5))
    if len(undecided):
        i = undecided[0]
        raise InvalidArgument("partition", f"{path}, in which no x_{i}_k is 1", "a worker for each neuron")
    return chosen.argmax(axis=1)
