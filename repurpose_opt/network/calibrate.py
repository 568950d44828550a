"""What the data say about a network: which inputs it sees and how much an error of each neuron costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.network.columns import batches
from repurpose_opt.network.trace import Network

LOSSES = ("cross_entropy", "squared_error")


def gather(data: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs (samples, …) and labels (samples, …) or None, out of inputs, (inputs, labels), or batches of either.

    Two arrays are (inputs, labels) where they are a tuple, or one batch, or differ in shape; else two batches.
    Raises InvalidArgument.
    """
    if isinstance(data, (torch.Tensor, np.ndarray)) or _is_pair(data):
        inputs, labels = _batch(data)
    else:
        inputs, labels = _concatenated(data)
    if len(inputs) == 0:
        raise InvalidArgument("data", "no samples", "at least one")
    if not torch.isfinite(inputs).all():
        raise InvalidArgument("data", "NaN or infinite inputs", "finite numbers")
    return inputs, labels


def check_loss(loss: str, network: Network) -> None:
    """Raises InvalidArgument where the loss is unknown or says nothing about a model's outputs."""
    if loss not in LOSSES:
        raise InvalidArgument("loss", repr(loss), " or ".join(LOSSES))
    shape = network.shapes[network.output]
    if loss == "cross_entropy" and (len(shape) != 1 or shape[0] == 1):
        raise InvalidArgument(
            "loss", f"cross_entropy for outputs of shape {shape}", "squared_error, or several classes"
        )


def checked_labels(labels: torch.Tensor, loss: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Labels as the loss takes them: classes (samples,) int64, or numbers of the outputs' shape (samples, …).

    Raises InvalidArgument.
    """
    got = f"labels of shape {tuple(labels.shape)}, {str(labels.dtype).removeprefix('torch.')}"
    if loss == "cross_entropy":
        is_whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.ndim != 1 or not is_whole:
            raise InvalidArgument("data", got, "(samples,) whole numbers for the loss cross_entropy")
        if labels.min() < 0 or labels.max() >= shape[0]:
            raise InvalidArgument("data", f"labels {labels.min()} … {labels.max()}", f"0 … {shape[0] - 1}")
        return labels.long()
    if labels.ndim == 1 and shape == (1,):
        labels = labels[:, None]
    if labels.shape[1:] != shape or not torch.isfinite(labels).all():
        allowed = ", ".join(map(str, ("samples", *shape)))
        raise InvalidArgument("data", got, f"({allowed}) finite numbers for the loss squared_error")
    return labels


@torch.enable_grad()
def loss_weights(
    network: Network, inputs: torch.Tensor, seed: int, loss: str = "cross_entropy"
) -> dict[str, NDArray[np.float64]]:
    """For each product g (m,) = E[Σ (∂loss/∂z_i)²] over positions of its outputs z: the diagonal Fisher information.

    The labels are drawn from the model's own prediction (Martens 2020, "New insights and perspectives on the natural
    gradient method", section 5), so no true label is needed: classes for cross_entropy; for squared_error the outputs
    plus unit Gaussian noise ε, which makes the gradient Jᵀε. A mean error over positions times this sum is the sum of
    all positions' errors, where gradients do not depend on the place.

    Raises InvalidArgument where the outputs are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    squares: dict[str, torch.Tensor] = {}
    for batch in batches(len(inputs), network.batch_size):
        probes: dict[str, torch.Tensor] = {}
        outputs = _probed(network, inputs[batch], probes)
        if not torch.isfinite(outputs).all():
            raise InvalidArgument("data", "inputs on which the model answers NaN or infinity", "finite outputs")
        gradients = torch.autograd.grad(
            _sampled_loss(outputs, loss, generator), list(probes.values()), allow_unused=True
        )
        for (name, probe), gradient in zip(probes.items(), gradients, strict=True):
            layout = network.layouts[name]
            assert layout is not None
            seen = torch.zeros_like(probe) if gradient is None else gradient
            by_row = seen.double().square().movedim(layout.axis, 0).flatten(1).sum(1)
            squares[name] = squares.get(name, torch.zeros_like(by_row)) + by_row
    return {name: (total / len(inputs)).numpy() for name, total in squares.items()}


def _probed(network: Network, inputs: torch.Tensor, probes: dict[str, torch.Tensor]) -> torch.Tensor:
    """The network's outputs; to each product's, zeros are added, where the gradient is that of the outputs."""

    def probe(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: torch.Tensor) -> torch.Tensor:
            probes[name] = torch.zeros_like(output, requires_grad=True)
            return output + probes[name]

        return hook

    handles = [network.product(name).register_forward_hook(probe(name)) for name in network.products]
    try:
        outputs: torch.Tensor = network.graph(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _sampled_loss(outputs: torch.Tensor, loss: str, generator: torch.Generator) -> torch.Tensor:
    """Sum over the samples of a loss against labels drawn from the outputs; its gradient is all that counts."""
    if loss == "squared_error":
        return (outputs * torch.randn(outputs.shape, dtype=outputs.dtype, generator=generator)).sum()
    drawn = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator).squeeze(1)
    return functional.cross_entropy(outputs, drawn, reduction="sum")


def _is_pair(data: Any) -> bool:
    """Whether data are (inputs, labels) and not batches: two arrays, of which a tuple, or of different shapes."""
    if not _are_two_arrays(data):
        return False
    return isinstance(data, tuple) or data[0].shape[1:] != data[1].shape[1:]


def _are_two_arrays(data: Any) -> bool:
    is_sequence = isinstance(data, (tuple, list)) and len(data) == 2
    return is_sequence and all(isinstance(part, (torch.Tensor, np.ndarray)) for part in data)


def _concatenated(batches: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(batches, (str, bytes, dict)) or not hasattr(batches, "__iter__"):
        raise InvalidArgument("data", type(batches).__name__, "inputs, (inputs, labels), or batches of either")
    pairs = [_batch(batch) for batch in batches]
    if not pairs:
        raise InvalidArgument("data", "no batches", "at least one")
    inputs = [batch for batch, _ in pairs]
    labels = [given for _, given in pairs if given is not None]
    if labels and len(labels) < len(inputs):
        raise InvalidArgument("data", f"labels in {len(labels)} of {len(inputs)} batches", "in all, or in none")
    for parts in (inputs, labels):
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise InvalidArgument("data", f"samples of shapes {sorted(shapes)}", "one shape in all batches")
    return torch.cat(inputs), torch.cat(labels) if labels else None


def _batch(batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One batch, inputs or (inputs, labels), as tensors on the CPU."""
    parts = batch if _are_two_arrays(batch) else (batch,)
    try:
        inputs, *rest = [torch.as_tensor(part).detach().cpu() for part in parts]
    except (TypeError, ValueError, RuntimeError):
        allowed = "inputs, (inputs, labels), or batches of either, as tensors or arrays of numbers"
        raise InvalidArgument("data", f"a {type(batch).__name__} for a batch", allowed) from None
    labels = rest[0] if rest else None
    if inputs.ndim < 2 or (labels is not None and labels.ndim == 0):
        raise InvalidArgument("data", f"inputs of shape {tuple(inputs.shape)}", "(samples, …)")
    if labels is not None and len(labels) != len(inputs):
        raise InvalidArgument("data", f"{len(labels)} labels for {len(inputs)} inputs", "a label an input")
    return inputs, labels
