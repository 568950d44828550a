"""The public checks pass what is right and catch what is wrong: backends and formulations with one fault each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repurpose_opt import (
    Candidate,
    Edge,
    Exchange,
    Formulation,
    LayerProblem,
    Lossless,
    SolveOptions,
    Termination,
    Volume,
    metrics,
    registry,
)
from repurpose_opt import testing as public
from repurpose_opt.formulation import incidence
from repurpose_opt.solver import Prune
from repurpose_opt.testing import check_formulation, check_partitioner, check_pruner

EDGE: dict[str, Formulation] = {"edge": Edge(weight_price=0.05, transfer_price=0.02)}
LOSSLESS: dict[str, Formulation] = {"lossless": Lossless()}

Munkres: Any = registry.load("partitioners", "munkres")
Alternate: Any = registry.load("partitioners", "alternate")
Contiguous: Any = registry.load("partitioners", "contiguous")
Threshold: Any = registry.load("pruners", "threshold")


def test_what_is_right_passes():
    check_partitioner(Munkres(), EDGE)
    check_partitioner(Alternate(), LOSSLESS)
    check_pruner(Threshold(), EDGE | LOSSLESS)
    check_formulation(Edge(weight_price=0.05))
    check_formulation(Lossless())


def test_names_of_checks_are_unique():
    for checks in (
        public.partitioner_checks(Munkres()),
        public.pruner_checks(Threshold()),
        public.formulation_checks(Lossless()),
    ):
        names = [name for name, _ in checks]
        assert len(names) == len(set(names)) > 20


def test_the_oracle_by_hand():
    """Two neurons, one input on worker 0; each worker takes one neuron. Neuron 1 should be where the input is."""
    problem = LayerProblem.create(np.array([[1.0], [3.0]]), 2, input_owner=0, value_bytes=1)
    assert public.least_objective(problem, Edge(transfer_price=100.0)) == 1.0
    assert public.least_objective(problem, Edge(transfer_price=0.5)) == 0.5
    assert public.least_objective(problem, Lossless()) == 1.0
    assert public.least_objective_given(problem, Edge(transfer_price=100.0), np.array([0, 1])) == 9.0
    assert public.least_objective(problem, Volume(max_nmse=0.1)) == 0.0
    pinned = replace(problem, allowed=np.array([[True, False], [True, False]]))
    assert public.least_objective(pinned, Lossless()) == np.inf


def faulty(base: Any, change: Callable[..., Candidate], **attributes: Any) -> Any:
    """A backend like `base` whose candidate is changed."""

    class Faulty(base):
        """Faulty."""

        def solve(self, problem: LayerProblem, *arguments: Any) -> Candidate:
            return change(super().solve(problem, *arguments), problem)

    for name, value in {"name": "faulty", **attributes}.items():
        setattr(Faulty, name, value)
    return Faulty()


def moved(candidate: Candidate, problem: LayerProblem) -> Candidate:
    return Candidate(Termination.HEURISTIC, np.zeros(problem.m, dtype=np.int64))


def optimal_but_not(candidate: Candidate, problem: LayerProblem) -> Candidate:
    """Two neurons swapped, and the objective that this gives claimed as the bound."""
    if candidate.owner is None:
        return candidate
    owner = candidate.owner.copy()
    owner[[0, -1]] = owner[[-1, 0]]
    if metrics.placement_violations(problem, owner):
        return candidate
    cost = EDGE["edge"].assignment_cost(problem, None, None)[np.arange(problem.m), owner].sum()
    return replace(candidate, owner=owner, bound=cost, claimed_objective=cost)


def raises(candidate: Candidate, problem: LayerProblem) -> Candidate:
    raise ZeroDivisionError("division by zero")


def mutates(candidate: Candidate, problem: LayerProblem) -> Candidate:
    problem.capacity[0] += 1
    return candidate


def mutates_what_is_derived(candidate: Candidate, problem: LayerProblem) -> Candidate:
    problem.transfer_price[0] += 1
    return candidate


def is_slow(candidate: Candidate, problem: LayerProblem) -> Candidate:
    time.sleep(0.01)
    return candidate


numbers = count()


def is_unseeded(candidate: Candidate, problem: LayerProblem) -> Candidate:
    """Another rotation of the neurons each time."""
    if candidate.owner is None or problem.m != 24 or not problem.allowed.all():
        return candidate
    rotated = np.roll(candidate.owner, next(numbers))
    return candidate if metrics.placement_violations(problem, rotated) else replace(candidate, owner=rotated)


def gives_up(candidate: Candidate, problem: LayerProblem) -> Candidate:
    return Candidate(Termination.INFEASIBLE)


def ignores_infeasibility(candidate: Candidate, problem: LayerProblem) -> Candidate:
    return candidate if candidate.owner is not None else Candidate(Termination.HEURISTIC, np.array([0, 0, 0, 1, 1]))


PARTITIONER_FAULTS: dict[str, tuple[Any, str]] = {
    "everything on worker 0": (faulty(Contiguous, moved), "ended with an error: faulty: worker 0 holds load"),
    "an optimum that is none": (faulty(Munkres, optimal_but_not), "oracle-.*above the least objective"),
    "no bound": (faulty(Munkres, lambda c, _: replace(c, bound=None)), "claims that do not hold"),
    "a wrong objective": (faulty(Munkres, lambda c, _: replace(c, claimed_objective=1.0)), "claims that do not hold"),
    "an exception": (faulty(Contiguous, raises), "ended with an error: faulty: ZeroDivisionError"),
    "a changed problem": (faulty(Contiguous, mutates), "mutates_nothing-edge: ended with an error.*read-only"),
    "a changed derived array": (faulty(Contiguous, mutates_what_is_derived), "mutates_nothing.*read-only"),
    "another answer each time": (faulty(Contiguous, is_unseeded), "same_seed_same_answer.*the owners differ"),
    "infeasible without reason": (faulty(Contiguous, gives_up), "no answer"),
    "owners for the infeasible": (faulty(Contiguous, ignores_infeasibility), "infeasible-edge"),
    "a name with a plus": (faulty(Contiguous, lambda c, _: c, name="a+b"), r"is_declared: name 'a\+b' has a '\+'"),
    "requires that is no tuple": (faulty(Contiguous, lambda c, _: c, requires="numpy"), "is_declared: requires is not"),
    "a reason that is none": (faulty(Contiguous, lambda c, _: c, supports=lambda *_: False), "is_declared: supports"),
    "supports nothing": (faulty(Contiguous, lambda c, _: c, supports=lambda *_: "not today"), "everything is declined"),
}


@pytest.mark.parametrize(("partitioner", "message"), PARTITIONER_FAULTS.values(), ids=PARTITIONER_FAULTS)
def test_a_faulty_partitioner_is_caught(partitioner: Any, message: str):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_partitioner(partitioner, EDGE)


def test_overrun_of_the_time_limit_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(public, "_GRACE", 0.005)
    with pytest.raises(AssertionError, match="time_limit-edge: took"):
        check_partitioner(faulty(Contiguous, is_slow), EDGE)


class IgnoresLinkPrices(Munkres):
    """Claims to be exact where it has not looked at the prices."""

    name = "ignores-prices"

    def solve(
        self, problem: LayerProblem, formulation: Formulation, options: SolveOptions, start: Any, prune: Prune
    ) -> Candidate:
        blind = replace(problem, link_price=1.0 - np.eye(problem.P))
        candidate: Candidate = super().solve(blind, formulation, options, start, prune)
        return candidate


def test_link_prices_that_are_ignored_are_caught():
    with pytest.raises(AssertionError, match="oracle-link_price"):
        check_partitioner(IgnoresLinkPrices(), EDGE)


def sends_too_much(candidate: Candidate, problem: LayerProblem) -> Candidate:
    return replace(candidate, exchange=Exchange.of_transfers(problem.remote, problem.input_owner))


def moves_a_neuron(candidate: Candidate, problem: LayerProblem) -> Candidate:
    owner = candidate.owner
    return replace(candidate, owner=None if owner is None else owner[::-1].copy())


def forgets(candidate: Candidate, problem: LayerProblem) -> Candidate:
    return replace(candidate, exchange=None)


PRUNER_FAULTS: dict[str, tuple[Any, str]] = {
    "above the budget": (faulty(Threshold, sends_too_much), "ended with an error: volume"),
    "an exception": (faulty(Threshold, raises), "ZeroDivisionError"),
    "no exchange": (faulty(Threshold, forgets), "without an exchange|no owners"),
    "a changed problem": (faulty(Threshold, mutates), "mutates_nothing.*read-only"),
}


@pytest.mark.parametrize(("pruner", "message"), PRUNER_FAULTS.values(), ids=PRUNER_FAULTS)
def test_a_faulty_pruner_is_caught(pruner: Any, message: str):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_pruner(pruner, {"budget": Volume(budget=0.4)})


@dataclass(frozen=True)
class Faultless(Lossless):
    """As Lossless, under another name."""

    name = "faultless"


class CostsTransposed(Faultless):
    """(P, m) instead of (m, P)."""

    def assignment_cost(self, problem: LayerProblem, owner: Any, exchange: Any) -> NDArray[np.float64]:
        return super().assignment_cost(problem, owner, exchange).T


class CostsInfinite(Faultless):
    """Infinite costs."""

    def assignment_cost(self, problem: LayerProblem, owner: Any, exchange: Any) -> NDArray[np.float64]:
        return super().assignment_cost(problem, owner, exchange) / 0.0


class ClaimsExactAssignment(Faultless):
    """Its cost counts every neuron's inputs alone."""

    assignment_is_exact = True


class SelectsTooMuch(Faultless):
    """Sends everything, and says that this is best."""

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        return Exchange.of_transfers(problem.remote, problem.input_owner)


class SelectsTooLittle(Faultless):
    """Sends nothing."""

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        return Exchange.nothing(problem.n, problem.P)


class ChangesTheProblem(Faultless):
    """Writes to the weights."""

    def objective(self, problem: LayerProblem, owner: Any, exchange: Any, weight: Any) -> float:
        problem.weight[0, 0] = 0.0
        return super().objective(problem, owner, exchange, weight)


class HasNoNumber(Faultless):
    """NaN."""

    def objective(self, problem: LayerProblem, owner: Any, exchange: Any, weight: Any) -> float:
        return float("nan")


class HoldsNothingBack(Faultless):
    """Repairs to the full weight, whatever is sent."""

    def select(self, problem: LayerProblem, owner: NDArray[np.int64]) -> Exchange:
        return Exchange.nothing(problem.n, problem.P)

    def repair(self, problem: LayerProblem, owner: Any, exchange: Any) -> Any:
        return problem.weight


class DampsWithoutEnd(Faultless):
    """A damping of 1 would never move."""

    damping = 1.0


FORMULATION_FAULTS: dict[str, tuple[Formulation, str]] = {
    "costs transposed": (CostsTransposed(), r"assignment_cost-.*not \(m, P\)"),
    "costs infinite": (CostsInfinite(), "assignment_cost-.*infinite"),
    "exactness of the assignment": (ClaimsExactAssignment(), "exactness_of_assignment-"),
    "exactness of the selection": (SelectsTooMuch(), "exactness_of_selection-"),
    "own constraints": (SelectsTooLittle(), "select-.*own constraints"),
    "changed problem": (ChangesTheProblem(), "mutates_nothing: ValueError: .*read-only"),
    "no number": (HasNoNumber(), "objective-.*nan"),
    "weights without values": (HoldsNothingBack(), "select-.*does not have"),
    "damping": (DampsWithoutEnd(), "is_declared: damping"),
}


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(("formulation", "message"), FORMULATION_FAULTS.values(), ids=FORMULATION_FAULTS)
def test_a_faulty_formulation_is_caught(formulation: Formulation, message: str):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_formulation(formulation)


def test_a_formulation_that_lacks_the_defaults_is_told_to_subclass():
    class Bare:
        """The three methods only."""

        name = "bare"
        objective, assignment_cost, select = Lossless.objective, Lossless.assignment_cost, Lossless.select

    with pytest.raises(AssertionError, match="subclass it"):
        check_formulation(Bare())  # type: ignore[arg-type]


def test_the_cases_differ_as_their_names_say():
    assert incidence(public.SPARSE_CASES["identity"]()).nnz < 15
    assert not public.TINY_CASES["load"]().has_equal_loads
    assert not public.TINY_CASES["correlated"]().moments.is_diagonal
    assert not public.TINY_CASES["received"]().moments.same_inputs
    assert public.TINY_CASES["single"]().weight.dtype == np.float32
