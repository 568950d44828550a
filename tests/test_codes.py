"""Linear codes against second routes: least squares on samples, counting, exhaustive search, a naive greedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import Layer, error_on_samples, nmse_on_samples, random_layer, random_owner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag

from repurpose_opt import LayerProblem, Moments, SolveOptions, Termination, Volume, metrics, registry, solve_layer
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Code, Exchange, Values
from repurpose_opt.pruning import load_pruner
from repurpose_opt.receiver import receivers
from repurpose_opt.repair import compensated_cost_with_codes, corrected_bias, refit_with_codes
from repurpose_opt.solution import LayerSolution, verify
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import least_objective_given
from repurpose_opt_solvers.received import Received, Sent

CHANNELS: dict[str, Any] = {"column_value": np.repeat(np.arange(7), 2), "value_bytes": 12}
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"n": 9},
    "noise": {"n": 9, "noise": 0.4},
    "output_weight": {"n": 8, "noise": 0.4, "output_weight": [0.1, 2.0, 0.0, 1.0, 5.0, 0.5]},
    "sparse": {"n": 9, "noise": 0.4, "is_sparse": True, "density": 0.5},
    "link_price": {"n": 9, "link_price": [[0, 1, 4], [2, 0, 1], [1, 3, 0]]},
    "rows_of_neurons": {"n": 7, "row_neuron": [0, 1, 1, 2, 0, 3, 4, 5]},
    "scattered_owners": {"n": 8, "input_owner": [2, 0, 1, 1, 2, 0, 2, 1]},
    "channels": {"noise": 0.4, **CHANNELS},
    "scattered_columns": {"noise": 0.4, "column_value": [0, 1, 2, 3, 4, 5, 5, 3, 4, 1, 2, 0]},
}
each_layer = pytest.mark.parametrize("arguments", LAYERS.values(), ids=LAYERS)
CHAINS = ["threshold", "code-greedy", "code-greedy+code-descent"]
each_chain = pytest.mark.parametrize("chain", CHAINS)
ONE_COLUMN = {name: arguments for name, arguments in LAYERS.items() if "column_value" not in arguments}
each_linear_layer = pytest.mark.parametrize("arguments", ONE_COLUMN.values(), ids=ONE_COLUMN)


def random_exchange(problem: LayerProblem, seed: int = 0) -> Exchange:
    """Codes, values and nothing, pair by pair."""
    random = np.random.default_rng(seed)
    messages: dict[tuple[int, int], Any] = {}
    for source, target in product(range(problem.P), repeat=2):
        held = np.flatnonzero(problem.input_owner == source)
        if source == target or len(held) == 0:
            continue
        kind = random.integers(5)
        size = int(random.integers(1, len(held) + 1))
        if kind < 3:
            messages[source, target] = Code.spanning(random.normal(size=(size, len(held))))
        elif kind == 3:
            messages[source, target] = Values(random.permutation(held)[:size])
    return Exchange(problem.n, problem.P, messages)


def known_to(problem: LayerProblem, exchange: Exchange, worker: int) -> np.ndarray:
    """E (columns, features): what a worker knows of x̂, one combination of columns each, by loops."""
    found = []
    for column in range(problem.columns):
        value = int(problem.column_value[column])
        home = int(problem.input_owner[value])
        message = exchange.messages.get((home, worker))
        if home == worker or (isinstance(message, Values) and value in message.values):
            found.append(np.eye(problem.columns)[column])
    for (source, target), message in exchange.messages.items():
        if target != worker or isinstance(message, Values):
            continue
        held = [value for value in range(problem.n) if problem.input_owner[value] == source]
        for row in message.encoder:
            columns = [np.flatnonzero(problem.column_value == value) for value in held]
            for position in range(len(columns[0])):
                combination = np.zeros(problem.columns)
                for coefficient, of_value in zip(row, columns, strict=True):
                    combination[of_value[position]] = coefficient
                found.append(combination)
    return np.array(found).reshape(-1, problem.columns).T


def refit_on_samples(layer: Layer, row: int, known: np.ndarray) -> np.ndarray:
    """(columns,) the row that reads these features E (columns, features): least squares with ridge rows."""
    received = layer.received - layer.received.mean(axis=0)
    original = layer.original - layer.original.mean(axis=0)
    scale = np.sqrt(len(received))
    left = np.vstack([received @ known / scale, np.sqrt(layer.ridge) * known])
    right = np.concatenate([original @ layer.weight[row] / scale, np.sqrt(layer.ridge) * layer.weight[row]])
    return known @ np.linalg.lstsq(left, right, rcond=None)[0]


def uncorrelated_layer(seed: int, m: int = 6, n: int = 7, P: int = 3, **arguments: Any) -> LayerProblem:
    """Values of one worker are correlated, those of two workers are not."""
    random = np.random.default_rng(seed)
    owner = np.arange(n) * P // n
    root = random.normal(size=(n, n)) * (owner[:, None] == owner)
    moments = Moments.from_raw(root @ root.T + 0.1 * np.eye(n))
    return LayerProblem.create(random.normal(size=(m, n)), P, moments=moments, **arguments)


def codes(**limit: float) -> Volume:
    return Volume(messages="codes", **limit)


def prune(problem: LayerProblem, formulation: Volume, owner: np.ndarray, chain: str) -> LayerSolution:
    options = SolveOptions()
    return verify(problem, formulation, load_pruner(chain).solve(problem, formulation, options, owner), options)


def error_of(problem: LayerProblem, owner: np.ndarray, exchange: Exchange) -> float:
    return metrics.weighted_error(problem, owner, refit_with_codes(problem, owner, exchange))


def numbers(exchange: Exchange) -> int:
    return sum(message.size for message in exchange.messages.values())


# ------------------------------------------------------------------------------------------- refit and its cost


@each_layer
@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_least_squares_on_what_each_worker_knows(seed: int, arguments: dict[str, Any]):
    layer = random_layer(seed, **arguments)
    problem, owner = layer.problem, random_owner(layer.problem, seed)
    exchange = random_exchange(problem, seed)
    weight = refit_with_codes(problem, owner, exchange)
    full = weight.toarray() if problem.is_sparse else weight
    known = [known_to(problem, exchange, k) for k in range(problem.P)]
    expected = np.array(
        [refit_on_samples(layer, row, known[owner[problem.row_neuron[row]]]) for row in range(problem.rows)]
    )
    np.testing.assert_allclose(full, expected, atol=1e-7)
    assert metrics.violations(problem, owner, exchange, weight) == ()
    assert metrics.weighted_error(problem, owner, weight) == pytest.approx(error_on_samples(layer, weight), rel=1e-7)


@each_layer
def test_compensated_cost_is_the_error_of_each_neuron_refitted_alone(arguments: dict[str, Any]):
    layer = random_layer(4, **arguments)
    problem = layer.problem
    exchange = random_exchange(problem, 4)
    cost = compensated_cost_with_codes(problem, exchange)
    for k in range(problem.P):
        known = known_to(problem, exchange, k)
        weight = np.array([refit_on_samples(layer, row, known) for row in range(problem.rows)])
        for neuron in range(problem.m):
            counted = np.where(problem.row_neuron == neuron, problem.output_weight, 0.0)
            alone = replace(layer, problem=replace(problem, output_weight=counted))
            assert cost[neuron, k] == pytest.approx(error_on_samples(alone, weight), rel=1e-7, abs=1e-10)


@pytest.mark.parametrize("same_inputs", [True, False])
def test_diagonal_moments_are_least_squares_too(same_inputs: bool):
    random = np.random.default_rng(5)
    second = random.uniform(0.5, 3, 8)
    others = () if same_inputs else (0.9 * second, None, 1.1 * second)
    problem = LayerProblem.create(random.normal(size=(6, 8)), 3, moments=Moments.from_raw(second, *others))
    owner = random_owner(problem)
    exchange = random_exchange(problem, 1)
    weight = refit_with_codes(problem, owner, exchange)
    cost = compensated_cost_with_codes(problem, exchange)
    root = np.sqrt(problem.moments.variance)
    cross, target = problem.moments.cross + problem.moments.ridge, problem.moments.target + problem.moments.ridge
    for row, k in product(range(6), range(3)):
        known = known_to(problem, exchange, k)
        aim = cross / root * problem.weight[row]
        solution = np.linalg.lstsq(root[:, None] * known, aim, rcond=None)[0]
        left = aim - root * (known @ solution)
        error = left @ left - aim @ aim + target @ problem.weight[row] ** 2
        assert cost[row, k] == pytest.approx(error, rel=1e-9)
        if owner[row] == k:
            np.testing.assert_allclose(weight[row], known @ solution, atol=1e-10)


def test_chosen_values_written_as_a_code_are_refitted_alike():
    problem = random_layer(6, **CHANNELS).problem
    owner = random_owner(problem)
    values = Exchange(7, 3, {(0, 1): Values(np.array([1])), (1, 2): Values(np.array([3, 4]))})
    same = Exchange(7, 3, {(0, 1): Code(np.array([[0.0, 1.0, 0.0]])), (1, 2): Code(np.eye(2))})
    np.testing.assert_allclose(
        refit_with_codes(problem, owner, values), refit_with_codes(problem, owner, same), atol=1e-9
    )
    assert metrics.volume(problem, values) == metrics.volume(problem, same)


# ------------------------------------------------------------------------------------------- metrics and violations


@each_layer
def test_bytes_and_work_are_counted_number_by_number(arguments: dict[str, Any]):
    problem = random_layer(7, **arguments).problem
    owner = random_owner(problem)
    exchange = random_exchange(problem, 7)
    assert {type(message) for message in exchange.messages.values()} == {Code, Values}
    size = int(problem.value_bytes[0])
    b = problem.columns // problem.n
    sent, received = [0.0] * problem.P, [0.0] * problem.P
    volume, priced = 0, 0.0
    macs = [0] * problem.P
    for k in range(problem.P):
        rows = sum(1 for row in range(problem.rows) if owner[problem.row_neuron[row]] == k)
        macs[k] += rows * sum(b for j in range(problem.n) if problem.input_owner[j] == k)
        for source in range(problem.P):
            message = exchange.messages.get((source, k))
            if message is None:
                continue
            for _ in range(message.size):
                volume += size
                priced += size * problem.link_price[source, k]
                sent[source] += size
                received[k] += size
                macs[k] += rows * b
                if isinstance(message, Code):
                    macs[source] += sum(1 for j in range(problem.n) if problem.input_owner[j] == source)
    assert metrics.volume(problem, exchange) == volume
    assert metrics.priced_volume(problem, exchange) == pytest.approx(priced)
    assert metrics.busiest(problem, exchange) == max(sent + received)
    assert metrics.worker_macs(problem, owner, exchange).tolist() == macs


def test_a_weight_outside_the_row_space_of_a_code_is_found():
    problem = random_layer(8, n=9).problem
    owner = random_owner(problem)
    exchange = Exchange(9, 3, {(0, 1): Code.spanning(np.array([[1.0, 2.0, 0.0]])), (2, 1): Values(np.array([7]))})
    weight = refit_with_codes(problem, owner, exchange)
    assert metrics.violations(problem, owner, exchange, weight) == ()
    row = int(np.flatnonzero(owner == 1)[0])
    for column in (0, 2, 6, 8):
        worse = weight.copy()
        worse[row, column] += 1e-3
        assert "nonzero weights" in metrics.violations(problem, owner, exchange, worse)[0]
    allowed = weight.copy()
    allowed[row, 7] += 1.0
    allowed[row, :2] += [0.5, 1.0]
    assert metrics.violations(problem, owner, exchange, allowed) == ()
    other = weight.copy()
    other[np.flatnonzero(owner == 0)[0], 3] = 1e-3  # worker 0 receives nothing
    assert "1 nonzero weights" in metrics.violations(problem, owner, exchange, other)[0]


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        (np.array([[1.0, 1.0, 0.0]]), "orthonormal"),
        (np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), "orthonormal"),
        (np.full((1, 3), np.nan), "orthonormal"),
        (np.zeros((0, 3)), "shape"),
        (np.zeros((1, 2)), "shape"),
        (np.eye(3)[0], "shape"),
        (np.vstack([np.eye(3), np.eye(3)[:1]]), "shape"),
    ],
    ids=["length", "twice", "nan", "no_rows", "columns", "vector", "more_than_held"],
)
def test_a_malformed_encoder_is_an_error_of_the_solution(encoder: np.ndarray, said: str):
    problem = random_layer(8, n=9).problem
    exchange = Exchange(9, 3, {(0, 1): Code(encoder)})
    assert said in metrics.exchange_violations(problem, exchange)[0]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"n": 5, "value_bytes": [4, 8, 4, 4, 4]}, "equal value_bytes"),
        ({"column_value": [0, 1, 1, 2, 3, 4]}, "equally many columns"),
    ],
    ids=["bytes", "columns"],
)
def test_values_that_cannot_be_combined_are_unsupported(arguments: dict[str, Any], reason: str):
    problem = random_layer(9, **arguments).problem
    assert reason in str(codes(budget=0.3).supports(problem))
    known = {name: value for name, value in arguments.items() if name in ("value_bytes", "column_value")}
    solution = solve_layer(problem.weight, 3, formulation=codes(budget=0.3), **known)
    assert solution.termination is Termination.UNSUPPORTED
    assert reason in solution.message
    assert Volume(budget=0.3).supports(problem) is None


# ------------------------------------------------------------------------------------------------------- optimality


def least_over_ranks(problem: LayerProblem, formulation: Volume, owner: np.ndarray) -> float:
    """Exhaustive over the ranks of all pairs, each pair's code by numpy.linalg.svd of its part of √g W̃ K^½.

    For sources that are uncorrelated beside the receiver's own values.
    """
    judged = problem if formulation.max_nmse is None else problem.unweighted
    second = problem.moments.regularised
    second = np.diag(second) if second.ndim == 1 else second
    target = np.linalg.solve(second, problem.predicted_moment.T).T
    offers = []
    for k in range(problem.P):
        of_worker = owner[problem.row_neuron] == k
        rows = np.sqrt(judged.output_weight[of_worker])[:, None] * target[of_worker]
        local = problem.input_owner == k
        known = second[:, local] @ np.linalg.inv(second[np.ix_(local, local)]) @ second[local] if local.any() else 0.0
        moment = second - known
        for p in range(problem.P):
            held = np.flatnonzero(problem.input_owner == p)
            if p == k or len(held) == 0 or len(rows) == 0:
                continue
            root = np.linalg.cholesky(moment[np.ix_(held, held)])
            _, gains, right = np.linalg.svd(rows[:, held] @ root)
            offers.append(((p, k), len(gains), right @ np.linalg.inv(root)))
    least = np.inf
    for ranks in product(*(range(count + 1) for _, count, _ in offers)):
        messages = {pair: Code.spanning(rows[:r]) for (pair, _, rows), r in zip(offers, ranks, strict=True) if r}
        exchange = Exchange(problem.n, problem.P, messages)
        weight = refit_with_codes(problem, owner, exchange)
        if not formulation.violations(problem, owner, exchange, weight):
            least = min(least, formulation.objective(problem, owner, exchange, weight))
    return least


def pinned(problem: LayerProblem, owner: np.ndarray) -> LayerProblem:
    return replace(problem, allowed=np.eye(problem.P, dtype=bool)[owner], capacity=np.full(problem.P, np.inf))


LIMITS: dict[str, dict[str, float]] = {"price": {"transfer_price": 0.1}, "budget": {"budget": 0.35}}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("seed", range(3))
def test_uncorrelated_sources_are_proved_against_every_choice_of_ranks(seed: int, limit: dict[str, float]):
    problem = uncorrelated_layer(seed, m=4, n=6, P=3, output_weight=[1.0, 0.3, 2.0, 1.0])
    owner = random_owner(problem, seed)
    solution = registry.load("pruners", "threshold")().solve(problem, codes(**limit), SolveOptions(), owner)
    found = verify(problem, codes(**limit), solution, SolveOptions())
    assert found.termination is Termination.OPTIMAL
    assert found.objective == pytest.approx(least_over_ranks(problem, codes(**limit), owner), rel=1e-9)
    assert found.bound == pytest.approx(found.objective, rel=1e-9)
    assert 0 < numbers(found.exchange) < 2 * problem.n


@pytest.mark.parametrize("limit", [*LIMITS.values(), {"max_nmse": 0.1}], ids=[*LIMITS, "nmse"])
@each_chain
def test_diagonal_moments_of_uneven_variance_have_the_best_codes(chain: str, limit: dict[str, float]):
    random = np.random.default_rng(22)
    moments = Moments.from_raw(np.geomspace(0.05, 20, 6)[random.permutation(6)])
    problem = without_ridge(LayerProblem.create(random.normal(size=(4, 6)), 3, moments=moments))
    owner = random_owner(problem)
    found = prune(problem, codes(**limit), owner, chain)
    assert found.violations == ()
    assert found.objective == pytest.approx(least_over_ranks(problem, codes(**limit), owner), rel=1e-9)


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("seed", range(3))
def test_two_workers_are_proved_beside_what_each_holds(seed: int, limit: dict[str, float]):
    problem = random_layer(seed, m=4, n=7, P=2, noise=0.3, output_weight=[1.0, 0.3, 2.0, 1.0]).problem
    owner = random_owner(problem, seed)
    solution = registry.load("pruners", "threshold")().solve(problem, codes(**limit), SolveOptions(), owner)
    found = verify(problem, codes(**limit), solution, SolveOptions())
    assert found.termination is Termination.OPTIMAL
    assert found.objective == pytest.approx(least_over_ranks(problem, codes(**limit), owner), rel=1e-9)


def test_optimal_needs_owners_that_are_fixed_and_sources_that_are_uncorrelated():
    free = uncorrelated_layer(3)
    owner = random_owner(free)
    formulation = codes(transfer_price=0.1)

    def terminated(problem: LayerProblem) -> Termination:
        return solve_problem(problem, formulation, partitioner="contiguous", pruner="threshold").termination

    assert terminated(pinned(free, owner)) is Termination.OPTIMAL
    assert terminated(free) is Termination.HEURISTIC
    correlated = random_layer(3, n=7).problem
    assert terminated(pinned(correlated, owner)) is Termination.HEURISTIC


@each_chain
def test_no_pruner_is_below_what_values_and_codes_can_reach(chain: str):
    """Two workers: least_over_ranks is the optimum of codes, which is never above that of values."""
    for seed in range(4):
        problem = random_layer(seed, m=5, n=6, P=2).problem
        owner = random_owner(problem, seed)
        for limit in LIMITS.values():
            found = prune(problem, codes(**limit), owner, chain)
            least = least_over_ranks(problem, codes(**limit), owner)
            assert found.objective == pytest.approx(least, rel=1e-6)
            assert least <= least_objective_given(problem, Volume(**limit), owner) + 1e-9


# ---------------------------------------------------------------------------------------------- greedy and descent


def naive_greedy(layer: Layer, owner: np.ndarray, count: int) -> Iterator[Exchange]:
    """Number by number: of each pair the best combination beside all that is known, by regression on the samples."""
    problem = layer.problem
    sent: dict[tuple[int, int], list[np.ndarray]] = {}
    held = {p: np.flatnonzero(problem.input_owner == p) for p in range(problem.P)}
    second = problem.moments.regularised
    target = np.linalg.solve(second, problem.predicted_moment.T).T * np.sqrt(problem.output_weight)[:, None]
    for _ in range(count):
        exchange = Exchange(problem.n, problem.P, {pair: Code.spanning(np.array(rows)) for pair, rows in sent.items()})
        best: tuple[float, tuple[int, int], np.ndarray] = (-1.0, (0, 0), np.empty(0))
        for k, p in product(range(problem.P), repeat=2):
            rows = target[owner == k]
            if p == k or not len(rows):
                continue
            known = known_to(problem, exchange, k)
            moment = second
            if known.size:
                moment = (
                    second
                    - second @ known @ np.linalg.pinv(known.T @ second @ known, hermitian=True) @ known.T @ second
                )
            left = (rows @ moment)[:, held[p]]
            inverse = np.linalg.pinv(moment[np.ix_(held[p], held[p])], rcond=1e-9, hermitian=True)
            values, vectors = np.linalg.eigh(inverse)
            root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
            _, gains, right = np.linalg.svd(left @ root)
            if gains[0] ** 2 > best[0]:
                best = (gains[0] ** 2, (p, k), root @ right[0])
        sent.setdefault(best[1], []).append(best[2])
        yield Exchange(problem.n, problem.P, {pair: Code.spanning(np.array(rows)) for pair, rows in sent.items()})


@pytest.mark.parametrize("arguments", [{"n": 9}, {"n": 9, "noise": 0.4}, LAYERS["scattered_owners"]], ids=str)
def test_greedy_takes_the_steps_of_a_naive_greedy(arguments: dict[str, Any]):
    layer = random_layer(10, **arguments)
    problem, owner = layer.problem, random_owner(layer.problem)
    size = int(problem.value_bytes[0])
    for count, expected in enumerate(naive_greedy(layer, owner, 8), start=1):
        found = prune(problem, codes(budget_bytes=count * size), owner, "code-greedy")
        assert {p: m.size for p, m in found.exchange.messages.items()} == {
            p: m.size for p, m in expected.messages.items()
        }
        assert found.objective == pytest.approx(error_of(problem, owner, expected), rel=1e-6)


@each_layer
@pytest.mark.parametrize("limit", [*LIMITS.values(), {"max_nmse": 0.15}], ids=[*LIMITS, "nmse"])
def test_descent_is_never_above_its_start(arguments: dict[str, Any], limit: dict[str, float]):
    problem = random_layer(11, **arguments).problem
    owner = random_owner(problem)
    for start in ("threshold", "code-greedy"):
        before = prune(problem, codes(**limit), owner, start)
        descent = registry.load("pruners", "code-descent")()
        candidate = descent.solve(problem, codes(**limit), SolveOptions(), owner, before.exchange)
        after = verify(problem, codes(**limit), candidate, SolveOptions())
        assert after.violations == before.violations == ()
        if problem.columns == problem.n:
            assert after.objective <= before.objective * (1 + 1e-9) + 1e-9


def test_no_step_of_the_descent_raises_the_error():
    """Each pair in turn its best code of as many numbers beside the others; the error is that of the refit."""
    problem = random_layer(12, n=9, noise=0.4).problem
    owner = random_owner(problem)
    start = prune(problem, codes(budget=0.3), owner, "threshold")
    found = {r.worker: Received.of(r, problem, start.exchange) for r in receivers(problem, owner)}
    errors = [sum(received.error for received in found.values())]
    assert errors[0] == pytest.approx(start.objective, rel=1e-9)
    for _, received in product(range(3), found.values()):
        for p in list(received.sent):
            received.set(p, Sent(received.spectrum(p).encoder(received.sent[p].size)))
            errors.append(sum(other.error for other in found.values()))
    assert (np.diff(errors) <= 1e-9).all()
    assert errors[-1] < errors[0]
    messages = {(p, k): Code.spanning(sent.encoder) for k, one in found.items() for p, sent in one.sent.items()}
    assert error_of(problem, owner, Exchange(9, 3, messages)) == pytest.approx(errors[-1], rel=1e-9)


def test_a_second_descent_finds_next_to_nothing():
    for seed, limit in product(range(3), LIMITS.values()):
        problem = random_layer(seed, n=9, noise=0.4).problem
        owner = random_owner(problem)
        descent = registry.load("pruners", "code-descent")()
        once = prune(problem, codes(**limit), owner, "code-greedy+code-descent")
        candidate = descent.solve(problem, codes(**limit), SolveOptions(), owner, once.exchange)
        again = verify(problem, codes(**limit), candidate, SolveOptions())
        assert once.objective * (1 - 5e-3) <= again.objective <= once.objective * (1 + 1e-9)


@each_layer
@each_chain
def test_budgets_hold_and_ranks_are_within_what_there_is(chain: str, arguments: dict[str, Any]):
    problem = random_layer(13, **arguments).problem
    owner = random_owner(problem)
    rows, held = np.bincount(owner[problem.row_neuron], minlength=3), np.bincount(problem.input_owner, minlength=3)
    b = problem.columns // problem.n
    errors = []
    for budget in (0.0, 0.1, 0.25, 0.5, 0.7, 1.0):
        found = prune(problem, codes(budget=budget), owner, chain)
        assert found.violations == ()
        assert found.volume <= budget * problem.direct_volume + 1e-9
        for (p, k), message in found.exchange.messages.items():
            assert isinstance(message, Values) == (message.size == held[p])
            if chain != "code-greedy":  # its steps may take one more beside others that come later
                assert 0 < message.size <= min(rows[k] * b, held[p])
        errors.append(found.objective)
        if budget == 0:
            assert found.exchange.messages == {}
    everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
    assert errors[-1] == pytest.approx(error_of(problem, owner, everything), rel=1e-6, abs=1e-7)
    if b == 1:
        assert (np.diff(errors) <= 1e-9).all()


def test_threshold_with_a_whole_budget_leaves_the_least_error():
    problem = random_layer(13, n=9).problem
    owner = random_owner(problem)
    everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
    found = prune(problem, codes(budget=1.0), owner, "threshold")
    assert found.objective == pytest.approx(error_of(problem, owner, everything), abs=1e-7)


def test_greedy_sends_no_more_numbers_than_the_receiver_has_rows():
    problem = random_layer(13, n=9).problem
    found = prune(problem, codes(budget=0.8), random_owner(problem), "code-greedy")
    assert max(message.size for message in found.exchange.messages.values()) <= 2


def test_numbers_that_are_worth_nothing_are_not_sent_by_all_that_are():
    """Rows of weight zero, and sources that the receiver knows as well as they do themselves: fewer gains than rows."""
    plain = random_layer(23, n=9, output_weight=[0, 1, 1, 0, 1, 1]).problem
    samples = np.random.default_rng(23).normal(size=(50, 3))
    known = without_ridge(
        LayerProblem.create(
            np.random.default_rng(24).normal(size=(6, 9)), 3, moments=Moments.from_samples(np.tile(samples, 3))
        )
    )
    known = replace(known, moments=replace(known.moments, ridge=1e-11))
    for problem in (plain, known):
        owner = np.array([0, 0, 1, 1, 2, 2])
        for chain, budget in product(CHAINS, (0.0, 0.2, 0.4, 0.6)):
            found = prune(problem, codes(budget=budget), owner, chain)
            assert found.violations == ()
    assert prune(known, codes(transfer_price=1e-6), owner, "threshold").volume == 0


def best_with(problem: LayerProblem, owner: np.ndarray, exchange: Exchange, pair: tuple[int, int], count: int) -> float:
    """The error if this pair sends the best `count` numbers beside all else, by reduced-rank regression."""
    p, k = pair
    others = Exchange(problem.n, problem.P, {q: m for q, m in exchange.messages.items() if q != pair})
    second = problem.moments.regularised
    known = known_to(problem, others, k)
    held = np.flatnonzero(problem.input_owner == p)
    moment = second - second @ known @ np.linalg.inv(known.T @ second @ known) @ known.T @ second
    target = np.linalg.solve(second, problem.predicted_moment.T).T * np.sqrt(problem.output_weight)[:, None]
    root = np.linalg.cholesky(moment[np.ix_(held, held)])
    gains = np.linalg.svd(np.linalg.solve(root, (target[owner == k] @ moment)[:, held].T), compute_uv=False) ** 2
    return error_of(problem, owner, others) - float(gains[:count].sum())


@pytest.mark.parametrize("price", [0.003, 0.02, 0.1])
@pytest.mark.parametrize("seed", range(2))
def test_at_a_price_no_number_more_or_less_pays(seed: int, price: float):
    problem = random_layer(seed, n=9, noise=0.3, link_price=[[0, 1, 4], [2, 0, 1], [1, 3, 0]]).problem
    owner = random_owner(problem)
    found = prune(problem, codes(transfer_price=price), owner, "code-greedy+code-descent")
    for k, p in product(range(3), repeat=2):
        if p == k:
            continue
        now = found.exchange.messages.get((p, k))
        size = 0 if now is None else now.size
        paid = price * (metrics.priced_volume(problem, found.exchange))
        a_number = price * problem.value_bytes[0] * problem.link_price[p, k]
        for count in {max(size - 1, 0), size, size + 1}:
            other = best_with(problem, owner, found.exchange, (p, k), count) + paid + (count - size) * a_number
            assert other >= found.objective * (1 - 2e-4)


@each_chain
@each_layer
def test_max_nmse_is_met_with_little(chain: str, arguments: dict[str, Any]):
    layer = random_layer(14, **arguments)
    problem, owner = layer.problem, random_owner(layer.problem)
    least = nmse_on_samples(
        layer, *refitted(problem, owner, Exchange.of_transfers(problem.remote.copy(), problem.input_owner))
    )
    volumes = []
    for max_nmse in (least + 0.4, least + 0.1, least + (0.05 if chain == "threshold" else 0.01)):
        found = prune(problem, codes(max_nmse=max_nmse), owner, chain)
        assert found.violations == ()
        assert nmse_on_samples(layer, found.weight, found.bias) <= max_nmse + 1e-9
        volumes.append(found.volume)
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1]


def refitted(problem: LayerProblem, owner: np.ndarray, exchange: Exchange) -> tuple[Any, np.ndarray]:
    weight = refit_with_codes(problem, owner, exchange)
    return weight, corrected_bias(problem, weight)


def test_rows_of_weight_zero_count_in_the_nmse():
    problem = random_layer(14, **LAYERS["output_weight"]).problem
    owner = random_owner(problem)
    everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
    least = metrics.nmse(problem, owner, *refitted(problem, owner, everything))
    assert prune(problem, codes(max_nmse=least + 0.01), owner, "threshold").violations == ()


@each_chain
def test_an_nmse_out_of_reach_is_said(chain: str):
    layer = random_layer(15, n=9, noise=0.6)
    found = prune(layer.problem, codes(max_nmse=1e-6), random_owner(layer.problem), chain)
    assert "is above max_nmse" in found.violations[0]
    assert found.termination is not Termination.OPTIMAL
    assert found.volume > 0


# ------------------------------------------------------------------------------------------------------ odd layers


def odd_layers() -> dict[str, LayerProblem]:
    random = np.random.default_rng(16)
    inputs = random.normal(size=(50, 9))
    weight = random.normal(size=(6, 9))
    thin = weight.copy()
    thin[[0, 3]] = 0
    thin[:, [1, 4]] = 0
    constant = inputs.copy()
    constant[:, [0, 5, 6]] = 3.0

    def layer(weight: np.ndarray, samples: np.ndarray, **arguments: Any) -> LayerProblem:
        return LayerProblem.create(weight, 3, moments=Moments.from_samples(samples), **arguments)

    return {
        "each_value_twice": layer(weight, np.tile(inputs[:, :3], 3)),
        "constant_inputs": layer(weight, constant),
        "all_constant": layer(weight, np.ones((20, 9))),
        "zero_rows_and_columns": layer(thin, inputs),
        "nothing_to_compute": layer(np.zeros((6, 9)), inputs),
        "two_samples": layer(weight, inputs[:2]),
        "one_worker_holds_all": layer(weight, inputs, input_owner=2),
        "one_neuron": layer(weight[:1], inputs, capacity=1),
        "free_values": layer(weight, inputs, value_bytes=0),
        "free_links": layer(weight, inputs, link_price=[[0, 0, 4], [2, 0, 0], [1, 3, 0]]),
        "rank_one": layer(np.outer(weight[:, 0], weight[0]), inputs),
        "single_precision": layer(weight.astype(np.float32), inputs),
    }


@each_chain
@pytest.mark.parametrize("messages", ["codes", "mixed"])
@pytest.mark.parametrize("name", odd_layers())
def test_odd_layers_have_valid_answers(name: str, messages: str, chain: str):
    problem = odd_layers()[name]
    owner = np.arange(problem.m) % 3
    for limit in ({"transfer_price": 0.01}, {"transfer_price": 0.0}, {"budget": 0.3}, {"max_nmse": 0.2}):
        found = prune(problem, Volume(messages=messages, **limit), owner, chain)
        assert found.violations == ()
        assert np.isfinite(found.objective)
        if name in ("nothing_to_compute",):
            assert found.volume == 0


def test_a_layer_of_rank_one_needs_one_number_from_each_worker_to_each():
    problem = odd_layers()["rank_one"]
    found = prune(problem, codes(transfer_price=1e-5), np.arange(6) % 3, "code-greedy+code-descent")
    assert {message.size for message in found.exchange.messages.values()} == {1}
    assert len(found.exchange.messages) == 6
    assert found.objective == pytest.approx(1e-5 * 48, rel=1e-4)


def test_what_each_worker_has_already_is_not_sent():
    problem = odd_layers()["each_value_twice"]
    found = prune(problem, codes(transfer_price=0.01), np.arange(6) % 3, "code-greedy")
    assert found.volume == 0


# ------------------------------------------------------------------------------------------------------ properties


def rotated(problem: LayerProblem, mixing: np.ndarray) -> LayerProblem:
    """The same layer reading A x instead of x: weights W A⁻¹, moments A C Aᵀ, without ridge."""
    second = mixing @ problem.moments.second @ mixing.T
    mean = mixing @ problem.moments.mean
    moments = Moments(second, second, second, mean, mean)
    return replace(problem, weight=problem.weight @ np.linalg.inv(mixing), moments=moments)


def without_ridge(problem: LayerProblem) -> LayerProblem:
    return replace(problem, moments=replace(problem.moments, ridge=0.0))


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), share=st.sampled_from([0.15, 0.3, 0.6]))
def test_a_change_of_basis_on_each_worker_changes_no_error(seed: int, share: float):
    problem = without_ridge(random_layer(seed, m=6, n=9).problem)
    owner = random_owner(problem, seed)
    random = np.random.default_rng(seed)
    blocks = [np.linalg.qr(random.normal(size=(3, 3)))[0] * random.uniform(0.3, 3, 3) for _ in range(3)]
    other = rotated(problem, block_diag(*blocks))
    for chain in CHAINS:
        one, two = (prune(layer, codes(budget=share), owner, chain) for layer in (problem, other))
        assert one.objective == pytest.approx(two.objective, rel=1e-5, abs=1e-9)
        assert one.volume == two.volume


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_neurons_and_of_values_does_not_matter(seed: int):
    problem = random_layer(seed, m=6, n=9, noise=0.3).problem
    owner = random_owner(problem, seed)
    random = np.random.default_rng(seed)
    rows, columns = random.permutation(6), random.permutation(9)
    matrices = {
        name: getattr(problem.moments, name)[np.ix_(columns, columns)] for name in ("second", "cross", "target")
    }
    moments = replace(
        problem.moments,
        mean=problem.moments.mean[columns],
        target_mean=problem.moments.target_mean[columns],
        **matrices,
    )
    other = replace(
        problem,
        weight=problem.weight[np.ix_(rows, columns)],
        moments=moments,
        input_owner=problem.input_owner[columns],
        bias=problem.bias[rows],
    )
    for chain in CHAINS:
        one = prune(problem, codes(budget=0.3), owner, chain)
        two = prune(other, codes(budget=0.3), owner[rows], chain)
        assert one.objective == pytest.approx(two.objective, rel=1e-6)


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.4, 0.7])
def test_codes_err_no_more_than_values_of_the_same_volume(budget: float):
    for seed in range(5):
        problem = random_layer(seed, m=12, n=15, noise=0.3 * (seed % 2)).problem
        owner = random_owner(problem, seed)
        values = prune(problem, Volume(budget=budget), owner, "group-omp")
        coded = prune(problem, codes(budget=budget), owner, "code-greedy+code-descent")
        assert coded.volume <= values.volume
        assert coded.objective <= values.objective * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------------------ mixed


@each_chain
@each_layer
def test_mixed_without_a_price_for_work_is_codes(chain: str, arguments: dict[str, Any]):
    problem = random_layer(17, **arguments).problem
    owner = random_owner(problem)
    for limit in ({"budget": 0.3}, {"transfer_price": 0.02}, {"max_nmse": 0.2}):
        one = prune(problem, codes(**limit), owner, chain)
        two = prune(problem, Volume(messages="mixed", **limit), owner, chain)
        assert one.objective == two.objective


@pytest.mark.parametrize("limit", [{"budget": 0.4}, {"transfer_price": 0.01}], ids=str)
def test_dear_work_is_saved_by_sending_values(limit: dict[str, float]):
    problem = random_layer(18, m=12, n=12).problem
    owner = random_owner(problem)
    before = -1
    for mac_price in (0.0, 0.02, 0.3):
        formulation = Volume(messages="mixed", mac_price=mac_price, **limit)
        found = prune(problem, formulation, owner, "code-greedy+code-descent")
        work = metrics.message_macs(problem, owner, found.exchange).sum()
        price = limit.get("transfer_price", 0.0)
        expected = metrics.weighted_error(problem, owner, found.weight) + price * found.volume + mac_price * work
        assert found.objective == pytest.approx(expected, rel=1e-12)
        values = sum(isinstance(message, Values) for message in found.exchange.messages.values())
        assert found.violations == ()
        assert values >= before
        before = values
    assert before > 1
    best = prune(problem, codes(**limit), owner, "code-greedy+code-descent")
    assert found.objective <= formulation.objective(problem, owner, best.exchange, best.weight)


def test_so_dear_that_nothing_is_sent():
    problem = random_layer(18, m=12, n=12).problem
    owner = random_owner(problem)
    for chain in CHAINS:
        found = prune(problem, Volume(messages="mixed", mac_price=1e3, budget=0.5), owner, chain)
        assert found.volume == 0


# --------------------------------------------------------------------------------------------------------- channels


def repeated(problem: LayerProblem, samples: np.ndarray, b: int) -> LayerProblem:
    """Each value as a channel of b columns: independent copies of the value, each read with the same weights."""
    random = np.random.default_rng(0)
    assert samples.shape[1] == problem.n
    weight = np.repeat(problem.weight, b, axis=1) * np.tile(np.arange(1, b + 1), problem.n)
    second = np.kron(problem.moments.second, np.diag(random.uniform(0.5, 2, b)))
    return replace(
        problem,
        weight=weight,
        moments=Moments(second, second, second, np.zeros(b * problem.n), np.zeros(b * problem.n), 0.0),
        column_value=np.repeat(np.arange(problem.n), b),
    )


@pytest.mark.parametrize("b", [2, 4])
def test_channels_with_the_moments_of_one_value_have_its_codes(b: int):
    """C = C₁ ⊗ Λ and W_c = W₁ ⊗ w: all positions of a map err in proportion, so the codes of b = 1 are the best."""
    layer = random_layer(19, m=6, n=9)
    flat = without_ridge(layer.problem)
    owner = random_owner(flat)
    channels = repeated(flat, layer.original, b)
    scale = float(np.arange(1, b + 1) ** 2 @ np.diag(channels.moments.second)[:b] / flat.moments.second[0, 0])
    for chain in CHAINS:
        one = prune(flat, codes(budget=0.3), owner, chain)
        two = prune(channels, codes(budget=0.3), owner, chain)
        assert two.violations == ()
        assert two.objective == pytest.approx(scale * one.objective, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_channels_are_valid_and_codes_of_all_numbers_leave_no_error(seed: int):
    """With all numbers sent there is nothing left to lose; below that, values are one special case of codes."""
    problem = random_layer(seed, m=4, n=4, P=2, column_value=np.repeat(np.arange(4), 4)).problem
    owner = random_owner(problem, seed)
    everything = Exchange.of_transfers(problem.remote.copy(), problem.input_owner)
    for budget in (0.25, 0.5, 0.75, 1.0):
        found = prune(problem, codes(budget=budget), owner, "code-greedy+code-descent")
        assert found.violations == ()
        assert found.objective >= error_of(problem, owner, everything) - 1e-9
        nothing = error_of(problem, owner, Exchange.nothing(4, 2))
        assert found.objective < nothing


def test_a_source_that_is_worth_nothing_to_a_worker_sends_it_nothing():
    """More values than a dense eigenvalue problem is solved for: Lanczos has no answer to zeros."""
    random = np.random.default_rng(0)
    weight = np.ones(480)
    weight[:120] = 0.0
    problem = LayerProblem.create(
        random.normal(size=(480, 400)),
        4,
        moments=Moments.from_samples(random.normal(size=(900, 400))),
        output_weight=weight,
    )
    solution = solve_problem(problem, Volume(budget=0.01, messages="codes"), partitioner="contiguous").require()
    assert solution.violations == ()
    assert not any(target == 0 for _, target in solution.exchange.messages)


def test_all_numbers_lose_nothing_whatever_the_units_of_the_inputs():
    random = np.random.default_rng(1)
    unit = np.logspace(-4, 4, 24)
    inputs = random.normal(size=(600, 24)) @ random.normal(size=(24, 24)) * unit
    weight = (random.normal(size=(12, 24)) / unit).astype(np.float32)
    problem = LayerProblem.create(weight, 3, moments=Moments.from_samples(inputs))
    solution = solve_problem(problem, Volume(transfer_price=0.0, messages="codes"), partitioner="contiguous")
    assert solution.nmse < 1e-4  # numbers worth less than rounding of the greatest are left out


def test_a_tampered_weight_is_found_however_large_others_are():
    problem = LayerProblem.create(np.random.default_rng(2).normal(size=(8, 8)).astype(np.float32), 2)
    solution = solve_problem(problem, Volume(budget=0.25, messages="codes"), partitioner="contiguous")
    assert solution.violations == ()
    weight = solution.weight.copy()
    weight[0, 0] = 1e6  # a local one
    weight[0, 5] += 1.0
    assert metrics.weights_outside(problem, solution.owner, solution.exchange, weight) > 0


def test_a_constant_input_without_a_ridge_is_no_trouble_on_diagonal_moments():
    variance = np.array([0.0, 1.0, 2.0, 1.0, 0.0, 1.0])
    zeros = np.zeros(6)
    problem = LayerProblem.create(
        np.random.default_rng(3).normal(size=(4, 6)), 2, moments=Moments(variance, variance, variance, zeros, zeros)
    )
    solution = solve_problem(problem, Volume(budget=0.4, messages="codes"))
    assert solution.violations == ()
    assert np.isfinite(solution.objective)


def test_a_singular_covariance_without_a_ridge_is_named():
    samples = np.random.default_rng(4).normal(size=(50, 2)) @ np.ones((2, 8))
    second = samples.T @ samples / 50
    zeros = np.zeros(8)
    problem = LayerProblem.create(np.ones((4, 8)), 2, moments=Moments(second, second, second, zeros, zeros))
    with pytest.raises(InvalidArgument, match="second_moment"):
        solve_problem(problem, Volume(budget=0.4, messages="codes"))
