"""The experiment `networks` on digits of 16 pixels that are made up: its tasks, its own baselines, its runner."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from repurpose_opt.demo.digits import Digits
from repurpose_opt.errors import NoSolution
from repurpose_opt.network.baselines import Cost
from repurpose_opt.network.finetune import FineTuning
from repurpose_opt.network.repurpose import repurpose
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks import networks, networks_report, networks_rows, networks_tasks
from repurpose_opt_benchmarks import networks_peers as peers
from repurpose_opt_benchmarks.networks_tasks import OUTPUT_OWNER, QUICK, Setting, Task, make, ours

PIXELS, IMAGES = 16, 2000
WIDTHS = {"sensors": (6 * PIXELS, 12, 12, 12, 10), "sum": (2 * PIXELS, 12, 8, 19), "strips": (PIXELS, 12, 8, 10)}
REPORT: dict[str, Any] = {"seeds": [0], "data": "made up", "bars": [], "command": "command"}
REPORT["environment"] = {"uncommitted_changes": False, "commit": None}
REPORT["environment"] |= dict.fromkeys(("cores", "system", "machine", "python", "numpy", "scipy", "torch"), "1")
SOLVERS = dict.fromkeys(("values", "codes"), ("munkres", "threshold"))
TUNINGS = tuple(FineTuning(20, 64, rate) for rate in (1e-3, 1e-2, 3e-2))


@pytest.fixture(scope="module", autouse=True)
def quick_partitioner() -> Iterator[None]:
    """Mt-KaHyPar takes seconds however small the network is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "PARTITIONER", "alternate")
        yield


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A pattern for each class, and noise; no two images are the same."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, PIXELS, generator=generator)
    labels = torch.arange(IMAGES) % 10
    images = patterns[labels] + 0.1 * torch.rand(IMAGES, PIXELS, generator=generator)
    half = IMAGES // 2
    return Digits(images[:half], labels[:half], images[half:], labels[half:], "made up")


def setting(name: str) -> Setting:
    (quick,) = QUICK[name]
    return replace(
        quick,
        widths=WIDTHS[name],
        training=FineTuning(150, 64, 1e-2),
        choices=TUNINGS,
        solvers=SOLVERS,
        placing_seconds=None,
    )


@pytest.fixture(scope="module")
def strips(digits: Digits) -> Task:
    return make(setting("strips"), digits, seed=1)


# Tasks


@pytest.mark.parametrize("name", list(WIDTHS))
def test_every_worker_holds_its_own_sensor(name: str, digits: Digits) -> None:
    task = make(setting(name), digits, seed=0)
    n, P = task.setting.widths[0], task.setting.n_workers
    assert np.bincount(task.placement.input_owner).tolist() == [n // P] * P
    inputs, labels = next(task.batches())
    assert inputs.shape == (128, n)
    assert 0 <= labels.min() <= labels.max() < task.setting.widths[-1]


def test_the_label_of_a_sum_is_the_sum(digits: Digits) -> None:
    task = make(setting("sum"), digits, seed=0)
    labels = {
        tuple(image.tolist()): int(label) for image, label in zip(digits.test_images, digits.test_labels, strict=True)
    }
    left, right = task.test.images.split(PIXELS, dim=1)
    for first, second, total in zip(left, right, task.test.labels, strict=True):
        assert labels[tuple(first.tolist())] + labels[tuple(second.tolist())] == total


def test_images_that_train_calibrate_choose_and_judge_are_apart(strips: Task) -> None:
    parts = (strips.training_images, strips.calibration, strips.validation.images, strips.test.images)
    seen = [{tuple(image.tolist()) for image in part} for part in parts]
    assert all(seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


# Baselines


def test_workers_of_a_student_know_nothing_of_each_other(strips: Task) -> None:
    model = strips.tuned(peers.student(strips), TUNINGS[1])
    first, relu, second, *_ = model
    inputs = strips.test.images[:20]
    for worker in range(strips.setting.n_workers):
        others = torch.from_numpy(strips.placement.input_owner != worker)
        hidden = [second(relu(first(each))).T for each in (inputs, inputs.masked_fill(others, 9.0))]
        own = torch.from_numpy(strips.direct.layers[1].owner == worker)
        assert own.sum() == 2
        assert torch.equal(hidden[0][own], hidden[1][own])
        assert not torch.equal(hidden[0][~own], hidden[1][~own])


def test_a_student_sends_its_logits_or_its_values_if_fewer(strips: Task, digits: Digits) -> None:
    # 8 hidden neurons on four workers: two values from each of three of them, fewer than ten logits.
    assert peers.student_cost(strips, peers.student(strips)).values_per_sample == 3 * 2
    wide = make(replace(setting("strips"), widths=(PIXELS, 12, 60, 10)), digits, seed=1)
    assert peers.student_cost(wide, peers.student(wide)).values_per_sample == 3 * 10


def test_the_proximal_step_minimises_what_it_should(strips: Task) -> None:
    """½‖v − u‖² + a‖v‖ for every group of values that are sent; what is held stays."""
    model = copy.deepcopy(strips.model)
    groups = peers.groups_of(strips, model)
    before = groups[0].linear.weight.clone()
    with torch.no_grad():
        peers.shrink(groups, 0.5)
    after, layer = groups[0].linear.weight, strips.direct.layers[0]
    generator = torch.Generator().manual_seed(0)
    for worker in range(strips.setting.n_workers):
        rows = layer.owner == worker
        for column, holder in enumerate(layer.input_owner):
            old, new = before[rows, column], after[rows, column]
            if holder == worker:
                assert torch.equal(old, new)
                continue

            def value(v: torch.Tensor, old: torch.Tensor = old) -> float:
                return float(0.5 * (v - old).square().sum() + 0.5 * v.norm())

            for _ in range(20):
                assert value(new) <= value(new + 0.05 * torch.randn(len(new), generator=generator)) + 1e-6


def test_group_lasso_sends_no_more_than_it_may(strips: Task) -> None:
    for numbers in (0, 3, 11):
        model = peers.group_lasso(strips, numbers, TUNINGS[0], 0.1)
        sent = set()
        for index, (linear, layer) in enumerate(zip(peers.linears(model), strips.direct.layers, strict=True)):
            read = ((j, int(layer.owner[i])) for i, j in linear.weight.nonzero().tolist())
            sent |= {(index, j, worker) for j, worker in read if worker != layer.input_owner[j]}
        assert len(sent) == numbers == peers.cost_as_it_stands(strips, model).values_per_sample


def test_the_strongest_groups_are_kept(strips: Task) -> None:
    model = copy.deepcopy(strips.model)
    groups = peers.groups_of(strips, model)
    norms = np.concatenate([group.norms().numpy().ravel() for group in groups])
    peers.keep_strongest(groups, 5)
    left = np.concatenate([group.norms().numpy().ravel() for group in groups])
    assert set(np.flatnonzero(left)) == set(np.argsort(-norms)[:5])


def test_a_placed_sparse_network_sends_what_its_weights_read(strips: Task) -> None:
    """Counted from the owners and the weights, layer by layer; as many weights as ours has."""
    plan = ours(strips, 0.1, "values")
    pruned = peers.sparse(strips, plan)
    model = pruned.model
    assert peers.kept_weights(pruned) == peers.kept_weights(plan)
    solution = peers.placed(strips, model)
    cost = peers.placed_cost(strips, model)
    P, holder, numbers, macs, dense = strips.setting.n_workers, strips.placement.input_owner, 0, np.zeros(4), 0
    for linear, owner in zip(peers.linears(model), solution.owners, strict=True):
        reads = linear.weight.numpy() != 0
        for worker in range(P):
            own = owner == worker
            received = reads[own].any(axis=0) & (holder != worker)
            numbers += int(received.sum())
            macs[worker] += own.sum() * (received.sum() + (holder == worker).sum())
        dense += reads.size
        holder = owner
    assert (cost.values_per_sample, cost.bytes_per_sample) == (numbers, 4 * numbers)
    assert cost.busiest_macs == pytest.approx(macs.max() * P / dense)
    assert (solution.owners[-1] == OUTPUT_OWNER).all()


# The runner


def tiny(name: str, **budgets: tuple[float, ...]) -> tuple[Setting, ...]:
    budgets = budgets or {"values": (0.2,), "codes": (0.1,)}
    return (replace(setting(name), budgets=budgets),)


def run(folder: Path, digits: Digits, seeds: int = 2) -> list[dict]:
    log = networks.Log(folder / "rows.jsonl")
    return networks.measure(tiny("strips"), lambda setting: digits, seeds, 1, log)


@pytest.fixture(scope="module")
def rows(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(tmp_path_factory.mktemp("rows"), digits)


def test_every_row_is_there_within_its_budget(rows: list[dict]) -> None:
    assert {row["row"] for row in rows} == set(networks_rows.ROWS)
    assert len(rows) == 2 * len({networks_report.key_of(row) for row in rows})
    for row in rows:
        if row["row"] in ("ours", "group lasso", "late fusion, filled"):
            assert row["volume_fraction"] <= row["budget"]


def test_the_first_seed_chooses_on_validation_images_for_all(rows: list[dict]) -> None:
    for _, (first, second) in networks_report.grouped(rows).items():
        if first["after"] is None:
            assert first["tried"] == second["tried"] == []
            continue
        accuracies = [tried["accuracy"] for tried in first["tried"]]
        assert len(accuracies) == len(TUNINGS) + 2 * (first["row"] == "group lasso")
        assert accuracies[first["chosen"]] == max(accuracies)
        assert second["chosen"] == first["chosen"]
        settings = ("learning_rate", "distillation", "penalty")
        (tried,) = second["tried"]
        assert [tried.get(s) for s in settings] == [first["tried"][first["chosen"]].get(s) for s in settings]


def test_rounds_share_the_steps(strips: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def alternate(*arguments: Any, **options: Any) -> Plan:
        asked.update(options)
        return repurpose(*arguments, **options)

    monkeypatch.setattr(networks_tasks, "repurpose", alternate)
    (cell,) = (
        c
        for c in networks_rows.cells(tiny("strips")[0], "made up", 1, 3)
        if c.row == "ours, 3 rounds" and c.messages == "codes"
    )
    found = networks_rows.contender(strips, cell)
    model, cost = found.train(found.choices[1])
    assert 0 < cost.volume_fraction <= cell.budget
    assert asked["rounds"] == 3
    assert asked["finetune"] == TUNINGS[1]
    inputs, labels = asked["data"]
    assert len(inputs) == len(labels) == strips.setting.round_samples
    assert strips.validation.accuracy(model) > 0.2


def test_a_run_that_was_killed_goes_on(
    rows: list[dict], digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    measured: list[networks_rows.Cell] = []
    figures = networks.figures

    def counted(task: Task, cell: networks_rows.Cell, chosen: int | None) -> dict:
        measured.append(cell)
        return figures(task, cell, chosen)

    monkeypatch.setattr(networks, "figures", counted)
    again = run(tmp_path, digits)
    assert [asdict(cell) for cell in measured] == [{k: row[k] for k in asdict(measured[0])} for row in rows[-2:]]
    timed = ("seconds", "training_seconds")
    assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows
    ]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_the_command_writes_table_and_plots(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = tuple(
        replace(
            each, widths=(PIXELS, 4 * 2**k, 4, 10), training=TUNINGS[0], solvers=SOLVERS, budgets={"values": (1.0,)}
        )
        for k, each in enumerate(QUICK["widths"][:2])
    )
    monkeypatch.setattr(networks, "QUICK", {"sum": tiny("sum", codes=(1.0,)), "widths": widths})
    monkeypatch.setattr(networks, "load_digits", lambda directory: digits)
    arguments = ["--quick", "--task", "sum,widths", "--output", str(tmp_path)]
    assert networks.main(arguments) == 0
    text = (tmp_path / "networks-quick.md").read_text()
    assert "| **ours** | codes | 100.00% |" in text
    assert "- sum, ours, codes, 100.00%: " in text
    assert len(json.loads((tmp_path / "networks-quick.json").read_text())["summary"]) > 15
    for family in ("sum", "widths"):
        assert (tmp_path / f"networks-quick-{family}.png").stat().st_size > 1000
    capsys.readouterr()
    assert networks.main(arguments) == 0
    assert "trained in" not in capsys.readouterr().out


def test_what_has_no_plan_is_a_row(strips: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(task: Task, model: nn.Module) -> Cost:
        raise NoSolution("no place")

    monkeypatch.setattr(peers, "placed_cost", none)
    cell = networks_rows.Cell("strips", "made up", 1, "sparse, placed", "values", 0.2)
    row = networks.measured(strips, cell, networks.Log(None))
    assert (row["error"], row["numbers"], row["after"]) == ("no place", None, None)
    (found,) = networks_report.summary([row])
    assert found["numbers"] is None
    assert "| sparse, placed | values | 20.00% | – | – | – | – | – | – |" in networks_report.markdown(
        REPORT | {"settings": [networks.described(strips.setting)]}, [row], "about"
    )


def test_wrong_options_end_it() -> None:
    for arguments in (["--task", "sun"], ["--seeds", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            networks.main(arguments)


# The report, from rows that are made up


def made_up(task: str, row: str, seed: int, after: float | None, **figures: object) -> dict:
    usual = {"messages": None, "budget": None, "before": after, "numbers": 1, "volume_fraction": 0.01}
    usual |= dict.fromkeys(("busiest_macs", "seconds", "training_seconds"), 1.0)
    return {"task": task, "row": row, "seed": seed, "after": after} | usual | figures


def test_ours_must_be_above_by_more_than_the_spread_of_the_differences() -> None:
    ours = [made_up("sum", "ours", s, a, messages="codes", budget=0.01) for s, a in enumerate((0.97, 0.98, 0.99))]
    good = [made_up("sum", "student", s, a) for s, a in enumerate((0.95, 0.97, 0.975))]  # +2.0, +1.0, +1.5
    (line,) = networks_report.comparisons(ours + good)
    assert line == "- sum, ours, codes, 1.00%: yes. Points above: student +1.50 ± 0.50"
    close = [made_up("sum", "group lasso", s, a, budget=0.01) for s, a in enumerate((0.96, 0.99, 0.98))]  # 1, −1, 1
    (line,) = networks_report.comparisons(ours + good + close)
    assert line.startswith("- sum, ours, codes, 1.00%: no (group lasso). Points above: group lasso +0.33 ± 1.15, ")
    apart = [
        made_up("sum", "sparse", 0, 1.0, volume_fraction=0.9),
        made_up("sum", "group lasso", 0, 1.0, budget=0.05),
        made_up("strips", "student", 0, 1.0),
        made_up("sum", "dense", 0, 1.0, volume_fraction=0.0),
        made_up("sum", "central", 0, None),
    ]
    (line,) = networks_report.comparisons(ours + good + apart)
    assert ": yes." in line


def test_bars_are_against_the_better_dense() -> None:
    rows = [made_up("sum", "dense", seed, 0.97, before=0.98 + 0.01 * seed) for seed in (0, 1)]
    rows += [made_up("sum", "ours", seed, 0.976, messages="codes", budget=0.02) for seed in (0, 1)]
    (found,) = networks_report.bars(rows)
    assert found["measured"] == pytest.approx(0.9)
    assert found["reached"]
