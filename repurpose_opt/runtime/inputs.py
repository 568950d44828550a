"""The input of a run, in a file or in memory: what every worker reads of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.graph import INPUT, Graph
from repurpose_opt.runtime.splits import Split, is_flattened, reads_ids

NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads the part of an input (samples, …) that one worker holds."""

    split: Split
    worker: int
    dtype: str
    """Of the plan; whole numbers are read as int64."""
    vocabulary: int | None
    """Whole numbers from 0 to below this are allowed; None where the input are numbers of the plan's dtype."""

    def read(self, inputs: NDArray[Any], samples: slice) -> torch.Tensor:
        """(places held, samples, *positions), or (samples, …) where every worker has the whole input."""
        batch = inputs[samples]
        if self.split.layout is None:
            return torch.from_numpy(batch.astype(self.dtype if self.vocabulary is None else np.int64))
        part = np.moveaxis(batch.take(self.split.held(self.worker), axis=self.split.axis), self.split.axis, 0)
        # A number too large for the dtype becomes infinite, which `check` reports; NumPy need not warn as well.
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.ascontiguousarray(part, dtype=self.dtype))

    def check(self, name: object, inputs: NDArray[Any]) -> None:
        """Raises RepurposeError where a number that the worker reads is none that the plan can take."""
        step = max(1, NUMBERS_AT_ONCE // max(1, math.prod(inputs.shape[1:])))
        for start in range(0, len(inputs), step):
            self.check_part(name, self.read(inputs, slice(start, start + step)), start)

    def check_part(self, name: object, part: torch.Tensor, first: int) -> None:
        """The same for what `read` gave of the samples from number `first` on."""
        if self.vocabulary is None:
            bad, got, allowed = ~torch.isfinite(part), "NaN or infinite", f"numbers that are finite in {self.dtype}"
        else:
            bad, got, allowed = (part < 0) | (part >= self.vocabulary), "no token", f"0 … {self.vocabulary - 1}"
        if bad.any():
            place = self._place(bad.nonzero()[0].tolist(), first)
            raise RepurposeError(f"{name}: {got} at {place}; allowed: {allowed}")

    def _place(self, index: list[int], start: int) -> str:
        if self.split.layout is None:
            return f"sample {start + index[0]}, place {tuple(index[1:])}"
        position = f", position {tuple(index[2:])}" if index[2:] else ""
        return f"sample {start + index[1]}, column {self.split.held(self.worker)[index[0]]}{position}"


def reader_of(graph: Graph, split: Split, worker: int, dtype: str) -> Reader:
    """For the input of a graph, which is split like this."""
    modules = [graph.module(step.name) for step in graph.readers(INPUT)]
    sizes = [module.num_embeddings for module in modules if isinstance(module, nn.Embedding)]
    return Reader(split, worker, dtype, min(sizes) if sizes else None)


def parts_of(name: object, readers: Sequence[Reader], inputs: NDArray[Any], first: int) -> list[torch.Tensor]:
    """What each worker holds of an input, whose samples are counted from `first` on; see `Reader.read`.

    `readers` are those of all workers. Raises RepurposeError where a number is none that the plan can take.
    """
    is_everywhere = readers[0].split.layout is None
    parts = []
    for reader in readers[:1] if is_everywhere else readers:
        parts.append(reader.read(inputs, slice(None)))
        reader.check_part(name, parts[-1], first)
    return parts * len(readers) if is_everywhere else parts


def open_inputs(path: Path, graph: Graph, input_shape: tuple[int, ...]) -> NDArray[Any]:
    """(samples, …) view of a .npy file, which `checked_inputs` takes.

    Raises RepurposeError, naming the file, where it is missing or no such array.
    """
    try:
        inputs = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise RepurposeError(f"{path}: missing; --input is a .npy file of shape {_shape(input_shape)}") from None
    except (OSError, ValueError) as error:
        raise RepurposeError(f"{path}: cannot be read as a .npy array ({error})") from None
    return checked_inputs(path, inputs, graph, input_shape)


def checked_inputs(name: object, inputs: NDArray[Any], graph: Graph, input_shape: tuple[int, ...]) -> NDArray[Any]:
    """(samples, *input_shape), or (samples, columns) where a graph only flattens its input: then any axes will do.

    Raises RepurposeError, naming the input, where it has another shape or kind of numbers.
    """
    kinds, allowed = ("iu", "whole numbers") if reads_ids(graph) else ("fiub", "real numbers")
    if inputs.dtype.kind not in kinds:
        raise RepurposeError(f"{name}: dtype {inputs.dtype}; allowed: {allowed}")
    columns = math.prod(input_shape)
    if is_flattened(graph) and inputs.ndim >= 2 and math.prod(inputs.shape[1:]) == columns:
        return inputs.reshape(len(inputs), columns)
    if inputs.ndim == 0 or inputs.shape[1:] != input_shape:
        count = f"{columns} columns: " if len(input_shape) == 1 else ""
        raise RepurposeError(f"{name}: shape {inputs.shape}; the plan reads {count}{_shape(input_shape)}")
    return inputs


def _shape(input_shape: tuple[int, ...]) -> str:
    return f"(samples, {', '.join(map(str, input_shape))})"
