"""`mt-kahypar`: multilevel hypergraph partitioning with fixed terminals by Mt-KaHyPar, then V-cycles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions
from repurpose_opt_solvers.terminals import Parts, TerminalHypergraph, reason_against, solve_by_repeats

_IMBALANCE = 1e-4
"""Asked for by the library, which then goes by the individual block weights."""


@dataclass(frozen=True)
class MtKaHyPar:
    """Mt-KaHyPar with fixed terminals (Lossless): repeats until the time limit, or one partition and V-cycles.

    `presets` are the library's, by name: each repeat partitions by the next one, then the others and it take turns at
    V-cycles until none lowers λ−1. The first repeat begins at the start, if there is one, with V-cycles alone.
    The same seed gives the same answer with one thread and no time limit only.
    """

    presets: tuple[str, ...] = ("DETERMINISTIC", "HIGHEST_QUALITY")
    cycles: int = 3
    """V-cycles of one preset before the next has its turn; 0 for partitions alone."""
    name: ClassVar[str] = "mt-kahypar"
    requires: ClassVar[tuple[str, ...]] = ("mtkahypar",)

    def supports(self, problem: LayerProblem, formulation: Formulation) -> str | None:
        return reason_against(problem, formulation)

    def solve(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        start: NDArray[np.int64] | None,
        prune: Prune,
    ) -> Candidate:
        engine = MtKaHyParEngine(self.presets, self.cycles, options.threads)
        candidate = solve_by_repeats(problem, formulation, options, start, engine)
        return replace(candidate, stats={**candidate.stats, "presets": self.presets})


@dataclass(frozen=True)
class MtKaHyParEngine:
    """The presets in their order, V-cycles of each in turn, and the threads to use."""

    presets: tuple[str, ...]
    cycles: int
    threads: int

    def partitions(
        self, terminals: TerminalHypergraph, turn: int, seed: int, start: Parts | None
    ) -> Iterator[tuple[Parts, int]]:
        import mtkahypar

        mtkahypar.set_seed(seed)
        first = turn % len(self.presets)
        native = [self._native(terminals, preset) for preset in (*self.presets[first:], *self.presets[:first])]
        context, hypergraph = native[0]
        partitioned = hypergraph.partition(context) if start is None else _at(terminals, native[0], start)
        parts, least = _read(partitioned)
        before = None
        while before is None or least < before:
            yield parts, least
            if self.cycles == 0:
                break
            before = least
            for context, hypergraph in (*native[1:], native[0]):
                partitioned = _at(terminals, (context, hypergraph), parts)
                partitioned.improve_partition(context, self.cycles)
                parts, least = _read(partitioned)

    def _native(self, terminals: TerminalHypergraph, preset: str) -> tuple[Any, Any]:
        """The library's context and hypergraph; each preset has its own, as their data structures differ."""
        import mtkahypar

        library = _library(self.threads)
        context = library.context_from_preset(getattr(mtkahypar.PresetType, preset))
        context.logging = False
        blocks = len(terminals.worker)
        context.set_partitioning_parameters(blocks, _IMBALANCE, mtkahypar.Objective.KM1)
        context.set_individual_target_block_weights(terminals.block_weight.tolist())
        hypergraph = library.create_hypergraph(
            context,
            len(terminals.vertex_weight),
            len(terminals.net_weight),
            terminals.nets(),
            terminals.vertex_weight.tolist(),
            terminals.net_weight.tolist(),
        )
        hypergraph.add_fixed_vertices(terminals.fixed_block.tolist(), blocks)
        return context, hypergraph


def _at(terminals: TerminalHypergraph, native: tuple[Any, Any], parts: Parts) -> Any:
    """The library's partitioned hypergraph for given blocks."""
    context, hypergraph = native
    return hypergraph.create_partitioned_hypergraph(context, len(terminals.worker), parts.tolist())


def _read(partitioned: Any) -> tuple[Parts, int]:
    return np.array(partitioned.get_partition(), dtype=np.int64), partitioned.km1()


@cache
def _library(threads: int) -> Any:
    # The library is to be initialised once in a process.
    import mtkahypar

    return mtkahypar.initialize(threads, False)
