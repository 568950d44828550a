"""Codes on tiny layers: equal to the least objective where it can be known otherwise, and the gaps where it cannot.

`uncorrelated`: the values of different workers are, those of one worker are not; each neuron's owner is fixed. The
least objective is found by trying all combinations of ranks of all pairs of workers, the error of each rank from the
singular values of √g W̃_kp C_pp^½, computed here from the layer's data (symmetric root, numpy.linalg.svd), not by the
library. Where it is asked for, also by an independent proof: with A_pk = √g W̃_kp C_pp^½, codes lower the error by
⟨A_pkᵀA_pk, Π_pk⟩ for projections Π_pk on as many dimensions as there are numbers, and a semidefinite program over their
convex hull, 0 ≼ Y_pk ≼ I with tr Y_pk instead of the numbers (Overton and Womersley 1992, SIAM J. Matrix Anal. Appl.
13), gives the most that all pairs together can be worth under the budget or at the price.

`correlated`: greedy codes and the descent from them, against the bound of merged sources
(`code_bounds.merged_source_bound`) and that of the nuclear norm relaxation. A gap is (objective − bound) / objective.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import LayerProblem, Termination, Volume, registry
from repurpose_opt.moments import Moments
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import RESULTS, environment, tasks
from repurpose_opt_benchmarks.code_bounds import merged_source_bound
from repurpose_opt_benchmarks.pruning import pruned
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

UNCORRELATED, CORRELATED = "uncorrelated", "correlated"
SEEDS, PROOFS = 200, 20
QUICK_SEEDS, QUICK_PROOFS = 12, 3
WORKERS = (2, 3, 4)
BLOCKS = {2: ((2, 5), (3, 6), (4, 4)), 3: ((1, 2, 4), (2, 3, 3), (1, 3, 3)), 4: ((1, 1, 2, 3), (1, 2, 2, 3))}
"""Values of the workers by P: few enough to try all ranks of all pairs."""
CORRELATED_VALUES, CORRELATED_NEURONS = 20, 12
GREEDY, DESCENT = "code-greedy", "code-greedy+code-descent"
NUCLEAR = "nuclear-norm-fast"
"""The relaxation whose bound is used, where it is installed."""
TOLERANCE = 1e-8
"""Relative, of objectives that should be equal: the refit and singular values round differently."""
SDP_TOLERANCE = 1e-6
"""Relative, of the semidefinite program."""
PACKAGES = ("cvxpy", "clarabel")

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A generated layer; the key of a row."""

    kind: str
    seed: int
    with_proof: bool = False
    """Whether the semidefinite program is solved."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks codes-tiny", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="cases at a time, one core each (default 2)")
    parser.add_argument("--quick", action="store_true", help="a few cases of each kind; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report; cases that it has are not solved again")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}; allowed: at least 1")
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    log = None if folder is None else folder / "codes-tiny.rows.jsonl"
    seeds, proofs = (QUICK_SEEDS, QUICK_PROOFS) if args.quick else (SEEDS, PROOFS)
    rows = tasks.run(list(every_case(seeds, proofs)), figures, args.jobs, log, "cases")
    report = {
        "command": f"python -m repurpose_opt_benchmarks codes-tiny --jobs {args.jobs}" + " --quick" * args.quick,
        "environment": environment(*PACKAGES),
        "bars": list(bars(rows)),
        "rows": rows,
    }
    print(markdown(report))
    if folder is not None:
        write(folder, "codes-tiny", report, markdown(report))
    return 0


def every_case(seeds: int, proofs: int) -> Iterator[Case]:
    """As many of both kinds; every tenth or so of the uncorrelated ones with a proof, where CVXPY is installed."""
    every = seeds // proofs if find_spec("cvxpy") is not None else seeds + 1
    yield from (Case(UNCORRELATED, seed, seed % every == every - 1) for seed in range(seeds))
    yield from (Case(CORRELATED, seed) for seed in range(seeds))


def figures(case: Case) -> Row:
    return uncorrelated_figures(case) if case.kind == UNCORRELATED else correlated_figures(case)


def uncorrelated_figures(case: Case) -> Row:
    """What the library answers, and the least objective by other means."""
    problem, formulation, owner = uncorrelated_case(case.seed)
    solution = solve_problem(problem, formulation, partitioner="munkres")
    least = least_objective_over_ranks(problem, formulation, owner)
    return {
        **_described(problem, formulation),
        "termination": str(solution.termination),
        "objective": solution.objective if solution.owner is not None else None,
        "bound": solution.bound,
        "least": least,
        "least_by_sdp": least_objective_by_sdp(problem, formulation, owner) if case.with_proof else None,
        "violations": list(solution.violations) if solution.owner is not None else [solution.message],
    }


def correlated_figures(case: Case) -> Row:
    """Objectives of the pruners for the same owners, and lower bounds."""
    problem, formulation, owner = correlated_case(case.seed)
    names = [GREEDY, DESCENT, *[NUCLEAR] * registry.is_installed("pruners", NUCLEAR)]
    answers = {name: pruned(name, problem, formulation, owner).require() for name in names}
    return {
        **_described(problem, formulation),
        "objective": {name: answer.objective for name, answer in answers.items()},
        "merged_bound": merged_source_bound(problem, formulation, owner),
        "nuclear_bound": answers[NUCLEAR].bound if NUCLEAR in answers else None,
        "violations": [wrong for answer in answers.values() for wrong in answer.violations],
    }


def _described(problem: LayerProblem, formulation: Volume) -> Row:
    return {"P": problem.P, "limit": "budget" if formulation.has_budget else "price", "n": problem.n}


def uncorrelated_case(seed: int) -> tuple[LayerProblem, Volume, NDArray[np.int64]]:
    """C block-diagonal by owner and full inside, x̂ ≠ x, loss weights; each neuron's owner (m,) fixed by `allowed`."""
    random = np.random.default_rng([seed, 0])
    P = int(random.choice(WORKERS))
    blocks = random.permutation(BLOCKS[P][random.integers(len(BLOCKS[P]))])
    input_owner = random.permutation(np.repeat(np.arange(P), blocks))
    n = len(input_owner)
    same = input_owner[:, None] == input_owner
    second = np.zeros((n, n))
    for p in range(P):
        second[np.ix_(input_owner == p, input_owner == p)] = _covariance(random, int(blocks[p]))
    assert not second[~same].any()
    owner = np.concatenate([np.arange(P), random.integers(0, P, int(random.integers(2, 9)))])
    allowed = owner[:, None] == np.arange(P)
    return _case(random, second, input_owner, owner, allowed=allowed, capacity=[len(owner)] * P)


def correlated_case(seed: int) -> tuple[LayerProblem, Volume, NDArray[np.int64]]:
    """A full C, x̂ ≠ x and loss weights, runs of values of unequal length on the workers; and owners (m,)."""
    random = np.random.default_rng([seed, 1])
    P = int(random.choice(WORKERS))
    cuts = np.sort(random.choice(np.arange(2, CORRELATED_VALUES - 1), P - 1, replace=False))
    input_owner = np.searchsorted(cuts, np.arange(CORRELATED_VALUES), side="right")
    owner = random.permutation(np.arange(CORRELATED_NEURONS) % P)
    return _case(random, _covariance(random, CORRELATED_VALUES), input_owner, owner)


def _case(
    random: np.random.Generator,
    second: NDArray[np.float64],
    input_owner: NDArray[np.int64],
    owner: NDArray[np.int64],
    **arguments: Any,
) -> tuple[LayerProblem, Volume, NDArray[np.int64]]:
    """Normal weights; x = A x̂ + noise with A near I; a budget, or a price with links of different prices."""
    n, m, P = len(input_owner), len(owner), int(input_owner.max()) + 1
    mixing = np.eye(n) + 0.2 * random.normal(size=(n, n)) / np.sqrt(n)
    cross = mixing @ second
    target = cross @ mixing.T + 0.05 * np.eye(n)
    has_budget = bool(random.integers(2))
    price = 1.0 if has_budget else random.integers(1, 4, (P, P)).astype(np.float64)
    problem = LayerProblem.create(
        random.normal(size=(m, n)),
        P,
        input_owner=input_owner,
        moments=Moments.from_raw(second, cross, np.zeros(n), target, np.zeros(n)),
        output_weight=random.uniform(0.2, 2.0, m),
        value_bytes=4,
        link_price=price,
        **arguments,
    )
    if has_budget:
        return problem, Volume(budget=float(random.uniform(0.1, 0.7)), messages="codes"), owner
    worth = problem.output_weight @ problem.output_energy / (4 * n * P)
    return problem, Volume(transfer_price=float(worth * random.uniform(0.05, 0.8)), messages="codes"), owner


def _covariance(random: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Of random eigenvectors, and eigenvalues that fall with their number."""
    basis = np.linalg.qr(random.normal(size=(size, size)))[0]
    return np.asarray((basis / np.arange(1, size + 1)) @ basis.T)


@dataclass(frozen=True, eq=False)
class Blocks:
    """√g W̃_kp C_pp^½ of each pair p → k, and what no code changes: from the layer's data alone."""

    constant: float
    """Error if every worker had all values."""
    of_pair: Mapping[tuple[int, int], NDArray[np.float64]]
    """(rows of k, n_p)"""

    @staticmethod
    def of(problem: LayerProblem, owner: NDArray[np.int64]) -> Blocks:
        """Of uncorrelated sources."""
        moments, ridge = problem.moments, problem.moments.ridge * np.eye(problem.n)
        second, cross, target = moments.second + ridge, moments.cross + ridge, moments.target + ridge
        scaled = np.sqrt(problem.output_weight)[:, None] * problem.weight
        best = scaled @ cross @ np.linalg.inv(second)
        blocks: dict[tuple[int, int], NDArray[np.float64]] = {}
        for p in range(problem.P):
            held = problem.input_owner == p
            root = _symmetric_root(second[np.ix_(held, held)])
            blocks |= {(p, k): best[np.ix_(owner == k, held)] @ root for k in range(problem.P) if k != p}
        constant = np.trace(scaled @ target @ scaled.T) - np.trace(best @ second @ best.T)
        return Blocks(float(constant), blocks)


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T)


def least_objective_over_ranks(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> float:
    """The least objective over all combinations of ranks, for uncorrelated sources of 4 bytes a value."""
    blocks = Blocks.of(problem, owner)
    error, paid = np.array([blocks.constant]), np.zeros(1)
    for pair, block in blocks.of_pair.items():
        squares = np.square(np.linalg.svd(block, compute_uv=False))
        left = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # by rank, 0 … all
        of_number = 4.0 * (1.0 if formulation.has_budget else problem.link_price[pair])
        error = np.add.outer(error, left).ravel()
        paid = np.add.outer(paid, of_number * np.arange(len(left))).ravel()
    if formulation.transfer_price is not None:
        return float((error + formulation.transfer_price * paid).min())
    return float(error[paid <= _limit(problem, formulation)].min())


def _limit(problem: LayerProblem, formulation: Volume) -> float:
    """Bytes: the budget's share of all values sent to all other workers, whole numbers of 4 bytes."""
    assert formulation.budget is not None
    return 4.0 * np.floor(formulation.budget * problem.n * (problem.P - 1) + 1e-9)


def least_objective_by_sdp(problem: LayerProblem, formulation: Volume, owner: NDArray[np.int64]) -> float:
    """A lower bound on the objective by the semidefinite program of the module's docstring, by Clarabel."""
    cp: Any = import_module("cvxpy")

    blocks = Blocks.of(problem, owner)
    price = formulation.transfer_price or 0.0
    gains: list[Any] = []
    numbers: list[Any] = []
    constraints: list[Any] = []
    for pair, block in blocks.of_pair.items():
        if len(block) == 0:
            continue
        size = block.shape[1]
        chosen = cp.Variable((size, size), PSD=True)
        constraints.append(cp.constraints.PSD(np.eye(size) - chosen))
        gains.append(cp.trace((block.T @ block - 4 * price * problem.link_price[pair] * np.eye(size)) @ chosen))
        numbers.append(cp.trace(chosen))
    if formulation.has_budget:
        constraints.append(sum(numbers) <= _limit(problem, formulation) / 4)
    task = cp.Problem(cp.Maximize(sum(gains)), constraints)
    task.solve(solver=cp.CLARABEL)
    unsent = blocks.constant + sum(float(np.square(block).sum()) for block in blocks.of_pair.values())
    return unsent - float(task.value)


def bars(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    exact, others = _of_kind(rows, UNCORRELATED), _of_kind(rows, CORRELATED)
    unproved = sum(row["termination"] != Termination.OPTIMAL for row in exact)
    yield bar("uncorrelated: cases that do not end as optimal", float(unproved), most=0)
    furthest = max(_difference(row["objective"], row["least"]) for row in exact)
    yield bar("uncorrelated: objective from the least over all ranks, relative, largest", furthest, most=TOLERANCE)
    proved = [row for row in exact if row["least_by_sdp"] is not None]
    if proved:
        furthest = max(_difference(row["objective"], row["least_by_sdp"]) for row in proved)
        yield bar(f"uncorrelated: from the semidefinite bound, {len(proved)} cases", furthest, most=SDP_TOLERANCE)
    rises = [row["objective"][DESCENT] / row["objective"][GREEDY] - 1 for row in others]
    yield bar("correlated: descent above its greedy start, relative, largest", max(rises), most=1e-9)
    below = min(_gap(objective, row["merged_bound"]) for row in others for objective in row["objective"].values())
    yield bar("correlated: lowest gap to merged sources, below 0 only by rounding", below, least=-1e-9)
    nuclear = [row for row in others if row["nuclear_bound"] is not None]
    if nuclear:
        below = min(_gap(objective, row["nuclear_bound"]) for row in nuclear for objective in row["objective"].values())
        yield bar("correlated: lowest gap to the nuclear norm's bound", below, least=-1e-9)
    yield bar("answers that are not valid", float(sum(len(row["violations"]) for row in rows)), most=0)


def _of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _difference(objective: float | None, least: float) -> float:
    """Relative; infinite without an answer."""
    return float("inf") if objective is None else abs(objective - least) / max(abs(least), 1e-12)


def _gap(objective: float, bound: float) -> float:
    return (objective - bound) / max(abs(objective), 1e-12)


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    exact = _of_kind(rows, UNCORRELATED)
    lines = ["# Codes on tiny layers", "", *str(__doc__).strip().split("\n"), ""]
    lines += [f"{len(exact)} uncorrelated cases, P = 2 … 4, loss weights, x̂ ≠ x, largest relative difference:", ""]
    header = ("P", "limit", "cases", "optimal", "from all ranks", "from the semidefinite bound", "its cases")
    groups = sorted({(row["P"], row["limit"]) for row in exact})
    lines += table(header, [list(_exact_group(exact, *group)) for group in groups])
    lines += [
        "",
        "Correlated cases, gap of each pruner to both bounds and to the greater of them: median, 90 %, largest:",
    ]
    lines += ["", *_gap_table(_of_kind(rows, CORRELATED))]
    lines += ["", *map(bar_line, report["bars"])]
    lines += ["", f"`{report['command']}`", "", machine_line(report["environment"], *PACKAGES)]
    return "\n".join(lines)


def _exact_group(rows: Sequence[Row], P: int, limit: str) -> Iterator[str]:
    some = [row for row in rows if (row["P"], row["limit"]) == (P, limit)]
    proved = [row for row in some if row["least_by_sdp"] is not None]
    yield from (str(P), limit, str(len(some)))
    yield str(sum(row["termination"] == Termination.OPTIMAL for row in some))
    yield f"{max(_difference(row['objective'], row['least']) for row in some):.1e}"
    yield f"{max(_difference(row['objective'], row['least_by_sdp']) for row in proved):.1e}" if proved else "–"
    yield str(len(proved))


def _gap_table(rows: Sequence[Row]) -> list[str]:
    body = []
    for P in sorted({row["P"] for row in rows}):
        some = [row for row in rows if row["P"] == P]
        for name in some[0]["objective"]:
            found = [_bounds(row) for row in some]
            fields = [
                _quantiles(
                    [_gap(row["objective"][name], bounds[which]) for row, bounds in zip(some, found, strict=True)]
                )
                for which in found[0]
            ]
            body.append([str(P), name, str(len(some)), *fields])
    return table(("P", "pruner", "cases", *_bounds(rows[0])), body)


def _bounds(row: Row) -> dict[str, float]:
    merged = {"merged sources": row["merged_bound"]}
    if row["nuclear_bound"] is None:
        return merged
    return {**merged, "nuclear norm": row["nuclear_bound"], "both": max(row["merged_bound"], row["nuclear_bound"])}


def _quantiles(gaps: Sequence[float]) -> str:
    return ", ".join(f"{max(0.0, float(np.quantile(gaps, share))):.1%}" for share in (0.5, 0.9, 1.0))


if __name__ == "__main__":
    sys.exit(main())
