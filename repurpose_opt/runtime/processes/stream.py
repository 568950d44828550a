"""A stream of batches and answers: arrays as numpy.save writes them, one after the other, or JSON lines."""

from __future__ import annotations

import json
from io import BufferedReader
from types import SimpleNamespace
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import RepurposeError


class DamagedStream(RepurposeError):
    """What comes in is no batch, and where the next one begins cannot be known."""


class Format(Protocol):
    """How batches and answers are written."""

    def read(self, reader: BufferedReader) -> NDArray[Any] | None:
        """The next batch; None at the end. Raises RepurposeError for one that is none, DamagedStream for the last."""

    def write(self, writer: BinaryIO, outputs: NDArray[Any]) -> None: ...

    def write_error(self, writer: BinaryIO, error: str) -> None: ...


class Npy:
    """Arrays of NumPy's format; an error is an array without axes of text. No pickled objects."""

    def read(self, reader: BufferedReader) -> NDArray[Any] | None:
        if not reader.peek(1):
            return None
        try:
            # NumPy would seek in what looks like a file, which a pipe or socket cannot.
            batch: NDArray[Any] = np.lib.format.read_array(cast(BinaryIO, SimpleNamespace(read=reader.read)))
        except (ValueError, MemoryError) as error:
            raise DamagedStream(f"what came in is no .npy array ({error})") from None
        return batch

    def write(self, writer: BinaryIO, outputs: NDArray[Any]) -> None:
        np.lib.format.write_array(cast(BinaryIO, SimpleNamespace(write=writer.write)), outputs, allow_pickle=False)
        writer.flush()

    def write_error(self, writer: BinaryIO, error: str) -> None:
        self.write(writer, np.array(error))


class JsonLines:
    """Nested lists, a batch a line; an error is an object with the key `error`."""

    def read(self, reader: BufferedReader) -> NDArray[Any] | None:
        line = b"\n"
        while line.isspace():
            line = reader.readline()
        if not line:
            return None
        try:
            return np.array(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise RepurposeError(f"a line is no batch in JSON ({error})") from None

    def write(self, writer: BinaryIO, outputs: NDArray[Any]) -> None:
        writer.write(json.dumps(outputs.tolist()).encode() + b"\n")
        writer.flush()

    def write_error(self, writer: BinaryIO, error: str) -> None:
        writer.write(json.dumps({"error": error}, ensure_ascii=False).encode() + b"\n")
        writer.flush()


def format_of(reader: BufferedReader) -> Format:
    """Told by the first byte."""
    return Npy() if reader.peek(1)[:1] == np.lib.format.MAGIC_PREFIX[:1] else JsonLines()
