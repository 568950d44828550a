"""`solvers`: what is installed, and the command that installs what is not."""

from __future__ import annotations

import argparse
import json
from typing import Any

from repurpose_opt import registry
from repurpose_opt.cli.text import add_verb, aligned


def add(verbs: Any) -> None:
    verb = add_verb(verbs, "solvers", "list partitioners, pruners and formulations, and how to install those missing")
    verb.add_argument("--json", action="store_true", help="print a JSON list")
    verb.set_defaults(run=_solvers)


def _solvers(args: argparse.Namespace) -> int:
    found = [entry for kind in ("partitioners", "pruners", "formulations") for entry in registry.registered(kind)]
    if args.json:
        listed = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "summary": entry.summary,
                "installed": entry.installed,
                "requires": list(entry.requires),
                "install": entry.install,
            }
            for entry in found
        ]
        print(json.dumps(listed, indent=2))
        return 0
    rows = [("KIND", "NAME", "STATUS", "SUMMARY")]
    for entry in found:
        status = "installed" if entry.installed else "unusable" if entry.is_clash else "missing"
        rows.append((entry.kind, entry.name, status, entry.summary))
        if entry.install is not None:
            rows.append(("", "", "", f"to install: {entry.install}"))
    print(aligned(rows))
    return 0
