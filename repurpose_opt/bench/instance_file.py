"""Instances as .npz files, to be handed to others: every array of a problem, and the formulation as JSON; no pickle."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import registry
from repurpose_opt.bench.testset import Instance
from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.files import weight_arrays
from repurpose_opt.formulation import Formulation
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem

Arrays = Mapping[str, NDArray[Any]]

_CSR = ("weight_data", "weight_indices", "weight_indptr", "weight_shape")
_LIMITS = ("capacity", "load", "min_load", "allowed")
_VALUES = ("input_owner", "value_bytes", "link_price", "column_value")
_ROWS = ("bias", "output_weight", "row_neuron")
_RAW = ("second_moment", "cross_moment", "target_moment")
_CENTRED = ("covariance", "cross_covariance", "target_covariance", "ridge", "samples", "shrinkage")
_MEANS = ("input_mean", "target_mean")
_OTHERS = ("formulation", "n_workers", "broadcast", "kind", "judge_once")
KEYS = ("weight", *_CSR, *_LIMITS, *_VALUES, *_ROWS, *_RAW, *_CENTRED, *_MEANS, *_OTHERS)
"""What such a file may hold: `weight` or the four of a CSR matrix, the rest as wanted.

Names are those of `LayerProblem.create` and `Moments`. Moments are raw (second_moment …), as `solve_layer` takes them,
or centred (covariance …), as `save_instance` writes them, the default ridge only with raw ones.
"""


def save_instance(path: Path | str, instance: Instance) -> None:
    """Write an instance so that `read_instance` gives the same problem and formulation, bit by bit.

    `path` ends in .npz. Raises InvalidArgument for another name, or a formulation that is no dataclass; OSError.
    """
    path = Path(path)
    if path.suffix.lower() != ".npz":
        raise InvalidArgument("path", path.name, "a name that ends in .npz")
    problem = instance.problem
    arrays: dict[str, Any] = {name: getattr(problem, name) for name in (*_LIMITS, *_VALUES, *_ROWS)}
    arrays |= weight_arrays(problem.weight) | _moment_arrays(problem.moments)
    arrays |= {"formulation": json.dumps(described(instance.formulation)), "n_workers": problem.P}
    arrays |= {"broadcast": problem.broadcast, "kind": instance.kind, "judge_once": instance.judge_once}
    with path.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **arrays)


def read_instance(path: Path, n_workers: int, formulation: Formulation) -> tuple[LayerProblem, Formulation]:
    """The problem and formulation of a file with KEYS; the arguments are for what it lacks.

    Raises RepurposeError, which names the file.
    """
    with opened(path) as archive:
        unknown = sorted(set(archive) - set(KEYS))
        if unknown:
            raise InvalidArgument("FILE", f"{path} with an array {unknown[0]!r}", ", ".join(KEYS))
        arrays = {key: archive[key] for key in archive}
    with naming(path):
        chosen = formulation_in(arrays)
        return _problem(arrays, n_workers), formulation if chosen is None else chosen


def formulation_in(arrays: Arrays) -> Formulation | None:
    """The formulation of a file, None if it has none. Raises InvalidArgument."""
    if "formulation" not in arrays:
        return None
    try:
        description = json.loads(str(arrays["formulation"].item()))
    except ValueError:
        raise InvalidArgument("formulation", str(arrays["formulation"])[:60], _EXAMPLE) from None
    return formulation_of(description)


def formulation_of(description: Any) -> Formulation:
    """A formulation by name and fields, as {"name": "volume", "budget": 0.05}. Raises RepurposeError."""
    if not isinstance(description, dict) or not isinstance(description.get("name"), str):
        raise InvalidArgument("formulation", json.dumps(description)[:60], _EXAMPLE)
    fields = {key: value for key, value in description.items() if key != "name"}
    try:
        found: Formulation = registry.load("formulations", description["name"])(**fields)
    except TypeError as error:
        raise InvalidArgument("formulation", f"{description['name']} ({error})", _EXAMPLE) from None
    return found


def described(formulation: Formulation) -> dict[str, Any]:
    """Name and fields of a formulation, without those that are None. Raises InvalidArgument."""
    if not is_dataclass(formulation) or isinstance(formulation, type):
        raise InvalidArgument("formulation", type(formulation).__name__, "a dataclass, whose fields can be written")
    fields = {key: value for key, value in asdict(formulation).items() if value is not None}
    return {"name": formulation.name, **fields}


def marks_in(arrays: Arrays) -> tuple[str | None, bool]:
    """Kind of an instance (None if the file does not say), and whether it is judged once. Raises InvalidArgument."""
    kind = str(_scalar(arrays, "kind", "U")) if "kind" in arrays else None
    return kind, "judge_once" in arrays and bool(_scalar(arrays, "judge_once", "b"))


def workers_in(arrays: Arrays) -> int | None:
    """How many workers a file is for, None if it does not say."""
    if "n_workers" in arrays:
        return int(_scalar(arrays, "n_workers", "iu"))
    return next((len(arrays[name]) for name in ("capacity", "min_load", "link_price") if name in arrays), None)


@contextmanager
def opened(path: Path) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The arrays of an .npz file, each read when it is asked for. Raises InvalidArgument, which names the file."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files"):
                raise ValueError("a single array, as in .npy")
            yield archive
    except RepurposeError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InvalidArgument("FILE", f"{path} ({reason})", "a complete .npz file of numbers") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says of which file an error is."""
    try:
        yield
    except RepurposeError as error:
        raise RepurposeError(f"{path}: {error}") from None


_EXAMPLE = 'a name and its fields, as {"name": "volume", "budget": 0.05}'


def _moment_arrays(moments: Moments) -> dict[str, Any]:
    """C, and D and C₀ where they are others; nothing where C is the identity, the default."""
    if moments.choice["moments"] == "identity" and not moments.mean.any():
        return {}
    arrays: dict[str, Any] = {"covariance": moments.second, "input_mean": moments.mean}
    arrays |= {"ridge": moments.ridge, "shrinkage": moments.shrinkage}
    if moments.samples is not None:
        arrays["samples"] = moments.samples
    if not moments.same_inputs:
        arrays |= {"cross_covariance": moments.cross, "target_covariance": moments.target}
        arrays["target_mean"] = moments.target_mean
    return arrays


def _problem(arrays: Arrays, n_workers: int) -> LayerProblem:
    given: dict[str, Any] = {name: arrays[name] for name in (*_LIMITS, *_VALUES, *_ROWS) if name in arrays}
    if "broadcast" in arrays:
        given["broadcast"] = bool(_scalar(arrays, "broadcast", "b"))
    weight, P = _weight(arrays), workers_in(arrays)
    return LayerProblem.create(weight, n_workers if P is None else P, moments=_moments(arrays), **given)


def _scalar(arrays: Arrays, name: str, kinds: str) -> Any:
    array = arrays[name]
    if array.ndim != 0 or array.dtype.kind not in kinds:
        words = {"iu": "a whole number", "fiu": "a number", "b": "a bool", "U": "a text"}
        raise InvalidArgument(name, f"{array.dtype} of shape {array.shape}", f"{words[kinds]}, 0-d")
    return array.item()


def _weight(arrays: Arrays) -> Any:
    present = [name for name in ("weight", *_CSR) if name in arrays]
    if present == ["weight"]:
        return arrays["weight"]
    if present != list(_CSR):
        raise InvalidArgument("weight", " and ".join(present) or "none", f"weight, or {', '.join(_CSR)}")
    data, indices, indptr, shape = (arrays[name] for name in _CSR)
    try:
        matrix = sparse.csr_array((data, indices, indptr), shape=tuple(shape.tolist()))
        matrix.check_format(full_check=True)
    except (ValueError, TypeError) as error:
        raise InvalidArgument("weight_data", f"no CSR matrix ({error})", f"{', '.join(_CSR)} of one matrix") from None
    return matrix


def _moments(arrays: Arrays) -> Moments | None:
    raw, centred = ([name for name in names if name in arrays] for names in (_RAW, _CENTRED))
    if raw and centred:
        raise InvalidArgument(raw[0], f"together with {centred[0]}", "raw moments or centred ones")
    if not raw and not centred:
        means = [name for name in _MEANS if name in arrays]
        if means:
            raise InvalidArgument(means[0], "a mean without second moments", "second_moment with it, or neither")
        return None
    if raw:
        return Moments.from_raw(**{name: arrays[name] for name in (*_RAW, *_MEANS) if name in arrays})
    return _centred(arrays)


def _centred(arrays: Arrays) -> Moments:
    if "covariance" not in arrays:
        raise InvalidArgument("covariance", None, "C wherever another centred moment is given")
    # Checked as raw moments of mean 0; the arrays themselves are used, so that no bit changes.
    zero = np.zeros(len(arrays["covariance"]))
    Moments.from_raw(arrays["covariance"], arrays.get("cross_covariance"), zero, arrays.get("target_covariance"))
    C = np.asarray(arrays["covariance"], dtype=np.float64)
    mean = np.asarray(arrays.get("input_mean", zero), dtype=np.float64)
    is_same = "cross_covariance" not in arrays
    return Moments(
        C,
        C if is_same else np.asarray(arrays["cross_covariance"], dtype=np.float64),
        C if is_same else np.asarray(arrays["target_covariance"], dtype=np.float64),
        mean,
        mean if is_same else np.asarray(arrays.get("target_mean", zero), dtype=np.float64),
        float(_scalar(arrays, "ridge", "fiu")) if "ridge" in arrays else 0.0,
        int(_scalar(arrays, "samples", "iu")) if "samples" in arrays else None,
        float(_scalar(arrays, "shrinkage", "fiu")) if "shrinkage" in arrays else 0.0,
    )
