"""A job of `links`: which peers P processes run on which link, started by the parent and read by each process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.processes.launch import loopback
from repurpose_opt_benchmarks import ONE_THREAD
from repurpose_opt_benchmarks.links_namespaces import LINKS, address, namespaces

Row = dict[str, Any]
PROCESS = "repurpose_opt_benchmarks.links_process"
_PORT = 29500
"""Of rank 0 in its own namespace."""
_SECONDS_TO_END = 10.0


@dataclass(frozen=True)
class Job:
    """What P processes do together. Each peer becomes a row as soon as it is done."""

    kind: str
    """times: all peers, one after the other, batch by batch; alone: one peer, its start, memory and answers; odd: one
    way to run an odd network, against one process."""
    link: str
    """Key of LINKS."""
    round: int
    n_workers: int
    batch_size: int
    peers: tuple[str, ...]
    batches: int
    """Timed."""
    warm_up: int
    """Batches before them."""
    folder: str
    """Of the plans."""
    rows: str
    """File of JSON lines to which worker 0 adds."""
    seconds: float
    """After which the processes are ended."""
    silence: float
    """Seconds after which a process gives up another one."""
    started: float = 0.0
    """`time.time()` when the first process was started."""

    @property
    def head(self) -> Row:
        """What all rows of the job have."""
        return {"kind": self.kind, "link": self.link, "batch_size": self.batch_size, "round": self.round}


def read_job(path: Path) -> Job:
    content = json.loads(path.read_text())
    return Job(**{**content, "peers": tuple(content["peers"])})


def run(job: Job, names: Sequence[str] | None) -> None:
    """Start the processes, in the namespaces `names` or on the loopback interface, and wait for them.

    Raises RepurposeError with what the first process that failed said last. No process is left.
    """
    with tempfile.TemporaryDirectory(prefix="links-") as temporary:
        path = Path(temporary) / "job.json"
        path.write_text(json.dumps(asdict(job) | {"started": time.time()}))
        errors = [Path(temporary) / f"stderr-{rank}" for rank in range(job.n_workers)]
        port = _free_port() if names is None else _PORT
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(job.n_workers):
                processes.append(_start(path, rank, job.n_workers, names, port, errors[rank]))
            failed = _first_failure(processes, job.seconds)
        finally:
            for process in processes:
                _end(process)
        if failed is not None:
            text = errors[failed].read_text(errors="replace").strip().splitlines()
            raise RepurposeError(_reason(failed, processes[failed].returncode, text))


def links_of(link: str, n_workers: int) -> AbstractContextManager[list[str] | None]:
    """The namespaces of a link; None on the loopback interface."""
    rate = LINKS[link].rate
    return nullcontext(None) if rate is None else namespaces(n_workers, rate)


def _start(
    path: Path, rank: int, size: int, names: Sequence[str] | None, port: int, errors: Path
) -> subprocess.Popen[bytes]:
    environment: Mapping[str, str] = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_PORT": str(port),
        "MASTER_ADDR": "127.0.0.1" if names is None else address(0),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **(loopback() if names is None else {"GLOO_SOCKET_IFNAME": "eth0"}),
    }
    inside = [] if names is None else ["ip", "netns", "exec", names[rank]]
    with errors.open("wb") as file:
        return subprocess.Popen(
            [*inside, sys.executable, "-m", PROCESS, str(path)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **ONE_THREAD, **environment},
        )


def _first_failure(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> int | None:
    """The rank that failed first; None when all are done."""
    deadline = time.monotonic() + seconds
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # A process killed by a signal is the cause of what the others see.
            return min(failed, key=lambda rank: (codes[rank] or 0, rank))
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            raise RepurposeError(f"no end within {seconds:g} seconds: the processes were ended")
        time.sleep(0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _reason(rank: int, code: int, lines: Sequence[str]) -> str:
    said = next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1] if lines else "")
    return f"worker {rank} ended with code {code}: {said.strip() or 'it said nothing'}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
