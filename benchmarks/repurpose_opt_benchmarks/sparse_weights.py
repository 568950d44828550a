"""Weights in compressed rows (CSR) against dense ones, one thread: how many times faster, by share of nonzeros.

The runtime keeps a worker's weights in compressed rows where this says that they multiply faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repurpose_opt.runtime.sparse import compressed, is_faster_sparse
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.report import bar, bar_line, machine_line, table, write

SHAPES = ((64, 256), (128, 256), (128, 392), (256, 784), (1024, 1024), (1024, 4096))
SAMPLES = (1, 4, 16, 64, 256, 1024)
SHARES = (0.01, 0.03, 0.05, 0.1, 0.2, 0.5)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks sparse-weights", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shapes, repeats = (SHAPES[1:3], 3) if args.quick else (SHAPES, 15)
    rows = [figures(m, n, samples, repeats) for m, n in shapes for samples in SAMPLES]
    chosen = [ratio for row in rows for ratio, is_chosen in zip(row["ratios"], row["chosen"], strict=True) if is_chosen]
    report = {
        "command": "python -m repurpose_opt_benchmarks sparse-weights",
        "environment": environment("torch"),
        "bars": [bar("speed of compressed rows to dense, least where they are chosen", min(chosen), least=1.0)],
        "rows": rows,
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "sparse-weights", report, markdown(report))
    return 0


def figures(m: int, n: int, samples: int, repeats: int) -> dict[str, Any]:
    """Dense seconds / compressed seconds for every share of nonzeros, the two measured in turns."""
    generator = torch.Generator().manual_seed(0)
    inputs, bias = torch.randn(n, samples, generator=generator), torch.randn(m, 1, generator=generator)
    ratios, chosen = [], []
    for share in SHARES:
        kept = torch.rand(m, n, generator=generator) < share
        dense = torch.randn(m, n, generator=generator) * kept
        rows = compressed(dense)
        ways = (partial(torch.addmm, bias, dense, inputs), partial(_product, rows, inputs, bias))
        pairs = [tuple(seconds(way) for way in ways) for _ in range(repeats)]
        ratios.append(statistics.median(pair[0] for pair in pairs) / statistics.median(pair[1] for pair in pairs))
        chosen.append(is_faster_sparse(dense, samples))
    return {"m": m, "n": n, "samples": samples, "ratios": ratios, "chosen": chosen}


def _product(weight: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.mm(weight, inputs).add_(bias)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def markdown(report: dict[str, Any]) -> str:
    header = ("m × n", "samples", *(f"{share:.0%}" for share in SHARES))
    lines = ["# Sparse weights", "", *str(__doc__).strip().split("\n"), "Bold: where it does.", ""]
    lines += table(header, [_cells(row) for row in report["rows"]])
    lines += ["", *map(bar_line, report["bars"]), "", f"`{report['command']}`", ""]
    return "\n".join([*lines, machine_line(report["environment"], "torch")])


def _cells(row: dict[str, Any]) -> list[str]:
    ratios = [f"{ratio:.2f}" for ratio in row["ratios"]]
    marked = [f"**{text}**" if chosen else text for text, chosen in zip(ratios, row["chosen"], strict=True)]
    return [f"{row['m']} × {row['n']}", str(row["samples"]), *marked]


if __name__ == "__main__":
    sys.exit(main())
