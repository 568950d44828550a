"""All that a problem and a formulation consist of, to be compared bit by bit."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np
from scipy import sparse

from repurpose_opt import Formulation, LayerProblem
from repurpose_opt.moments import Moments


def bits(problem: LayerProblem, formulation: Formulation) -> dict[str, Any]:
    """Each field of the problem and its moments as a hash with its type and shape, and the formulation's text."""
    found: dict[str, Any] = {"formulation": repr(formulation), "same_inputs": problem.moments.same_inputs}
    for field in fields(LayerProblem):
        if field.name != "moments":
            found[field.name] = _hash(getattr(problem, field.name))
    for field in fields(Moments):
        found[f"moments.{field.name}"] = _hash(getattr(problem.moments, field.name))
    return found


def _hash(value: Any) -> Any:
    if sparse.issparse(value):
        return tuple(map(_hash, (value.data, value.indices, value.indptr))), value.shape
    if not isinstance(value, np.ndarray):
        return value
    return value.dtype.str, value.shape, hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
