"""`python -m repurpose_opt_benchmarks [NAME …] [--quick]` runs experiments, by default all of them.

Other options are handed on, for instance `strips --mnist-dir DIR`; `python -m repurpose_opt_benchmarks.strips --help`
lists an experiment's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each module has main(argv) -> exit code, and takes --quick.
EXPERIMENTS = {
    "codes": "repurpose_opt_benchmarks.codes",
    "codes-large": "repurpose_opt_benchmarks.codes_large",
    "codes-tiny": "repurpose_opt_benchmarks.codes_tiny",
    "exchanges": "repurpose_opt_benchmarks.exchanges",
    "gaps": "repurpose_opt_benchmarks.gaps",
    "large": "repurpose_opt_benchmarks.large",
    "large-layer": "repurpose_opt_benchmarks.large_layer",
    "lasso": "repurpose_opt_benchmarks.lasso",
    "layer": "repurpose_opt_benchmarks.layer",
    "limits": "repurpose_opt_benchmarks.limits",
    "links": "repurpose_opt_benchmarks.links",
    "cnn": "repurpose_opt_benchmarks.cnn",
    "network-codes": "repurpose_opt_benchmarks.network_codes",
    "network-parts": "repurpose_opt_benchmarks.network_parts",
    "networks": "repurpose_opt_benchmarks.networks",
    "placement": "repurpose_opt_benchmarks.placement",
    "proofs": "repurpose_opt_benchmarks.proofs",
    "pruning": "repurpose_opt_benchmarks.pruning",
    "radix": "repurpose_opt_benchmarks.radix",
    "sentences": "repurpose_opt_benchmarks.minilm_network",
    "sparse-weights": "repurpose_opt_benchmarks.sparse_weights",
    "strips": "repurpose_opt_benchmarks.strips",
    "transport": "repurpose_opt_benchmarks.transport",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m repurpose_opt_benchmarks",
        description="Run experiments; each prints a table and writes it to benchmarks/results/.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out; writes no results")
    args, options = parser.parse_known_args(argv)
    for name in args.names:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    worst = 0
    for name in args.names or EXPERIMENTS:
        print(f"== {name}", flush=True)
        worst = max(worst, import_module(EXPERIMENTS[name]).main(options + ["--quick"] * args.quick))
    return worst


if __name__ == "__main__":
    sys.exit(main())
