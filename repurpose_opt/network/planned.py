"""From owners, messages and effective weights of a network's products to the plan that computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.exchange import Code, Exchange, Message
from repurpose_opt.network.owners import Owners, Placement
from repurpose_opt.network.products import product_with
from repurpose_opt.network.sweep import SolvedLayer
from repurpose_opt.network.trace import Network
from repurpose_opt.runtime.coded import CodedConv, CodedLinear, Product
from repurpose_opt.runtime.graph import INPUT, Graph, Step
from repurpose_opt.runtime.layer import PlannedLayer
from repurpose_opt.runtime.modules import Role, role_of
from repurpose_opt.runtime.plan import Plan


def plan_of(
    network: Network,
    placement: Placement,
    layers: Mapping[str, SolvedLayer],
    unit_owner: NDArray[np.int64],
    direct_volume: int,
    stats: Mapping[str, Any],
) -> Plan:
    """The plan of products that are placed and pruned; its model has copies of all modules."""
    owners = Owners(network, placement)
    owners.of_unit = unit_owner
    modules: dict[str, nn.Module] = {}
    planned: list[PlannedLayer] = []
    for step in network.graph.steps:
        role = role_of(network.graph.module(step.name))
        if role is Role.PRODUCT:
            modules[step.name], layer = product_of(network, owners, step.name, layers[step.name])
            planned.append(layer)
        elif role in (Role.SOURCE, Role.NORM, Role.GATHER, Role.CENTRAL):
            planned.append(_layer_of(owners, step, role))
    graph: Graph = network.with_modules(modules).graph
    input_owner = None if network.layouts[INPUT] is None else owners.at(INPUT)
    return Plan(graph, tuple(planned), placement.n_workers, direct_volume, stats, input_owner, network.input_shape)


def product_of(network: Network, owners: Owners, name: str, solved: SolvedLayer) -> tuple[Product, PlannedLayer]:
    """The module and the planned layer of weights V (m, n, …), which in blocks that a code covers are U R.

    Where there are codes, the module is a coded one, and the factors of each code are balanced. A number that carries
    nothing, because U has not full rank, is not sent. Both are in the dtype of the weights. O(m n r) for codes of r
    numbers.
    """
    read = network.read(name)
    input_owner, weight = owners.at(read), solved.weight
    factors = {
        pair: balanced_factors(_block(weight, input_owner, solved.owner, pair), message.encoder)
        for pair, message in sorted(solved.exchange.messages.items())
        if isinstance(message, Code)
    }
    messages: dict[tuple[int, int], Message] = {}
    for pair, message in solved.exchange.messages.items():
        carried = Code(factors[pair][1]) if pair in factors else message
        if carried.size:
            messages[pair] = carried
    sent = Exchange(solved.exchange.n, solved.exchange.P, messages)
    positions = network.positions(read)
    macs = int(np.prod(weight.shape[2:])) * network.positions(name)
    size = weight.itemsize * positions
    layer = PlannedLayer.of_exchange(name, input_owner, solved.owner, sent, size, positions, macs)
    return _module(network.product(name), layer, solved, factors), layer


def balanced_factors(
    weight: NDArray[np.floating], encoder: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """D (m_k, r, …) and E (r, n_p) with D E = V_kp, ‖D[:, i]‖ = ‖E[i]‖, of V_kp (m_k, n_p, …), orthonormal R (r, n_p).

    From the SVD of U = V_kp Rᵀ: D = A S^½, E = S^½ Bᵀ R. Gradient descent on two factors is best conditioned where
    they are balanced (Tu et al. 2016, "Low-rank solutions of linear matrix equations via Procrustes flow"). Numbers
    whose singular value is nothing but rounding in the dtype of V are left out. All taps of a kernel share a number.
    """
    by_tap = np.moveaxis(weight.astype(np.float64), 1, -1)  # (m_k, …, n_p)
    flat = by_tap.reshape(-1, by_tap.shape[-1])
    left, singular, right = np.linalg.svd(flat @ encoder.T, full_matrices=False)
    rounding = np.finfo(weight.dtype).eps * max(flat.shape) * singular.max(initial=0.0)
    rank = int(np.count_nonzero(singular > rounding))
    scale = np.sqrt(singular[:rank])
    decoder = np.moveaxis((left[:, :rank] * scale).reshape(*by_tap.shape[:-1], rank), -1, 1)
    return decoder, scale[:, None] * (right[:rank] @ encoder)


@torch.no_grad()
def _module(
    like: Product,
    layer: PlannedLayer,
    solved: SolvedLayer,
    factors: Mapping[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> Product:
    weight, bias = torch.from_numpy(solved.weight.copy()), torch.from_numpy(solved.bias)
    for source, target in factors:
        weight[np.ix_(layer.rows(target), layer.held(source))] = 0.0
    if layer.numbers == 0:
        plain: Product = product_with(weight, bias, like)
        return plain
    m, n = weight.shape[:2]
    module: CodedLinear | CodedConv
    if isinstance(like, nn.Linear | CodedLinear):
        module = CodedLinear(n, m, layer.numbers, dtype=weight.dtype)
    else:
        kernel, stride, padding, dilation = map(_numbers, (like.kernel_size, like.stride, like.padding, like.dilation))
        module = CodedConv(n, m, layer.numbers, kernel, stride, padding, dilation, dtype=weight.dtype)
    module.weight.copy_(weight)
    module.bias.copy_(bias)
    for (source, target), (decoder, encoder) in factors.items():
        if len(encoder):
            numbers = layer.code_numbers(source, target)
            module.decoder[np.ix_(layer.rows(target), numbers)] = torch.from_numpy(decoder).to(weight.dtype)
            module.encoder[np.ix_(numbers, layer.held(source))] = torch.from_numpy(encoder).to(weight.dtype)
    return module


def _numbers(value: Any) -> tuple[int, ...]:
    """One for each dimension: `lower` leaves no paddings in words."""
    return tuple(value)


def _layer_of(owners: Owners, step: Step, role: Role) -> PlannedLayer:
    """Of a step that computes exactly what it did: what it needs is sent whole."""
    network, P = owners.network, owners.placement.n_workers
    read, owner, size = step.inputs[0], owners.at(step.name), network.dtype.itemsize
    if role is Role.SOURCE:
        return PlannedLayer.source(step.name, owner, P, size)
    if role is Role.CENTRAL:
        inputs = 0 if network.layouts[read] is None else len(network.units(read))
        return PlannedLayer.central(step.name, inputs, len(owner), int(owner[0]), P, size)
    positions = network.positions(read)
    if role is Role.NORM:
        return PlannedLayer.norm(step.name, owner, P, size * positions, positions)
    return PlannedLayer.gather(step.name, owners.at(read), int(owner[0]), P, size * positions, positions)


def _block(
    weight: NDArray[np.floating], input_owner: NDArray[np.int64], owner: NDArray[np.int64], pair: tuple[int, int]
) -> NDArray[np.floating]:
    """V_kp (m_k, n_p, …) of the pair (p, k)."""
    source, target = pair
    return weight[np.ix_(np.flatnonzero(owner == target), np.flatnonzero(input_owner == source))]
