"""`simulate`: what a plan would take on a platform, without running it."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repurpose_opt.cli.text import add_verb, aligned, positive
from repurpose_opt.errors import SolverNotInstalled

if TYPE_CHECKING:
    from repurpose_opt.platform.machine import Platform
    from repurpose_opt.platform.timeline import Event, Timeline

_PLATFORMS = ("datacenter", "edge")
_SENDS = ("serial", "parallel")
_WIRES = ("float32", "float16", "bfloat16", "int8")
_PICTURES = (".png", ".svg")
_ASTRA_TIMEOUT = 600.0
_LONGEST = 5
"""Pieces of the critical path that are shown."""

_EPILOG = """\
FILE.toml has the keys operations (a second; a multiply-accumulate is two), memory_bandwidth (bytes a second), memory
(bytes): one number for all workers, or a list; bandwidth (bytes a second), latency (seconds): one number, or a list of
lists, from worker (row) to worker; topology: fully_connected, or switch, which doubles the latency; overhead: seconds
for each exchange; name. operations and bandwidth are required. Example:
  operations = [5e11, 5e11, 2e12]
  bandwidth = 1e8
  latency = 50e-6

The model is that of ASTRA-sim's analytical backend: with serial sends, which it has, both agree to the nanosecond.
--chakra writes a trace for each worker, the three configuration files, and prints the command that runs ASTRA-sim;
--astra-sim runs it (the binary AstraSim_Analytical_Congestion_Unaware, built from source) and compares.

examples:
  repurpose-opt simulate digits-plan --platform edge --picture timeline.svg
  repurpose-opt simulate digits-plan --platform garage.toml --batch-size 32 --sends parallel --wire float16
  repurpose-opt simulate digits-plan --platform datacenter --chakra traces"""


def add(verbs: Any) -> None:
    verb = add_verb(
        verbs, "simulate", "time a plan on a platform, worker by worker, without running it", epilog=_EPILOG
    )
    verb.add_argument("plan", type=Path, metavar="PLAN", help="folder of a plan; its weights are not read")
    verb.add_argument(
        "--platform",
        type=_platform,
        default="edge",
        metavar="NAME",
        help="datacenter or edge, the two of the RePurpose paper, or FILE.toml; default: %(default)s",
    )
    verb.add_argument("--batch-size", type=positive, default=1, metavar="N", help="samples; default: 1")
    verb.add_argument(
        "--sends",
        choices=_SENDS,
        default=_SENDS[0],
        help="whether a worker sends one message at a time, or all of a layer at once; default: %(default)s",
    )
    verb.add_argument("--wire", choices=_WIRES, help="format of the numbers in messages; default: that of the plan")
    output = verb.add_argument_group("output")
    output.add_argument("--picture", type=_picture, metavar="FILE", help="draw the timeline: .png or .svg")
    output.add_argument("--chakra", type=Path, metavar="DIR", help="write what ASTRA-sim reads; serial sends only")
    output.add_argument("--astra-sim", type=Path, metavar="BINARY", help="run it on --chakra's files, and compare")
    output.add_argument("--json", action="store_true", help="print the result as one JSON object")
    verb.set_defaults(run=_run, usage_error=verb.error)


def _platform(text: str) -> str:
    if text not in _PLATFORMS and not text.endswith(".toml"):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {', '.join(_PLATFORMS)} or a file .toml")
    return text


def _picture(text: str) -> Path:
    if Path(text).suffix.lower() not in _PICTURES:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a file {' or '.join(_PICTURES)}")
    return Path(text)


def _run(args: argparse.Namespace) -> int:
    if args.chakra is None and args.astra_sim is not None:
        args.usage_error("--astra-sim needs --chakra")
    if args.chakra is not None and args.sends != "serial":
        args.usage_error("--chakra needs --sends serial: in ASTRA-sim a worker has one message in flight")
    try:
        figures = _simulated(args)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "safetensors", "matplotlib"):
            raise
        raise SolverNotInstalled(f"simulate needs {error.name}: pip install {error.name}") from None
    print(json.dumps(figures, allow_nan=False) if args.json else report(figures))
    return 0


def _simulated(args: argparse.Namespace) -> dict[str, Any]:
    """The result as --json prints it; files are written, ASTRA-sim has run."""
    from repurpose_opt.platform.timeline import simulate, simulate_direct
    from repurpose_opt.runtime.storage import read_manifest

    manifest = read_manifest(args.plan)
    platform = _platform_of(args.platform, manifest.n_workers)
    how = {"batch_size": args.batch_size, "sends": args.sends, "wire": args.wire}
    timeline = simulate(manifest, platform, **how)
    direct = simulate_direct(manifest, platform, **how)
    figures = {
        "plan": str(args.plan),
        "batch_size": args.batch_size,
        "sends": args.sends,
        "wire": args.wire or manifest.dtype,
        "platform": {"name": platform.name, "topology": platform.topology, "overhead": platform.overhead},
        **_totals(timeline),
        "direct": None if direct is None else _totals(direct),
        "layers": _layers(timeline, {layer.name for layer in manifest.layers}),
        "workers": _workers(timeline),
        "critical_path": [_piece(event) for event in timeline.critical_path],
        "assumptions": list(timeline.assumptions),
    }
    if args.picture is not None:
        from repurpose_opt.platform.picture import draw_timeline

        draw_timeline(timeline, args.picture)
    return figures | {"picture": args.picture and str(args.picture), **_astra(args, timeline)}


def _platform_of(text: str, n_workers: int) -> Platform:
    from repurpose_opt.platform.machine import PLATFORMS, read_platform

    return PLATFORMS[text](n_workers) if text in PLATFORMS else read_platform(Path(text), n_workers)


def _astra(args: argparse.Namespace, timeline: Timeline) -> dict[str, Any]:
    """What was written for ASTRA-sim, and what it answered; None for what was not asked for."""
    if args.chakra is None:
        return {"chakra": None, "astra_sim": None}
    from repurpose_opt.platform import astra

    exported = astra.export(timeline, args.chakra)
    files = [*exported.traces, exported.network, exported.system, exported.memory]
    chakra = {"files": [str(file) for file in files], "command": exported.command()}
    if args.astra_sim is None:
        return {"chakra": chakra, "astra_sim": None}
    cycles = astra.run(exported, args.astra_sim, _ASTRA_TIMEOUT)
    difference = int(np.abs(cycles - timeline.finish).max())
    return {"chakra": chakra, "astra_sim": {"nanoseconds": cycles.tolist(), "largest_difference": difference}}


def _totals(timeline: Timeline) -> dict[str, Any]:
    return {
        "seconds": timeline.total,
        "communication_share": timeline.communication_share,
        "bytes": sum(int(work.sent.sum()) for work in timeline.work),
        "messages": sum(int((work.sent > 0).sum()) for work in timeline.work),
    }


def _layers(timeline: Timeline, names: set[str]) -> list[dict[str, Any]]:
    """One for each step with a layer, and one without a name for all other steps, if they take any time."""
    groups: list[tuple[str | None, list[int]]] = [
        (work.name, [index]) for index, work in enumerate(timeline.work) if work.name in names
    ]
    others = [index for index, work in enumerate(timeline.work) if work.name not in names]
    if timeline.compute[others].any():
        groups.append((None, others))
    return [
        {
            "step": name,
            "compute": timeline.compute[indices].sum(axis=0).tolist(),
            "communication": timeline.communication[indices].sum(axis=0).tolist(),
            "bytes": sum(int(timeline.work[index].sent.sum()) for index in indices),
            "messages": sum(int((timeline.work[index].sent > 0).sum()) for index in indices),
        }
        for name, indices in groups
    ]


def _workers(timeline: Timeline) -> list[dict[str, Any]]:
    weights, memory = timeline.weights, timeline.platform.memory
    return [
        {
            "worker": worker,
            "compute": float(timeline.compute[:, worker].sum()),
            "communication": float(timeline.communication[:, worker].sum()),
            "nanoseconds": int(timeline.finish[worker]),
            "weight_bytes": None if weights is None else int(weights[worker]),
            "memory": float(memory[worker]) if math.isfinite(memory[worker]) else None,
            "fits": worker not in timeline.does_not_fit,
        }
        for worker in range(timeline.platform.n_workers)
    ]


def _piece(event: Event) -> dict[str, Any]:
    return {
        "worker": event.worker,
        "step": event.step,
        "kind": event.kind,
        "start": event.start,
        "end": event.end,
        "target": event.target,
    }


def report(figures: Mapping[str, Any]) -> str:
    """The result for people."""
    tables = [_summary(figures), _layers_table(figures["layers"])]
    if figures["critical_path"]:
        tables.append(_path_table(figures["critical_path"], figures["seconds"]))
    tables.append("\n".join(["assumed", *(f"  {line}" for line in figures["assumptions"])]))
    if figures["chakra"] is not None:
        tables.append(f"for ASTRA-sim\n  {shlex.join(figures['chakra']['command'])}")
    return "\n\n".join(tables)


def _summary(figures: Mapping[str, Any]) -> str:
    platform, workers = figures["platform"], figures["workers"]
    rows = [
        ("plan", f"{figures['plan']}, {len(workers)} workers, batches of {figures['batch_size']}"),
        ("platform", f"{platform['name']}, {platform['topology'].replace('_', ' ')}, {figures['sends']} sends"),
        ("a batch", _total(figures)),
    ]
    if figures["direct"] is not None:
        faster = figures["direct"]["seconds"] / figures["seconds"] if figures["seconds"] else 1.0
        rows.append(("every value sent", f"{_total(figures['direct'])}: {faster:.3g} × the time"))
    too_large = [worker for worker in workers if not worker["fits"]]
    rows += [
        ("memory", f"worker {w['worker']} cannot hold its {w['weight_bytes']:,} bytes of weights in {w['memory']:,.0f}")
        for w in too_large
    ]
    if figures["astra_sim"] is not None:
        answer = figures["astra_sim"]
        taken = _time(max(answer["nanoseconds"]) / 1e9)
        rows.append(("ASTRA-sim", f"{taken}; workers differ by at most {answer['largest_difference']:,} ns"))
    if figures["picture"] is not None:
        rows.append(("picture", figures["picture"]))
    return aligned(rows)


def _total(totals: Mapping[str, Any]) -> str:
    sent = f"{totals['bytes']:,} bytes in {totals['messages']:,} messages"
    return f"{_time(totals['seconds'])}, {totals['communication_share']:.1%} of it communication; {sent}"


def _layers_table(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = [("step", "slowest worker", "computes", "sends and waits", "bytes", "messages")]
    for layer in layers:
        compute, communication = np.array(layer["compute"]), np.array(layer["communication"])
        slowest = int((compute + communication).argmax())
        times = (_time(compute[slowest]), _time(communication[slowest]))
        sent = (f"{layer['bytes']:,}", f"{layer['messages']:,}")
        rows.append((layer["step"] or "(all others)", str(slowest), *times, *sent))
    return aligned(rows)


def _path_table(path: Sequence[Mapping[str, Any]], total: float) -> str:
    """The longest pieces of the critical path."""
    longest = sorted(path, key=lambda piece: piece["start"] - piece["end"])[:_LONGEST]
    rows = [("critical path", "step", "time", "of the batch")]
    for piece in longest:
        what = f"worker {piece['worker']} {_DOES[piece['kind']]}"
        what += "" if piece["target"] is None else f" {piece['target']}"
        taken = piece["end"] - piece["start"]
        rows.append((what, piece["step"], _time(taken), f"{taken / total:.1%}" if total else "–"))
    return aligned(rows) + f"\nthe {len(longest)} longest of {len(path)} pieces"


_DOES = {"compute": "computes", "send": "sends to", "overhead": "starts an exchange"}


def _time(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit:
            return f"{seconds / unit:.4g} {name}"
    return f"{seconds * 1e9:.4g} ns"
