"""Faults of workers: processes that are really killed, suspended, never started; a disk that is really full."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_plan import mlp, random_plan
from test_runtime import samples
from worker_pool import Ends, WorkerPool

P = 3
TIMEOUT = 3
HOST = re.escape(socket.gethostname())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a plan, whose outputs are on workers 1 and 2, and inputs for it."""
    random_plan(mlp([11, 9, 6]), P, workers=[[0, 1, 2], [0, 1, 2], [1, 2]]).save(tmp_path / "plan")
    np.save(tmp_path / "input.npy", samples(23, 11))
    return tmp_path


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A folder on a disk of 4 KB that has no place left; None where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or mount is None or subprocess.run([mount, *options], check=False).returncode != 0:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


class Faults:
    """Runs of a plan on workers of which one is sabotaged, and what must come of each."""

    def __init__(self, folder: Path, pool: WorkerPool) -> None:
        self.folder, self.pool = folder, pool
        self.service = [str(folder / "plan"), "--batch-size=7", f"--timeout={TIMEOUT}"]

    def run(self, name: str = "output", ranks: Sequence[int] = range(P), **how: Any) -> Ends:
        files = [f"--input={self.folder / 'input.npy'}", f"--output={self.folder / name}.npy"]
        return self.pool.run(P, [*self.service, *files], ranks=ranks, **how)

    def check(self, ends: Ends, line: str, codes: Sequence[int]) -> None:
        """`line` is a pattern, in which {0} stands for the name of worker 0."""
        names = [rf"worker {rank} \(process {end.process} on {HOST}\)" for rank, end in sorted(ends.ranks.items())]
        assert len(ends.errors) == 1, ends
        assert re.fullmatch(line.format(*names), ends.errors[0]), ends
        assert ends.codes == list(codes), ends
        assert not list(self.folder.glob("*output*")), "a part of an answer is left"

    def absent(self) -> None:
        """A worker that never starts, and worker 0 that never does."""
        self.check(self.run(ranks=[0, 2]), "worker 1 of 3 has not started within 3 seconds", [1, 1])

    def absent_keeper(self) -> None:
        line = r"worker 0 has not started within 3 seconds: nothing answers at 127\.0\.0\.1:\d+ \(.*\)"
        self.check(self.run(ranks=[1, 2]), line, [1, 1])

    def port_in_use(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            ends = self.run(port=port)
        line = rf"worker 0 cannot listen on 127\.0\.0\.1:{port}: address already in use; set MASTER_PORT .*"
        self.check(ends, line, [1, 1, 1])
        assert f"what listens on 127.0.0.1:{port} is not the store" in ends.ranks[1].printed[0]

    def suspended(self) -> None:
        ends = self.run(sabotage={2: "suspend"})
        self.check(ends, "{2} is suspended: worker [01] cannot .*", [1, 1, -signal.SIGKILL])

    def suspended_keeper(self) -> None:
        line = "{0}, which keeps the workers' store, is suspended: worker 1 cannot .*"
        self.check(self.run(sabotage={0: "suspend"}), line, [-signal.SIGKILL, 1, 1])

    def hung(self) -> None:
        ends = self.run(sabotage={1: "hang"})
        self.check(ends, r"{1} has been busy for \d+\.\d seconds: worker [02] cannot .*", [1, 1, 1])
        assert ends.ranks[1].has_died

    def killed(self) -> None:
        self.check(self.run(sabotage={1: "kill"}), "{1} ended: worker [02] cannot .*", [1, -signal.SIGKILL, 1])
        line = "{0}, which keeps the workers' store, ended: worker 1 cannot .*"
        self.check(self.run(sabotage={0: "kill"}), line, [-signal.SIGKILL, 1, 1])

    def killed_while_idle(self) -> None:
        """In a service that waits for a batch."""
        pipe = self.folder / "silence"
        os.mkfifo(pipe)
        with open(os.open(pipe, os.O_RDWR)):
            ends = self.pool.run(P, [*self.service, "--serve"], sabotage={2: "kill later"}, stdin=pipe)
        self.check(ends, r"{2} ended: worker [01] cannot (tell|hear) of the next batch .*", [1, 1, -signal.SIGKILL])

    def terminated(self) -> None:
        self.check(self.run(sabotage={1: "terminate"}), "worker 1 was stopped by SIGTERM", [1, 1, 1])

    def another_version(self) -> None:
        line = r"the version of repurpose-opt of worker 2 is 0\.0\.7, that of worker 0 is .*"
        self.check(self.run(sabotage={2: "version"}), line, [1, 1, 1])

    def full(self, disk: Path) -> None:
        (disk / "filler").write_bytes(b"." * 4096)
        ends = self.run("disk/result")
        self.check(ends, rf"{disk}/result\.npy: cannot be written \(.*\)", [1, 1, 1])
        assert [path.name for path in disk.iterdir()] == ["filler"]

    def none(self) -> None:
        ends = self.run()
        assert (ends.codes, ends.printed) == ([0, 0, 0], [])
        assert np.load(self.folder / "output.npy").shape == (23, 6)


def test_a_fault_ends_all_workers_and_one_line_names_the_culprit(folder: Path, full_disk: Path | None) -> None:
    with WorkerPool(P + 6) as pool, ThreadPoolExecutor(3) as threads:
        faults = Faults(folder, pool)
        # Those that wait for a timeout wait at the same time.
        for together in (
            (faults.absent, faults.absent_keeper, faults.port_in_use),
            (faults.suspended, faults.suspended_keeper, faults.hung),
        ):
            for waiting in [threads.submit(fault) for fault in together]:
                waiting.result()
        faults.killed()
        faults.killed_while_idle()
        faults.terminated()
        faults.another_version()
        if full_disk is not None:
            faults.full(full_disk)
        faults.none()
    if full_disk is None:
        pytest.skip("the full disk was left out: no tmpfs can be mounted here; all other faults were as they should be")
