"""`bench`: test sets for comparing solvers."""

from __future__ import annotations

import argparse
import json
from typing import Any

from repurpose_opt.cli.text import add_verb, aligned


def add(verbs: Any) -> None:
    bench = add_verb(verbs, "bench", "test sets for comparing solvers")
    actions = bench.add_subparsers(title="verbs", metavar="VERB", required=True)
    verb = add_verb(actions, "list", "list the test sets")
    verb.add_argument("--json", action="store_true", help="print a JSON list")
    verb.set_defaults(run=_bench_list)


def _bench_list(args: argparse.Namespace) -> int:
    from repurpose_opt.bench.testset import load_all

    listed = [
        {
            "name": found.name,
            "title": found.title,
            "description": found.description,
            "instances": len(found),
            "install": install,
        }
        for found, install in load_all()
    ]
    if args.json:
        print(json.dumps(listed, indent=2))
        return 0
    rows = [("NAME", "INSTANCES", "TITLE")]
    for entry in listed:
        title = entry["title"] if entry["install"] is None else f"to install: {entry['install']}"
        rows.append((str(entry["name"]), str(entry["instances"]), str(title)))
    print(aligned(rows))
    return 0
