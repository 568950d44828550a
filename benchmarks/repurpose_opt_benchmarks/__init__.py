"""Test sets and experiments of repurpose-opt."""

from __future__ import annotations

from pathlib import Path

from repurpose_opt.bench.environment import capped_threads, environment

__all__ = ["ONE_THREAD", "RESULTS", "environment"]

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where experiments write, in a checkout."""
ONE_THREAD = capped_threads(1)
"""Environment of a process whose libraries are to use one core."""
