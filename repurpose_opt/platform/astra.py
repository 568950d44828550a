"""ASTRA-sim (https://astra-sim.github.io): its configuration files, the command that runs it, and what it answers.

Its analytical, congestion-unaware backend knows one rate for all workers and one link for all pairs, and one message
of a worker in flight.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.platform.chakra import write_traces
from repurpose_opt.platform.machine import Platform
from repurpose_opt.platform.timeline import MEMORY_UNIT, NANOSECONDS, PEAK_UNIT, Timeline
from repurpose_opt.runtime.layer import Indices

_TOPOLOGIES = {"fully_connected": "FullyConnected", "switch": "Switch"}
_GIGABYTE = 2**30
"""Bytes of what its network file calls a GB."""
_BINARY = "AstraSim_Analytical_Congestion_Unaware"
_FINISHED = re.compile(r"sys\[(\d+)\] finished, (\d+) cycles")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


@dataclass(frozen=True)
class Export:
    """The files of one timeline for ASTRA-sim."""

    prefix: Path
    """Of the traces, without .{worker}.et."""
    traces: tuple[Path, ...]
    network: Path
    system: Path
    memory: Path

    def command(self, binary: str = _BINARY) -> list[str]:
        """The program and its arguments."""
        return [
            binary,
            f"--workload-configuration={self.prefix}",
            f"--system-configuration={self.system}",
            f"--network-configuration={self.network}",
            f"--remote-memory-configuration={self.memory}",
        ]


def export(timeline: Timeline, directory: Path, name: str = "plan") -> Export:
    """Writes NAME.{worker}.et, network.yml, system.json and memory.json; the directory may be new.

    Raises InvalidArgument where ASTRA-sim cannot say what the timeline is of, and where the directory is a file.
    """
    check_exportable(timeline.platform, timeline.sends)
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise InvalidArgument("directory", f"{directory}, a file", "a folder")
    directory.mkdir(parents=True, exist_ok=True)
    prefix = directory / name
    files = [directory / file for file in ("network.yml", "system.json", "memory.json")]
    texts = (_network(timeline.platform), _system(timeline.platform), '{"memory-type": "NO_MEMORY_EXPANSION"}\n')
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    return Export(prefix, tuple(write_traces(timeline.work, prefix)), *files)


def check_exportable(platform: Platform, sends: str) -> None:
    """Raises InvalidArgument where ASTRA-sim cannot say it."""
    if sends != "serial":
        raise InvalidArgument("sends", sends, "serial: in ASTRA-sim a worker has one message in flight")
    if platform.n_workers < 2:
        raise InvalidArgument("platform", "1 worker", "2 or more for ASTRA-sim")
    if platform.overhead:
        raise InvalidArgument("overhead", f"{platform.overhead:g}", "0 for ASTRA-sim, which knows none")
    between = ~np.eye(platform.n_workers, dtype=bool)
    for field in ("operations", "memory_bandwidth", "bandwidth", "latency"):
        values = getattr(platform, field)
        distinct = np.unique(values[between] if values.ndim == 2 else values)
        if len(distinct) > 1 or not np.isfinite(distinct).all():
            got = f"{distinct[0]:g} … {distinct[-1]:g}" if len(distinct) > 1 else f"{distinct[0]:g}"
            raise InvalidArgument(field, got, "one finite number for all workers or links for ASTRA-sim")


def run(exported: Export, binary: Path, timeout: float) -> Indices:
    """Runs ASTRA-sim; returns the cycles of 1 ns (P,) after which each worker was finished.

    binary    its analytical, congestion-unaware backend
    timeout   seconds

    Raises RepurposeError where it cannot be started, fails, takes longer or a worker does not finish.
    """
    command = exported.command(str(binary.resolve()))
    try:
        done = subprocess.run(
            command, cwd=exported.network.parent, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except OSError as error:
        raise RepurposeError(f"{binary}: cannot be run ({error.strerror})") from None
    except subprocess.TimeoutExpired:
        raise RepurposeError(f"{binary}: not done after {timeout:g} s, ended") from None
    cycles = {int(worker): int(count) for worker, count in _FINISHED.findall(done.stdout + done.stderr)}
    missing = [worker for worker in range(len(exported.traces)) if worker not in cycles]
    if done.returncode or missing:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        which = f"worker {missing[0]} did not finish, " if missing else ""
        raise RepurposeError(f"{binary}: {which}exit code {done.returncode}; its last line: {lines[-1].strip()}")
    return np.array([cycles[worker] for worker in range(len(exported.traces))], dtype=np.int64)


def _network(platform: Platform) -> str:
    bandwidth, latency = float(platform.bandwidth[0, 1]), float(platform.latency[0, 1])
    return (
        f"topology: [ {_TOPOLOGIES[platform.topology]} ]\n"
        f"npus_count: [ {platform.n_workers} ]\n"
        f"bandwidth: [ {bandwidth / _GIGABYTE!r} ]  # units of 2^30 bytes a second\n"
        f"latency: [ {latency * NANOSECONDS!r} ]  # ns\n"
    )


def _system(platform: Platform) -> str:
    content = {
        "scheduling-policy": "LIFO",
        "endpoint-delay": 1,
        "active-chunks-per-dimension": 1,
        "preferred-dataset-splits": 1,
        **{f"{collective}-implementation": ["direct"] for collective in _COLLECTIVES},
        "roofline-enabled": 1,
        "peak-perf": float(platform.operations[0]) / PEAK_UNIT,
        "local-mem-bw": float(platform.memory_bandwidth[0]) / MEMORY_UNIT,
    }
    return json.dumps(content, indent=2) + "\n"
