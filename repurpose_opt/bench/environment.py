"""What figures depend on beside their own settings: machine, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("repurpose_opt", "solvers", "benchmarks", ":(exclude)benchmarks/results")
"""What a figure is made by: another experiment's result is no change of it."""


def environment(*packages: str) -> dict[str, object]:
    """Commit, cores, and versions of this package, NumPy, SciPy and those named; None for what is not known."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *_SOURCES)),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in ("repurpose-opt", "numpy", "scipy", *packages)},
    }


def _processor() -> str | None:
    """The model, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def capped_threads(threads: int) -> dict[str, str]:
    """Environment of a process whose libraries are to use so many cores; they read it when they load."""
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


def distributions_of(module: str) -> list[str]:
    """The distributions that a module or its top package comes from; where they do not say, the one of its name."""
    package = module.partition(".")[0]
    found = sorted(set(_distributions().get(package, ())))
    return found or ([package] if package_version(package) is not None else [])


@cache
def _distributions() -> Mapping[str, list[str]]:
    """By package; reading what every distribution holds takes half a second."""
    return packages_distributions()


def package_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git answers about the checkout that this package is in; None outside one."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
