"""A network as steps in order, each a module that reads the outputs of steps before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from repurpose_opt.errors import InvalidArgument

INPUT = "input"
"""Name of the network's input, which is no step."""


@dataclass(frozen=True)
class Step:
    """One module in the graph, by its name, and the names of what it reads: steps, or INPUT."""

    name: str
    inputs: tuple[str, ...]


class Graph(nn.Module):
    """Steps in the order in which they run; the last one's output is the network's. Every step has its own module."""

    def __init__(self, steps: Iterable[tuple[str, nn.Module, tuple[str, ...]]]) -> None:
        super().__init__()
        self._steps: list[Step] = []
        known = {INPUT}
        for name, module, inputs in steps:
            if name in known or hasattr(self, name) or not name or "." in name:
                raise InvalidArgument(
                    "steps", f"the name {name!r}", "a new name without dots that no attribute of Graph has"
                )
            if not inputs or not set(inputs) <= known:
                raise InvalidArgument("steps", f"{name!r} of {inputs}", "inputs that come before")
            known.add(name)
            self.add_module(name, module)
            self._steps.append(Step(name, inputs))
        if not self._steps:
            raise InvalidArgument("steps", "none", "at least one")

    @staticmethod
    def chain(model: nn.Sequential) -> Graph:
        """The graph of a flat nn.Sequential, with its modules; one that stands in two places is in both."""
        listed = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if "." not in name]
        names = [name for name, _ in listed[1:]]
        graph = Graph(
            (name, module, (before,)) for (name, module), before in zip(listed[1:], [INPUT, *names], strict=False)
        )
        graph.training = model.training
        return graph

    @property
    def steps(self) -> Sequence[Step]:
        return self._steps

    def module(self, name: str) -> nn.Module:
        """The module of a step."""
        return self.get_submodule(name)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        (_, output) = deque(self.outputs(value), maxlen=1).pop()
        return output

    def outputs(self, value: torch.Tensor) -> Iterator[tuple[Step, torch.Tensor]]:
        """Every step with its output, one after the other; what no later step reads is let go."""
        values, last_readers = {INPUT: value}, self.last_readers
        for step in self.steps:
            values[step.name] = self.get_submodule(step.name)(*(values[name] for name in step.inputs))
            yield step, values[step.name]
            for name in set(step.inputs):
                if last_readers[name] == step.name:
                    del values[name]

    @property
    def last_readers(self) -> Mapping[str, str]:
        """The step that reads an output last, by the output's name."""
        return {name: step.name for step in self.steps for name in step.inputs}

    def readers(self, name: str) -> list[Step]:
        """The steps that read an output."""
        return [step for step in self.steps if name in step.inputs]
