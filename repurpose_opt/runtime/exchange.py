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

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.layer import Indices, PlannedCode, PlannedLayer
from repurpose_opt.runtime.wire import Wire, layer_wire, wire_of

Wait = Callable[[], None]
"""Returns when everything has arrived and everything sent may be overwritten."""
Start = Callable[[torch.Tensor, torch.Tensor, list[int], list[int], bool], Wait]
"""(received, sent, rows received from each worker, rows sent to each worker, at once): begins to fill `received`; both
tensors are left alone until the wait is over."""

LARGE_MESSAGE = 1 << 18
"""Bytes from which on messages go one by one even where every pair of workers sends."""


def goes_at_once(layer: PlannedLayer, row_bytes: int) -> bool:
    """Whether an exchange is one all-to-all call of all workers, or a call for each message; the same on all of them.

    The all-to-all costs an empty message for each pair that sends nothing, and is slower for large messages on slow
    links: benchmarks/results/exchanges.md.
    """
    is_complete = len(layer.messages) == layer.n_workers * (layer.n_workers - 1)
    largest = max((message.size for message in layer.messages.values()), default=0)
    return is_complete and largest * row_bytes < LARGE_MESSAGE


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

    What arrives, values or numbers of codes, are columns behind the held values: decoding is part of the layer's own
    product. `encoder` is (numbers encoded here, values held), None where this worker encodes none. Where values have
    positions, "samples" are all positions of all samples. A norm's held values are its statistics.
    """

    def __init__(
        self,
        layer: PlannedLayer,
        worker: int,
        batch_size: int,
        dtype: torch.dtype,
        encoder: torch.Tensor | None = None,
        wire: Wire | None = None,
    ) -> None:
        P = layer.n_workers
        self.name = layer.name
        self.is_needed = bool(layer.messages)
        """False where no worker sends anything: then none calls torch.distributed."""
        self.wire = layer_wire(layer, wire or wire_of(None, dtype), dtype)
        self.sent_counts = [len(layer.message(worker, target)) for target in range(P)]
        self.received_counts = [len(layer.message(source, worker)) for source in range(P)]
        self.bytes_sent: NDArray[np.int64] = np.zeros(P, dtype=np.int64)
        """(P,) counted so far from the tensors that were handed over."""
        self.messages_sent = 0
        self.squares = torch.zeros(2, dtype=torch.float64)
        """Sums of squares over the first batch: of what the wire rounded off, and of the numbers."""
        self._is_measured = False
        self._at_once = goes_at_once(layer, self.wire.row_bytes(batch_size * layer.positions))
        self.encoders = _encoders(layer, worker, encoder)
        self._sent = _Messages(sum(self.sent_counts), batch_size * layer.positions, dtype, self.wire)
        self._received = _Messages(sum(self.received_counts), batch_size * layer.positions, dtype, self.wire)
        self._wait: Wait | None = None

    @property
    def nbytes(self) -> int:
        """Of its buffers."""
        return self._sent.nbytes + self._received.nbytes

    def begin(self, values: torch.Tensor, start: Start) -> None:
        """Encode held values (held, samples) and begin to send and receive.

        Raises RepurposeError where the wire has no number as large as one that is sent.
        """
        if not self.is_needed:
            return
        numbers = self.encode(values)
        sent = self._sent.written(numbers)
        for target, part in enumerate(sent.split(self.sent_counts)):
            self.bytes_sent[target] += part.numel() * part.element_size()
            self.messages_sent += part.numel() > 0
        received = self._received.message(values.shape[1])
        self._wait = start(received, sent, self.received_counts, self.sent_counts, self._at_once)
        if self._sent.is_lossy and sent.numel():
            self._check_range(numbers, sent)
            if not self._is_measured:
                self._measure_error(numbers, sent)

    def end(self, samples: int) -> torch.Tensor:
        """Wait for the numbers received (numbers, samples); valid until the next `begin`."""
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._received.read(samples)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """(held, samples) → (numbers sent, samples), ordered by target worker; valid until the next call."""
        buffer = self._sent.numbers(values.shape[1])
        for encoder in self.encoders:
            encoder.encode(values, buffer)
        return buffer

    def _check_range(self, numbers: torch.Tensor, sent: torch.Tensor) -> None:
        if not self.wire.is_finite(sent) and bool(numbers.isfinite().all()):
            raise RepurposeError(
                f"layer {self.name!r}: the wire {self.wire.name} has no number as large as "
                f"{float(numbers.abs().max()):g}; allowed: a wire of the plan's dtype, or bfloat16 for float32"
            )

    def _measure_error(self, numbers: torch.Tensor, sent: torch.Tensor) -> None:
        self._is_measured = True
        arrives = torch.empty_like(numbers)
        self.wire.read(sent, arrives)
        exact = numbers.double()
        self.squares[0] += (arrives.double() - exact).square_().sum()
        self.squares[1] += exact.square_().sum()


class _Messages:
    """Memory for all numbers that are sent, or received, in one exchange, and for how the wire writes them."""

    def __init__(self, rows: int, batch_size: int, dtype: torch.dtype, wire: Wire) -> None:
        self.is_lossy = wire.dtype != dtype
        self._rows, self._wire = rows, wire
        self._numbers = torch.empty(rows * batch_size, dtype=dtype)
        self._message = self._numbers
        if self.is_lossy:
            self._message = torch.empty(rows * wire.row_elements(batch_size), dtype=wire.dtype)

    @property
    def nbytes(self) -> int:
        return self._numbers.nbytes + (self._message.nbytes if self.is_lossy else 0)

    def numbers(self, samples: int) -> torch.Tensor:
        """(rows, samples), contiguous for a smaller last batch too."""
        return self._numbers[: self._rows * samples].view(self._rows, samples)

    def message(self, samples: int) -> torch.Tensor:
        """(rows, elements of a row) on the wire."""
        elements = self._wire.row_elements(samples) if self.is_lossy else samples
        return self._message[: self._rows * elements].view(self._rows, elements)

    def written(self, numbers: torch.Tensor) -> torch.Tensor:
        """The message of these numbers, which are in `numbers`."""
        message = self.message(numbers.shape[1])
        if self.is_lossy and message.numel():
            self._wire.write(numbers, message)
        return message

    def read(self, samples: int) -> torch.Tensor:
        """The numbers of the message that has arrived."""
        numbers = self.numbers(samples)
        if self.is_lossy and numbers.numel():
            self._wire.read(self.message(samples), numbers)
        return numbers


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
            chosen = encoder[torch.as_tensor(np.searchsorted(encoded, numbers))]
        else:
            values = np.concatenate([layer.message(worker, target) for target in members])
            chosen = torch.as_tensor(np.searchsorted(held, values))
        encoders.append(Encoder(slice(start, start + len(chosen)), chosen))
        start += len(chosen)
    return encoders
