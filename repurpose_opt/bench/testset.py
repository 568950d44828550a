"""What a test set is: named instances, each a problem and a formulation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from repurpose_opt import registry
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem


class Instance(NamedTuple):
    """One thing to solve; `name` is unique within its test set."""

    name: str
    problem: LayerProblem
    formulation: Formulation


class TestSet(Protocol):
    """Instances to solve, the same on every iteration and every machine: generate them from fixed seeds.

    Register the class by an entry point in the group `repurpose_opt.testsets`; it is created without arguments.
    """

    name: str
    title: str
    """One line for tables and reports."""
    description: str
    """What the instances are, and what they are good for."""

    def __len__(self) -> int:
        """How many instances there are, without building them."""
        ...

    def __iter__(self) -> Iterator[Instance]:
        """Builds one instance after the other."""
        ...


def load_all() -> list[TestSet]:
    """Every registered test set, by name. Raises SolverNotInstalled where one lacks a package."""
    return [registry.load("testsets", name)() for name in registry.names("testsets")]
