"""One exchange of four workers: an all-to-all call against a call for each message, by who sends to whom.

The runtime uses the all-to-all where every worker sends something to every other one and no message is large. Links are
the loopback interface and, where root is allowed to make network namespaces, interfaces that send at most 100 MB/s.
"""

from __future__ import annotations

import argparse
import ctypes
import os
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

from repurpose_opt.runtime.processes.transport import start
from repurpose_opt_benchmarks import RESULTS, environment
from repurpose_opt_benchmarks.links_jobs import links_of
from repurpose_opt_benchmarks.links_namespaces import FAST, LOOPBACK, Link, address, reason_without
from repurpose_opt_benchmarks.report import machine_line, table, write

WORKERS = 4
BYTES = (64, 4096, 1 << 15, 1 << 17, 1 << 20, 1 << 22)
"""Of one message."""
ITEMSIZE = 4
REPEATS = 100
TIMEOUT = timedelta(seconds=60)
_NETWORK = 0x40000000
"""CLONE_NEWNET of Linux."""


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
    sizes, repeats = (BYTES[:2], 5) if args.quick else (BYTES, REPEATS)
    without = reason_without()
    links = [LOOPBACK] if without else [LOOPBACK, FAST]
    report = {
        "command": "python -m repurpose_opt_benchmarks exchanges",
        "environment": environment("torch"),
        "without_namespaces": without,
        "rows": [row for link in links for row in measured(link, sizes, repeats)],
    }
    print(markdown(report))
    folder = args.output or (None if args.quick else RESULTS)
    if folder is not None:
        write(folder, "exchanges", report, markdown(report))
    return 0


def measured(link: Link, sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row for each peer graph and size, as worker 0 found them. Raises RepurposeError without namespaces."""
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with links_of(link.name, WORKERS) as names:
        spawn(_worker, (link.name, names, _port(), tuple(sizes), repeats, queue), nprocs=WORKERS)
    rows: list[dict[str, Any]] = queue.get()
    return rows


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _worker(
    rank: int, link: str, names: Sequence[str] | None, port: int, sizes: Sequence[int], repeats: int, queue: Any
) -> None:
    host = "127.0.0.1"
    if names is not None:
        _enter(names[rank])
        host = address(0)
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    torch.set_num_threads(1)
    where = f"tcp://{host}:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=WORKERS, timeout=TIMEOUT)
    rows = [
        {"link": link, "peers": name, "bytes": size} | _figures(rank, peers(name) * size, repeats)
        for name in PEERS
        for size in sizes
    ]
    if rank == 0:
        queue.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def _enter(namespace: str) -> None:
    """This thread, and those that it starts; Python has os.setns from 3.12 on."""
    handle = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, _NETWORK):
        raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    os.close(handle)


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
    all_to_all, one_by_one = (statistics.median(times) for times in taken.tolist())
    return {"all_to_all": all_to_all, "one_by_one": one_by_one}


def markdown(report: dict[str, Any]) -> str:
    header = ("link", "who sends", "bytes a message", "all-to-all, ms", "one by one, ms", "one by one / all-to-all")
    lines = ["# Exchanges", "", *str(__doc__).strip().split("\n"), ""]
    lines += table(header, [_cells(row) for row in report["rows"]])
    lines += ["", "Median over exchanges, of the slowest worker.", ""]
    if report["without_namespaces"]:
        lines += [f"No slow link: {report['without_namespaces']}.", ""]
    lines += [f"`{report['command']}`", ""]
    return "\n".join([*lines, machine_line(report["environment"], "torch")])


def _cells(row: dict[str, Any]) -> list[str]:
    all_to_all, one_by_one = row["all_to_all"], row["one_by_one"]
    times = [f"{1000 * seconds:.3f}" for seconds in (all_to_all, one_by_one)]
    return [row["link"], row["peers"], f"{row['bytes']:,}", *times, f"{one_by_one / all_to_all:.2f}"]


if __name__ == "__main__":
    sys.exit(main())
