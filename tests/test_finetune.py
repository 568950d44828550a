"""Fine-tuning: what is pruned stays pruned, the rest learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_network import accuracy, answers, calibration, digits, linear, network, quick_plan, same
from torch import nn
from torch.nn import functional

from repurpose_opt import FineTuning, Volume
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.network.finetune import batches_of, fine_tune

BUDGET = Volume(budget=0.1)


def test_pruned_weights_stay_exactly_zero_and_the_rest_learns() -> None:
    before = quick_plan(BUDGET)
    after = quick_plan(BUDGET, finetune=FineTuning(steps=200))
    for position in (0, 2, 4):
        old, new = linear(before.model, position), linear(after.model, position)
        assert (old.weight == 0).sum() > 0
        assert torch.equal(new.weight[old.weight == 0], torch.zeros(int((old.weight == 0).sum())))
        assert not torch.equal(new.weight, old.weight)
        assert not torch.equal(new.bias, old.bias)
    assert (after.volume, after.direct_volume) == (before.volume, before.direct_volume)
    after.check()
    assert not any(parameter.requires_grad for parameter in after.model.parameters())
    assert accuracy(after.model) > accuracy(before.model)


def test_the_original_model_stays_as_it_was() -> None:
    weights = {name: value.clone() for name, value in network().state_dict().items()}
    quick_plan(BUDGET, finetune=FineTuning(steps=5, distillation=0.5))
    for name, value in network().state_dict().items():
        assert torch.equal(value, weights[name])


def test_distillation_needs_no_labels_and_approaches_the_teacher() -> None:
    images, _ = calibration()
    before = quick_plan(BUDGET, data=images)
    after = quick_plan(BUDGET, data=images, finetune=FineTuning(steps=400, learning_rate=3e-3, distillation=1))

    def divergence(model: nn.Module) -> float:
        target = answers(network(), images).log_softmax(1)
        answer = answers(model, images).log_softmax(1)
        return float(functional.kl_div(answer, target, log_target=True, reduction="batchmean"))

    assert divergence(after.model) < 0.6 * divergence(before.model)


@pytest.mark.parametrize("distillation", [0, 0.5])
def test_anything_but_distillation_needs_labels(distillation: float) -> None:
    with pytest.raises(InvalidArgument, match=r"data has none; allowed: \(inputs, labels\), or distillation=1"):
        quick_plan(BUDGET, data=calibration()[0], finetune=FineTuning(steps=5, distillation=distillation))


def with_dropout() -> nn.Sequential:
    layers = list(network())
    return nn.Sequential(layers[0], layers[1], nn.Dropout(0.5), *layers[2:])


def test_the_same_seed_trains_the_same_weights_with_dropout_too() -> None:
    tuning = FineTuning(steps=10, distillation=0.5)
    first = quick_plan(BUDGET, model=with_dropout(), finetune=tuning, seed=1)
    torch.rand(1)
    assert same(first, quick_plan(BUDGET, model=with_dropout(), finetune=tuning, seed=1))
    assert not same(first, quick_plan(BUDGET, model=with_dropout(), finetune=tuning, seed=2))


def test_the_teacher_answers_in_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Dropout must not switch on with that of the model in training."""
    answered = []
    forward = nn.Dropout.forward

    def watched(self: nn.Dropout, values: torch.Tensor) -> torch.Tensor:
        answered.append((torch.is_grad_enabled(), self.training))
        return forward(self, values)

    monkeypatch.setattr(nn.Dropout, "forward", watched)
    quick_plan(BUDGET, model=with_dropout(), finetune=FineTuning(steps=3, distillation=1))
    in_training = [training for _, training in answered]
    assert in_training.count(True) == 3
    teaching = answered[answered.index((True, True)) :]
    without_gradients = [training for grad, training in teaching if not grad]
    assert len(without_gradients) >= 3
    assert not any(without_gradients)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_trainings_change_the_weights(steps: int) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    before = linear(model, 0).weight.detach().clone()
    fine_tune(model, batches_of(torch.randn(9, 3), torch.arange(9) % 2, 4, 0), FineTuning(steps=steps))
    assert not torch.equal(linear(model, 0).weight, before)
    assert not model.training


def test_squared_error_is_the_mean_over_outputs() -> None:
    """One step of plain descent, by hand, fixes the direction: Adam's first step is the sign of the gradient."""
    layer = nn.Linear(2, 2)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    inputs, targets = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, -3.0]])
    batches = iter([(inputs, targets)])
    fine_tune(nn.Sequential(layer), batches, FineTuning(steps=1, learning_rate=0.01), loss="squared_error")
    assert layer.weight[0, 0] > 1
    assert layer.weight[1, 1] < 1
    assert torch.equal(layer.weight.sign(), torch.eye(2)), "a weight of zero is pruned"
    assert layer.bias[0] > 0 > layer.bias[1]


def test_every_sample_is_seen_once_an_epoch() -> None:
    inputs = torch.arange(12).reshape(12, 1)
    batches = batches_of(inputs, inputs[:, 0] * 2, 5, seed=0)
    epochs = [[next(batches) for _ in range(2)] for _ in range(2)]
    for epoch in epochs:
        seen = torch.cat([batch[:, 0] for batch, _ in epoch])
        assert len(seen.unique()) == 10
        for batch, labels in epoch:
            assert labels is not None
            assert torch.equal(labels, batch[:, 0] * 2)
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    small, labels = next(batches_of(inputs[:3], None, 5, seed=0))
    assert (len(small), labels) == (3, None)


WRONG: dict[str, Any] = {
    "steps": [0, 1.5, True, -1],
    "batch_size": [0, 2.0],
    "learning_rate": [0, -1e-3, float("nan"), float("inf")],
    "distillation": [-0.1, 1.1, float("nan")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}: got"):
        FineTuning(**{name: value})


def test_labels_of_any_whole_type_train() -> None:
    images, labels = digits()
    plans = [
        quick_plan(BUDGET, data=(images[:300], given), finetune=FineTuning(steps=3))
        for given in (labels[:300], labels[:300].numpy().astype(np.uint8), labels[:300].to(torch.int32))
    ]
    assert same(plans[0], plans[1])
    assert same(plans[0], plans[2])
