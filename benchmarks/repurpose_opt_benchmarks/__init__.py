"""Test sets and experiments of repurpose-opt, and what every experiment records beside its figures."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_HERE = Path(__file__).resolve().parent
RESULTS = _HERE.parent / "results"
"""Where experiments write, in a checkout."""
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Environment of a process whose libraries are to use one core; they read it when they load."""


_SOURCES = ("../../repurpose_opt", "../../solvers", "..", ":(exclude)../results")
"""What a figure is made by: another experiment's result is no change of it."""


def environment(*packages: str) -> dict[str, object]:
    """Commit, cores and versions: what a figure depends on beside its own settings."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", *_SOURCES)),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("repurpose-opt", "numpy", "scipy", *packages)},
    }


def _git(*arguments: str) -> str | None:
    """What git answers about this checkout; None outside one."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_HERE, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
