"""From what a model calls, modules and functions, to steps of a graph.

Functions are known by their names in torch, torch.nn.functional, torch.Tensor and torch.ops.aten, which agree on the
order of their arguments with few exceptions.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import fusion, parametrize

from repurpose_opt.network.builder import Builder
from repurpose_opt.network.products import product_with
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.modules import from_spec, kind_of, to_spec


@dataclass(frozen=True)
class Output:
    """An output of a step, by the step's name; whatever else a call is given is a constant."""

    name: str


class Samples(int):
    """How many samples there are: those of the example while a model is read, any number when it runs."""


@dataclass(frozen=True)
class Call:
    """A call of a function: its arguments are Outputs, constants, and lists and tuples of them."""

    name: str
    """For the step."""
    function: str
    """Without leading or trailing underscores."""
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


class _Function(nn.Module):
    """Any function, with its constants; its repr tells it from any other."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *values: torch.Tensor) -> Any:
        given = iter(values)

        def filled(part: Any) -> Any:
            if isinstance(part, Samples):
                return len(values[0])
            return next(given) if isinstance(part, Output) else part

        args = mapped(filled, self.call.args)
        return self.call.target(*args, **mapped(filled, dict(self.call.kwargs)))

    def extra_repr(self) -> str:
        return f"{self.call.function}, {mapped(_described, (self.call.args, dict(self.call.kwargs)))}"


def _described(leaf: Any) -> Any:
    """A constant, or what stands for the numbers of a tensor."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.shape, hashlib.sha256(leaf.contiguous().numpy().tobytes()).hexdigest()


def mapped(function: Callable[[Any], Any], part: Any) -> Any:
    """A function of every leaf of nested lists, tuples, dictionaries and slices."""
    if isinstance(part, (list, tuple)):
        found = [mapped(function, item) for item in part]
        return tuple(found) if isinstance(part, tuple) else found
    if isinstance(part, dict):
        return {key: mapped(function, item) for key, item in part.items()}
    if isinstance(part, slice):
        return slice(*(mapped(function, item) for item in (part.start, part.stop, part.step)))
    return function(part)


def outputs_in(part: Any) -> list[str]:
    """Names of the outputs among the arguments of a call, in order."""
    found: list[str] = []
    mapped(lambda leaf: found.append(leaf.name) if isinstance(leaf, Output) else None, part)
    return found


def lower_module(builder: Builder, name: str, module: nn.Module, inputs: list[str], is_sole_reader: bool) -> Output:
    """The steps of a module in evaluation mode. `is_sole_reader`: nothing else reads its input."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats and len(inputs) == 1:
        return _batch_norm(builder, name, module, inputs[0], is_sole_reader)
    if type(module) is nn.TransformerEncoder and len(inputs) == 1:
        output = Output(inputs[0])
        for number, layer in enumerate(module.layers):
            output = lower_module(builder, f"{name}.layers.{number}", layer, [output.name], False)
        return (
            output if module.norm is None else lower_module(builder, f"{name}.norm", module.norm, [output.name], False)
        )
    if type(module) is nn.TransformerEncoderLayer and len(inputs) == 1 and _is_attention(module.self_attn):
        return _encoder_layer(builder, name, module, inputs[0])
    if type(module) is nn.MultiheadAttention and len(set(inputs)) == 1 and len(inputs) == 3 and _is_attention(module):
        return _attention(builder, name, module, inputs[0])
    return Output(builder.add(name, _copy(module), *inputs))


def lower_function(builder: Builder, call: Call) -> Any:
    """The steps of a function: an Output, or what else it gives. What is not known here runs on one worker."""
    if not call.args and "input" in call.kwargs:  # the first argument of all functions here that have it
        rest = {name: value for name, value in call.kwargs.items() if name != "input"}
        call = replace(call, args=(call.kwargs["input"],), kwargs=rest)
    lower = _FUNCTIONS.get(call.function)
    found = None if lower is None else lower(builder, call)
    if found is None:
        return Output(
            builder.add(
                call.name, steps.Opaque(call.function, _Function(call)), *outputs_in((call.args, dict(call.kwargs)))
            )
        )
    return found


def _copy(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Conv1d | nn.Conv2d) and (kind_of(module) is not None or _is_computed(module)):
        found = _conv(module)
        return steps.Opaque(type(module).__name__, copy.deepcopy(module)) if found is None else found
    if isinstance(module, nn.Linear) and _is_computed(module):
        return cast(nn.Module, product_with(module.weight.detach(), module.bias))
    is_known = kind_of(module) is not None and not getattr(module, "return_indices", False)
    if not is_known or (isinstance(module, nn.Embedding) and module.max_norm is not None):
        return steps.Opaque(type(module).__name__, copy.deepcopy(module))
    weight = getattr(module, "weight", None)
    if weight is not None and not isinstance(weight, nn.Parameter):
        return steps.Opaque(type(module).__name__, copy.deepcopy(module))  # computed, not a parameter
    if any(True for _ in module.parameters()):
        return copy.deepcopy(module)
    return from_spec(to_spec(module))


def _is_computed(module: nn.Module) -> bool:
    """Whether a known product computes its weight, always the same in evaluation mode: pruned, or normalised."""
    if parametrize.is_parametrized(module):
        return type(module).__bases__[0] in (nn.Linear, nn.Conv1d, nn.Conv2d)
    return kind_of(module) is not None and not isinstance(module.weight, nn.Parameter)


def _conv(module: nn.Conv1d | nn.Conv2d) -> nn.Module | None:
    """A convolution with paddings in numbers and no groups but depthwise ones; None where padding is no zeros."""
    padding = module.padding
    if module.padding_mode != "zeros":
        return None
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            return None
        padding = tuple(t // 2 for t in total)
    groups = module.groups if module.groups == module.in_channels else 1
    weight = module.weight.detach()
    if groups < module.groups:
        weight = torch.stack([_in_group(module, row) for row in range(module.out_channels)])
    geometry: dict[str, Any] = {
        "stride": module.stride,
        "padding": padding,
        "dilation": module.dilation,
        "groups": groups,
    }
    found: nn.Module = product_with(weight, module.bias, **geometry)
    return found


def _in_group(module: nn.Conv1d | nn.Conv2d, row: int) -> torch.Tensor:
    """(in_channels, …) one row of a grouped convolution's weight among zeros."""
    width = module.in_channels // module.groups
    first = row * module.groups // module.out_channels * width
    full = module.weight.new_zeros(module.in_channels, *module.kernel_size)
    full[first : first + width] = module.weight[row]
    return full


def _batch_norm(
    builder: Builder, name: str, module: nn.BatchNorm1d | nn.BatchNorm2d, read: str, is_sole_reader: bool
) -> Output:
    """Folded into the product before it where nothing else reads that, else a scale and a shift for each channel."""
    last_name, last, _ = builder.steps[-1] if builder.steps else ("", nn.Identity(), ())
    if is_sole_reader and last_name == read and isinstance(last, nn.Conv1d | nn.Conv2d | nn.Linear):
        if isinstance(last, nn.Linear) and builder.values[read].ndim == 2 and module.affine:
            return Output(builder.replace_last(fusion.fuse_linear_bn_eval(last, module.eval())))
        if not isinstance(last, nn.Linear):
            return Output(builder.replace_last(fusion.fuse_conv_bn_eval(last, module.eval())))
    assert module.running_mean is not None
    assert module.running_var is not None
    scale = (module.running_var + module.eps).rsqrt() * (1.0 if module.weight is None else module.weight)
    shift = -module.running_mean * scale + (0.0 if module.bias is None else module.bias)
    affine = steps.Affine(module.num_features, dtype=scale.dtype)
    with torch.no_grad():
        affine.scale.copy_(scale)
        affine.shift.copy_(shift)
    return Output(builder.add(name, affine, read))


def _is_attention(module: nn.MultiheadAttention) -> bool:
    """Of tokens on themselves, samples first, without what changes the keys."""
    is_plain = module.bias_k is None and module.bias_v is None and not module.add_zero_attn
    return module.batch_first and module._qkv_same_embed_dim and is_plain


def _attention(builder: Builder, name: str, module: nn.MultiheadAttention, read: str, causal: bool = False) -> Output:
    projection = product_with(module.in_proj_weight, module.in_proj_bias)
    projected = builder.add(f"{name}.in_proj", projection, read)
    attended = builder.add(f"{name}.heads", steps.Attention(module.num_heads, causal), projected)
    plain = product_with(module.out_proj.weight, module.out_proj.bias)
    return Output(builder.add(f"{name}.out_proj", plain, attended))


def _encoder_layer(builder: Builder, name: str, layer: nn.TransformerEncoderLayer, read: str) -> Output:
    """Vaswani et al. 2017, "Attention is all you need", section 3.1; norms before or after each part."""

    def add(part: str, module: nn.Module, *inputs: str) -> str:
        return builder.add(f"{name}.{part}", copy.deepcopy(module), *inputs)

    def attend(value: str) -> str:
        return add("dropout1", layer.dropout1, _attention(builder, f"{name}.self_attn", layer.self_attn, value).name)

    def feed(value: str) -> str:
        inner = _activation(builder, f"{name}.activation", layer.activation, add("linear1", layer.linear1, value))
        return add("dropout2", layer.dropout2, add("linear2", layer.linear2, add("dropout", layer.dropout, inner)))

    if layer.norm_first:
        value = add("add1", steps.Add(), read, attend(add("norm1", layer.norm1, read)))
        return Output(add("add2", steps.Add(), value, feed(add("norm2", layer.norm2, value))))
    value = add("norm1", layer.norm1, add("add1", steps.Add(), read, attend(read)))
    return Output(add("norm2", layer.norm2, add("add2", steps.Add(), value, feed(value))))


def _activation(builder: Builder, name: str, activation: Any, read: str) -> str:
    if isinstance(activation, nn.Module):
        return lower_module(builder, name, activation, [read], False).name
    function = getattr(activation, "__name__", type(activation).__name__).strip("_")
    call = Call(name, function, activation, (Output(read),), {})
    found: str = lower_function(builder, call).name
    return found


# Functions: each takes (builder, call) and gives an Output, or None where it does not know this use of the function


def _with(make: Callable[[Call], nn.Module]) -> Callable[[Builder, Call], Output | None]:
    """A function of one tensor that a module stands for."""

    def lower(builder: Builder, call: Call) -> Output | None:
        rest = outputs_in((call.args[1:], dict(call.kwargs)))
        if not call.args or not isinstance(call.args[0], Output) or rest:
            return None
        module = make(call)
        # The same call with all its defaults: a guard against arguments that this table does not know.
        expected = _Function(call)(builder.values[call.args[0].name].clone())  # it may work in place
        found = module.eval()(builder.values[call.args[0].name])
        if not isinstance(expected, torch.Tensor) or found.shape != expected.shape or not torch.equal(found, expected):
            return None
        return Output(builder.add(call.name, module, call.args[0].name))

    return lower


def _two(
    builder: Builder, call: Call, combine: type[nn.Module], linearly: Callable[[float], nn.Module]
) -> Output | None:
    """A sum or product of two tensors, or of one and a number or positions."""
    one, other = call.get(0, "input"), call.get(1, "other")
    if call.kwargs.get("alpha", 1) != 1 or len(call.args) > 2:
        return None
    if isinstance(one, Output) and isinstance(other, Output):
        return Output(builder.add(call.name, combine(), one.name, other.name))
    if not isinstance(one, Output):
        one, other = other, one
    value = builder.values[one.name]
    if not value.is_floating_point():
        return None
    if isinstance(other, torch.Tensor) and other.ndim == 0:
        other = other.item()
    if isinstance(other, int | float):
        return Output(builder.add(call.name, linearly(float(other)), one.name))
    layout = builder.layouts[one.name]
    is_position = isinstance(other, torch.Tensor) and combine is steps.Add and value.ndim == 3
    if is_position and layout is not None and layout.axis == -1 and other.squeeze(0).shape == value.shape[1:]:
        module = steps.AddPositions(value.shape[1], value.shape[2], dtype=value.dtype)
        with torch.no_grad():
            module.positions.copy_(other.squeeze(0))
        return Output(builder.add(call.name, module, one.name))
    return None


def _add(builder: Builder, call: Call) -> Output | None:
    return _two(builder, call, steps.Add, lambda number: steps.Linearly(1.0, number))


def _multiply(builder: Builder, call: Call) -> Output | None:
    return _two(builder, call, steps.Multiply, lambda number: steps.Linearly(number, 0.0))


def _of_number(
    factor: Callable[[float], tuple[float, float]], number_first: tuple[float, float] | None = None
) -> Callable[[Builder, Call], Output | None]:
    """x − number, x / number: factor and offset. `number_first`: of number ∘ x, with an offset in numbers."""

    def lower(builder: Builder, call: Call) -> Output | None:
        read, number = call.args[0], call.get(1, "other")
        is_reversed = not isinstance(read, Output)
        if is_reversed:
            read, number = number, read
        number = number.item() if isinstance(number, torch.Tensor) and number.ndim == 0 else number
        is_known = isinstance(read, Output) and isinstance(number, int | float)
        if not is_known or len(call.args) != 2 or call.kwargs or (is_reversed and number_first is None):
            return None
        if not builder.values[read.name].is_floating_point():
            return None
        if is_reversed:
            assert number_first is not None
            scale, offset = number_first[0], number_first[1] * float(number)
        else:
            scale, offset = factor(float(number))
        return Output(builder.add(call.name, steps.Linearly(scale, offset), read.name))

    return lower


def _concatenate(builder: Builder, call: Call) -> Output | None:
    parts, dim = call.get(0, "tensors"), call.get(1, "dim", 0)
    if not all(isinstance(part, Output) for part in parts):
        return None
    layout, ndim = builder.layouts[parts[0].name], builder.values[parts[0].name].ndim
    if layout is None or dim % ndim != layout.axis % ndim:
        return None
    return Output(builder.add(call.name, steps.Concatenate(layout.axis), *(part.name for part in parts)))


def _reshape(builder: Builder, call: Call) -> Output | None:
    """Whatever flattens all of a sample, or all positions of its channels."""
    read = call.args[0]
    before, after = builder.values[read.name], _Function(call)(builder.values[read.name])
    if not torch.equal(before.flatten(), after.flatten()):  # an index that chooses
        return None
    if before.shape == after.shape:
        return Output(read.name)
    added, layout = after.ndim - before.ndim, builder.layouts[read.name]
    if layout is not None and layout.axis == 1 and added > 0 and after.shape == (*before.shape, *(1,) * added):
        return Output(builder.add(call.name, steps.AsMap(added), read.name))
    if after.ndim == 2 and len(after) == len(before):
        return Output(builder.add(call.name, nn.Flatten(), read.name))
    if after.ndim == 3 and after.shape[:2] == before.shape[:2]:
        return Output(builder.add(call.name, nn.Flatten(2), read.name))
    return None


def _transpose(builder: Builder, call: Call) -> Output | None:
    read = call.args[0]
    value, layout = builder.values[read.name], builder.layouts[read.name]
    expected = _Function(call)(value)
    if layout is None or layout.axis != 1 or value.ndim != 3:
        return None
    if expected.shape != value.transpose(1, 2).shape or not torch.equal(expected, value.transpose(1, 2)):
        return None
    return Output(builder.add(call.name, steps.ToTokens(), read.name))


def _mean(builder: Builder, call: Call) -> Output | None:
    read, dims = call.args[0], call.get(1, "dim")
    value, layout = builder.values[read.name], builder.layouts[read.name]
    if layout is None or dims is None or value.ndim < 3:
        return None
    dims = {dim % value.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    if dims != set(range(1, value.ndim)) - {layout.axis % value.ndim}:
        return None
    if call.get(2, "keepdim", False):
        is_map = layout.axis == 1 and value.ndim == 4
        return Output(builder.add(call.name, nn.AdaptiveAvgPool2d(1), read.name)) if is_map else None
    return Output(builder.add(call.name, steps.MeanPositions(layout.axis), read.name))


def _item(builder: Builder, call: Call) -> Any:
    read, index = call.args
    if not isinstance(read, Output):
        return None
    value, layout = builder.values[read.name], builder.layouts[read.name]
    if isinstance(index, tuple) and any(part is None for part in index):
        return _reshape(builder, call)
    if layout is None or not isinstance(index, tuple) or len(index) < 2 or index[0] != slice(None):
        return None
    if any(part not in (slice(None), Ellipsis) for part in index[2:]):
        return None
    if isinstance(index[1], int) and layout.axis == -1 and value.ndim == 3:
        return Output(builder.add(call.name, steps.Token(index[1]), read.name))
    if isinstance(index[1], slice) and layout.axis == 1 and index[1].step in (None, 1):
        start, stop, _ = index[1].indices(value.shape[1])
        return Output(builder.add(call.name, steps.Slice(1, start, stop), read.name))
    return None


def _select(builder: Builder, call: Call) -> Output | None:
    """x[:, index], as torch.export writes it."""
    read, dim, index = call.args
    layout = builder.layouts[read.name]
    if layout is None or dim != 1 or layout.axis != -1 or builder.values[read.name].ndim != 3:
        return None
    return Output(builder.add(call.name, steps.Token(index), read.name))


def _parts(builder: Builder, call: Call) -> Any:
    """chunk and split along the axis that is split over the workers: one slice a part."""
    read, dim = call.args[0], call.get(2, "dim", 0)
    value, layout = builder.values[read.name], builder.layouts[read.name]
    if layout is None or dim % value.ndim != layout.axis % value.ndim:
        return None
    sizes, start, parts = [part.shape[dim] for part in _Function(call)(value)], 0, []
    for number, size in enumerate(sizes):
        step = steps.Slice(layout.axis, start, start + size)
        parts.append(Output(builder.add(f"{call.name}_{number}", step, read.name)))
        start += size
    return tuple(parts)


def _same(builder: Builder, call: Call) -> Output | None:
    return call.args[0] if isinstance(call.args[0], Output) and not call.args[1:] and not call.kwargs else None


def _pool(module: type[nn.Module], *names: str) -> Callable[[Builder, Call], Output | None]:
    def make(call: Call) -> nn.Module:
        given = {name: call.get(position, name) for position, name in enumerate(names, start=1)}
        return module(**{name: value for name, value in given.items() if value not in (None, [], ())})

    return _with(make)


def _product(builder: Builder, call: Call) -> Output | None:
    """linear and conv of a tensor with constant weights."""
    read, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    constant = isinstance(weight, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
    if not isinstance(read, Output) or not constant:
        return None
    geometry: dict[str, Any] = {}
    if call.function != "linear":
        for position, (name, default) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)), 3):
            given = call.get(position, name, default)
            geometry[name] = tuple(given) if isinstance(given, list) else given
    module = product_with(weight, bias, **geometry)
    return lower_module(builder, call.name, module, [read.name], False)


def _layer_norm(builder: Builder, call: Call) -> Output | None:
    read, shape, weight, bias = (
        call.args[0],
        call.get(1, "normalized_shape"),
        call.get(2, "weight"),
        call.get(3, "bias"),
    )
    if not isinstance(read, Output) or (weight is None and bias is not None):
        return None
    eps, dtype = call.get(4, "eps", 1e-5), builder.values[read.name].dtype
    module = nn.LayerNorm(list(shape), eps, weight is not None, bias is not None, dtype=dtype)
    _set(module, weight=weight, bias=bias)
    return Output(builder.add(call.name, module, read.name))


def _batch_norm_function(builder: Builder, call: Call) -> Output | None:
    is_aten = not isinstance(call.target, type(torch.nn.functional.batch_norm))
    read = call.args[0]
    order = (
        ("weight", "bias", "running_mean", "running_var")
        if is_aten
        else ("running_mean", "running_var", "weight", "bias")
    )
    given = {name: call.get(position, name) for position, name in enumerate(order, 1)}
    if call.get(5, "training", False) or given["running_mean"] is None or not isinstance(read, Output):
        return None
    size, dtype = len(given["running_mean"]), builder.values[read.name].dtype
    kind = nn.BatchNorm2d if builder.values[read.name].ndim == 4 else nn.BatchNorm1d
    module = kind(size, call.get(7, "eps", 1e-5), affine=given["weight"] is not None, dtype=dtype)
    _set(module, **given)
    return lower_module(builder, call.name, module, [read.name], False)


def _embedding(builder: Builder, call: Call) -> Output | None:
    one, other = call.get(0, "input"), call.get(1, "weight")
    read, weight = (other, one) if isinstance(one, torch.Tensor) else (one, other)
    if not isinstance(read, Output) or not isinstance(weight, torch.Tensor):
        return None
    module = nn.Embedding.from_pretrained(weight)
    return Output(builder.add(call.name, module, read.name))


@torch.no_grad()
def _set(module: nn.Module, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            getattr(module, name).copy_(tensor)


_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_FUNCTIONS: dict[str, Callable[[Builder, Call], Any]] = {
    "relu": _with(lambda call: nn.ReLU()),
    "relu6": _with(lambda call: nn.ReLU6()),
    "gelu": _with(lambda call: nn.GELU(call.get(1, "approximate", "none"))),
    "silu": _with(lambda call: nn.SiLU()),
    "tanh": _with(lambda call: nn.Tanh()),
    "sigmoid": _with(lambda call: nn.Sigmoid()),
    "mish": _with(lambda call: nn.Mish()),
    "hardswish": _with(lambda call: nn.Hardswish()),
    "hardsigmoid": _with(lambda call: nn.Hardsigmoid()),
    "hardtanh": _with(lambda call: nn.Hardtanh(call.get(1, "min_val", -1.0), call.get(2, "max_val", 1.0))),
    "leaky_relu": _with(lambda call: nn.LeakyReLU(call.get(1, "negative_slope", 0.01))),
    "elu": _with(lambda call: nn.ELU(call.get(1, "alpha", 1.0))),
    "softplus": _with(lambda call: nn.Softplus(call.get(1, "beta", 1.0), call.get(2, "threshold", 20.0))),
    "dropout": _with(lambda call: nn.Identity()),
    "softmax": _with(lambda call: nn.Softmax(call.get(1, "dim", -1))),
    "log_softmax": _with(lambda call: nn.LogSoftmax(call.get(1, "dim", -1))),
    "max_pool1d": _pool(nn.MaxPool1d, *_MAX),
    "max_pool2d": _pool(nn.MaxPool2d, *_MAX),
    "avg_pool1d": _pool(nn.AvgPool1d, *_AVERAGE[:-1]),
    "avg_pool2d": _pool(nn.AvgPool2d, *_AVERAGE),
    "adaptive_avg_pool1d": _pool(nn.AdaptiveAvgPool1d, "output_size"),
    "adaptive_avg_pool2d": _pool(nn.AdaptiveAvgPool2d, "output_size"),
    "add": _add,
    "iadd": _add,
    "mul": _multiply,
    "imul": _multiply,
    "sub": _of_number(lambda number: (1.0, -number), (-1.0, 1.0)),
    "rsub": _of_number(lambda number: (-1.0, number)),
    "truediv": _of_number(lambda number: (1 / number, 0.0)),
    "div": _of_number(lambda number: (1 / number, 0.0)),
    "cat": _concatenate,
    "concat": _concatenate,
    "concatenate": _concatenate,
    "flatten": _reshape,
    "squeeze": _reshape,
    "view": _reshape,
    "reshape": _reshape,
    "unsqueeze": _reshape,
    "transpose": _transpose,
    "permute": _transpose,
    "mean": _mean,
    "getitem": _item,
    "chunk": _parts,
    "split": _parts,
    "contiguous": _same,
    "alias": _same,
    "select": _select,
    "clone": _same,
    "linear": _product,
    "conv1d": _product,
    "conv2d": _product,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm_function,
    "embedding": _embedding,
}
