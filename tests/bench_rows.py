"""Rows of a benchmark as a results file would have them, without solving anything."""

from __future__ import annotations

from typing import Any

import numpy as np

from repurpose_opt.bench.row import SCHEMA, Failure, Row


def row(**changes: Any) -> Row:
    """A solve of one second limit that answered with objective 10 and bound 8 in half a second; with these changes.

    A row that is changed to a failure, or to `infeasible` or `unsupported`, has no answer unless the changes name one.
    """
    cells: dict[str, Any] = {
        "testset": "tiny",
        "instance": "first",
        "solver": "flow/auto",
        "seed": 0,
        "time_limit": 1.0,
        "threads": 1,
        "memory_limit": 2**30,
        "schema": SCHEMA,
        "fingerprint": f"print of {changes.get('instance', 'first')}",
        "kind": "",
        "judge_once": False,
        "formulation": "volume",
        "m": 8,
        "n": 6,
        "P": 2,
        "nonzeros": 48,
        "termination": "heuristic",
        "failure": None,
        "message": "",
        "refused": (),
        "objective": 10.0,
        "bound": 8.0,
        "surrogate_bound": None,
        "nmse": 0.1,
        "volume": 12,
        "direct_volume": 48,
        "busiest": 8,
        "seconds": 0.5,
        "cpu_seconds": 0.5,
        "peak_bytes": 10**6,
        "overhead": 0.01,
        "trajectory": (),
        "has_answer": False,
    }
    failure = changes.get("failure")
    termination = changes.get("termination")
    if failure is not None:
        cells["termination"] = "time_limit" if failure in (Failure.TIMEOUT, Failure.NO_ANSWER) else "error"
    if failure is not None or termination in ("infeasible", "unsupported", "error"):
        cells |= dict.fromkeys(("objective", "bound", "nmse", "volume", "busiest"))
    return Row(**{**cells, **changes})


def many(solvers: int, instances: int, seeds: int, rng: np.random.Generator) -> list[Row]:
    """One row for each solver, instance and seed; about one in twenty fails, one in ten solves of a solver is proved.

    Solver s is named `solver-s/auto`, instance i `instance-i`; later solvers are worse and faster.
    """
    optimum = rng.lognormal(3.0, 1.0, instances)
    sizes = rng.integers(4, 1000, instances)
    rows = []
    for s in range(solvers):
        for i in range(instances):
            for seed in range(seeds):
                cells: dict[str, Any] = {
                    "solver": f"solver-{s}/auto",
                    "instance": f"instance-{i}",
                    "seed": seed,
                    "formulation": ("edge", "volume", "lossless")[i % 3],
                    "m": int(sizes[i]),
                    "seconds": float(rng.uniform(0.01, 1.0) / (1 + s)),
                }
                rows.append(row(**cells, **_outcome(float(optimum[i]), s, rng)))
    return rows


def _outcome(optimum: float, s: int, rng: np.random.Generator) -> dict[str, Any]:
    kind = rng.random()
    if kind < 0.05:
        return {"failure": list(Failure)[int(rng.integers(len(Failure)))]}
    if kind < 0.15:
        return {"objective": optimum, "bound": optimum, "termination": "optimal"}
    objective = optimum * (1 + 0.05 * s + float(rng.exponential(0.05)))
    trajectory = ((0.005, 2 * objective), (0.01, 1.2 * objective), (0.02, objective))
    return {"objective": objective, "bound": 0.9 * optimum, "trajectory": trajectory}
