"""The options of a worker, for the verb and for the module; torch is not needed to read them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

WIRES = ("float32", "float16", "bfloat16", "int8")
PLAIN = "torchrun --nproc-per-node=P --no-python repurpose-opt worker"

EPILOG = f"""\
One process for each of the plan's P workers, started by torchrun or by any launcher that sets RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. All of them get the same options.

Without --serve: one run over one file. With --serve the processes stay, and worker 0 takes batches
  from the files of --input, answered in the files of --output,
  or from the clients that connect to --listen,
  or else from standard input, answered on standard output.
Standard input, and what a client sends, is a stream: arrays as numpy.save writes them, one after the other, or JSON
lines, each a batch as nested lists. Answers are of the same kind and in the same order. A batch that the plan cannot
take is answered with a line that says why, and the service goes on: {{"error": "…"}} in JSON, else an array without
axes of text. A batch larger than --batch-size is cut into pieces. Whoever can connect to --listen can ask.

The service ends after its last file, at the end of standard input, or at SIGTERM or SIGINT, after the batch in hand;
then worker 0 prints samples, batches, throughput and latency on standard error. A worker that was killed or hangs ends
all others within --timeout, with one line that names it; torchrun --max-restarts=N starts all of them again.

examples:
  {PLAIN} plan --input x.npy --output y.npy
  {PLAIN} plan --serve --input a.npy b.npy --output answers/
  {PLAIN} plan --serve --listen 127.0.0.1:4000
  echo '[[0.5, 1, 2]]' | {PLAIN} plan --serve
exit codes: 0 fine, 1 the run failed, 2 wrong usage"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """PLAN and all options."""
    parser.add_argument("plan", type=Path, metavar="PLAN", help="folder of the plan")
    parser.add_argument("--input", type=Path, nargs="+", default=[], metavar="FILE", help=".npy, (samples, …)")
    parser.add_argument("--output", type=Path, metavar="PATH", help=".npy to write, (samples, …); a folder for several")
    parser.add_argument("--serve", action="store_true", help="stay and answer batches")
    parser.add_argument("--listen", metavar="HOST:PORT|PATH", help="take batches from clients that connect there")
    parser.add_argument(
        "--feed",
        choices=("rank0", "owners"),
        default="rank0",
        help="who reads the files of --serve: worker 0, which sends the others theirs, or each owner (%(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=_positive(int), default=256, metavar="N", help="samples at once (%(default)s)"
    )
    parser.add_argument("--wire", choices=WIRES, help="what messages are written in; default: the plan's dtype")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: GPU number LOCAL_RANK, messages by NCCL (%(default)s)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="JSON to write: seconds and bytes for each pair of workers"
    )
    parser.add_argument("--json", action="store_true", help="print the service's figures as one JSON object")
    parser.add_argument(
        "--timeout",
        type=_positive(float),
        default=300.0,
        metavar="SECONDS",
        help="give up when another worker is silent for so long (%(default)g)",
    )


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with exit code 2 where options contradict each other."""
    if not args.serve:
        if len(args.input) != 1 or args.output is None:
            parser.error("--input FILE and --output FILE are required without --serve")
        if args.listen is not None or args.feed != "rank0" or args.json:
            parser.error("--listen, --feed and --json need --serve")
    elif args.listen is not None and args.input:
        parser.error("--listen and --input exclude each other")
    elif bool(args.input) != (args.output is not None):
        parser.error("--input and --output need each other")
    elif args.feed == "owners" and not args.input:
        parser.error("--feed owners needs --input")


def _positive(kind: type[int] | type[float]) -> Any:
    def convert(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    convert.__name__ = f"{kind.__name__} > 0"
    return convert
