"""The folder of a plan: manifest.json and one safetensors file for each worker. Written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of

from repurpose_opt.errors import InvalidArgument, PlanError, UnsupportedModule
from repurpose_opt.runtime.manifest import DTYPES, Manifest, WorkerFile, parse_manifest
from repurpose_opt.runtime.parts import cut

MANIFEST = "manifest.json"
Tensors = dict[str, torch.Tensor]


def worker_path(directory: Path, worker: int) -> Path:
    return directory / f"worker-{worker}.safetensors"


def tensor_key(step: str, parameter: str) -> str:
    """Name of a part of a step in the file of a worker; see `parts.SubStep`."""
    return f"{step}.{parameter}"


def of_step(tensors: Mapping[str, torch.Tensor], step: str) -> Tensors:
    """The tensors of one step, by the names of its parameters."""
    return {key.removeprefix(f"{step}."): tensor for key, tensor in tensors.items() if key.startswith(f"{step}.")}


def write_folder(directory: Path, manifest: Manifest, tensors: Sequence[Mapping[str, torch.Tensor]]) -> None:
    """Write a plan with the tensors of each worker; replaces a plan that is there.

    Raises InvalidArgument where the folder holds anything else, or `stats` are not JSON values.
    """
    directory = directory.resolve()
    _check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replaced(directory) as new:
        files = []
        for worker, named in enumerate(tensors):
            data = bytes_of({name: tensor.contiguous() for name, tensor in named.items()})
            worker_path(new, worker).write_bytes(data)
            files.append(WorkerFile(len(data), hashlib.sha256(data).hexdigest()))
        (new / MANIFEST).write_text(manifest.with_files(tuple(files)).to_json(), encoding="utf-8")


@contextmanager
def replaced(directory: Path) -> Iterator[Path]:
    """A new folder that takes the place of `directory` at the end, or is deleted after an error."""
    new, old = (directory.with_name(f".{directory.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def read_manifest(directory: Path) -> Manifest:
    """Raises PlanError, naming the file, where it is missing, damaged or contradicts itself."""
    path = directory / MANIFEST
    data = _read(path, "a plan folder has one")
    try:
        manifest = parse_manifest(data)
        manifest.splits  # noqa: B018  computed here, where what does not fit is the manifest's fault
    except (PlanError, InvalidArgument, UnsupportedModule) as error:
        raise PlanError(f"{path}: {error}") from None
    return manifest


def read_worker(directory: Path, manifest: Manifest, worker: int) -> Tensors:
    """The tensors of one worker, by `tensor_key`.

    Raises PlanError, naming the file, where it is missing, truncated, altered or does not fit the manifest.
    """
    path, expected = worker_path(directory, worker), manifest.files[worker]
    data = _read(path, f"a plan for {manifest.n_workers} workers has one for each")
    if len(data) != expected.size:
        raise PlanError(
            f"{path}: {len(data)} bytes, the manifest says {expected.size}: truncated or altered; copy the plan again"
        )
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise PlanError(f"{path}: altered: not the SHA-256 that the manifest says; copy or save the plan again")
    try:
        tensors = tensors_of(data)
    except SafetensorError as error:
        raise PlanError(f"{path}: not a safetensors file ({error})") from None
    _check_tensors(path, manifest, worker, tensors)
    return tensors


def _read(path: Path, why: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PlanError(f"{path}: missing; {why}") from None
    except OSError as error:
        raise PlanError(f"{path}: cannot be read ({error.strerror})") from None


def _check_tensors(path: Path, manifest: Manifest, worker: int, tensors: Tensors) -> None:
    layers = {layer.name: layer for layer in manifest.layers}
    shapes: dict[str, tuple[int, ...]] = {}
    for step in manifest.steps:
        name, module = step.name, manifest.graph.module(step.name)
        part = cut(name, module, layers.get(name), manifest.splits[name], worker)
        shapes.update({tensor_key(name, key): tuple(tensor.shape) for key, tensor in part.tensors.items()})
    if tensors.keys() != shapes.keys():
        raise PlanError(f"{path}: tensors {sorted(tensors)}; the manifest says {sorted(shapes)}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name] or tensor.dtype != DTYPES[manifest.dtype]:
            got = f"{name} is {tuple(tensor.shape)} of {tensor.dtype}"
            raise PlanError(f"{path}: {got}; the manifest says {shapes[name]} of {DTYPES[manifest.dtype]}")
        if not torch.isfinite(tensor).all():
            raise PlanError(f"{path}: {name} has NaN or infinity in it; allowed: finite numbers")


def _check_replaceable(directory: Path) -> None:
    allowed = "a new or empty folder, or one that holds nothing but a plan"
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InvalidArgument("directory", f"{directory}, a file", allowed)
    names = {path.name for path in directory.iterdir()}
    foreign = {name for name in names if not re.fullmatch(r"manifest\.json|worker-\d+\.safetensors", name)}
    if foreign or (names and MANIFEST not in names):
        raise InvalidArgument("directory", f"{directory}, which holds {min(foreign or names)}", allowed)
