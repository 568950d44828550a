"""`repurpose`: a trained network in, a plan for P workers out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.network.calibrate import check_loss, checked_labels, gather
from repurpose_opt.network.checkpoint import Checkpoint
from repurpose_opt.network.finetune import FineTuning
from repurpose_opt.network.owners import Placement, placement_of
from repurpose_opt.network.rounds import Alternation, check_rounds
from repurpose_opt.network.trace import Network, trace
from repurpose_opt.problem import checked_numbers
from repurpose_opt.progress import progress
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import reader_of
from repurpose_opt.runtime.modules import to_spec
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.splits import Split

MOST_SHARES = 6
"""Plans that are tried to keep within the memory of all workers."""


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
    memory_limit: ArrayLike | None = None,
    link_price: ArrayLike | None = None,
    loss: str = "cross_entropy",
    finetune: FineTuning | None = None,
    rounds: int = 1,
    look_ahead: bool = True,
    checkpoint_dir: str | Path | None = None,
    seed: int = 0,
) -> Plan:
    """Place, prune, repair and, if asked, fine-tune a network for P workers.

    model           in float32 or float64; not changed. Linear layers, convolutions, attention and what `trace` knows
                    are split; anything else runs on one worker, and `plan.stats["central"]` says why
    example_input   (1, …) one input, to check that the model runs
    data            inputs (samples, …), (inputs, labels), or batches of either: calibration, and training if
                    `finetune`; never the data that judge the result
    input_owner     worker that holds each place of the input: (channels,) of an image, (n,) of columns, where the model
                    begins with them or flattens its input; default contiguous. Token ids: all workers have them
    output_owner    the worker, or workers, that want the answer; the first one computes what cannot be split
    formulation     default Volume(budget=0.1). `budget` and `budget_bytes` are the whole network's, `transfer_price`
                    every product's, `max_nmse` the output's; with communication="busiest" a `transfer_price` only.
                    What norms and gatherings send is exact and counts towards the volume
    worker_share    (P,) relative capacity; default equal
    memory_limit    bytes that a worker's weights may take, a number or (P,): where a plan needs more, workers that are
                    full get a smaller share, up to five times
    link_price      (P, P) or a number: price of a byte from worker p (row) to worker k; default 1
    loss            what the model was trained for. "cross_entropy": labels are classes (samples,), outputs are their
                    logits. "squared_error": labels are numbers of the outputs' shape, for regression
    finetune        None for none
    rounds          of calibrate → place → prune → refit → fine-tune; budgets fall by the same factor from round to
                    round, from four times the last one
    look_ahead      whether neurons also go by what it costs to send their values on
    checkpoint_dir  folder for what is finished; a run that was interrupted goes on from there, to the same plan

    Errors of all products are weighted by the loss, so that one price serves them all. The plan computes in the model's
    dtype; its products all have a bias, which repairs means, also where the model's have none.

    Raises InvalidArgument, UnsupportedModule, NoSolution.
    """
    network = trace(model, example_input)
    check_loss(loss, network)
    inputs, labels = _checked_data(data, example_input, network, loss)
    formulation = Volume(budget=0.1) if formulation is None else formulation
    _check_limit(formulation)
    if finetune is not None and not isinstance(finetune, FineTuning):
        raise InvalidArgument("finetune", repr(finetune), "FineTuning(…), or None")
    if finetune is not None and finetune.distillation < 1 and labels is None:
        raise InvalidArgument("finetune", "a loss on labels, but data has none", "(inputs, labels), or distillation=1")
    check_rounds(rounds, formulation, finetune)
    placement = placement_of(network, n_workers, input_owner, output_owner, worker_share, link_price)
    limits = None if memory_limit is None else checked_numbers("memory_limit", memory_limit, (n_workers,), default=0.0)
    tuning = None if finetune is None else _described(finetune)
    settings = (formulation, partitioner, pruner, loss, seed, rounds, look_ahead, tuning, limits)
    fingerprint = _fingerprint(network, inputs, labels, placement, *settings)
    checkpoint = Checkpoint(checkpoint_dir, fingerprint)
    with progress() as report:
        run = Alternation(
            network=network,
            data=(inputs, labels),
            placement=placement,
            formulation=formulation,
            loss=loss,
            rounds=rounds,
            finetune=finetune,
            partitioner=partitioner,
            pruner=pruner,
            looks_ahead=look_ahead,
            seed=seed,
            checkpoint=checkpoint,
            report=report,
        )
        plan = run.run() if limits is None else _within_memory(run, limits)
    return replace(plan, stats={**plan.stats, "central": dict(network.central)})


def _within_memory(run: Alternation, limits: NDArray[np.float64]) -> Plan:
    """A plan of which no worker's weights take more bytes than its limit (P,). Raises InvalidArgument."""
    share, checkpoint = run.placement.share, run.checkpoint
    used = np.zeros(len(limits))
    for number in range(MOST_SHARES):
        placement = replace(run.placement, share=share)
        part = checkpoint if number == 0 else checkpoint.part(f"memory-{number}")
        plan = replace(run, placement=placement, checkpoint=part).run()
        used = np.array([sum(step.nbytes for step in plan.sub_model(worker)) for worker in range(plan.n_workers)])
        if (used <= limits).all():
            return plan
        # A little less than in proportion: rounding to whole neurons must not end above the limit.
        share = share * np.where(used > limits, 0.95 * limits / np.maximum(used, 1), 1.0)
        if share[list(placement.output_owner)].sum() == 0:
            break
        share = share / share.sum()
    worker = int(np.argmax(used - limits))
    allowed = f"at least {used[worker]:g}, which worker {worker} needs"
    raise InvalidArgument("memory_limit", f"{limits[worker]:g} bytes", allowed)


def _checked_data(
    data: Any, example_input: torch.Tensor, network: Network, loss: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs in the model's dtype, and labels as the loss takes them."""
    inputs, labels = gather(data)
    if inputs.shape[1:] != example_input.shape[1:]:
        got, allowed = tuple(inputs.shape[1:]), tuple(example_input.shape[1:])
        raise InvalidArgument("data", f"inputs of shape {got}", f"the example_input's, {allowed}")
    if labels is not None:
        labels = checked_labels(labels, loss, network.shapes[network.output])
        if loss == "squared_error":
            labels = labels.to(network.dtype)
    if network.layouts[INPUT] is not None:
        return inputs.to(network.dtype), labels
    vocabulary = reader_of(network.graph, Split(network.input_shape, None), 0, "int64").vocabulary
    assert vocabulary is not None
    if inputs.is_floating_point() or inputs.min() < 0 or inputs.max() >= vocabulary:
        found = f"{str(inputs.dtype).removeprefix('torch.')} {inputs.min()} … {inputs.max()}"
        raise InvalidArgument("data", found, f"token ids, whole numbers in 0 … {vocabulary - 1}")
    return inputs, labels


def _check_limit(formulation: Formulation) -> None:
    """Limits of a whole network are met by its total volume, layers of which may have different busiest workers."""
    if (
        isinstance(formulation, Volume)
        and formulation.communication == "busiest"
        and formulation.transfer_price is None
    ):
        allowed = 'a transfer_price with communication="busiest", or communication="total"'
        raise InvalidArgument("formulation", repr(formulation), allowed)


def _described(finetune: FineTuning) -> dict[str, Any]:
    """Settings that are the same in every process: functions by their names."""
    functions = {"optimizer": finetune.optimizer, "loss": finetune.loss}
    names = {name: f"{function.__module__}.{_name(function)}" for name, function in functions.items() if function}
    return {**vars(finetune), **names}


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def _fingerprint(
    network: Network, inputs: torch.Tensor, labels: torch.Tensor | None, placement: Placement, *settings: Any
) -> str:
    # The repr of a graph names the functions in it, specs the arguments of modules without a repr of their own.
    specs = [to_spec(network.graph.module(step.name)) for step in network.graph.steps]
    described = (network.graph, network.graph.steps, specs, placement.n_workers, placement.output_owner, settings)
    digest = hashlib.sha256(repr(described).encode())
    arrays: list[NDArray[Any]] = [tensor.numpy() for tensor in network.graph.state_dict().values()]
    arrays += [inputs.numpy(), placement.share]
    arrays += [] if labels is None else [labels.numpy()]
    arrays += [given for given in (placement.input_owner, placement.link_price) if given is not None]
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
