"""Decide which of P workers computes which neuron, prune what is not worth sending, repair the rest.

Importing this package loads NumPy and SciPy only; backends and PyTorch load when they are first used.
"""

from typing import TYPE_CHECKING, Any

from repurpose_opt.accumulator import MomentAccumulator
from repurpose_opt.errors import RepurposeError
from repurpose_opt.exchange import Code, Exchange, Message, Values
from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
from repurpose_opt.moments import Moments
from repurpose_opt.network_solve import NetworkSolution, solve_network
from repurpose_opt.problem import LayerProblem
from repurpose_opt.solution import LayerSolution
from repurpose_opt.solve import solve_layer
from repurpose_opt.solver import Candidate, Partitioner, Pruner, SolveOptions, Termination

if TYPE_CHECKING:
    from repurpose_opt.network.finetune import FineTuning
    from repurpose_opt.network.repurpose import repurpose
    from repurpose_opt.runtime.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "Code",
    "Edge",
    "Exchange",
    "FineTuning",
    "Formulation",
    "LayerProblem",
    "LayerSolution",
    "Lossless",
    "Message",
    "MomentAccumulator",
    "Moments",
    "NetworkSolution",
    "Partitioner",
    "Plan",
    "Pruner",
    "RepurposeError",
    "SolveOptions",
    "Termination",
    "Values",
    "Volume",
    "repurpose",
    "solve_layer",
    "solve_network",
]

_LOADED_ON_USE = {
    "FineTuning": "repurpose_opt.network.finetune",
    "Plan": "repurpose_opt.runtime.plan",
    "repurpose": "repurpose_opt.network.repurpose",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LOADED_ON_USE[name]), name)
