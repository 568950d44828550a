"""What the workers send each other for one layer: a message for each pair of workers, encode → send → decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument


@dataclass(frozen=True, eq=False)
class Values:
    """Chosen values of worker p that go to worker k: the encoder picks `values`, kept as an index (r,)."""

    values: NDArray[np.int64]

    @property
    def size(self) -> int:
        """Numbers sent for one sample."""
        return len(self.values)


@dataclass(frozen=True, eq=False)
class Code:
    """r linear combinations of all values of worker p that go to worker k: U R x̂_p stands for V_kp x̂_p there.

    `encoder` is R (r, n_p), its columns the values of p in ascending order, its rows orthonormal: any other R of the
    same row space says the same. The decoder U (rows of k, r) is V_kp Rᵀ. Where values have several columns each (a
    channel), R acts on whole values, R ⊗ I on the columns, and a number is a whole map.
    """

    encoder: NDArray[np.floating]

    @property
    def size(self) -> int:
        """Numbers sent for one sample."""
        return len(self.encoder)

    @staticmethod
    def spanning(combinations: NDArray[np.floating]) -> Code:
        """The code of the row space of (r, n_p) combinations, which have full row rank."""
        return Code(np.ascontiguousarray(np.linalg.qr(combinations.T)[0].T))


Message: TypeAlias = Values | Code


@dataclass(frozen=True, eq=False)
class Exchange:
    """All messages of one layer, by (source worker, target worker); pairs that send nothing are absent."""

    n: int
    P: int
    messages: Mapping[tuple[int, int], Message]

    @cached_property
    def has_codes(self) -> bool:
        return any(isinstance(message, Code) for message in self.messages.values())

    @cached_property
    def transfers(self) -> NDArray[np.bool_]:
        """(n, P) whether value j is sent to worker k. Raises InvalidArgument where a message is a code."""
        if self.has_codes:
            raise InvalidArgument("transfers", "an exchange with codes", "messages of chosen values only")
        return self.chosen_values

    @cached_property
    def chosen_values(self) -> NDArray[np.bool_]:
        """(n, P) whether value j itself is sent to worker k, codes left out."""
        sent = np.zeros((self.n, self.P), dtype=bool)
        for (_, target), message in self.messages.items():
            if isinstance(message, Values):
                sent[message.values, target] = True
        return sent

    def codes_to(self, target: int) -> list[tuple[int, Code]]:
        """(source, code) of the codes that a worker receives, by source."""
        return [
            (source, message)
            for (source, receiver), message in sorted(self.messages.items())
            if receiver == target and isinstance(message, Code)
        ]

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
                messages[int(source), target] = Values(sent[sources == source])
        return Exchange(n, P, messages)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Flat arrays for a file: a message from worker p to worker k is `values-p-k`, or the encoder `code-p-k`."""
        return {
            f"{'code' if isinstance(message, Code) else 'values'}-{source}-{target}": (
                message.encoder if isinstance(message, Code) else message.values
            )
            for (source, target), message in sorted(self.messages.items())
        }

    @staticmethod
    def of_arrays(n: int, P: int, arrays: Mapping[str, NDArray[Any]]) -> Exchange:
        """The exchange that `arrays` made; names without two workers are passed over. Raises KeyError, ValueError."""
        messages: dict[tuple[int, int], Message] = {}
        for name in arrays:
            kind, *pair = name.split("-")
            if len(pair) == 2:
                source, target = map(int, pair)
                messages[source, target] = {"values": Values, "code": Code}[kind](arrays[name])
        return Exchange(n, P, messages)

    @staticmethod
    def nothing(n: int, P: int) -> Exchange:
        return Exchange(n, P, {})
