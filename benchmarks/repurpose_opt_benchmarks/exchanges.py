"""One exchange of P workers on loopback: an all-to-all call against a call for each peer, by who sends to whom.

The runtime uses the all-to-all where every worker sends something to every other one, else calls for the peers alone.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from numpy.typing import NDArray
from torch.multiprocessing.spawn import spawn

from repurpose_opt.runtime.transport import start
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.report import machine_line, table, write

WORKERS = 4
BYTES = (64, 4096, 1 << 16, 1 << 20)
"""Of one message."""
ITEMSIZE = 4
TIMEOUT = timedelta(seconds=60)


def peers(name: str) -> NDArray[np.int64]:
    """(P, P) 1 where worker p (row) sends to worker k (column)."""
    others = 1 - np.eye(WORKERS, dtype=np.int64)
    if name == "every pair":
        return others
    if name == "all to one":
        return others * (np.arange(WORKERS) == 0)
    if name == "ring":
        return np.roll(np.eye(WORKERS, dtype=np.int64), 1, axis=1)
    assert name == "one pair"
    sent = np.zeros_like(others)
    sent[1, 0] = 1
    return sent


PEERS = ("every pair", "ring", "all to one", "one pair")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m repurpose_opt_benchmarks exchanges", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few exchanges of two sizes; writes no results")
    parser.add_argument("--output", type=Path, help="folder for the report")
    args = parser.parse_args(argv)
    sizes, repeats = (BYTES[:2], 5) if args.quick else (BYTES, 300)
    report = {
        "command": "python -m repurpose_opt_benchmarks exchanges",
        "environment": environment("torch"),
        "rows": measured(sizes, repeats),
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "exchanges", report, markdown(report))
    return 0


def measured(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each peer graph and size, as worker 0 found them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    spawn(_worker, (port, tuple(sizes), repeats, queue), nprocs=WORKERS)
    rows: list[dict[str, Any]] = queue.get()
    return rows


def _worker(rank: int, port: int, sizes: Sequence[int], repeats: int, queue: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORKERS, timeout=TIMEOUT)
    rows = [
        {"peers": name, "bytes": size} | _figures(rank, peers(name) * size, repeats) for name in PEERS for size in sizes
    ]
    if rank == 0:
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _figures(rank: int, traffic: NDArray[np.int64], repeats: int) -> dict[str, float]:
    """Median seconds of an exchange by each way, in turns; each is over when the slowest worker is done."""
    sent_counts, received_counts = (traffic[rank] // ITEMSIZE).tolist(), (traffic[:, rank] // ITEMSIZE).tolist()
    sent, received = torch.zeros(sum(sent_counts)), torch.zeros(sum(received_counts))
    taken = torch.zeros(2, repeats, dtype=torch.float64)
    for i in range(repeats):
        for way, is_all_to_all in enumerate((True, False)):
            dist.barrier()
            started = time.perf_counter()
            start(received, sent, received_counts, sent_counts, is_all_to_all)()
            taken[way, i] = time.perf_counter() - started
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    all_to_all, by_peer = (statistics.median(times) for times in taken.tolist())
    return {"all_to_all": all_to_all, "by_peer": by_peer}


def markdown(report: dict[str, Any]) -> str:
    header = ("who sends", "bytes a message", "all-to-all, ms", "by peer, ms", "by peer / all-to-all")
    lines = ["# Exchanges", "", *str(__doc__).strip().split("\n"), ""]
    lines += table(header, [_cells(row) for row in report["rows"]])
    lines += ["", "Median over exchanges, of the slowest worker.", "", f"`{report['command']}`", ""]
    return "\n".join([*lines, machine_line(report["environment"], "torch")])


def _cells(row: dict[str, Any]) -> list[str]:
    all_to_all, by_peer = row["all_to_all"], row["by_peer"]
    times = [f"{1000 * seconds:.3f}" for seconds in (all_to_all, by_peer)]
    return [row["peers"], f"{row['bytes']:,}", *times, f"{by_peer / all_to_all:.2f}"]


if __name__ == "__main__":
    sys.exit(main())
