"""`new-solver`: the skeleton of a backend, a package of its own that is installed, tested and benchmarked as it is."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from repurpose_opt import __version__, registry
from repurpose_opt.cli.text import add_verb
from repurpose_opt.errors import InvalidArgument

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_KINDS = ("partitioner", "pruner")
_BASELINE = {"partitioner": "contiguous", "pruner": "compensated/threshold"}
"""What the suggested benchmark compares it with."""


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs,
        "new-solver",
        "write the skeleton of a backend: a package with one source file, its entry point and its tests",
        epilog='It works as it is; CONTRIBUTING.md, "Add a solver", goes on from there.',
    )
    verb.add_argument("name", metavar="NAME", type=_name, help="what it is called: lower-case letters, digits, dashes")
    verb.add_argument("--kind", choices=_KINDS, default="partitioner", help="what it chooses (%(default)s)")
    verb.add_argument("--output", type=Path, metavar="FOLDER", help="where to write it (./NAME)")
    verb.add_argument("--json", action="store_true", help="print a JSON list of the files")
    verb.set_defaults(run=_new_solver)


def skeleton(name: str, kind: str) -> dict[str, str]:
    """The files of a new backend: name → text. `kind` is "partitioner" or "pruner"."""
    stem = name.replace("-", "_")
    module = f"{stem}_"  # the underscore keeps it from shadowing the library that it wraps
    given = {
        "name": name,
        "kind": kind,
        "module": module,
        "class_name": "".join(part.capitalize() for part in name.split("-")),
        "version": __version__,
    }
    templates = {"pyproject.toml": "pyproject.toml", f"{module}.py": f"{kind}.py", f"test_{stem}.py": "test.py"}
    folder = files("repurpose_opt") / "skeleton"
    return {
        file: Template((folder / f"{template}.txt").read_text(encoding="utf-8")).substitute(given)
        for file, template in templates.items()
    }


def _new_solver(args: argparse.Namespace) -> int:
    for kind in _KINDS:
        if args.name == "auto" or args.name in registry.names(f"{kind}s"):
            raise InvalidArgument("NAME", f"{args.name!r}, which is taken", "a name not in `repurpose-opt solvers`")
    folder = Path(args.name) if args.output is None else args.output
    texts = {folder / file: text for file, text in skeleton(args.name, args.kind).items()}
    for path in texts:
        if path.exists():
            raise InvalidArgument("--output", f"{folder}, which has a {path.name}", "a folder without one")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    print(json.dumps([str(path) for path in texts], indent=2) if args.json else _said(args, folder, list(texts)))
    return 0


def _said(args: argparse.Namespace, folder: Path, paths: list[Path]) -> str:
    solver = args.name if args.kind == "partitioner" else f"compensated/{args.name}"
    commands = (
        f"cd {shlex.quote(str(folder))}",
        "pip install -e .",
        "pytest",
        f"repurpose-opt bench run tiny --solvers {solver},{_BASELINE[args.kind]} --output results",
        "repurpose-opt bench report results",
    )
    return "\n".join(["wrote:", *(f"  {path}" for path in paths), "next:", *(f"  {command}" for command in commands)])


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: lower-case letters, digits and single dashes")
    return text
