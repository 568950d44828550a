"""Factories of small layers, and formulas by a second route: sums over the samples themselves, sets, loops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import settings
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import LayerProblem, Moments
from repurpose_opt.problem import dense
from repurpose_opt.testing import correlated_samples

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40, database=None)
settings.load_profile("repeatable")


@dataclass(frozen=True)
class Layer:
    """A layer together with the samples that its moments were taken from."""

    problem: LayerProblem
    received: NDArray[np.float64]
    """x̂, (samples, columns)"""
    original: NDArray[np.float64]
    """x, (samples, columns)"""

    @property
    def weight(self) -> NDArray[np.float64]:
        return np.asarray(dense(self.problem.weight), dtype=np.float64)

    @property
    def ridge(self) -> float:
        return self.problem.moments.ridge


def random_layer(
    seed: int = 0,
    m: int = 6,
    n: int = 5,
    P: int = 3,
    *,
    noise: float = 0.0,
    is_sparse: bool = False,
    density: float = 1.0,
    column_value: Any = None,
    row_neuron: Any = None,
    **arguments: Any,
) -> Layer:
    """m neurons (or the rows of `row_neuron`), n values (or the columns of `column_value`), with x̂ = x + noise."""
    random = np.random.default_rng(seed)
    rows = m if row_neuron is None else len(row_neuron)
    columns = n if column_value is None else len(column_value)
    weight: Any = random.normal(size=(rows, columns)) * (random.random((rows, columns)) < density)
    original = correlated_samples(columns, seed)
    received = original + noise * random.normal(size=original.shape) if noise else original
    moments = Moments.from_samples(received, original if noise else None)
    problem = LayerProblem.create(
        sparse.csr_array(weight) if is_sparse else weight,
        P,
        moments=moments,
        bias=random.normal(size=rows),
        column_value=column_value,
        row_neuron=row_neuron,
        **arguments,
    )
    return Layer(problem, received, original)


BLOCKS: dict[str, Any] = {"column_value": [0, 1, 1, 2, 3, 3, 3, 4], "row_neuron": [0, 1, 1, 2, 3, 3, 4, 5]}
"""Values of 1, 2, 1, 3 and 1 columns, neurons of 1, 2, 1, 2, 1 and 1 rows."""


def random_owner(problem: LayerProblem, seed: int = 0) -> NDArray[np.int64]:
    """(m,) owners that fill every worker in proportion to nothing in particular."""
    return np.random.default_rng(seed).permutation(np.arange(problem.m) % problem.P)


def random_transfers(problem: LayerProblem, seed: int = 0, share: float = 0.4) -> NDArray[np.bool_]:
    """(n, P) transfers between different workers."""
    return problem.remote & (np.random.default_rng(seed).random((problem.n, problem.P)) < share)


def random_supported_weight(
    problem: LayerProblem, owner: NDArray[np.int64], transfers: NDArray[np.bool_], seed: int = 0
) -> NDArray[np.float64]:
    """Any V that reads only what its workers have."""
    weight = np.random.default_rng(seed).normal(size=(problem.rows, problem.columns))
    return np.where(has_column(problem, owner, transfers), weight, 0.0)


def has_column(problem: LayerProblem, owner: NDArray[np.int64], transfers: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(rows, columns) whether the worker of a row has the value of a column, by the definition."""
    has = np.zeros((problem.rows, problem.columns), dtype=bool)
    for row in range(problem.rows):
        worker = owner[problem.row_neuron[row]]
        for column in range(problem.columns):
            value = problem.column_value[column]
            has[row, column] = problem.input_owner[value] == worker or transfers[value, worker]
    return has


def error_on_samples(layer: Layer, weight: Any) -> float:
    """mean over samples of Σ_i g_i (W x − V x̂)_i², centred, plus λ Σ_i g_i ‖W_i − V_i‖²."""
    difference = layer.original @ layer.weight.T - layer.received @ dense(weight).T
    difference -= difference.mean(axis=0)
    squared = np.square(difference).mean(axis=0) + layer.ridge * np.square(layer.weight - dense(weight)).sum(axis=1)
    return float(squared @ layer.problem.output_weight)


def nmse_on_samples(layer: Layer, weight: Any, bias: NDArray[np.float64]) -> float:
    """mean over samples of ‖Wx + b − Vx̂ − b'‖² / mean over samples of ‖Wx‖²."""
    product = layer.original @ layer.weight.T
    difference = product + layer.problem.bias - layer.received @ dense(weight).T - bias
    return float(np.mean(np.square(difference).sum(axis=1)) / np.mean(np.square(product).sum(axis=1)))


def refit_on_samples(layer: Layer, row: int, columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """(columns,) weights of one row that reads these columns only: least squares on the samples, with ridge rows."""
    received = layer.received - layer.received.mean(axis=0)
    original = layer.original - layer.original.mean(axis=0)
    scale = np.sqrt(len(received))
    left = np.vstack([received[:, columns] / scale, np.sqrt(layer.ridge) * np.eye(layer.problem.columns)[:, columns]])
    right = np.concatenate([original @ layer.weight[row] / scale, np.sqrt(layer.ridge) * layer.weight[row]])
    weight = np.zeros(layer.problem.columns)
    weight[columns] = np.linalg.lstsq(left, right, rcond=None)[0]
    return weight
