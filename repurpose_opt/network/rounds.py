"""Alternation: rounds of calibrate → place → prune → refit → fine-tune, each sending less than the one before."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.network.calibrate import loss_weights
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import Batch, FineTuning, batches_of, fine_tune, held_out, in_rounds
from repurpose_opt.network.owners import Placement
from repurpose_opt.network.planned import plan_of
from repurpose_opt.network.products import product_with
from repurpose_opt.network.search import best_trial, curve
from repurpose_opt.network.sweep import SolvedLayer, Sweep, Trial
from repurpose_opt.network.trace import Network
from repurpose_opt.progress import Report
from repurpose_opt.runtime.coded import Product, effective_weight
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.solver import SolveOptions

FIRST_BUDGET = 4.0
"""Of the first of several rounds, times the last one's; the price is divided by it."""


@dataclass(frozen=True, eq=False)
class Alternation:
    """All that stays the same over the rounds of a run."""

    network: Network
    """The original."""
    data: Batch
    placement: Placement
    formulation: Formulation
    """Of the last round."""
    loss: str
    rounds: int
    finetune: FineTuning | None
    partitioner: str
    pruner: str
    looks_ahead: bool
    seed: int
    checkpoint: Checkpoint
    report: Report = field(default=lambda step: None)

    def run(self) -> Plan:
        """The plan of the last round, with a record of each in its stats. Raises NoSolution."""
        network, records = self.network, []
        owners: dict[str, NDArray[np.int64]] = {}
        settings = [None] * self.rounds if self.finetune is None else in_rounds(self.finetune, self.rounds)
        plan = None
        for number, (formulation, tuning) in enumerate(zip(self.formulations(), settings, strict=True), start=1):
            plan, record, owners = self._round(number, network, formulation, tuning, owners)
            records.append(record)
            network = network_of(network, plan)
        assert plan is not None
        stats = {"seed": self.seed, "rounds": records, "trials": records[-1].pop("trials")}
        return replace(plan, stats=stats)

    def formulations(self) -> list[Formulation]:
        """One for each round: budgets fall, and prices rise, by the same factor from round to round."""
        factors = np.geomspace(FIRST_BUDGET, 1.0, self.rounds) if self.rounds > 1 else [1.0]
        return [_eased(self.formulation, float(factor)) for factor in factors]

    def _round(
        self,
        number: int,
        network: Network,
        formulation: Formulation,
        tuning: FineTuning | None,
        owners: dict[str, NDArray[np.int64]],
    ) -> tuple[Plan, dict[str, Any], dict[str, NDArray[np.int64]]]:
        """The plan of one round, what it came to, and the owners of the neurons."""
        checkpoint = self.checkpoint.part(f"round-{number}")
        found = checkpoint.read("plan", _Finished.of_arrays)
        if found is None:
            started = time.monotonic()
            sweep, trial = self._placed(number, network, formulation, owners, checkpoint)
            plan = plan_of(network, self.placement, trial.layers, trial.unit_owner, trial.direct_volume, {})
            record = {
                "volume": plan.volume,
                "volume_fraction": plan.volume / max(plan.direct_volume, 1),
                "output_nmse": trial.output_nmse,
                "trials": curve(sweep.trials),
                **_score(plan.model, self.data, self.loss, "before_finetuning"),
            }
            if tuning is not None:
                self.report(f"round {number}: fine-tuning")
                self._tune(number, plan.model, tuning)
                record |= _score(plan.model, self.data, self.loss, "after_finetuning")
            found = _Finished(
                trial.layers, trial.unit_owner, trial.direct_volume, plan.model.state_dict(), record, sweep.owners
            )
            self._log({"round": number, **record, "seconds": time.monotonic() - started})
            checkpoint.write("plan", found.arrays())
        else:
            plan = plan_of(network, self.placement, found.layers, found.unit_owner, found.direct_volume, {})
            plan.model.load_state_dict(found.state)
        return replace(plan), dict(found.record), found.owners  # replace checks the plan anew

    def _placed(
        self,
        number: int,
        network: Network,
        formulation: Formulation,
        owners: dict[str, NDArray[np.int64]],
        checkpoint: Checkpoint,
    ) -> tuple[Sweep, Trial]:
        self.report(f"round {number}: weighing errors by the loss")
        sweep = Sweep(
            network=network,
            inputs=self.data[0],
            loss_weights=loss_weights(network, self.data[0], self.seed, self.loss),
            placement=self.placement,
            partitioner=self.partitioner,
            pruner=self.pruner,
            options=SolveOptions(seed=self.seed),
            checkpoint=checkpoint,
            report=lambda step: self.report(f"round {number}: {step}" if self.rounds > 1 else step),
            looks_ahead=self.looks_ahead,
            owners=dict(owners),
        )
        return sweep, best_trial(sweep, formulation)

    def _tune(self, number: int, model: nn.Module, tuning: FineTuning) -> None:
        training, validation = held_out(*self.data, tuning.validation_share, self.seed)
        batches = batches_of(*training, tuning.batch_size, self.seed + number - 1)
        teacher = self.network.graph
        fine_tune(model, batches, tuning, teacher, loss=self.loss, seed=self.seed, validation=validation)

    def _log(self, record: Mapping[str, Any]) -> None:
        """A line for each round, for whoever watches; with the seconds, which no plan holds."""
        if self.checkpoint.directory is not None:
            with (self.checkpoint.directory / "rounds.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")


@torch.no_grad()
def network_of(network: Network, plan: Plan) -> Network:
    """The network that a plan computes, codes multiplied out, to be placed again."""
    modules: dict[str, nn.Module] = {}
    for step in network.graph.steps:
        module = plan.model.get_submodule(step.name)
        if not isinstance(module, Product) or step.name not in network.products:
            modules[step.name] = module
            continue
        modules[step.name] = product_with(effective_weight(module), module.bias, network.product(step.name))
    return network.with_modules(modules)


@dataclass(frozen=True, eq=False)
class _Finished:
    """A round: its products as they were placed, and all weights as they are after fine-tuning."""

    layers: dict[str, SolvedLayer]
    unit_owner: NDArray[np.int64]
    direct_volume: int
    state: dict[str, torch.Tensor]
    record: Mapping[str, Any]
    owners: dict[str, NDArray[np.int64]]

    def arrays(self) -> dict[str, NDArray[Any]]:
        arrays: dict[str, NDArray[Any]] = {
            "unit_owner": self.unit_owner,
            "direct_volume": np.array(self.direct_volume),
            "record": np.frombuffer(json.dumps(self.record).encode(), dtype=np.uint8),
        }
        for name, layer in self.layers.items():
            arrays |= {f"layer/{name}/{part}": array for part, array in layer.arrays().items()}
        arrays |= {f"state/{name}": tensor.numpy() for name, tensor in self.state.items()}
        return arrays | {f"owners/{name}": owner for name, owner in self.owners.items()}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> _Finished:
        def under(prefix: str) -> dict[str, NDArray[Any]]:
            return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

        names = dict.fromkeys(name.rsplit("/", 1)[0] for name in under("layer/"))
        return _Finished(
            layers={name: SolvedLayer.of_arrays(under(f"layer/{name}/")) for name in names},
            unit_owner=arrays["unit_owner"],
            direct_volume=int(arrays["direct_volume"]),
            state={name: torch.from_numpy(array) for name, array in under("state/").items()},
            record=json.loads(arrays["record"].tobytes()),
            owners=under("owners/"),
        )


def _eased(formulation: Formulation, factor: float) -> Formulation:
    if factor == 1:
        return formulation
    assert isinstance(formulation, Volume)
    if formulation.transfer_price is not None:
        return replace(formulation, transfer_price=formulation.transfer_price / factor)
    if formulation.budget is not None:
        return replace(formulation, budget=min(1.0, formulation.budget * factor))
    assert formulation.budget_bytes is not None
    return replace(formulation, budget_bytes=round(formulation.budget_bytes * factor))


def check_rounds(rounds: Any, formulation: Formulation, finetune: FineTuning | None) -> None:
    """Raises InvalidArgument where several rounds make no sense."""
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidArgument("rounds", repr(rounds), "a whole number ≥ 1")
    if rounds == 1:
        return
    if finetune is None:
        raise InvalidArgument("rounds", rounds, "1 without fine-tuning between them: finetune=FineTuning(…)")
    if not isinstance(formulation, Volume) or formulation.max_nmse is not None:
        raise InvalidArgument("rounds", rounds, "1 for a formulation without a price or budget to change")


@torch.no_grad()
def _score(model: nn.Module, data: Batch, loss: str, when: str) -> dict[str, float]:
    """Accuracy, or mean squared error, on the data that calibrate and train: no measure of what is to be expected."""
    inputs, labels = data
    if labels is None:
        return {}
    total = 0.0
    for batch, target in zip(inputs.split(1024), labels.split(1024), strict=True):
        outputs = model(batch)
        if loss == "squared_error":
            total += float((outputs - target).double().square().flatten(1).mean(1).sum())
        else:
            total += int((outputs.argmax(1) == target).sum())
    name = "mean_squared_error" if loss == "squared_error" else "accuracy"
    return {f"training_{name}_{when}": total / len(inputs)}
