"""What the workers send each other for one layer: a message for each pair of workers, encode → send → decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument


@dataclass(frozen=True, eq=False)
class Message:
    """What worker p sends to worker k for one sample: the encoder picks `values`, kept as an index (r,)."""

    values: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Numbers of values sent."""
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Exchange:
    """All messages of one layer, by (source worker, target worker); pairs that send nothing are absent."""

    n: int
    P: int
    messages: Mapping[tuple[int, int], Message]

    @cached_property
    def transfers(self) -> NDArray[np.bool_]:
        """(n, P) whether value j is sent to worker k."""
        sent = np.zeros((self.n, self.P), dtype=bool)
        for (_, target), message in self.messages.items():
            sent[message.values, target] = True
        return sent

    @staticmethod
    def of_transfers(transfers: NDArray[np.bool_], input_owner: NDArray[np.int64]) -> Exchange:
        """The exchange that sends value j to worker k wherever `transfers` (n, P) is true."""
        n, P = transfers.shape
        if transfers[np.arange(n), input_owner].any():
            j = int(np.flatnonzero(transfers[np.arange(n), input_owner])[0])
            raise InvalidArgument("transfers", f"value {j} to its own owner", "transfers to other workers only")
        messages = {}
        for target in range(P):
            sent = np.flatnonzero(transfers[:, target])
            sources = input_owner[sent]
            for source in np.unique(sources):
                messages[int(source), target] = Message(sent[sources == source])
        return Exchange(n, P, messages)

    @staticmethod
    def nothing(n: int, P: int) -> Exchange:
        return Exchange(n, P, {})
