"""The options that describe an instance, the layer and what is minimised, for all verbs that take one."""

from __future__ import annotations

import argparse
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import metrics, registry
from repurpose_opt.cli.text import fraction, loads, positive, price
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.files import read_array, read_weight
from repurpose_opt.formulation import Formulation
from repurpose_opt.formulation.codes import MESSAGES
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem

# option, argument of LayerProblem.create, help
_ARRAYS = (
    ("--input-owner", "input_owner", "worker of each input value, (values,) whole numbers; default: equal runs"),
    ("--load", "load", "load of each neuron, (neurons,); default: 1"),
    ("--allowed", "allowed", "places that a neuron may take, (neurons, workers) bool; default: all"),
    ("--value-bytes", "value_bytes", "bytes of each input value, (values,); default: as stored in FILE"),
    ("--link-price", "link_price", "price of a byte from worker (row) to worker, (workers, workers); default: 1"),
    ("--bias", "bias", "the layer's bias, (rows,); default: 0"),
)

_LIMITS = {"budget", "budget_bytes", "transfer_price", "max_nmse", "weight_price"}
_OTHERS = {"communication", "messages", "mac_price"}


def add_instance(verb: argparse.ArgumentParser, *, start: str, is_optional: bool = False) -> None:
    """Adds the options that `problem_of`, `formulation_of` and `start_of` read; `start` is the help of --start.

    `is_optional`: whether FILE may be something else, which needs no --workers.
    """
    verb.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="weight, (rows, columns) or a convolution's (m, n, kh, kw): .npy, .npz, .safetensors or .mtx",
    )
    verb.add_argument("--workers", type=positive, required=not is_optional, metavar="P", help="number of workers")
    verb.add_argument("--key", metavar="NAME", help="which array of a .npz or .safetensors file")
    _add_formulation(verb.add_argument_group("what is minimised"))
    _add_data(verb.add_argument_group("the layer's surroundings"), start)
    verb.set_defaults(usage_error=verb.error)


def _add_formulation(group: Any) -> None:
    group.add_argument(
        "--formulation",
        choices=registry.names("formulations"),
        help="default: edge with --weight-price, else volume",
    )
    limit = group.add_mutually_exclusive_group()
    limit.add_argument("--budget", type=fraction, metavar="F", help="at most this fraction of the direct volume")
    limit.add_argument("--budget-bytes", type=price, metavar="N", help="at most this many bytes a sample")
    limit.add_argument("--transfer-price", type=price, metavar="X", help="price of sending a byte, in units of error")
    limit.add_argument("--max-nmse", type=price, metavar="X", help="at most this relative squared error")
    group.add_argument("--weight-price", type=price, metavar="X", help="price of keeping a weight (edge only)")
    group.add_argument(
        "--communication",
        choices=("total", "busiest"),
        help="which bytes count: all, or those of the worker that sends or receives most; default: total",
    )
    group.add_argument(
        "--messages",
        choices=MESSAGES,
        help="what is sent: chosen values, linear combinations of them, or what costs less; default: values",
    )
    group.add_argument(
        "--mac-price", type=price, metavar="X", help="price of a multiply-accumulate (--messages mixed only)"
    )


def _add_data(group: Any, start: str) -> None:
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
        type=loads,
        metavar="A,B,C",
        help="largest load of each worker, or one number for all; default: neurons / workers, rounded up",
    )
    group.add_argument(
        "--min-load",
        type=loads,
        metavar="A,B,C",
        help="smallest load of each worker, or one number for all; default: 0",
    )
    for option, _, text in _ARRAYS:
        group.add_argument(option, type=Path, metavar="FILE.npy", help=text)
    group.add_argument("--start", type=Path, metavar="FILE.npy", help=start)


def check_file(args: argparse.Namespace) -> None:
    if not args.file.is_file():
        raise InvalidArgument("FILE", f"{args.file}, which is no file", "the path of a file")


def problem_of(args: argparse.Namespace) -> LayerProblem:
    """The layer that the options describe. Raises InvalidArgument."""
    weight = read_weight(args.file, args.key)
    arrays: dict[str, Any] = {name: _array(args, option, name) for option, name, _ in _ARRAYS}
    return LayerProblem.create(
        weight, args.workers, moments=_moments(args), capacity=args.capacity, min_load=args.min_load, **arrays
    )


def start_of(args: argparse.Namespace, problem: LayerProblem) -> NDArray[np.int64] | None:
    """(m,) owners in the file of --start, None without it. Raises InvalidArgument for an invalid placement."""
    start = _array(args, "--start", "start")
    if start is None:
        return None
    wrong = metrics.placement_violations(problem, start)
    if wrong:
        raise InvalidArgument("--start", wrong[0], "a valid placement")
    return start.astype(np.int64)


def formulation_of(args: argparse.Namespace) -> Formulation:
    """The formulation that the options describe; options that do not belong together are a usage error."""
    given = {name: getattr(args, name) for name in sorted(_LIMITS | _OTHERS) if getattr(args, name) is not None}
    chosen = args.formulation or ("edge" if "weight_price" in given else "volume")
    create = registry.load("formulations", chosen)
    accepted = {field.name for field in fields(create)} if is_dataclass(create) else set()
    for name in given:
        if name not in accepted:
            args.usage_error(f"--{name.replace('_', '-')} does not apply to --formulation {chosen}")
    has_price = bool(given.keys() & _LIMITS)
    if chosen == "volume" and not has_price:
        given["budget"] = 0.1
    if chosen == "edge" and not has_price:
        args.usage_error("--formulation edge needs --transfer-price, --weight-price or both")
    formulation: Formulation = create(**given)
    return formulation


def _moments(args: argparse.Namespace) -> Moments | None:
    inputs = _array(args, "--inputs", "inputs")
    if inputs is not None:
        return Moments.from_samples(inputs)
    second = _array(args, "--second-moment", "second_moment")
    return None if second is None else Moments.from_raw(second)


def _array(args: argparse.Namespace, option: str, name: str) -> NDArray[Any] | None:
    path = getattr(args, name)
    return None if path is None else read_array(path, option)
