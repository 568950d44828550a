"""`repurpose`: a trained network in, a plan for P workers out."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument, NoSolution
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.network.calibrate import gather, loss_weights
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning, batches_of, fine_tune
from repurpose_opt.network.search import NOTHING_SENT, largest_within
from repurpose_opt.network.sweep import Placement, Sweep, Trial
from repurpose_opt.network.trace import Chain, trace
from repurpose_opt.runtime.plan import Plan, PlannedLayer
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
    finetune: FineTuning | None = None,
    checkpoint_dir: str | Path | None = None,
    seed: int = 0,
) -> Plan:
    """Place, prune, repair and, if asked, fine-tune a multilayer perceptron for P workers.

    model           a chain of Flatten, Linear and elementwise modules, classifying by its outputs; not changed
    example_input   (1, …) one input, to check that the model runs
    data            inputs (samples, …), (inputs, labels), or batches of either: calibration, and training if
                    `finetune`; never the data that judge the result
    input_owner     (n,) worker that holds each input of the first linear layer; default contiguous
    output_owner    the worker, or workers, that want the answer
    formulation     default Volume(budget=0.1). `budget` and `budget_bytes` are the whole network's, `transfer_price`
                    every layer's, `max_nmse` the output's
    worker_share    (P,) relative capacity; default equal
    memory_limit    bytes that a worker's weights may take
    finetune        None for none
    checkpoint_dir  folder for finished layers; a run that was interrupted goes on from there

    Errors of all layers are weighted by the loss, so that one price serves them all. Raises InvalidArgument,
    UnsupportedModule, NoSolution.
    """
    chain = trace(model, example_input)
    inputs, labels = gather(data)
    formulation = Volume(budget=0.1) if formulation is None else formulation
    if finetune is not None and finetune.distillation < 1 and labels is None:
        raise InvalidArgument("finetune", "a loss on labels, but data has none", "(inputs, labels), or distillation=1")
    with torch.no_grad():
        first_inputs = chain.before_first(inputs.to(chain.linear(0).weight.dtype))
    placement = _placement(chain, n_workers, input_owner, output_owner, worker_share, link_price)
    fingerprint = _fingerprint(chain, first_inputs, placement, formulation, partitioner, pruner, seed)
    with _progress() as report:
        report("weighing errors by the loss")
        sweep = Sweep(
            chain=chain,
            inputs=first_inputs,
            loss_weights=loss_weights(chain, inputs.to(first_inputs.dtype), seed),
            placement=placement,
            partitioner=partitioner,
            pruner=pruner,
            options=SolveOptions(seed=seed),
            checkpoint=Checkpoint(checkpoint_dir, fingerprint),
            report=report,
        )
        trial = best_trial(sweep, formulation)
        plan = plan_of(chain, trial, placement, {"seed": seed, "trials": curve(sweep.trials)})
        if finetune is not None:
            report("fine-tuning")
            batches = batches_of(inputs.to(first_inputs.dtype), labels, finetune.batch_size, seed)
            fine_tune(plan.model, batches, finetune, teacher=chain.model)
    _check_memory(plan, memory_limit)
    return plan


def best_trial(sweep: Sweep, formulation: Formulation) -> Trial:
    """The trial that meets the formulation over the whole network, by one price for all layers.

    Raises NoSolution where no price reaches `max_nmse`.
    """
    if not isinstance(formulation, Volume) or formulation.transfer_price is not None:
        return sweep.run(formulation)

    def at_price(price: float) -> Trial:
        return sweep.run(Volume(transfer_price=price))

    first = _first_price(sweep)
    if formulation.max_nmse is not None:
        most = formulation.max_nmse
        trial = largest_within(at_price, lambda trial: trial.output_nmse / max(most, 1e-12), first, +1)
        if trial.output_nmse > most:
            raise NoSolution(f"max_nmse {most:g} cannot be met: sending all that helps reaches {trial.output_nmse:.4g}")
        return trial
    if formulation.budget == 0 or formulation.budget_bytes == 0:
        return at_price(NOTHING_SENT)
    if formulation.budget == 1:
        return at_price(0.0)
    return largest_within(at_price, lambda trial: _used(trial, formulation), first, -1)


def plan_of(chain: Chain, trial: Trial, placement: Placement, stats: dict[str, Any]) -> Plan:
    """The plan that a trial amounts to: a copy of the model with its weights, owners and exchanges."""
    modules = OrderedDict((str(i), module) for i, module in enumerate(chain.model))
    planned = []
    input_owner = placement.input_owner
    for position, solved in zip(chain.linears, trial.layers, strict=True):
        modules[str(position)] = linear = nn.Linear(solved.weight.shape[1], solved.weight.shape[0])
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(solved.weight))
            linear.bias.copy_(torch.from_numpy(solved.bias))
        exchange = Exchange.of_transfers(solved.transfers, input_owner)
        planned.append(PlannedLayer(str(position), input_owner, solved.owner, exchange, linear.weight.element_size()))
        input_owner = solved.owner
    model = nn.Sequential(modules).eval().requires_grad_(False)
    return Plan(model, tuple(planned), placement.n_workers, trial.direct_volume, stats)


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
            energy += float(outputs.double().var(0).numpy() @ weights)
            values = sweep.chain.after(index, outputs)
    return max(0.1 * energy / total, 1e-30)


def _used(trial: Trial, formulation: Volume) -> float:
    """Share of the budget that a trial uses."""
    allowed = formulation.budget_bytes
    if allowed is None:
        assert formulation.budget is not None
        allowed = math.floor(formulation.budget * trial.direct_volume + 1e-9)
    if allowed == 0:
        return math.inf if trial.volume > 0 else 1.0
    return trial.volume / allowed


def _placement(
    chain: Chain,
    n_workers: int,
    input_owner: ArrayLike | None,
    output_owner: int | Sequence[int],
    worker_share: ArrayLike | None,
    link_price: ArrayLike | None,
) -> Placement:
    if isinstance(n_workers, bool) or not isinstance(n_workers, int) or n_workers < 1:
        raise InvalidArgument("n_workers", repr(n_workers), "a whole number ≥ 1")
    n = chain.linear(0).in_features
    owner = np.asarray(np.arange(n) * n_workers // n if input_owner is None else input_owner)
    if owner.shape != (n,) or owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= n_workers:
        got = f"{owner.dtype} of shape {owner.shape}, {owner.min()} … {owner.max()}" if owner.size else "nothing"
        raise InvalidArgument("input_owner", got, f"({n},) whole numbers in 0 … {n_workers - 1}")
    outputs = tuple(sorted({output_owner} if isinstance(output_owner, int) else set(output_owner)))
    if not outputs or min(outputs) < 0 or max(outputs) >= n_workers:
        raise InvalidArgument("output_owner", output_owner, f"workers in 0 … {n_workers - 1}")
    share = np.ones(n_workers) if worker_share is None else np.asarray(worker_share, dtype=np.float64)
    if (
        share.shape != (n_workers,)
        or not np.isfinite(share).all()
        or (share < 0).any()
        or share[list(outputs)].sum() == 0
    ):
        allowed = f"({n_workers},) numbers ≥ 0, above 0 for an output_owner"
        raise InvalidArgument("worker_share", np.array2string(share), allowed)
    prices = None if link_price is None else np.asarray(link_price, dtype=np.float64)
    return Placement(n_workers, owner.astype(np.int64), outputs, share / share.sum(), prices)


def _check_memory(plan: Plan, memory_limit: float | None) -> None:
    if memory_limit is None:
        return
    for worker in range(plan.n_workers):
        used = sum(
            part.weight.nbytes + (0 if part.bias is None else part.bias.nbytes) for part in plan.sub_model(worker)
        )
        if used > memory_limit:
            raise InvalidArgument(
                "memory_limit", f"{memory_limit:g} bytes", f"at least {used}, which worker {worker} needs"
            )


def _fingerprint(chain: Chain, inputs: torch.Tensor, placement: Placement, *settings: Any) -> str:
    digest = hashlib.sha256(repr((placement.n_workers, placement.output_owner, settings)).encode())
    arrays: list[NDArray[Any]] = [tensor.numpy() for tensor in chain.model.state_dict().values()]
    arrays += [inputs.numpy(), placement.input_owner, placement.share]
    if placement.link_price is not None:
        arrays.append(placement.link_price)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows the step under way on standard error, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    with console.status("starting") as status:
        yield status.update
