"""The rows of the experiment `networks`: what is measured for a seed, and how each way is made and trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import nn

from repurpose_opt.network import baselines
from repurpose_opt.network.baselines import Cost, cost_of
from repurpose_opt.network.finetune import FineTuning
from repurpose_opt.runtime.plan import Plan
from repurpose_opt_benchmarks import networks_peers as peers
from repurpose_opt_benchmarks.networks_tasks import OUTPUT_OWNER, Setting, Task, ours

PENALTIES = (0.5, 1.0, 2.0)
"""Of group lasso, the usual one in the middle."""


@dataclass(frozen=True)
class Cell:
    """What is measured: the key of a row."""

    task: str
    data: str
    seed: int
    row: str
    messages: str | None = None
    budget: float | None = None
    """Fraction of direct; None where the row has none."""


@dataclass(frozen=True)
class Choice:
    """How a row is trained."""

    settings: FineTuning
    penalty: float | None = None
    """Of group lasso."""

    def named(self) -> dict[str, Any]:
        named = {"learning_rate": self.settings.learning_rate, "distillation": self.settings.distillation}
        return named if self.penalty is None else named | {"penalty": self.penalty}


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to run a network: what it costs and is before training, where it is anything, and how it is trained."""

    cost: Cost | None
    """None: only the trained model says."""
    before: nn.Module | None
    choices: tuple[Choice, ...] = ()
    """None where it is not trained."""
    train: Callable[[Choice], tuple[nn.Module, Cost]] | None = None


# One function a row: (task, cell) → contender


def dense(task: Task, cell: Cell) -> Contender:
    return _tuned(task, task.model, Cost(0, 0, 0.0, 0, 0, float(task.setting.n_workers)))


def naive(task: Task, cell: Cell) -> Contender:
    return Contender(baselines.naive(task.direct), task.model)


def central(task: Task, cell: Cell) -> Contender:
    return Contender(baselines.central(task.direct, OUTPUT_OWNER), task.model)


def direct(task: Task, cell: Cell) -> Contender:
    return Contender(cost_of(task.direct), task.model)


def partial_sums(task: Task, cell: Cell) -> Contender:
    return Contender(baselines.partial_sums(task.direct), task.model)


def late_fusion(task: Task, cell: Cell) -> Contender:
    plan = baselines.late_fusion_plan(task.network, task.placement)
    return _tuned(task, plan.model, cost_of(plan))


def late_fusion_filled(task: Task, cell: Cell) -> Contender:
    plan = peers.filled_late_fusion(task, task.numbers(_budget(cell)))
    return _tuned(task, plan.model, cost_of(plan))


def student(task: Task, cell: Cell) -> Contender:
    model = peers.student(task)
    return replace(_tuned(task, model, peers.student_cost(task, model)), before=None)


def student_long(task: Task, cell: Cell) -> Contender:
    """As many steps as the dense network and the fine-tuning of the other rows together."""
    model = peers.student(task)
    cost = peers.student_cost(task, model)
    extra = task.setting.training.steps

    def train(choice: Choice) -> tuple[nn.Module, Cost]:
        return task.tuned(model, replace(choice.settings, steps=choice.settings.steps + extra)), cost

    return Contender(cost, None, _choices(task), train)


def group_lasso(task: Task, cell: Cell) -> Contender:
    """All choices at the usual penalty, and one of them at the other penalties, too."""
    numbers, (low, usual, high) = task.numbers(_budget(cell)), PENALTIES
    settings = task.setting.choices
    middle = settings[len(settings) // 3]
    choices = [Choice(each, usual) for each in settings] + [Choice(middle, penalty) for penalty in (low, high)]

    def train(choice: Choice) -> tuple[nn.Module, Cost]:
        assert choice.penalty is not None
        model = peers.group_lasso(task, numbers, choice.settings, choice.penalty)
        return model, peers.cost_as_it_stands(task, model)

    return Contender(None, None, tuple(choices), train)


def one_shot(task: Task, cell: Cell) -> Contender:
    plan = our_plan(task, _budget(cell), _messages(cell))
    return _tuned(task, plan.model, cost_of(plan))


def alternating(task: Task, cell: Cell) -> Contender:
    """In rounds; all of their fine-tuning takes as many steps as that of the other rows."""
    rounds = int(cell.row.split()[1])

    def train(choice: Choice) -> tuple[nn.Module, Cost]:
        plan = ours(task, _budget(cell), _messages(cell), rounds, choice.settings)
        return plan.model, cost_of(plan)

    return Contender(None, None, _choices(task), train)


def sparse(task: Task, cell: Cell) -> Contender:
    plan = peers.sparse(task, our_plan(task, _budget(cell), _messages(cell)))
    return _tuned(task, plan.model, cost_of(plan))


def sparse_placed(task: Task, cell: Cell) -> Contender:
    """Cost only: what it computes is what `sparse` computes."""
    plan = peers.sparse(task, our_plan(task, _budget(cell), _messages(cell)))
    return Contender(peers.placed_cost(task, plan.model), plan.model)


ROWS: dict[str, Callable[[Task, Cell], Contender]] = {
    "dense": dense,
    "naive": naive,
    "central": central,
    "direct": direct,
    "partial sums": partial_sums,
    "late fusion": late_fusion,
    "student": student,
    "student, trained as long as dense": student_long,
    "ours": one_shot,
    "sparse": sparse,
    "sparse, placed": sparse_placed,
    "late fusion, filled": late_fusion_filled,
    "group lasso": group_lasso,
}
WITHOUT_BUDGET = tuple(ROWS)[: tuple(ROWS).index("ours")]


@lru_cache(maxsize=1)
def our_plan(task: Task, budget: float, messages: str) -> Plan:
    """Of one shot; the sparse rows that follow ours want the same one."""
    return ours(task, budget, messages)


def _tuned(task: Task, model: nn.Module, cost: Cost) -> Contender:
    """A model that is fine-tuned as it is."""
    return Contender(cost, model, _choices(task), lambda choice: (task.tuned(model, choice.settings), cost))


def _choices(task: Task) -> tuple[Choice, ...]:
    return tuple(map(Choice, task.setting.choices))


def _budget(cell: Cell) -> float:
    assert cell.budget is not None
    return cell.budget


def _messages(cell: Cell) -> str:
    assert cell.messages is not None
    return cell.messages


def cells(setting: Setting, data: str, seed: int, rounds: int) -> Iterator[Cell]:
    """Everything that is measured for one seed of a task, in order."""

    def cell(row: str, messages: str | None = None, budget: float | None = None) -> Cell:
        return Cell(setting.name, data, seed, row, messages, budget)

    if not setting.choices:
        yield cell("dense")
        for messages, budgets in setting.budgets.items():
            yield from (cell("ours", messages, budget) for budget in budgets)
        return
    yield from map(cell, WITHOUT_BUDGET)
    is_first = True
    for messages, budgets in setting.budgets.items():
        for budget in budgets:
            yield cell("ours", messages, budget)
            if rounds > 1:
                yield cell(f"ours, {rounds} rounds", messages, budget)
        if is_first:  # what a sparse network sends has next to nothing to do with messages and budgets
            yield cell("sparse", messages, budgets[-1])
            yield cell("sparse, placed", messages, budgets[-1])
            is_first = False
    for budget in sorted({budget for budgets in setting.budgets.values() for budget in budgets}):
        yield cell("late fusion, filled", budget=budget)
        yield cell("group lasso", budget=budget)


def contender(task: Task, cell: Cell) -> Contender:
    return ROWS[cell.row](task, cell) if cell.row in ROWS else alternating(task, cell)
