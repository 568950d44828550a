"""Run a plan on P processes of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.runtime.group import LOST_CONTACT
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.storage import read_manifest, read_worker
from repurpose_opt.runtime.worker import ERROR_PREFIX

INPUT, OUTPUT, REPORT = "input.npy", "output.npy", "report.json"
SECONDS_TO_END = 40.0
"""torchrun gives its workers 30 seconds to end before it kills them."""


@dataclass(frozen=True, eq=False)
class RunResult:
    """What P processes answered and what they sent."""

    outputs: NDArray[Any]
    """(samples, …)"""
    bytes_sent: Indices
    """(P, P) counted from the tensors that worker p (row) handed over for worker k (column)."""
    bytes_predicted: Indices
    """(P, P) by the plan."""
    seconds: float
    """From the first sample to the last, without starting the processes."""
    messages: int
    """Messages for one batch, over all layers and pairs of workers."""


def run_plan(
    directory: str | Path, inputs: NDArray[Any], *, batch_size: int = 256, timeout: float = 300.0
) -> RunResult:
    """Start torchrun on the loopback interface with one process for each worker of the plan, and wait for the answer.

    `inputs` is (samples, *input_shape). Raises PlanError for a damaged plan, RepurposeError with the worker's own line
    where a worker fails or the whole run takes longer than `timeout` seconds. The processes end before the call does.
    """
    if batch_size < 1:
        raise InvalidArgument("batch_size", batch_size, "a whole number ≥ 1")
    if not timeout > 0:
        raise InvalidArgument("timeout", timeout, "seconds > 0")
    plan = Path(directory)
    manifest = read_manifest(plan)
    for worker in range(manifest.n_workers):
        read_worker(plan, manifest, worker)
    with tempfile.TemporaryDirectory(prefix="repurpose-opt-") as name:
        folder = Path(name)
        np.save(folder / INPUT, inputs, allow_pickle=False)
        _run(_command(plan, manifest.n_workers, folder, batch_size, timeout), folder, timeout)
        report = json.loads((folder / REPORT).read_text())
        return RunResult(
            outputs=np.load(folder / OUTPUT),
            bytes_sent=np.array(report["bytes_sent"], dtype=np.int64),
            bytes_predicted=np.array(report["bytes_predicted"], dtype=np.int64),
            seconds=report["seconds"],
            messages=report["messages_per_batch"],
        )


def _command(plan: Path, n_workers: int, folder: Path, batch_size: int, timeout: float) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n_workers}"]
    loopback = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    worker = ["-m", "repurpose_opt.runtime.worker", str(plan)]
    files = [f"--input={folder / INPUT}", f"--output={folder / OUTPUT}", f"--report={folder / REPORT}"]
    options = [f"--batch-size={batch_size}", f"--timeout={timeout}"]
    return [*torchrun, *loopback, f"--log-dir={folder / 'logs'}", *worker, *files, *options]


def _run(command: list[str], folder: Path, timeout: float) -> None:
    errors = folder / "stderr"
    # P processes share this machine's cores: threads of their own would only get in each other's way.
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | loopback()
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, env=environment
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise RepurposeError(f"no answer within {timeout:g} seconds: the processes were ended") from None
        finally:
            _end(process)
    if code != 0:
        raise RepurposeError(_reason(errors.read_text(errors="replace"), code))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun, which ends its workers; each of them is in a session of its own, out of our reach."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _reason(errors: str, code: int) -> str:
    """The line in which a worker said why it failed; the end of what was printed where none did."""
    lines = [line.partition(ERROR_PREFIX)[2] for line in errors.splitlines() if ERROR_PREFIX in line]
    # Workers that lost contact are the consequence of one that failed for a reason of its own.
    causes = [line for line in lines if LOST_CONTACT not in line]
    if causes or lines:
        return (causes or lines)[0]
    return f"torchrun ended with code {code}: …{errors[-1000:]}"


def loopback() -> dict[str, str]:
    """Environment in which gloo talks over the loopback interface only."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    return {"GLOO_SOCKET_IFNAME": names.pop()} if names else {}
