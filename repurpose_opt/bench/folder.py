"""A folder of files as a test set: weights, instances with all that belongs to them, and hypergraphs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from repurpose_opt import registry
from repurpose_opt.bench.instance_file import (
    described,
    formulation_in,
    formulation_of,
    marks_in,
    naming,
    opened,
    read_instance,
    workers_in,
)
from repurpose_opt.bench.testset import Instance, Settings
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.files import read_weight
from repurpose_opt.formats.read_hgr import IMBALANCE, read_hgr
from repurpose_opt.formulation import Formulation, Lossless, Volume
from repurpose_opt.problem import LayerProblem

SETTINGS_FILE = "testset.json"
SUFFIXES = (".npy", ".npz", ".safetensors", ".mtx", ".hgr")
_WORKERS = (4,)
_MATRIX_DIMENSIONS = (2, 4)
_INSTANCE_KEYS = {"weight", "weight_data"}
_SPARSE_MATRIX_KEYS = {"format", "shape", "data"}
"""Of scipy.sparse.save_npz."""


@dataclass(frozen=True)
class _Defaults:
    """What testset.json says, for the files that do not say it themselves."""

    title: str
    description: str
    n_workers: tuple[int, ...]
    formulations: tuple[Formulation, ...] | None
    """None: Volume(budget=0.1) for dense weights, Lossless for sparse ones."""
    imbalance: float
    settings: Settings

    def formulations_for(self, is_sparse: bool) -> tuple[Formulation, ...]:
        if self.formulations is not None:
            return self.formulations
        return (Lossless() if is_sparse else Volume(budget=0.1),)


class FolderTestSet:
    """Every .npy, .npz, .safetensors, .mtx and .hgr file of a folder, in the order of their names.

    A file of weights (`read_weight`; each matrix of a .safetensors or .npz that has several) is an instance for each
    number of workers and each formulation, as testset.json beside it says:

        {"title": "…", "description": "…", "n_workers": [4, 8], "imbalance": 0.03,
         "formulations": [{"name": "lossless"}, {"name": "volume", "budget": 0.1}], "settings": {"time_limit": 10}}

    All of it may be omitted: 4 workers, Volume(budget=0.1) for dense weights, Lossless for sparse ones. An .npz with an
    array `weight` (or `weight_data` …) is an instance as `save_instance` writes it; what it says about workers and
    formulation holds. An .hgr is solved as Lossless for every number of workers (`read_hgr`).

    Raises InvalidArgument where the folder has no such file, or testset.json is wrong; a damaged file is an error when
    its instances are listed or built.
    """

    name: str
    title: str
    description: str
    requires: tuple[str, ...]
    settings: Settings

    def __init__(self, path: Path | str) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise InvalidArgument("FOLDER", f"{folder}, which is no folder here", "a folder of instances")
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise InvalidArgument("FOLDER", f"{folder} without any", f"files that end in {', '.join(SUFFIXES)}")
        defaults = _defaults(folder)
        self.name = folder.resolve().name
        self.title, self.description, self.settings = defaults.title, defaults.description, defaults.settings
        self.requires = ("safetensors",) * any(file.suffix.lower() == ".safetensors" for file in files)
        stems = [file.stem for file in files]
        shown = {file: file.name if stems.count(file.stem) > 1 else file.stem for file in files}
        self._instances = tuple(found for file in files for found in _of_file(file, shown[file], defaults))
        _check_names(self._instances)

    def __len__(self) -> int:
        return len(self._instances)

    def __iter__(self) -> Iterator[Instance]:
        """The instances, not yet built."""
        return iter([Instance(one.name, one.build, one.kind, one.judge_once) for one in self._instances])


# What a file is


def _of_file(path: Path, name: str, defaults: _Defaults) -> Iterator[Instance]:
    suffix = path.suffix.lower()
    if suffix == ".hgr":
        yield from _of_hypergraph(path, name, defaults)
    elif suffix == ".npz":
        yield from _of_archive(path, name, defaults)
    elif suffix == ".safetensors":
        matrices = _tensors(path)
        for key in matrices:
            yield from _of_weight(path, _joined(name, key, matrices), key, False, defaults)
    else:
        yield from _of_weight(path, name, None, suffix == ".mtx" and _is_coordinates(path), defaults)


def _of_archive(path: Path, name: str, defaults: _Defaults) -> Iterator[Instance]:
    with opened(path) as archive:
        keys = set(archive)
        if not keys & _INSTANCE_KEYS:
            if keys >= _SPARSE_MATRIX_KEYS:
                yield from _of_weight(path, name, None, True, defaults)
                return
            matrices = [key for key in archive if archive[key].ndim in _MATRIX_DIMENSIONS]
            if not matrices:
                raise InvalidArgument("FILE", f"{path} without a matrix", "an array of 2 or 4 dimensions")
            for key in matrices:
                yield from _of_weight(path, _joined(name, key, matrices), key, False, defaults)
            return
        with naming(path):
            formulation, workers, (kind, judge_once) = formulation_in(archive), workers_in(archive), marks_in(archive)
        is_sparse = "weight_data" in keys
    formulations = (formulation,) if formulation is not None else defaults.formulations_for(is_sparse)
    for P in defaults.n_workers if workers is None else (workers,):
        for chosen in formulations:
            marks = [*[f"P{P}"] * (workers is None), *[_label(chosen)] * (formulation is None)]
            yield Instance(
                "-".join([name, *marks]), partial(read_instance, path, P, chosen), kind or path.suffix, judge_once
            )


def _of_weight(path: Path, name: str, key: str | None, is_sparse: bool, defaults: _Defaults) -> Iterator[Instance]:
    for P in defaults.n_workers:
        for formulation in defaults.formulations_for(is_sparse):
            build = partial(_weight_instance, path, key, P, formulation)
            yield Instance(f"{name}-P{P}-{_label(formulation)}", build, path.suffix)


def _weight_instance(path: Path, key: str | None, P: int, formulation: Formulation) -> tuple[LayerProblem, Formulation]:
    with naming(path):
        return LayerProblem.create(read_weight(path, key), P), formulation


def _of_hypergraph(path: Path, name: str, defaults: _Defaults) -> Iterator[Instance]:
    """With files beside it, whose number of blocks holds, one instance; else one for each number of workers."""
    fixed = any(path.with_name(path.name + suffix).exists() for suffix in (".fix", ".targets"))
    for P in (None,) if fixed else defaults.n_workers:
        shown = name if P is None else f"{name}-P{P}"
        yield Instance(shown, partial(_hypergraph_instance, path, P, defaults.imbalance), path.suffix)


def _hypergraph_instance(path: Path, P: int | None, imbalance: float) -> tuple[LayerProblem, Formulation]:
    return read_hgr(path, P, imbalance).problem, Lossless()


def _tensors(path: Path) -> list[str]:
    """The names of the tensors that may be weights, in order."""
    registry.check_importable(f"{path.name}", "safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in sorted(tensors.keys())}
    except (SafetensorError, OSError) as error:
        raise InvalidArgument("FILE", f"{path} ({str(error).splitlines()[0]})", "a complete .safetensors") from None
    matrices = [key for key, shape in shapes.items() if len(shape) in _MATRIX_DIMENSIONS]
    if not matrices:
        raise InvalidArgument("FILE", f"{path} without a matrix", "a tensor of 2 or 4 dimensions")
    return matrices


def _is_coordinates(path: Path) -> bool:
    """Whether a MatrixMarket file is of a sparse matrix: its first line says so."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return "coordinate" in stream.readline().lower()


def _joined(name: str, key: str, matrices: Sequence[str]) -> str:
    return name if len(matrices) == 1 else f"{name}-{key.replace('/', '.')}"


def _label(formulation: Formulation) -> str:
    """Short and of its own: the name, and the fields that are not as by default."""
    fields_of = described(formulation)
    name = fields_of.pop("name")
    default = {field.name: field.default for field in fields(formulation)}  # type: ignore[arg-type]
    marks = [
        f"{key}{value:g}" if isinstance(value, float | int) else str(value)
        for key, value in fields_of.items()
        if value != default.get(key)
    ]
    return "-".join([name, *marks])


def _check_names(instances: Sequence[Instance]) -> None:
    names = [instance.name for instance in instances]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument("FOLDER", f"two instances called {name}", "files and formulations of different names")


# testset.json


def _defaults(folder: Path) -> _Defaults:
    path = folder / SETTINGS_FILE
    content: dict[str, Any] = {}
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidArgument(SETTINGS_FILE, f"{path} ({error})", "a JSON object") from None
    if not isinstance(content, dict):
        raise InvalidArgument(SETTINGS_FILE, type(content).__name__, "a JSON object")
    known = {field.name for field in fields(_Defaults)}
    if unknown := sorted(set(content) - known):
        raise InvalidArgument(SETTINGS_FILE, f"{path} with {unknown[0]!r}", ", ".join(sorted(known)))
    with naming(path):
        return _Defaults(
            title=str(content.get("title", f"The files of {folder.resolve().name}")),
            description=str(content.get("description", "Files of a folder.")),
            n_workers=_workers(content.get("n_workers", _WORKERS)),
            formulations=_formulations(content.get("formulations")),
            imbalance=_imbalance(content.get("imbalance", IMBALANCE)),
            settings=_settings(content.get("settings", {})),
        )


def _workers(given: Any) -> tuple[int, ...]:
    counts = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not counts or not all(isinstance(count, int) and not isinstance(count, bool) and count >= 1 for count in counts):
        raise InvalidArgument("n_workers", json.dumps(given), "a whole number ≥ 1, or a list of such")
    return counts


def _formulations(given: Any) -> tuple[Formulation, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        raise InvalidArgument("formulations", json.dumps(given)[:60], "a list of at least one")
    return tuple(map(formulation_of, given))


def _imbalance(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 0:
        raise InvalidArgument("imbalance", json.dumps(given), "a number ≥ 0")
    return float(given)


def _settings(given: Any) -> Settings:
    known = {field.name for field in fields(Settings)}
    if not isinstance(given, dict) or (set(given) - known):
        raise InvalidArgument("settings", json.dumps(given)[:60], f"an object with {', '.join(sorted(known))}")
    if wrong := [key for key, value in given.items() if isinstance(value, bool) or not isinstance(value, int | float)]:
        raise InvalidArgument(wrong[0], json.dumps(given[wrong[0]]), "a number")
    return Settings(**given)
