"""`kahypar`: multilevel hypergraph partitioning with fixed terminals by KaHyPar (GPL, so an extra of its own)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.formulation import Formulation
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solver import Candidate, Prune, SolveOptions
from repurpose_opt_solvers.terminals import Parts, TerminalHypergraph, reason_against, solve_by_repeats

# The package brings no configuration, and without a complete one it ends the process. Direct k-way partitioning for
# λ−1: coarsening by heavy edges, initial partitions by recursive bisection from a pool of methods, FM and flow
# refinement; no V-cycles, about which it prints to standard output.
_CONFIGURATION = """
mode=direct
objective=km1
cmaxnet=1000
vcycles=0
p-detect-communities=false
c-type=ml_style
c-s=1
c-t=160
c-rating-score=heavy_edge
c-rating-use-communities=false
c-rating-heavy_node_penalty=no_penalty
c-rating-acceptance-criterion=best_prefer_unmatched
c-fixed-vertex-acceptance-criterion=fixed_vertex_allowed
i-mode=recursive
i-technique=multi
i-algo=pool
i-runs=20
i-bp-algorithm=worst_fit
i-c-type=ml_style
i-c-s=1
i-c-t=150
i-c-rating-score=heavy_edge
i-c-rating-use-communities=false
i-c-rating-heavy_node_penalty=no_penalty
i-c-rating-acceptance-criterion=best_prefer_unmatched
i-c-fixed-vertex-acceptance-criterion=fixed_vertex_allowed
i-r-type=twoway_fm
i-r-runs=-1
i-r-fm-stop=simple
i-r-fm-stop-i=50
r-type=kway_fm_hyperflow_cutter_km1
r-runs=-1
r-fm-stop=adaptive_opt
r-fm-stop-alpha=1
r-fm-stop-i=350
r-flow-execution-policy=exponential
r-hfc-size-constraint=mf-style
r-hfc-scaling=16
r-hfc-distance-based-piercing=true
r-hfc-mbc=true
"""


class KaHyPar:
    """KaHyPar with fixed terminals (Lossless): repeats until the time limit, or one partition. It improves no start.

    It gives terminals to blocks only after the first partition, and is behind Mt-KaHyPar for it.
    """

    name = "kahypar"
    requires: tuple[str, ...] = ("kahypar",)

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
        return solve_by_repeats(problem, formulation, options, start, KaHyParEngine())


@dataclass(frozen=True)
class KaHyParEngine:
    """One partition after the other; the library has no way to begin at given blocks."""

    def partitions(
        self, terminals: TerminalHypergraph, turn: int, seed: int, start: Parts | None
    ) -> Iterator[tuple[Parts, int]]:
        import kahypar

        blocks, vertices = len(terminals.worker), len(terminals.vertex_weight)
        hypergraph = kahypar.Hypergraph(
            vertices,
            len(terminals.net_weight),
            terminals.start.tolist(),
            terminals.pin.tolist(),
            blocks,
            terminals.net_weight.tolist(),
            terminals.vertex_weight.tolist(),
        )
        for vertex in np.flatnonzero(terminals.fixed_block >= 0):
            hypergraph.fixNodeToBlock(int(vertex), int(terminals.fixed_block[vertex]))
        context = kahypar.Context()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "configuration.ini"
            path.write_text(_CONFIGURATION)
            context.loadINIconfiguration(str(path))
        context.setK(blocks)
        context.setEpsilon(0.0)
        context.setCustomTargetBlockWeights(terminals.block_weight.tolist())
        context.setSeed(seed)
        context.suppressOutput(True)
        kahypar.partition(hypergraph, context)
        parts = np.array([hypergraph.blockID(vertex) for vertex in range(vertices)], dtype=np.int64)
        yield parts, kahypar.connectivityMinusOne(hypergraph)
