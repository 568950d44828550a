"""The network of the experiment `links`, fixed before anything was measured, and its plans in a folder.

A digit in four strips on four workers, 784-256-128-10, and worker 0 wants the answer: the network of `networks`, task
strips. Dense and ours are trained equally long, each with the choice that is best on validation images.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.demo.digits import load_digits
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Volume
from repurpose_opt.network import baselines
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks.networks_tasks import FULL, QUICK, Setting, Task, make, ours, perceptron

SEED = 0
ABOUT = "about.json"
WANTS_ANSWER = 0
"""The worker."""
DIRECT, SUMS = "direct", "partial sums"
OURS = {"values 3 %": ("values", 0.03), "codes 1 %": ("codes", 0.01), "codes 2 %": ("codes", 0.02)}
"""Plans of `repurpose`: messages and budget."""
ODD_WORKERS, ODD_WIDTHS = 3, (785, 257, 129, 10)
UNEVEN = (400, 300, 85)
"""Inputs of each of the three workers, as sensors of different size would have them."""
ODD = {"odd sizes": None, "odd sizes, uneven strips": UNEVEN}
"""Inputs of each worker, None: as equal as can be."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A folder with a plan in each subfolder and what they answer to."""

    folder: Path

    @property
    def about(self) -> dict[str, Any]:
        """Accuracies on the test images, volumes, widths and the source of the data."""
        content: dict[str, Any] = json.loads((self.folder / ABOUT).read_text())
        return content

    def plan(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-").replace(",", "").replace("%", "percent")

    def inputs(self, odd: bool = False) -> NDArray[np.float32]:
        """(inputs, samples), memory-mapped."""
        found: NDArray[np.float32] = np.load(self.folder / ("odd.npy" if odd else "inputs.npy"), mmap_mode="r")
        return found

    def labels(self) -> NDArray[np.int64]:
        """(samples,)"""
        found: NDArray[np.int64] = np.load(self.folder / "labels.npy")
        return found


def read_rows(inputs: NDArray[np.float32], rows: slice | Indices, batch: slice) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(inputs[rows, batch]))


def prepare(folder: Path, mnist_directory: Path | None, is_quick: bool) -> Prepared:
    """Train, repurpose and fine-tune, unless the folder has it from before.

    Raises InvalidArgument where the folder has plans of other digits or another size, and as `load_digits` does.
    """
    prepared = Prepared(folder)
    asked = {"all_of_mnist": mnist_directory is not None, "quick": is_quick}
    if not (folder / ABOUT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).write_text(
            json.dumps({**asked, **_made(prepared, mnist_directory, is_quick)}, indent=1) + "\n"
        )
    found = {key: prepared.about[key] for key in asked}
    if found != asked:
        raise InvalidArgument("work", f"{folder} with plans of {found}", f"a new folder, or plans of {asked}")
    return prepared


def _made(prepared: Prepared, mnist_directory: Path | None, is_quick: bool) -> dict[str, Any]:
    """Fill the folder; returns what is said about it."""
    (setting,) = (QUICK if is_quick else FULL)["strips"]
    digits = load_digits(mnist_directory)
    task = make(setting, digits, SEED)
    plans = dict(_plans(task))
    for name, plan in plans.items():
        plan.save(prepared.plan(name))
    _save_odd(prepared, is_quick)
    np.save(prepared.folder / "inputs.npy", np.ascontiguousarray(task.test.images.numpy().T))
    np.save(prepared.folder / "labels.npy", task.test.labels.numpy())
    return {
        "data": digits.source,
        "test_images": len(task.test.labels),
        "widths": setting.widths,
        "odd_widths": odd_widths(is_quick),
        "steps": _steps(setting),
        "plans": {name: _about(task, plan) for name, plan in plans.items()},
    }


def _steps(setting: Setting) -> dict[str, int]:
    return {"training": setting.training.steps, "fine_tuning": setting.choices[0].steps}


def _about(task: Task, plan: Plan) -> dict[str, Any]:
    cost = baselines.cost_of(plan)
    return {
        "accuracy": task.test.accuracy(plan.model),
        "numbers": cost.values_per_sample,
        "volume_fraction": cost.volume_fraction,
    }


def _plans(task: Task) -> Iterator[tuple[str, Plan]]:
    dense = _best(task, task.model)
    network = trace(dense, task.calibration[:1])
    yield DIRECT, baselines.direct_plan(network, task.placement)
    yield SUMS, sums_plan(network, task.placement)
    for name, (messages, budget) in OURS.items():
        plan = ours(task, budget, messages)
        yield name, replace(plan, model=_best(task, plan.model))


def _best(task: Task, model: Any) -> Any:
    """The model fine-tuned by the choice that is best on validation images."""
    return max((task.tuned(model, choice) for choice in task.setting.choices), key=task.validation.accuracy)


def sums_plan(network: Network, placement: Placement) -> Plan:
    """Direct, but for each pair of workers partial sums where these are fewer numbers than the values."""
    return baselines.contiguous_plan(network, placement, lambda name, lacking: lacking, sums=network.products)


# Sizes that no number of workers divides


def odd_widths(is_quick: bool) -> tuple[int, ...]:
    return (ODD_WIDTHS[0], 33, 17, 10) if is_quick else ODD_WIDTHS


def _save_odd(prepared: Prepared, is_quick: bool) -> None:
    """Plans of untrained networks: what matters is that the answer is that of one process."""
    widths = odd_widths(is_quick)
    generator = torch.Generator().manual_seed(SEED)
    inputs = torch.rand(512, widths[0], generator=generator)
    for name, strips in ODD.items():
        placement = _odd_placement(strips)
        model = perceptron(widths, SEED).eval()
        network = trace(model, inputs[:1])
        plans = {DIRECT: baselines.direct_plan(network, placement), SUMS: sums_plan(network, placement)}
        for messages in ("values", "codes"):
            plans[messages] = repurpose(
                model,
                inputs[:1],
                ODD_WORKERS,
                data=inputs,
                input_owner=placement.input_owner,
                output_owner=WANTS_ANSWER,
                formulation=Volume(budget=0.1, messages=messages),
                seed=SEED,
            )
        for kind, plan in plans.items():
            plan.save(prepared.plan(f"{name}, {kind}"))
    np.save(prepared.folder / "odd.npy", np.ascontiguousarray(inputs.numpy().T))


def _odd_placement(strips: tuple[int, ...] | None) -> Placement:
    n = ODD_WIDTHS[0]
    owner = np.arange(n) * ODD_WORKERS // n if strips is None else np.repeat(np.arange(ODD_WORKERS), strips)
    return Placement(ODD_WORKERS, owner, (WANTS_ANSWER,), np.full(ODD_WORKERS, 1 / ODD_WORKERS), None)
