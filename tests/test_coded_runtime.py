"""Plans with codes on four real processes over gloo, and the exchange step of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_coded_plan import coded_plan
from test_runtime import expected, samples

from repurpose_opt.exchange import Values
from repurpose_opt.runtime.coded import CodedLinear
from repurpose_opt.runtime.exchange import ExchangeStep, Wait
from repurpose_opt.runtime.plan import PlannedCode
from repurpose_opt.runtime.processes.launch import run_plan

P = 4
SAMPLES = 23


@pytest.mark.parametrize("kinds", ["c", "v", "-", "c-", "cv", "cv-"])
@pytest.mark.parametrize("batch", [5, 2, 0])
def test_an_exchange_step_hands_over_the_encoded_numbers(kinds: str, batch: int) -> None:
    """Against R x computed message by message from the plan's own encoders."""
    plan, _ = coded_plan([17, 13, 4], 4, [kinds, "-"], seed=2)
    layer, module = plan.layers[0], plan.product(plan.layers[0])
    values = known = torch.randn(17, batch)
    if isinstance(module, CodedLinear):
        known = torch.cat([values, module.encoder.detach() @ values])
    steps = [ExchangeStep(layer, k, 5, torch.float32, plan.sub_model(k)[0].encoder) for k in range(4)]
    held = [values[layer.held(k)] for k in range(4)]
    parts = [steps[k].encode(held[k]).clone().split(steps[k].sent_counts) for k in range(4)]
    for k in range(4):

        def start(received: torch.Tensor, _: Any, __: Any, ___: Any, ____: bool, k: int = k) -> Wait:
            def wait() -> None:
                torch.cat([parts[source][k] for source in range(4)], out=received)

            return wait

        steps[k].begin(held[k], start)
        inputs = torch.cat([held[k], steps[k].end(batch)])
        assert torch.allclose(inputs, known[layer.columns(k)], atol=1e-6)
        assert np.array_equal(steps[k].bytes_sent, layer.traffic()[k] * batch)


def test_four_processes_answer_as_one_and_send_what_was_predicted(tmp_path: Path) -> None:
    """Codes; values, codes or nothing by pair; nothing at all; values."""
    plan, _ = coded_plan([61, 34, 25, 31, 10], P, ["c", "cv-", "-", "v"], seed=1)
    kinds = [{type(message) for message in layer.messages.values()} for layer in plan.layers]
    assert kinds == [{PlannedCode}, {Values, PlannedCode}, set(), {Values}]
    assert len(plan.layers[1].messages) < P * (P - 1)
    plan.save(tmp_path / "plan")
    inputs = samples(SAMPLES, 61)
    ran = run_plan(tmp_path / "plan", inputs, batch_size=7, timeout=60)
    assert np.abs(ran.outputs - expected(plan, inputs)).max() <= 1e-4
    assert np.array_equal(ran.bytes_sent, plan.traffic() * SAMPLES)
    assert np.array_equal(ran.bytes_predicted, ran.bytes_sent)
    assert ran.messages == sum(len(layer.messages) for layer in plan.layers)
