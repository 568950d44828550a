"""`repurpose-opt demo`: all seeds, the table on standard output, the report folder."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from repurpose_opt.demo.digits import load_digits
from repurpose_opt.demo.rows import FINE_TUNING, TEST_GROUPS, Outcome, Row, run_seed
from repurpose_opt.demo.sensors import NOISE, SENSORS
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Volume
from repurpose_opt.progress import Report, progress

_NOTES = {
    "dense": "one process",
    "naive": "all inputs to all workers, each computes everything",
    "central": "all inputs to the worker that wants the answer",
    "direct": "the dense model split as it stands",
    "partial_sums": "tensor parallelism's row split where a layer narrows, lossless",
    "sparse": "magnitude pruning to as many weights as ours, no reordering",
    "late_fusion": "hidden layers block-diagonal as they stand",
    "late_fusion_filled": "the same with summed answers, filled up to the volume of ours_codes with the values of most "
    "energy",
    "ours": "placed, pruned, repaired; chosen values are sent",
    "ours_codes": "the same, but linear combinations of values are sent",
}


def run_demo(
    output: str | Path,
    *,
    mnist_directory: str | Path | None = None,
    budget: float = 0.01,
    codes_budget: float = 0.0045,
    seeds: int = 1,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Run `seeds` seeds from `seed` on; print the table or one JSON object, write the report to `output`.

    `budget` and `codes_budget` are the fractions of direct that the rows ours and ours_codes may send. The plans of
    the first seed are left in output/plan and output/plan-codes.
    """
    if seeds < 1:
        raise InvalidArgument("seeds", seeds, "a whole number ≥ 1")
    for name, fraction in (("budget", budget), ("codes_budget", codes_budget)):
        if not 0 < fraction < 1:
            raise InvalidArgument(name, f"{fraction:g}", "a fraction of direct, above 0 and below 1")
    formulations = {"ours": Volume(budget=budget), "ours_codes": Volume(budget=codes_budget, messages="codes")}
    digits = load_digits(mnist_directory)
    directory = Path(output)
    directory.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with progress() as report:
        for number in range(seeds):
            prefix = f"seed {seed + number}: " if seeds > 1 else ""
            suffix = "" if number == 0 else f"-seed-{seed + number}"
            plans = {"ours": directory / f"plan{suffix}", "ours_codes": directory / f"plan-codes{suffix}"}
            outcomes.append(run_seed(digits, formulations, seed + number, plans, _prefixed(report, prefix)))
    result = as_object(outcomes)
    facts = _facts(digits.source, budget, codes_budget, seeds, seed)
    _write_report(directory, outcomes, result, facts)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        print(as_table(result))
        print(f"\n{_check_lines(result)}\nReport: {directory / 'report.md'}   Plans: {directory / 'plan'}, plan-codes")


def _prefixed(report: Report, prefix: str) -> Report:
    return lambda step: report(prefix + step)


def as_object(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """A key per row: means over the seeds, with standard deviations of the accuracies."""
    result: dict[str, dict[str, Any]] = {}
    for name in outcomes[0].rows:
        rows = [outcome.rows[name] for outcome in outcomes]
        before = [row.accuracy_before_finetuning for row in rows]
        after = [row.accuracy for row in rows]
        result[name] = {
            "accuracy_before_finetuning": float(np.mean(before)),
            "accuracy": float(np.mean(after)),
            "accuracy_before_finetuning_std": float(np.std(before)),
            "accuracy_std": float(np.std(after)),
            **_mean_cost(rows),
        }
    for name in outcomes[0].ours:
        found = [outcome.ours[name] for outcome in outcomes]
        result[name] |= {
            "max_abs_difference": max(ours.max_abs_difference for ours in found),
            "bytes_sent": found[0].bytes_sent.tolist(),
            "bytes_predicted": found[0].bytes_predicted.tolist(),
            "bytes_agree": all((ours.bytes_sent == ours.bytes_predicted).all() for ours in found),
            "curve": [[list(point) for point in ours.curve] for ours in found],
        }
    return result


def as_table(result: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    header = (
        "| | accuracy before fine-tuning, % | after, % | numbers a sample | bytes | of direct, % | messages "
        "| busiest, bytes | busiest MACs, × 1/P | |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [header]
    for name, row in result.items():
        before, after = _percent(row, "accuracy_before_finetuning"), _percent(row, "accuracy")
        lines.append(
            f"| {name} | {before} | {after} | {row['values_per_sample']:.0f} "
            f"| {row['bytes_per_sample']:.0f} | {100 * row['volume_fraction']:.2f} | {row['messages']:.0f} "
            f"| {row['busiest_bytes']:.0f} | {row['busiest_macs']:.2f} | {_NOTES[name]} |"
        )
    return "\n".join(lines)


def _percent(row: dict[str, Any], name: str) -> str:
    spread = row[f"{name}_std"]  # 0 for a single seed, which has none
    return f"{100 * row[name]:.2f}" + (f" ± {100 * spread:.2f}" if spread else "")


def _mean_cost(rows: list[Row]) -> dict[str, float]:
    names = vars(rows[0].cost)
    return {name: float(np.mean([getattr(row.cost, name) for row in rows])) for name in names}


def _check_lines(result: dict[str, dict[str, Any]]) -> str:
    return "\n".join(_check_line(name, row) for name, row in result.items() if "bytes_agree" in row)


def _check_line(name: str, ours: dict[str, Any]) -> str:
    agree = "equal" if ours["bytes_agree"] else "DIFFER from"
    return (
        f"{name} on {SENSORS} processes: answers within {ours['max_abs_difference']:.1e} of the pruned model's in one "
        f"process; {np.sum(ours['bytes_sent']):,} bytes sent, which {agree} the predicted for every pair of workers."
    )


def _facts(source: str, budget: float, codes_budget: float, seeds: int, seed: int) -> dict[str, Any]:
    packages = ("repurpose-opt", "torch", "numpy", "scipy", "ortools")
    return {
        "digits": source,
        "command": f"repurpose-opt demo --budget {budget:g} --codes-budget {codes_budget:g} --seeds {seeds} "
        f"--seed {seed}",
        "test_groups": TEST_GROUPS,
        "fine_tuning_steps": FINE_TUNING.steps,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages if _is_installed(package)},
    }


def _is_installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package.replace("-", "_")) is not None


def _write_report(
    directory: Path, outcomes: list[Outcome], result: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> None:
    from repurpose_opt.demo.plots import draw_curve, draw_matrices, draw_traffic

    first = outcomes[0]
    for name, suffix in (("ours", ""), ("ours_codes", "-codes")):
        draw_matrices(first.ours[name].plan, first.dense, name, directory / f"matrices{suffix}.png")
        draw_traffic(first.ours[name].plan, directory / f"traffic{suffix}.png")
    draw_curve(first.rows, [outcome.ours for outcome in outcomes], directory / "curve.png")
    (directory / "results.json").write_text(json.dumps({"rows": result, "run": facts}, indent=2) + "\n")
    points = "\n".join(
        f"| {name} | {100 * fraction:.2f} | {100 * hit:.2f} |"
        for name in first.ours
        for fraction, hit in sorted(point for outcome in outcomes for point in outcome.ours[name].curve)
    )
    (directory / "report.md").write_text(
        f"""# Six sensors, one digit, six workers

Each of {SENSORS} sensors sees a different image of the same digit ({facts["digits"]}) with Gaussian noise of standard
deviation {NOISE:g} on pixels in [0, 1]. Accuracies are on {facts["test_groups"]:,} groups of images that neither
training nor calibration saw; fine-tuning takes {facts["fine_tuning_steps"]} steps for every row. Means ± standard
deviations over {len(outcomes)} seed(s).

{as_table(result)}

{_check_lines(result)}

The task is nearly separable: each sensor alone knows a good part of the answer, so `late_fusion` with fine-tuning
comes close to dense too.

![Accuracy against volume](curve.png)

Chosen values: weight matrices before and after, and what the workers send each other.

![Weight matrices before and after](matrices.png)

![Traffic between workers](traffic.png)

Codes: the same; a block that a code covers is of low rank instead of sparse.

![Weight matrices before and after, with codes](matrices-codes.png)

![Traffic between workers, with codes](traffic-codes.png)

Over prices, before fine-tuning:

| | of direct, % | accuracy, % |
|---|---|---|
{points}

Made by `{facts["command"]}` on {facts["cores"]} cores, Python {facts["python"]}, {_versions(facts)}.
"""
    )


def _versions(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
