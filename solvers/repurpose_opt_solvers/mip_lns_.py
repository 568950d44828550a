"""`mip-lns`: neighbourhoods of neurons are freed and placed exactly by CP-SAT, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt_solvers import mip_search
from repurpose_opt_solvers.mip_ import MixedInteger, costs_of
from repurpose_opt_solvers.mip_search import Found


class MipLns(MixedInteger):
    """Large neighbourhood search by CP-SAT from a given start (else from `alternate`). Never worse than its start."""

    name = "mip-lns"
    needs_whole_model = False
    betters_a_start = True

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        found = costs_of(problem, formulation)
        if isinstance(found, str):
            return found
        hypergraph, budget = found
        if budget is not None:
            return "a budget couples what is free with what is not; use a transfer_price, or 'mip'"
        if hypergraph.communication == "busiest":
            return "the busiest worker depends on what is not free; use 'mip'"
        return None

    def search(self) -> tuple[Callable[..., Iterator[Found]], tuple[str, ...]]:
        return mip_search.by_neighbourhoods, ()
