"""From owners, messages and effective weights of one layer to the module that a plan computes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.exchange import Code, Exchange, Message
from repurpose_opt.runtime.coded import CodedLinear
from repurpose_opt.runtime.layer import PlannedLayer


def planned(
    name: str,
    input_owner: NDArray[np.int64],
    owner: NDArray[np.int64],
    exchange: Exchange,
    weight: NDArray[np.floating],
    bias: NDArray[np.floating],
) -> tuple[nn.Linear | CodedLinear, PlannedLayer]:
    """The module and the planned layer of weights V (m, n), which in blocks that a code covers are U R.

    A layer with codes is a CodedLinear, of which the factors of each code are balanced. A number that carries nothing,
    because U has not full rank, is not sent. Both are in the dtype of `weight`. O(m n r) for codes of r numbers.
    """
    factors = {
        pair: balanced_factors(_block(weight, input_owner, owner, pair), message.encoder)
        for pair, message in sorted(exchange.messages.items())
        if isinstance(message, Code)
    }
    messages: dict[tuple[int, int], Message] = {}
    for pair, message in exchange.messages.items():
        carried = Code(factors[pair][1]) if pair in factors else message
        if carried.size:
            messages[pair] = carried
    sent = Exchange(exchange.n, exchange.P, messages)
    layer = PlannedLayer.of_exchange(name, input_owner, owner, sent, weight.itemsize)
    return _module(layer, weight, bias, factors), layer


def balanced_factors(
    weight: NDArray[np.floating], encoder: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """D (m_k, r) and E (r, n_p) with D E = V_kp and ‖D[:, i]‖ = ‖E[i]‖, of V_kp = U R and R (r, n_p) orthonormal.

    From the SVD of U = V_kp Rᵀ: D = A S^½, E = S^½ Bᵀ R. Gradient descent on two factors is best conditioned where
    they are balanced (Tu et al. 2016, "Low-rank solutions of linear matrix equations via Procrustes flow"). Numbers
    whose singular value is nothing but rounding in the dtype of V are left out.
    """
    left, singular, right = np.linalg.svd(weight.astype(np.float64) @ encoder.T, full_matrices=False)
    rounding = np.finfo(weight.dtype).eps * max(weight.shape) * singular.max(initial=0.0)
    rank = int(np.count_nonzero(singular > rounding))
    scale = np.sqrt(singular[:rank])
    return left[:, :rank] * scale, scale[:, None] * (right[:rank] @ encoder)


@torch.no_grad()
def _module(
    layer: PlannedLayer,
    weight: NDArray[np.floating],
    bias: NDArray[np.floating],
    factors: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> nn.Linear | CodedLinear:
    m, n = weight.shape
    dtype = torch.from_numpy(weight).dtype
    module: nn.Linear | CodedLinear
    if layer.numbers == 0:
        # Without initialisation, which would draw from the caller's random numbers.
        module = nn.utils.skip_init(nn.Linear, n, m, dtype=dtype)
    else:
        module = CodedLinear(n, m, layer.numbers, dtype=dtype)
        for (source, target), (decoder, encoder) in factors.items():
            if len(encoder):
                numbers = layer.code_numbers(source, target)
                module.decoder[np.ix_(layer.rows(target), numbers)] = torch.from_numpy(decoder).to(dtype)
                module.encoder[np.ix_(numbers, layer.held(source))] = torch.from_numpy(encoder).to(dtype)
    module.weight.copy_(torch.from_numpy(weight))
    for source, target in factors:
        module.weight[np.ix_(layer.rows(target), layer.held(source))] = 0.0
    module.bias.copy_(torch.from_numpy(bias))
    return module


def _block(
    weight: NDArray[np.floating], input_owner: NDArray[np.int64], owner: NDArray[np.int64], pair: tuple[int, int]
) -> NDArray[np.floating]:
    """V_kp (m_k, n_p) of the pair (p, k)."""
    source, target = pair
    return weight[np.ix_(np.flatnonzero(owner == target), np.flatnonzero(input_owner == source))]
