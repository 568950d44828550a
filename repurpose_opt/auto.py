"""What "auto" stands for: a chain of partitioners, by formulation, size, time limit and what is installed.

| problem | chain |
|---|---|
| `Volume` | compensated |
| `Edge`, or any other with an exact assignment cost | flow (munkres without OR-Tools); unequal loads: generalised |
| `Lossless`, or any other hypergraph that keeps all | metis, alternate, local-search, mip: see `_nets_chain` |
| any other | alternate |

benchmarks/results/placement.md has what the third row is worth.
"""

from __future__ import annotations

from repurpose_opt import registry
from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem

_METIS_PINS_PER_SECOND = 10_000
"""METIS gets a tenth of the time limit; it partitions about a hundred thousand nonzeros a second."""
_LEAST_SECONDS_FOR_METIS = 5.0
"""Under a shorter limit its tenth is over before its process has started."""
_MOST_PINS_UNLIMITED = 1_000_000
_MOST_NEURONS_PROVED = 128
"""Above, integer programming proves nothing in a minute, and annealing finds more than it."""


def auto_partitioner(problem: LayerProblem, formulation: Formulation, time_limit: float | None = None) -> str:
    """The chain for a problem; `NAME@SHARE` limits a stage to that share of the time that is left."""
    if formulation.selection.name == "volume":
        return "compensated"
    if formulation.assignment_is_exact:
        if not problem.has_equal_loads:
            return "generalised"
        return "flow" if registry.is_installed("partitioners", "flow") else "munkres"
    hypergraph = formulation.hypergraph(problem)
    if hypergraph is None or not hypergraph.keeps_all:
        return "alternate"
    return _nets_chain(problem, formulation, hypergraph.pins.nnz, time_limit)


def auto_pruner(problem: LayerProblem, formulation: Formulation) -> str:
    """group-omp+swaps+tabu for Volume, unless `select` is exact already; else threshold.

    group-omp alone where the busiest worker counts; code-greedy+code-descent where codes may be sent.
    benchmarks/results/pruning.md and codes.md compare them.
    """
    formulation = formulation.selection
    if formulation.name != "volume" or formulation.selection_is_exact(problem):
        return "threshold"
    if formulation.sends_codes:
        return "code-descent" if problem.broadcast else "code-greedy+code-descent"
    return "group-omp" + ("+swaps+tabu" if _serves("pruners", "swaps", problem, formulation) else "")


def _nets_chain(problem: LayerProblem, formulation: Formulation, pins: int, time_limit: float | None) -> str:
    """METIS and the alternation find structure, annealing refines it, small problems go on to a proof.

    Where METIS would not be done in its share of the time, or a package is missing, the others stand alone.
    """
    if time_limit is None:
        most = _MOST_PINS_UNLIMITED
    else:
        most = int(_METIS_PINS_PER_SECOND * time_limit) if time_limit >= _LEAST_SECONDS_FOR_METIS else -1
    small = (
        time_limit is not None
        and problem.m <= _MOST_NEURONS_PROVED
        and _serves("partitioners", "mip", problem, formulation)
    )
    stages = [
        ("metis", "@0.1", pins <= most),
        ("alternate", "@0.2", True),
        ("local-search", "@0.3" if small else "", True),
        ("mip", "", small),
    ]
    return "+".join(
        name + (share if time_limit is not None else "")
        for name, share, wanted in stages
        if wanted and _serves("partitioners", name, problem, formulation)
    )


def _serves(kind: str, name: str, problem: LayerProblem, formulation: Formulation) -> bool:
    if not registry.is_installed(kind, name):
        return False
    return registry.load(kind, name)().supports(problem, formulation) is None
