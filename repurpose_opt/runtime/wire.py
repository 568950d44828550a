"""How numbers are written into messages: as they are, in fewer bits, or as whole numbers with a scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.runtime.layer import Indices, PlannedLayer

_LARGEST_INT8 = 127


@dataclass(frozen=True)
class Wire:
    """The format of a row of a message: one number of every sample and position of a batch."""

    name: str
    dtype: torch.dtype
    """Of one element."""
    scale_elements: int = 0
    """Elements before each row that hold the bytes of its scale, a float32."""

    def row_elements(self, numbers: int) -> int:
        """Elements of a row of so many numbers."""
        return numbers + self.scale_elements if numbers else 0

    def row_bytes(self, numbers: int) -> int:
        """Bytes of a row of so many numbers."""
        return self.row_elements(numbers) * self.dtype.itemsize

    def write(self, numbers: torch.Tensor, message: torch.Tensor) -> None:
        """Fill `message` (rows, row_elements) with numbers (rows, samples).

        A row with a number that is not finite, or whose scale float32 cannot hold, arrives as NaN.
        """
        if self.scale_elements == 0:
            message.copy_(numbers)
            return
        scale = numbers.abs().amax(dim=1, keepdim=True).float() / _LARGEST_INT8
        message[:, : self.scale_elements] = scale.view(torch.int8)
        divisor = torch.where(scale > 0, scale, 1.0)
        message[:, self.scale_elements :] = (numbers / divisor).round_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)

    def is_finite(self, message: torch.Tensor) -> bool:
        """Whether every number arrives as one."""
        written = message
        if self.scale_elements:
            written = message[:, : self.scale_elements].reshape(-1).view(torch.float32)
        return bool(written.isfinite().all())

    def read(self, message: torch.Tensor, numbers: torch.Tensor) -> None:
        """Fill numbers (rows, samples) from `message`; the inverse of `write` but for rounding."""
        if self.scale_elements == 0:
            numbers.copy_(message)
            return
        scale = message[:, : self.scale_elements].reshape(-1).view(torch.float32)[:, None]
        torch.mul(message[:, self.scale_elements :], scale, out=numbers)


WIRES = {
    "float64": Wire("float64", torch.float64),
    "float32": Wire("float32", torch.float32),
    "float16": Wire("float16", torch.float16),
    "bfloat16": Wire("bfloat16", torch.bfloat16),
    "int8": Wire("int8", torch.int8, scale_elements=4),
}
"""int8: each number is rounded to a multiple of its row's largest magnitude / 127."""


def wire_of(name: str | None, dtype: torch.dtype) -> Wire:
    """The wire of a plan whose weights are of `dtype`; None: as they are. Raises InvalidArgument for another name."""
    own = str(dtype).removeprefix("torch.")
    allowed = [wire for wire in WIRES if WIRES[wire].dtype.itemsize <= dtype.itemsize]
    if name is not None and name not in allowed:
        raise InvalidArgument("wire", name, ", ".join(allowed))
    return WIRES[name or own]


def layer_wire(layer: PlannedLayer, wire: Wire, dtype: torch.dtype) -> Wire:
    """What a layer's messages are written in: statistics of a normalisation always as they are, else `wire`."""
    return wire_of(None, dtype) if layer.sends_statistics else wire


def traffic(layer: PlannedLayer, samples: int, wire: str | None = None) -> Indices:
    """(P, P) bytes from worker p (row) to worker k (column) for one batch of so many samples."""
    if wire is None:
        return layer.traffic() * samples
    rows: Indices = np.zeros((layer.n_workers, layer.n_workers), dtype=np.int64)
    for pair, message in layer.messages.items():
        rows[pair] = message.size
    if layer.sends_statistics:
        return rows * layer.value_bytes * samples
    return rows * WIRES[wire].row_bytes(samples * layer.positions)
