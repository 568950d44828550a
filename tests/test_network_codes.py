"""`repurpose` with codes: what is sent are linear combinations of values, and they are fine-tuned with the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_network import TEST, P, accuracy, answers, calibration, digits, network, planned, same
from torch.nn import functional

from repurpose_opt import FineTuning, Volume
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Values
from repurpose_opt.network import baselines, finetune
from repurpose_opt.network.sweep import Sweep
from repurpose_opt.runtime.coded import CodedLinear
from repurpose_opt.runtime.plan import Plan, PlannedCode

BUDGET = Volume(budget=0.1, messages="codes")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(BUDGET)


@pytest.mark.parametrize("messages", ["codes", "mixed"])
@pytest.mark.parametrize("budget", [0, 0.01, 0.3])
def test_a_budget_is_hard(messages: str, budget: float) -> None:
    plan = planned(Volume(budget=budget, messages=messages))
    assert plan.volume <= budget * plan.direct_volume
    if budget == 0.3:
        assert plan.volume >= 0.85 * budget * plan.direct_volume


def test_numbers_are_sent_and_counted(plan: Plan) -> None:
    sent = [message for layer in plan.layers for message in layer.messages.values()]
    assert PlannedCode in {type(message) for message in sent}
    assert plan.volume == 4 * sum(message.size for message in sent)
    cost = baselines.cost_of(plan)
    assert (cost.values_per_sample, cost.messages) == (sum(message.size for message in sent), len(sent))
    dense = 64 * 32 + 32 * 24 + 24 * 10
    assert cost.busiest_macs == plan.worker_macs().max() / (dense / P)


def test_the_whole_budget_gives_the_model_itself() -> None:
    plan = planned(Volume(budget=1, messages="codes"))
    assert torch.allclose(answers(plan.model), answers(network()), atol=1e-4, rtol=1e-4)


def test_max_nmse_is_met_on_the_calibration_data() -> None:
    plan = planned(Volume(max_nmse=0.1, messages="codes"))
    images = calibration()[0]
    original = answers(network(), images).double()
    error = (answers(plan.model, images).double() - original).square().sum() / original.square().sum()
    assert error <= 0.1 * (1 + 1e-6)


def test_codes_say_more_than_values_at_the_same_volume(plan: Plan) -> None:
    """By the mean KL divergence of the pruned from the original prediction on test images."""
    original = answers(network())[TEST].log_softmax(1)
    values, codes = (
        functional.kl_div(answers(pruned.model)[TEST].log_softmax(1), original, log_target=True, reduction="batchmean")
        for pruned in (planned(Volume(budget=0.1)), plan)
    )
    assert codes < 0.8 * values


def test_all_that_a_formulation_says_holds_in_every_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for a price replaces the limit, nothing else."""
    tried: list[Volume] = []
    run = Sweep.run

    def watched(self: Sweep, formulation: Any) -> Any:
        tried.append(formulation)
        return run(self, formulation)

    monkeypatch.setattr(Sweep, "run", watched)
    for limit in ({"budget": 0.1}, {"budget": 0.0}, {"max_nmse": 0.3}):
        planned(Volume(messages="mixed", mac_price=1e-9, **limit))
    assert {(formulation.messages, formulation.mac_price) for formulation in tried} == {("mixed", 1e-9)}
    assert all(formulation.budget is None and formulation.max_nmse is None for formulation in tried)


def test_a_plan_comes_back_from_disk(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert torch.equal(answers(loaded.model), answers(plan.model))
    assert same(loaded, plan)


def test_a_finished_run_solves_nothing_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Chosen values and encoders come back from the checkpoint bit by bit."""
    formulation = Volume(budget=0.3, messages="mixed", mac_price=1e-6)
    first = planned(formulation, checkpoint_dir=tmp_path)
    kinds = {type(message) for layer in first.layers for message in layer.messages.values()}
    assert kinds == {Values, PlannedCode}
    monkeypatch.setattr(Sweep, "_solve", None)
    again = planned(formulation, checkpoint_dir=tmp_path)
    assert same(first, again)
    assert first.stats == again.stats
    with pytest.raises(InvalidArgument, match="the folder of another run"):
        planned(Volume(budget=0.3, messages="codes"), checkpoint_dir=tmp_path)


# Fine-tuning


def coded(plan: Plan) -> list[CodedLinear]:
    found = [module for module in plan.model.children() if isinstance(module, CodedLinear)]
    assert found
    return found


def test_encoders_decoders_and_weights_learn_where_they_are_not_zero(plan: Plan) -> None:
    after = planned(BUDGET, finetune=FineTuning(steps=200))
    for name in ("weight", "encoder", "decoder"):
        old, new = ([getattr(module, name) for module in coded(tuned)] for tuned in (plan, after))
        assert any((before == 0).any() for before in old)
        assert all(torch.equal(learnt == 0, before == 0) for before, learnt in zip(old, new, strict=True))
        assert not torch.equal(old[0], new[0])
    after.check()
    assert after.volume == plan.volume
    assert accuracy(after.model) > accuracy(plan.model)


def test_without_masks_a_code_would_reach_beyond_its_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "hold_at_zero", lambda masks: None)
    with pytest.raises(InvalidArgument, match=r"does not (hold|have) it"):
        planned(BUDGET, finetune=FineTuning(steps=1)).check()


def test_the_same_seed_gives_the_same_plan(plan: Plan) -> None:
    torch.rand(3)
    state = torch.get_rng_state()
    assert same(plan, planned(BUDGET))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were drawn"


def test_a_model_in_float64_sends_numbers_of_8_bytes() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)).double()
    plan = planned(Volume(budget=0.1, messages="codes"), model=model)
    assert plan.volume == 8 * sum(message.size for layer in plan.layers for message in layer.messages.values()) > 0
    assert {parameter.dtype for parameter in plan.model.parameters()} == {torch.float64}
    assert np.isfinite(answers(plan.model, digits()[0].double()).numpy()).all()
