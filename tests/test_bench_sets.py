"""The benchmark's test sets: the same instances every time, each of its own, each with a placement."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problem_bits import bits

from repurpose_opt import metrics
from repurpose_opt.bench import testset as protocol
from repurpose_opt.bench.testset import Instance
from repurpose_opt.formulation import Edge, Lossless, Volume, incidence
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import cache as array_cache
from repurpose_opt_benchmarks import dense_layers, patterns
from repurpose_opt_benchmarks.default import Default
from repurpose_opt_benchmarks.heterogeneous import Heterogeneous, star, two_racks
from repurpose_opt_benchmarks.large_set import Large
from repurpose_opt_benchmarks.lossless_structured import LosslessStructured
from repurpose_opt_benchmarks.pricing import Pricing
from repurpose_opt_benchmarks.radix_set import RadixNet
from repurpose_opt_benchmarks.real_layers import RealLayers
from repurpose_opt_benchmarks.real_layers_pretrained import RealLayersPretrained
from repurpose_opt_benchmarks.small_exact import SmallExact

GENERATED = (Default, SmallExact, LosslessStructured, RadixNet, Pricing, Heterogeneous, Large)
ALL = (*GENERATED, RealLayers, RealLayersPretrained)
_DEAR = ("edge-n4096", "volume-n4096")
"""Instances that take a second to build."""


@cache
def instances(create: type[protocol.TestSet]) -> tuple[Instance, ...]:
    return tuple(create())


def cheap(create: type[protocol.TestSet]) -> list[Instance]:
    return [instance for instance in instances(create) if not instance.name.startswith(_DEAR)]


@pytest.mark.parametrize("create", ALL)
def test_a_set_says_what_it_is_and_lists_as_many_instances_as_it_announces(create: type[protocol.TestSet]) -> None:
    testset = create()
    names = [instance.name for instance in testset]
    assert len(set(names)) == len(names) == len(testset)
    assert not [name for name in names if set(name) & set("/\\ :")], "names become names of files"
    assert len(testset.title) < 100
    assert len(testset.description) > 100
    assert testset.settings.time_limit > 0
    assert all(instance.kind for instance in testset)


@pytest.mark.parametrize("create", ALL)
def test_about_half_of_the_instances_are_judged_once(create: type[protocol.TestSet]) -> None:
    judged = sum(instance.judge_once for instance in create())
    assert 0.4 <= judged / len(create()) <= 0.5


@pytest.mark.parametrize("create", GENERATED)
def test_instances_are_the_same_bits_twice_and_differ_from_each_other(create: type[protocol.TestSet]) -> None:
    seen: dict[str, dict[str, Any]] = {}
    again = {instance.name: instance for instance in create()}
    for instance in cheap(create)[:: 1 if create is Default else 5]:
        found = bits(instance.problem, instance.formulation)
        assert bits(again[instance.name].problem, again[instance.name].formulation) == found
        assert found not in seen.values(), f"{instance.name} is another one"
        seen[instance.name] = found


@pytest.mark.parametrize("create", [Pricing, Heterogeneous, LosslessStructured, RadixNet, SmallExact, Large])
def test_the_instance_that_is_judged_differs_from_the_one_to_tune_on(create: type[protocol.TestSet]) -> None:
    found = cheap(create)
    for tuned, judged in list(zip(found[::2], found[1::2], strict=True))[::4]:
        assert (tuned.judge_once, judged.judge_once) == (False, True)
        assert tuned.name[:-1] == judged.name[:-1]
        assert bits(tuned.problem, tuned.formulation) != bits(judged.problem, judged.formulation)


def test_instances_do_not_depend_on_the_process_or_on_blas_threads() -> None:
    """Hashes of words, or sums in another order, would change them."""
    code = "import problem_bits, repurpose_opt_benchmarks.pricing as p; i = next(iter(p.Pricing()));"
    code += "print(sorted(problem_bits.bits(i.problem, i.formulation).items()))"
    said = set()
    for environ in ({"PYTHONHASHSEED": "1", "OPENBLAS_NUM_THREADS": "1"}, {"PYTHONHASHSEED": "2"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PATH": "", "PYTHONPATH": str(Path(__file__).parent), **environ},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        said.add(done.stdout)
    assert len(said) == 1


@pytest.mark.parametrize("create", [SmallExact, LosslessStructured, RadixNet, Pricing, Heterogeneous, Large])
def test_every_instance_has_a_placement(create: type[protocol.TestSet]) -> None:
    for instance in cheap(create)[::3]:
        problem = instance.problem
        if problem.m > 4096:
            assert problem.has_equal_loads
            assert problem.slots.sum() >= problem.m, instance.name
            continue
        solved = solve_problem(problem, Edge(), partitioner="contiguous")
        owner = solved.require().owner
        assert owner is not None
        assert metrics.placement_violations(problem, owner) == (), instance.name


def test_default_has_all_formulations_and_sizes_and_needs_nothing_else() -> None:
    problems = [(instance.problem, instance.formulation) for instance in instances(Default)]
    assert Default.requires == ()
    sizes = (range(65), range(65, 513), range(513, 10**5))
    for name, size in product(("lossless", "edge", "volume"), sizes):
        found = [problem for problem, formulation in problems if formulation.name == name and problem.m in size]
        assert len(found) >= 3, (name, size)
    uneven = [problem for problem, _ in problems if len(set(problem.capacity)) > 1 or not problem.has_equal_loads]
    assert len(uneven) >= 8


def test_small_exact_has_proofs_but_not_by_every_backend() -> None:
    by_name = {instance.name: instance for instance in instances(SmallExact)}
    proved = solve_problem(by_name["lossless-n12-d3-P2-0"].problem, Lossless(), partitioner="brute-force")
    assert proved.termination == "optimal"
    given = by_name["volume-owners-given-budget-m24-n24-P3-0"]
    assert (given.problem.allowed.sum(axis=1) == 1).all()
    solved = solve_problem(given.problem, given.formulation, partitioner="contiguous", pruner="group-l0")
    assert solved.termination == "optimal"
    larger = by_name["lossless-n40-d4-P4-0"]
    refused = solve_problem(larger.problem, larger.formulation, partitioner="brute-force")
    assert refused.termination == "unsupported"


def test_pricing_asks_different_things_of_the_same_layer() -> None:
    found = [instance for instance in instances(Pricing) if instance.name.startswith("m64-n64-P4-")]
    layers = {
        judged: {bits(one.problem, Lossless())["weight"] for one in found if one.judge_once == judged}
        for judged in (False, True)
    }
    assert [len(weights) for weights in layers.values()] == [1, 1]
    assert layers[False] != layers[True]
    assert len({repr(one.formulation) for one in found if not one.judge_once}) == len(found) // 2
    limits = [one.formulation for one in found]
    assert {formulation.messages for formulation in limits if isinstance(formulation, Volume)} == {
        "values",
        "codes",
        "mixed",
    }


def test_heterogeneous_is_uneven_in_every_respect() -> None:
    problems = [instance.problem for instance in instances(Heterogeneous)[::2]]
    off_diagonal = [problem.link_price[~np.eye(problem.P, dtype=bool)] for problem in problems]
    assert any(len(set(problem.capacity)) > 1 and (problem.capacity > 0).all() for problem in problems)
    assert any((problem.capacity == 0).any() for problem in problems)
    assert any(not problem.has_equal_loads and (problem.min_load > 0).all() for problem in problems)
    assert any(not problem.allowed.all() for problem in problems)
    assert any(len(set(prices)) > 1 for prices in off_diagonal)
    assert any(len(set(problem.value_bytes)) > 2 for problem in problems)


def test_links_of_racks_and_of_a_star() -> None:
    assert two_racks(4).tolist() == [[1, 1, 8, 8], [1, 1, 8, 8], [8, 8, 1, 1], [8, 8, 1, 1]]
    assert star(3).tolist() == [[1, 1, 1], [1, 2, 2], [1, 2, 2]]


def test_structured_layers_have_a_far_better_placement_than_a_random_one() -> None:
    for instance in instances(LosslessStructured)[::2]:
        problem = instance.problem
        if problem.m > 256:
            continue
        by = {way: solve_problem(problem, Lossless(), partitioner=way).volume for way in ("random", "alternate")}
        assert by["alternate"] < 0.8 * by["random"], instance.name


def test_a_convolution_reads_what_scipy_convolves() -> None:
    from scipy.signal import convolve2d

    weight = patterns.grid_convolution(9, 3, dilation=2, stride=3)(81, 3, np.random.default_rng(0)).toarray()
    kernel = np.zeros((5, 5))
    kernel[::2, ::2] = 1.0
    pixels = np.eye(81).reshape(81, 9, 9)
    read = np.array([convolve2d(pixel, kernel, mode="same")[::3, ::3].ravel() for pixel in pixels]).T
    assert sorted(map(tuple, weight.tolist())) == sorted(map(tuple, read.tolist()))


def test_a_hypercube_and_a_butterfly_read_what_differs_in_one_bit_or_in_some() -> None:
    rng = np.random.default_rng(0)
    rows = incidence_sets(patterns.hypercube()(16, 4, rng))
    assert all(sorted(bin(min(row) ^ other).count("1") for other in row)[0] == 0 for row in rows)
    assert sorted(map(len, rows)) == [5] * 16
    stages = incidence_sets(patterns.butterfly(1, 3)(16, 4, rng))
    assert all(len({read & ~0b110 for read in row}) == 1 and len(row) == 4 for row in stages)


def incidence_sets(weight: object) -> list[set[int]]:
    from repurpose_opt import LayerProblem

    reads = incidence(LayerProblem.create(weight, 1))
    return [set(reads.indices[a:b].tolist()) for a, b in zip(reads.indptr[:-1], reads.indptr[1:], strict=True)]


def test_power_law_layers_have_few_values_that_many_read() -> None:
    weight = patterns.power_law(6, 1.0)(1024, 8, np.random.default_rng(0))
    readers = np.sort(np.bincount(weight.indices, minlength=1024))[::-1]
    assert readers[:20].sum() > 0.25 * readers.sum()
    assert (np.diff(weight.indptr) >= 1).all()


def test_spectrum_of_generated_moments_falls_about_as_one_over_r() -> None:
    C = dense_layers.correlated_moments(256, np.random.default_rng(0)).second
    eigenvalues = np.linalg.eigvalsh(C)[::-1]
    slope = np.polyfit(np.log(np.arange(4, 65)), np.log(eigenvalues[3:64]), 1)[0]
    assert -1.6 < slope < -0.7
    assert eigenvalues[-1] > 0


# The cache of arrays


def test_cached_arrays_are_computed_once_for_each_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def compute() -> array_cache.Arrays:
        calls.append(1)
        return {"layer/weight": np.arange(6.0).reshape(2, 3), "layer/ridge": np.asarray(0.5)}

    first = array_cache.cached("net", {"seed": 0}, ("numpy",), compute)
    again = array_cache.cached("net", {"seed": 0}, ("numpy",), compute)
    assert len(calls) == 1
    assert {key: value.tolist() for key, value in again.items()} == {
        key: value.tolist() for key, value in first.items()
    }
    array_cache.cached("net", {"seed": 1}, ("numpy",), compute)
    assert len(calls) == 2
    files = sorted((tmp_path / "repurpose-opt").iterdir())
    assert [file.suffix for file in files] == [".npz"] * 2, "no part is left behind"
    files[0].write_bytes(files[0].read_bytes()[:40])
    array_cache.cached("net", {"seed": 0}, ("numpy",), compute)
    array_cache.cached("net", {"seed": 1}, ("numpy",), compute)
    assert len(calls) == 3, "only the damaged file is computed anew"


def test_the_cache_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert array_cache.folder() == Path.home() / ".cache" / "repurpose-opt"


# Layers of real networks


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is absent")
def test_layers_of_a_network_have_its_weights_and_the_moments_of_what_they_receive() -> None:
    import torch
    from torch import nn

    from repurpose_opt_benchmarks.network_layers import gather, packed, unpacked

    torch.manual_seed(0)
    first = nn.Linear(4 * 16, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), first, nn.ReLU(), nn.Linear(8, 5))
    images = torch.randn(400, 3, 6, 6)
    stored = unpacked(packed(gather(model, images, ("3", "5"))))
    dense, last = stored["3"], stored["5"]
    with torch.no_grad():
        received = model[:3](images).double().numpy()
    assert np.array_equal(dense.weight, first.weight.detach().numpy())
    problem = dense.problem(4)
    np.testing.assert_allclose(problem.moments.mean, received.mean(axis=0), rtol=1e-5, atol=1e-7)
    measured = problem.moments.second - problem.moments.shrinkage * np.diag(problem.moments.second).mean() * np.eye(64)
    np.testing.assert_allclose(
        measured, (1 - problem.moments.shrinkage) * np.cov(received.T, bias=True), rtol=1e-4, atol=1e-5
    )
    assert problem.moments.same_inputs
    assert problem.input_owner.tolist() == [*[0] * 16, *[1] * 16, *[2] * 16, *[3] * 16], "a channel is on one worker"
    assert set(problem.value_bytes) == {4}
    assert last.problem(2).m == 5


@pytest.mark.slow
@pytest.mark.parametrize("create", [RealLayers, RealLayersPretrained])
def test_real_layers_build(create: type[protocol.TestSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [package for package in create().requires if find_spec(package) is None]
    if missing:
        pytest.skip(f"absent: {', '.join(missing)}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for instance in create():
        problem = instance.problem
        assert problem.n >= 16
        assert problem.moments.choice["moments"] == "full"
        assert instance.formulation.supports(problem) is None
