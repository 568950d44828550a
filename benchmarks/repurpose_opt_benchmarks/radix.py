"""Whole networks without pruning: a permuted RadiX-Net placed layer by layer, and sparse chains with a look ahead.

RadiX-Net: 120 layers of 1024 neurons with 32 connections each, neurons in random order, 8 workers, inputs in
contiguous runs; every layer is placed for its own inputs, given the placement of the layer before. "By its structure"
is what the layers of the unpermuted network cost when they are cut as their numeral system suggests (`structured`).

Chains: four sparse layers, placed by a forward sweep, all at once (METIS, one balance constraint a layer), and from
both by sweeps that look ahead to the next layer. Runs in a fresh process with one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from repurpose_opt import LayerProblem, Lossless, registry
from repurpose_opt.formulation import nets
from repurpose_opt.network_solve import solve_network
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import SolveOptions
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.patterns import sparse_layer
from repurpose_opt_benchmarks.radix_net import radix_layer, radix_net
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table

RADICES = (32, 32)
NEURONS = 1024
WORKERS = 8
LAYERS = 120
OURS, PLAIN_METIS = "metis", "METIS, one cut"
PRESETS = ("DEFAULT", "QUALITY", "HIGHEST_QUALITY", "DETERMINISTIC")
THEIRS = "Mt-KaHyPar"
MOST_VOLUME = 1.0
"""Bar: our volume relative to Mt-KaHyPar's."""
MOST_SECONDS = 1 / 3
"""Bar: our seconds relative to Mt-KaHyPar's."""

Place = Callable[[LayerProblem, int], NDArray[np.int64]]


@dataclass(frozen=True)
class Chain:
    """Layers of the same size with ones anywhere, or with hidden blocks where `noise` is given."""

    name: str
    neurons: int
    density: float
    noise: float | None
    layers: int = 4

    def weights(self, seed: int) -> list[sparse.csr_array]:
        rng = np.random.default_rng([seed, self.neurons])
        return [sparse_layer(self.neurons, WORKERS, self.density, self.noise, rng) for _ in range(self.layers)]


CHAINS = (Chain("random", 256, 0.01, None), Chain("planted", 256, 0.03, 0.35))


@dataclass(frozen=True)
class Way:
    """A chain of partitioners for a whole network, and its time limit in seconds."""

    partitioner: str
    time_limit: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks radix", description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS, metavar="N", help=f"of the RadiX-Net (default {LAYERS})")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 … N−1 (default 3)")
    parser.add_argument("--quick", action="store_true", help="4 layers, small chains, one seed; writes no results")
    parser.add_argument("--output", type=Path, help="folder for radix.json and radix.md")
    args, _ = parser.parse_known_args(argv)  # the other experiments take options of their own
    for name in ("layers", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}; allowed: at least 1")
    layers, seeds = (min(args.layers, 4), 1) if args.quick else (args.layers, args.seeds)
    folder = args.output or (None if args.quick else RESULTS)
    report = measure_alone(layers, seeds, args.quick)
    options = f"--layers {layers} --seeds {seeds}" + " --quick" * args.quick
    report = {"command": f"python -m repurpose_opt_benchmarks radix {options}", **report}
    print(markdown(report))
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "radix.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "radix.md").write_text(markdown(report) + "\n")
    return 0


def measure_alone(layers: int, seeds: int, is_quick: bool) -> dict[str, Any]:
    """`measure` in a fresh process with one thread: the libraries read their limits when they load."""
    call = f"measure({layers}, {seeds}, {is_quick})"
    code = f"import json; from {__spec__.name} import measure; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, text=True, check=True
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def measure(layers: int, seeds: int, is_quick: bool) -> dict[str, Any]:
    """Both comparisons, with everything that went into them."""
    missing = [name for name in (OURS, "mt-kahypar", "local-search") if not _is_there(name)]
    rows = [row for seed in range(seeds) for row in _forward(layers, seed)]
    time_limit = 0.3 if is_quick else 10.0
    ways = [Way(name, time_limit) for name in ("metis+alternate", "metis+alternate+local-search")]
    chains = [replace(chain, neurons=64) for chain in CHAINS] if is_quick else CHAINS
    ways = [way for way in ways if not set(way.partitioner.split("+")) & set(missing)]
    return {
        "neurons": NEURONS,
        "radices": RADICES,
        "layers": layers,
        "workers": WORKERS,
        "threads": 1,
        "seeds": list(range(seeds)),
        "missing": missing,
        "environment": environment("pymetis", "mtkahypar", "ortools", "numba"),
        "rows": rows,
        "bars": _bars(rows),
        "chains": [_look_ahead(chain, way, seed) for chain in chains for way in ways for seed in range(seeds)],
    }


def _is_there(partitioner: str) -> bool:
    return registry.is_installed("partitioners", partitioner)


def _forward(layers: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row a way: volume of all layers in values, seconds, and volume by kind of layer."""
    weights = list(radix_net(RADICES, layers, seed=seed))
    yield {"row": "by its structure", "seed": seed, **_volumes(structured(layers)), "seconds": None}
    ways: dict[str, Place] = {name: _by_partitioner(name) for name in (OURS, "alternate") if _is_there(name)}
    if _is_there("metis"):
        ways[PLAIN_METIS] = _by_plain_metis
    if _is_there("mt-kahypar"):
        ways |= {f"{THEIRS}, {preset}": _by_one_partition(preset) for preset in PRESETS}
    for name, place in ways.items():
        _placed(weights[:1], place, seed)  # the first call loads the library
        began = time.perf_counter()
        volumes = _placed(weights, place, seed)
        yield {"row": name, "seed": seed, **_volumes(volumes), "seconds": time.perf_counter() - began}


def _placed(weights: Sequence[sparse.csr_array], place: Place, seed: int) -> list[float]:
    """Values that each layer receives, the layers placed one after the other."""
    volumes = []
    owner = np.arange(NEURONS) * WORKERS // NEURONS
    for weight in weights:
        problem = LayerProblem.create(weight, WORKERS, input_owner=owner, value_bytes=1)
        owner = place(problem, seed)
        volumes.append(nets(problem).cost(owner))
    return volumes


def structured(layers: int) -> list[float]:
    """Values that each layer of the network in its natural order receives, cut by hand.

    Layers of stride 1 are cut into contiguous runs, those of stride 32 by the residue modulo 32, by which their
    neurons read the same inputs. A figure to compare with, no bound: the first layer costs 8 · 31, one of stride 32
    costs 32 groups · 28 inputs that are not at home, the later ones of stride 1 cost 8 runs · 159 inputs, of which
    159 in all are at home.
    """
    volumes = []
    natural = np.arange(NEURONS)
    run, residue = natural * WORKERS // NEURONS, natural % RADICES[0] * WORKERS // RADICES[0]
    owner = run
    for number, weight in enumerate(_in_natural_order(layers)):
        problem = LayerProblem.create(weight, WORKERS, input_owner=owner, value_bytes=1)
        owner = run if number % len(RADICES) == 0 else residue
        volumes.append(nets(problem).cost(owner))
    return volumes


def _in_natural_order(layers: int) -> Iterator[sparse.csr_array]:
    strides = np.cumprod([1, *RADICES[:-1]])
    for number in range(layers):
        place = number % len(RADICES)
        yield radix_layer(NEURONS, RADICES[place], int(strides[place]))


def _volumes(volumes: Sequence[float]) -> dict[str, Any]:
    return {
        "volume": sum(volumes),
        "first": volumes[0],
        "odd": fmean(volumes[1::2]) if len(volumes) > 1 else None,
        "even": fmean(volumes[2::2]) if len(volumes) > 2 else None,
    }


def _by_one_partition(preset: str) -> Place:
    """One partition by Mt-KaHyPar in this process, so that no time goes into starting another."""
    from repurpose_opt_solvers.mt_kahypar_ import MtKaHyParEngine
    from repurpose_opt_solvers.terminals import repeats

    engine = MtKaHyParEngine((preset,), cycles=0, threads=1)

    def place(problem: LayerProblem, seed: int) -> NDArray[np.int64]:
        (found,) = repeats(problem, nets(problem), SolveOptions(seed=seed), None, engine)
        assert found.owner is not None
        return found.owner

    return place


def _by_partitioner(name: str) -> Place:
    def place(problem: LayerProblem, seed: int) -> NDArray[np.int64]:
        owner = solve_problem(problem, Lossless(), SolveOptions(seed=seed), partitioner=name).require().owner
        assert owner is not None
        return owner

    return place


def _by_plain_metis(problem: LayerProblem, seed: int) -> NDArray[np.int64]:
    """pymetis on the graph of inputs and neurons, as METIS is commonly used; balance repaired."""
    from repurpose_opt_solvers.metis_ import graph, partition, worker_of_part
    from repurpose_opt_solvers.transport import nearest_placement

    part = partition(graph(problem, Lossless()), seed)[: problem.m]
    owner = worker_of_part(problem, part)[part]
    repaired = nearest_placement(problem, owner, Lossless().assignment_cost(problem, owner, None)).owner
    assert repaired is not None
    return repaired


def _bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the seeds, ours by Mt-KaHyPar's preset of least volume, then least time; none where it is missing."""
    totals = {
        name: tuple(sum(row[figure] or 0.0 for row in rows if row["row"] == name) for figure in ("volume", "seconds"))
        for name in dict.fromkeys(row["row"] for row in rows)
    }
    theirs = [name for name in totals if name.startswith(THEIRS)]
    if not theirs or OURS not in totals:
        return []
    best = min(theirs, key=lambda name: totals[name])
    (volume, seconds), (their_volume, their_seconds) = totals[OURS], totals[best]
    return [
        bar(f"volume of {OURS} relative to {best}", volume / their_volume, most=MOST_VOLUME),
        bar(f"seconds of {OURS} relative to {best}", seconds / their_seconds, most=MOST_SECONDS),
    ]


def _look_ahead(chain: Chain, way: Way, seed: int) -> dict[str, Any]:
    """Volume in values of both starts, and after their sweeps."""
    began = time.perf_counter()
    solution = solve_network(
        chain.weights(seed),
        WORKERS,
        partitioner=way.partitioner,
        value_bytes=1,
        time_limit=way.time_limit,
        seed=seed,
    )
    seconds = time.perf_counter() - began
    volume = solution.stats["volume"]
    at_once = volume.get("metis", [None])
    return {
        "chain": chain.name,
        "neurons": chain.neurons,
        "density": chain.density,
        "partitioner": way.partitioner,
        "time_limit": way.time_limit,
        "seed": seed,
        "forward": volume["forward"][0],
        "forward_look_ahead": volume["forward"][-1],
        "at_once": at_once[0],
        "at_once_look_ahead": at_once[-1],
        "best": solution.volume,
        "violations": len(solution.violations),
        "seconds": seconds,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown; the bars count with all layers and three seeds only."""
    title, *about = str(__doc__).strip().split("\n")
    lines = ["# Whole networks", "", title, *about, "", "## RadiX-Net, layer by layer", ""]
    header = ("way", "volume, values", "first layer", "layers of stride 32", "of stride 1, but the first", "seconds")
    cells = []
    for name in dict.fromkeys(row["row"] for row in report["rows"]):
        same = [row for row in report["rows"] if row["row"] == name]
        figures = [_mean(same, key) for key in ("volume", "first", "odd", "even")]
        cells.append([f"`{name}`" if _is_name(name) else name, *figures, _mean(same, "seconds", 2)])
    lines += [*table(header, cells), ""]
    is_full = report["layers"] == LAYERS and len(report["seeds"]) >= 3
    lines += map(bar_line, report["bars"]) if is_full else ["The bars count for all layers and three seeds only."]
    lines += ["", "## Chains of four layers, with a look ahead", ""]
    titles = ("chain", "partitioner", "limit, s", "forward", "+ look ahead", "at once", "+ look ahead", "best", "s")
    keys = ("forward", "forward_look_ahead", "at_once", "at_once_look_ahead", "best")
    cells = []
    for kind in dict.fromkeys((row["chain"], row["partitioner"]) for row in report["chains"]):
        same = [row for row in report["chains"] if (row["chain"], row["partitioner"]) == kind]
        figures = [_mean(same, key) for key in keys]
        cells.append([kind[0], f"`{kind[1]}`", f"{same[0]['time_limit']:g}", *figures, _mean(same, "seconds", 1)])
    lines += table(titles, cells)
    return "\n".join([*lines, "", *_settings(report)])


def _settings(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"`{report['command']}`: {report['layers']} layers, P = {report['workers']}, means over seeds "
        f"{', '.join(map(str, report['seeds']))}, one thread. "
        + machine_line(report["environment"], "pymetis", "mtkahypar", "ortools", "numba")
    )
    if report["missing"]:
        yield f"Not installed: {', '.join(report['missing'])}."


def _is_name(row: str) -> bool:
    return row in registry.names("partitioners")


def _mean(rows: Sequence[dict[str, Any]], key: str, digits: int = 0) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    return f"{fmean(values):,.{digits}f}" if values else "–"


if __name__ == "__main__":
    sys.exit(main())
