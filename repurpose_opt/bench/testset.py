"""What a test set is: named instances, each a problem and a formulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from repurpose_opt import registry
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem


class Instance(NamedTuple):
    """One thing to solve; `name` is unique within its test set, `kind` a class that means are taken over."""

    name: str
    problem: LayerProblem
    formulation: Formulation
    kind: str = ""
    judge_once: bool = False
    """Kept for the final comparison: nothing is tuned on it."""


class TestSet(Protocol):
    """Instances to solve, the same on every iteration and every machine: generate them from fixed seeds.

    Register the class by an entry point in the group `repurpose_opt.testsets`; it is created without arguments.
    """

    name: str
    title: str
    """One line for tables and reports."""
    description: str
    """What the instances are, and what they are good for."""
    requires: tuple[str, ...]
    """Importable packages that its data come from."""

    def __len__(self) -> int:
        """How many instances there are, without building them."""
        ...

    def __iter__(self) -> Iterator[Instance]:
        """Builds one instance after the other."""
        ...


def load_all() -> list[tuple[TestSet, str | None]]:
    """Every registered test set by name, and the command that installs what its data come from if that is missing."""
    return [(registry.load_class("testsets", found.name)(), found.install) for found in registry.registered("testsets")]
