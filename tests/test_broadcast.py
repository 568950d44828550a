"""Links where one send reaches all workers: a number that several receive counts once, one code serves all."""

from __future__ import annotations

import numpy as np
import pytest

from repurpose_opt import Code, Edge, Exchange, LayerProblem, Lossless, Termination, Values, Volume, metrics
from repurpose_opt.moments import Moments
from repurpose_opt.solve import solve_problem
from repurpose_opt.testing import correlated_samples

OWNER = np.repeat(np.arange(3), 4)


def layer(moments: Moments | None = None, **arguments: object) -> LayerProblem:
    weight = np.random.default_rng(0).normal(size=(12, 9))
    return LayerProblem.create(weight, 3, value_bytes=4, moments=moments, broadcast=True, **arguments)


def pinned(**arguments: object) -> LayerProblem:
    return layer(allowed=np.eye(3, dtype=bool)[OWNER], **arguments)


def test_what_several_receive_counts_once():
    problem = layer(link_price=[[0, 1, 2], [3, 0, 1], [1, 1, 0]])
    code = Code(np.eye(3)[:2])
    exchange = Exchange(
        9,
        3,
        {
            (0, 1): code,
            (0, 2): Code(code.encoder.copy()),
            (1, 0): Values(np.array([3, 4])),
            (1, 2): Values(np.array([4, 5])),
            (2, 0): Code(np.eye(3)[:1]),
            (2, 1): Code(np.eye(3)[1:2]),
        },
    )
    assert metrics.sent_bytes(problem, exchange).tolist() == [8, 12, 8]
    assert metrics.volume(problem, exchange) == 28
    assert metrics.priced_volume(problem, exchange) == 8 * 2 + 12 * 3 + 8 * 1
    assert metrics.traffic(problem, exchange).sum(axis=0).tolist() == [12, 12, 16]
    assert metrics.busiest(problem, exchange) == 16
    assert problem.direct_volume == 36


@pytest.mark.parametrize("limit", [{"budget": 0.5}, {"transfer_price": 0.4}])
def test_uncorrelated_sources_are_solved_to_the_optimum_of_the_stacked_blocks(limit: dict[str, float]):
    variance = np.random.default_rng(1).uniform(0.2, 3.0, 9)
    problem = pinned(moments=Moments.from_raw(variance))
    formulation = Volume(messages="codes", **limit)
    solution = solve_problem(problem, formulation)
    assert solution.termination is Termination.OPTIMAL
    # By hand: for each source the singular values of all rows elsewhere.
    energy, values = 0.0, []
    scale = np.sqrt(problem.moments.variance)
    for p in range(3):
        block = (problem.weight * scale)[p != OWNER][:, problem.input_owner == p]
        energy += np.square(block).sum()
        values += np.square(np.linalg.svd(block, compute_uv=False)).tolist()
    values.sort(reverse=True)
    least = min(
        energy - sum(values[:count]) + limit.get("transfer_price", 0.0) * 4 * count
        for count in range(len(values) + 1)
        if 4 * count <= limit.get("budget", 1.0) * problem.direct_volume
    )
    assert solution.objective == pytest.approx(least, rel=1e-9)


def test_all_receivers_get_the_same_code_and_correlated_sources_gain_by_descent():
    problem = pinned(moments=Moments.from_samples(correlated_samples(9)))
    formulation = Volume(budget=0.4, messages="codes")
    by_svd = solve_problem(problem, formulation, pruner="threshold")
    solution = solve_problem(problem, formulation)
    assert solution.violations == ()
    assert solution.stats["pruner"] == "code-descent"
    assert solution.objective <= by_svd.objective * (1 + 1e-12)
    assert solution.volume <= 0.4 * problem.direct_volume
    for source in range(3):
        sent = [message for (p, _), message in solution.exchange.messages.items() if p == source]
        assert len(sent) in (0, 2)
        assert all(isinstance(message, Code) for message in sent)
        assert all(np.array_equal(message.encoder, sent[0].encoder) for message in sent)


def test_one_code_for_all_costs_less_than_one_for_each():
    moments = Moments.from_samples(correlated_samples(9))
    together = solve_problem(pinned(moments=moments), Volume(max_nmse=0.1, messages="codes"))
    apart = LayerProblem.create(
        pinned().weight, 3, value_bytes=4, moments=moments, allowed=np.eye(3, dtype=bool)[OWNER]
    )
    assert together.volume < solve_problem(apart, Volume(max_nmse=0.1, messages="codes")).volume


@pytest.mark.parametrize("formulation", [Edge(weight_price=0.1), Lossless(), Volume(budget=0.1)])
def test_others_are_refused(formulation: Edge | Lossless | Volume):
    solution = solve_problem(layer(), formulation)
    assert solution.termination is Termination.UNSUPPORTED
    assert "broadcast" in solution.message


def test_mac_prices_and_greedy_are_refused():
    mixed = Volume(budget=0.1, messages="mixed", mac_price=1e-3)
    assert solve_problem(layer(), mixed).termination is Termination.UNSUPPORTED
    greedy = solve_problem(layer(), Volume(budget=0.1, messages="codes"), pruner="code-greedy")
    assert greedy.termination is Termination.UNSUPPORTED
