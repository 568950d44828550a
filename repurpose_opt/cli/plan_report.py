"""What `run` says of a plan: as one object for --json, and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from repurpose_opt.cli.text import aligned

if TYPE_CHECKING:
    from repurpose_opt.formulation import Volume
    from repurpose_opt.runtime.plan import Plan

BATCH_SIZE = 256
"""Samples at once for which memory in use is stated."""


def figures_of(
    plan: Plan, formulation: Volume, seconds: Mapping[int, float], judged: Mapping[str, Any] | None
) -> dict[str, Any]:
    """JSON values of a plan; `seconds` by round, `judged` what test samples say, None without any."""
    given = {name: value for name, value in asdict(formulation).items() if value is not None}
    rounds = [
        {"round": number, **{key: _finite(value) for key, value in record.items() if key != "trials"}}
        for number, record in enumerate(plan.stats["rounds"], start=1)
    ]
    return {
        "workers": plan.n_workers,
        "formulation": {"name": formulation.name, **given},
        "volume": plan.volume,
        "direct_volume": plan.direct_volume,
        "volume_fraction": plan.volume / plan.direct_volume if plan.direct_volume else None,
        "busiest": plan.busiest,
        "rounds": [{**record, "seconds": seconds.get(record["round"])} for record in rounds],
        "per_worker": _per_worker(plan),
        "central": dict(plan.stats["central"]),
        "test": None if judged is None else dict(judged),
    }


def _per_worker(plan: Plan) -> list[dict[str, int]]:
    """Neurons, work, traffic a sample and bytes of memory of each worker."""
    products = [layer for layer in plan.layers if layer.weight_macs > 0]
    neurons = np.sum([np.bincount(layer.owner, minlength=plan.n_workers) for layer in products], axis=0)
    traffic, macs, memory = plan.traffic(), plan.worker_macs(), plan.memory(BATCH_SIZE)
    return [
        {
            "worker": worker,
            "neurons": int(neurons[worker]),
            "macs": int(macs[worker]),
            "bytes_sent": int(traffic[worker].sum()),
            "bytes_received": int(traffic[:, worker].sum()),
            "memory": memory[worker].weights,
            "memory_in_use": memory[worker].total,
        }
        for worker in range(plan.n_workers)
    ]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(figures: Mapping[str, Any]) -> str:
    """The result for people."""
    tables = [_summary(figures), _rounds_table(figures["rounds"]), _workers_table(figures["per_worker"])]
    if figures["central"]:
        tables.append(aligned([("on one worker", "why"), *figures["central"].items()]))
    return "\n\n".join(tables)


def _summary(figures: Mapping[str, Any]) -> str:
    settings = " ".join(
        f"{key}={value if isinstance(value, str) else format(value, 'g')}"
        for key, value in figures["formulation"].items()
        if key != "name"
    )
    of_direct = "" if figures["volume_fraction"] is None else f", {figures['volume_fraction']:.2%} of direct"
    rows = [
        ("model", f"{figures['model']}, {figures['workers']} workers"),
        ("formulation", f"{figures['formulation']['name']} {settings}"),
        ("volume", f"{figures['volume']:,} bytes a sample{of_direct}"),
        ("busiest worker", f"{figures['busiest']:,} bytes a sample"),
        ("test", _test_row(figures["test"])),
        ("plan", figures["plan"]),
        ("seconds", f"{figures['seconds']:.3g}"),
    ]
    if figures["checkpoint"] is not None:
        rows.append(("checkpoint", figures["checkpoint"]))
    return aligned(rows)


def _test_row(test: Mapping[str, Any] | None) -> str:
    if test is None:
        return "–"
    parts = [f"{test['samples']:,} samples"]
    if "accuracy" in test:
        parts.append(f"accuracy {test['accuracy']['plan']:.2%}, original {test['accuracy']['original']:.2%}")
    if "mean_squared_error" in test:
        errors = test["mean_squared_error"]
        parts.append(f"squared error {errors['plan']:.4g}, original {errors['original']:.4g}")
    return ", ".join([*parts, f"output NMSE {_number(test['output_nmse'])}"])


def _rounds_table(rounds: Sequence[Mapping[str, Any]]) -> str:
    is_accuracy = any("training_accuracy_before_finetuning" in record for record in rounds)
    metric, form = ("accuracy", ".2%") if is_accuracy else ("mean_squared_error", ".4g")
    name = "accuracy" if is_accuracy else "squared error"
    rows = [("round", "volume", "of direct", "output NMSE", f"{name} before", "after fine-tuning", "seconds")]
    for record in rounds:
        scores = [record.get(f"training_{metric}_{when}_finetuning") for when in ("before", "after")]
        before, after = ("–" if score is None else format(score, form) for score in scores)
        taken = "–" if record["seconds"] is None else f"{record['seconds']:.3g}"
        shown = (f"{record['volume']:,}", f"{record['volume_fraction']:.2%}", _number(record["output_nmse"]))
        rows.append((str(record["round"]), *shown, before, after, taken))
    return aligned(rows)


def _workers_table(workers: Sequence[Mapping[str, int]]) -> str:
    head = ("worker", "neurons", "MACs", "bytes sent", "bytes received", "bytes of weights", f"in use at {BATCH_SIZE}")
    names = ("neurons", "macs", "bytes_sent", "bytes_received", "memory", "memory_in_use")
    shown = [(str(worker["worker"]), *(f"{worker[name]:,}" for name in names)) for worker in workers]
    return aligned([head, *shown])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
