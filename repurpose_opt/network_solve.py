"""`solve_network`: the placement of all layers of a network, one after the other and then with a look ahead.

A layer's owners are where the next layer's inputs are. The forward sweep places each layer for its own inputs; a
backend with a method

    solve_network(problems, formulation, options, start) -> owners (m,) of each layer

is also asked for all layers at once; the `input_owner` of every problem but the first is to be ignored, and it raises
NoSolution where it has none. Look-ahead sweeps then place each layer again, for its own inputs and for what its
neurons must send on to the layer after it, until a sweep brings nothing. A step counts only if it lowers the whole
network's verified objective.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repurpose_opt import metrics, registry
from repurpose_opt.errors import InvalidArgument
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Lossless
from repurpose_opt.onward import Onward, onward_cost
from repurpose_opt.problem import LayerProblem, checked_numbers
from repurpose_opt.progress import Report, progress
from repurpose_opt.solution import LayerSolution, verify
from repurpose_opt.solve import solve_problem
from repurpose_opt.solver import Candidate, Deadline, SolveOptions, Termination

Owners = tuple[NDArray[np.int64], ...]
FORWARD_SHARE = 0.5
"""Of a time limit, for the forward sweep; what it leaves is shared by the starts that look ahead, the best first."""
SWEEP_SHARE = 0.5
"""Of the time that a start has left, for one sweep: backends may use all that they get, and later sweeps need some."""


@dataclass(frozen=True, eq=False)
class NetworkSolution:
    """One solution a layer, in order; each layer's `input_owner` is the owner of the layer before.

    `stats`: "start" (which placement was improved: "forward", or the backend that placed all layers at once),
    "volume" (bytes a sample of each start and after each of its sweeps), "starts" (what failed, by its name).
    """

    layers: tuple[LayerSolution, ...]
    termination: Termination
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def owners(self) -> Owners:
        """(m,) owners of each layer."""
        return tuple(_owner(layer) for layer in self.layers)

    @cached_property
    def objective(self) -> float:
        return sum(layer.objective for layer in self.layers)

    @cached_property
    def volume(self) -> int:
        """Bytes a sample, over all layers."""
        return sum(layer.volume for layer in self.layers)

    @cached_property
    def busiest(self) -> int:
        """Bytes a sample that the busiest worker sends or receives over all layers."""
        traffic = sum(metrics.traffic(layer.problem, _exchange(layer)) for layer in self.layers)
        return int(max(np.sum(traffic, axis=1).max(), np.sum(traffic, axis=0).max()))

    @cached_property
    def violations(self) -> tuple[str, ...]:
        """What is wrong, layer by layer; empty for a valid solution."""
        return tuple(
            f"layer {number}: {wrong}" for number, layer in enumerate(self.layers) for wrong in layer.violations
        )


def solve_network(
    weights: Sequence[Any],
    n_workers: int,
    *,
    input_owner: ArrayLike | None = None,
    output_owner: ArrayLike | None = None,
    formulation: Formulation | None = None,
    partitioner: str = "auto",
    worker_share: ArrayLike | None = None,
    value_bytes: int | None = None,
    link_price: ArrayLike | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> NetworkSolution:
    """Place all layers of a chain, so that together they send the least.

    weights       W of each layer, (m_l, m_{l−1}): NumPy, torch or SciPy sparse
    n_workers     P
    input_owner   (n,) worker that holds each input of the first layer; default: contiguous equal runs
    output_owner  worker that holds all outputs, or (m,) one for each; default: the outputs are placed like the others
    formulation   Lossless() (the default); no other is supported
    partitioner   a name, a chain or "auto", as for `solve_layer`; backends in it that can place all layers at once do
    worker_share  (P,) relative capacity; default: equal. Worker k takes ⌈its share of the layer's neurons⌉
    value_bytes   of every value; default: the weights' itemsize
    link_price    (P, P) or a number; default 1
    time_limit    seconds for the whole solve: at most half for the forward sweep, evenly over its layers. Short ones
                  suit no backend that starts a child process a layer (metis, mt-kahypar: about half a second each)

    Raises InvalidArgument, UnknownSolver, SolverNotInstalled, and NoSolution where a layer cannot be placed.
    """
    if not isinstance(weights, Sequence) or len(weights) == 0:
        raise InvalidArgument("weights", f"a {type(weights).__name__}", "a list of one weight or more")
    if isinstance(n_workers, bool) or not isinstance(n_workers, (int, np.integer)) or n_workers < 1:
        raise InvalidArgument("n_workers", repr(n_workers), "a whole number ≥ 1")
    share = checked_numbers("worker_share", worker_share, (n_workers,), default=1.0)
    if share.sum() <= 0:
        raise InvalidArgument("worker_share", "no capacity at all", "numbers ≥ 0, not all 0")
    problems: list[LayerProblem] = []
    for number, weight in enumerate(weights):
        is_last = number + 1 == len(weights)
        allowed = None
        capacity: ArrayLike = np.ceil(np.round(np.shape(weight)[0] * share / share.sum(), 9))
        if is_last and output_owner is not None:
            allowed = _fixed("output_owner", output_owner, np.shape(weight)[0], n_workers)
            capacity = allowed.sum(axis=0)
        problem = LayerProblem.create(
            weight,
            n_workers,
            input_owner=input_owner if number == 0 else None,
            capacity=capacity,
            allowed=allowed,
            value_bytes=value_bytes,
            link_price=link_price,
        )
        if problems and problem.n != problems[-1].m:
            raise InvalidArgument(
                "weights", f"{problem.n} inputs of layer {number}", f"{problems[-1].m}, the neurons of the layer before"
            )
        problems.append(problem)
    options = SolveOptions(time_limit=time_limit, seed=seed)
    formulation = Lossless() if formulation is None else formulation
    return solve_problems(problems, formulation, options, partitioner=partitioner)


def solve_problems(
    problems: Sequence[LayerProblem],
    formulation: Formulation,
    options: SolveOptions | None = None,
    *,
    partitioner: str = "auto",
) -> NetworkSolution:
    """`solve_network` for layers that exist already; the `input_owner` of all but the first is of no account."""
    if not isinstance(formulation, Lossless) or formulation.communication != "total" or formulation.sends_codes:
        raise InvalidArgument("formulation", repr(formulation), "Lossless(): the look ahead prices whole values")
    options = SolveOptions() if options is None else options
    with progress() as report:
        return _Network(list(problems), formulation, options, partitioner, report).solve()


class _Network:
    """One solve: the starts, the sweeps over each, the best."""

    def __init__(
        self,
        problems: list[LayerProblem],
        formulation: Lossless,
        options: SolveOptions,
        partitioner: str,
        report: Report,
    ) -> None:
        self.problems, self.formulation, self.options = problems, formulation, options
        self.partitioner, self.report = partitioner, report
        self.deadline = Deadline(options.time_limit)
        self.volume: dict[str, list[int]] = {}
        self.failed: dict[str, str] = {}

    def solve(self) -> NetworkSolution:
        left = self.deadline.remaining
        forward = self.forward(Deadline(None if left is None else left * FORWARD_SHARE))
        starts = {"forward": forward} | self.at_once(forward)
        self.volume = {name: [_volume(layers)] for name, layers in starts.items()}
        best, best_name = forward, "forward"
        for number, name in enumerate(sorted(starts, key=lambda name: _objective(starts[name]))):
            left = self.deadline.remaining
            share = Deadline(None if left is None else left / (len(starts) - number))
            improved = self.improve(name, starts[name], share)
            if _objective(improved) < _objective(best):
                best, best_name = improved, name
        termination = Termination.TIME_LIMIT if self.deadline.passed else Termination.HEURISTIC
        stats = {"start": best_name, "volume": self.volume, "starts": self.failed}
        return NetworkSolution(tuple(best), termination, stats)

    def forward(self, deadline: Deadline) -> list[LayerSolution]:
        """Each layer for its own inputs. Raises NoSolution."""
        solved: list[LayerSolution] = []
        for number in range(len(self.problems)):
            self.report(f"forward sweep, layer {number + 1} of {len(self.problems)}")
            problem = self.problem(number, [_owner(layer) for layer in solved])
            options = self.limited(deadline, len(self.problems) - number)
            solved.append(solve_problem(problem, self.formulation, options, partitioner=self.partitioner).require())
        return solved

    def at_once(self, forward: list[LayerSolution]) -> dict[str, list[LayerSolution]]:
        """All layers at once, by every backend of the chain that can; why one cannot is recorded."""
        found = {}
        start = tuple(_owner(layer) for layer in forward)
        for name in whole_network_backends(self.partitioner):
            if self.deadline.passed:
                break
            self.report(f"all layers at once, {name}")
            backend = registry.load("partitioners", name)()
            reasons = (backend.supports(problem, self.formulation) for problem in self.problems)
            reason = next((reason for reason in reasons if reason is not None), None)
            if reason is not None:
                self.failed[name] = reason
                continue
            try:
                owners = backend.solve_network(self.problems, self.formulation, self.limited(self.deadline, 2), start)
                found[name] = self.verified(owners)
            except Exception as error:  # a backend's fault must not cost the forward sweep
                self.failed[name] = f"{type(error).__name__}: {error}"
        return found

    def verified(self, owners: Iterable[NDArray[np.int64]]) -> list[LayerSolution]:
        """Raises NoSolution for owners that break a limit."""
        owners = list(owners)
        return [self.layer(number, owners, owner) for number, owner in enumerate(owners)]

    def improve(self, name: str, layers: list[LayerSolution], deadline: Deadline) -> list[LayerSolution]:
        """Sweeps that look ahead, backwards and forwards in turn, until two in a row bring nothing."""
        layers = list(layers)
        idle = 0
        while idle < 2 and len(layers) > 1 and not deadline.passed:
            before = _objective(layers)
            left = deadline.remaining
            self.sweep(name, layers, Deadline(None if left is None else left * SWEEP_SHARE))
            self.volume[name].append(_volume(layers))
            idle = 0 if _objective(layers) < before else idle + 1
        return layers

    def sweep(self, name: str, layers: list[LayerSolution], deadline: Deadline) -> None:
        """Places each layer again, in place, and keeps what lowers the objective of all."""
        number_of_sweep = len(self.volume[name])
        order = range(len(layers))
        for step, number in enumerate(order[::-1] if number_of_sweep % 2 == 1 else order):
            if self.deadline.passed:
                return
            self.report(f"look ahead from {name}, sweep {number_of_sweep}, layer {number + 1} of {len(layers)}")
            owners = [_owner(layer) for layer in layers]
            options = self.limited(deadline, len(order) - step)
            moved = self.look_ahead(number, owners, replace(options, seed=options.seed + number_of_sweep))
            if moved is None:
                continue
            owners[number] = moved
            affected = range(number, min(number + 2, len(layers)))
            changed = [self.layer(index, owners, owners[index]) for index in affected]
            if _objective(changed) < _objective(layers[index] for index in affected):
                layers[affected.start : affected.stop] = changed

    def look_ahead(
        self, number: int, owners: list[NDArray[np.int64]], options: SolveOptions
    ) -> NDArray[np.int64] | None:
        """Other owners of one layer, the layers on both sides held; None where there are none."""
        formulation: Formulation = self.formulation
        if number + 1 < len(owners):
            formulation = Onward(self.formulation, onward_cost(self.problems[number + 1], owners[number + 1]))
        problem = self.problem(number, owners)
        solution = solve_problem(problem, formulation, options, partitioner=self.partitioner, start=owners[number])
        is_same = solution.owner is None or (solution.owner == owners[number]).all()
        return None if is_same else solution.owner

    def problem(self, number: int, owners: Sequence[NDArray[np.int64]]) -> LayerProblem:
        problem = self.problems[number]
        return problem if number == 0 else replace(problem, input_owner=owners[number - 1])

    def layer(self, number: int, owners: Sequence[NDArray[np.int64]], owner: NDArray[np.int64]) -> LayerSolution:
        """This layer with these owners. Raises NoSolution where they are not valid."""
        problem = self.problem(number, owners)
        candidate = Candidate(Termination.HEURISTIC, owner, self.formulation.select(problem, owner))
        return verify(problem, self.formulation, candidate, self.options).require()

    def limited(self, deadline: Deadline, parts: int) -> SolveOptions:
        """Options with the time that is left, divided by what is to be done in it."""
        left = deadline.remaining
        return replace(self.options, time_limit=None if left is None else max(left / parts, 1e-3))


def whole_network_backends(partitioner: str) -> list[str]:
    """Names of the backends in a chain that place all layers at once; for "auto" all that are installed."""
    if partitioner != "auto":
        names = [stage.partition("@")[0] for stage in partitioner.split("+")]
    else:
        names = [name for name in registry.names("partitioners") if registry.is_installed("partitioners", name)]
    return [name for name in names if hasattr(registry.load("partitioners", name)(), "solve_network")]


def _fixed(name: str, owner: ArrayLike, m: int, P: int) -> NDArray[np.bool_]:
    """(m, P) the one place of each neuron. Raises InvalidArgument."""
    workers = np.asarray(owner)
    if workers.dtype.kind not in "iu" or workers.shape not in ((), (m,)):
        raise InvalidArgument(name, f"{workers.dtype} of shape {workers.shape}", f"a worker, or {m} of them")
    if ((workers < 0) | (workers >= P)).any():
        raise InvalidArgument(name, f"{workers.min()} … {workers.max()}", f"0 … {P - 1}")
    return np.asarray(np.broadcast_to(workers, (m,))[:, None] == np.arange(P))


def _owner(layer: LayerSolution) -> NDArray[np.int64]:
    owner = layer.require().owner
    assert owner is not None
    return owner


def _exchange(layer: LayerSolution) -> Exchange:
    exchange = layer.require().exchange
    assert exchange is not None
    return exchange


def _objective(layers: Iterable[LayerSolution]) -> float:
    return sum(layer.objective for layer in layers)


def _volume(layers: Iterable[LayerSolution]) -> int:
    return sum(layer.volume for layer in layers)
