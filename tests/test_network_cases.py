"""Models that are read, placed, run and resumed wrongly if one of several easy mistakes is made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from repurpose_opt.errors import InvalidArgument, NoSolution, UnsupportedModule
from repurpose_opt.formulation import Volume
from repurpose_opt.network import baselines
from repurpose_opt.network.finetune import FineTuning, batches_of, fine_tune
from repurpose_opt.network.owners import placement_of
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.network.trace import trace
from repurpose_opt.runtime.plan import Plan
from repurpose_opt.runtime.simulate import simulate

P = 3


class Model(nn.Module):
    """Parts by name, and a function of them and the input."""

    def __init__(self, compute: Callable[[Any, torch.Tensor], torch.Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.compute(self, x)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


def direct(model: nn.Module, example: torch.Tensor, output_owner: Any = 0) -> Plan:
    network = trace(model, example)
    return baselines.direct_plan(network, placement_of(network, P, None, output_owner, None, None))


def check_direct(model: nn.Module, inputs: torch.Tensor, output_owner: Any = 0) -> Plan:
    """The direct plan computes what the model does, here and on workers, and the answer is where it is wanted."""
    plan = direct(model, inputs[:1], output_owner)
    with torch.no_grad():
        expected = model.eval()(inputs.clone())
        torch.testing.assert_close(plan.model(inputs.clone()), expected, rtol=1e-4, atol=1e-5)
    run = simulate(plan, inputs.numpy().copy())
    np.testing.assert_allclose(run.outputs, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert run.bytes_sent.sum() == plan.volume * len(inputs)
    assert np.isin(plan.splits[plan.graph.steps[-1].name].places, output_owner).all()
    return plan


# 1


@pytest.mark.parametrize("first", [True, False])
def test_an_answer_out_of_an_embedding_is_where_it_is_wanted(first: bool) -> None:
    def compute(model: Any, x: torch.Tensor) -> torch.Tensor:
        one = model.direct(x).mean(1) if first else model.a(model.e(x).mean(1))
        return one + (model.a(model.e(x).mean(1)) if first else model.direct(x).mean(1))

    model = Model(compute, e=nn.Embedding(11, 8), direct=nn.Embedding(11, 4), a=nn.Linear(8, 4))
    check_direct(model, ids(7, 5), output_owner=2)
    check_direct(model, ids(7, 5), output_owner=(0, 2))


# 2


def test_what_works_in_place_changes_nobody_elses_tensors() -> None:
    inputs = numbers(64, 6)
    before = inputs.clone()
    model = nn.Sequential(nn.SELU(inplace=True), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    plan = check_direct(model, inputs)
    pruned = repurpose(model, inputs[:1], P, data=inputs, formulation=Volume(budget=0.8))
    assert torch.equal(inputs, before)
    np.testing.assert_allclose(
        simulate(pruned, inputs.numpy()).outputs, pruned.model(inputs).numpy(), rtol=1e-4, atol=1e-5
    )
    assert plan.volume > 0


def test_a_tensor_that_is_changed_before_others_read_it_is_refused_rather_than_run_differently() -> None:
    def compute(model: Any, x: torch.Tensor) -> torch.Tensor:
        y = model.a(x)
        z = model.selu(y)
        return model.b(z + y)

    model = Model(compute, a=nn.Linear(6, 8), selu=nn.SELU(inplace=True), b=nn.Linear(8, 4))
    with pytest.raises(UnsupportedModule):
        trace(model, numbers(1, 6))


def test_an_activation_in_place_is_still_split() -> None:
    model = Model(
        lambda model, x: model.b(functional.leaky_relu(model.a(x), 0.1, inplace=True)),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 4),
    )
    check_direct(model, numbers(7, 6))
    assert not trace(model, numbers(1, 6)).central


# 3


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_a_hook_that_changes_values_is_refused(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    if kind == "forward":
        model[0].register_forward_hook(lambda module, given, output: output * 3)
    else:
        model[0].register_forward_pre_hook(lambda module, given: (given[0] * 3,))
    with pytest.raises(UnsupportedModule):
        trace(model, numbers(1, 6))


def test_a_hook_that_only_looks_on_is_left_out() -> None:
    seen = []
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].register_forward_hook(lambda module, given, output: seen.append(len(output)))
    network = trace(model, numbers(1, 6))
    seen.clear()
    network.graph(numbers(5, 6))
    assert seen == []


# 4


def scaled(factor: float | torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    return Model(lambda model, x: model.b(model.a(x * factor).relu()), a=nn.Linear(6, 8), b=nn.Linear(8, 4))


def attending(heads: int) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, heads, 16, batch_first=True)
    return Model(lambda model, x: model.b(model.a(x).mean(1)), a=layer, b=nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "others", "shape"),
    [
        (scaled, (1.0, 5.0), (6,)),
        (scaled, (torch.ones(6), torch.full((6,), 5.0)), (6,)),
        (attending, (2, 4), (5, 8)),
    ],
    ids=["factor", "constant of a function", "heads"],
)
def test_a_folder_of_another_model_of_the_same_weights_is_refused(
    make: Callable[[Any], nn.Module], others: tuple[Any, Any], shape: tuple[int, ...], tmp_path: Path
) -> None:
    inputs = numbers(64, *shape)

    def run(value: Any) -> Plan:
        settings: dict[str, Any] = {"data": inputs, "formulation": Volume(budget=0.9), "checkpoint_dir": tmp_path}
        return repurpose(make(value), inputs[:1], P, **settings)

    first = run(others[0])
    torch.testing.assert_close(run(others[0]).model(inputs), first.model(inputs), rtol=0, atol=0)
    with pytest.raises(InvalidArgument, match="folder of another run"):
        run(others[1])


def test_a_folder_of_other_labels_is_refused(tmp_path: Path) -> None:
    inputs, labels = numbers(64, 6), torch.arange(64) % 4
    settings: dict[str, Any] = {"finetune": FineTuning(steps=5, batch_size=32), "checkpoint_dir": tmp_path}
    repurpose(scaled(1.0), inputs[:1], P, data=(inputs, labels), **settings)
    with pytest.raises(InvalidArgument, match="folder of another run"):
        repurpose(scaled(1.0), inputs[:1], P, data=(inputs, (labels + 1) % 4), **settings)


# 5


@pytest.mark.parametrize("budget", [0.1, 0.0])
def test_a_budget_below_what_norms_and_gatherings_send_is_an_error(budget: float) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(NoSolution, match="norms and gatherings alone send"):
        repurpose(model, numbers(1, 6), P, data=numbers(64, 6), formulation=Volume(budget=budget))


# 6


def test_neurons_of_the_answer_find_room_beside_others() -> None:
    model = Model(
        lambda model, x: model.c(model.a(x).relu()) + model.k(x),
        a=nn.Linear(6, 8),
        k=nn.Linear(6, 4),
        c=nn.Linear(8, 4),
    )
    check_direct(model, numbers(7, 6), output_owner=(0, 1))


def test_the_cost_of_one_worker_is_nothing() -> None:
    network = trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), numbers(1, 6))
    plan = baselines.direct_plan(network, placement_of(network, 1, None, 0, None, None))
    assert baselines.cost_of(plan).volume_fraction == 0
    assert baselines.central(plan, 0).volume_fraction == 0


# 7


@pytest.mark.parametrize(
    "begin",
    [
        lambda x: x.flatten(2),
        lambda x: torch.flatten(x, start_dim=2),
        lambda x: x.view(x.size(0), 3, -1),
        lambda x: x.reshape((x.shape[0], 3, 64)),
    ],
)
def test_flattening_the_positions_of_the_input_keeps_its_channels(begin: Callable[[Any], Any]) -> None:
    model = Model(lambda model, x: model.b(model.a(begin(x)).flatten(1)), a=nn.Conv1d(3, 8, 5, 4), b=nn.Linear(120, 4))
    plan = check_direct(model, numbers(7, 3, 8, 8))
    assert plan.input_owner is not None
    assert len(plan.input_owner) == 3


def test_any_other_reshaping_of_the_input_runs_on_one_worker() -> None:
    model = Model(
        lambda model, x: model.b(model.a(x.view(x.size(0), 6, -1)).flatten(1)),
        a=nn.Conv1d(6, 8, 5, 4),
        b=nn.Linear(56, 4),
    )
    check_direct(model, numbers(7, 3, 8, 8))


# 8


def with_statistics(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


def test_a_batch_norm_without_weights_after_a_linear_layer() -> None:
    norm = with_statistics(nn.BatchNorm1d(8, affine=False))
    check_direct(nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 4)), numbers(7, 6))


def test_a_batch_norm_is_not_folded_into_what_others_read_under_another_name() -> None:
    def compute(model: Any, x: torch.Tensor) -> torch.Tensor:
        y = model.conv(x)
        return (model.norm(y.contiguous()) + y).mean((2, 3))

    check_direct(Model(compute, conv=nn.Conv2d(3, 4, 3), norm=with_statistics(nn.BatchNorm2d(4))), numbers(7, 3, 8, 8))


@pytest.mark.parametrize(
    ("index", "columns"),
    [((slice(None), 0, None), 1), ((slice(None), torch.arange(7, -1, -1), None), 8)],
    ids=["one of them", "in another order"],
)
def test_an_index_with_a_new_axis_that_also_chooses(index: Any, columns: int) -> None:
    model = Model(lambda model, x: model.b(model.a(x)[index].flatten(1)), a=nn.Linear(6, 8), b=nn.Linear(columns, 4))
    check_direct(model, numbers(7, 6))


# 9


def test_zeros_of_what_is_not_pruned_are_trained() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.zeros(5, 8))
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
            with torch.no_grad():
                self.e.weight[3] = 0.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.e(x) + self.positions).relu().mean(1))

    torch.manual_seed(0)
    inputs = ids(64, 5)
    tuning = FineTuning(steps=5, batch_size=32)
    model = repurpose(
        Tokens(), inputs[:1], P, data=(inputs, inputs[:, 0] % 4), formulation=Volume(budget=0.3), finetune=tuning
    ).model
    pruned = (model.a.weight == 0).float().mean()
    assert pruned > 0
    assert (model.add.positions != 0).all()
    assert (model.e.weight[3] != 0).any()


def test_a_zero_within_a_kernel_is_trained_and_a_pruned_kernel_is_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad():
        model[0].weight[0, 0, 1, 1] = 0.0
        model[0].weight[1, 1] = 0.0
    batches = batches_of(numbers(64, 2, 6, 6), torch.arange(64) % 4, 32, 0)
    fine_tune(model, batches, FineTuning(steps=5, batch_size=32))
    assert model[0].weight[0, 0, 1, 1] != 0
    assert (model[0].weight[1, 1] == 0).all()


# 10


class Named(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.parts = nn.ModuleDict({name: nn.Linear(6, 2) for name in names})
        self.b = nn.Linear(2 * len(names), 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.cat([self.parts[name](x) for name in self.names], 1).relu())


@pytest.mark.parametrize(
    "names", [["1/2", "1_2"], [f"prediction_head_{i}" for i in range(20)]], ids=["a slash", "long when stacked"]
)
def test_names_that_no_file_has(names: list[str], tmp_path: Path) -> None:
    inputs = numbers(64, 6)
    plans = [
        repurpose(model, inputs[:1], P, data=inputs, formulation=Volume(budget=0.5), checkpoint_dir=tmp_path / "run")
        for model in [Named(names)]
        for _ in range(2)
    ]
    assert torch.equal(plans[0].model(inputs), plans[1].model(inputs))
    plans[0].save(tmp_path / "plan")
    assert torch.equal(Plan.load(tmp_path / "plan").model(inputs), plans[0].model(inputs))


# 11


def test_functions_whose_first_argument_has_its_name() -> None:
    model = Model(
        lambda model, x: model.b(torch.flatten(input=torch.mean(input=model.a(x), dim=(2, 3)), start_dim=1)),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Linear(8, 4),
    )
    check_direct(model, numbers(7, 3, 8, 8))
    assert not trace(model, numbers(1, 3, 8, 8)).central
    check_direct(
        Model(lambda model, x: model.b(torch.div(input=model.a(x), other=2.0)), a=nn.Linear(6, 8), b=nn.Linear(8, 4)),
        numbers(7, 6),
    )


def test_an_activation_without_a_name() -> None:
    activation = functools.partial(functional.leaky_relu, negative_slope=0.2)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    check_direct(Model(lambda model, x: model.b(model.a(x).mean(1)), a=layer, b=nn.Linear(8, 4)), numbers(7, 5, 8))


def test_the_weights_of_an_attention_cannot_be_read() -> None:
    def compute(model: Any, x: torch.Tensor) -> torch.Tensor:
        output, weights = model.a(x, x, x)
        return model.b(output.mean(1)) * weights.mean((1, 2))[:, None]

    model = Model(compute, a=nn.MultiheadAttention(8, 2, batch_first=True), b=nn.Linear(8, 4))
    with pytest.raises(UnsupportedModule, match="weights of an attention"):
        trace(model, numbers(1, 5, 8))


@pytest.mark.parametrize("begin", [lambda x: x + 1, lambda x: x[:, 1:]])
def test_token_ids_that_are_changed_first_are_refused(begin: Callable[[Any], Any]) -> None:
    model = Model(lambda model, x: model.a(model.e(begin(x)).mean(1)), e=nn.Embedding(12, 8), a=nn.Linear(8, 4))
    with pytest.raises(UnsupportedModule, match="token ids"):
        trace(model, ids(1, 5))


@pytest.mark.parametrize("data", [torch.full((20, 5), 11), torch.rand(20, 5), torch.full((20, 5), -1)])
def test_data_that_are_no_tokens_are_refused(data: torch.Tensor) -> None:
    model = Model(lambda model, x: model.a(model.e(x).mean(1)), e=nn.Embedding(11, 8), a=nn.Linear(8, 4))
    with pytest.raises(InvalidArgument, match="token ids"):
        repurpose(model, ids(1, 5), P, data=data)


def test_a_lazy_module_that_never_ran_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="lazy"):
        trace(nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4)), numbers(1, 6))


@pytest.mark.parametrize("how", ["mask", "hook", "parametrization"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_the_same_each_time_are_placed(how: str, kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(6, 8) if kind == "linear" else nn.Conv2d(3, 8, 3)
    if how == "mask":
        prune.l1_unstructured(layer, "weight", 0.3)
    elif how == "hook":
        layer = nn.utils.weight_norm(layer)
    else:
        layer = nn.utils.parametrizations.weight_norm(layer)
    inputs = numbers(7, 6) if kind == "linear" else numbers(7, 3, 4, 4)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(8 if kind == "linear" else 32, 4))
    model(inputs)
    check_direct(model, inputs)
    assert not trace(model, inputs[:1]).central


# 12


def test_central_says_why() -> None:
    model = Model(
        lambda model, x: model.f((model.b(model.a(x)).transpose(1, 2)).logsumexp(2)),
        a=nn.Linear(8, 8),
        b=nn.BatchNorm1d(5),
        f=nn.Linear(8, 4),
    )
    central = trace(model, numbers(1, 5, 8)).central
    assert "axis" in central["b"]
    assert "logsumexp" in central["logsumexp"]
    assert "CELU" in trace(nn.Sequential(nn.Linear(6, 8), nn.CELU(), nn.Linear(8, 4)), numbers(1, 6)).central["1"]


def test_an_argument_that_need_not_be_given_is_left_out() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            hidden = self.a(x).relu()
            return self.b(hidden if mask is None else hidden * mask)

    check_direct(Optional(), numbers(7, 6))


def test_squeezing_and_dropping_channels_stay_split() -> None:
    def compute(model: Any, x: torch.Tensor) -> torch.Tensor:
        return model.b(functional.adaptive_avg_pool2d(model.drop(model.a(x)), 1).squeeze())

    model = Model(compute, a=nn.Conv2d(3, 8, 3), drop=nn.Dropout2d(0.5), b=nn.Linear(8, 4)).eval()
    check_direct(model, numbers(7, 3, 8, 8))
    network = trace(model, numbers(1, 3, 8, 8))
    assert not network.central
    assert network.graph(numbers(1, 3, 8, 8)).shape == (1, 4)
