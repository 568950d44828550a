"""`python -m repurpose_opt_benchmarks [NAME …] [--quick]` runs experiments, by default all of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each module has main(argv) -> exit code, and takes --quick.
EXPERIMENTS = {
    "transport": "repurpose_opt_benchmarks.transport",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m repurpose_opt_benchmarks",
        description="Run experiments; each prints a table and writes it to benchmarks/results/.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; writes no results")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    worst = 0
    for name in args.names or EXPERIMENTS:
        print(f"== {name}", flush=True)
        worst = max(worst, import_module(EXPERIMENTS[name]).main(["--quick"] if args.quick else []))
    return worst


if __name__ == "__main__":
    sys.exit(main())
