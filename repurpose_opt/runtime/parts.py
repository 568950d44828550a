"""The part of every step's parameters that one worker needs, cut out of the module and put back into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import CodedConv, CodedLinear, Product
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.modules import Role, role_of
from repurpose_opt.runtime.splits import Split


@dataclass(frozen=True, eq=False)
class SubStep:
    """What one worker needs of one step.

    Of a product these are `weight` (rows, columns, …) of [L | D], weights of values and decoders of numbers, `bias`
    (rows,) where the module has one, and `encoder` (numbers that it encodes, values that it holds), by target worker,
    where it encodes any. Of any other step they are the module's parameters at the places that the worker holds, and
    all of them or none where one worker runs the step by itself.
    """

    name: str
    """Of the step."""
    rows: Indices
    """Places of the output that the worker makes, ascending."""
    columns: Indices
    """Of a product: held values ascending, then what is received by source worker and message order, values and numbers
    of codes, of which number i is column n + i. Otherwise the same as `rows`."""
    tensors: Mapping[str, torch.Tensor]

    @property
    def weight(self) -> torch.Tensor:
        return self.tensors["weight"]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.tensors.get("bias")

    @property
    def encoder(self) -> torch.Tensor | None:
        return self.tensors.get("encoder")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def cut(name: str, module: nn.Module, layer: PlannedLayer | None, output: Split, worker: int) -> SubStep:
    """Copies of what a worker needs."""
    if isinstance(module, Product) and role_of(module) is Role.PRODUCT:
        assert layer is not None
        return _cut_product(name, module, layer, worker)
    rows = output.held(worker)
    parameters = {key: parameter.detach() for key, parameter in module.named_parameters()}
    if role_of(module) is Role.CENTRAL:
        whole = {key: parameter.clone() for key, parameter in parameters.items()}
        return SubStep(name, rows, rows, whole if len(rows) else {})
    places, axis = torch.from_numpy(rows), _unit_axis(module)
    return SubStep(name, rows, rows, {key: value.index_select(axis, places) for key, value in parameters.items()})


@torch.no_grad()
def fill(
    module: nn.Module, layer: PlannedLayer | None, output: Split, worker: int, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put what `cut` gave into a module whose parameters are zero."""
    if isinstance(module, Product) and role_of(module) is Role.PRODUCT:
        assert layer is not None
        _fill_product(module, layer, worker, tensors)
    elif role_of(module) is Role.CENTRAL:
        for key, tensor in tensors.items():
            module.get_parameter(key).copy_(tensor)
    else:
        places = torch.from_numpy(output.held(worker))
        for key, tensor in tensors.items():
            module.get_parameter(key).index_copy_(_unit_axis(module), places, tensor)


def check_support(layer: PlannedLayer, module: Product) -> None:
    """Raises InvalidArgument where a worker reads what it does not have."""
    joined, n = _nonzero(_joined(module)), len(layer.input_owner)
    for worker in range(layer.n_workers):
        read = np.flatnonzero(joined[layer.rows(worker)].any(axis=0))
        lost = np.setdiff1d(read, layer.columns(worker))
        if len(lost):
            what = f"value {lost[0]}" if lost[0] < n else f"number {lost[0] - n}"
            got = f"reads {what} on worker {worker}, which does not have it"
            raise InvalidArgument(f"layer {layer.name!r}: weight", got, "zero wherever a value is not had")
        if isinstance(module, CodedLinear | CodedConv):
            read = np.flatnonzero(_nonzero(module.encoder)[layer.encoded(worker)].any(axis=0))
            lost = np.setdiff1d(read, layer.held(worker))
            if len(lost):
                got = f"encodes value {lost[0]} on worker {worker}, which does not hold it"
                raise InvalidArgument(f"layer {layer.name!r}: encoder", got, "zero wherever a value is not held")


def _unit_axis(module: nn.Module) -> int:
    """The axis of a module's parameters along which units stand."""
    return 1 if isinstance(module, nn.Embedding | steps.AddPositions) else 0


def _cut_product(name: str, module: Product, layer: PlannedLayer, worker: int) -> SubStep:
    rows, columns, encoded = layer.rows(worker), layer.columns(worker), layer.encoded(worker)
    tensors = {"weight": _block(_joined(module), rows, columns)}
    if module.bias is not None:
        tensors["bias"] = module.bias.detach()[torch.from_numpy(rows)]
    if isinstance(module, CodedLinear | CodedConv) and len(encoded):
        tensors["encoder"] = _block(module.encoder.detach(), encoded, layer.held(worker))
    return SubStep(name, rows, columns, tensors)


def _fill_product(module: Product, layer: PlannedLayer, worker: int, tensors: Mapping[str, torch.Tensor]) -> None:
    rows, columns, n = (
        torch.from_numpy(layer.rows(worker)),
        torch.from_numpy(layer.columns(worker)),
        len(layer.input_owner),
    )
    weight, is_value = tensors["weight"], columns < n
    module.weight[rows[:, None], columns[is_value]] = weight[:, is_value]
    if module.bias is not None:
        module.bias[rows] = tensors["bias"]
    if isinstance(module, CodedLinear | CodedConv):
        module.decoder[rows[:, None], columns[~is_value] - n] = weight[:, ~is_value]
        encoded, held = torch.from_numpy(layer.encoded(worker)), torch.from_numpy(layer.held(worker))
        if len(encoded):
            module.encoder[encoded[:, None], held] = tensors["encoder"]


def _joined(module: Product) -> torch.Tensor:
    """(m, n + numbers, …) [L | D]: the weights of values, then the decoders of numbers."""
    weight = module.weight.detach()
    return (
        torch.cat([weight, module.decoder.detach()], dim=1) if isinstance(module, CodedLinear | CodedConv) else weight
    )


def _block(matrix: torch.Tensor, rows: Indices, columns: Indices) -> torch.Tensor:
    return matrix[torch.from_numpy(rows)][:, torch.from_numpy(columns)]


def _nonzero(weight: torch.Tensor) -> NDArray[np.bool_]:
    """(rows, columns) whether any tap of a kernel is not zero."""
    return (weight.detach() != 0).flatten(2).any(2).cpu().numpy() if weight.ndim > 2 else (weight != 0).cpu().numpy()
