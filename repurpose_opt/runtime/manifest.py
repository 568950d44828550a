"""A plan without its weights, and its JSON text: what every worker knows about all workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument, PlanError, UnsupportedModule
from repurpose_opt.exchange import Values
from repurpose_opt.runtime.graph import INPUT, Graph
from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer, PlannedMessage, PlannedStatistics
from repurpose_opt.runtime.modules import from_spec
from repurpose_opt.runtime.splits import Split, splits_of

FORMAT = "repurpose-opt plan"
VERSION = 3
READABLE = (1, 2, 3)
"""Version 2 had a chain of modules in place of steps, version 1 besides that no codes."""
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class WorkerFile:
    """What the file of one worker must be: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class StepSpec:
    """One step of the model."""

    name: str
    spec: Mapping[str, Any]
    """See modules.py."""
    inputs: tuple[str, ...]
    """Names of the steps that it reads, or INPUT."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """A plan without its weights."""

    n_workers: int
    dtype: str
    """Key of DTYPES: the model's weights, the values on the wire and the answers."""
    steps: tuple[StepSpec, ...]
    """In the order in which they run."""
    input_owner: Indices | None
    """The worker of each place of the input; None where every worker has all of it."""
    input_shape: tuple[int, ...]
    """Of one sample."""
    layers: tuple[PlannedLayer, ...]
    """One for each step that has one, in order."""
    direct_volume: int
    """Bytes a sample of the dense model split as it stands."""
    stats: Mapping[str, Any]
    files: tuple[WorkerFile, ...] = ()
    """One for each worker; none before the files are written."""

    def with_files(self, files: tuple[WorkerFile, ...]) -> Manifest:
        return replace(self, files=files)

    @cached_property
    def graph(self) -> Graph:
        """The model with zeros for weights, which take no memory. Raises InvalidArgument or UnsupportedModule."""
        return Graph((step.name, _module(step, DTYPES[self.dtype]), step.inputs) for step in self.steps).eval()

    @cached_property
    def splits(self) -> dict[str, Split]:
        """How every tensor is split. Raises InvalidArgument or UnsupportedModule where parts do not fit each other."""
        dtype = DTYPES[self.dtype]
        return splits_of(self.graph, self.layers, self.n_workers, dtype, self.input_owner, self.input_shape)

    def digest(self) -> str:
        """SHA-256 of everything in the manifest, and through `files` of all weights.

        Raises InvalidArgument where `stats` are not JSON values.
        """
        return _digest(_content(self))

    def to_json(self) -> str:
        """Raises InvalidArgument where `stats` are not JSON values."""
        head = {"format": FORMAT, "version": VERSION, "sha256": self.digest()}
        return json.dumps(head | {"plan": _content(self)}, separators=(",", ":"))


def parse_manifest(text: bytes) -> Manifest:
    """Raises PlanError, without the name of the file, for anything but a manifest of a readable version."""
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"not valid JSON ({error}): truncated or altered; copy or save the plan again") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f"not the manifest of a plan, which has the format {FORMAT!r}")
    version = document.get("version")
    if version not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise PlanError(f"format version {version}; this version of repurpose-opt reads versions {known}")
    content = document.get("plan")
    try:
        if not isinstance(content, dict) or _digest(content) != document.get("sha256"):
            raise PlanError("altered: its content does not have the SHA-256 that it names; copy or save the plan again")
        return _manifest(content if version == VERSION else _of_chain(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"not a manifest of version {version} ({type(error).__name__}: {error})") from None


def _module(step: StepSpec, dtype: torch.dtype) -> nn.Module:
    try:
        return from_spec(step.spec, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UnsupportedModule):
            raise
        reason = str(error).split("\n")[0]
        raise InvalidArgument(f"step {step.name!r}: arguments", reason, f"those of a {step.spec['kind']}") from None


def _digest(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _json_values(stats: Mapping[str, Any]) -> Any:
    """What a reader will find: keys are strings, tuples are lists."""
    try:
        return json.loads(json.dumps(dict(stats), allow_nan=False))
    except (TypeError, ValueError) as error:
        allowed = "strings, finite numbers, lists and mappings of them"
        raise InvalidArgument("stats", str(error), allowed) from None


def _content(manifest: Manifest) -> dict[str, Any]:
    return {
        "n_workers": int(manifest.n_workers),
        "dtype": manifest.dtype,
        "steps": [{"name": step.name, **step.spec, "inputs": list(step.inputs)} for step in manifest.steps],
        "input_owner": None if manifest.input_owner is None else manifest.input_owner.tolist(),
        "input_shape": list(manifest.input_shape),
        "layers": [_layer_content(layer) for layer in manifest.layers],
        "direct_volume": int(manifest.direct_volume),
        "stats": _json_values(manifest.stats),
        "files": [{"size": file.size, "sha256": file.sha256} for file in manifest.files],
    }


def _layer_content(layer: PlannedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "value_bytes": int(layer.value_bytes),
        "positions": int(layer.positions),
        "weight_macs": int(layer.weight_macs),
        "input_owner": layer.input_owner.tolist(),
        "owner": layer.owner.tolist(),
        "messages": [
            {"source": int(source), "target": int(target), **_message_content(message)}
            for (source, target), message in sorted(layer.messages.items())
        ],
    }


def _message_content(message: PlannedMessage) -> dict[str, Any]:
    if isinstance(message, Values):
        return {"values": message.values.tolist()}
    return {"numbers" if isinstance(message, PlannedCode) else "statistics": message.size}


def _of_chain(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of version 1 or 2 as one of this version."""
    names = [module["name"] for module in content["modules"]]
    steps = [module | {"inputs": [before]} for module, before in zip(content["modules"], [INPUT, *names], strict=False)]
    layers = [layer | {"positions": 1, "weight_macs": 1} for layer in content["layers"]]
    owner = layers[0]["input_owner"]
    rest = {"steps": steps, "layers": layers, "input_owner": owner, "input_shape": [len(owner)]}
    return {**content, **rest}


def _manifest(content: Mapping[str, Any]) -> Manifest:
    n_workers = content["n_workers"]
    if not isinstance(n_workers, int) or n_workers < 1 or len(content["files"]) != n_workers:
        raise ValueError(f"{n_workers} workers and {len(content['files'])} files")
    if content["dtype"] not in DTYPES:
        raise ValueError(f"dtype {content['dtype']}")
    return Manifest(
        n_workers=n_workers,
        dtype=content["dtype"],
        steps=tuple(_step(step) for step in content["steps"]),
        input_owner=None if content["input_owner"] is None else _indices(content["input_owner"]),
        input_shape=tuple(_whole(size) for size in content["input_shape"]),
        layers=tuple(_layer(layer, n_workers) for layer in content["layers"]),
        direct_volume=_whole(content["direct_volume"]),
        stats=dict(content["stats"]),
        files=tuple(WorkerFile(int(file["size"]), str(file["sha256"])) for file in content["files"]),
    )


def _step(content: Mapping[str, Any]) -> StepSpec:
    spec = {"kind": content["kind"], "arguments": dict(content["arguments"])}
    if not all(isinstance(name, str) for name in [content["name"], content["kind"], *content["inputs"]]):
        raise ValueError("a name that is no text")
    return StepSpec(content["name"], spec, tuple(content["inputs"]))


def _layer(content: Mapping[str, Any], n_workers: int) -> PlannedLayer:
    messages = {(_whole(entry["source"]), _whole(entry["target"])): _message(entry) for entry in content["messages"]}
    if len(messages) < len(content["messages"]):
        raise ValueError("two messages for one pair of workers")
    return PlannedLayer(
        name=content["name"],
        input_owner=_indices(content["input_owner"]),
        owner=_indices(content["owner"]),
        messages=messages,
        n_workers=n_workers,
        value_bytes=_whole(content["value_bytes"]),
        positions=_whole(content["positions"]),
        weight_macs=_whole(content["weight_macs"]),
    )


def _message(entry: Mapping[str, Any]) -> PlannedMessage:
    kinds = [kind for kind in ("values", "numbers", "statistics") if kind in entry]
    if len(kinds) != 1:
        raise ValueError("a message without values or numbers, or with both")
    if kinds == ["values"]:
        return Values(_indices(entry["values"]))
    return PlannedCode(entry["numbers"]) if kinds == ["numbers"] else PlannedStatistics(entry["statistics"])


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} instead of a whole number ≥ 0")
    return value


def _indices(values: list[int]) -> Indices:
    if not all(type(value) is int for value in values):
        raise ValueError("an index that is not a whole number")
    return np.array(values, dtype=np.int64)
