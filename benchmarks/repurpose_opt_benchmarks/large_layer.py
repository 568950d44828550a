"""A generated layer of LLaMA-7B's feed-forward shape, 11008 × 4096 float32, on 8 workers: seconds, memory and error.

Each measurement runs in a process of its own with one thread. `diagonal` is solve_layer with diagonal_moments=True,
`full` the default on full moments, `group-omp` the default with that pruner alone. Memory is how far the peak of the
resident set rises above what the weight and the samples take already (VmHWM, set back before the solve).
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt import LayerProblem, LayerSolution, Moments, SolveOptions, Volume, metrics, solve_layer
from repurpose_opt.repair import corrected_bias, refit
from repurpose_opt.solve import solve_problem
from repurpose_opt_benchmarks import ONE_THREAD, RESULTS, environment
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

SHAPE = (11008, 4096)
SIZES = (512, 1024, 2048, 4096)
QUICK_SIZES = (64, 128)
MODES = ("diagonal", "group-omp", "full")
WORKERS, BUDGET, SEED = 8, 0.05, 0
SAMPLES_PER_COLUMN = 2
BATCH = 256
HELD_OUT = 1024
SINGULAR_VALUE_EXPONENT, EIGENVALUE_EXPONENT = 0.5, 1.0
"""The i-th singular value of W falls with i^-0.5, the i-th eigenvalue of C with i^-1, in unrelated bases."""
PARTS = {
    "group-omp": ("group_omp_.py", "solve"),
    "swaps, tabu": ("swaps_.py", "solve"),
    "placement costs": ("repair.py", "compensated_cost"),
    "assignment": ("transport.py", "assign"),
    "refit": ("repair.py", "refit"),
    "judging": ("metrics.py", "weighted_error"),
}
"""Where a solve on full moments spends its time: functions that do not call each other, by file and name."""
_MOST_SECONDS = {"diagonal": 30.0, "full": 600.0}
_MOST_PEAK = 3.0
GROWING = ("calibration_seconds", "solve_seconds", "cpu_seconds")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks large-layer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 and 128 inputs; writes no results")
    parser.add_argument("--most-inputs", type=int, default=SIZES[-1], metavar="N", help="leave out larger layers")
    parser.add_argument("--output", type=Path, help="folder for large-layer.json and large-layer.md")
    args = parser.parse_args(argv)
    if args.most_inputs < SIZES[1]:
        parser.error(f"--most-inputs {args.most_inputs}: at least {SIZES[1]}, growth needs two sizes")
    sizes = QUICK_SIZES if args.quick else [n for n in SIZES if n <= args.most_inputs]
    rows = [measure_alone(__spec__.name, mode, n) for n in sizes for mode in MODES]
    report = {
        "command": "python -m repurpose_opt_benchmarks large-layer"
        + (f" --most-inputs {args.most_inputs}" if args.most_inputs < SIZES[-1] else ""),
        "environment": environment(),
        "bars": list(_bars(rows)),
        "exponents": {mode: exponents([row for row in rows if row["mode"] == mode]) for mode in MODES},
        "rows": rows,
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "large-layer", report, markdown(report))
    return 0


def measure_alone(module: str, mode: str, n: int) -> dict[str, Any]:
    """`measure` of a module in a fresh process with one thread."""
    code = f"import json; from {module} import measure; print(json.dumps(measure{mode, n}))"
    environ = {**os.environ, **ONE_THREAD}
    done = subprocess.run([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{mode}, n = {n}: {row['seconds']:.1f} s, NMSE {row['nmse']:.4f}", file=sys.stderr)
    return row


def measure(mode: str, n: int) -> dict[str, Any]:
    """One solve, its time by parts, its peak memory and its errors on the calibration and the held-out samples."""
    layer = generate(n)
    _solve_diagonal(Layer(layer.weight[:64, :64], layer.samples[:128, :64], layer.held_out[:, :64]))  # imports
    load = os.getloadavg()[0]
    before = restart_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    measured = (_measure_diagonal if mode == "diagonal" else _measure_full)(layer, mode)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    peak = resident("VmHWM") - before
    solution = measured.solution
    assert solution.bias is not None
    row = {
        "mode": mode,
        "neurons": len(layer.weight),
        "inputs": n,
        "samples": len(layer.samples),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "load_before": load,
        "calibration_seconds": measured.calibration_seconds,
        "solve_seconds": seconds - measured.calibration_seconds,
        "parts": measured.parts,
        "calls": measured.calls,
        "peak_bytes": peak,
        "peak_per_weight_bytes": peak / layer.weight.nbytes,
        "objective": solution.objective,
        "nmse": solution.nmse,
        "held_out_nmse": nmse_on(layer.held_out, layer.weight, solution.weight, solution.bias),
        "volume_fraction": solution.volume / solution.problem.direct_volume,
        "violations": len(solution.violations),
        "termination": str(solution.termination),
        "shrinkage": solution.problem.moments.shrinkage,
        "rounds": solution.stats.get("rounds"),
    }
    return row | (_refitted_diagonal(layer, solution.problem) if mode == "full" else {})


@dataclass(frozen=True)
class Layer:
    weight: NDArray[np.float32]
    samples: NDArray[np.float32]
    held_out: NDArray[np.float32]

    def batches(self) -> Iterator[NDArray[np.float32]]:
        return (self.samples[first : first + BATCH] for first in range(0, len(self.samples), BATCH))


def generate(n: int) -> Layer:
    """n inputs and as many neurons as LLaMA-7B's shape gives them, with decaying spectra; the same ones every time."""
    rng = np.random.default_rng([SEED, n])
    m = round(n * SHAPE[0] / SHAPE[1])
    order = np.arange(1, n + 1, dtype=np.float32)
    right = rng.standard_normal((n, n), dtype=np.float32) * (order**-SINGULAR_VALUE_EXPONENT)[:, None]
    weight = rng.standard_normal((m, n), dtype=np.float32) @ right / np.float32(n)
    basis = np.linalg.qr(rng.standard_normal((n, n), dtype=np.float32))[0] * order ** (-EIGENVALUE_EXPONENT / 2)
    held_out = min(HELD_OUT, SAMPLES_PER_COLUMN * n)
    samples = rng.standard_normal((SAMPLES_PER_COLUMN * n + held_out, n), dtype=np.float32) @ basis.T
    return Layer(weight, samples[:-held_out], samples[-held_out:])


@dataclass(frozen=True)
class _Measured:
    solution: LayerSolution
    calibration_seconds: float
    parts: dict[str, float]
    calls: dict[str, int]


def _measure_diagonal(layer: Layer, _: str) -> _Measured:
    profile = cProfile.Profile()
    solution = profile.runcall(_solve_diagonal, layer)
    found = Profile(profile)
    return _Measured(solution, found.seconds("moments.py", "from_batches"), {}, {})


def _solve_diagonal(layer: Layer) -> LayerSolution:
    solution = solve_layer(
        layer.weight, WORKERS, inputs=layer.batches(), diagonal_moments=True, formulation=Volume(budget=BUDGET)
    )
    assert solution.nmse >= 0  # computed when it is asked for: part of the time and the memory
    return solution


def _measure_full(layer: Layer, mode: str) -> _Measured:
    """What solve_layer does, step by step, under a profiler: its overhead is below a hundredth on such arrays."""
    began = time.perf_counter()
    moments = Moments.from_batches(layer.batches())
    calibrated = time.perf_counter()
    problem = LayerProblem.create(layer.weight, WORKERS, moments=moments)
    problem.predicted_moment, problem.output_energy  # noqa: B018  computed once, by whichever part needs them first
    prepared = time.perf_counter()
    profile = cProfile.Profile()
    pruner = "auto" if mode == "full" else mode
    solution = profile.runcall(solve_problem, problem, Volume(budget=BUDGET), SolveOptions(seed=SEED), pruner=pruner)
    assert solution.nmse >= 0
    solved = time.perf_counter()
    found = Profile(profile)
    parts = {"products": prepared - calibrated}
    parts |= {name: found.seconds(*place) for name, place in PARTS.items() if mode == "full" or name != "swaps, tabu"}
    parts["rest"] = solved - calibrated - sum(parts.values())
    calls = {
        "group-omp": found.calls("group_omp_.py", "solve"),
        "group-omp steps": found.calls("group_omp_.py", "add"),
    }
    if mode == "full":
        calls |= {"swaps, tabu": found.calls("swaps_.py", "solve"), "moves": found.calls("transfer_search.py", "_make")}
    return _Measured(solution, calibrated - began, parts, calls)


class Profile:
    """Cumulative seconds and calls of functions, by the names of their file and themselves."""

    def __init__(self, profile: cProfile.Profile) -> None:
        entries = pstats.Stats(profile).stats  # type: ignore[attr-defined]
        self._of = {(Path(file).name, name): entry for (file, _, name), entry in entries.items()}

    def seconds(self, file: str, function: str) -> float:
        return float(self._of[file, function][3])

    def has(self, file: str, function: str) -> bool:
        """Whether it was called."""
        return (file, function) in self._of

    def calls(self, file: str, function: str) -> int:
        return int(self._of[file, function][1])


def _refitted_diagonal(layer: Layer, problem: LayerProblem) -> dict[str, float]:
    """Errors of the owners and transfers that the diagonal moments choose, refitted with the full ones."""
    choice = _solve_diagonal(layer)
    assert choice.owner is not None
    weight = refit(problem, choice.owner, choice.transfers)
    bias = corrected_bias(problem, weight)
    return {
        "refitted_diagonal_nmse": metrics.nmse(problem, choice.owner, weight, bias),
        "refitted_diagonal_held_out_nmse": nmse_on(layer.held_out, layer.weight, weight, bias),
    }


def nmse_on(samples: NDArray[np.float32], weight: Any, pruned: Any, bias: NDArray[np.float64]) -> float:
    output = samples @ weight.T
    error = np.square(output - samples @ pruned.T - bias.astype(np.float32)).sum(dtype=np.float64)
    return float(error / np.square(output).sum(dtype=np.float64))


def resident(key: str) -> int:
    """Bytes of VmHWM, the peak of the resident set, or VmRSS, what it is now; 0 where Linux's /proc is not there."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


def restart_peak() -> int:
    """VmHWM starts anew from what is resident now, in bytes."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return resident("VmHWM")


def _bars(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """None where the layer of the full size was left out."""
    at_size = {row["mode"]: row for row in rows if (row["neurons"], row["inputs"]) == SHAPE}
    for mode, most in _MOST_SECONDS.items():
        if mode in at_size:
            yield bar(f"seconds, {mode} moments", at_size[mode]["seconds"], most=most)
    if "diagonal" in at_size:
        yield bar(
            "peak memory increase / W.nbytes, diagonal moments",
            at_size["diagonal"]["peak_per_weight_bytes"],
            most=_MOST_PEAK,
        )


def exponents(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """e of seconds ∝ inputs^e between the two largest layers of one mode; CPU seconds depend least on the load."""
    small, large = sorted(rows, key=lambda row: row["inputs"])[-2:]
    doublings = np.log2(large["inputs"] / small["inputs"])
    return {name: float(np.log2(large[name] / small[name]) / doublings) for name in GROWING}


def markdown(report: dict[str, Any]) -> str:
    rows = report["rows"]
    header = ["inputs", "mode", "calibration, s", "solve, s", "CPU, s in all", "peak / W.nbytes"]
    header += ["NMSE", "held out", "rounds", "moves"]
    cells: list[tuple[str, ...]] = []
    for mode in MODES:
        cells += [
            (
                str(row["inputs"]), mode, f"{row['calibration_seconds']:.2f}", f"{row['solve_seconds']:.2f}",
                f"{row['cpu_seconds']:.2f}", f"{row['peak_per_weight_bytes']:.2f}", f"{row['nmse']:.4f}",
                f"{row['held_out_nmse']:.4f}", str(row["rounds"]), str(row["calls"].get("moves", "–")),
            )
            for row in rows
            if row["mode"] == mode
        ]  # fmt: skip
        grown = [f"n^{report['exponents'][mode][name]:.1f}" for name in GROWING]
        cells.append(("last two", mode, *grown, *[""] * 5))
    lines = ["# Large layer", "", *str(__doc__).strip().split("\n"), "", _setting(), "", *table(header, cells), ""]
    lines += [*_errors(rows), ""]
    parts = [row for row in rows if row["inputs"] == rows[-1]["inputs"] and row["parts"]]
    names = list(dict.fromkeys(name for row in parts for name in row["parts"]))
    header = ["seconds", *(f"{row['mode']}, n = {row['inputs']}" for row in parts)]
    cells = [(name, *(_part(row, name) for row in parts)) for name in names]
    lines += [*table(header, cells), "", *map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    lines.append(f"Load average before each measurement: at most {max(row['load_before'] for row in rows):.1f}.")
    return "\n".join([*lines, machine_line(report["environment"])])


def _setting() -> str:
    return (
        f"W: random bases, singular values ∝ i^-{SINGULAR_VALUE_EXPONENT:g}; samples: Gaussian, eigenvalues of their "
        f"covariance ∝ i^-{EIGENVALUE_EXPONENT:g}, {SAMPLES_PER_COLUMN} samples an input (so full moments are shrunk) "
        f"in batches of {BATCH}; P = {WORKERS}, budget {BUDGET:.0%}; neurons = inputs · {SHAPE[0]} / {SHAPE[1]}. "
        f"Held out: at most {HELD_OUT} other samples."
    )


def _errors(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The full mode against the others; `refitted diagonal`: the choice on diagonal moments, refitted on full ones."""
    header = ["inputs", "refitted diagonal", "group-omp", "full"]
    header += [f"held out: {mode}" for mode in ("diagonal", "refitted diagonal", "group-omp", "full")]
    cells = []
    for full in (row for row in rows if row["mode"] == "full"):
        same = {row["mode"]: row for row in rows if row["inputs"] == full["inputs"]}
        errors = (
            full["refitted_diagonal_nmse"],
            same["group-omp"]["nmse"],
            full["nmse"],
            same["diagonal"]["held_out_nmse"],
            full["refitted_diagonal_held_out_nmse"],
            same["group-omp"]["held_out_nmse"],
            full["held_out_nmse"],
        )
        cells.append((str(full["inputs"]), *(f"{error:.4f}" for error in errors)))
    return table(header, cells)


def _part(row: dict[str, Any], name: str) -> str:
    if name not in row["parts"]:
        return "–"
    share = row["parts"][name] / row["seconds"]
    return f"{row['parts'][name]:.1f} ({share:.0%})"


if __name__ == "__main__":
    sys.exit(main())
