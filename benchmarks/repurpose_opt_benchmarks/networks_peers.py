"""What the experiment `networks` compares with, where `repurpose_opt.network.baselines` does not have it.

All of them are trained on the batches of the other rows. A block-diagonal student is an independent expert on every
worker, of which only logits are sent. Group lasso chooses transfers while it trains and never moves a neuron. A sparse
network is pruned by magnitude, whatever that makes it send; Mt-KaHyPar places its neurons so that it sends little.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from repurpose_opt import LayerSolution, NetworkSolution, solve_network
from repurpose_opt.network import baselines
from repurpose_opt.network.baselines import Cost, cost_of
from repurpose_opt.network.finetune import FineTuning
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks.networks_tasks import OUTPUT_OWNER, Task, perceptron

PARTITIONER = "mt-kahypar"


def linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers, in order."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def owners(task: Task) -> list[NDArray[np.int64]]:
    """Who holds the inputs, then the neurons of each layer, in the neurons' order."""
    assert task.placement.input_owner is not None
    return [task.placement.input_owner, *(layer.owner for layer in task.direct.layers)]


def filled_late_fusion(task: Task, numbers: int) -> Plan:
    """Each worker's part of the logits, summed, and up to `numbers` in all the values of most energy."""
    return baselines.filled_late_fusion_plan(task.network, task.placement, task.calibration, task.loss_weights, numbers)


# A student of blocks


@torch.no_grad()
def student(task: Task) -> nn.Sequential:
    """Untrained: a worker's neurons of a hidden layer read its own of the layer before; the last layer sums over all.

    Each worker has 1/P of every hidden layer. Blocks are drawn as PyTorch draws a layer of their width.
    """
    model = perceptron(task.setting.widths, task.seed)
    held = owners(task)
    for index, linear in enumerate(linears(model)[:-1]):
        is_own = torch.from_numpy(held[index + 1][:, None] == held[index])
        fan_in = is_own.sum(1, keepdim=True)
        scale = (is_own.shape[1] / fan_in).sqrt()
        linear.weight.mul_(is_own * scale)
        linear.bias.mul_(scale[:, 0])
    return model


def student_cost(task: Task, model: nn.Sequential) -> Cost:
    """Each worker sends its logits, or its last hidden values where these are fewer."""
    inputs = task.calibration[:2]
    network = trace(model, inputs)
    ones = {name: np.ones(len(network.product(name).weight)) for name in network.products}
    plan = baselines.filled_late_fusion_plan(network, task.placement, inputs, ones, 0)
    return cost_of(plan)


# Group lasso


@dataclass(frozen=True, eq=False)
class Groups:
    """The weights by which one value reaches one other worker: V[owner = k, j] for every j and k ≠ its owner."""

    linear: nn.Linear
    owner: torch.Tensor
    """(m,)"""
    members: torch.Tensor
    """(P, m) 1 where worker k computes neuron i."""
    is_remote: torch.Tensor
    """(P, n)"""

    def norms(self) -> torch.Tensor:
        """(P, n) of each group; 0 for what is held, and for a worker without neurons."""
        return (self.members @ self.linear.weight.square()).sqrt() * self.is_remote

    def scale(self, factor: torch.Tensor) -> None:
        """Multiply each group by its factor, (P, n)."""
        self.linear.weight.mul_(torch.where(self.is_remote, factor, 1.0)[self.owner])


@torch.no_grad()
def groups_of(task: Task, model: nn.Module) -> list[Groups]:
    held, P = owners(task), task.placement.n_workers
    found = []
    for index, linear in enumerate(linears(model)):
        owner = torch.from_numpy(held[index + 1])
        is_remote = torch.from_numpy(held[index]) != torch.arange(P)[:, None]
        found.append(Groups(linear, owner, functional.one_hot(owner, P).T.float(), is_remote))
    return found


def group_lasso(task: Task, numbers: int, settings: FineTuning, penalty: float) -> nn.Module:
    """Train the dense network with penalty · Σ ‖V[owner = k, j]‖ and keep at most `numbers` groups, the strongest.

    Half of the steps are penalised: Adam, and after each of its steps the proximal step of the penalty (block soft
    thresholding: Yuan and Lin 2006, "Model selection and estimation in regression with grouped variables"). The other
    half trains what is kept, without a penalty.
    """
    model = copy.deepcopy(task.model)
    groups = groups_of(task, model)
    half = settings.steps // 2
    _train_penalised(task, model, groups, replace(settings, steps=half), penalty)
    keep_strongest(groups, numbers)
    tuned: nn.Module = task.tuned(model, replace(settings, steps=settings.steps - half))
    return tuned


def _train_penalised(
    task: Task, model: nn.Sequential, groups: Sequence[Groups], settings: FineTuning, penalty: float
) -> None:
    parameters = [parameter.requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, fused=True)
    batches = task.batches()
    for _ in range(settings.steps):
        inputs, labels = next(batches)
        with torch.no_grad():
            target = task.model(inputs).softmax(1)
        outputs = model(inputs)
        share = settings.distillation
        by_labels, by_target = (functional.cross_entropy(outputs, wanted) for wanted in (labels, target))
        optimizer.zero_grad()
        ((1 - share) * by_labels + share * by_target).backward()
        optimizer.step()
        with torch.no_grad():
            shrink(groups, settings.learning_rate * penalty)
    model.requires_grad_(False)


def shrink(groups: Sequence[Groups], amount: float) -> None:
    """The norm of every group becomes less by this amount, or 0."""
    for group in groups:
        group.scale((1 - amount / group.norms().clamp(min=1e-12)).clamp(min=0))


@torch.no_grad()
def keep_strongest(groups: Sequence[Groups], numbers: int) -> None:
    """At most so many groups remain, over all layers."""
    norms = torch.cat([group.norms().flatten() for group in groups])
    order = norms.argsort(descending=True, stable=True)
    is_kept = torch.zeros(len(norms), dtype=torch.bool)
    is_kept[order[:numbers]] = norms[order[:numbers]] > 0
    parts = is_kept.split([group.is_remote.numel() for group in groups])
    for group, kept in zip(groups, parts, strict=True):
        group.scale(kept.view_as(group.is_remote).float())


def cost_as_it_stands(task: Task, model: nn.Module) -> Cost:
    """Of a model whose neurons stay in their order and receive what their weights read."""
    return cost_of(baselines.direct_plan(trace(model, task.calibration[:1]), task.placement))


# Sparse


def kept_weights(plan: Plan) -> dict[str, int]:
    """Weights of each layer that are not zero, those of encoders and decoders among them."""
    modules = {layer.name: plan.product(layer) for layer in plan.layers}
    return {
        name: sum(int(p.count_nonzero()) for p in module.parameters() if p.ndim == 2)
        for name, module in modules.items()
    }


def sparse(task: Task, plan: Plan) -> Plan:
    """As many weights as a plan has, the largest of each layer; neurons in their order."""
    return baselines.sparse_plan(task.network, task.placement, kept_weights(plan))


def placed(task: Task, model: nn.Module) -> NetworkSolution:
    """The neurons of a sparse model, placed by Mt-KaHyPar, all layers together."""
    weights = [linear.weight for linear in linears(model)]
    return solve_network(
        weights,
        task.placement.n_workers,
        input_owner=task.placement.input_owner,
        output_owner=OUTPUT_OWNER,
        partitioner=PARTITIONER,
        time_limit=task.setting.placing_seconds,
        seed=task.seed,
    )


def placed_cost(task: Task, model: nn.Module) -> Cost:
    """Of `placed`."""
    solution = placed(task, model)
    item = linears(model)[0].weight.element_size()
    return Cost(
        values_per_sample=solution.volume // item,
        bytes_per_sample=solution.volume,
        volume_fraction=solution.volume / task.direct.direct_volume,
        messages=sum(len(layer.exchange.messages) for layer in solution.layers if layer.exchange is not None),
        busiest_bytes=solution.busiest,
        busiest_macs=_busiest_macs(solution.layers, task.placement.n_workers),
    )


def _busiest_macs(layers: Sequence[LayerSolution], P: int) -> float:
    """Of dense blocks of the rows and columns that a worker has, relative to 1/P of the dense network's."""
    macs, dense = np.zeros(P), 0
    for layer in layers:
        assert layer.owner is not None
        had = layer.transfers | (layer.problem.input_owner[:, None] == np.arange(P))
        macs += np.bincount(layer.owner, minlength=P) * had.sum(axis=0)
        dense += layer.problem.m * layer.problem.n
    return float(macs.max() * P / dense)
