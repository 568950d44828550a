"""Plans of graphs from their folders, and on three real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_graph_plan import SAVED, P, built, inputs_of
from test_runtime import expected

from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import reader_of
from repurpose_opt.runtime.local import whole_tensor
from repurpose_opt.runtime.processes.launch import run_plan
from repurpose_opt.runtime.processes.worker import build_part
from repurpose_opt.runtime.simulate import run_together
from repurpose_opt.runtime.storage import read_manifest, read_worker

SAMPLES = 11


@pytest.mark.parametrize("name", SAVED)
def test_a_worker_needs_the_manifest_and_its_own_file_only(name: str, tmp_path: Path) -> None:
    model, plan = built(name)
    plan.save(tmp_path / "plan")
    inputs = inputs_of(model, SAMPLES, seed=3)
    parts, values = [], []
    for worker in range(P):
        manifest = read_manifest(tmp_path / "plan")  # each its own: nothing is shared
        tensors = read_worker(tmp_path / "plan", manifest, worker)
        parts.append(build_part(manifest, worker, tensors, SAMPLES))
        array = inputs.reshape(SAMPLES, -1) if name == "flattened" else inputs
        values.append(reader_of(manifest.graph, manifest.splits[INPUT], worker, "float32").read(array, slice(None)))
    output = plan.splits[plan.graph.steps[-1].name]
    whole = torch.empty(len(output.places), SAMPLES, *output.positions)
    for worker, value in enumerate(run_together(parts, values, SAMPLES)):
        whole[output.held(worker)] = value
    assert np.abs(whole_tensor(whole, output).numpy() - expected(plan, inputs)).max() <= 1e-5


@pytest.mark.parametrize("name", ["residual", "transformer on two", pytest.param("coded", marks=pytest.mark.slow)])
def test_processes_answer_as_the_model_and_send_what_was_predicted(name: str, tmp_path: Path) -> None:
    model, plan = built(name)
    plan.save(tmp_path / "plan")
    inputs = inputs_of(model, SAMPLES, seed=2)
    ran = run_plan(tmp_path / "plan", inputs, batch_size=4, timeout=60)
    answer = expected(plan, inputs)
    assert ran.outputs.shape == answer.shape
    assert np.abs(ran.outputs - answer).max() <= 1e-5
    assert np.array_equal(ran.bytes_sent, plan.traffic() * SAMPLES)
    assert np.array_equal(ran.bytes_predicted, ran.bytes_sent)
    assert ran.messages == sum(len(layer.messages) for layer in plan.layers)
