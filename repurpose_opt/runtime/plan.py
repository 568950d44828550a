"""A pruned network, who computes what, and what the workers send each other: the answer of `repurpose`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.manifest import DTYPES, Manifest, check_manifest
from repurpose_opt.runtime.modules import from_spec, named_modules, to_spec
from repurpose_opt.runtime.storage import (
    Tensors,
    bias_key,
    read_manifest,
    read_worker,
    weight_key,
    write_folder,
)

__all__ = ["Plan", "PlannedLayer", "SubLayer"]


@dataclass(frozen=True, eq=False)
class SubLayer:
    """The part of one layer that one worker computes: a dense matrix of the rows and columns that it has."""

    rows: Indices
    """(rows,) neurons, ascending."""
    columns: Indices
    """(columns,) input values: held ones ascending, then received ones by source worker and message order."""
    weight: torch.Tensor
    """(rows, columns)"""
    bias: torch.Tensor | None
    """(rows,)"""


@dataclass(frozen=True, eq=False)
class Plan:
    """A pruned model split over workers. Raises InvalidArgument or UnsupportedModule where its parts do not fit."""

    model: nn.Sequential
    """Flat, in eval mode; its weights are zero wherever a worker does not have the value."""
    layers: tuple[PlannedLayer, ...]
    """One for each Linear, in order."""
    n_workers: int
    direct_volume: int
    """Bytes a sample of the dense model, split over the workers as it stands."""
    stats: Mapping[str, Any]
    """JSON values that record the run."""

    def __post_init__(self) -> None:
        self.check()

    @property
    def volume(self) -> int:
        """Bytes of all messages for one sample."""
        return int(self.traffic().sum())

    @property
    def busiest(self) -> int:
        """Max over workers of max(bytes sent, bytes received) for one sample."""
        sent = self.traffic()
        return int(max(sent.sum(axis=1).max(), sent.sum(axis=0).max()))

    def traffic(self) -> Indices:
        """(P, P) bytes a sample from worker p (row) to worker k (column), over all layers."""
        return np.sum([layer.traffic() for layer in self.layers], axis=0)

    def worker_macs(self) -> Indices:
        """(P,) multiply-accumulates a sample: rows held times columns had, over all layers."""
        return np.sum([layer.worker_macs() for layer in self.layers], axis=0)

    def linear(self, layer: PlannedLayer) -> nn.Linear:
        """The module of a layer."""
        return _linear(self.model, layer)

    def sub_model(self, worker: int) -> tuple[SubLayer, ...]:
        """What one worker computes, layer by layer; copies of the weights."""
        if not 0 <= worker < self.n_workers:
            raise InvalidArgument("worker", worker, f"0 … {self.n_workers - 1}")
        return tuple(_sub_layer(layer, _linear(self.model, layer), worker) for layer in self.layers)

    def check(self) -> None:
        """Raises InvalidArgument or UnsupportedModule where model, layers and n_workers do not fit each other."""
        if not isinstance(self.model, nn.Sequential):
            raise InvalidArgument("model", type(self.model).__name__, "a flat nn.Sequential")
        if any(module.training for module in self.model.modules()):
            raise InvalidArgument("model", "training mode", "eval mode: model.eval()")
        check_manifest(self.manifest())
        self.manifest().digest()  # here rather than in `save`, when the run that made the stats is over
        for layer in self.layers:
            _check_support(layer, _linear(self.model, layer).weight.detach().cpu().numpy(), self.n_workers)

    def manifest(self) -> Manifest:
        """The plan without its weights."""
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in self.model.parameters()}
        return Manifest(
            n_workers=self.n_workers,
            dtype=" and ".join(sorted(dtypes)),
            modules=tuple((name, to_spec(module)) for name, module in named_modules(self.model)),
            layers=self.layers,
            direct_volume=self.direct_volume,
            stats=self.stats,
        )

    def save(self, directory: str | Path) -> None:
        """Write the folder of the plan, whole or not at all; a plan that is there is replaced.

        Raises InvalidArgument where the folder holds anything else, or `stats` are not JSON values.
        """
        self.check()
        tensors = [_tensors(self.layers, self.sub_model(worker)) for worker in range(self.n_workers)]
        write_folder(Path(directory), self.manifest(), tensors)

    @staticmethod
    def load(directory: str | Path) -> Plan:
        """The plan in a folder, checked against the sizes and SHA-256 in its manifest.

        Raises PlanError, which names the file, where one is missing, truncated, altered or of another version.
        """
        manifest = read_manifest(Path(directory))
        specs = manifest.modules
        dtype = DTYPES[manifest.dtype]
        model = nn.Sequential(OrderedDict((name, from_spec(spec, dtype)) for name, spec in specs)).eval()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        for worker in range(manifest.n_workers):
            _fill(model, manifest.layers, worker, read_worker(Path(directory), manifest, worker))
        return Plan(model, manifest.layers, manifest.n_workers, manifest.direct_volume, manifest.stats)


def _linear(model: nn.Sequential, layer: PlannedLayer) -> nn.Linear:
    linear = model.get_submodule(layer.name)
    assert isinstance(linear, nn.Linear)
    return linear


def _sub_layer(layer: PlannedLayer, linear: nn.Linear, worker: int) -> SubLayer:
    rows, columns = layer.rows(worker), layer.columns(worker)
    weight = linear.weight.detach()[torch.from_numpy(rows)][:, torch.from_numpy(columns)]
    bias = None if linear.bias is None else linear.bias.detach()[torch.from_numpy(rows)]
    return SubLayer(rows, columns, weight, bias)


def _tensors(layers: tuple[PlannedLayer, ...], sub_model: tuple[SubLayer, ...]) -> Tensors:
    tensors = {}
    for layer, part in zip(layers, sub_model, strict=True):
        tensors[weight_key(layer)] = part.weight
        if part.bias is not None:
            tensors[bias_key(layer)] = part.bias
    return tensors


@torch.no_grad()
def _fill(model: nn.Sequential, layers: tuple[PlannedLayer, ...], worker: int, tensors: Tensors) -> None:
    for layer in layers:
        linear = _linear(model, layer)
        rows = torch.from_numpy(layer.rows(worker))
        linear.weight[rows[:, None], torch.from_numpy(layer.columns(worker))] = tensors[weight_key(layer)]
        if linear.bias is not None:
            linear.bias[rows] = tensors[bias_key(layer)]


def _check_support(layer: PlannedLayer, weight: np.ndarray[Any, Any], n_workers: int) -> None:
    for worker in range(n_workers):
        read = np.flatnonzero((weight[layer.rows(worker)] != 0).any(axis=0))
        lost = np.setdiff1d(read, layer.columns(worker))
        if len(lost):
            got = f"reads value {lost[0]} on worker {worker}, which does not have it"
            raise InvalidArgument(f"layer {layer.name!r}: weight", got, "zero wherever a value is not had")
