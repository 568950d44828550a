"""What a worker needs of memory, and weights that it keeps in compressed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_graph_plan import SAVED, built, inputs_of
from test_plan import mlp, random_plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.inputs import checked_inputs, reader_of
from repurpose_opt.runtime.local import LinearStep, Part, part_of
from repurpose_opt.runtime.memory import message_bytes
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.simulate import simulate
from repurpose_opt.runtime.sparse import is_faster_sparse, sparse_where_faster
from repurpose_opt.runtime.storage import tensor_key
from repurpose_opt.runtime.wire import Wire, wire_of


def part(plan: Plan, worker: int, batch_size: int, wire: str | None = None) -> Part:
    device = torch.get_default_device()
    tensors = {
        tensor_key(step.name, key): tensor.to(device)
        for step in plan.sub_model(worker)
        for key, tensor in step.tensors.items()
    }
    written = wire_of(wire, torch.float32)
    return part_of(plan.graph, plan.layers, plan.splits, worker, tensors, batch_size, torch.float32, written)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("wire", [None, "int8"])
def test_buffers_take_the_bytes_that_the_plan_says(name: str, wire: str | None) -> None:
    _, plan = built(name)
    for worker, memory in enumerate(plan.memory(5, wire)):
        allocated = sum(exchange.nbytes for exchange in part(plan, worker, 5, wire).exchanges)
        assert memory.messages == allocated
        assert memory.messages == message_bytes(plan.layers, worker, 5, torch.float32, wire_of(wire, torch.float32))


def test_memory_of_a_perceptron_counted_by_hand() -> None:
    plan = random_plan(mlp([13, 11, 5]), 3)
    first, second = plan.layers
    for worker, memory in enumerate(plan.memory(7)):
        widths = [len(first.held(worker)), len(first.rows(worker)), len(second.rows(worker))]
        weights = [len(layer.rows(worker)) * (len(layer.columns(worker)) + 1) for layer in plan.layers]
        assert memory.weights == 4 * sum(weights)
        # The input is there to the end; the hidden layer before and after its activation, then it and the output.
        assert memory.activations == 4 * 7 * (widths[0] + max(2 * widths[1], widths[1] + widths[2]))
        assert memory.total == memory.weights + memory.messages + memory.activations


@pytest.mark.parametrize(("samples", "share", "compact"), [(300, 0.05, True), (300, 0.3, False), (1, 0.05, False)])
def test_few_nonzeros_are_kept_in_compressed_rows_and_answer_alike(samples: int, share: float, compact: bool) -> None:
    plan = random_plan(mlp([600, 600, 10]), 2)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for layer in plan.layers:
            weight = plan.product(layer).weight
            weight.mul_(torch.from_numpy(rng.random(tuple(weight.shape)) < share))
    own = part(plan, 0, samples)
    steps = [step for _, step in sparse_where_faster(own, samples).steps if isinstance(step, LinearStep)]
    assert [step.held.layout is torch.sparse_csr for step in steps] == [compact, False]
    inputs = rng.normal(size=(samples, 600)).astype(np.float32)
    with torch.no_grad():
        expected = plan.model(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(simulate(plan, inputs, batch_size=samples).outputs, expected, atol=1e-5)


def test_ids_that_every_worker_reads_count_whole() -> None:
    model, plan = built("transformer")
    assert plan.splits[INPUT].layout is None
    tokens = int(np.prod(model.input_shape))
    embedded = [len(plan.splits[plan.graph.steps[0].name].held(worker)) for worker in range(plan.n_workers)]
    for memory, size in zip(plan.memory(3), embedded, strict=True):
        assert memory.activations >= 3 * (8 * tokens + 4 * tokens * size)


def test_compressed_rows_are_for_what_pytorch_multiplies_in_them() -> None:
    weight = torch.zeros(600, 600)
    assert is_faster_sparse(weight, 300)
    assert not is_faster_sparse(weight.half(), 300)
    assert not is_faster_sparse(weight.bfloat16(), 300)


class OnlyMeta(TorchDispatchMode):
    """Fails at an operation that meets a tensor of the processor."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", SAVED)
def test_a_part_makes_every_tensor_on_its_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on PyTorch's device without memory, where no number can be looked at."""
    monkeypatch.setattr(Wire, "is_finite", lambda *_: True)
    model, plan = built(name)
    output = plan.splits[plan.graph.steps[-1].name]
    inputs = checked_inputs("inputs", inputs_of(model, 4), plan.graph, plan.input_shape)
    for worker in range(plan.n_workers):
        value = reader_of(plan.graph, plan.splits[INPUT], worker, "float32").read(inputs, slice(None)).to("meta")
        torch.set_default_device("meta")
        try:
            own = part(plan, worker, 4, "int8")
            with torch.no_grad(), OnlyMeta():
                answer = own.run(value, 4, lambda *_: lambda: None)
        finally:
            torch.set_default_device(None)
        assert answer.device.type == "meta"
        assert answer.shape == (len(output.held(worker)), 4, *output.positions)
