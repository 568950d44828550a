"""Run a plan on P processes of this machine, once or as a service."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.processes.client import Client
from repurpose_opt.runtime.processes.console import ERROR_PREFIX
from repurpose_opt.runtime.processes.options import WIRES
from repurpose_opt.runtime.storage import read_manifest, read_worker

INPUT, OUTPUT, REPORT, SOCKET = "input.npy", "output.npy", "report.json", "socket"
SILENCE_SHARE = 1 / 3
"""Of a client's timeout: then there is time for a restart and the answer."""
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
    directory: str | Path,
    inputs: NDArray[Any],
    *,
    batch_size: int = 256,
    timeout: float = 300.0,
    wire: str | None = None,
) -> RunResult:
    """Start torchrun on the loopback interface with one process for each worker of the plan, and wait for the answer.

    `inputs` is (samples, *input_shape); `wire` what messages are written in: float32, float16, bfloat16 or int8, None
    as the plan's weights. Raises PlanError for a damaged plan, RepurposeError with the worker's own line where a worker
    fails or the whole run takes longer than `timeout` seconds. The processes end before the call does.
    """
    plan = Path(directory)
    n_workers = _checked(plan, batch_size, timeout)
    with tempfile.TemporaryDirectory(prefix="repurpose-opt-") as name:
        folder = Path(name)
        np.save(folder / INPUT, inputs, allow_pickle=False)
        options = [f"--input={folder / INPUT}", f"--output={folder / OUTPUT}", f"--report={folder / REPORT}"]
        options += [f"--batch-size={batch_size}", f"--timeout={timeout}", *_wire(wire)]
        torchrun = _Torchrun(plan, n_workers, folder, options)
        try:
            torchrun.process.wait(timeout)
        except subprocess.TimeoutExpired:
            torchrun.end()
            reason = torchrun.reason() or "the processes were ended"
            raise RepurposeError(f"no answer within {timeout:g} seconds: {reason}") from None
        finally:
            torchrun.end()
        torchrun.check()
        report = json.loads((folder / REPORT).read_text())
        return RunResult(
            outputs=np.load(folder / OUTPUT),
            bytes_sent=np.array(report["bytes_sent"], dtype=np.int64),
            bytes_predicted=np.array(report["bytes_predicted"], dtype=np.int64),
            seconds=report["seconds"],
            messages=report["messages_per_batch"],
        )


class Service:
    """The processes of a plan on this machine, which stay and answer batches; a context manager that ends them.

    Several threads may ask; batches are answered one after the other.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        batch_size: int = 256,
        timeout: float = 300.0,
        max_restarts: int = 0,
        wire: str | None = None,
    ) -> None:
        """Start torchrun with one process for each worker of the plan.

        A batch of more than `batch_size` samples is cut into pieces. `timeout` in seconds: for one answer, the start
        of the processes included; a third of it is how long a worker waits for a silent one. `max_restarts`: how often
        all workers are started again after one of them failed. `wire` as for `run_plan`. Raises PlanError for a damaged
        plan.
        """
        plan = Path(directory)
        n_workers = _checked(plan, batch_size, timeout)
        if max_restarts < 0:
            raise InvalidArgument("max_restarts", max_restarts, "a whole number ≥ 0")
        self.report: dict[str, Any] | None = None
        """After the end: samples, batches, throughput, latency and bytes, as --report writes them."""
        self._folder = tempfile.TemporaryDirectory(prefix="repurpose-opt-")
        folder = Path(self._folder.name)
        options = ["--serve", f"--listen={folder / SOCKET}", f"--report={folder / REPORT}"]
        options += [f"--batch-size={batch_size}", f"--timeout={timeout * SILENCE_SHARE}", *_wire(wire)]
        self.address = str(folder / SOCKET)
        """Where other clients can ask; only this user may."""
        self._torchrun = _Torchrun(plan, n_workers, folder, options, max_restarts)
        self._client = Client(self.address, timeout=timeout)
        self._lock = threading.Lock()

    def answer(self, batch: NDArray[Any]) -> NDArray[Any]:
        """The outputs (samples, …) for a batch (samples, *input_shape); a batch may be computed twice after a restart.

        Raises RepurposeError where the plan cannot take the batch, or a worker failed and is not started again, with
        the worker's own line, or no answer comes within the timeout.
        """
        with self._lock:
            return self._client.answer(batch, self._torchrun.check)

    def close(self) -> None:
        """End the processes, after the batch in hand."""
        self._client.close()
        self._torchrun.end()
        report = Path(self._folder.name) / REPORT
        if report.exists():
            self.report = json.loads(report.read_text())
        self._folder.cleanup()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _wire(name: str | None) -> list[str]:
    if name is not None and name not in WIRES:
        raise InvalidArgument("wire", repr(name), f"None, {', '.join(WIRES)}")
    return [] if name is None else [f"--wire={name}"]


def _checked(plan: Path, batch_size: int, timeout: float) -> int:
    """The number of workers of a plan, all of whose files are as they should be."""
    if batch_size < 1:
        raise InvalidArgument("batch_size", batch_size, "a whole number ≥ 1")
    if not timeout > 0:
        raise InvalidArgument("timeout", timeout, "seconds > 0")
    manifest = read_manifest(plan)
    for worker in range(manifest.n_workers):
        read_worker(plan, manifest, worker)
    return manifest.n_workers


class _Torchrun:
    """torchrun and its workers on the loopback interface."""

    def __init__(self, plan: Path, n_workers: int, folder: Path, options: Sequence[str], max_restarts: int = 0) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n_workers}"]
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        logs = [f"--max-restarts={max_restarts}", f"--log-dir={folder / 'logs'}"]
        worker = ["-m", "repurpose_opt.runtime.processes.worker", str(plan)]
        # P processes share this machine's cores: threads of their own would only get in each other's way.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"} | loopback()
        self._errors = folder / "stderr"
        with self._errors.open("wb") as file:
            self.process = subprocess.Popen(
                [*torchrun, *rendezvous, *logs, *worker, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=file,
                env=environment,
            )

    def check(self) -> None:
        """Raises RepurposeError, with the line of the worker that failed, where torchrun has ended with an error."""
        code = self.process.poll()
        if code is None or code == 0:
            return
        printed = self._errors.read_text(errors="replace")
        raise RepurposeError(self.reason() or f"torchrun ended with code {code}: …{printed[-1000:]}")

    def reason(self) -> str | None:
        """The line in which a worker said why the run failed, of several runs the last one."""
        lines = self._errors.read_text(errors="replace").splitlines()
        return next((line.partition(ERROR_PREFIX)[2] for line in reversed(lines) if ERROR_PREFIX in line), None)

    def end(self) -> None:
        """End torchrun, which ends its workers; each of them is in a session of its own, out of our reach."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def loopback() -> dict[str, str]:
    """Environment in which gloo talks over the loopback interface only."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    return {"GLOO_SOCKET_IFNAME": names.pop()} if names else {}
