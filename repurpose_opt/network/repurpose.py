"""`repurpose`: a trained network in, a plan for P workers out."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument, NoSolution
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.network.calibrate import check_loss, checked_labels, gather, loss_weights
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning, batches_of, fine_tune
from repurpose_opt.network.planned import planned
from repurpose_opt.network.search import largest_within
from repurpose_opt.network.sweep import Placement, Sweep, Trial
from repurpose_opt.network.trace import Chain, trace
from repurpose_opt.problem import checked_numbers
from repurpose_opt.progress import progress
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.solver import SolveOptions


def repurpose(
    model: nn.Module,
    example_input: torch.Tensor,
    n_workers: int,
    *,
    data: Any,
    input_owner: ArrayLike | None = None,
    output_owner: int | Sequence[int] = 0,
    formulation: Formulation | None = None,
    partitioner: str = "auto",
    pruner: str = "auto",
    worker_share: ArrayLike | None = None,
    memory_limit: float | None = None,
    link_price: ArrayLike | None = None,
    loss: str = "cross_entropy",
    finetune: FineTuning | None = None,
    checkpoint_dir: str | Path | None = None,
    seed: int = 0,
) -> Plan:
    """Place, prune, repair and, if asked, fine-tune a multilayer perceptron for P workers.

    model           a chain of Flatten, Linear and elementwise modules in float32 or float64; not changed
    example_input   (1, …) one input, to check that the model runs
    data            inputs (samples, …), (inputs, labels), or batches of either: calibration, and training if
                    `finetune`; never the data that judge the result
    input_owner     (n,) worker that holds each input of the first linear layer; default contiguous
    output_owner    the worker, or workers, that want the answer
    formulation     default Volume(budget=0.1). `budget` and `budget_bytes` are the whole network's, `transfer_price`
                    every layer's, `max_nmse` the output's; with communication="busiest" a `transfer_price` only
    worker_share    (P,) relative capacity; default equal
    memory_limit    bytes that a worker's weights may take; a plan that needs more is refused
    link_price      (P, P) or a number: price of a byte from worker p (row) to worker k; default 1
    loss            what the model was trained for. "cross_entropy": labels are classes (samples,), outputs are their
                    logits. "squared_error": labels are numbers (samples, outputs), for regression
    finetune        None for none
    checkpoint_dir  folder for finished layers; a run that was interrupted goes on from there

    Errors of all layers are weighted by the loss, so that one price serves them all. The plan computes in the model's
    dtype; its linear layers all have a bias, which repairs means, also where the model's have none.

    Raises InvalidArgument, UnsupportedModule, NoSolution.
    """
    chain = trace(model, example_input)
    check_loss(loss, chain)
    inputs, labels = _checked_data(data, example_input, chain, loss)
    formulation = Volume(budget=0.1) if formulation is None else formulation
    _check_limit(formulation)
    if finetune is not None and finetune.distillation < 1 and labels is None:
        raise InvalidArgument("finetune", "a loss on labels, but data has none", "(inputs, labels), or distillation=1")
    if finetune is not None and not isinstance(finetune, FineTuning):
        raise InvalidArgument("finetune", repr(finetune), "FineTuning(…), or None")
    if memory_limit is not None and not (isinstance(memory_limit, (int, float)) and memory_limit > 0):
        raise InvalidArgument("memory_limit", memory_limit, "bytes > 0")
    placement = _placement(chain, n_workers, input_owner, output_owner, worker_share, link_price)
    with torch.no_grad():
        first_inputs = chain.before_first(inputs)
    fingerprint = _fingerprint(chain, first_inputs, placement, formulation, partitioner, pruner, loss, seed)
    with progress() as report:
        report("weighing errors by the loss")
        sweep = Sweep(
            chain=chain,
            inputs=first_inputs,
            loss_weights=loss_weights(chain, inputs, seed, loss),
            placement=placement,
            partitioner=partitioner,
            pruner=pruner,
            options=SolveOptions(seed=seed),
            checkpoint=Checkpoint(checkpoint_dir, fingerprint),
            report=report,
        )
        trial = best_trial(sweep, formulation)
        plan = plan_of(chain, trial, placement, {"seed": seed, "trials": curve(sweep.trials)})
        _check_memory(plan, memory_limit)
        if finetune is not None:
            report("fine-tuning")
            batches = batches_of(inputs, labels, finetune.batch_size, seed)
            fine_tune(plan.model, batches, finetune, teacher=chain.model, loss=loss, seed=seed)
    return plan


def best_trial(sweep: Sweep, formulation: Formulation) -> Trial:
    """The trial that meets the formulation over the whole network, by one price for all layers.

    Whatever else the formulation says, such as what messages may be, holds for every layer as it is.

    Raises NoSolution where no price reaches `max_nmse`.
    """
    if not isinstance(formulation, Volume) or formulation.transfer_price is not None:
        return sweep.run(formulation)

    unlimited = replace(formulation, transfer_price=0.0, budget=None, budget_bytes=None, max_nmse=None)

    def at_price(price: float) -> Trial:
        return sweep.run(replace(unlimited, transfer_price=price))

    def nothing_sent() -> Trial:
        return sweep.run(replace(unlimited, transfer_price=None, budget_bytes=0))

    first = _first_price(sweep)
    if formulation.max_nmse is not None:
        return _least_volume(sweep, at_price, first, formulation.max_nmse)
    if formulation.budget == 0 or formulation.budget_bytes == 0:
        return nothing_sent()
    if formulation.budget == 1 or (formulation.budget_bytes or 0) >= sweep.most_volume:
        return at_price(0.0)
    trial = largest_within(at_price, lambda trial: _used(trial, formulation), first, -1)
    # No price keeps values off a link that costs nothing; a budget counts their bytes all the same.
    return trial if _used(trial, formulation) <= 1 else nothing_sent()


def plan_of(chain: Chain, trial: Trial, placement: Placement, stats: dict[str, Any]) -> Plan:
    """The plan that a trial amounts to: a copy of the model with its weights, owners and exchanges."""
    # Copies, since fine-tuning switches their mode while the chain is the teacher.
    modules = OrderedDict((str(i), copy.deepcopy(module)) for i, module in enumerate(chain.model))
    layers = []
    input_owner = placement.input_owner
    for position, solved in zip(chain.linears, trial.layers, strict=True):
        name, messages = str(position), solved.exchange
        modules[name], layer = planned(name, input_owner, solved.owner, messages, solved.weight, solved.bias)
        layers.append(layer)
        input_owner = solved.owner
    model = nn.Sequential(modules).eval().requires_grad_(False)
    return Plan(model, tuple(layers), placement.n_workers, trial.direct_volume, stats)


def curve(trials: Sequence[Trial]) -> list[dict[str, float]]:
    """Price, volume and output NMSE of every trial of a run."""
    return [
        {
            "transfer_price": getattr(trial.formulation, "transfer_price", None) or 0.0,
            "volume_fraction": trial.volume / max(trial.direct_volume, 1),
            "output_nmse": trial.output_nmse,
        }
        for trial in trials
    ]


def _first_price(sweep: Sweep) -> float:
    """A price in the order of magnitude of what a byte is worth: the loss-weighted energy over the direct bytes."""
    energy = total = 0.0
    values = sweep.inputs
    with torch.no_grad():
        for index, weights in enumerate(sweep.loss_weights):
            linear = sweep.chain.linear(index)
            total += linear.in_features * linear.weight.element_size()
            outputs = linear(values[:4096])
            energy += float(outputs.double().var(0, correction=0).numpy() @ weights)
            values = sweep.chain.after(index, outputs)
    return max(0.1 * energy / total, 1e-30)


def _used(trial: Trial, formulation: Volume) -> float:
    """Share of the budget that a trial uses."""
    allowed = formulation.allowed_bytes(trial.direct_volume)
    assert allowed is not None
    if allowed == 0:
        return math.inf if trial.volume > 0 else 1.0
    return trial.volume / allowed


def _least_volume(sweep: Sweep, at_price: Callable[[float], Trial], first: float, max_nmse: float) -> Trial:
    """The trial of least volume whose output NMSE is at most `max_nmse`. Raises NoSolution."""

    def used(trial: Trial) -> float:
        if trial.volume == 0 and trial.output_nmse <= max_nmse:
            return 1.0  # nothing is left to save
        return trial.output_nmse / max(max_nmse, 1e-12)

    largest_within(at_price, used, first, +1)
    good = [trial for trial in sweep.trials if trial.output_nmse <= max_nmse]
    if not good:
        least = min(trial.output_nmse for trial in sweep.trials)
        raise NoSolution(f"max_nmse {max_nmse:g} cannot be met: the least that was reached is {least:.4g}")
    return min(good, key=lambda trial: trial.volume)


def _checked_data(
    data: Any, example_input: torch.Tensor, chain: Chain, loss: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs in the model's dtype, and labels as the loss takes them."""
    inputs, labels = gather(data)
    if inputs.shape[1:] != example_input.shape[1:]:
        got, allowed = tuple(inputs.shape[1:]), tuple(example_input.shape[1:])
        raise InvalidArgument("data", f"inputs of shape {got}", f"the example_input's, {allowed}")
    if labels is not None:
        labels = checked_labels(labels, loss, chain.linear(-1).out_features)
        if loss == "squared_error":
            labels = labels.to(chain.dtype)
    return inputs.to(chain.dtype), labels


def _check_limit(formulation: Formulation) -> None:
    """Limits of a whole network are met by its total volume, layers of which may have different busiest workers."""
    if (
        isinstance(formulation, Volume)
        and formulation.communication == "busiest"
        and formulation.transfer_price is None
    ):
        allowed = 'a transfer_price with communication="busiest", or communication="total"'
        raise InvalidArgument("formulation", repr(formulation), allowed)


def _placement(
    chain: Chain,
    n_workers: int,
    input_owner: ArrayLike | None,
    output_owner: int | Sequence[int],
    worker_share: ArrayLike | None,
    link_price: ArrayLike | None,
) -> Placement:
    if isinstance(n_workers, bool) or not isinstance(n_workers, (int, np.integer)) or n_workers < 1:
        raise InvalidArgument("n_workers", repr(n_workers), "a whole number ≥ 1")
    P, n = int(n_workers), chain.linear(0).in_features
    owner = np.arange(n) * P // n if input_owner is None else _workers("input_owner", input_owner, P)
    if owner.shape != (n,):
        raise InvalidArgument("input_owner", f"shape {owner.shape}", f"({n},), one worker an input")
    outputs = tuple(np.unique(_workers("output_owner", output_owner, P)).tolist())
    share = _shares(worker_share, P, outputs)
    prices = checked_numbers("link_price", link_price, (P, P), default=1.0)
    return Placement(P, owner, outputs, share, prices)


def _workers(name: str, value: ArrayLike, n_workers: int) -> NDArray[np.int64]:
    """At least one worker, each in 0 … P−1."""
    workers = np.asarray(value)
    allowed = f"whole numbers in 0 … {n_workers - 1}"
    if workers.size == 0 or workers.dtype.kind not in "iu":
        raise InvalidArgument(name, f"{workers.dtype} of shape {workers.shape}", allowed)
    outside = workers[(workers < 0) | (workers >= n_workers)]
    if len(outside):
        raise InvalidArgument(name, f"worker {outside[0]}", allowed)
    return workers.astype(np.int64)


def _shares(value: ArrayLike | None, n_workers: int, outputs: tuple[int, ...]) -> NDArray[np.float64]:
    """(P,) relative capacities that sum to 1, some of it where the outputs go."""
    share = checked_numbers("worker_share", value, (n_workers,), default=1.0)
    if share[list(outputs)].sum() == 0:
        raise InvalidArgument("worker_share", f"0 for output_owner {list(outputs)}", "above 0 for one of them")
    return share / share.sum()


def _check_memory(plan: Plan, memory_limit: float | None) -> None:
    if memory_limit is None:
        return
    for worker in range(plan.n_workers):
        used = sum(part.nbytes for part in plan.sub_model(worker))
        if used > memory_limit:
            allowed = f"at least {used}, which worker {worker} needs"
            raise InvalidArgument("memory_limit", f"{memory_limit:g} bytes", allowed)


def _fingerprint(chain: Chain, inputs: torch.Tensor, placement: Placement, *settings: Any) -> str:
    digest = hashlib.sha256(repr((chain.model, placement.n_workers, placement.output_owner, settings)).encode())
    arrays: list[NDArray[Any]] = [tensor.numpy() for tensor in chain.model.state_dict().values()]
    arrays += [inputs.numpy(), placement.input_owner, placement.share]
    if placement.link_price is not None:
        arrays.append(placement.link_price)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
