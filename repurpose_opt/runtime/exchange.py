"""One layer's exchange as one worker does it, precomputed: encode → send → decode.

Values are stored (values, samples), so that what goes to one worker is one contiguous run of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer

Send = Callable[[torch.Tensor, torch.Tensor, list[int], list[int]], None]
"""(received, sent, numbers received from each worker, numbers sent to each worker): fills `received`."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """Writes a run of the rows to be sent: values picked by an index, or linear combinations of all values held."""

    rows: slice
    encoder: torch.Tensor
    """(rows,) places among the held values, or (rows, held)."""

    def encode(self, values: torch.Tensor, buffer: torch.Tensor) -> None:
        """Fill these rows of `buffer` (numbers sent, samples) from the values (held, samples)."""
        part = buffer[self.rows]
        if self.encoder.ndim == 1:
            torch.index_select(values, 0, self.encoder, out=part)
        else:
            torch.mm(self.encoder, values, out=part)


class ExchangeStep:
    """Sends what other workers need of the values held here and receives what is needed from them.

    What arrives, values or numbers of codes, stands behind the held values as columns: decoding is part of the
    layer's own product. `encoder` is (numbers encoded here, values held), None where this worker encodes none. Where
    values have positions, "samples" are all positions of all samples. A norm's held values are its statistics.
    """

    def __init__(
        self, layer: PlannedLayer, worker: int, batch_size: int, dtype: torch.dtype, encoder: torch.Tensor | None = None
    ) -> None:
        P = layer.n_workers
        held = layer.sendable(worker)
        messages = [layer.message(worker, target) for target in range(P)]
        self.name = layer.name
        self.is_needed = bool(layer.messages)
        """False where no worker sends anything: then none calls torch.distributed."""
        self.sent_counts = [len(message) for message in messages]
        self.received_counts = [len(layer.message(source, worker)) for source in range(P)]
        self.bytes_sent: NDArray[np.int64] = np.zeros(P, dtype=np.int64)
        """(P,) counted so far from the tensors that were handed over."""
        self.messages_sent = 0
        self._batch_size = batch_size * layer.positions
        self._held = len(held)
        self._encoders = _encoders(layer, worker, encoder)
        self._sent = torch.empty(sum(self.sent_counts) * self._batch_size, dtype=dtype)
        self._inputs = torch.empty((len(held) + sum(self.received_counts)) * self._batch_size, dtype=dtype)

    def run(self, values: torch.Tensor, send: Send) -> torch.Tensor:
        """From the held values (held, samples) to all values that the worker has (columns, samples).

        The result is valid until the next call.
        """
        buffer = self.encode(values)
        inputs = _front(self._inputs, values.shape[1], self._batch_size)
        received = inputs[self._held :]
        if self.is_needed:
            self._count(buffer)
            send(received, buffer, self.received_counts, self.sent_counts)
        return self.decode(values, inputs)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """(held, samples) → (numbers sent, samples), ordered by target worker."""
        buffer = _front(self._sent, values.shape[1], self._batch_size)
        for encoder in self._encoders:
            encoder.encode(values, buffer)
        return buffer

    def decode(self, values: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        """Put the held values before the received numbers, which arrived in their place in `inputs`."""
        inputs[: self._held] = values
        return inputs

    def _count(self, buffer: torch.Tensor) -> None:
        for target, part in enumerate(buffer.split(self.sent_counts)):
            self.bytes_sent[target] += part.numel() * part.element_size()
            self.messages_sent += part.numel() > 0


def _encoders(layer: PlannedLayer, worker: int, encoder: torch.Tensor | None) -> list[Encoder]:
    """What fills the rows to be sent, in order; neighbouring targets that are sent the same kind are one."""
    held, encoded = layer.sendable(worker), layer.encoded(worker)
    targets = [target for target in range(layer.n_workers) if (worker, target) in layer.messages]
    encoders, start = [], 0

    def is_code(target: int) -> bool:
        return isinstance(layer.messages[worker, target], PlannedCode)

    for coded, group in groupby(targets, is_code):
        members = list(group)
        if coded:
            numbers: Indices = np.concatenate([layer.code_numbers(worker, target) for target in members])
            assert encoder is not None
            chosen = encoder[torch.from_numpy(np.searchsorted(encoded, numbers))]
        else:
            values = np.concatenate([layer.message(worker, target) for target in members])
            chosen = torch.from_numpy(np.searchsorted(held, values))
        encoders.append(Encoder(slice(start, start + len(chosen)), chosen))
        start += len(chosen)
    return encoders


def _front(flat: torch.Tensor, samples: int, batch_size: int) -> torch.Tensor:
    """(width, samples) in memory for (width, batch_size): rows stay contiguous for a smaller last batch."""
    width = len(flat) // batch_size
    return flat[: width * samples].view(width, samples)
