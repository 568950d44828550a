"""Folders of files as test sets, instances as files, and hypergraphs read as layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from problem_bits import bits
from scipy import sparse
from scipy.io import mmwrite

from repurpose_opt import Edge, Formulation, LayerProblem, Lossless, Volume, metrics
from repurpose_opt.bench.folder import FolderTestSet
from repurpose_opt.bench.instance_file import read_instance, save_instance
from repurpose_opt.bench.testset import Instance
from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.formats import write_hgr
from repurpose_opt.formats.read_hgr import HypergraphLayer, read_hgr
from repurpose_opt.formulation import nets
from repurpose_opt.moments import Moments
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions

DENSE = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
SPARSE = sparse.csr_array(np.where(np.abs(DENSE) > 1, DENSE, 0))


def instance(problem: LayerProblem, formulation: Formulation, **arguments: Any) -> Instance:
    return Instance("any", lambda: (problem, formulation), **arguments)


# ------------------------------------------------------------------------------------------------ instances as files


def everything(rng: np.random.Generator) -> LayerProblem:
    samples, received = rng.normal(size=(2, 50, 6))
    return LayerProblem.create(
        rng.normal(size=(6, 6)).astype(np.float32),
        3,
        input_owner=rng.permutation([0, 1, 2]),
        moments=Moments.from_samples(received, samples),
        bias=rng.normal(size=6),
        capacity=[4.5, np.inf, 6],
        load=rng.uniform(1, 2, size=3),
        min_load=[0.1, 0, 0],
        allowed=np.array([[True, True, False], [True, True, True], [False, False, True]]),
        value_bytes=[3, 1, 7],
        link_price=rng.uniform(size=(3, 3)),
        output_weight=rng.uniform(size=6),
        column_value=[0, 0, 1, 1, 2, 2],
        row_neuron=[0, 1, 2, 0, 1, 2],
    )


SAVED: dict[str, Callable[[], tuple[LayerProblem, Formulation]]] = {
    "everything": lambda: (everything(np.random.default_rng(1)), Volume(transfer_price=0.1, communication="total")),
    "plain": lambda: (LayerProblem.create(DENSE, 2), Edge(weight_price=0.1, transfer_price=1 / 3)),
    "sparse": lambda: (LayerProblem.create(SPARSE, 2, value_bytes=1), Lossless(communication="busiest")),
    "diagonal": lambda: (
        LayerProblem.create(DENSE, 4, moments=Moments.from_raw(np.arange(1.0, 9))),
        Volume(budget=0.1),
    ),
    "broadcast": lambda: (LayerProblem.create(DENSE, 3, broadcast=True), Volume(budget=0.2, messages="codes")),
    "shrunk": lambda: (
        LayerProblem.create(DENSE.astype(np.float64), 2, moments=Moments.from_samples(DENSE)),
        Volume(max_nmse=0.1, messages="codes"),
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_an_instance_survives_its_file_bit_by_bit(case: str, tmp_path: Path) -> None:
    problem, formulation = SAVED[case]()
    save_instance(tmp_path / "one.npz", instance(problem, formulation, kind="a kind", judge_once=True))
    (found,) = FolderTestSet(tmp_path)
    assert (found.name, found.kind, found.judge_once) == ("one", "a kind", True)
    assert bits(found.problem, found.formulation) == bits(problem, formulation)
    solved = [solve_problem(p, f, SolveOptions(seed=3)) for p, f in ((problem, formulation), found.build())]
    assert solved[0].objective == solved[1].objective


def test_a_file_made_by_hand_may_leave_out_most_and_has_raw_moments(tmp_path: Path) -> None:
    samples = np.random.default_rng(2).normal(size=(40, 8)) + 1
    raw = samples.T @ samples / 40
    np.savez(tmp_path / "hand.npz", weight=DENSE, second_moment=raw, input_mean=samples.mean(axis=0), n_workers=3)
    (found,) = FolderTestSet(tmp_path)
    assert found.name == "hand-volume-budget0.1"
    assert found.formulation == Volume(budget=0.1)
    assert found.problem.P == 3
    np.testing.assert_allclose(found.problem.moments.second, np.cov(samples.T, bias=True), atol=1e-12)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"weight": DENSE, "capcity": [1]}, "capcity"),
        ({"weight": DENSE, "capacity": [1, 1]}, "capacity"),
        ({"weight": DENSE, "formulation": "volume"}, "formulation"),
        ({"weight": DENSE, "formulation": '{"name": "volume", "bugdet": 1}'}, "bugdet"),
        ({"weight": DENSE, "formulation": '{"name": "volumes"}'}, "volumes"),
        ({"weight": DENSE, "input_mean": np.zeros(8)}, "input_mean"),
        ({"weight": DENSE, "covariance": np.eye(8), "second_moment": np.eye(8)}, "second_moment"),
        ({"weight": DENSE, "covariance": -np.eye(8)}, "second_moment"),
        ({"weight_data": np.ones(2)}, "weight_data"),
        ({"weight": DENSE, "n_workers": [2, 3]}, "n_workers"),
        ({"weight": DENSE, "judge_once": "yes"}, "judge_once"),
        ({"weight": np.array([[{}]])}, "pickle"),
    ],
)
def test_a_wrong_array_is_refused_in_one_line_with_the_files_name(
    arrays: dict[str, Any], said: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(RepurposeError, match=said) as refused:
        [found.problem for found in FolderTestSet(tmp_path)]
    assert "wrong.npz" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_only_npz_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"\.npz"):
        save_instance(tmp_path / "one.npy", instance(LayerProblem.create(DENSE, 2), Lossless()))


# ------------------------------------------------------------------------------------------------ folders


def test_every_kind_of_file_is_an_instance_in_the_order_of_names(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DENSE)
    np.savez(tmp_path / "b.npz", first=DENSE, second=DENSE.T, bias=np.zeros(6))
    sparse.save_npz(tmp_path / "c.npz", sparse.csr_matrix(SPARSE))
    mmwrite(tmp_path / "d.mtx", SPARSE)
    mmwrite(tmp_path / "e.mtx", DENSE)
    (tmp_path / "f.hgr").write_text("1 4\n1 2 3\n")
    (tmp_path / "notes.txt").write_text("of no concern")
    found = FolderTestSet(tmp_path)
    assert [one.name for one in found] == [
        "a-P4-volume-budget0.1",
        "b-first-P4-volume-budget0.1",
        "b-second-P4-volume-budget0.1",
        "c-P4-lossless",
        "d-P4-lossless",
        "e-P4-volume-budget0.1",
        "f-P4",
    ]
    assert len(found) == 7
    assert found.name == tmp_path.name
    shapes = [one.problem.weight.shape for one in found]
    assert shapes == [(6, 8), (6, 8), (8, 6), (6, 8), (6, 8), (6, 8), (4, 1)]
    for one in found:
        assert not solve_problem(one.problem, one.formulation).violations


def test_testset_json_gives_workers_formulations_and_settings(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DENSE)
    save_instance(tmp_path / "b.npz", instance(LayerProblem.create(DENSE, 3), Edge(transfer_price=1.0)))
    (tmp_path / "c.hgr").write_text("2 6\n1 2 3\n4 5 6\n")
    content = {
        "title": "Mine",
        "description": "Of my own.",
        "n_workers": [2, 3],
        "formulations": [{"name": "lossless"}, {"name": "volume", "max_nmse": 0.05}],
        "imbalance": 0.5,
        "settings": {"time_limit": 7, "seeds": 2},
    }
    (tmp_path / "testset.json").write_text(json.dumps(content))
    found = FolderTestSet(tmp_path)
    assert (found.title, found.description) == ("Mine", "Of my own.")
    assert (found.settings.time_limit, found.settings.seeds) == (7, 2)
    assert [(one.name, one.formulation.name) for one in found] == [
        ("a-P2-lossless", "lossless"),
        ("a-P2-volume-max_nmse0.05", "volume"),
        ("a-P3-lossless", "lossless"),
        ("a-P3-volume-max_nmse0.05", "volume"),
        ("b", "edge"),
        ("c-P2", "lossless"),
        ("c-P3", "lossless"),
    ]
    assert [one.problem.capacity.tolist() for one in found][-2:] == [[4, 4, 0], [3, 3, 3, 0]]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        ('{"workers": 4}', "workers"),
        ('{"n_workers": 0}', "n_workers"),
        ('{"n_workers": [2, "3"]}', "n_workers"),
        ('{"formulations": []}', "formulations"),
        ('{"formulations": [{"budget": 1}]}', "formulation"),
        ('{"settings": {"time": 1}}', "settings"),
        ('{"settings": {"time_limit": "1"}}', "time_limit"),
        ('{"settings": {"time_limit": 0}}', "time_limit"),
        ('{"imbalance": -1}', "imbalance"),
        ('{"n_workers": [4, 4]}', "a-P4"),
    ],
)
def test_a_wrong_testset_json_is_refused(content: str, said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DENSE)
    (tmp_path / "testset.json").write_text(content)
    with pytest.raises(RepurposeError, match=said) as refused:
        FolderTestSet(tmp_path)
    assert "\n" not in str(refused.value)


def test_files_of_one_stem_are_told_apart(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DENSE)
    mmwrite(tmp_path / "a.mtx", SPARSE)
    assert [one.name for one in FolderTestSet(tmp_path)] == ["a.mtx-P4-lossless", "a.npy-P4-volume-budget0.1"]


def test_a_folder_without_instances_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InvalidArgument, match="FOLDER"):
            FolderTestSet(path)


def test_each_matrix_of_a_safetensors_is_an_instance(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    kernel = np.random.default_rng(0).normal(size=(5, 4, 3, 3)).astype(np.float32)
    save_file({"fc/weight": DENSE, "conv.weight": kernel, "fc/bias": np.zeros(6)}, tmp_path / "model.safetensors")
    found = FolderTestSet(tmp_path)
    assert found.requires == ("safetensors",)
    conv, dense = found
    assert (conv.name, dense.name) == ("model-conv.weight-P4-volume-budget0.1", "model-fc.weight-P4-volume-budget0.1")
    assert (conv.problem.n, conv.problem.columns, dense.problem.m) == (4, 36, 6)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(InvalidArgument, match=r"model\.safetensors"):
        FolderTestSet(tmp_path)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.mtx", "a.hgr"])
def test_a_damaged_file_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x93NUMPY nonsense \xff\xfe")
    with pytest.raises(RepurposeError) as refused:
        [found.problem for found in FolderTestSet(tmp_path)]
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------ hypergraphs


def km1(nets: list[list[int]], weight: list[int], block: NDArray[np.int64]) -> int:
    """λ−1 by its definition."""
    return sum(heavy * (len({int(block[v]) for v in net}) - 1) for net, heavy in zip(nets, weight, strict=True))


def priced_volume(layer: HypergraphLayer, owner: NDArray[np.int64]) -> float:
    return metrics.priced_volume(layer.problem, Lossless().select(layer.problem, owner)) - layer.constant


def random_layer(seed: int, **arguments: Any) -> LayerProblem:
    rng = np.random.default_rng(seed)
    weight = sparse.csr_array((rng.random((8, 9)) < 0.35).astype(float))
    return LayerProblem.create(weight, 3, **arguments)


def test_a_written_layer_is_read_back_with_the_same_optimum_and_objectives(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for seed in range(2):
        problem = random_layer(
            seed,
            value_bytes=rng.integers(1, 5, size=9),
            input_owner=rng.integers(0, 3, size=9),
            load=rng.integers(1, 4, size=8),
            capacity=[12, 9, 10],
            allowed=rng.permuted(np.arange(24) < 3).reshape(8, 3) ^ True if seed == 0 else pinned(rng),
        )
        written = write_hgr(tmp_path / "layer.hgr", problem, nets(problem))
        read = read_hgr(tmp_path / "layer.hgr")
        assert (read.parts, read.constant, read.problem.m, read.problem.P) == (3, 0, 8, 3)
        assert read.problem.load.tolist() == problem.load.tolist()
        assert read.problem.capacity.tolist() == problem.capacity.tolist()
        if written.left_out == ():
            assert np.array_equal(read.problem.allowed.sum(axis=1) == 1, problem.allowed.sum(axis=1) == 1)
        for owner in rng.integers(0, 3, size=(20, 8)):
            here = metrics.priced_volume(problem, Lossless().select(problem, owner))
            assert written.constant + (written.unit or 0) * priced_volume(read, owner) == pytest.approx(here)
        if written.left_out == ():
            best = [solve_problem(p, Lossless(), partitioner="brute-force").objective for p in (problem, read.problem)]
            assert best[0] == best[1] * (written.unit or 0)


def pinned(rng: np.random.Generator) -> NDArray[np.bool_]:
    """(8, 3) two neurons with a single place, the others anywhere."""
    allowed = np.ones((8, 3), dtype=bool)
    allowed[[2, 5]] = np.eye(3, dtype=bool)[rng.integers(0, 3, size=2)]
    return allowed


def test_links_of_several_prices_are_read_back_exactly_with_the_terminals_as_neurons(tmp_path: Path) -> None:
    prices = np.array([[0, 1, 4], [2, 0, 1], [3, 2, 0]])
    problem = random_layer(7, link_price=prices, value_bytes=1)
    written = write_hgr(tmp_path / "layer.hgr", problem, nets(problem))
    read = read_hgr(tmp_path / "layer.hgr")
    assert read.problem.m == problem.m + 3
    for owner in np.random.default_rng(0).integers(0, 3, size=(20, 8)):
        there = priced_volume(read, np.concatenate([owner, np.arange(3)]))
        here = metrics.priced_volume(problem, Lossless().select(problem, owner))
        assert written.constant + (written.unit or 0) * there == pytest.approx(here)
        assert bool(metrics.placement_violations(problem, owner)) == bool(
            metrics.placement_violations(read.problem, np.concatenate([owner, np.arange(3)]))
        )


NETS, WEIGHT = [[0, 1, 2], [2, 3, 4], [4, 5], [0, 5, 3], [1, 6]], [3, 1, 2, 5, 1]
PLAIN = "% a comment\n5 7 1\n3 1 2 3\n1 3 4 5\n2 5 6\n5 1 6 4\n1 2 7\n"


def test_a_plain_hypergraph_is_priced_by_its_definition(tmp_path: Path) -> None:
    (tmp_path / "plain.hgr").write_text(PLAIN)
    layer = read_hgr(tmp_path / "plain.hgr", 3, imbalance=0.4)
    assert (layer.parts, layer.problem.P, layer.constant) == (3, 4, sum(WEIGHT))
    assert layer.problem.capacity.tolist() == [4, 4, 4, 0]
    for owner in np.random.default_rng(0).integers(0, 3, size=(30, 7)):
        assert priced_volume(layer, owner) == km1(NETS, WEIGHT, owner)
    solved = solve_problem(layer.problem, Lossless(), partitioner="brute-force")
    every = (np.array(blocks) for blocks in product(range(3), repeat=7))
    least = min(km1(NETS, WEIGHT, block) for block in every if np.bincount(block, minlength=3).max() <= 4)
    assert solved.objective - layer.constant == least


def test_nets_with_fixed_vertices_are_priced_by_their_definition(tmp_path: Path) -> None:
    (tmp_path / "some.hgr").write_text(PLAIN)
    (tmp_path / "some.hgr.fix").write_text("1\n-1\n-1\n0\n-1\n-1\n-1\n")
    layer = read_hgr(tmp_path / "some.hgr", 3)
    assert layer.constant == 3, "the nets without a fixed vertex weigh 2 and 1"
    owners = np.random.default_rng(0).integers(0, 3, size=(30, 7))
    owners[:, [0, 3]] = 1, 0
    for owner in owners:
        assert priced_volume(layer, owner) == km1(NETS, WEIGHT, owner)
    moved = metrics.placement_violations(layer.problem, np.zeros(7, dtype=np.int64))
    assert moved, "a fixed vertex has one place"


def test_vertex_weights_and_targets_are_loads_and_capacities(tmp_path: Path) -> None:
    (tmp_path / "v.hgr").write_text("1 3 10\n1 2 3\n4\n5\n6\n")
    (tmp_path / "v.hgr.targets").write_text("10\n7\n")
    layer = read_hgr(tmp_path / "v.hgr")
    assert layer.problem.load.tolist() == [4, 5, 6]
    assert layer.problem.capacity.tolist() == [10, 7, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1"),
        ("5\n", "line 1"),
        ("2 3 7\n1 2\n1 3\n", "line 1"),
        ("0 3\n", "line 1"),
        ("2 3\n1 2\n", "ends early"),
        ("% c\n2 3\n1 2\n1 4\n", "line 4"),
        ("1 3\n0 1\n", "line 2"),
        ("1 3 1\n5\n", "line 2"),
        ("1 3 1\n-5 1\n", "line 2"),
        ("1 3\n1 x\n", "line 2"),
        ("1 3\n1 2\n3\n", "line 3"),
        ("1 2 10\n1 2\n4\n0\n", "line 4"),
    ],
)
def test_a_damaged_hypergraph_is_refused_with_file_and_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.hgr").write_text(text)
    with pytest.raises(InvalidArgument, match=said) as refused:
        read_hgr(tmp_path / "bad.hgr", 2)
    assert "bad.hgr" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "text", "said"),
    [
        (".fix", "0\n", "7, one for each vertex"),
        (".fix", "0\n" * 6 + "-2\n", "line 7"),
        (".fix", "0\n" * 6 + "3\n", "at least 4"),
        (".targets", "9\n9\n9\n", "n_workers"),
        (".targets", "9\nx\n", "line 2"),
    ],
)
def test_a_damaged_file_beside_is_refused(suffix: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.hgr").write_text(PLAIN)
    (tmp_path / f"bad.hgr{suffix}").write_text(text)
    with pytest.raises(InvalidArgument, match=said):
        read_hgr(tmp_path / "bad.hgr", 2)


def test_without_fixed_vertices_the_number_of_blocks_is_needed(tmp_path: Path) -> None:
    (tmp_path / "plain.hgr").write_text(PLAIN)
    with pytest.raises(InvalidArgument, match="n_workers"):
        read_hgr(tmp_path / "plain.hgr")


def test_what_is_read_is_what_mt_kahypar_counts(tmp_path: Path) -> None:
    """Another reader of the same file; in a child, as it may be initialised only once."""
    pytest.importorskip("mtkahypar")
    from test_formats import with_mt_kahypar

    (tmp_path / "plain.hgr").write_text(PLAIN)
    (tmp_path / "plain.hgr.fix").write_text("-1\n" * 7)
    (tmp_path / "plain.hgr.targets").write_text("3\n3\n3\n")
    layer = read_hgr(tmp_path / "plain.hgr")
    owners = np.random.default_rng(0).integers(0, 3, size=(5, 7))
    read = with_mt_kahypar(tmp_path, kind="hgr", file="plain.hgr", blocks=3, partitions=owners.tolist())
    assert read["km1"] == [priced_volume(layer, owner) for owner in owners]


def test_read_instance_names_a_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"absent\.npz"):
        read_instance(tmp_path / "absent.npz", 2, Lossless())
