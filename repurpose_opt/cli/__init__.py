"""The command `repurpose-opt`. Each verb is a file, whose function of the parsed arguments returns the exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from repurpose_opt import __version__
from repurpose_opt.cli import bench, demo, export, new_solver, run, simulate, solve, solvers, worker
from repurpose_opt.cli.text import FAILED, PROGRAM, fail
from repurpose_opt.errors import RepurposeError

_INTERRUPTED = 130

_EPILOG = """\
examples:
  repurpose-opt demo                                      a sensor network, from training to six processes
  repurpose-opt solve layer.npy --workers 4               place one layer, send a tenth of its values
  repurpose-opt run model.pt2 --data train.npz --workers 4 --budget 0.05 --output plan
                                                          a whole model, to a plan for four workers
  torchrun --nproc-per-node=4 --no-python repurpose-opt worker plan --serve --listen 127.0.0.1:4000
                                                          the plan's four processes, which answer batches
  repurpose-opt simulate plan --platform edge             what it would take on small machines, and why
  repurpose-opt export layer.npz --to hgr --workers 4 --formulation lossless
                                                          the same instance for other people's solvers
  repurpose-opt solvers                                   what can solve it, and what is not installed
  repurpose-opt new-solver mine                           a backend of your own, to begin with
  repurpose-opt VERB --help                               the options of a verb
exit codes: 0 fine, 1 the run failed, 2 wrong usage"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code; errors that a user can act on become one line on stderr."""
    try:
        args = _parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, `head` perhaps, has enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (RepurposeError, OSError) as error:
        return fail(str(error))
    except MemoryError:
        return fail("out of memory")
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Split a trained neural network over workers so that they exchange as little as possible.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in (demo, solve, run, worker, simulate, export, solvers, bench, new_solver):
        verb.add(verbs)
    return parser
