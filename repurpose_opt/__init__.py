"""Decide which of P workers computes which neuron, prune what is not worth sending, repair the rest.

Importing this package loads nothing else; its names load their modules when they are first used, `solve_layer` NumPy
and SciPy, backends and PyTorch only where they are needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repurpose_opt.accumulator import MomentAccumulator
    from repurpose_opt.errors import RepurposeError
    from repurpose_opt.exchange import Code, Exchange, Message, Values
    from repurpose_opt.formulation import Edge, Formulation, Lossless, Volume
    from repurpose_opt.moments import Moments
    from repurpose_opt.network.finetune import FineTuning
    from repurpose_opt.network.repurpose import repurpose
    from repurpose_opt.network_solve import NetworkSolution, solve_network
    from repurpose_opt.problem import LayerProblem
    from repurpose_opt.runtime.plan import Plan
    from repurpose_opt.runtime.processes.client import Client
    from repurpose_opt.runtime.processes.launch import Service, run_plan
    from repurpose_opt.solution import LayerSolution
    from repurpose_opt.solve import solve_layer
    from repurpose_opt.solver import Candidate, Partitioner, Pruner, SolveOptions, Termination

__version__ = "0.1.0"

__all__ = [
    "Candidate",
    "Client",
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
    "Service",
    "SolveOptions",
    "Termination",
    "Values",
    "Volume",
    "repurpose",
    "run_plan",
    "solve_layer",
    "solve_network",
]

_MODULES = {
    "repurpose_opt.accumulator": ("MomentAccumulator",),
    "repurpose_opt.errors": ("RepurposeError",),
    "repurpose_opt.exchange": (
        "Code",
        "Exchange",
        "Message",
        "Values",
    ),
    "repurpose_opt.formulation": (
        "Edge",
        "Formulation",
        "Lossless",
        "Volume",
    ),
    "repurpose_opt.moments": ("Moments",),
    "repurpose_opt.network.finetune": ("FineTuning",),
    "repurpose_opt.network.repurpose": ("repurpose",),
    "repurpose_opt.network_solve": (
        "NetworkSolution",
        "solve_network",
    ),
    "repurpose_opt.problem": ("LayerProblem",),
    "repurpose_opt.runtime.plan": ("Plan",),
    "repurpose_opt.runtime.processes.client": ("Client",),
    "repurpose_opt.runtime.processes.launch": ("Service", "run_plan"),
    "repurpose_opt.solution": ("LayerSolution",),
    "repurpose_opt.solve": ("solve_layer",),
    "repurpose_opt.solver": (
        "Candidate",
        "Partitioner",
        "Pruner",
        "SolveOptions",
        "Termination",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
