"""`solve_layer`: the chain of partitioners under one deadline, the pruner, and the alternation of the two."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repurpose_opt import metrics, registry
from repurpose_opt.accumulator import to_numpy
from repurpose_opt.auto import auto_partitioner, auto_pruner
from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.exchange import Exchange
from repurpose_opt.formulation import Formulation, Volume
from repurpose_opt.moments import Moments, are_batches
from repurpose_opt.problem import LayerProblem
from repurpose_opt.pruning import PrunerChain, Pruning, load_pruner
from repurpose_opt.solution import LayerSolution, rank, verify
from repurpose_opt.solver import (
    Candidate,
    Deadline,
    Partitioner,
    Prune,
    PruneStage,
    SolveOptions,
    Termination,
    time_left,
)
from repurpose_opt.trajectory import Incumbents, Point, extended

AssignmentCost = Callable[[NDArray[np.int64] | None, Exchange | None], NDArray[np.float64]]
MOST_ROUNDS = 60
SMALLEST_FALL = 5e-3
"""A round that lowers the objective by less than this share is the last."""


def solve_layer(
    weight: Any,
    n_workers: int,
    *,
    input_owner: ArrayLike | None = None,
    formulation: Formulation | None = None,
    inputs: ArrayLike | Iterable[Any] | None = None,
    target_inputs: ArrayLike | None = None,
    diagonal_moments: bool | None = None,
    second_moment: ArrayLike | None = None,
    cross_moment: ArrayLike | None = None,
    input_mean: ArrayLike | None = None,
    target_moment: ArrayLike | None = None,
    target_mean: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    capacity: ArrayLike | None = None,
    load: ArrayLike | None = None,
    min_load: ArrayLike | None = None,
    allowed: ArrayLike | None = None,
    value_bytes: ArrayLike | None = None,
    link_price: ArrayLike | None = None,
    output_weight: ArrayLike | None = None,
    column_value: ArrayLike | None = None,
    row_neuron: ArrayLike | None = None,
    broadcast: bool = False,
    partitioner: str = "auto",
    pruner: str = "auto",
    start: ArrayLike | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> LayerSolution:
    """Place the neurons of one layer on workers, choose what is sent and repair the weights.

    weight         W (rows, columns): NumPy, torch or SciPy sparse; or a convolution's (m, n, kh, kw)
    n_workers      P
    input_owner    (n,) worker that holds each input; default: contiguous equal runs
    formulation    Edge, Volume, Lossless or your own; default Volume(budget=0.1)
    inputs         (samples, columns) what the layer receives; `target_inputs` the same samples in the original
                   network, where they differ. Or any iterable of batches, a DataLoader for instance: arrays
                   (samples, columns), or pairs of what is received and the original; read once, never held together.
                   Moments of fewer than 4 samples a column are shrunk (`Moments.of`)
    diagonal_moments   whether only the variances of `inputs` count, not their correlations; default: above 13,377
                   columns, where full moments would take more than 4 GiB
    second_moment  raw E[x̂x̂ᵀ] (columns, columns) or its diagonal (columns,), instead of `inputs`; with
                   `cross_moment` E[xx̂ᵀ], `target_moment` E[xxᵀ], `input_mean` E[x̂], `target_mean` E[x].
                   Without any, the inputs count as uncorrelated with unit variance
    capacity       (P,) most load of a worker; default ⌈total load / P⌉. `load` (m,), `min_load` (P,)
    allowed        (m, P) bool, places that a neuron may take
    value_bytes    (n,) or a number; default the weight's itemsize
    link_price     (P, P) or a number; default 1
    output_weight  (rows,) what a squared error of each row counts; default 1
    column_value, row_neuron   which value a column belongs to, which neuron a row does; default the identity
    broadcast      whether one send reaches all workers: a number that several receive counts once. For codes only
    partitioner    a name from `repurpose-opt solvers`, "auto" (`repurpose_opt.auto` says what that is), or a chain
                   such as "flow+alternate@0.3+local-search", where alternate has 0.3 of the time that is then left
    pruner         a name, or "auto", or a chain such as "group-omp+swaps", where swaps starts from what group-omp chose
    start          (m,) owners to start from; the answer is never worse
    time_limit     seconds for the whole solve; the incumbent is returned when it passes

    Raises InvalidArgument, UnknownSolver, SolverNotInstalled. A solve that ends without an answer is returned with
    its termination; `solution.require()` raises it. An answer that breaks a limit, a max_nmse that cannot be met for
    instance, has termination `error` and says so in `message` and `violations`.

    `solution.stats["trajectory"]` has (seconds since the solve began, objective) of valid, ever better incumbents of
    all stages: what each stage ended with, verified, and before it what its backend claims. The last is the answer's.
    """
    moments = _moments(
        inputs=inputs,
        target_inputs=target_inputs,
        diagonal=diagonal_moments,
        second_moment=second_moment,
        cross_moment=cross_moment,
        input_mean=input_mean,
        target_moment=target_moment,
        target_mean=target_mean,
    )
    problem = LayerProblem.create(
        weight,
        n_workers,
        input_owner=input_owner,
        moments=moments,
        bias=bias,
        capacity=capacity,
        load=load,
        min_load=min_load,
        allowed=allowed,
        value_bytes=value_bytes,
        link_price=link_price,
        output_weight=output_weight,
        column_value=column_value,
        row_neuron=row_neuron,
        broadcast=broadcast,
    )
    options = SolveOptions(time_limit=time_limit, seed=seed)
    formulation = Volume(budget=0.1) if formulation is None else formulation
    return solve_problem(problem, formulation, options, partitioner=partitioner, pruner=pruner, start=start)


def solve_problem(
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions | None = None,
    *,
    partitioner: str = "auto",
    pruner: str = "auto",
    start: ArrayLike | None = None,
) -> LayerSolution:
    """`solve_layer` for a problem that exists already."""
    began = time.perf_counter()
    if isinstance(formulation, type) or not isinstance(formulation, Formulation):
        raise InvalidArgument("formulation", repr(formulation), "an Edge, Volume, Lossless or other Formulation")
    for argument, name in (("partitioner", partitioner), ("pruner", pruner)):
        if not isinstance(name, str):
            raise InvalidArgument(argument, repr(name), "a name from `repurpose-opt solvers`")
    options = SolveOptions() if options is None else options
    reason = formulation.supports(problem)
    if reason is not None:
        return LayerSolution(problem, formulation, Termination.UNSUPPORTED, message=reason)
    chain = auto_partitioner(problem, formulation, options.time_limit) if partitioner == "auto" else partitioner
    stages = [_stage(part) for part in chain.split("+")]
    chosen = auto_pruner(problem, formulation) if pruner == "auto" else pruner
    with_pruner = load_pruner(chosen)
    reason = with_pruner.supports(problem, formulation)
    if reason is not None:
        message = f"pruner {chosen}: {reason}"
        return LayerSolution(problem, formulation, Termination.UNSUPPORTED, message=message)
    return _Chain(problem, formulation, options, with_pruner, began).run(stages, _checked_start(problem, start))


def _stage(part: str) -> tuple[Partitioner, float]:
    """The partitioner and its share of the time that is left, of `NAME` or `NAME@SHARE`."""
    name, at, share = part.partition("@")
    try:
        portion = float(share) if at else 1.0
    except ValueError:
        portion = 0.0
    if not 0 < portion <= 1:
        raise InvalidArgument("partitioner", repr(part), "NAME@SHARE with a share of the time in (0, 1]")
    return registry.load("partitioners", name)(), portion


def alternate(
    problem: LayerProblem,
    formulation: Formulation,
    options: SolveOptions,
    starts: Sequence[NDArray[np.int64]],
    prune: Prune,
    assignment_cost: AssignmentCost,
    assign: Callable[[NDArray[np.float64]], NDArray[np.int64]],
    began: float | None = None,
) -> Candidate:
    """Assign the neurons by their cost given the transfers, choose the transfers anew, and so on.

    From each of the starts, owners (m,), with the first pruner of the chain; then from the best with the pruners after
    it, each of which improves the transfers as they are. Where the cost given the transfers is exact (damping 0), a
    round is accepted only if the verified objective does not rise; where it is only marginal, up to 60 damped rounds
    run and the best is kept. `assign` maps costs (m, P) to owners (m,). `began` is when the trajectory begins, on
    `time.monotonic()`; now by default.
    """
    loop = _Alternation(problem, formulation, options, assignment_cost, assign, Incumbents(began))
    first, *others = prune.stages
    found = [loop.run(first, starts[0], None)]
    for owner in starts[1:]:
        if found[0].owner is None or not loop.deadline.passed:
            found.append(loop.run(first, owner, None))
    best = min((solution for solution in found if solution.owner is not None), key=rank, default=found[0])
    for stage in others:
        if best.owner is not None and not loop.deadline.passed:
            best = loop.run(stage, best.owner, best)
    termination = Termination.TIME_LIMIT if loop.deadline.passed else Termination.HEURISTIC
    if best.termination is Termination.OPTIMAL:  # proved by the pruner: no other owners are allowed
        termination = best.termination
    stats = {**best.stats, "rounds": loop.rounds, "trajectory": loop.incumbents.points}
    return Candidate(termination, best.owner, best.exchange, best.bound, message=best.message, stats=stats)


@dataclass
class _Alternation:
    """Rounds of one pruner and one way to assign; `rounds` counts those of all runs."""

    problem: LayerProblem
    formulation: Formulation
    options: SolveOptions
    assignment_cost: AssignmentCost
    assign: Callable[[NDArray[np.float64]], NDArray[np.int64]]
    incumbents: Incumbents
    rounds: int = 0

    def __post_init__(self) -> None:
        self.deadline = Deadline(self.options.time_limit)

    def run(self, stage: PruneStage, owner: NDArray[np.int64], before: LayerSolution | None) -> LayerSolution:
        """The best of all rounds from these owners, each from the exchange before it if there is one to start from."""
        current = self._pruned(stage, owner, before)
        best = current if before is None else _best(before, current)
        cost = None
        for _ in range(MOST_ROUNDS):
            if current.owner is None or self.deadline.passed:
                break
            fresh = self.assignment_cost(current.owner, current.exchange)
            damping = self.formulation.damping
            cost = fresh if cost is None else damping * cost + (1 - damping) * fresh
            owner = self.assign(cost)
            if (owner == current.owner).all():
                break
            self.rounds += 1
            current = self._pruned(stage, owner, None if before is None else current)
            last = rank(best)  # not the solution, whose weights would take as much memory as the layer's
            best = _best(best, current)
            if damping == 0 and not rank(best) < _clearly_below(*last):
                break
        return best

    def _pruned(self, stage: PruneStage, owner: NDArray[np.int64], before: LayerSolution | None) -> LayerSolution:
        candidate = stage(owner, None if before is None else before.exchange)
        solution = verify(self.problem, self.formulation, candidate, self.options)
        if solution.owner is not None and not solution.violations:
            self.incumbents.add(solution.objective)
        return solution


def _best(first: LayerSolution, second: LayerSolution) -> LayerSolution:
    """The better of two, the first where they are equal or the second has no answer."""
    return first if second.owner is None else min(first, second, key=rank)


class _Chain:
    """Runs the stages of one solve; each starts from the best so far."""

    def __init__(
        self,
        problem: LayerProblem,
        formulation: Formulation,
        options: SolveOptions,
        pruner: PrunerChain,
        began: float,
    ) -> None:
        self.problem, self.formulation, self.options, self.pruner = problem, formulation, options, pruner
        self.began = began
        self.trajectory: list[Point] = []
        self.deadline = Deadline(options.time_limit)
        self.best: LayerSolution | None = None
        self.bound: float | None = None
        self.surrogate_bound: float | None = None
        self.log: list[dict[str, Any]] = []
        # Not a method of this object: the cycle would keep every solved layer in memory.
        self.prune = Pruning(problem, formulation, pruner, partial(time_left, options, self.deadline))
        self.out_of_time = False

    def run(self, stages: list[tuple[Partitioner, float]], start: NDArray[np.int64] | None) -> LayerSolution:
        if start is not None:
            # A partitioner that goes on from it with every pruner spares the others here.
            prune = self.prune.by_first if getattr(stages[0][0], "keeps_start", False) else self.prune
            began = time.perf_counter()
            self._keep("start", self._guarded("start", lambda: prune(start)), began)
        last = None
        for stage, share in stages:
            if self.best is not None and self._proved():
                break
            if self.best is not None and self.deadline.passed:
                self.out_of_time = True
                break
            began = time.perf_counter()
            last = self._keep(stage.name, self._ask(stage, share), began)
            if last.termination is Termination.INFEASIBLE and self.best is None:
                break
        return self._result(last)

    def _ask(self, stage: Partitioner, share: float) -> Candidate:
        return self._guarded(stage.name, lambda: self._complete(stage, share))

    def _complete(self, stage: Partitioner, share: float) -> Candidate:
        """The stage's candidate, its exchange chosen by the pruner if it left that open."""
        reason = stage.supports(self.problem, self.formulation)
        if reason is not None:
            return Candidate(Termination.UNSUPPORTED, message=f"{stage.name}: {reason}")
        start = None if self.best is None else self.best.owner
        candidate = stage.solve(
            self.problem, self.formulation, time_left(self.options, self.deadline, share), start, self.prune
        )
        if candidate.owner is not None and candidate.exchange is None:
            wrong = metrics.placement_violations(self.problem, np.asarray(candidate.owner))
            if wrong:  # pruners trust owners
                return Candidate(Termination.ERROR, message=f"{stage.name}: {'; '.join(wrong)}")
            pruned = self.prune(candidate.owner)
            termination = candidate.termination
            if pruned.termination is not Termination.HEURISTIC and termination is Termination.HEURISTIC:
                termination = pruned.termination
            stats = {**pruned.stats, **candidate.stats}
            bound = _highest(candidate.bound, pruned.bound)  # the pruner's where no other owners are allowed
            candidate = replace(candidate, exchange=pruned.exchange, termination=termination, bound=bound, stats=stats)
        return candidate

    def _guarded(self, name: str, ask: Callable[[], Candidate]) -> Candidate:
        try:
            return ask()
        except RepurposeError:
            raise
        except Exception as error:  # a backend's fault is an answer that says so, here as in a benchmark
            stats = {"traceback": traceback.format_exc()}
            return Candidate(Termination.ERROR, message=f"{name}: {type(error).__name__}: {error}", stats=stats)

    def _keep(self, name: str, candidate: Candidate, began: float) -> LayerSolution:
        solution = verify(self.problem, self.formulation, candidate, self.options)
        entry: dict[str, Any] = {"stage": name, "termination": str(solution.termination), "message": solution.message}
        entry["seconds"] = time.perf_counter() - began
        if solution.owner is not None:
            entry["objective"] = solution.objective
            if self.best is None or rank(solution) < rank(self.best):
                self.best = solution
            self.bound = _highest(self.bound, solution.bound)
            self.surrogate_bound = _highest(self.surrogate_bound, solution.surrogate_bound)
            if not solution.violations:
                claims, since = candidate.stats.get("trajectory", ()), began - self.began
                ended = since + entry["seconds"]
                self.trajectory = extended(self.trajectory, claims, since, ended, solution.objective)
        self.log.append(entry)
        return solution

    def _result(self, last: LayerSolution | None) -> LayerSolution:
        stats = {
            "stages": self.log,
            "trajectory": self.trajectory,
            "pruner": self.pruner.name,
            **self.problem.moments.choice,
        }
        if self.best is None or self.best.owner is None:
            assert last is not None
            return replace(last, stats={**last.stats, **stats})
        ended = [entry["termination"] for entry in self.log]
        out_of_time = self.out_of_time or Termination.TIME_LIMIT in ended
        termination = Termination.TIME_LIMIT if out_of_time else Termination.HEURISTIC
        if self.bound is not None and self.bound > self.best.objective + self._slack():  # a later stage refuted it
            stats["refused_claims"] = (*self.best.stats.get("refused_claims", ()), f"bound {self.bound:.9g}")
            self.bound = None
        if self._proved():
            termination = Termination.OPTIMAL
        message = self.best.message
        if self.best.violations:  # an answer that breaks a limit is handed over, but not as a success
            termination = termination if out_of_time else Termination.ERROR
            message = "; ".join(self.best.violations)
        return self.best.restated(
            termination=termination,
            bound=self.bound,
            surrogate_bound=self.surrogate_bound,
            message=message,
            stats={**self.best.stats, **stats},
        )

    def _proved(self) -> bool:
        if self.best is None or self.bound is None or self.best.violations:
            return False
        return abs(self.best.objective - self.bound) <= self._slack()

    def _slack(self) -> float:
        assert self.best is not None
        return self.options.relative_gap * max(abs(self.best.objective), 1e-12)


def _clearly_below(invalid: bool, objective: float) -> tuple[bool, float]:
    return invalid, objective - SMALLEST_FALL * abs(objective)


def _highest(*bounds: float | None) -> float | None:
    return max((bound for bound in bounds if bound is not None), default=None)


def _checked_start(problem: LayerProblem, start: ArrayLike | None) -> NDArray[np.int64] | None:
    if start is None:
        return None
    owner = np.asarray(start)
    wrong = metrics.placement_violations(problem, owner)
    if wrong:
        raise InvalidArgument("start", wrong[0], "a valid placement")
    return owner.astype(np.int64)


def _moments(
    *,
    inputs: ArrayLike | Iterable[Any] | None,
    target_inputs: ArrayLike | None,
    diagonal: bool | None,
    **raw: ArrayLike | None,
) -> Moments | None:
    given = [name for name, value in raw.items() if value is not None]
    if inputs is not None:
        if given:
            raise InvalidArgument("inputs", f"samples together with {', '.join(given)}", "either samples or moments")
        if not are_batches(inputs):
            return Moments.from_samples(cast(ArrayLike, inputs), target_inputs, diagonal=diagonal)
        if target_inputs is not None:
            raise InvalidArgument("target_inputs", "an argument beside batches", "pairs as the batches of inputs")
        return Moments.from_batches(cast(Iterable[Any], inputs), diagonal=diagonal)
    if diagonal is not None:
        raise InvalidArgument("diagonal_moments", diagonal, "only with inputs; a second_moment may be (columns,)")
    if target_inputs is not None:
        raise InvalidArgument("target_inputs", "samples without inputs", "inputs with it")
    if not given:
        return None
    second = raw.pop("second_moment")
    if second is None:
        raise InvalidArgument(given[0], "a value without second_moment", "second_moment with it")
    return Moments.from_raw(to_numpy(second), **{k: None if v is None else to_numpy(v) for k, v in raw.items()})
