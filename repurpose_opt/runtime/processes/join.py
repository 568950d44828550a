"""Joining a run: the store of its workers, who they are, and the process group."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.processes import group
from repurpose_opt.runtime.processes.console import print_note
from repurpose_opt.runtime.processes.faults import POLL, Watch
from repurpose_opt.runtime.processes.members import Member
from repurpose_opt.runtime.processes.stop import StopSignal

ABANDONED = "abandoned"
"""Key in the store: a worker that keeps it will end without the others."""


class Unheard(RepurposeError):
    """An error of which another process of the run tells."""


@contextlib.contextmanager
def joined(timeout: float, stop: StopSignal, device: str = "cpu") -> Iterator[Watch]:
    """Join the run that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; `device` is cpu or cuda.

    No call waits for another process longer than `timeout` seconds. An error within is settled with the other workers:
    on one of them it becomes the line to print, on the others Unheard. Raises RepurposeError.
    """
    meeting = Meeting.of_environment(timeout, stop)
    store = meeting.store()
    members = meeting.members(store)
    watch = Watch(store, meeting.keeper, members, meeting.rank, timeout)
    try:
        with group.process_group(timeout, PrefixStore("gloo", store), device):
            try:
                yield watch
            except RepurposeError as error:
                raise _settled(watch, error) from None
    except group.LostContact as error:
        raise _settled(watch, error) from None
    finally:
        watch.close()


def _settled(watch: Watch, error: RepurposeError) -> RepurposeError:
    line = watch.settle(error)
    return Unheard(str(error)) if line is None else RepurposeError(line)


@dataclass(frozen=True)
class Meeting:
    """Where the processes of a run meet, as their launcher says, and until when."""

    host: str
    port: int
    rank: int
    size: int
    keeper: int | None
    """The rank in whose process the store is kept; None: torchrun keeps it, where it outlives every worker."""
    prefix: str
    """Of keys in the store: a restarted run must not read those of the run before."""
    timeout: float
    """Seconds."""
    deadline: float
    """On the clock time.monotonic."""
    stop: StopSignal

    @staticmethod
    def of_environment(timeout: float, stop: StopSignal) -> Meeting:
        """Raises RepurposeError where a variable is missing."""
        rank, size = group.rank_and_size()
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise RepurposeError("MASTER_ADDR and MASTER_PORT: must say where worker 0 is and a free port") from None
        keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True) else 0
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        prefix = " ".join(["repurpose-opt", *(os.environ.get(name, "") for name in names)])
        return Meeting(host, port, rank, size, keeper, prefix, timeout, time.monotonic() + timeout, stop)

    def store(self) -> Store:
        """Open the store, keep it where that is this worker's task. Raises RepurposeError."""
        if self.rank != self.keeper:
            return self._found()
        try:
            return self._opened(is_master=True)
        except RuntimeError as error:
            reason = str(error).rpartition("message: ")[2].splitlines()[0]
            raise RepurposeError(
                f"worker {self.rank} cannot listen on {self}: {reason}; set MASTER_PORT to a free port"
            ) from None

    @property
    def is_over(self) -> bool:
        """Whether it is of no use to wait any longer."""
        return self.stop.name is not None or time.monotonic() > self.deadline

    @property
    def limit(self) -> str:
        return f"within {self.timeout:g} seconds" if self.stop.name is None else f"before {self.stop.name} arrived"

    def members(self, store: Store) -> list[Member]:
        """Wait for all processes. Raises RepurposeError on one of those that are here, Unheard on the others."""
        try:
            store.set(f"member {self.rank}", json.dumps(asdict(Member.here())))
            absent = self._absent(store)
            while absent and not self.is_over and not store.check([ABANDONED]):
                time.sleep(POLL / 10)
                absent = self._absent(store)
            if absent:
                raise self._incomplete(store, absent)
            return [Member(**json.loads(store.get(f"member {rank}"))) for rank in range(self.size)]
        except RuntimeError as error:
            if self.rank != 1:
                raise Unheard(str(error)) from None
            raise RepurposeError("worker 0, which keeps the workers' store, ended before all had joined") from None

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def _opened(self, is_master: bool) -> Store:
        timeout = timedelta(seconds=self.timeout)
        store = TCPStore(self.host, self.port, None, is_master, timeout, wait_for_workers=False)
        return PrefixStore(self.prefix, store)

    def _absent(self, store: Store) -> list[int]:
        return [rank for rank in range(self.size) if not store.check([f"member {rank}"])]

    def _incomplete(self, store: Store, absent: list[int]) -> RepurposeError:
        if self.keeper in absent:
            return self._no_store()
        lowest = next(rank for rank in range(self.size) if rank not in absent)
        if self.rank == self.keeper:
            store.set(ABANDONED, "")
            time.sleep(2 * POLL)  # the others see it before the store is gone
        error = f"worker {' and '.join(map(str, absent))} of {self.size} has not started {self.limit}"
        return RepurposeError(error) if self.rank == lowest else Unheard(error)

    def _found(self) -> Store:
        """The store that another process keeps. Raises RepurposeError where none is found in time."""
        self._wait_for_listener()
        opened: list[Store] = []

        def open_store() -> None:
            with contextlib.suppress(RuntimeError):
                opened.append(self._opened(is_master=False))

        # PyTorch waits without end for the greeting of something that listens but is no such store.
        thread = threading.Thread(target=open_store, daemon=True)
        thread.start()
        while thread.is_alive() and not self.is_over:
            thread.join(POLL)
        if not opened:
            raise self._no_store()
        return opened[0]

    def _wait_for_listener(self) -> None:
        """PyTorch would wait longer than its timeout, and where a signal arrived."""
        while True:
            try:
                socket.create_connection((self.host, self.port), timeout=1.0).close()
                return
            except OSError as error:
                if self.is_over:
                    absent = "torchrun" if self.keeper is None else f"worker {self.keeper}"
                    reason = f"{absent} has not started {self.limit}: nothing answers at {self}"
                    speaks = self.rank == (0 if self.keeper is None else 1)
                    raise (RepurposeError if speaks else Unheard)(f"{reason} ({error.strerror or error})") from None
            time.sleep(POLL)

    def _no_store(self) -> Unheard:
        """Something else listens there, so that the worker which should have kept the store there tells of it."""
        reason = f"worker {self.rank} ends: what listens on {self} is not the store of this run's worker {self.keeper}"
        if self.rank == 1:
            print_note(reason)
        return Unheard(reason)
