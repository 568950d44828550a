"""Exchange formats, read by the libraries that they are meant for: Mt-KaHyPar, METIS's own programs, HiGHS."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import Edge, Formulation, LayerProblem, Lossless, Volume, metrics
from repurpose_opt.errors import InvalidArgument, NoSolution
from repurpose_opt.formats import nearest_placement, read_partition, write_hgr, write_metis, write_mps
from repurpose_opt.formats.common import vertex_loads
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import LinearModel, linear_model
from repurpose_opt.testing import LARGER_CASES, TINY_CASES, least_objective, random_problem

Owners = NDArray[np.int64]


def sparse_problem(seed: int = 0, m: int = 40, n: int = 30, P: int = 4, **arguments: Any) -> LayerProblem:
    random = np.random.default_rng(seed)
    weight = sparse.csr_array(np.where(random.random((m, n)) < 0.12, random.normal(size=(m, n)), 0.0))
    return random_problem(weight=weight, P=P, bias=np.zeros(m), **arguments)


def valid_placements(problem: LayerProblem) -> list[Owners]:
    every = (np.array(labels) for labels in product(range(problem.P), repeat=problem.m))
    return [owner for owner in every if not metrics.placement_violations(problem, owner)]


# ----------------------------------------------------------------------------------------------------- Mt-KaHyPar


def with_mt_kahypar(folder: Path, **task: Any) -> dict[str, Any]:
    """What a child process reads: Mt-KaHyPar may be initialised only once in each."""
    pytest.importorskip("mtkahypar")
    command = [sys.executable, __file__, json.dumps(task)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def mt_kahypar_answers(task: dict[str, Any]) -> dict[str, Any]:
    """In the child: reads the file, and tells what is in it, λ−1 of the partitions given and of its own."""
    import mtkahypar

    library = mtkahypar.initialize(1)
    context = library.context_from_preset(mtkahypar.PresetType.DEFAULT)
    context.logging = False
    mtkahypar.set_seed(1)
    blocks = task["blocks"]
    context.set_partitioning_parameters(blocks, 0.03, mtkahypar.Objective.KM1)
    if task["kind"] == "graph":
        graph = library.graph_from_file(task["file"], context, mtkahypar.FileFormat.METIS)
        ends = [(graph.edge_source(e), graph.edge_target(e), graph.edge_weight(e)) for e in graph.edges()]
        return {"weights": [graph.node_weight(v) for v in graph.nodes()], "edges": sorted(map(sorted_ends, ends))}
    read = library.hypergraph_from_file(task["file"], context, mtkahypar.FileFormat.HMETIS)
    answer = {
        "weights": [read.node_weight(v) for v in read.nodes()],
        "nets": [[read.edge_weight(e), sorted(read.pins(e))] for e in read.edges()],
        "km1": [read.create_partitioned_hypergraph(context, blocks, part).km1() for part in task["partitions"]],
    }
    read.add_fixed_vertices_from_file(task["file"] + ".fix", blocks)
    answer["fixed"] = [read.fixed_vertex_block(v) if read.is_fixed(v) else -1 for v in read.nodes()]
    largest = [int(line) for line in Path(task["file"] + ".targets").read_text().split()]
    context.set_individual_target_block_weights(largest)
    partitioned = read.partition(context)
    partitioned.write_partition_to_file(task["file"] + ".part")
    return {**answer, "found": partitioned.km1()}


def sorted_ends(edge: tuple[int, int, int]) -> tuple[int, int, int]:
    return (*sorted(edge[:2]), edge[2])  # type: ignore[return-value]


HGR_CASES: dict[str, tuple[Callable[[], LayerProblem], Formulation]] = {
    "bytes": (sparse_problem, Lossless()),
    "value_bytes": (lambda: sparse_problem(1, value_bytes=np.arange(30) % 5), Lossless()),
    "one_price": (lambda: sparse_problem(2, link_price=0.3), Lossless()),
    "link_price": (LARGER_CASES["link_price"], Lossless()),
    "free_link": (lambda: sparse_problem(3, P=3, link_price=[[0, 0, 2], [1, 0, 3], [5, 0, 0]]), Lossless()),
    "capacity": (lambda: sparse_problem(4, capacity=[20, 10, 12, 0]), Lossless()),
    "load": (lambda: sparse_problem(5, load=1 + np.arange(40) % 3, capacity=25), Lossless()),
    "edge": (LARGER_CASES["plain"], Edge(weight_price=0.05, transfer_price=0.02)),
    "never_sent": (LARGER_CASES["plain"], Volume(budget_bytes=0)),
}


@pytest.mark.parametrize("case", HGR_CASES)
def test_mt_kahypar_reads_a_hypergraph_and_its_km1_is_the_cost(case: str, tmp_path: Path) -> None:
    problem, formulation = HGR_CASES[case][0](), HGR_CASES[case][1]
    anyhow = np.random.default_rng(9).integers(0, problem.P, size=(5, problem.m))
    hypergraph = formulation.hypergraph(problem, anyhow[0])
    assert hypergraph is not None
    written = write_hgr(tmp_path / "layer.hgr", problem, hypergraph)
    assert [file.name for file in written.files] == ["layer.hgr", "layer.hgr.fix", "layer.hgr.targets"]
    terminals = list(range(problem.P))
    partitions = [[*owner, *terminals] for owner in anyhow.tolist()]
    read = with_mt_kahypar(tmp_path, kind="hgr", file="layer.hgr", blocks=problem.P, partitions=partitions)
    assert read["weights"] == [*problem.load.tolist(), *[1] * problem.P]
    assert read["fixed"] == [-1] * problem.m + terminals
    assert len(read["nets"]) == written.size["nets"]
    assert sum(len(pins) for _, pins in read["nets"]) == written.size["pins"]
    assert written.unit is not None
    for km1, owner in zip(read["km1"], anyhow, strict=True):
        cost = written.constant + written.unit * km1
        assert cost == pytest.approx(hypergraph.cost(owner), rel=1e-9, abs=written.rounding + 1e-9)
    assert written.rounding <= 1e-6 * max(hypergraph.cost(owner) for owner in anyhow)

    owner = read_partition(tmp_path / "layer.hgr.part", problem)
    assert metrics.placement_violations(problem, owner) == ()
    found = written.constant + written.unit * read["found"]
    assert found == pytest.approx(hypergraph.cost(owner), rel=1e-9, abs=written.rounding + 1e-9)
    if isinstance(formulation, Lossless):
        priced = metrics.priced_volume(problem, formulation.select(problem, owner))
        assert found == pytest.approx(priced, rel=1e-9, abs=written.rounding + 1e-9)


def test_km1_of_a_file_is_the_volume_in_bytes(tmp_path: Path) -> None:
    problem = sparse_problem(6)
    written = write_hgr(tmp_path / "layer.hgr", problem, Lossless().hypergraph(problem))
    assert (written.is_exact, written.unit, written.constant, written.rounding) == (True, 1.0, 0.0, 0.0)
    read = with_mt_kahypar(tmp_path, kind="hgr", file="layer.hgr", blocks=4, partitions=[])
    owner = read_partition(tmp_path / "layer.hgr.part", problem)
    assert read["found"] == metrics.volume(problem, Lossless().select(problem, owner)) > 0


def test_pinned_neurons_are_fixed_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    allowed = np.ones((40, 4), dtype=bool)
    allowed[3] = [False, False, True, False]
    problem = sparse_problem(allowed=allowed)
    assert write_hgr(tmp_path / "layer.hgr", problem, Lossless().hypergraph(problem)).left_out == ()
    read = with_mt_kahypar(tmp_path, kind="hgr", file="layer.hgr", blocks=4, partitions=[])
    assert read["fixed"] == [-1, -1, -1, 2, *[-1] * 36, 0, 1, 2, 3]
    assert read_partition(tmp_path / "layer.hgr.part", problem)[3] == 2
    allowed[5, 0] = False
    problem = sparse_problem(allowed=allowed, min_load=[0, 0, 2, 0])
    written = write_hgr(tmp_path / "layer.hgr", problem, Lossless().hypergraph(problem))
    assert written.left_out == ("allowed", "min_load")
    assert "% not in these files: allowed, min_load" in (tmp_path / "layer.hgr").read_text()


def test_a_value_that_may_be_lost_stands_in_and_never_costs_less(tmp_path: Path) -> None:
    for case in ("identity", "link_price", "diagonal"):
        problem = TINY_CASES[case]()
        hypergraph = Volume(transfer_price=0.1).hypergraph(problem)
        assert hypergraph is not None
        written = write_hgr(tmp_path / f"{case}.hgr", problem, hypergraph)
        assert not written.is_exact
        owners = valid_placements(problem)[:6]
        partitions = [[*owner.tolist(), 0, 1] for owner in owners]
        read = with_mt_kahypar(tmp_path, kind="hgr", file=f"{case}.hgr", blocks=2, partitions=partitions)
        assert written.unit is not None
        for km1, owner in zip(read["km1"], owners, strict=True):
            assert written.constant + written.unit * km1 >= hypergraph.cost(owner) - written.rounding - 1e-9


def test_the_total_stands_in_for_the_busiest_worker(tmp_path: Path) -> None:
    problem = sparse_problem()
    total, busiest = Lossless(), Lossless(communication="busiest")
    assert write_hgr(tmp_path / "total.hgr", problem, total.hypergraph(problem)).is_exact
    assert not write_hgr(tmp_path / "busiest.hgr", problem, busiest.hypergraph(problem)).is_exact
    nets = [(tmp_path / name).read_text().splitlines()[2:] for name in ("total.hgr", "busiest.hgr")]
    assert nets[0] == nets[1]


def test_capacities_hold_after_rounding(tmp_path: Path) -> None:
    load = np.random.default_rng(0).uniform(1, 2, size=40)
    problem = sparse_problem(load=load)
    write_hgr(tmp_path / "layer.hgr", problem, Lossless().hypergraph(problem))
    read = with_mt_kahypar(tmp_path, kind="hgr", file="layer.hgr", blocks=4, partitions=[])
    assert sum(read["weights"]) < 2**31
    assert metrics.placement_violations(problem, read_partition(tmp_path / "layer.hgr.part", problem)) == ()


@pytest.mark.parametrize("largest_sum", [10, 40, 1000, 2**30])
def test_what_fits_in_whole_loads_fits(largest_sum: int) -> None:
    random = np.random.default_rng(1)
    problem = random_problem(m=8, P=2, load=random.uniform(1, 2, size=8), capacity=[8, 6])
    load, capacity = vertex_loads(problem, largest_sum)
    assert load.sum() <= largest_sum + problem.m
    owners = [np.array(labels) for labels in product(range(2), repeat=8)]
    fitting = [owner for owner in owners if (np.bincount(owner, load, 2) <= capacity).all()]
    assert all(not metrics.placement_violations(problem, owner) for owner in fitting)
    assert largest_sum < 2**30 or len(fitting) == len(valid_placements(problem))


# ---------------------------------------------------------------------------------------------------------- METIS


def expected_edges(problem: LayerProblem, weight_of: Callable[[int, int], int]) -> list[list[int]]:
    """Neuron–input edges by the definition, and each input's tie to the terminal of its worker."""
    m, n = problem.m, problem.n
    reads = np.argwhere(problem.weight.toarray() != 0).tolist()
    edges = [[i, m + j, weight_of(i, j)] for i, j in reads]
    heaviest = max(weight for _, _, weight in edges)
    return sorted(edges + [[m + j, m + n + k, heaviest] for j, k in enumerate(problem.input_owner.tolist())])


def test_mt_kahypar_reads_a_graph(tmp_path: Path) -> None:
    value_bytes = 1 + np.arange(30) % 5
    problem = sparse_problem(1, value_bytes=value_bytes)
    written = write_metis(tmp_path / "layer.graph", problem, Lossless().hypergraph(problem))
    assert (written.is_exact, written.unit) == (False, None)
    read = with_mt_kahypar(tmp_path, kind="graph", file="layer.graph", blocks=4)
    assert read["weights"] == [5] * 40 + [0] * 30 + [500] * 4
    # Mt-KaHyPar keeps both directions of an edge.
    both = [edge for edge in expected_edges(problem, lambda i, j: int(value_bytes[j])) for _ in range(2)]
    assert read["edges"] == both
    assert written.size == {"vertices": 74, "edges": len(both) // 2}
    shares = [line.split(" = ") for line in (tmp_path / "layer.graph.tpwgts").read_text().splitlines()]
    assert [block for block, _ in shares] == ["0", "1", "2", "3"]
    assert [float(share) for _, share in shares] == [0.25] * 4


def test_edge_formulation_ties_neurons_to_terminals(tmp_path: Path) -> None:
    problem = LARGER_CASES["plain"]()
    hypergraph = Edge(weight_price=0.05, transfer_price=0.02).hypergraph(problem)
    assert hypergraph.fixed_cost is not None
    write_metis(tmp_path / "layer.graph", problem, hypergraph)
    read = with_mt_kahypar(tmp_path, kind="graph", file="layer.graph", blocks=4)
    weights = np.zeros((problem.m, problem.P))
    for first, second, weight in read["edges"]:
        if first < problem.m:
            weights[first, second - problem.m - problem.n] = weight
    saved = hypergraph.fixed_cost.max(axis=1, keepdims=True) - hypergraph.fixed_cost
    np.testing.assert_allclose(weights / weights.max(), saved / saved.max(), atol=0.01)


@pytest.mark.skipif(shutil.which("gpmetis") is None, reason="METIS's programs are not installed (package metis)")
@pytest.mark.parametrize(
    "formulation", [Lossless(), Edge(0.05, 0.02), Volume(transfer_price=0.1)], ids=lambda f: f.name
)
@pytest.mark.parametrize("limits", [{}, {"capacity": [20, 10, 8, 8]}, {"load": 1 + np.arange(40) % 3}], ids=str)
def test_metis_programs_read_a_graph(limits: dict[str, Any], formulation: Formulation, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    at_home = random.permutation(np.arange(40) % 4)[:, None] == np.arange(32) // 8
    weight = sparse.csr_array(np.where(random.random((40, 32)) < np.where(at_home, 0.5, 0.02), 1.0, 0.0))
    problem = random_problem(weight=weight, P=4, **limits)
    hypergraph = formulation.hypergraph(problem)
    assert hypergraph is not None
    write_metis(tmp_path / "layer.graph", problem, hypergraph)

    def run(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60).stdout

    assert "The format of the graph is correct" in run("graphchk", "layer.graph")
    run("gpmetis", "-tpwgts=layer.graph.tpwgts", "-ufactor=1", "-seed=1", "layer.graph", "4")
    owner = read_partition(tmp_path / "layer.graph.part.4", problem)
    nearest = nearest_placement(problem, owner, formulation.assignment_cost(problem, owner, None))
    assert metrics.placement_violations(problem, nearest) == ()
    shuffled = [nearest_placement(problem, random.permutation(nearest)) for _ in range(10)]
    assert hypergraph.cost(nearest) < 0.85 * min(hypergraph.cost(owner) for owner in shuffled)


# ------------------------------------------------------------------------------------------------------------ MPS


@pytest.fixture
def highs() -> Any:
    highspy = pytest.importorskip("highspy")
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    return solver


def read_model(highs: Any, path: Path) -> Any:
    assert "kOk" in str(highs.readModel(str(path)))
    return highs.getLp()


def handmade_model() -> LinearModel:
    inf = np.inf
    problem = TINY_CASES["identity"]()
    return replace(
        linear_model(problem, Lossless().hypergraph(problem)),
        cost=np.array([0.1, -2.5, 0.0, 1 / 3, 1e-7, 0.0, 4.0]),
        constant=-12.75,
        matrix=sparse.csr_array(np.arange(1.0, 36.0).reshape(5, 7) * (np.arange(35).reshape(5, 7) % 3 > 0) / 7),
        row_lower=np.array([1.5, -inf, -4.0, 2.0, 0.0]),
        row_upper=np.array([1.5, 7.0, inf, 6.5, 3.0]),
        lower=np.array([0.0, 0.0, -inf, -3.0, 2.0, 0.0, -inf]),
        upper=np.array([1.0, inf, -1.0, -3.0, 5.0, 0.25, inf]),
        is_integer=np.array([True, True, False, False, True, False, False]),
        places=np.array([[0, 0], [0, 1], [1, 0]]),
        transfers=np.array([[0, 1], [1, 0]]),
        losses=np.array([[0, 0, 1], [1, 1, 1]]),
    )


def test_highs_reads_every_kind_of_row_and_bound(highs: Any, tmp_path: Path) -> None:
    model = handmade_model()
    write_mps(tmp_path / "model.mps", model)
    read = read_model(highs, tmp_path / "model.mps")
    assert list(read.col_names_) == model.names
    assert read.offset_ == model.constant
    assert [str(kind) == "HighsVarType.kInteger" for kind in read.integrality_] == model.is_integer.tolist()
    for found, given in (
        (read.col_cost_, model.cost),
        (read.col_lower_, model.lower),
        (read.col_upper_, model.upper),
        (read.row_lower_, model.row_lower),
        (read.row_upper_, model.row_upper),
    ):
        np.testing.assert_array_equal(found, given)
    parts = read.a_matrix_
    matrix = sparse.csc_array((parts.value_, parts.index_, parts.start_), shape=(5, 7))
    np.testing.assert_array_equal(matrix.toarray(), model.matrix.toarray())


def test_a_row_without_limits_is_left_out_and_crossed_ones_are_refused(highs: Any, tmp_path: Path) -> None:
    model = handmade_model()
    free = replace(model, row_lower=np.array([1.5, -np.inf, -np.inf, 2, 0]), row_upper=np.array([1.5, 7, np.inf, 6, 3]))
    write_mps(tmp_path / "model.mps", free)
    assert list(read_model(highs, tmp_path / "model.mps").row_upper_) == [1.5, 7, 6, 3]
    with pytest.raises(InvalidArgument, match="row 3 between 7 and 6; allowed: lower ≤ upper"):
        write_mps(tmp_path / "model.mps", replace(free, row_lower=np.array([1.5, -np.inf, 0, 7, 0])))


DIAGONAL = ("identity", "diagonal", "output_weight", "value_bytes", "link_price", "capacity", "min_load", "allowed")
DIAGONAL += ("load", "blocks")
PRICED: dict[str, Formulation] = {
    "lossless": Lossless(),
    "edge": Edge(weight_price=0.05, transfer_price=0.02),
    "volume": Volume(transfer_price=0.04),
}


@pytest.mark.parametrize("formulation", PRICED)
@pytest.mark.parametrize("case", DIAGONAL)
def test_highs_finds_the_least_objective(case: str, formulation: str, highs: Any, tmp_path: Path) -> None:
    problem, minimised = TINY_CASES[case](), PRICED[formulation]
    hypergraph = minimised.hypergraph(problem)
    assert hypergraph is not None
    assert hypergraph.is_exact
    write_mps(tmp_path / "model.mps", linear_model(problem, hypergraph))
    read_model(highs, tmp_path / "model.mps")
    assert "kOk" in str(highs.run())
    least = least_objective(problem, minimised)
    assert highs.getInfo().objective_function_value == pytest.approx(least, rel=1e-6)

    highs.writeSolution(str(tmp_path / "model.sol"), 0)
    owner = read_partition(tmp_path / "model.sol", problem)
    assert metrics.placement_violations(problem, owner) == ()
    assert hypergraph.cost(owner) == pytest.approx(least, rel=1e-6)


def test_highs_finds_the_least_cost_with_infinite_prices(highs: Any, tmp_path: Path) -> None:
    problem = TINY_CASES["identity"]()
    hypergraph = Volume(transfer_price=0.04).hypergraph(problem)
    assert hypergraph is not None
    price = np.where(hypergraph.price > 0, [[np.inf], [0.3], [np.inf]], 0.0)
    hypergraph = replace(hypergraph, price=price)
    write_mps(tmp_path / "model.mps", linear_model(problem, hypergraph))
    assert "inf" not in (tmp_path / "model.mps").read_text()
    read_model(highs, tmp_path / "model.mps")
    assert "kOk" in str(highs.run())
    least = min(hypergraph.cost(owner) for owner in valid_placements(problem))
    assert highs.getInfo().objective_function_value == pytest.approx(least, rel=1e-6)


def test_highs_finds_the_least_error_within_a_budget(highs: Any, tmp_path: Path) -> None:
    problem = TINY_CASES["value_bytes"]()
    hypergraph = Volume(transfer_price=1.0).hypergraph(problem)
    assert hypergraph is not None
    write_mps(tmp_path / "model.mps", linear_model(problem, hypergraph, budget=9))
    read_model(highs, tmp_path / "model.mps")
    assert "kOk" in str(highs.run())
    least = least_objective(problem, Volume(budget_bytes=9))
    assert highs.getInfo().objective_function_value == pytest.approx(least, rel=1e-6)


def test_infinite_prices_are_refused_where_nothing_may_be_lost(tmp_path: Path) -> None:
    problem = sparse_problem()
    hypergraph = replace(Lossless().hypergraph(problem), price=np.where(problem.remote, np.inf, 0.0))
    for write in (write_hgr, write_metis):
        with pytest.raises(InvalidArgument, match="an infinite price"):
            write(tmp_path / "layer", problem, hypergraph)


# ------------------------------------------------------------------------------------------------------ partitions


def test_blocks_are_named_by_their_terminals(tmp_path: Path) -> None:
    problem = random_problem(m=6, n=4, P=3, input_owner=[0, 1, 1, 2])
    path = tmp_path / "layer.part"

    def read(*blocks: int) -> list[int]:
        path.write_text("\n".join(map(str, blocks)) + "\n\n")
        return read_partition(path, problem).tolist()

    neurons = (0, 0, 1, 1, 2, 2)
    assert read(*neurons) == [0, 0, 1, 1, 2, 2]
    assert read(*neurons, 2, 0, 1) == [1, 1, 2, 2, 0, 0]
    assert read(*neurons, 2, 0, 0, 1, 2, 0, 1) == [1, 1, 2, 2, 0, 0]
    # Terminals count more than inputs, all of which are in other blocks here.
    assert read(*neurons, 1, 2, 2, 0, 0, 1, 2) == [0, 0, 1, 1, 2, 2]
    # Terminals 1 and 2 share block 0: the inputs decide which of the two names it.
    assert read(*neurons, 2, 0, 0, 1, 2, 0, 0) == [1, 1, 2, 2, 0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n0\n1\n", "layer.part with 4 lines; allowed: 5 (neurons), 7 (and terminals) or 10 (neurons, inputs and"),
        ("", "layer.part with 0 lines"),
        ("0\n1\n2\n1\n0\n", "layer.part, line 3: '2'; allowed: a block, 0 … 1"),
        ("0\n-1\n1\n1\n0\n", "layer.part, line 2: '-1'"),
        ("0\n1\n1\n0.5\n0\n", "layer.part, line 4: '0.5'"),
        ("0\n1\n\n1\n0\n", "layer.part, line 3: ''"),
        ("0\n1\n1\n1\nx²\n", "layer.part, line 5: 'x²'"),
        ("0\n1\n1\n1\n²\n", "layer.part, line 5: '²'"),
        (b"\xff\xfe", "layer.part (no text)"),
    ],
)
def test_errors_name_file_and_line(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.part"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidArgument) as error:
        read_partition(path, random_problem())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InvalidArgument, match=r"absent.part \(No such file"):
        read_partition(tmp_path / "absent.part", random_problem())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x_0_0 0.2", "no x_0_k is 1; allowed: a worker for each neuron"),
        ("x_0_2 1", "line 8: 'x_0_2 1'; allowed: x_0_0 … x_4_1"),
        ("x_5_0 1", "line 8: 'x_5_0 1'"),
        ("x_0_0 one", "line 8: 'one'; allowed: a number"),
        ("x_0_0 nan", "no x_0_k is 1"),
    ],
)
def test_errors_of_solutions_name_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "layer.sol"
    path.write_text(
        f"Model status\nOptimal\n\n# Columns 9\nx_1_0 1\nx_2_1 1\nx_3_0 1\n{line}\nx_4_1 1\n# Rows 3\nx_0_0 1\n"
    )
    with pytest.raises(InvalidArgument) as error:
        read_partition(path, random_problem())
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_solution_in_the_style_of_scip(tmp_path: Path) -> None:
    path = tmp_path / "layer.sol"
    lines = [
        "solution status: optimal",
        "objective value:  3",
        *(f"x_{i}_{i % 2}   1 \t(obj:0)" for i in range(5)),
        "y_0_1 1",
    ]
    path.write_text("\n".join(lines))
    assert read_partition(path, random_problem()).tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("case", ["plain", "capacity", "min_load", "allowed", "load"])
def test_nearest_placement_moves_the_least_load(case: str) -> None:
    tiny = {"plain": "identity"}.get(case, case)
    problem = TINY_CASES[tiny]()
    valid = valid_placements(problem)
    for labels in product(range(2), repeat=problem.m):
        owner = np.array(labels)
        moved = min(problem.load[other != owner].sum() for other in valid)
        nearest = nearest_placement(problem, owner)
        assert metrics.placement_violations(problem, nearest) == ()
        assert problem.load[nearest != owner].sum() == moved


def test_nearest_placement_prefers_cheap_moves() -> None:
    problem = random_problem(m=4, P=2, capacity=[2, 2])
    cost = np.array([[0.0, 5.0], [0.0, 1.0], [0.0, 4.0], [0.0, 2.0]])
    assert nearest_placement(problem, np.zeros(4, dtype=np.int64), cost).tolist() == [0, 1, 0, 1]


def test_no_nearest_placement() -> None:
    allowed = np.ones((5, 2), dtype=bool)
    allowed[:3, 1] = False
    with pytest.raises(NoSolution, match="infeasible"):
        nearest_placement(random_problem(allowed=allowed, capacity=[2, 3]), np.zeros(5, dtype=np.int64))


def test_a_hypergraph_without_a_worker_that_holds_a_value(tmp_path: Path) -> None:
    """The first price step has no terminal: every worker with a reader pays."""
    problem = sparse_problem(P=2)
    given = Lossless().hypergraph(problem)
    hypergraph = Hypergraph(given.pins, given.price + 3.0, keeps_all=True, is_exact=True)
    written = write_hgr(tmp_path / "layer.hgr", problem, hypergraph)
    owner = np.arange(40) % 2
    partitions = [[*owner.tolist(), 0, 1]]
    read = with_mt_kahypar(tmp_path, kind="hgr", file="layer.hgr", blocks=2, partitions=partitions)
    assert written.unit is not None
    assert written.constant + written.unit * read["km1"][0] == pytest.approx(hypergraph.cost(owner))


if __name__ == "__main__":
    print(json.dumps(mt_kahypar_answers(json.loads(sys.argv[1]))))
