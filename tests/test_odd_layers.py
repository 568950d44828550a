"""Legal but odd layers with every pruner: singular moments, constant inputs, zero rows, budgets of 0 and 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from repurpose_opt import LayerProblem, Moments, SolveOptions, Termination, Volume, metrics
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.pruning import load_pruner
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Candidate

m, n, P = 6, 9, 3
CHAINS = ("threshold", "group-omp", "group-obs", "group-lasso-fast", "group-l0", "group-omp+swaps+tabu", "swaps")
each_pruner = pytest.mark.parametrize("pruner", CHAINS)
OWNER = np.arange(m) % P


def weight() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(m, n))


def samples(count: int = 50) -> np.ndarray:
    random = np.random.default_rng(1)
    return random.normal(size=(count, n)) @ random.normal(size=(n, n))


def pruned(pruner: str, problem: LayerProblem, formulation: Volume) -> tuple[Candidate, np.ndarray, float]:
    """The answer, its transfers (n, P) and the error after refit."""
    candidate = load_pruner(pruner).solve(problem, formulation, SolveOptions(), OWNER)
    assert candidate.exchange is not None, candidate.message
    transfers = candidate.exchange.transfers
    return candidate, transfers, metrics.weighted_error(problem, OWNER, refit(problem, OWNER, transfers))


def odd(what: str) -> LayerProblem:
    inputs, dense = samples(), weight()
    if what == "inputs twice":
        inputs[:, 5:] = inputs[:, :4]
    elif what == "constant inputs":
        inputs[:] = 3.0
    elif what == "some inputs constant":
        inputs[:, ::2] = 3.0
    elif what == "two samples":
        inputs = inputs[:2]
    elif what == "zero rows":
        dense[::2] = 0
    elif what == "zero columns":
        dense[:, ::2] = 0
    elif what == "no weights":
        dense[:] = 0
    return LayerProblem.create(dense, P, moments=Moments.from_samples(inputs))


ODD = (
    "inputs twice",
    "constant inputs",
    "some inputs constant",
    "two samples",
    "zero rows",
    "zero columns",
    "no weights",
)


@each_pruner
@pytest.mark.parametrize("what", ODD)
def test_an_odd_layer_is_pruned_within_its_budget_and_not_for_the_worse(what: str, pruner: str):
    problem = odd(what)
    nothing = np.zeros((n, P), dtype=bool)
    before = metrics.weighted_error(problem, OWNER, refit(problem, OWNER, nothing))
    for share in (0.2, 0.6):
        _, transfers, error = pruned(pruner, problem, Volume(budget=share))
        assert problem.transfer_bytes[transfers].sum() <= share * problem.direct_volume
        assert np.isfinite(error)
        assert error <= before + 1e-9 * abs(before)


@each_pruner
def test_a_budget_of_0_sends_nothing_and_one_of_1_loses_nothing(pruner: str):
    problem = LayerProblem.create(weight(), P, moments=Moments.from_samples(samples()))
    assert not pruned(pruner, problem, Volume(budget=0.0))[1].any()
    _, transfers, error = pruned(pruner, problem, Volume(budget=1.0))
    assert error == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_array_equal(transfers, problem.remote)


@each_pruner
def test_a_max_nmse_that_cannot_be_met_is_said_with_the_best_reached(pruner: str):
    """What is received is noisy, so an error remains whatever is sent."""
    original = samples()
    received = original + np.random.default_rng(2).normal(size=original.shape)
    problem = LayerProblem.create(weight(), P, moments=Moments.from_samples(received, original))
    least = refit(problem, OWNER, problem.remote)
    reached = metrics.nmse(problem, OWNER, least, corrected_bias(problem, least))
    formulation = Volume(max_nmse=reached / 2)
    solution = solve_problem(problem, formulation, partitioner="contiguous", pruner=pruner, start=OWNER)
    assert solution.termination is Termination.ERROR
    assert "max_nmse" in solution.message
    assert solution.nmse == pytest.approx(reached, rel=1e-6)


def test_one_sample_is_refused():
    with pytest.raises(InvalidArgument, match="one sample"):
        Moments.from_samples(samples(1))


@pytest.mark.parametrize("arguments", [{}, {"value_bytes": [1, 5, 2, 7, 3, 1, 4, 2, 6]}], ids=["equal", "unequal"])
def test_all_pruners_are_above_the_exact_choice(arguments: dict[str, Any]):
    problem = LayerProblem.create(weight(), P, moments=Moments.from_samples(samples()), **arguments)
    for share in (0.2, 0.4):
        least = pruned("group-l0", problem, Volume(budget=share))[2]
        for pruner in CHAINS:
            assert pruned(pruner, problem, Volume(budget=share))[2] >= least * (1 - 1e-9)
