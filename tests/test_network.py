"""`repurpose` end to end, on a small network trained on real digits (8 × 8 pixels)."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from repurpose_opt import Edge, FineTuning, Lossless, Plan, Volume
from repurpose_opt import repurpose as public_repurpose
from repurpose_opt.errors import InvalidArgument, NoSolution, UnknownSolver
from repurpose_opt.network import rounds
from repurpose_opt.network.repurpose import repurpose

P = 3
TRAIN, TEST = slice(0, 1200), slice(1200, None)


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 images (samples, 64) in [0, 1] in random order, and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.tensor(pixels[order] / 16, dtype=torch.float32), torch.tensor(labels[order])


@cache
def network() -> nn.Sequential:
    """64-32-24-10, trained in a second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 10))
    return train(model, digits()[1], functional.cross_entropy)


def train(model: nn.Sequential, labels: torch.Tensor, loss: Any) -> nn.Sequential:
    images = digits()[0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(400):
        part = slice(step % 10 * 120, (step % 10 + 1) * 120)
        optimizer.zero_grad()
        loss(model(images[part]), labels[part]).backward()
        optimizer.step()
    return model.eval()


def linear(model: nn.Module, name: str | int) -> nn.Linear:
    layer = model.get_submodule(str(name))
    assert isinstance(layer, nn.Linear)
    return layer


def accuracy(model: nn.Module) -> float:
    images, labels = digits()
    with torch.no_grad():
        return float((model(images[TEST]).argmax(1) == labels[TEST]).double().mean())


def calibration() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    return images[TRAIN], labels[TRAIN]


def planned(formulation: Any = None, n_workers: int = P, model: nn.Module | None = None, **arguments: Any) -> Plan:
    model = network() if model is None else model
    data = arguments.pop("data", calibration())
    return repurpose(model, torch.zeros(1, 64), n_workers, data=data, formulation=formulation, **arguments)


def quick_plan(formulation: Volume, **arguments: Any) -> Plan:
    """`planned` with a pruner of one pass, an eighth of the time: where it does not matter how transfers are chosen."""
    return planned(formulation, pruner="group-omp", **arguments)


def answers(model: nn.Module, images: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(digits()[0] if images is None else images)


def same(first: Plan, second: Plan) -> bool:
    """Whether two plans have the same owners, messages and weights, bit by bit."""
    weights, others = first.model.state_dict(), second.model.state_dict()
    layers = zip(first.layers, second.layers, strict=True)
    same_weights = weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)
    return same_weights and all(
        np.array_equal(a.owner, b.owner)
        and a.messages.keys() == b.messages.keys()
        and all(np.array_equal(a.message(*pair), b.message(*pair)) for pair in a.messages)
        for a, b in layers
    )


# Budgets


@pytest.mark.parametrize(
    ("budget", "pruner"),
    [(0.05, "auto"), *((budget, "group-omp") for budget in (0, 0.01, 0.13, 0.4, 0.8, 1))],
)
def test_a_budget_is_hard(budget: float, pruner: str) -> None:
    plan = planned(Volume(budget=budget), pruner=pruner)
    assert plan.volume <= budget * plan.direct_volume
    if 0.05 <= budget <= 0.4:
        assert plan.volume >= 0.85 * budget * plan.direct_volume


@pytest.mark.parametrize("budget", [0, 3, 4, 40, 401, 10**6])
def test_a_budget_in_bytes_is_hard(budget: int) -> None:
    assert quick_plan(Volume(budget_bytes=budget)).volume <= budget


def test_the_direct_volume_counts_every_value_to_every_worker_that_may_need_it() -> None:
    plan = planned(Volume(budget=1))
    last = int(np.count_nonzero(plan.layers[2].input_owner != 0))
    assert plan.direct_volume == 4 * (2 * 64 + 2 * 32 + last)


def test_the_whole_budget_gives_the_model_itself() -> None:
    for formulation in (Volume(budget=1), Volume(budget_bytes=10**6), Volume(transfer_price=0.0)):
        assert torch.allclose(answers(planned(formulation).model), answers(network()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("most", "pruner"), [(1e-4, "group-omp"), (0.01, "group-omp"), (0.2, "auto"), (0.9, "auto")])
def test_max_nmse_is_met_on_the_calibration_data(most: float, pruner: str) -> None:
    plan = planned(Volume(max_nmse=most), pruner=pruner)
    images = calibration()[0]
    original = answers(network(), images).double()
    error = (answers(plan.model, images).double() - original).square().sum() / original.square().sum()
    assert error <= most * (1 + 1e-6)
    volumes = [trial["volume_fraction"] for trial in plan.stats["trials"] if trial["output_nmse"] <= most]
    assert plan.volume / plan.direct_volume == min(volumes)


def test_max_nmse_buys_more_where_it_is_lower() -> None:
    volumes = [quick_plan(Volume(max_nmse=most)).volume for most in (0.9, 0.2, 0.01, 1e-4)]
    assert volumes == sorted(volumes)
    assert volumes[0] == 0


def test_an_nmse_that_no_plan_reaches_is_no_solution() -> None:
    """In float64 the repaired weights of the whole model differ from its own in the last bits."""
    model = copy.deepcopy(network()).double()
    with pytest.raises(NoSolution, match="max_nmse 0 cannot be met: the least that was reached is"):
        quick_plan(Volume(max_nmse=0), model=model)


def test_a_higher_price_buys_less() -> None:
    volumes = [planned(Volume(transfer_price=price)).volume for price in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e3)]
    assert volumes == sorted(volumes, reverse=True)
    assert volumes[0] == planned(Volume(budget=1)).volume
    assert volumes[-1] == 0


# Formulations and quality


def test_lossless_changes_no_output() -> None:
    plan = planned(Lossless())
    assert torch.equal(answers(plan.model), answers(network()))
    assert 0 < plan.volume <= plan.direct_volume


def test_edge_prunes_by_weight() -> None:
    plan = planned(Edge(weight_price=1e-5, transfer_price=1e-4))
    assert 0 < plan.volume < plan.direct_volume
    for position, layer in zip((0, 2, 4), plan.layers, strict=True):
        weight = linear(plan.model, position).weight
        assert 0 < torch.count_nonzero(weight) < weight.numel(), layer.name
    assert accuracy(plan.model) > 0.7


def test_a_moderate_budget_keeps_the_accuracy() -> None:
    dense = accuracy(network())
    assert dense > 0.94
    for budget, loss in ((0.3, 0.03), (0.1, 0.08)):
        plan = planned(Volume(budget=budget))
        assert accuracy(plan.model) > dense - loss
        assert 0.85 * budget * plan.direct_volume <= plan.volume <= budget * plan.direct_volume


def mean_divergence(**arguments: Any) -> float:
    """Mean KL divergence of the pruned from the original prediction on test images, over budgets and workers."""
    original = answers(network())[TEST].log_softmax(1)
    divergences = []
    for budget in (0.2, 0.3):
        for n_workers in (3, 6):
            plan = planned(Volume(budget=budget), n_workers, **arguments)
            pruned = answers(plan.model)[TEST].log_softmax(1)
            divergences.append(functional.kl_div(pruned, original, log_target=True, reduction="batchmean"))
    return float(np.mean(divergences))


@pytest.mark.slow
def test_compensation_and_loss_weights_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = mean_divergence()
    assert ours < 0.75 * mean_divergence(partitioner="munkres", pruner="threshold")
    ones = {name: np.ones(n) for name, n in (("0", 32), ("2", 24), ("4", 10))}
    monkeypatch.setattr(rounds, "loss_weights", lambda *_: ones)
    assert ours < 0.9 * mean_divergence()


def test_layers_are_calibrated_on_what_they_receive() -> None:
    """The bias then makes up for the mean error of all layers before: the means of the outputs are the original's."""
    images = calibration()[0]
    original = answers(network(), images)
    pruned = answers(quick_plan(Volume(budget=0.05)).model, images)
    assert not torch.allclose(pruned, original, atol=1.0)
    assert torch.allclose(pruned.mean(0), original.mean(0), atol=1e-3)


def test_a_refitted_plan_beats_edge_at_less_volume() -> None:
    edge = planned(Edge(transfer_price=1e-4))
    ours = planned(Volume(budget_bytes=0.8 * edge.volume))
    assert accuracy(ours.model) > accuracy(edge.model)


# Where things are


@pytest.mark.parametrize("output_owner", [0, 2, np.int64(1), [2], [0, 2], (0, 1, 2)])
def test_outputs_are_where_they_are_wanted(output_owner: Any) -> None:
    plan = quick_plan(Volume(budget=0.2), output_owner=output_owner)
    owners = set(plan.layers[-1].owner.tolist())
    assert owners <= set(np.atleast_1d(output_owner).tolist())
    if np.size(output_owner) > 1:
        assert len(owners) > 1
    assert plan.volume <= 0.2 * plan.direct_volume


@pytest.mark.parametrize("share", [[2, 1, 1], [1, 0, 3], np.array([0.7, 0.2, 0.1])])
def test_no_worker_holds_more_than_its_share(share: Any) -> None:
    plan = quick_plan(Volume(budget=0.3), worker_share=share)
    for layer in plan.layers[:-1]:
        held = np.bincount(layer.owner, minlength=P)
        assert (held <= np.ceil(len(layer.owner) * np.asarray(share) / np.sum(share) - 1e-9)).all()
    assert (plan.layers[-1].owner == 0).all()


def test_inputs_are_where_the_caller_says() -> None:
    owner = np.arange(64) % 2
    plan = quick_plan(Volume(budget=0.2), input_owner=owner)
    assert np.array_equal(plan.layers[0].input_owner, owner)
    assert plan.volume <= 0.2 * plan.direct_volume
    default = planned(Volume(budget=0))
    assert np.array_equal(default.layers[0].input_owner, np.arange(64) * P // 64)


def test_an_expensive_link_is_not_used() -> None:
    price = np.ones((P, P))
    price[1, 2] = 1e9
    plan = planned(Volume(transfer_price=1e-4), link_price=price)
    assert plan.traffic()[1, 2] == 0
    assert plan.traffic()[2, 1] > 0
    assert planned(Volume(transfer_price=1e-4)).traffic()[1, 2] > 0
    assert same(quick_plan(Volume(budget=0.1), link_price=1.0), quick_plan(Volume(budget=0.1)))


def bytes_of(plan: Plan) -> list[int]:
    """Of the weights of each worker."""
    return [sum(part.nbytes for part in plan.sub_model(worker)) for worker in range(plan.n_workers)]


def test_a_memory_limit_names_a_worker_and_the_bytes() -> None:
    plan = planned(Volume(budget=0.1), pruner="threshold")
    assert same(planned(Volume(budget=0.1), pruner="threshold", memory_limit=max(bytes_of(plan))), plan)
    limit = min(bytes_of(plan)) // 2
    with pytest.raises(InvalidArgument, match=f"memory_limit: got {limit} bytes.*at least .*, which worker . needs"):
        planned(Volume(budget=0.1), pruner="threshold", memory_limit=limit)


def test_a_plan_comes_back_from_disk(tmp_path: Path) -> None:
    plan = quick_plan(Volume(budget=0.1))
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert torch.equal(answers(loaded.model), answers(plan.model))
    assert same(loaded, plan)
    assert (loaded.volume, loaded.direct_volume, loaded.stats) == (plan.volume, plan.direct_volume, plan.stats)


@pytest.mark.parametrize("formulation", [Volume(budget=0.1), Volume(budget_bytes=8), Volume(max_nmse=0.1), Edge()])
def test_one_worker_sends_nothing(formulation: Any) -> None:
    plan = planned(formulation, n_workers=1)
    assert plan.volume == 0
    assert torch.allclose(answers(plan.model), answers(network()), atol=1e-4, rtol=1e-4)
    assert len(plan.stats["trials"]) == 1


def test_the_same_seed_gives_the_same_plan() -> None:
    state = torch.get_rng_state()
    for made, formulation in ((planned, Volume(transfer_price=1e-3)), (quick_plan, Volume(budget=0.1))):
        first = made(formulation, seed=5, finetune=FineTuning(steps=5))
        assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were drawn"
        torch.rand(3)
        state = torch.get_rng_state()
        assert same(first, made(formulation, seed=5, finetune=FineTuning(steps=5)))
        assert not same(first, made(formulation, seed=6, finetune=FineTuning(steps=5)))


# Models and data


def test_a_model_in_float64_gives_a_plan_in_float64(tmp_path: Path) -> None:
    double = nn.Sequential(nn.Flatten(), *copy.deepcopy(network())).double()
    images = digits()[0].reshape(-1, 8, 8)
    formulation = Volume(budget=0.2)
    plan = repurpose(double, images[:1], P, data=images[TRAIN].numpy(), formulation=formulation, pruner="group-omp")
    whole = repurpose(double, images[:1], P, data=images[TRAIN], formulation=Volume(budget=1))
    expected = answers(double, images.double())
    assert {parameter.dtype for parameter in plan.model.parameters()} == {torch.float64}
    assert {layer.value_bytes for layer in plan.layers} == {8}
    assert plan.volume <= 0.2 * plan.direct_volume
    assert torch.allclose(answers(whole.model, images.double()), expected, atol=1e-6)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert torch.equal(answers(loaded.model, images.double()), answers(plan.model, images.double()))


def test_a_model_without_biases_is_repaired_with_them() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 20, bias=False), nn.ReLU(), nn.Linear(20, 10, bias=False))
    plan = quick_plan(Volume(budget=0.1), model=model)
    assert linear(plan.model, 0).bias.abs().max() > 0
    assert torch.allclose(answers(planned(Volume(budget=1), model=model).model), answers(model), atol=1e-4)
    assert torch.equal(answers(planned(Lossless(), model=model).model), answers(model))


def test_integer_inputs_are_taken_as_numbers() -> None:
    images = (digits()[0][TRAIN] * 16).round()
    plans = [
        repurpose(network(), inputs[:1], P, data=inputs, formulation=Volume(budget=0.1), pruner="group-omp")
        for inputs in (images, images.to(torch.uint8))
    ]
    assert same(*plans)


def test_an_activation_in_place_changes_neither_data_nor_plan() -> None:
    layers = list(network())
    in_place = nn.Sequential(*[nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer for layer in layers])
    in_place.append(nn.LeakyReLU(0.9, inplace=True))
    images = calibration()[0].clone()
    plan = quick_plan(Volume(max_nmse=0.1), model=in_place, data=images)
    assert torch.equal(images, calibration()[0])
    original = answers(in_place, images).double()
    error = (answers(plan.model, images).double() - original).square().sum() / original.square().sum()
    assert error <= 0.1


def test_two_samples_are_enough_to_run_and_one_says_nothing() -> None:
    assert planned(Volume(budget=0.1), data=digits()[0][:2]).volume <= 83
    with pytest.raises(InvalidArgument, match="one sample"):
        planned(Volume(budget=0.1), data=digits()[0][:1])


def test_regression_by_squared_error() -> None:
    images, labels = digits()
    numbers = labels[:, None].float() / 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 1))
    train(model, numbers, functional.mse_loss)
    with pytest.raises(InvalidArgument, match=r"loss: got cross_entropy for outputs of shape \(1,\)"):
        planned(model=model, data=images[TRAIN])
    errors = []
    for budget in (0.0, 0.1, 0.3):
        plan = quick_plan(
            Volume(budget=budget), model=model, data=(images[TRAIN], labels[TRAIN] / 10), loss="squared_error"
        )
        assert 0.8 * budget * plan.direct_volume <= plan.volume <= budget * plan.direct_volume
        errors.append(float((answers(plan.model) - answers(model))[TEST].square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]
    tuned = quick_plan(
        Volume(budget=0.1),
        model=model,
        data=(images[TRAIN], labels[TRAIN] / 10),
        loss="squared_error",
        finetune=FineTuning(steps=150),
    )
    untuned = quick_plan(Volume(budget=0.1), model=model, data=images[TRAIN], loss="squared_error")
    assert (answers(tuned.model) - numbers)[TRAIN].square().mean() < (answers(untuned.model) - numbers)[
        TRAIN
    ].square().mean()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "n_workers": ({"n_workers": 0}, "n_workers: got 0"),
    "n_workers of bool": ({"n_workers": True}, "n_workers: got True"),
    "input_owner out of range": ({"input_owner": np.full(64, 3)}, "input_owner: got worker 3"),
    "input_owner of floats": ({"input_owner": np.zeros(64)}, "input_owner: got float64"),
    "input_owner of another length": ({"input_owner": np.zeros(63, dtype=int)}, r"input_owner: got shape \(63,\)"),
    "output_owner": ({"output_owner": 3}, "output_owner: got worker 3"),
    "output_owner of floats": ({"output_owner": 0.5}, "output_owner: got float64"),
    "no output_owner": ({"output_owner": []}, "output_owner"),
    "worker_share": ({"worker_share": [1, 1]}, r"worker_share: got shape \(2,\)"),
    "negative worker_share": ({"worker_share": [1, -1, 1]}, "worker_share"),
    "nothing for the outputs": ({"worker_share": [0, 1, 1]}, r"worker_share: got 0 for output_owner \[0\]"),
    "link_price": ({"link_price": -1.0}, "link_price"),
    "memory_limit": ({"memory_limit": 0, "pruner": "threshold"}, "memory_limit"),
    "loss": ({"loss": "hinge"}, "loss: got 'hinge'"),
    "formulation": ({"formulation": 0.1}, "formulation"),
    "data of another width": ({"data": torch.zeros(9, 63)}, r"data: got inputs of shape \(63,\)"),
    "labels out of range": ({"data": (torch.zeros(2, 64), torch.tensor([0, 10]))}, "data: got labels 0 … 10"),
    "fine-tuning without labels": (
        {"data": torch.zeros(2, 64), "finetune": FineTuning(steps=1)},
        "finetune: got a loss on labels",
    ),
    "seed": ({"seed": -1}, "seed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(InvalidArgument, match=message) as caught:
        planned(**arguments)
    assert "\n" not in str(caught.value)


def test_unknown_solvers_are_named() -> None:
    with pytest.raises(UnknownSolver, match="magic"):
        planned(partitioner="magic")
    with pytest.raises(UnknownSolver, match="magic"):
        planned(pruner="magic")


def test_it_runs_where_gradients_are_switched_off() -> None:
    with torch.no_grad():
        plan = quick_plan(Volume(budget=0.1), finetune=FineTuning(steps=2))
    assert plan.volume > 0
    assert public_repurpose is repurpose


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.1])
def test_a_budget_holds_where_a_link_costs_nothing(budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    prices = np.ones((3, 3))
    prices[0, 1] = prices[1, 0] = 0.0
    plan = repurpose(
        model, torch.zeros(1, 12), 3, data=torch.randn(200, 12), formulation=Volume(budget=budget), link_price=prices
    )
    assert plan.volume <= budget * plan.direct_volume
