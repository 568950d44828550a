"""What the data say about a network: which inputs it sees and how much an error of each neuron costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.network.trace import Chain

BATCH = 2048


def gather(data: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs (samples, …) and labels (samples,) or None, out of inputs, (inputs, labels), or batches of either.

    Raises InvalidArgument.
    """
    if isinstance(data, (torch.Tensor, np.ndarray)):
        inputs, labels = torch.as_tensor(data), None
    elif isinstance(data, (tuple, list)) and len(data) == 2 and _is_pair(data):
        inputs, labels = torch.as_tensor(data[0]), torch.as_tensor(data[1])
    else:
        try:
            batches = [gather(batch) for batch in data]
        except TypeError:
            batches = []
        if not batches:
            allowed = "inputs, (inputs, labels), or batches of either"
            raise InvalidArgument("data", type(data).__name__, allowed)
        inputs = torch.cat([batch for batch, _ in batches])
        given = [batch_labels for _, batch_labels in batches if batch_labels is not None]
        labels = torch.cat(given) if len(given) == len(batches) else None
    if len(inputs) == 0:
        raise InvalidArgument("data", "no samples", "at least one")
    if labels is not None and len(labels) != len(inputs):
        raise InvalidArgument("data", f"{len(labels)} labels for {len(inputs)} inputs", "a label an input")
    if not torch.isfinite(inputs).all():
        raise InvalidArgument("data", "NaN or infinite inputs", "finite numbers")
    return inputs, labels


def loss_weights(chain: Chain, inputs: torch.Tensor, seed: int) -> list[NDArray[np.float64]]:
    """For each linear layer g (m,) = E[(∂loss/∂z_i)²] at its outputs z: the diagonal Fisher information.

    The loss is the cross-entropy with labels drawn from the model's own prediction (Martens 2020, "New insights and
    perspectives on the natural gradient method", section 5), so no true label is needed.
    """
    generator = torch.Generator().manual_seed(seed)
    squares = [torch.zeros(chain.linear(i).out_features, dtype=torch.float64) for i in range(len(chain.linears))]
    for batch in inputs.split(BATCH):
        value = chain.before_first(batch)
        outputs = []
        for index in range(len(chain.linears)):
            value = chain.linear(index)(value.detach() if index == 0 else value)
            outputs.append(value.requires_grad_() if index == 0 else value)
            value = chain.after(index, value)
        drawn = torch.multinomial(value.detach().softmax(1), 1, generator=generator).squeeze(1)
        loss = functional.cross_entropy(value, drawn, reduction="sum")
        for total, gradient in zip(squares, torch.autograd.grad(loss, outputs), strict=True):
            total += gradient.double().square().sum(0)
    return [(total / len(inputs)).numpy() for total in squares]


def outputs_of(weight: torch.Tensor, bias: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """(samples, m) a linear layer's outputs, in batches."""
    return torch.cat([functional.linear(batch, weight, bias) for batch in values.split(BATCH)])


def _is_pair(data: Any) -> bool:
    """Whether (a, b) is (inputs, labels) and not two batches: labels have one dimension."""
    arrays = all(isinstance(part, (torch.Tensor, np.ndarray)) for part in data)
    return arrays and data[0].ndim > 1 and data[1].ndim == 1
