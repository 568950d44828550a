"""`worker`: one process of a plan, started by torchrun."""

from __future__ import annotations

import argparse
import os
from typing import Any

from repurpose_opt.cli.text import add_verb
from repurpose_opt.errors import SolverNotInstalled
from repurpose_opt.runtime.processes.options import EPILOG, add_options, check_options


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs, "worker", "run one worker of a plan, once or as a service; started by torchrun", epilog=EPILOG
    )
    add_options(verb)
    verb.set_defaults(run=_run, check=lambda args: check_options(verb, args))


def _run(args: argparse.Namespace) -> int:
    args.check(args)
    # PyTorch prints a stack trace when its store is lost, and raises an error, of which the worker tells in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        from repurpose_opt.runtime.processes import worker
    except ModuleNotFoundError as error:
        raise SolverNotInstalled(f"worker needs {error.name}: pip install 'repurpose-opt[network]'") from None
    return worker.run(args)
