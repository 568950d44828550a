"""What a test set is: named instances, each a problem and a formulation that are built when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem


@dataclass(frozen=True, eq=False)
class Instance:
    """One thing to solve; `name` is unique within its test set, `kind` a class that means are taken over."""

    name: str
    build: Callable[[], tuple[LayerProblem, Formulation]]
    """Makes the same problem and formulation every time, on every machine."""
    kind: str = ""
    judge_once: bool = False
    """Kept for the final comparison: nothing is tuned on it."""

    @cached_property
    def _built(self) -> tuple[LayerProblem, Formulation]:
        return self.build()

    @property
    def problem(self) -> LayerProblem:
        return self._built[0]

    @property
    def formulation(self) -> Formulation:
        return self._built[1]


@dataclass(frozen=True)
class Settings:
    """How the instances of a test set are solved unless the command line says otherwise."""

    time_limit: float = 1.0
    """Seconds a solve."""
    seeds: int = 3
    """0 … seeds − 1."""
    memory_limit: int = 4 * 2**30
    """Bytes a solve."""
    relative_gap: float = 1e-6
    """Relative difference of objective and bound that counts as a proof."""

    def __post_init__(self) -> None:
        for name in ("time_limit", "seeds", "memory_limit"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(name, getattr(self, name), "a number > 0")
        if not 0 <= self.relative_gap < 1:
            raise InvalidArgument("relative_gap", self.relative_gap, "a number in [0, 1)")


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
    settings: Settings
    """A class that does not inherit from TestSet must have its own."""

    def __len__(self) -> int:
        """How many instances there are."""
        ...

    def __iter__(self) -> Iterator[Instance]:
        """All instances, without building them: `Instance.problem` does."""
        ...
