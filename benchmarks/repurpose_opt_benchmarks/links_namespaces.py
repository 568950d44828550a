"""Links of a given rate between processes of one machine: a network namespace for each worker, joined by a bridge.

A worker's namespace has one network interface, eth0, whose egress is limited; what it receives is not. On it lies one
macvlan interface v<k> for each other worker k, through which everything to k goes, so that the kernel counts the bytes
of each pair. Needs root, `ip` and `tc` (iproute2).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from repurpose_opt.errors import RepurposeError

PREFIX = "rol"
"""Of the names of everything that is made here; the process's number follows, as names may have 15 characters only."""
SEGMENT, WIRE_SEGMENT = 1448, 1514
"""Bytes of a full TCP segment with timestamps: content, and what the rate limits count."""
BURST_SECONDS, PACKET_SECONDS = 50e-6, 160e-6
"""What may pass at once when nothing was sent before: a burst, for timers that are late, and what TCP hands down in one
piece, at least a segment. In time at the link's rate: so much too early may an exchange be over."""


@dataclass(frozen=True)
class Link:
    """How workers reach each other."""

    name: str
    rate: float | None = None
    """Bytes a second that a worker sends at most, headers included; None: the loopback interface."""

    @property
    def payload_rate(self) -> float | None:
        """Bytes a second of content in full segments."""
        return None if self.rate is None else self.rate * SEGMENT / WIRE_SEGMENT


LOOPBACK, FAST, SLOW = Link("loopback"), Link("100 MB/s", 100e6), Link("1 MB/s", 1e6)
LINKS = {link.name: link for link in (LOOPBACK, FAST, SLOW)}


@dataclass(frozen=True)
class Counter:
    """What an interface has sent, by the kernel's count."""

    sent_bytes: int
    """With the headers of `packets`; a packet that is cut up later counts once."""
    packets: int

    def __sub__(self, before: Counter) -> Counter:
        return Counter(self.sent_bytes - before.sent_bytes, self.packets - before.packets)


def address(worker: int) -> str:
    return f"10.77.0.{worker + 1}"


@contextmanager
def namespaces(n_workers: int, rate: float) -> Iterator[list[str]]:
    """The names of the workers' namespaces; all are gone afterwards.

    Raises RepurposeError, with the reason, where this machine does not allow it.
    """
    _check_allowed()
    _remove_leftovers()
    bridge, names = f"{PREFIX}{os.getpid()}b", [f"{PREFIX}{os.getpid()}n{worker}" for worker in range(n_workers)]
    try:
        _run("ip", "link", "add", bridge, "type", "bridge")
        _run("ip", "link", "set", bridge, "up")
        for worker, name in enumerate(names):
            _add_namespace(name, bridge, worker, rate)
            for other in range(n_workers):
                if other != worker:
                    _add_pair(name, worker, other, rate)
        yield names
    finally:
        _remove(bridge, names)


def reason_without() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    try:
        with namespaces(2, FAST.rate or 0.0):
            return None
    except RepurposeError as error:
        return str(error)


def counters(n_workers: int, worker: int, folder: Path = Path("/sys/class/net")) -> dict[int, Counter]:
    """What this worker has sent to each other one, read inside its namespace."""
    return {
        other: Counter(*(_number(folder / f"v{other}" / "statistics" / name) for name in ("tx_bytes", "tx_packets")))
        for other in range(n_workers)
        if other != worker
    }


def congestion_control() -> str:
    """What governs how TCP sends on this machine, and in its namespaces."""
    return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()


def _number(path: Path) -> int:
    return int(path.read_text())


def _add_namespace(name: str, bridge: str, worker: int, rate: float) -> None:
    _run("ip", "netns", "add", name)
    # Without IPv6 no interface says anything of its own accord.
    _run("ip", "netns", "exec", name, "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    outside = f"{PREFIX}{os.getpid()}v{worker}"
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", outside, "master", bridge, "up")
    _run("ip", "-n", name, "link", "set", "lo", "up")
    _run("ip", "-n", name, "link", "set", "eth0", "gso_max_segs", _packet_segments(rate), "up")
    _run("ip", "-n", name, "addr", "add", f"{address(worker)}/32", "dev", "eth0")
    _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "1")
    burst = f"{max(WIRE_SEGMENT, int(rate * BURST_SECONDS))}"
    limit = ("rate", f"{8 * rate:.0f}bit", "burst", burst, "cburst", burst, "quantum", "16384")
    _run("tc", "-n", name, "class", "add", "dev", "eth0", "parent", "1:", "classid", "1:1", "htb", *limit)


def _add_pair(name: str, worker: int, other: int, rate: float) -> None:
    """The way from a worker to another one. Neighbours are fixed: no question and no answer goes another way."""
    device = f"v{other}"
    own, theirs = _mac(worker, other), _mac(other, worker)
    _run("ip", "-n", name, "link", "add", "link", "eth0", "name", device, "address", own, "type", "macvlan")
    _run("ip", "-n", name, "link", "set", device, "gso_max_segs", _packet_segments(rate), "up")
    _run("ip", "-n", name, "route", "add", f"{address(other)}/32", "dev", device, "src", address(worker))
    _run("ip", "-n", name, "neigh", "add", address(other), "lladdr", theirs, "dev", device, "nud", "permanent")


def _packet_segments(rate: float) -> str:
    """Segments that TCP hands down in one piece at most."""
    return f"{max(1, int(rate * PACKET_SECONDS / WIRE_SEGMENT))}"


def _mac(worker: int, other: int) -> str:
    return f"02:00:00:00:{worker:02x}:{other:02x}"


def _check_allowed() -> None:
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise RepurposeError("network namespaces need root")
    missing = [program for program in ("ip", "tc", "sysctl") if shutil.which(program) is None]
    if missing:
        raise RepurposeError(f"network namespaces need {' and '.join(missing)}: not installed")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RepurposeError(f"{' '.join(command)}: {reason}")
    return done.stdout


def _remove(bridge: str, names: list[str]) -> None:
    """What is there of it. A namespace takes its interfaces with it, but later: their names would still be in use."""
    for name in names:
        subprocess.run(["ip", "-n", name, "link", "del", "eth0"], capture_output=True, check=False, timeout=60)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=60)
    subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False, timeout=60)


def _remove_leftovers() -> None:
    """What processes left that could not clean up, killed."""
    named = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]
    for owner in {name.removeprefix(PREFIX).partition("n")[0] for name in named}:
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(f"{PREFIX}{owner}b", [name for name in named if name.startswith(f"{PREFIX}{owner}n")])
