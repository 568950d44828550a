"""`solve`: places the neurons of one layer, or judges a placement that another program made."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import __version__, metrics
from repurpose_opt.auto import auto_pruner
from repurpose_opt.cli.instance import add_instance, check_file, formulation_of, problem_of, start_of
from repurpose_opt.cli.text import add_verb, aligned, check_output, fail, natural, seconds
from repurpose_opt.errors import InvalidArgument, NoSolution
from repurpose_opt.files import weight_arrays
from repurpose_opt.formats import nearest_placement, read_partition
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.pruning import Pruning, load_pruner
from repurpose_opt.solution import LayerSolution, verify
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions

_FROM_FILE = "file"
"""The partitioner of a placement that was read and not improved."""

_EPILOG = """\
Without a formulation or a price, the layer is solved as Volume with a budget of 0.1: the smallest error of the
layer's output when at most a tenth of the values are sent that the unpruned layer would need.

examples:
  repurpose-opt solve layer.npy --workers 4 --budget 0.05 --inputs samples.npy
  repurpose-opt solve model.safetensors --key fc1.weight --workers 8 --max-nmse 0.02
  repurpose-opt solve layer.npz --workers 4 --formulation edge --transfer-price 1e-4 --partitioner flow
  repurpose-opt solve layer.mtx --workers 8 --formulation lossless --partitioner metis+alternate --json
  repurpose-opt solve layer.mtx --workers 8 --formulation lossless --read-partition layer.mtx.graph.part.8 --rebalance

--read-partition takes what another program answered to a file of "export": a block on each line, as hMETIS, METIS
and KaHyPar write it, for the neurons or for all vertices of the exported file (blocks are then named by the
terminals that they hold); or a .sol file of a MIP solver. The placement is pruned, repaired and judged as any other,
and improved only with --partitioner.

The solution file holds owner (neurons,): the worker of each neuron; transfers (values, workers): whether a value is
sent to a worker, or, where codes are sent, values-P-K: the values that worker P sends to worker K, and code-P-K
(numbers, values of P): what it combines them with; weight: the repaired weights, or weight_data, weight_indices,
weight_indptr and weight_shape of a CSR matrix where the layer is sparse; bias (rows,); and metadata, a string of JSON
with what --json prints. Read it with numpy.load."""


def add(verbs: Any) -> None:
    verb = add_verb(verbs, "solve", "place the neurons of one layer and choose what is sent", epilog=_EPILOG)
    add_instance(verb, start="placement to start from, (neurons,) whole numbers; the answer is never worse")
    search = verb.add_argument_group("how it is solved")
    search.add_argument(
        "--partitioner",
        metavar="CHAIN",
        help='a name of "solvers", or several joined by +; default: auto, or none with --read-partition',
    )
    search.add_argument("--pruner", default="auto", metavar="CHAIN", help="the same for pruners; default: auto")
    search.add_argument("--time-limit", type=seconds, metavar="S", help="seconds for the whole solve; default: none")
    search.add_argument("--seed", type=natural, default=0, metavar="N", help="default: 0")
    search.add_argument(
        "--read-partition", type=Path, metavar="PARTITION", help="placement that another program made; see below"
    )
    search.add_argument(
        "--rebalance",
        action="store_true",
        help="move an invalid placement of --read-partition to the nearest valid one; default: an error",
    )
    output = verb.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE.npz", help="default: FILE.solution.npz")
    output.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.read_partition and args.start:
        args.usage_error("--start and --read-partition are two placements to start from")
    if args.rebalance and not args.read_partition:
        args.usage_error("--rebalance needs --read-partition")
    check_file(args)
    formulation = formulation_of(args)
    output = args.output or args.file.with_name(args.file.name + ".solution.npz")
    check_output(output, args)
    problem = problem_of(args)
    start = start_of(args, problem)
    rebalanced = None
    if args.read_partition:
        read = read_partition(args.read_partition, problem)
        start = _valid(problem, formulation, read, args)
        rebalanced = int((start != read).sum())
    chain = args.partitioner or (_FROM_FILE if args.read_partition else "auto")
    options = SolveOptions(time_limit=args.time_limit, seed=args.seed)
    began = time.perf_counter()
    if args.partitioner is None and args.read_partition:
        assert start is not None
        solution = _judged(problem, formulation, options, start, args.pruner)
    else:
        solution = solve_problem(
            problem, formulation, options, partitioner=chain, pruner=args.pruner, start=start
        ).require()
    figures = {"file": str(args.file), "output": str(output), "partitioner": chain}
    figures["partition_file"] = None if args.read_partition is None else str(args.read_partition)
    figures["rebalanced"] = rebalanced
    figures.update(_figures(solution, args.seed, time.perf_counter() - began))
    _write_solution(output, solution, figures)
    print(json.dumps(figures, indent=2, allow_nan=False) if args.json else _table(figures))
    if solution.violations:
        return fail(f"the solution is not valid: {solution.violations[0]}")
    return 0


def _valid(
    problem: LayerProblem, formulation: Formulation, owner: NDArray[np.int64], args: argparse.Namespace
) -> NDArray[np.int64]:
    """The placement that was read; if it is invalid the nearest valid one with --rebalance, else InvalidArgument."""
    wrong = metrics.placement_violations(problem, owner)
    if not wrong:
        return owner
    if not args.rebalance:
        raise InvalidArgument("--read-partition", f"{args.read_partition}: {wrong[0]}", "a valid one, or --rebalance")
    cost = formulation.assignment_cost(problem, owner, formulation.select(problem, owner))
    return nearest_placement(problem, owner, cost)


def _judged(
    problem: LayerProblem, formulation: Formulation, options: SolveOptions, owner: NDArray[np.int64], pruner: str
) -> LayerSolution:
    """A placement as it stands, its transfers chosen by the pruner."""
    name = auto_pruner(problem, formulation) if pruner == "auto" else pruner
    chosen = load_pruner(name)
    reason = chosen.supports(problem, formulation)
    if reason is not None:
        raise NoSolution(f"the layer has no solution: unsupported (pruner {name}: {reason})")
    began = time.perf_counter()
    solution = verify(
        problem, formulation, Pruning(problem, formulation, chosen, lambda: options)(owner), options
    ).require()
    stage = {
        "stage": _FROM_FILE,
        "termination": str(solution.termination),
        "message": solution.message,
        "seconds": time.perf_counter() - began,
        "objective": solution.objective,
    }
    return solution.restated(
        stats={**solution.stats, "stages": [stage], "pruner": chosen.name, **problem.moments.choice}
    )


def _figures(solution: LayerSolution, seed: int, elapsed: float) -> dict[str, Any]:
    """What --json prints: figures recomputed from the solution, and what made it. None where there is none."""
    assert solution.owner is not None
    assert solution.exchange is not None
    problem, formulation = solution.problem, solution.formulation
    described: dict[str, Any] = {"name": formulation.name}
    if is_dataclass(formulation) and not isinstance(formulation, type):
        described.update((name, value) for name, value in asdict(formulation).items() if value is not None)
    direct = problem.direct_volume
    return {
        "neurons": problem.m,
        "values": problem.n,
        "workers": problem.P,
        "formulation": described,
        "pruner": solution.stats["pruner"],
        **problem.moments.choice,
        "seed": seed,
        "version": __version__,
        "termination": str(solution.termination),
        "message": solution.message,
        "objective": _finite(solution.objective),
        "bound": _finite(solution.bound),
        "surrogate_bound": _finite(solution.surrogate_bound),
        "gap": _finite(solution.gap),
        "nmse": _finite(solution.nmse),
        "volume": solution.volume,
        "direct_volume": direct,
        "volume_fraction": solution.volume / direct if direct else None,
        "busiest": solution.busiest,
        "numbers": sum(message.size for message in solution.exchange.messages.values()),
        "macs_per_worker": metrics.worker_macs(problem, solution.owner, solution.exchange).tolist(),
        "neurons_per_worker": np.bincount(solution.owner, minlength=problem.P).tolist(),
        "violations": list(solution.violations),
        "seconds": elapsed,
        "stages": [_finite_entries(stage) for stage in solution.stats["stages"]],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _finite_entries(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _finite(value) if isinstance(value, float) else value for key, value in stage.items()}


def _write_solution(path: Path, solution: LayerSolution, figures: Mapping[str, Any]) -> None:
    """Writes beside the file and renames, so that what stands under its name is always complete."""
    assert solution.exchange is not None
    messages = solution.exchange.arrays() if solution.exchange.has_codes else {"transfers": solution.transfers}
    arrays = {
        "owner": solution.owner,
        **messages,
        "bias": solution.bias,
        "metadata": np.array(json.dumps(figures)),
        **weight_arrays(solution.weight),
    }
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _table(figures: Mapping[str, Any]) -> str:
    """The metrics for people."""
    settings = " ".join(
        f"{k}={v if isinstance(v, str) else format(v, 'g')}" for k, v in figures["formulation"].items() if k != "name"
    )
    of_direct = "" if figures["volume_fraction"] is None else f", {figures['volume_fraction']:.2%} of direct"
    rows = [
        ("layer", f"{figures['neurons']} neurons, {figures['values']} values, {figures['workers']} workers"),
        ("formulation", f"{figures['formulation']['name']} {settings}".strip()),
        ("moments", _moments(figures)),
        ("termination", " ".join(filter(None, (figures["termination"], figures["message"])))),
        ("objective", _number(figures["objective"])),
        ("bound", _number(figures["bound"])),
        ("gap", "–" if figures["gap"] is None else f"{figures['gap']:.2%}"),
        ("NMSE", _number(figures["nmse"])),
        ("volume", f"{figures['volume']:,} bytes a sample{of_direct}, {figures['numbers']:,} numbers"),
        ("busiest worker", f"{figures['busiest']:,} bytes a sample"),
        ("MACs on each", " ".join(f"{macs:,}" for macs in figures["macs_per_worker"])),
        ("neurons on each", " ".join(map(str, figures["neurons_per_worker"]))),
        ("violations", "; ".join(figures["violations"]) or "none"),
        ("seconds", f"{figures['seconds']:.3g}"),
    ]
    if figures["surrogate_bound"] is not None:
        rows.insert(6, ("surrogate bound", _number(figures["surrogate_bound"])))
    for stage in figures["stages"]:
        outcome = " ".join(filter(None, (stage["termination"], stage["message"])))
        rows.append((f"  {stage['stage']}", f"{stage['seconds']:.3g} ({outcome})"))
    if figures["rebalanced"]:
        rows.append(
            ("rebalanced", f"{figures['rebalanced']} neurons moved from where {figures['partition_file']} has them")
        )
    rows.append(("solution", figures["output"]))
    return aligned(rows)


def _moments(figures: Mapping[str, Any]) -> str:
    """What the errors were taken from."""
    parts = [figures["moments"]]
    if figures["samples"] is not None:
        parts.append(f"{figures['samples']:,} samples")
    if figures["shrinkage"]:
        parts.append(f"shrinkage {figures['shrinkage']:.3g}")
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"
