"""`export` of a plan: programs of every worker for other runtimes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from repurpose_opt.cli.model import named
from repurpose_opt.cli.text import aligned
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.progress import progress
from repurpose_opt.registry import check_importable

PROGRAMS = ("torch-export", "onnx")
_OPTIONS = {"file", "to", "output", "json", "run", "usage_error"}


def run(args: argparse.Namespace) -> int:
    """`args.file` is a folder."""
    if not (args.file / "manifest.json").is_file():
        raise InvalidArgument("FILE", f"{args.file}, a folder without manifest.json", "a layer's file, a plan's folder")
    if args.to not in PROGRAMS:
        raise InvalidArgument("--to", f"{args.to} for {args.file}, a plan", ", ".join(PROGRAMS))
    for name, value in vars(args).items():
        if name not in _OPTIONS and value is not None:
            args.usage_error(f"--{name.replace('_', '-')} is for a layer; {args.file} is a plan")
    if args.output is None:
        args.usage_error(f"--to {args.to} needs --output, a new folder")
    check_importable("a plan", "torch", "safetensors", "rich")
    from repurpose_opt.runtime.export import export_plan

    with named(directory="--output"), progress() as report:
        written = export_plan(args.file, args.output, args.to, report)
    figures = {"plan": str(args.file), "format": args.to, **asdict(written), "directory": str(args.output)}
    print(json.dumps(figures, indent=2) if args.json else _table(figures))
    return 0


def _table(figures: dict[str, Any]) -> str:
    rows = [
        ("folder", figures["directory"]),
        ("files", f"{len(figures['files'])}, {figures['n_bytes']:,} bytes"),
        ("programs", f"{figures['n_programs']}, {figures['format']}"),
        ("exchanges", str(figures["n_exchanges"])),
        ("how to run them", f"{figures['directory']}/README.md"),
    ]
    return aligned(rows)
