"""Reads a multilayer perceptron out of a model by torch.fx: a chain of linear layers and elementwise modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.runtime.modules import ELEMENTWISE


@dataclass(frozen=True, eq=False)
class Chain:
    """The modules of a perceptron in order, as one flat nn.Sequential (copies, in evaluation mode)."""

    model: nn.Sequential

    @cached_property
    def linears(self) -> tuple[int, ...]:
        """Positions of the linear layers in `model`."""
        return tuple(i for i, module in enumerate(self.model) if isinstance(module, nn.Linear))

    def linear(self, index: int) -> nn.Linear:
        module = self.model[self.linears[index]]
        assert isinstance(module, nn.Linear)
        return module

    def before_first(self, inputs: torch.Tensor) -> torch.Tensor:
        """(samples, n) what the first linear layer reads of the model's inputs."""
        return self._through(inputs, 0, self.linears[0])

    def after(self, index: int, outputs: torch.Tensor) -> torch.Tensor:
        """What the next linear layer reads, given the outputs of linear layer `index`."""
        following = self.linears[index + 1] if index + 1 < len(self.linears) else len(self.model)
        return self._through(outputs, self.linears[index] + 1, following)

    def _through(self, value: torch.Tensor, first: int, last: int) -> torch.Tensor:
        for module in self.model[first:last]:
            value = module(value)
        return value


def trace(model: nn.Module, example_input: torch.Tensor) -> Chain:
    """The chain of a model whose graph is one path of Flatten, Linear and elementwise modules.

    Raises UnsupportedModule, naming the module that cannot be split, and InvalidArgument where the example input
    does not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise InvalidArgument("model", type(model).__name__, "a torch.nn.Module")
    try:
        graph = fx.symbolic_trace(model).graph
    except (fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedModule(f"model: torch.fx cannot trace it ({error}); allowed: a chain of modules") from None
    modules: list[nn.Module] = []
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                raise UnsupportedModule(f"input {node.name!r}: the model has several inputs; allowed: one")
        elif node.op == "call_module":
            _check_on_chain(node, previous)
            modules.append(_splittable(str(node.target), model.get_submodule(str(node.target)), bool(modules)))
        elif node.op == "output":
            _check_on_chain(node, previous)
        else:
            raise UnsupportedModule(
                f"{node.op} {node.target} (at {node.name!r}): not a module; allowed: a chain of nn modules, "
                "for instance nn.ReLU() instead of torch.relu"
            )
        previous = node
    if not any(isinstance(module, nn.Linear) for module in modules):
        raise UnsupportedModule("model: no nn.Linear in it; allowed: at least one")
    chain = Chain(nn.Sequential(*copy.deepcopy(modules)).eval().requires_grad_(False))
    _check_example(chain, example_input)
    return chain


def _splittable(name: str, module: nn.Module, is_inside: bool) -> nn.Module:
    kind = type(module)
    if kind is nn.Linear or (kind is nn.Flatten and not is_inside and module.start_dim == 1 and module.end_dim == -1):
        return module
    if kind.__name__ in ELEMENTWISE and ELEMENTWISE[kind.__name__][0] is kind:
        return module
    known = ", ".join(sorted(ELEMENTWISE))
    raise UnsupportedModule(
        f"module {name!r} ({kind.__name__}) cannot be split; allowed: Linear, Flatten in front, {known}"
    )


def _check_on_chain(node: fx.Node, previous: fx.Node | None) -> None:
    if list(node.all_input_nodes) != [previous]:
        raise UnsupportedModule(
            f"{node.target if node.op == 'call_module' else node.name!r}: reads {len(node.all_input_nodes)} values "
            "or one from further back; allowed: a chain, where each module reads the one before"
        )


def _check_example(chain: Chain, example_input: torch.Tensor) -> None:
    try:
        values = chain.before_first(example_input)
        chain.model(example_input)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        first_line = str(error).split("\n")[0]
        raise InvalidArgument("example_input", first_line, "an input that the model accepts") from None
    if values.ndim != 2:
        shape = tuple(values.shape)
        raise InvalidArgument("example_input", f"{shape} at the first linear layer", "(samples, features)")
