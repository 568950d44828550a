"""The processes that take part in a run, on which machine each of them is, and how it is."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

from repurpose_opt import __version__

ENDED, SUSPENDED, SILENT = "ended", "is suspended", "does not answer"


@dataclass(frozen=True)
class Member:
    """One process of a run, as it told the others at the start."""

    host: str
    machine: str
    """Of one value wherever the same process number means the same process."""
    process: int
    started: str
    """Tells a process from a later one with its number; empty where the system does not say."""
    version: str
    """Of this package."""

    @staticmethod
    def here() -> Member:
        """This process."""
        process = os.getpid()
        return Member(socket.gethostname(), _machine(), process, _status(process)[1], __version__)

    def named(self, rank: int) -> str:
        return f"worker {rank} (process {self.process} on {self.host})"

    def condition(self) -> str:
        """ENDED, SUSPENDED (by SIGSTOP or a debugger), or SILENT: no more can be said from here."""
        if self.machine != _machine():
            return SILENT
        state, started = _status(self.process)
        if started != self.started or state in ("Z", "X"):
            return ENDED
        return SUSPENDED if state in ("T", "t") else SILENT

    def kill(self) -> None:
        """End the process if it is on this machine and certainly still the same."""
        if self.started and self.condition() != ENDED and self.machine == _machine():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.process, signal.SIGKILL)


def _status(process: int) -> tuple[str, str]:
    """The state of a process of this machine and when it started, as in proc(5); empty where nothing is known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _machine() -> str:
    """Containers of one machine may have the same boot id, or host name, but count processes by themselves."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
