"""Cases that come twice in a test set: once to tune on, once to judge."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from repurpose_opt.bench.testset import Instance
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem

Built = tuple[LayerProblem, Formulation]


@dataclass(frozen=True)
class Case:
    """One way to make an instance; `build` takes all that is random from the generator."""

    name: str
    kind: str
    build: Callable[[np.random.Generator], Built]
    layer: str = ""
    """Cases of the same layer draw the same numbers; each case has its own by default."""


def pairs(testset: str, cases: Sequence[Case]) -> Iterator[Instance]:
    """Each case with other numbers twice: NAME-0, and NAME-1, which is judged once.

    Seeds are of the names, so that a case stays the same whatever is added to the list.
    """
    for case in cases:
        for which in (0, 1):
            seed = [zlib.crc32(f"{testset} {case.layer or case.name}".encode()), which]
            yield Instance(f"{case.name}-{which}", partial(_built, case, seed), case.kind, judge_once=which == 1)


def _built(case: Case, seed: list[int]) -> Built:
    return case.build(np.random.default_rng(seed))
