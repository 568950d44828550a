"""Reads a multilayer perceptron out of a model by torch.fx: a chain of linear layers and elementwise modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.runtime.modules import ELEMENTWISE, from_spec, to_spec


@dataclass(frozen=True, eq=False)
class Chain:
    """The modules of a perceptron in order, as one flat nn.Sequential.

    They are copies in evaluation mode, on the CPU, and none works in place.
    """

    model: nn.Sequential

    @cached_property
    def linears(self) -> tuple[int, ...]:
        """Positions of the linear layers in `model`."""
        return tuple(i for i, module in enumerate(self.model) if isinstance(module, nn.Linear))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, float32 or float64: what the plan computes in, and what its messages hold."""
        return self.linear(0).weight.dtype

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
        for module in list(self.model)[first:last]:
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
    except Exception as error:  # whatever the model's own code makes of a value that is not there
        reason = str(error).split("\n")[0]
        raise UnsupportedModule(f"model: torch.fx cannot trace it ({reason}); allowed: a chain of modules") from None
    modules: list[nn.Module] = []
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                raise UnsupportedModule(f"input {node.name!r}: the model has several inputs; allowed: one")
        elif node.op == "call_module":
            _check_on_chain(node, previous)
            modules.append(_copy(str(node.target), model.get_submodule(str(node.target)), is_first=not modules))
        elif node.op == "output":
            _check_on_chain(node, previous)
        else:
            target = getattr(node.target, "__name__", node.target)
            raise UnsupportedModule(
                f"{node.op} {target} (at {node.name!r}): not a module; allowed: a chain of nn modules, "
                "for instance nn.ReLU() instead of torch.relu"
            )
        previous = node
    if not any(isinstance(module, nn.Linear) for module in modules):
        raise UnsupportedModule("model: no nn.Linear in it; allowed: at least one")
    chain = Chain(nn.Sequential(*modules).cpu().eval().requires_grad_(False))
    _check_weights(chain)
    _check_example(chain, example_input)
    return chain


def _copy(name: str, module: nn.Module, is_first: bool) -> nn.Module:
    """A copy of a module that can be split. Raises UnsupportedModule."""
    kind = type(module)
    if isinstance(module, nn.Linear) and kind is nn.Linear:
        if not isinstance(module.weight, nn.Parameter):
            raise UnsupportedModule(f"module {name!r}: its weight is computed; allowed: a plain parameter")
        return copy.deepcopy(module)
    is_flatten = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if (is_flatten and is_first) or ELEMENTWISE.get(kind.__name__, (None,))[0] is kind:
        return from_spec(to_spec(module))
    known = ", ".join(sorted(ELEMENTWISE))
    raise UnsupportedModule(
        f"module {name!r} ({kind.__name__}) cannot be split; allowed: Linear, Flatten in front, {known}"
    )


def _check_on_chain(node: fx.Node, previous: fx.Node | None) -> None:
    if node.args != (previous,) or node.kwargs:
        name = "the output" if node.op == "output" else f"module {str(node.target)!r}"
        raise UnsupportedModule(f"{name} reads something else than the module before it; allowed: a chain of modules")


def _check_weights(chain: Chain) -> None:
    """Weights must be finite and of one dtype, float32 or float64."""
    dtypes = {parameter.dtype for parameter in chain.model.parameters()}
    if dtypes not in ({torch.float32}, {torch.float64}):
        got = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InvalidArgument("model", f"{got} weights", "float32 or float64, for instance model.float()")
    if not all(torch.isfinite(parameter).all() for parameter in chain.model.parameters()):
        raise InvalidArgument("model", "NaN or infinite weights", "finite numbers")


def _check_example(chain: Chain, example_input: torch.Tensor) -> None:
    if not isinstance(example_input, torch.Tensor):
        raise InvalidArgument("example_input", type(example_input).__name__, "a tensor")
    example_input = example_input.to("cpu", chain.dtype)
    try:
        values = chain.before_first(example_input)
        chain.model(example_input)
    except (RuntimeError, IndexError) as error:
        first_line = str(error).split("\n")[0]
        raise InvalidArgument("example_input", first_line, "an input that the model accepts") from None
    if values.ndim != 2:
        shape = tuple(values.shape)
        raise InvalidArgument("example_input", f"{shape} at the first linear layer", "(samples, features)")
