"""What tells two instances apart: a digest of everything that a problem and its formulation hold."""

from __future__ import annotations

import hashlib
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem

_DIGITS = 16


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def fingerprint(problem: LayerProblem, formulation: Formulation) -> str:
    """16 hexadecimal digits; the same for the same numbers in the same precision, on every machine."""
    digest = hashlib.sha256()
    _add(digest, problem)
    _add(digest, formulation)
    return digest.hexdigest()[:_DIGITS]


def _add(digest: _Digest, value: Any) -> None:
    """Dataclasses by their fields, arrays by their bytes, the rest by its repr; each with its type, so none run on."""
    digest.update(f"<{type(value).__qualname__}>".encode())
    if is_dataclass(value):
        for field in fields(value):
            digest.update(f"{field.name}=".encode())
            _add(digest, getattr(value, field.name))
    elif sparse.issparse(value):
        matrix = sparse.csr_array(value)
        matrix.sort_indices()
        for part in (np.array(matrix.shape), matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)):
            _add(digest, part)
        _add(digest, matrix.data)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    else:
        digest.update(repr(value).encode())
