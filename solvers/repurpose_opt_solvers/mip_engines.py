"""The engines of `mip`, each a generator of answers for one linear model: CP-SAT, and HiGHS or SCIP by MathOpt."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.linear_model import LinearModel, common_unit

ENGINES = ("cp-sat", "highs", "scip")
_LARGEST_SUM = 1e10
"""CP-SAT: costs without a common unit are rounded down to 1e-10 of their sum, divided by their number."""
_DOUBT = 2e-7
"""HiGHS and SCIP: share by which their bound may be wrong, since they work with tolerances."""
_SCALE = 1e4
"""HiGHS and SCIP: mean of the scaled costs, so that their absolute tolerances are small."""
_LARGEST_COEFFICIENT = 1e6
"""HiGHS and SCIP: rows with larger ones are scaled down to 1e3. With loads of 1e9 SCIP gives wrong bounds."""


@dataclass(frozen=True)
class Answer:
    """What an engine knows so far: the best variables (None: none yet), a bound, and whether it is done."""

    values: NDArray[np.float64] | None
    bound: float
    is_infeasible: bool = False


@dataclass(frozen=True)
class Effort:
    """How far an engine may go: seconds, CP-SAT's deterministic time, nodes of the others; and the gap to stop at."""

    seconds: float | None = None
    deterministic_time: float | None = None
    nodes: int | None = None
    threads: int = 1
    seed: int = 0
    relative_gap: float = 1e-6


def answers(engine: str, model: LinearModel, start: NDArray[np.float64] | None, effort: Effort) -> Iterator[Answer]:
    """The answers of one of ENGINES, the last the best; `start` (variables,) is where it begins."""
    if engine == "cp-sat":
        return cp_sat(model, start, effort)
    return math_opt(model, start, effort, engine)


def cp_sat(model: LinearModel, start: NDArray[np.float64] | None, effort: Effort) -> Iterator[Answer]:
    """Answers of CP-SAT, each better than the one before.

    Costs are rounded down to whole multiples of a unit, so that a bound on the rounded costs is one on those given.
    One thread takes turns between several strategies: a single strategy has nearly no bound.
    """
    from ortools.sat.python import cp_model

    unit = _cost_unit(model)
    program = cp_model.CpModel()
    variables = [program.new_bool_var("") for _ in range(len(model.cost) - model.has_busiest)]
    if model.has_busiest:
        variables.append(program.new_int_var(0, int(_whole(-np.minimum(model.matrix.data, 0), unit).sum()), ""))
    _add_rows(program, variables, model, unit)
    whole = _whole(model.cost, unit)
    if model.has_busiest:
        whole[-1] = 1
    charged = np.flatnonzero(whole)
    program.minimize(cp_model.LinearExpr.weighted_sum([variables[v] for v in charged], whole[charged].tolist()))
    if start is not None:
        hint = start.astype(np.int64)
        if model.has_busiest:
            hint[-1] = _whole(start, unit)[-1]
        for variable, value in zip(variables, hint.tolist(), strict=True):
            program.add_hint(variable, value)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = effort.threads
    solver.parameters.interleave_search = effort.threads == 1
    solver.parameters.random_seed = effort.seed % (1 << 31)
    solver.parameters.relative_gap_limit = effort.relative_gap / 2
    if effort.seconds is not None:
        solver.parameters.max_time_in_seconds = max(effort.seconds, 1e-3)
    if effort.deterministic_time is not None:
        solver.parameters.max_deterministic_time = effort.deterministic_time

    def bound_of(source: Any) -> float:
        return model.constant + math.ceil(source.best_objective_bound - 1e-6) * unit

    def values_of(source: Any) -> NDArray[np.float64]:
        return np.array([source.value(variable) for variable in variables], dtype=np.float64)

    def run(tell: Callable[[Answer], None]) -> None:
        class Listener(cp_model.CpSolverSolutionCallback):
            def on_solution_callback(self) -> None:
                tell(Answer(values_of(self), bound_of(self)))

        status = solver.solve(program, Listener())
        if status == cp_model.INFEASIBLE:
            tell(Answer(None, np.inf, is_infeasible=True))
        elif status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            tell(Answer(values_of(solver), bound_of(solver)))
        elif status == cp_model.UNKNOWN:
            has_bound = solver.best_objective_bound != 0 or (model.cost >= 0).all()  # 0 also stands for none
            tell(Answer(None, bound_of(solver) if has_bound else -np.inf))
        else:
            raise RuntimeError(f"CP-SAT ended with {solver.status_name(status)}: {program.validate()}")

    return _streamed(run)


def math_opt(model: LinearModel, start: NDArray[np.float64] | None, effort: Effort, engine: str) -> Iterator[Answer]:
    """The one answer of HiGHS or SCIP, which MathOpt gives at the end only."""
    from ortools.math_opt import model_pb2
    from ortools.math_opt.python import mathopt

    unit = _shared_unit(model)
    prices = _prices(model)
    scale = 1 / unit if unit is not None else _SCALE / float(prices[prices > 0].mean())
    program = mathopt.Model.from_model_proto(_as_proto(model, scale, model_pb2.ModelProto()))
    variables = list(program.variables())
    hints = []
    if start is not None:
        hints = [mathopt.SolutionHint(variable_values=dict(zip(variables, start.tolist(), strict=True)))]
    result = mathopt.solve(
        program,
        mathopt.SolverType.GSCIP if engine == "scip" else mathopt.SolverType.HIGHS,
        params=mathopt.SolveParameters(
            time_limit=None if effort.seconds is None else timedelta(seconds=max(effort.seconds, 1e-3)),
            threads=effort.threads if engine == "scip" else None,  # MathOpt refuses them for HiGHS, which uses one
            random_seed=effort.seed % (1 << 31),
            relative_gap_tolerance=effort.relative_gap / 2,
            node_limit=effort.nodes,
        ),
        model_params=mathopt.ModelSolveParameters(solution_hints=hints),
    )
    reason = result.termination.reason
    if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        yield Answer(None, np.inf, is_infeasible=True)
        return
    ends = mathopt.TerminationReason
    if reason not in (ends.OPTIMAL, ends.FEASIBLE, ends.NO_SOLUTION_FOUND):
        raise RuntimeError(f"{engine} ended with {reason.name}: {result.termination.detail}")
    values = None
    if result.has_primal_feasible_solution():
        found = result.variable_values()
        values = np.array([found[variable] for variable in variables])
    bound = result.termination.objective_bounds.dual_bound
    bound -= _DOUBT * max(1.0, abs(bound)) if np.isfinite(bound) else 0.0
    yield Answer(values, raised(model, model.constant + bound / scale))


def raised(model: LinearModel, bound: float) -> float:
    """A bound on the model, raised to the next objective that a solution can have.

    Where all prices are multiples of u, every objective is the constant plus a multiple of u: whole variables times
    prices, or the largest of such sums. A bound that is above a multiple by less than 1e-6 u counts as that multiple.
    """
    unit = _shared_unit(model)
    if unit is None or not np.isfinite(bound) or len(model.losses) > 0:
        return bound
    return model.constant + math.ceil((bound - model.constant) / unit - 1e-6) * unit


def _prices(model: LinearModel) -> NDArray[np.float64]:
    """What an objective is made of: the costs, and for the busiest worker the prices in its rows."""
    if not model.has_busiest:
        return np.abs(model.cost)
    first = model.neurons + model.workers + model.links
    sums = model.matrix[first : first + 2 * model.workers, :-1]
    return np.concatenate([np.abs(model.cost[:-1]), np.abs(sums.data)])


def _shared_unit(model: LinearModel) -> float | None:
    return common_unit(_prices(model))


def _cost_unit(model: LinearModel) -> float:
    """The unit of CP-SAT's whole costs: one that all prices share, else a fraction of them."""
    prices = _prices(model)
    shared = common_unit(prices)
    return float(prices.sum() / _LARGEST_SUM / np.count_nonzero(prices)) if shared is None else shared


def _whole(prices: NDArray[np.float64], unit: float) -> NDArray[np.int64]:
    """Prices in whole units, rounded down; 1e-9 below a whole number counts as that number."""
    return np.floor(prices / unit + 1e-9).astype(np.int64)


def _add_rows(program: Any, variables: list[Any], model: LinearModel, unit: float) -> None:
    """Rows of x − y − z ≤ 0 as clauses, Σ x = 1 as exactly-one, the others, of whole coefficients, as they are.

    The rows of the busiest worker are in units of prices, rounded down.
    """
    from ortools.sat.python import cp_model

    matrix = model.matrix
    first_link, first_other = model.neurons + model.workers, model.neurons + model.workers + model.links
    for row, (first, end) in enumerate(zip(matrix.indptr[:-1].tolist(), matrix.indptr[1:].tolist(), strict=True)):
        coefficients = matrix.data[first:end]
        literals = [variables[column] for column in matrix.indices[first:end].tolist()]
        if row < model.neurons:
            program.add_exactly_one(literals)
        elif first_link <= row < first_other:
            program.add_bool_or([~v if c > 0 else v for c, v in zip(coefficients, literals, strict=True)])
        elif model.has_busiest and row >= first_other:
            whole = np.where(coefficients < 0, -_whole(-coefficients, unit), 1).tolist()
            program.add_linear_constraint(cp_model.LinearExpr.weighted_sum(literals, whole), 0, 1 << 60)
        else:
            total = cp_model.LinearExpr.weighted_sum(literals, coefficients.astype(np.int64).tolist())
            least, most = int(np.minimum(coefficients, 0).sum()), int(np.maximum(coefficients, 0).sum())
            low, high = max(model.row_lower[row], least - 1), min(model.row_upper[row], most + 1)
            program.add_linear_constraint(total, math.ceil(low), math.floor(high))


def _as_proto(model: LinearModel, scale: float, proto: Any) -> Any:
    """The model with scaled costs and rows written into an empty ModelProto, faster than variable by variable."""
    proto.variables.ids.extend(range(len(model.cost)))
    proto.variables.lower_bounds.extend(model.lower.tolist())
    proto.variables.upper_bounds.extend(model.upper.tolist())
    proto.variables.integers.extend(model.is_integer.tolist())
    cost = model.cost * scale
    entries = model.matrix.tocoo()
    coefficient = entries.data.copy()
    if model.has_busiest:  # t in scaled prices as well
        cost[-1] = 1.0
        coefficient[(entries.row >= model.neurons + model.workers + model.links) & (coefficient < 0)] *= scale
    largest = np.zeros(len(model.row_lower))
    np.maximum.at(largest, entries.row, np.abs(coefficient))
    shrink = np.where(largest > _LARGEST_COEFFICIENT, 1e3 / np.maximum(largest, 1.0), 1.0)
    charged = np.flatnonzero(cost)
    proto.objective.linear_coefficients.ids.extend(charged.tolist())
    proto.objective.linear_coefficients.values.extend(cost[charged].tolist())
    proto.linear_constraints.ids.extend(range(len(model.row_lower)))
    proto.linear_constraints.lower_bounds.extend((model.row_lower * shrink).tolist())
    proto.linear_constraints.upper_bounds.extend((model.row_upper * shrink).tolist())
    order = np.lexsort((entries.col, entries.row))
    proto.linear_constraint_matrix.row_ids.extend(entries.row[order].tolist())
    proto.linear_constraint_matrix.column_ids.extend(entries.col[order].tolist())
    proto.linear_constraint_matrix.coefficients.extend((coefficient * shrink[entries.row])[order].tolist())
    return proto


def _streamed(run: Callable[[Callable[[Answer], None]], None]) -> Iterator[Answer]:
    """What `run` tells, as it tells it: native callbacks come in the middle of a call, which has its own thread."""
    told: queue.SimpleQueue[Answer | BaseException | None] = queue.SimpleQueue()

    def body() -> None:
        try:
            run(told.put)
            told.put(None)
        except BaseException as error:
            told.put(error)

    threading.Thread(target=body, daemon=True).start()
    while (answer := told.get()) is not None:
        if isinstance(answer, BaseException):
            raise answer
        yield answer
