"""`tabu`: the moves of `swaps`, also for the worse, so that the search leaves the optimum that it is in."""

from __future__ import annotations

from repurpose_opt_solvers.swaps_ import Swaps


class Tabu(Swaps):
    """Tabu search by exact exchanges of transfers, after descent. Volume with total communication."""

    name = "tabu"
    explores = True
