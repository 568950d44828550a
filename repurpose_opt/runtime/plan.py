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
from repurpose_opt.runtime.coded import CodedLinear, effective_weight
from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer
from repurpose_opt.runtime.manifest import DTYPES, Manifest, check_manifest
from repurpose_opt.runtime.modules import from_spec, named_modules, to_spec
from repurpose_opt.runtime.storage import (
    Tensors,
    bias_key,
    encoder_key,
    read_manifest,
    read_worker,
    weight_key,
    write_folder,
)

__all__ = ["Plan", "PlannedCode", "PlannedLayer", "SubLayer"]


@dataclass(frozen=True, eq=False)
class SubLayer:
    """The part of one layer that one worker computes: dense matrices of the rows and columns that it has."""

    rows: Indices
    """(rows,) neurons, ascending."""
    columns: Indices
    """(columns,) held values ascending, then what is received by source worker and message order: values, and numbers
    of codes, of which number i is column n + i."""
    weight: torch.Tensor
    """(rows, columns) of [L | D], weights of values and decoders of numbers."""
    bias: torch.Tensor | None
    """(rows,)"""
    encoder: torch.Tensor | None
    """(numbers that it encodes, values that it holds), by target worker; None where it encodes none."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.weight, self.bias, self.encoder) if part is not None)


@dataclass(frozen=True, eq=False)
class Plan:
    """A pruned model split over workers. Raises InvalidArgument or UnsupportedModule where its parts do not fit."""

    model: nn.Sequential
    """Flat, in eval mode; its weights are zero wherever a worker does not have the value. A layer with codes is a
    CodedLinear, one without is a Linear."""
    layers: tuple[PlannedLayer, ...]
    """One for each Linear or CodedLinear, in order."""
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
        """(P,) multiply-accumulates a sample over all layers, those of encoding included."""
        return np.sum([layer.worker_macs() for layer in self.layers], axis=0)

    def linear(self, layer: PlannedLayer) -> nn.Linear | CodedLinear:
        """The module of a layer."""
        return _linear(self.model, layer)

    def weight(self, layer: PlannedLayer) -> torch.Tensor:
        """(m, n) what a layer multiplies its inputs by in all, codes multiplied out."""
        return effective_weight(_linear(self.model, layer)).detach()

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
            _check_support(layer, _linear(self.model, layer))

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


def _linear(model: nn.Sequential, layer: PlannedLayer) -> nn.Linear | CodedLinear:
    linear = model.get_submodule(layer.name)
    assert isinstance(linear, (nn.Linear, CodedLinear))
    return linear


def _joined(linear: nn.Linear | CodedLinear) -> torch.Tensor:
    """(m, n + numbers) [L | D]: the weights of values, then the decoders of numbers."""
    weight = linear.weight.detach()
    return torch.cat([weight, linear.decoder.detach()], dim=1) if isinstance(linear, CodedLinear) else weight


def _sub_layer(layer: PlannedLayer, linear: nn.Linear | CodedLinear, worker: int) -> SubLayer:
    rows, columns, encoded = layer.rows(worker), layer.columns(worker), layer.encoded(worker)
    weight = _block(_joined(linear), rows, columns)
    bias = None if linear.bias is None else linear.bias.detach()[torch.from_numpy(rows)]
    encoder = None
    if isinstance(linear, CodedLinear) and len(encoded):
        encoder = _block(linear.encoder.detach(), encoded, layer.held(worker))
    return SubLayer(rows, columns, weight, bias, encoder)


def _block(matrix: torch.Tensor, rows: Indices, columns: Indices) -> torch.Tensor:
    return matrix[torch.from_numpy(rows)][:, torch.from_numpy(columns)]


def _tensors(layers: tuple[PlannedLayer, ...], sub_model: tuple[SubLayer, ...]) -> Tensors:
    tensors = {}
    for layer, part in zip(layers, sub_model, strict=True):
        named = {weight_key(layer): part.weight, bias_key(layer): part.bias, encoder_key(layer): part.encoder}
        tensors.update({key: tensor for key, tensor in named.items() if tensor is not None})
    return tensors


@torch.no_grad()
def _fill(model: nn.Sequential, layers: tuple[PlannedLayer, ...], worker: int, tensors: Tensors) -> None:
    for layer in layers:
        linear = _linear(model, layer)
        rows, columns = torch.from_numpy(layer.rows(worker)), torch.from_numpy(layer.columns(worker))
        n = linear.in_features
        weight, is_value = tensors[weight_key(layer)], columns < n
        linear.weight[rows[:, None], columns[is_value]] = weight[:, is_value]
        if linear.bias is not None:
            linear.bias[rows] = tensors[bias_key(layer)]
        if isinstance(linear, CodedLinear):
            linear.decoder[rows[:, None], columns[~is_value] - n] = weight[:, ~is_value]
            encoded, held = torch.from_numpy(layer.encoded(worker)), torch.from_numpy(layer.held(worker))
            if len(encoded):
                linear.encoder[encoded[:, None], held] = tensors[encoder_key(layer)]


def _check_support(layer: PlannedLayer, linear: nn.Linear | CodedLinear) -> None:
    """Raises InvalidArgument where a worker reads what it does not have, or a weight is no finite number."""
    for name, parameter in linear.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InvalidArgument(f"layer {layer.name!r}: {name}", "NaN or infinity", "finite numbers")
    joined = _nonzero(_joined(linear))
    for worker in range(layer.n_workers):
        read = np.flatnonzero(joined[layer.rows(worker)].any(axis=0))
        lost = np.setdiff1d(read, layer.columns(worker))
        if len(lost):
            what = f"value {lost[0]}" if lost[0] < linear.in_features else f"number {lost[0] - linear.in_features}"
            got = f"reads {what} on worker {worker}, which does not have it"
            raise InvalidArgument(f"layer {layer.name!r}: weight", got, "zero wherever a value is not had")
        if isinstance(linear, CodedLinear):
            read = np.flatnonzero(_nonzero(linear.encoder)[layer.encoded(worker)].any(axis=0))
            lost = np.setdiff1d(read, layer.held(worker))
            if len(lost):
                got = f"encodes value {lost[0]} on worker {worker}, which does not hold it"
                raise InvalidArgument(f"layer {layer.name!r}: encoder", got, "zero wherever a value is not held")


def _nonzero(matrix: torch.Tensor) -> np.ndarray[Any, Any]:
    return (matrix.detach() != 0).cpu().numpy()
