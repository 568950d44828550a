"""`export`: a layer for other people's solvers, or a plan for other runtimes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.cli import export_plan
from repurpose_opt.cli.instance import add_instance, check_file, formulation_of, problem_of, start_of
from repurpose_opt.cli.text import add_verb, aligned, check_output
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formats import Written, write_hgr, write_metis, write_mps
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.hypergraph import Hypergraph
from repurpose_opt.linear_model import linear_model
from repurpose_opt.problem import LayerProblem

_SUFFIXES = {"hgr": ".hgr", "metis": ".graph", "mps": ".mps"}

_EPILOG = """\
FILE is a layer's weight, or the folder of a plan, which `run` writes.

formats of a layer:
hgr    hypergraph in hMETIS's format, with weights of nets and vertices. Vertices: the neurons, in their order, then a
       terminal of weight 1 for each worker. FILE.hgr.fix has each vertex's block, or -1; FILE.hgr.targets the
       largest weight of each block. The connectivity metric (km1) is the priced volume where nothing may be lost,
       whatever the link prices. With volume, where a value may be lost, it stands in for the objective.
metis  graph in METIS's format. Vertices: the neurons, the inputs, then a heavy terminal for each worker.
       FILE.graph.tpwgts has the share of weight of each block. The cut stands in for the objective.
mps    mixed-integer linear program in free MPS format: x_i_k neuron i is on worker k, y_j_k value j is sent to worker
       k, z_i_j_k what is lost. Its optimum is that of the formulation, if the inputs are uncorrelated.

A budget is exact in mps alone. Elsewhere it, and max-nmse, become the price of the last transfer at the placement of
--start.

what to run then, for four workers:
  mt-kahypar -h layer.hgr -k 4 -e 0.03 -o km1 -t 1 --instance-type=hypergraph --preset-type=quality \\
    -f layer.hgr.fix --write-partition-file=true --partition-output-folder=. --part-weights $(cat layer.hgr.targets)
  shmetis layer.hgr layer.hgr.fix 4 5               (blocks of equal weight only)
  gpmetis -ptype=rb -ufactor=1 -tpwgts=layer.graph.tpwgts layer.graph 4
  highs --solution_file layer.sol --time_limit 60 layer.mps
  scip -c "read layer.mps optimize write solution layer.sol quit"
and read the answer back, with the options that were given here:
  repurpose-opt solve layer.npz --workers 4 --formulation lossless --read-partition layer.graph.part.4 --rebalance

formats of a plan:
torch-export, onnx
       a folder with the programs of each worker, one between every two exchanges, exchange.json, which says who sends
       what to whom, and a README.md that tells how to write a runtime for them.

examples:
  repurpose-opt export layer.npz --to hgr --workers 4 --formulation lossless --output layer.hgr
  repurpose-opt export layer.npy --to mps --workers 2 --budget 0.1 --capacity 40,24
  repurpose-opt export digits-plan --to onnx --output digits-onnx"""


def add(verbs: Any) -> None:
    summary = "write one layer for other people's solvers, or a plan for other runtimes"
    verb = add_verb(verbs, "export", summary, epilog=_EPILOG)
    start = "placement at which a budget or max-nmse becomes a price, (neurons,) whole numbers"
    add_instance(verb, start=start, is_optional=True)
    verb.add_argument("--to", choices=(*_SUFFIXES, *export_plan.PROGRAMS), required=True, help="format; see below")
    output = verb.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="default: FILE.hgr, FILE.graph or FILE.mps; a plan's folder: required",
    )
    output.add_argument("--json", action="store_true", help="print what was written as one JSON object")
    verb.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.file.is_dir():
        return export_plan.run(args)
    check_file(args)
    if args.to not in _SUFFIXES:
        allowed = f"{', '.join(_SUFFIXES)}; a plan is a folder"
        raise InvalidArgument("--to", f"{args.to} for {args.file}, a file", allowed)
    if args.workers is None:
        args.usage_error("the following arguments are required: --workers")
    formulation = formulation_of(args)
    output = args.output or args.file.with_name(args.file.name + _SUFFIXES[args.to])
    check_output(output, args)
    problem = problem_of(args)
    start = start_of(args, problem)
    if args.to == "mps":
        written = _write_mps(output, problem, formulation, start)
    else:
        write = write_hgr if args.to == "hgr" else write_metis
        written = write(output, problem, _hypergraph(problem, formulation, start))
    figures = {
        "file": str(args.file),
        "format": args.to,
        "files": [str(file) for file in written.files],
        **written.size,
        "is_exact": written.is_exact,
        "unit": written.unit,
        "constant": None if written.unit is None else written.constant,
        "rounding": written.rounding,
        "left_out": list(written.left_out),
    }
    print(json.dumps(figures, indent=2, allow_nan=False) if args.json else _table(written))
    return 0


def _write_mps(
    output: Path, problem: LayerProblem, formulation: Formulation, start: NDArray[np.int64] | None
) -> Written:
    if isinstance(formulation, Volume) and formulation.communication == "total" and not formulation.sends_codes:
        budget = formulation.allowed_bytes(problem.direct_volume)
        if budget is not None:
            energies = _hypergraph(problem, Volume(transfer_price=1.0), None)
            return write_mps(output, linear_model(problem, energies, budget), is_exact=problem.moments.is_diagonal)
    hypergraph = _hypergraph(problem, formulation, start)
    return write_mps(output, linear_model(problem, hypergraph), is_exact=hypergraph.is_exact)


def _hypergraph(problem: LayerProblem, formulation: Formulation, start: NDArray[np.int64] | None) -> Hypergraph:
    hypergraph = formulation.hypergraph(problem, start)
    if hypergraph is None:
        got = f"{formulation.name}, whose costs are no sum over values and neurons" + " as given" * (start is None)
        allowed = "lossless, edge or volume with --communication total; --start where there is a budget or --max-nmse"
        raise InvalidArgument("--formulation", got, allowed)
    return hypergraph


def _table(written: Written) -> str:
    """What was written, for people."""
    rows = [("files", " ".join(map(str, written.files)))]
    rows += [(name, f"{count:,}") for name, count in written.size.items()]
    if written.unit is None:
        rows.append(("objective", "the cut stands in for it"))
    else:
        figure = f"{written.constant:g} + {written.unit:g} × the solver's figure"
        rows.append(("objective", figure if written.is_exact else f"{figure} stands in for it"))
    if written.rounding:
        rows.append(("rounding", f"at most {written.rounding:.3g}"))
    if written.left_out:
        rows.append(("left out", ", ".join(written.left_out)))
    return aligned(rows)
