"""Assignment of neurons with unequal loads (generalised assignment, NP-hard) by SciPy's HiGHS."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from repurpose_opt.problem import LayerProblem
from repurpose_opt_solvers.transport import Infeasible

# Nodes, not seconds, so that the same problem has the same answer on any machine.
_LIMITS = {"mip_rel_gap": 1e-4, "node_limit": 2000}
_HIGHS_INFEASIBLE = 2


def assign_uneven(problem: LayerProblem, cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """(m,) owners of low total cost (m, P) within capacity, min_load and allowed; a heuristic. Raises Infeasible."""
    m, P = problem.m, problem.P
    relative = cost - cost.min(axis=1, keepdims=True)
    scale = relative.max() if relative.max() > 0 else 1.0
    once = sparse.kron(sparse.eye_array(m), np.ones((1, P)))
    unit = problem.load.max()  # HiGHS's tolerances are absolute
    loads = sparse.kron(problem.load[None, :] / unit, sparse.eye_array(P))
    result = milp(
        (relative / scale).ravel(),
        integrality=np.ones(m * P),
        bounds=Bounds(0, problem.allowed.ravel().astype(float)),
        constraints=[
            LinearConstraint(once.tocsr(), 1, 1),
            LinearConstraint(loads.tocsr(), problem.min_load / unit, problem.capacity / unit),
        ],
        options=_LIMITS,
    )
    if result.status == _HIGHS_INFEASIBLE:
        raise Infeasible("no placement satisfies capacity, min_load and allowed", proved=True)
    if result.x is None:
        raise Infeasible(f"no placement of unequal loads found ({result.message})", proved=False)
    return result.x.reshape(m, P).argmax(axis=1)
