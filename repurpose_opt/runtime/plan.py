"""A pruned network, who computes what, and what the workers send each other: the answer of `repurpose`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.runtime.coded import Product, effective_weight
from repurpose_opt.runtime.graph import Graph
from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer, PlannedStatistics
from repurpose_opt.runtime.manifest import DTYPES, Manifest, StepSpec
from repurpose_opt.runtime.memory import Memory, activation_bytes, message_bytes
from repurpose_opt.runtime.modules import Role, materialised, role_of, to_spec
from repurpose_opt.runtime.parts import SubStep, check_support, cut, fill
from repurpose_opt.runtime.splits import Split, splits_of
from repurpose_opt.runtime.steps import Opaque
from repurpose_opt.runtime.storage import of_step, read_manifest, read_worker, tensor_key, write_folder
from repurpose_opt.runtime.wire import wire_of

__all__ = ["Plan", "PlannedCode", "PlannedLayer", "PlannedStatistics", "SubStep"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A pruned model split over workers. Raises InvalidArgument or UnsupportedModule where its parts do not fit."""

    model: Graph | nn.Sequential
    """In eval mode; a flat nn.Sequential becomes a graph. Weights are zero wherever a worker does not have the value; a
    product with codes is a CodedLinear or CodedConv."""
    layers: tuple[PlannedLayer, ...]
    """One for each product, embedding, norm, gathering and step of one worker, in the graph's order."""
    n_workers: int
    direct_volume: int
    """Bytes a sample of the dense model, split over the workers as it stands."""
    stats: Mapping[str, Any]
    """JSON values that record the run."""
    input_owner: Indices | None = None
    """The worker of each place of the input: of a channel of an image, a feature, or a single column where the input is
    only flattened. None: every worker has the whole input, or for an nn.Sequential the first layer's `input_owner`."""
    input_shape: tuple[int, ...] = ()
    """Of one sample; for an nn.Sequential (n,) unless it is given."""

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Sequential):
            object.__setattr__(self, "model", Graph.chain(self.model))
            if self.layers and self.input_owner is None:
                object.__setattr__(self, "input_owner", self.layers[0].input_owner)
                if not self.input_shape:
                    object.__setattr__(self, "input_shape", self.layers[0].input_owner.shape)
        self.check()

    @property
    def graph(self) -> Graph:
        """The model."""
        assert isinstance(self.model, Graph)
        return self.model

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
        """(P,) multiply-accumulates a sample of all products, those of encoding included."""
        products = [layer.worker_macs() for layer in self.layers if self._role(layer.name) is Role.PRODUCT]
        return np.sum([np.zeros(self.n_workers, dtype=np.int64), *products], axis=0)

    def product(self, layer: PlannedLayer) -> Product:
        """The module of a layer that multiplies."""
        module = self.graph.module(layer.name)
        if role_of(module) is not Role.PRODUCT:
            raise InvalidArgument(
                "layer", f"{layer.name!r}, a {type(module).__name__}", "a linear layer or convolution"
            )
        assert isinstance(module, Product)
        return module

    def weight(self, layer: PlannedLayer) -> torch.Tensor:
        """(m, n, …) what a product multiplies its inputs by in all, codes multiplied out."""
        return effective_weight(self.product(layer)).detach()

    def sub_model(self, worker: int) -> tuple[SubStep, ...]:
        """What one worker needs of each step that has a layer or parameters, in order; copies of the weights."""
        if not 0 <= worker < self.n_workers:
            raise InvalidArgument("worker", worker, f"0 … {self.n_workers - 1}")
        layers = {layer.name: layer for layer in self.layers}
        modules = {step.name: self.graph.module(step.name) for step in self.graph.steps}
        return tuple(
            cut(name, module, layers.get(name), self.splits[name], worker)
            for name, module in modules.items()
            if name in layers or any(True for _ in module.parameters())
        )

    def memory(self, batch_size: int = 256, wire: str | None = None) -> tuple[Memory, ...]:
        """What each worker needs to answer batches of so many samples; `wire` as in `run_plan`."""
        dtype = DTYPES[self._dtype()]
        written = wire_of(wire, dtype)
        return tuple(
            Memory(
                weights=sum(step.nbytes for step in self.sub_model(worker)),
                messages=message_bytes(self.layers, worker, batch_size, dtype, written),
                activations=activation_bytes(self.graph, self.splits, worker, batch_size, dtype),
            )
            for worker in range(self.n_workers)
        )

    @cached_property
    def splits(self) -> dict[str, Split]:
        """How the input and every output are split over the workers, by `graph.INPUT` and the step's name."""
        dtype = DTYPES[self._dtype()]
        return splits_of(self.graph, self.layers, self.n_workers, dtype, self.input_owner, self.input_shape)

    def check(self) -> None:
        """Raises InvalidArgument or UnsupportedModule where model, layers and n_workers do not fit each other."""
        if not isinstance(self.model, Graph):
            raise InvalidArgument("model", type(self.model).__name__, "a Graph or a flat nn.Sequential")
        if any(module.training for module in self.model.modules()):
            raise InvalidArgument("model", "training mode", "eval mode: model.eval()")
        self._check_not_in_place()
        manifest = self.manifest()
        if self._dtype() not in DTYPES:
            raise InvalidArgument("dtype of the model", self._dtype(), ", ".join(DTYPES))
        vars(self).pop("splits", None)  # of modules that may have been replaced since
        assert self.splits
        manifest.digest()  # here rather than in `save`, when the run that made the stats is over
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                step, _, which = name.partition(".")
                raise InvalidArgument(f"layer {step!r}: {which}", "NaN or infinity", "finite numbers")
        for layer in self.layers:
            if self._role(layer.name) is Role.PRODUCT:
                check_support(layer, self.product(layer))

    def manifest(self) -> Manifest:
        """The plan without its weights."""
        modules = [(step, self.graph.module(step.name)) for step in self.graph.steps]
        return Manifest(
            n_workers=self.n_workers,
            dtype=self._dtype(),
            steps=tuple(StepSpec(step.name, to_spec(module), step.inputs) for step, module in modules),
            input_owner=self.input_owner,
            input_shape=self.input_shape,
            layers=self.layers,
            direct_volume=self.direct_volume,
            stats=self.stats,
        )

    def save(self, directory: str | Path) -> None:
        """Write the folder of the plan, whole or not at all; a plan that is there is replaced.

        Raises InvalidArgument where the folder holds anything else, or `stats` are not JSON values, UnsupportedModule
        where a step is known to this process only.
        """
        self.check()
        for step in self.graph.steps:
            module = self.graph.module(step.name)
            if isinstance(module, Opaque):
                raise UnsupportedModule(
                    f"step {step.name!r} ({module.name}) cannot be saved; it runs in one process only"
                )
        tensors = [
            {tensor_key(part.name, key): tensor for part in self.sub_model(k) for key, tensor in part.tensors.items()}
            for k in range(self.n_workers)
        ]
        write_folder(Path(directory), self.manifest(), tensors)

    @staticmethod
    def load(directory: str | Path) -> Plan:
        """The plan in a folder, checked against the sizes and SHA-256 in its manifest.

        Raises PlanError, which names the file, where one is missing, truncated, altered or of another version.
        """
        manifest = read_manifest(Path(directory))
        model = manifest.graph
        materialised(model)
        layers = {layer.name: layer for layer in manifest.layers}
        for worker in range(manifest.n_workers):
            tensors = read_worker(Path(directory), manifest, worker)
            for step in model.steps:
                name = step.name
                fill(model.module(name), layers.get(name), manifest.splits[name], worker, of_step(tensors, name))
        return Plan(
            model,
            manifest.layers,
            manifest.n_workers,
            manifest.direct_volume,
            manifest.stats,
            manifest.input_owner,
            manifest.input_shape,
        )

    def _check_not_in_place(self) -> None:
        for step in self.graph.steps:
            read = step.inputs[0]
            if getattr(self.graph.module(step.name), "inplace", False) and len(self.graph.readers(read)) > 1:
                allowed = f"inplace=False, as others read {read!r} too"
                raise InvalidArgument(f"step {step.name!r}: inplace", "True", allowed)

    def _role(self, name: str) -> Role:
        return role_of(self.graph.module(name))

    def _dtype(self) -> str:
        """Key of DTYPES, or the names of several dtypes, which no plan has."""
        names = {str(parameter.dtype).removeprefix("torch.") for parameter in self.graph.parameters()}
        return " and ".join(sorted(names))
