"""What the experiments' reports share: bars, tables and the line about the machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any


def bar(what: str, measured: float, *, most: float | None = None, least: float | None = None) -> dict[str, Any]:
    """A limit and whether it was reached; exactly on it counts, whatever the rounding."""
    rounded = round(measured, 9)
    reached = (most is None or rounded <= most) and (least is None or rounded >= least)
    limit = {"at_most": most} if least is None else {"at_least": least}
    return {"what": what, "measured": measured, **limit, "reached": reached}


def bar_line(found: dict[str, Any]) -> str:
    side, limit = ("at most", found["at_most"]) if "at_most" in found else ("at least", found["at_least"])
    return f"- {found['what']}: {found['measured']:.3g} ({side} {limit:g}: {_reached(found['reached'])})"


def _reached(is_reached: bool) -> str:
    return "reached" if is_reached else "not reached"


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": mean(values), "least": min(values), "most": max(values)}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [table_row(header), table_row(["---"] * len(header)), *map(table_row, rows)]


def table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def machine_line(environment: dict[str, Any], *packages: str) -> str:
    versions = ", ".join(f"{name} {environment[name]}" for name in ("python", "numpy", "scipy", *packages))
    changed = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"{environment['cores']} cores ({environment['system']}, {environment['machine']}); {versions}; "
        f"commit {environment['commit'] or 'unknown'}{changed}."
    )


def write(folder: Path, name: str, report: dict[str, Any], markdown: str) -> None:
    """name.json and name.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown.rstrip("\n") + "\n")


def mean_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Geometric mean of ratios of positive numbers."""
    return geometric_mean([a / b for a, b in zip(numerators, denominators, strict=True)])
