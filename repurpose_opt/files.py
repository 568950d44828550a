"""Reads a layer's weight, and the arrays that go with it, from a file. Never with pickle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt.errors import InvalidArgument, RepurposeError, SolverNotInstalled
from repurpose_opt.problem import Weight
from repurpose_opt.registry import install_command

_MATRIX_DIMENSIONS = (2, 4)
_NOT_IN_NUMPY = ("BF16", "F8", "F4", "F6", "E8")
"""Floats as safetensors calls them. A package that adds one to NumPy does not make NumPy compute with it."""


def read_weight(path: Path, key: str | None = None) -> Weight:
    """W as an array, a sparse matrix, or a torch tensor where NumPy lacks the type (bfloat16).

    path   .npy; .npz (arrays, or one sparse matrix by scipy.sparse.save_npz); .safetensors; .mtx (MatrixMarket)
    key    which array of a .npz or .safetensors; may be omitted where only one has 2 or 4 dimensions

    Raises InvalidArgument for a file that is missing, damaged or of another kind, and for an unknown key.
    """
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".mtx": _matrix_market}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise InvalidArgument("FILE", path.name, "a .npy, .npz, .safetensors or .mtx (MatrixMarket) file")
    if key is not None and suffix in (".npy", ".mtx"):
        raise InvalidArgument("--key", f"{key!r} for {path.name}", "keys for .npz and .safetensors only")
    return _guarded(readers[suffix], "FILE", path, key)


def weight_arrays(weight: Weight) -> dict[str, Any]:
    """W or V for an .npz file: `weight`, or of a CSR matrix weight_data, _indices, _indptr and _shape."""
    if not sparse.issparse(weight):
        return {"weight": weight}
    parts = {name: getattr(weight, name) for name in ("data", "indices", "indptr")}
    return {f"weight_{name}": part for name, part in {**parts, "shape": np.array(weight.shape)}.items()}


def read_array(path: Path, argument: str) -> NDArray[Any]:
    """The array in a .npy file that `argument` names. Raises InvalidArgument."""
    if path.suffix.lower() != ".npy":
        raise InvalidArgument(argument, path.name, "a .npy file, as numpy.save writes it")
    array: NDArray[Any] = _guarded(_npy, argument, path, None)
    if array.dtype.kind not in "fiub":
        raise InvalidArgument(argument, f"dtype {array.dtype}", "real numbers or bool")
    return array


def _guarded(read: Callable[[Path, str | None], Any], argument: str, path: Path, key: str | None) -> Any:
    if not path.is_file():
        raise InvalidArgument(argument, f"{path}, which is no file", "the path of a file")
    try:
        return read(path, key)
    except RepurposeError:
        raise
    except Exception as error:  # decoders raise anything on damaged bytes: zlib.error, struct.error, TokenError …
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise InvalidArgument(argument, f"{path} ({reason})", f"a complete {path.suffix} file of numbers") from None


def _npy(path: Path, key: str | None) -> NDArray[Any]:
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("an .npz archive by its content")
    return array


def _npz(path: Path, key: str | None) -> Weight:
    with np.load(path, allow_pickle=False) as archive:
        if {"format", "shape", "data"} <= set(archive.files):
            from scipy.sparse import load_npz

            if key is not None:
                raise InvalidArgument("--key", repr(key), f"none: {path.name} is one sparse matrix")
            return load_npz(path)
        if key is None and len(archive.files) > 1:
            key = _only_matrix((name, archive[name].ndim) for name in archive.files)
        return archive[_known_key(key, archive.files)]


def _safetensors(path: Path, key: str | None) -> Any:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise SolverNotInstalled(f".safetensors files need safetensors: {install_command(('safetensors',))}") from None
    with safe_open(path, framework="numpy") as tensors:
        names = list(tensors.keys())
        if key is None and len(names) > 1:
            key = _only_matrix((name, len(tensors.get_slice(name).get_shape())) for name in names)
        key = _known_key(key, names)
        stored = tensors.get_slice(key).get_dtype()
        if not stored.startswith(_NOT_IN_NUMPY):
            return tensors.get_tensor(key)
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        message = f"{path.name}: {key} is stored as {stored}, which needs PyTorch: {install_command(('torch',))}"
        raise SolverNotInstalled(message) from None
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(key)


def _matrix_market(path: Path, key: str | None) -> Weight:
    from scipy.io import mmread

    return mmread(path)


def _only_matrix(dimensions: Iterable[tuple[str, int]]) -> str | None:
    """The name of the only array with 2 or 4 dimensions, or None."""
    matrices = [name for name, count in dimensions if count in _MATRIX_DIMENSIONS]
    return matrices[0] if len(matrices) == 1 else None


def _known_key(key: str | None, names: list[str]) -> str:
    there = ", ".join(names) or "no array at all"
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise InvalidArgument("--key", "none", f"one of {there}")
    if key not in names:
        raise InvalidArgument("--key", repr(key), f"one of {there}")
    return key
