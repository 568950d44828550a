"""Public conformance checks: what every backend and every formulation must get right, whoever wrote it.

    from repurpose_opt.testing import check_partitioner
    check_partitioner(MyPartitioner())

or one pytest test for each check:

    @pytest.mark.parametrize("name, check", partitioner_checks(MyPartitioner()))
    def test_conformance(name, check):
        reason = check()          # raises AssertionError
        if reason is not None:    # the backend says that it does not support this problem
            pytest.skip(reason)

Every check goes through `solve_problem`, so that what a user sees is what is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import metrics, registry
from repurpose_opt.exchange import Code, Exchange, Message, Values
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
from repurpose_opt.moments import Moments
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solution import LayerSolution
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Partitioner, Pruner, SolveOptions, Termination

Check = Callable[[], str | None]
"""Raises AssertionError; returns why the backend does not support the problem, or None if the check passed."""

TOLERANCE = 1e-6
_GRACE = 5.0


def check_partitioner(partitioner: Partitioner, formulations: Mapping[str, Formulation] | None = None) -> None:
    """Run all checks of a partitioner, on the standard formulations unless others are given."""
    _run_all(partitioner_checks(partitioner, formulations))


def check_pruner(pruner: Pruner, formulations: Mapping[str, Formulation] | None = None) -> None:
    """Run all checks of a pruner, on the standard formulations unless others are given."""
    _run_all(pruner_checks(pruner, formulations))


def check_formulation(formulation: Formulation) -> None:
    """Run all checks of a formulation."""
    _run_all(formulation_checks(formulation))


def partitioner_checks(
    partitioner: Partitioner, formulations: Mapping[str, Formulation] | None = None
) -> Iterator[tuple[str, Check]]:
    """(name, check) for each check of a partitioner."""
    return _backend_checks(_Backend(partitioner, "partitioners"), formulations)


def pruner_checks(pruner: Pruner, formulations: Mapping[str, Formulation] | None = None) -> Iterator[tuple[str, Check]]:
    """(name, check) for each check of a pruner."""
    return _backend_checks(_Backend(pruner, "pruners"), formulations)


def formulation_checks(formulation: Formulation) -> Iterator[tuple[str, Check]]:
    """(name, check) for each check of a formulation."""
    for check in (_check_formulation_is_declared, _check_formulation_mutates_nothing):
        yield _name(check), _bind(check, formulation)
    each_case = (
        _check_objective,
        _check_assignment_cost,
        _check_select,
        _check_exactness_of_assignment,
        _check_exactness_of_selection,
        _check_hypergraph,
    )
    for case in TINY_CASES:
        for case_check in each_case:
            yield f"{_name(case_check)}-{case}", _bind(_check_where_supported, case_check, formulation, case)


def standard_formulations() -> dict[str, Formulation]:
    """The formulations that a backend is checked on: every kind, every mode of Volume, the busiest worker, codes."""
    return {
        "edge": Edge(weight_price=0.05, transfer_price=0.02),
        "volume-price": Volume(transfer_price=0.04),
        "volume-budget": Volume(budget=0.4),
        "volume-bytes": Volume(budget_bytes=9),
        "volume-nmse": Volume(max_nmse=0.15),
        "lossless": Lossless(),
        "edge-busiest": Edge(weight_price=0.05, transfer_price=0.1, communication="busiest"),
        "volume-busiest-price": Volume(transfer_price=0.08, communication="busiest"),
        "volume-busiest-budget": Volume(budget=0.5, communication="busiest"),
        "lossless-busiest": Lossless(communication="busiest"),
        "lossless-codes": Lossless(messages="codes"),
        "codes-price": Volume(transfer_price=0.04, messages="codes"),
        "codes-budget": Volume(budget=0.4, messages="codes"),
        "mixed-price": Volume(transfer_price=0.03, messages="mixed", mac_price=0.01),
    }


@contextmanager
def registered(kind: str, backend: Any) -> Iterator[str]:
    """Gives the name under which `backend` can be solved with, for the time of the block.

    `kind` is "partitioners" or "pruners". A registered backend of the same name is hidden meanwhile.
    """
    known = cast(dict[str, Any], registry._entry_points(kind))
    hidden = known.get(backend.name)
    known[backend.name] = _Given(backend)
    try:
        yield backend.name
    finally:
        if hidden is None:
            del known[backend.name]
        else:
            known[backend.name] = hidden


def least_objective(problem: LayerProblem, formulation: Formulation) -> float:
    """The least objective over all placements and all sets of transfers; infinite if none is valid. Tiny ones only."""
    placements = (np.array(labels) for labels in product(range(problem.P), repeat=problem.m))
    valid = [owner for owner in placements if not metrics.placement_violations(problem, owner)]
    return min((least_objective_given(problem, formulation, owner) for owner in valid), default=np.inf)


def least_objective_given(problem: LayerProblem, formulation: Formulation, owner: NDArray[np.int64]) -> float:
    """The least objective for these owners over all sets of transfers, or codes; infinite if none is valid.

    With codes for two workers at most: there, what a worker receives has one source, and codes of each length are the
    best of their length by a singular value decomposition. Not for `max_nmse` with a ridge, which counts otherwise.
    """
    least = np.inf
    for exchange in _exchanges_with_codes(problem, owner) if formulation.sends_codes else _exchanges(problem):
        weight = formulation.repair(problem, owner, exchange)
        objective = formulation.objective(problem, owner, exchange, weight)
        if objective < least and not formulation.violations(problem, owner, exchange, weight):
            least = objective
    return least


def _exchanges(problem: LayerProblem) -> Iterator[Exchange]:
    """Every set of transfers."""
    value, worker = np.nonzero(problem.remote)
    for chosen in product((False, True), repeat=len(value)):
        transfers = np.zeros((problem.n, problem.P), dtype=bool)
        transfers[value, worker] = chosen
        yield Exchange.of_transfers(transfers, problem.input_owner)


def _exchanges_with_codes(problem: LayerProblem, owner: NDArray[np.int64]) -> Iterator[Exchange]:
    """Every set of values, or the best code of every length, from each of two workers to the other."""
    pairs = [(p, k) for p in range(problem.P) for k in range(problem.P) if p != k]
    assert len(pairs) <= 2, "codes of more than two workers cannot be enumerated"
    for messages in product(*(_messages(problem, owner, *pair) for pair in pairs)):
        sent = {pair: message for pair, message in zip(pairs, messages, strict=True) if message is not None}
        yield Exchange(problem.n, problem.P, sent)


def _messages(problem: LayerProblem, owner: NDArray[np.int64], source: int, target: int) -> Iterator[Message | None]:
    yield None
    held, local = (np.flatnonzero(problem.input_owner == worker) for worker in (source, target))
    for chosen in product((False, True), repeat=len(held)):
        if any(chosen):
            yield Values(held[list(chosen)])
    rows = np.flatnonzero(owner[problem.row_neuron] == target)
    if len(rows) == 0 or len(held) == 0 or problem.columns != problem.n:
        return
    second = problem.moments.regularised
    second = np.diag(second) if second.ndim == 1 else second
    known = np.linalg.solve(second[np.ix_(local, local)], second[local])  # least squares by what the target holds
    left = (second - second[:, local] @ known)[np.ix_(held, held)]
    output = problem.predicted_moment[rows]
    output = np.sqrt(problem.output_weight[rows])[:, None] * (output - output[:, local] @ known)[:, held]
    spread, axes = np.linalg.eigh(left)
    inverse_root = axes / np.sqrt(spread) @ axes.T
    directions = np.linalg.svd(output @ inverse_root)[2] @ inverse_root
    for count in range(1, min(len(rows), len(held)) + 1):
        yield Code(np.linalg.qr(directions[:count].T)[0].T)


# ---------------------------------------------------------------------------------------------- problems to check on


def random_problem(
    seed: int = 0, m: int = 5, n: int = 3, P: int = 2, *, moments: Moments | None = None, **arguments: Any
) -> LayerProblem:
    """m neurons, n values of 4 bytes, P workers; further arguments as for `LayerProblem.create`."""
    random = np.random.default_rng(seed)
    arguments.setdefault("value_bytes", 4)
    weight = arguments.pop("weight", random.normal(size=(m, n)))
    arguments.setdefault("bias", random.normal(size=weight.shape[0]))
    return LayerProblem.create(weight, P, moments=moments, **arguments)


def correlated_samples(columns: int, seed: int = 0, count: int = 60) -> NDArray[np.float64]:
    """(count, columns) samples with correlated columns, uneven variances and a mean."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(columns, columns)) / np.sqrt(columns) + np.eye(columns)
    return random.normal(size=(count, columns)) @ mixing * random.uniform(0.5, 1.5, columns) + 0.3


def _received_moments(columns: int) -> Moments:
    """What arrives is not what the original network had: x̂ = x + noise."""
    original = correlated_samples(columns)
    noise = np.random.default_rng(1).normal(size=original.shape)
    return Moments.from_samples(original + 0.1 * noise, original)


def _blocks(moments: Moments | None) -> LayerProblem:
    """Values of 1, 2 and 2 columns, a neuron of two rows."""
    weight = np.random.default_rng(8).normal(size=(6, 5))
    return random_problem(
        moments=moments, weight=weight, column_value=[0, 1, 1, 2, 2], row_neuron=[0, 1, 1, 2, 3, 4], capacity=3
    )


def _pinned() -> LayerProblem:
    allowed = np.ones((5, 2), dtype=bool)
    allowed[0] = (False, True)
    allowed[1:3] = (True, False)
    return random_problem(7, allowed=allowed)


TINY_CASES: dict[str, Callable[[], LayerProblem]] = {
    "identity": lambda: random_problem(0),
    "diagonal": lambda: random_problem(1, moments=Moments.from_raw([0.02, 1.0, 3.0])),
    "correlated": lambda: random_problem(2, moments=Moments.from_samples(correlated_samples(3))),
    "received": lambda: random_problem(3, moments=_received_moments(3)),
    "output_weight": lambda: random_problem(4, output_weight=[0.1, 3.0, 1.0, 0.5, 2.0]),
    "value_bytes": lambda: random_problem(5, value_bytes=[1, 9, 4]),
    "link_price": lambda: random_problem(6, link_price=[[0.0, 0.2], [4.0, 0.0]]),
    "capacity": lambda: random_problem(7, capacity=[4, 1]),
    "min_load": lambda: random_problem(7, capacity=[5, 5], min_load=[0, 4]),
    "allowed": _pinned,
    "load": lambda: random_problem(7, load=[1, 1, 2, 3, 1], capacity=[5, 4]),
    "blocks": lambda: _blocks(None),
    "correlated_blocks": lambda: _blocks(Moments.from_samples(correlated_samples(5))),
    "uncorrelated_blocks": lambda: _blocks(Moments.from_raw(np.eye(5))),
    "single": lambda: random_problem(
        9, m=4, capacity=[2, 2], weight=np.float32(np.random.default_rng(9).normal(size=(4, 3)))
    ),
}
"""Problems that can be enumerated, by what is particular about each."""

SPARSE_CASES: dict[str, Callable[[], LayerProblem]] = {
    "identity": lambda: _thinned(None),
    "diagonal": lambda: _thinned(Moments.from_raw([0.02, 1.0, 3.0], [0.02, 0.9, 2.9], None, [0.03, 1.0, 3.0])),
    "correlated": lambda: _thinned(Moments.from_samples(correlated_samples(3))),
    "received": lambda: _thinned(_received_moments(3)),
}
"""Problems with zeros in a dense weight, to be compared with the same in a sparse one."""


def _thinned(moments: Moments | None) -> LayerProblem:
    weight = np.random.default_rng(10).normal(size=(5, 3))
    weight[[0, 1, 2, 2, 4], [0, 2, 0, 1, 1]] = 0.0
    return random_problem(moments=moments, weight=weight)


def _large(seed: int = 20, moments: Moments | None = None, **arguments: Any) -> LayerProblem:
    arguments = {"m": 24, "n": 16, "P": 4, **arguments}
    return random_problem(seed, moments=moments, **arguments)


def _large_pinned() -> LayerProblem:
    allowed = np.random.default_rng(21).random((24, 4)) < 0.6
    allowed[np.arange(24), np.arange(24) % 4] = True
    allowed[:3] = np.arange(4) == 2
    return _large(allowed=allowed)


LARGER_CASES: dict[str, Callable[[], LayerProblem]] = {
    "plain": _large,
    "correlated": lambda: _large(moments=Moments.from_samples(correlated_samples(16))),
    "capacity": lambda: _large(capacity=[12, 8, 4, 0]),
    "min_load": lambda: _large(capacity=24, min_load=[0, 10, 0, 6]),
    "allowed": _large_pinned,
    "load": lambda: _large(load=np.random.default_rng(22).integers(1, 5, 24), capacity=20, min_load=[0, 5, 0, 10]),
    "load_of_3": lambda: _large(load=3.0, capacity=[30, 21, 18, 4]),
    "link_price": lambda: _large(link_price=np.random.default_rng(23).uniform(0.1, 5.0, (4, 4))),
    "free_links": lambda: _large(link_price=0.0),
    "free_values": lambda: _large(value_bytes=0),
    "inputs_on_one_worker": lambda: _large(input_owner=3, moments=Moments.from_samples(correlated_samples(16))),
    "more_workers_than_neurons": lambda: random_problem(24, m=3, n=16, P=6),
    "one_neuron": lambda: random_problem(25, m=1, n=4, P=2),
}
"""Problems that are checked for valid answers only."""


# --------------------------------------------------------------------------------------------- checks of a backend


class _Unsupported(Exception):
    """The backend declined, which ends a check without a verdict."""


@dataclass(frozen=True)
class _Given:
    """Stands for an entry point, and for the class that it would load."""

    backend: Any
    value: str = "given to repurpose_opt.testing"

    @property
    def requires(self) -> tuple[str, ...]:
        return tuple(self.backend.requires)

    def load(self) -> _Given:
        return self

    def __call__(self) -> Any:
        return self.backend


@dataclass(frozen=True)
class _Backend:
    """A partitioner, checked with the pruner that serves every formulation; or a pruner, on owners in their order."""

    backend: Any
    kind: str

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions | None = None,
        start: NDArray[np.int64] | None = None,
    ) -> LayerSolution:
        """What a user gets, valid as far as it goes. Raises _Unsupported."""
        with registered(self.kind, self.backend) as name:
            names = {"partitioner": "contiguous", "pruner": "threshold", self.kind[:-1]: name}
            solution = solve_problem(problem, formulation, options, start=start, **names)
        # With a start there is an answer even if the backend has none: look at its own stage too.
        stages = solution.stats.get("stages", [])
        ended = {stage["termination"]: stage["message"] for stage in stages} | {solution.termination: solution.message}
        if Termination.UNSUPPORTED in ended:
            raise _Unsupported(ended[Termination.UNSUPPORTED])
        assert Termination.ERROR not in ended, f"ended with an error: {ended[Termination.ERROR]}"
        _assert_honest(solution)
        return solution


def _backend_checks(backend: _Backend, formulations: Mapping[str, Formulation] | None) -> Iterator[tuple[str, Check]]:
    yield "is_declared", _bind(_check_is_declared, backend)
    once = (
        _check_one_worker,
        _check_no_edges,
        _check_infeasible,
        _check_mutates_nothing,
        _check_same_seed_same_answer,
        _check_start,
        _check_time_limit,
    )
    for label, formulation in (standard_formulations() if formulations is None else formulations).items():
        for check in once:
            yield f"{_name(check)}-{label}", _bind(check, backend, formulation)
        for case in TINY_CASES:
            yield f"oracle-{case}-{label}", _bind(_check_against_oracle, backend, formulation, case)
        for case in LARGER_CASES:
            yield f"valid-{case}-{label}", _bind(_check_valid, backend, formulation, case)
        for case in SPARSE_CASES:
            yield f"sparse-{case}-{label}", _bind(_check_sparse, backend, formulation, case)


def _assert_honest(solution: LayerSolution) -> None:
    """Valid in every respect, or without owners for a reason."""
    refused = solution.stats.get("refused_claims", ())
    assert not refused, f"claims that do not hold: {refused}"
    if solution.owner is None:
        allowed = (Termination.INFEASIBLE, Termination.TIME_LIMIT)
        assert solution.termination in allowed, f"no owners, yet the termination is {solution.termination}"
        return
    assert solution.violations == (), f"an invalid answer: {solution.violations}"
    assert np.isfinite(solution.objective), f"objective {solution.objective}"
    if solution.bound is not None:
        assert solution.bound <= _above(solution.objective), f"bound {solution.bound} > {solution.objective}"
    if solution.termination is Termination.OPTIMAL:
        assert solution.bound is not None, "optimal without a bound"


def _check_is_declared(backend: _Backend) -> None:
    given = backend.backend
    assert isinstance(given.name, str), "name is not a string"
    assert given.name, "name is empty"
    assert "+" not in given.name, f"name {given.name!r} has a '+', which joins the stages of a chain"
    assert given.name != "auto", "the name 'auto' is taken"
    assert isinstance(given.requires, tuple), "requires is not a tuple of package names"
    assert (type(given).__doc__ or "").strip(), "the class has no docstring, whose first line `solvers` lists"
    for case in LARGER_CASES.values():
        for formulation in standard_formulations().values():
            reason = given.supports(case(), formulation)
            assert reason is None or isinstance(reason, str), f"supports() gave {reason!r}, not None or a reason"


def _check_against_oracle(backend: _Backend, formulation: Formulation, case: str) -> None:
    problem = TINY_CASES[case]()
    solution = backend.solve(problem, formulation)
    assert solution.owner is not None, f"no answer to a feasible problem: {solution.termination}"
    if backend.kind == "partitioners":
        least = _least_of_case(case, formulation)
    else:
        least = least_objective_given(problem, formulation, solution.owner)
    assert solution.objective >= _below(least), f"objective {solution.objective} below the least, {least}"
    if solution.bound is not None:
        assert solution.bound <= _above(least), f"bound {solution.bound} above the least objective, {least}"
    if solution.termination is Termination.OPTIMAL:
        assert solution.objective <= _above(least), f"optimal with {solution.objective}, the least is {least}"


def _check_valid(backend: _Backend, formulation: Formulation, case: str) -> None:
    solution = backend.solve(LARGER_CASES[case](), formulation)
    assert solution.owner is not None, f"no answer to a feasible problem: {solution.termination}"


def _check_sparse(backend: _Backend, formulation: Formulation, case: str) -> None:
    in_full = SPARSE_CASES[case]()
    in_sparse = replace(in_full, weight=sparse.csr_array(in_full.weight))
    expected = backend.solve(in_full, formulation).objective
    objective = backend.solve(in_sparse, formulation).objective
    assert np.isclose(objective, expected, rtol=TOLERANCE, atol=1e-9), f"dense {expected}, sparse {objective}"


def _check_one_worker(backend: _Backend, formulation: Formulation) -> None:
    solution = backend.solve(random_problem(30, P=1), formulation)
    assert solution.owner is not None, f"no answer with one worker: {solution.termination}"
    assert (solution.owner == 0).all(), f"owners {solution.owner} with one worker"
    assert solution.volume == 0, f"volume {solution.volume} with one worker"


def _check_no_edges(backend: _Backend, formulation: Formulation) -> None:
    solution = backend.solve(random_problem(weight=np.zeros((5, 3))), formulation)
    assert solution.owner is not None, f"no answer without edges: {solution.termination}"
    assert solution.volume == 0, f"volume {solution.volume} where no neuron reads anything"
    assert abs(solution.objective) <= 1e-9, f"objective {solution.objective} where there is nothing to compute"


def _check_infeasible(backend: _Backend, formulation: Formulation) -> None:
    """Three neurons may go to worker 0 only, which has two places; each count alone fits."""
    allowed = np.ones((5, 2), dtype=bool)
    allowed[:3, 1] = False
    solution = backend.solve(random_problem(allowed=allowed, capacity=[2, 3]), formulation)
    assert solution.owner is None, f"owners {solution.owner} for an infeasible problem"
    assert solution.termination is Termination.INFEASIBLE, f"{solution.termination} for an infeasible problem"


def _check_mutates_nothing(backend: _Backend, formulation: Formulation) -> None:
    for case in ("correlated", "received", "allowed", "load"):
        problem = TINY_CASES[case]()
        start = _some_placement(problem)
        start.flags.writeable = False
        before = _snapshot(problem)
        backend.solve(_read_only(problem), formulation, start=start)
        _assert_unchanged(before, problem)


def _check_same_seed_same_answer(backend: _Backend, formulation: Formulation) -> None:
    problem = LARGER_CASES["correlated"]()
    first, again = (backend.solve(problem, formulation, SolveOptions(seed=3)) for _ in range(2))
    assert first.owner is not None, f"no answer to a feasible problem: {first.termination}"
    assert again.owner is not None, f"no answer to a feasible problem: {again.termination}"
    assert (first.owner == again.owner).all(), "two answers for one seed: the owners differ"
    assert first.exchange is not None
    assert again.exchange is not None
    sent, sent_again = _numbers_sent(first.exchange), _numbers_sent(again.exchange)
    _assert_same_messages(sent, sent_again, "two answers for one seed: the messages differ")


def _check_start(backend: _Backend, formulation: Formulation) -> None:
    problem = LARGER_CASES["allowed"]()
    start = _some_placement(problem)
    pruner = "threshold" if backend.kind == "partitioners" else backend.backend.name
    with registered(backend.kind, backend.backend):
        solution = solve_problem(problem, formulation, partitioner="contiguous", pruner=pruner, start=start)
    if solution.owner is None:
        raise _Unsupported(solution.message)
    better = backend.solve(problem, formulation, start=solution.owner)
    assert better.objective <= _above(solution.objective), f"start {solution.objective}, answer {better.objective}"


def _check_time_limit(backend: _Backend, formulation: Formulation) -> None:
    problem = LARGER_CASES["correlated"]()
    for time_limit in (1e-6, 0.2):
        began = time.monotonic()
        backend.solve(problem, formulation, SolveOptions(time_limit=time_limit))
        took = time.monotonic() - began
        assert took < time_limit + _GRACE, f"took {took:.1f} s with a time limit of {time_limit} s"


# ------------------------------------------------------------------------------------------ checks of a formulation


def _check_formulation_is_declared(formulation: Formulation) -> None:
    assert isinstance(formulation, Formulation), "not a Formulation: subclass it to inherit the defaults"
    assert isinstance(formulation.name, str), "name is not a string"
    assert formulation.name, "name is empty"
    assert 0 <= formulation.damping < 1, f"damping {formulation.damping} outside [0, 1)"


def _check_where_supported(check: Callable[[Formulation, str], None], formulation: Formulation, case: str) -> None:
    reason = formulation.supports(TINY_CASES[case]())
    if reason is not None:
        raise _Unsupported(reason)
    check(formulation, case)


def _check_objective(formulation: Formulation, case: str) -> None:
    problem = TINY_CASES[case]()
    for owner in _placements(problem)[:4]:
        exchange = formulation.select(problem, owner)
        weight = formulation.repair(problem, owner, exchange)
        objective = formulation.objective(problem, owner, exchange, weight)
        assert np.ndim(objective) == 0, f"objective of shape {np.shape(objective)}"
        assert np.isfinite(objective), f"objective {objective}"
        assert weight.shape == problem.weight.shape, f"repaired weight of shape {weight.shape}"
        again = formulation.objective(problem, owner, exchange, weight)
        assert again == objective, f"objective {objective}, and {again} for the same arguments"


def _check_assignment_cost(formulation: Formulation, case: str) -> None:
    problem = TINY_CASES[case]()
    owner = _placements(problem)[0]
    for seen in ((None, None), (owner, formulation.select(problem, owner))):
        cost = formulation.assignment_cost(problem, *seen)
        assert cost.shape == (problem.m, problem.P), f"assignment_cost of shape {cost.shape}, not (m, P)"
        assert np.isfinite(cost).all(), "assignment_cost has NaN or infinite entries"


def _check_select(formulation: Formulation, case: str) -> None:
    problem = TINY_CASES[case]()
    for owner in _placements(problem)[:4]:
        exchange = formulation.select(problem, owner)
        assert (exchange.n, exchange.P) == (problem.n, problem.P), (
            f"exchange for {exchange.n} values, {exchange.P} workers"
        )
        for (source, target), message in exchange.messages.items():
            assert source != target, f"worker {source} sends to itself"
            if isinstance(message, Code):
                continue
            held = problem.input_owner[message.values] == source
            assert held.all(), f"worker {source} sends values that it does not hold: {message.values[~held]}"
        weight = formulation.repair(problem, owner, exchange)
        outside = metrics.weights_outside(problem, owner, exchange, weight)
        assert outside == 0, f"{outside} nonzero weights read values that their worker does not have"
        broken = formulation.violations(problem, owner, exchange, weight)
        assert broken == (), f"select breaks the formulation's own constraints: {broken}"


def _check_exactness_of_assignment(formulation: Formulation, case: str) -> None:
    """Where it says so, the least assignment cost is the least objective (without knowing owners)."""
    if not formulation.assignment_is_exact:
        raise _Unsupported("the assignment cost is not exact")
    problem = TINY_CASES[case]()
    cost = formulation.assignment_cost(problem, None, None)
    neurons = np.arange(problem.m)
    by_cost = min(float(cost[neurons, owner].sum()) for owner in _placements(problem))
    least = _least_of_case(case, formulation)
    assert np.isclose(by_cost, least, rtol=TOLERANCE, atol=1e-9), f"least cost {by_cost}, least objective {least}"


def _check_exactness_of_selection(formulation: Formulation, case: str) -> None:
    """Where it says so, no set of transfers is better than the selected one."""
    problem = TINY_CASES[case]()
    if not formulation.selection_is_exact(problem):
        raise _Unsupported("the selection is not exact")
    for owner in _placements(problem)[:8]:
        exchange = formulation.select(problem, owner)
        weight = formulation.repair(problem, owner, exchange)
        selected = formulation.objective(problem, owner, exchange, weight)
        least = least_objective_given(problem, formulation, owner)
        assert selected <= _above(least), f"selected {selected}, the least is {least}"


def _check_hypergraph(formulation: Formulation, case: str) -> None:
    """Where it says so, its cost is the objective of the selected transfers."""
    problem = TINY_CASES[case]()
    found = 0
    for owner in _placements(problem)[:8]:
        hypergraph = formulation.hypergraph(problem, owner)
        if hypergraph is None or not hypergraph.is_exact:
            continue
        found += 1
        exchange = formulation.select(problem, owner)
        weight = formulation.repair(problem, owner, exchange)
        objective = formulation.objective(problem, owner, exchange, weight)
        assert np.isclose(hypergraph.cost(owner), objective, rtol=1e-6, atol=1e-9), (
            f"the hypergraph costs {hypergraph.cost(owner)}, the objective is {objective}"
        )
    if not found:
        raise _Unsupported("no hypergraph that is exact")


def _check_formulation_mutates_nothing(formulation: Formulation) -> None:
    for case in ("correlated", "received", "blocks", "output_weight"):
        problem = TINY_CASES[case]()
        if formulation.supports(problem) is not None:
            continue
        owner = _placements(problem)[0]
        owner.flags.writeable = False
        before = _snapshot(problem)
        frozen = _read_only(problem)
        exchange = formulation.select(frozen, owner)
        sent = _numbers_sent(exchange)
        weight = formulation.repair(frozen, owner, exchange)
        weight.flags.writeable = False
        formulation.assignment_cost(frozen, owner, exchange)
        formulation.objective(frozen, owner, exchange, weight)
        formulation.violations(frozen, owner, exchange, weight)
        _assert_unchanged(before, problem)
        _assert_same_messages(sent, _numbers_sent(exchange), "the exchange was changed")


# -------------------------------------------------------------------------------------------------------- helpers


def _run_all(checks: Iterator[tuple[str, Check]]) -> None:
    declined = []
    passed = 0
    for name, check in checks:
        try:
            reason = check()
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        passed += reason is None
        declined.append(reason)
    assert passed > 1, f"everything is declined: {declined[-1]}"


def _bind(check: Callable[..., None], *arguments: Any) -> Check:
    def bound() -> str | None:
        try:
            check(*arguments)
        except _Unsupported as reason:
            return str(reason)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error
        return None

    return bound


def _name(check: Callable[..., None]) -> str:
    return check.__name__.removeprefix("_check_").removeprefix("formulation_")


def _above(value: float) -> float:
    return value + TOLERANCE * abs(value) + 1e-9


def _below(value: float) -> float:
    return value - TOLERANCE * abs(value) - 1e-9


def _least_of_case(case: str, formulation: Formulation) -> float:
    try:
        return _remembered_least(case, cast(Any, formulation))
    except TypeError:  # not hashable
        return least_objective(TINY_CASES[case](), formulation)


@cache
def _remembered_least(case: str, formulation: Formulation) -> float:
    return least_objective(TINY_CASES[case](), formulation)


def _numbers_sent(exchange: Exchange) -> dict[tuple[int, int], NDArray[Any]]:
    """What each message is made of: indices of values, or an encoder."""
    return {pair: _content(message).copy() for pair, message in exchange.messages.items()}


def _content(message: Message) -> NDArray[Any]:
    return message.encoder if isinstance(message, Code) else message.values


def _assert_same_messages(
    first: Mapping[tuple[int, int], NDArray[Any]], second: Mapping[tuple[int, int], NDArray[Any]], otherwise: str
) -> None:
    assert first.keys() == second.keys(), otherwise
    assert all(np.array_equal(first[pair], second[pair]) for pair in first), otherwise


def _placements(problem: LayerProblem) -> list[NDArray[np.int64]]:
    every = (np.array(labels) for labels in product(range(problem.P), repeat=problem.m))
    return [owner for owner in every if not metrics.placement_violations(problem, owner)]


def _some_placement(problem: LayerProblem) -> NDArray[np.int64]:
    """A valid placement that has nothing to do with the weights."""
    cost = np.random.default_rng(31).random((problem.m, problem.P))
    neutral = random_problem(
        weight=cost, P=problem.P, allowed=problem.allowed, capacity=problem.capacity, load=problem.load,
        min_load=problem.min_load, input_owner=np.arange(problem.P),
    )  # fmt: skip
    owner = solve_problem(neutral, Lossless(), partitioner="random").require().owner
    assert owner is not None
    return owner


def _read_only(problem: LayerProblem) -> LayerProblem:
    for array in _arrays(problem).values():
        array.flags.writeable = False
    return problem


def _snapshot(problem: LayerProblem) -> dict[str, NDArray[Any]]:
    return {name: array.copy() for name, array in _arrays(problem).items()}


def _assert_unchanged(before: dict[str, NDArray[Any]], problem: LayerProblem) -> None:
    after = _arrays(problem)
    for name, array in before.items():
        assert np.array_equal(array, after[name]), f"the problem's {name} was changed"


def _arrays(problem: LayerProblem) -> dict[str, NDArray[Any]]:
    """Every array of a problem and of its moments, by name, those that it derives and remembers included."""
    derived = (
        "remote",
        "column_home",
        "transfer_bytes",
        "transfer_price",
        "target_weight",
        "predicted_moment",
        "slots",
    )
    found = {field.name: getattr(problem, field.name) for field in fields(problem) if field.name != "moments"}
    found |= {name: getattr(problem, name) for name in derived}
    found |= {f"moments.{field.name}": getattr(problem.moments, field.name) for field in fields(problem.moments)}
    found |= {"moments.regularised": problem.moments.regularised, "moments.variance": problem.moments.variance}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
