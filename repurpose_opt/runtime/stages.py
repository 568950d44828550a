"""A worker's steps, cut at its exchanges into stages: modules of tensors, which other runtimes can run.

A stage ends with the numbers to send; the next one begins with the numbers received. See export.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import nn

from repurpose_opt.runtime.exchange import ExchangeStep
from repurpose_opt.runtime.graph import INPUT, Step
from repurpose_opt.runtime.local import ExchangingStep, LocalStep, Part
from repurpose_opt.runtime.splits import Split

SAMPLES = "samples"
"""Stands in shapes for the number of samples."""
NamedStep: TypeAlias = tuple[Step, LocalStep | ExchangingStep]


class ArgumentRole(Enum):
    """What a tensor that goes into a stage, or comes out of it, is."""

    INPUT = "input"
    """The worker's part of the network's input."""
    RECEIVED = "received"
    """(numbers, samples, positions), by source worker."""
    CARRIED = "carried"
    """The output of a step in an earlier stage of the same worker."""
    SAMPLES = "samples"
    """(samples,) of which only the length is read: the input of a stage that reads nothing else."""
    SENT = "sent"
    """(numbers, samples, positions), by target worker."""
    OUTPUT = "output"
    """The worker's part of the network's output."""


@dataclass(frozen=True)
class Argument:
    """A tensor that goes into a stage, or comes out of it."""

    role: ArgumentRole
    step: str
    """Whose output it is, or of whose output it is made; INPUT for the network's input."""
    shape: tuple[int | str, ...]
    """One axis is SAMPLES."""
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The only one among the inputs, and among the outputs, of a stage."""
        return f"carried.{self.step}" if self.role is ArgumentRole.CARRIED else self.role.value


@dataclass(frozen=True, eq=False)
class Holdings:
    """What one worker holds of every tensor of a graph."""

    splits: Mapping[str, Split]
    """In the graph's order."""
    worker: int
    dtype: torch.dtype
    input_dtype: torch.dtype

    def is_empty(self, name: str) -> bool:
        return self.splits[name].layout is not None and len(self.splits[name].held(self.worker)) == 0

    def empty(self, name: str, samples: int) -> torch.Tensor:
        """The part of a tensor of which the worker holds nothing."""
        return torch.empty((0, samples, *self.splits[name].positions), dtype=self.dtype)

    def argument(self, role: ArgumentRole, name: str) -> Argument:
        """The worker's part of a tensor."""
        split, dtype = self.splits[name], self.input_dtype if name == INPUT else self.dtype
        if split.layout is None:
            return Argument(role, name, (SAMPLES, *split.shape), dtype)
        return Argument(role, name, (len(split.held(self.worker)), SAMPLES, *split.positions), dtype)

    def message(self, role: ArgumentRole, name: str, numbers: int) -> Argument:
        """What is sent or received of a tensor."""
        return Argument(role, name, (numbers, SAMPLES, self.splits[name].n_positions), self.dtype)


class Stage(nn.Module):
    """Steps of one worker between two exchanges: those whose output this worker, or another one, needs."""

    def __init__(
        self,
        inputs: Sequence[Argument],
        outputs: Sequence[Argument],
        steps: Sequence[NamedStep],
        following: ExchangingStep | None,
        holdings: Holdings,
    ) -> None:
        """`following` is the step before which numbers are sent when the stage is over."""
        super().__init__()
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._steps, self._following, self._holdings = steps, following, holdings
        self.tensors = nn.Module()
        for step, local in steps:
            self.tensors.add_module(step.name, _named(local))

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From tensors as in `inputs` to tensors as in `outputs`."""
        samples = tensors[0].shape[self.inputs[0].shape.index(SAMPLES)]
        given = list(zip(self.inputs, tensors, strict=True))
        values = {
            argument.step: tensor
            for argument, tensor in given
            if argument.role in (ArgumentRole.INPUT, ArgumentRole.CARRIED)
        }
        received = next((tensor for argument, tensor in given if argument.role is ArgumentRole.RECEIVED), None)
        for step, local in self._steps:
            if isinstance(local, ExchangingStep):
                values[step.name] = self._completed(step, local, values.get(step.inputs[0]), received, samples)
            else:
                empty = self._holdings.empty
                read = [values[name] if name in values else empty(name, samples) for name in step.inputs]
                values[step.name] = local.run(read, samples)
        return tuple(
            self._sent(values[argument.step], samples) if argument.role is ArgumentRole.SENT else values[argument.step]
            for argument in self.outputs
        )

    def _completed(
        self,
        step: Step,
        local: ExchangingStep,
        value: torch.Tensor | None,
        received: torch.Tensor | None,
        samples: int,
    ) -> torch.Tensor:
        """The output of a step, from what is held and from what was received before it, None where nothing was."""
        splits, dtype = self._holdings.splits, self._holdings.dtype
        columns = samples * splits[step.inputs[0]].n_positions
        if value is None:
            value = torch.empty(0, columns, dtype=dtype)  # flat, since ONNX cannot flatten what is empty
        if received is None or not local.exchange.is_needed:
            arrived = torch.empty(0, columns, dtype=dtype)
        else:
            arrived = received.flatten(1)
        offered = local.offered(value)
        output = local.completed(local.own_part(value, offered, samples), offered, arrived, samples)
        return output.view(len(output), samples, *splits[step.name].positions)

    def _sent(self, value: torch.Tensor, samples: int) -> torch.Tensor:
        assert self._following is not None
        numbers = _encoded(self._following.exchange, self._following.offered(value))
        return numbers.view(len(numbers), samples, -1)


def stages_of(part: Part, holdings: Holdings) -> list[Stage]:
    """The stages of one worker, in order: one more than there are exchanges in which any worker sends something."""
    cuts = [index for index, (_, local) in enumerate(part.steps) if _is_cut(local)]
    output = part.steps[-1][0].name
    live = set() if holdings.is_empty(output) else {output}
    stages: list[Stage] = []
    for first, stop in reversed(list(pairwise([0, *cuts, len(part.steps)]))):
        steps = part.steps[first:stop]
        stage = _stage(steps, part.steps[stop : stop + 1], live, holdings)
        taken = {argument.step for argument in stage.inputs if argument.role is ArgumentRole.CARRIED}
        live = (live - {step.name for step, _ in steps}) | taken
        stages.append(stage)
    return stages[::-1]


def _stage(
    steps: Sequence[NamedStep], following: Sequence[NamedStep], live: Collection[str], holdings: Holdings
) -> Stage:
    """Of these steps those that make what is sent before the following one, if there is any, and what is `live`.

    `live` are the names of all tensors that the worker needs after the stage.
    """
    role = ArgumentRole.CARRIED if following else ArgumentRole.OUTPUT
    outputs = [holdings.argument(role, step.name) for step, _ in steps if step.name in live]
    sender = None
    for step, local in following:
        assert isinstance(local, ExchangingStep)
        sender = local
        if numbers := sum(local.exchange.sent_counts):
            outputs.append(holdings.message(ArgumentRole.SENT, step.inputs[0], numbers))
    needed, kept = {argument.step for argument in outputs}, []
    for step, local in reversed(steps):
        if step.name in needed:
            kept.append((step, local))
            needed |= {name for name in step.inputs if not holdings.is_empty(name)}
    needed -= {step.name for step, _ in kept}
    inputs = _inputs(kept, needed, holdings)
    if outputs and not inputs:
        inputs = [Argument(ArgumentRole.SAMPLES, INPUT, (SAMPLES,), holdings.dtype)]
    return Stage(inputs, outputs, kept[::-1], sender, holdings)


def _inputs(steps: Sequence[NamedStep], read: Collection[str], holdings: Holdings) -> list[Argument]:
    """What is received before the first of the steps, and the tensors of these names that are no output of them."""
    inputs = [
        holdings.argument(ArgumentRole.INPUT if name == INPUT else ArgumentRole.CARRIED, name)
        for name in holdings.splits
        if name in read
    ]
    for step, local in steps:
        if isinstance(local, ExchangingStep) and (numbers := sum(local.exchange.received_counts)):
            inputs.append(holdings.message(ArgumentRole.RECEIVED, step.inputs[0], numbers))
    return inputs


def _named(local: LocalStep | ExchangingStep) -> nn.Module:
    """A module with a step's tensors as attributes: torch.export calls its constants by them."""
    module = nn.Module()
    for name, value in vars(local).items():
        if isinstance(value, torch.Tensor):
            setattr(module, name, value)
    return module


def _is_cut(local: LocalStep | ExchangingStep) -> bool:
    return isinstance(local, ExchangingStep) and local.exchange.is_needed


def _encoded(exchange: ExchangeStep, offered: torch.Tensor) -> torch.Tensor:
    """(held, samples) → (numbers sent, samples), as `ExchangeStep.encode` but in new memory."""
    chosen = [part.encoder for part in exchange.encoders]
    return torch.cat([offered.index_select(0, one) if one.ndim == 1 else torch.mm(one, offered) for one in chosen])
