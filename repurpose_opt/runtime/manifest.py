"""A plan without its weights, and its JSON text: what every worker knows about all workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from repurpose_opt.errors import InvalidArgument, PlanError
from repurpose_opt.exchange import Values
from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer, PlannedMessage, check_layers
from repurpose_opt.runtime.modules import LINEAR, check_spec

FORMAT = "repurpose-opt plan"
VERSION = 2
READABLE = (1, 2)
"""Version 1 had no codes; otherwise it was the same."""
DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
WHOLE_SAMPLE = {"start_dim": 1, "end_dim": -1}


@dataclass(frozen=True)
class WorkerFile:
    """What the file of one worker must be: its size in bytes and the SHA-256 of its content."""

    size: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Manifest:
    """A plan without its weights."""

    n_workers: int
    dtype: str
    """Key of DTYPES: the model's weights, the values on the wire and the answers."""
    modules: tuple[tuple[str, Mapping[str, Any]], ...]
    """(name, spec) of every module in order; see modules.py."""
    layers: tuple[PlannedLayer, ...]
    direct_volume: int
    """Bytes a sample of the dense model split as it stands."""
    stats: Mapping[str, Any]
    files: tuple[WorkerFile, ...] = ()
    """One for each worker; none before the files are written."""

    def with_files(self, files: tuple[WorkerFile, ...]) -> Manifest:
        return replace(self, files=files)

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
        known = " and ".join(map(str, READABLE))
        raise PlanError(f"format version {version}; this version of repurpose-opt reads versions {known}")
    content = document.get("plan")
    try:
        if not isinstance(content, dict) or _digest(content) != document.get("sha256"):
            raise PlanError("altered: its content does not have the SHA-256 that it names; copy or save the plan again")
        return _manifest(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"not a manifest of version {version} ({type(error).__name__}: {error})") from None


def check_manifest(manifest: Manifest) -> None:
    """Raises InvalidArgument or UnsupportedModule where modules, layers and dtype contradict each other."""
    check_layers(manifest.layers, manifest.n_workers)
    if manifest.dtype not in DTYPES:
        raise InvalidArgument("dtype of the model", manifest.dtype, ", ".join(DTYPES))
    linears = {}
    for place, (name, spec) in enumerate(manifest.modules):
        check_spec(spec)
        if spec["kind"] in LINEAR:
            linears[name] = spec["arguments"]
        if spec["kind"] == "Flatten" and (place > 0 or spec["arguments"] != WHOLE_SAMPLE):
            raise InvalidArgument(f"module {name!r}", "Flatten", f"only as the first module, with {WHOLE_SAMPLE}")
    if list(linears) != [layer.name for layer in manifest.layers]:
        names = [layer.name for layer in manifest.layers]
        raise InvalidArgument("layers", names, f"one for each linear module, in order: {list(linears)}")
    for layer in manifest.layers:
        linear = linears[layer.name]
        shape, planned = (
            (linear["out_features"], linear["in_features"]),
            (len(layer.owner), len(layer.input_owner)),
        )
        if shape != planned:
            raise InvalidArgument(f"layer {layer.name!r}: (m, n)", planned, f"the module's {shape}")
        if layer.numbers != linear.get("numbers", 0):
            allowed = f"the module's {linear.get('numbers', 0)}"
            raise InvalidArgument(f"layer {layer.name!r}: numbers of all codes", layer.numbers, allowed)
        if layer.value_bytes != DTYPES[manifest.dtype].itemsize:
            allowed = f"{DTYPES[manifest.dtype].itemsize}, the size of a {manifest.dtype}"
            raise InvalidArgument(f"layer {layer.name!r}: value_bytes", layer.value_bytes, allowed)


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
        "modules": [{"name": name, **spec} for name, spec in manifest.modules],
        "layers": [_layer_content(layer) for layer in manifest.layers],
        "direct_volume": int(manifest.direct_volume),
        "stats": _json_values(manifest.stats),
        "files": [{"size": file.size, "sha256": file.sha256} for file in manifest.files],
    }


def _layer_content(layer: PlannedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "value_bytes": int(layer.value_bytes),
        "input_owner": layer.input_owner.tolist(),
        "owner": layer.owner.tolist(),
        "messages": [
            {"source": int(source), "target": int(target), **_message_content(message)}
            for (source, target), message in sorted(layer.messages.items())
        ],
    }


def _message_content(message: PlannedMessage) -> dict[str, Any]:
    return {"values": message.values.tolist()} if isinstance(message, Values) else {"numbers": message.size}


def _manifest(content: Mapping[str, Any]) -> Manifest:
    n_workers = content["n_workers"]
    if not isinstance(n_workers, int) or n_workers < 1 or len(content["files"]) != n_workers:
        raise ValueError(f"{n_workers} workers and {len(content['files'])} files")
    if content["dtype"] not in DTYPES:
        raise ValueError(f"dtype {content['dtype']}")
    return Manifest(
        n_workers=n_workers,
        dtype=content["dtype"],
        modules=tuple(
            (module["name"], {"kind": module["kind"], "arguments": dict(module["arguments"])})
            for module in content["modules"]
        ),
        layers=tuple(_layer(layer, n_workers) for layer in content["layers"]),
        direct_volume=_whole(content["direct_volume"]),
        stats=dict(content["stats"]),
        files=tuple(WorkerFile(int(file["size"]), str(file["sha256"])) for file in content["files"]),
    )


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
    )


def _message(entry: Mapping[str, Any]) -> PlannedMessage:
    if ("values" in entry) == ("numbers" in entry):
        raise ValueError("a message without values or numbers, or with both")
    return Values(_indices(entry["values"])) if "values" in entry else PlannedCode(entry["numbers"])


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} instead of a whole number ≥ 0")
    return value


def _indices(values: list[int]) -> Indices:
    if not all(type(value) is int for value in values):
        raise ValueError("an index that is not a whole number")
    return np.array(values, dtype=np.int64)
