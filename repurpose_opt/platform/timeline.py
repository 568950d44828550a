"""When each worker computes, sends and waits: the work of a plan on a platform.

Times are whole nanoseconds, cut off as ASTRA-sim's analytical backend cuts them, so that with serial sends both agree
to the nanosecond. A computation takes operations / min(peak, memory bandwidth · operations / bytes), the roofline
model; a message takes hops · latency + bytes / bandwidth of its pair. With serial sends a worker has one message in
flight, in the order of the receivers' numbers; with parallel sends all that it sends in a step are under way at once,
each at the full bandwidth of its pair. A worker computes on when its own messages of the step and those to it are
through, and takes the steps in order; what the runtime computes from held values meanwhile is not told apart, so that
times are an upper limit there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from repurpose_opt.errors import InvalidArgument
from repurpose_opt.platform.machine import Numbers, Platform
from repurpose_opt.platform.work import Demand, Work, direct_work_of, weight_bytes, work_of
from repurpose_opt.runtime.layer import Indices
from repurpose_opt.runtime.manifest import Manifest

Sends: TypeAlias = Literal["serial", "parallel"]
Kind: TypeAlias = Literal["compute", "overhead", "send", "wait"]

NANOSECONDS = 1e9
"""In a second."""
_LONGEST = 1e15
"""Nanoseconds of one step: int64 holds the sum of thousands."""
PEAK_UNIT, MEMORY_UNIT = 1e12, 1e9
"""Operations and bytes a second in which ASTRA-sim's configuration is written."""


@dataclass(frozen=True)
class Event:
    """What one worker does from `start` to `end`, in seconds."""

    worker: int
    step: str
    kind: Kind
    """send: until the message has arrived; wait: for messages of others."""
    start: float
    end: float
    target: int | None = None
    """The worker that a message is sent to."""

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class StepTimes:
    """One step on all workers, in nanoseconds from the beginning of the batch, whole numbers."""

    begin: Indices
    """(P,) when each worker comes to the step."""
    prepared: Indices
    """(P,) when what is computed before the exchange is done."""
    ready: Indices
    """(P,) when the first message leaves: `prepared` and the platform's overhead."""
    departure: Indices
    """(P, P) when the message from worker p (row) to worker k (column) leaves; `ready` where there is none."""
    arrival: Indices
    """(P, P) when it arrives; `ready` where there is none."""
    received: Indices
    """(P,) when a worker's messages and those to it are through."""
    end: Indices
    """(P,) when the step is done."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """One batch of a plan on a platform."""

    platform: Platform
    batch_size: int
    sends: Sends
    wire: str | None
    work: tuple[Work, ...]
    steps: tuple[StepTimes, ...]
    """As many as in `work`."""
    weights: Indices | None
    """(P,) bytes of each worker's weights; None where they are not known."""

    @property
    def finish(self) -> Indices:
        """(P,) nanoseconds until each worker is done."""
        return self.steps[-1].end

    @property
    def total(self) -> float:
        """Seconds until the last worker is done."""
        return float(self.finish.max() / NANOSECONDS)

    @cached_property
    def compute(self) -> Numbers:
        """(steps, P) seconds in which each worker computes."""
        return np.array([(t.prepared - t.begin) + (t.end - t.received) for t in self.steps]) / NANOSECONDS

    @cached_property
    def communication(self) -> Numbers:
        """(steps, P) seconds in which each worker sends or waits; with `compute` it adds up to `finish`."""
        return np.array([t.received - t.prepared for t in self.steps]) / NANOSECONDS

    @property
    def does_not_fit(self) -> tuple[int, ...]:
        """Workers whose weights alone take more than their memory."""
        if self.weights is None:
            return ()
        return tuple(np.flatnonzero(self.weights > self.platform.memory).tolist())

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the times rest on besides what is given."""
        flight = "one message of a worker is in flight, by number of the target"
        if self.sends == "parallel":
            flight = "all that a worker sends in a step is under way at once"
        return (
            *self.platform.assumptions,
            f"{self.sends} sends: {flight}",
            "no message slows another down on its link",
            "a worker computes on when its messages of the step and those to it are through",
            "a computation takes the longer of its operations at full rate and its bytes at memory bandwidth",
        )

    def events(self) -> Iterator[Event]:
        """Step by step, worker by worker, in order of time; parallel sends of one worker overlap."""
        for work, times in zip(self.work, self.steps, strict=True):
            for worker in range(self.platform.n_workers):
                yield from _events(work, times, worker)

    @cached_property
    def critical_path(self) -> tuple[Event, ...]:
        """Computations and messages one after the other, without a gap, from the beginning to the last end.

        Where several would do, it stays on the worker as long as it can, then takes the first of the senders.
        """
        path: list[Event] = []
        worker = int(self.finish.argmax())
        for work, times in zip(reversed(self.work), reversed(self.steps), strict=True):
            pieces, worker = _critical(work, times, worker, self.sends)
            path += pieces
        return tuple(reversed(path))

    @property
    def communication_share(self) -> float:
        """The fraction of the critical path that is not computing; 0 where nothing takes time."""
        seconds = sum(event.seconds for event in self.critical_path if event.kind != "compute")
        return seconds / self.total if self.total else 0.0


def simulate(
    manifest: Manifest, platform: Platform, batch_size: int = 1, sends: Sends = "serial", wire: str | None = None
) -> Timeline:
    """One batch of a plan on a platform; weights are not needed.

    batch_size   samples
    sends        serial: a worker has one message in flight; parallel: all that it sends in a step
    wire         as for `runtime.wire`; None: the dtype of the plan

    Raises InvalidArgument where the platform has another number of workers, and for the arguments of `work_of`.
    """
    _check_workers(manifest, platform)
    work = work_of(manifest, batch_size, wire)
    steps = step_times(work, platform, sends)
    return Timeline(platform, batch_size, sends, wire, work, steps, weight_bytes(manifest))


def simulate_direct(
    manifest: Manifest, platform: Platform, batch_size: int = 1, sends: Sends = "serial", wire: str | None = None
) -> Timeline | None:
    """The same where every value is sent, with the owners of the plan; None where that is not its direct model."""
    _check_workers(manifest, platform)
    work = direct_work_of(manifest, batch_size, wire)
    if work is None:
        return None
    return Timeline(platform, batch_size, sends, wire, work, step_times(work, platform, sends), None)


def _check_workers(manifest: Manifest, platform: Platform) -> None:
    if platform.n_workers != manifest.n_workers:
        raise InvalidArgument("platform", f"{platform.n_workers} workers", f"the plan's {manifest.n_workers}")


def step_times(work: Sequence[Work], platform: Platform, sends: Sends = "serial") -> tuple[StepTimes, ...]:
    """The times of each step. Raises InvalidArgument for other sends than serial and parallel."""
    if sends not in get_args(Sends):
        raise InvalidArgument("sends", repr(sends), ", ".join(get_args(Sends)))
    begin, overhead = np.zeros(platform.n_workers, dtype=np.int64), _whole(np.round(platform.overhead * NANOSECONDS))
    found = []
    for step in work:
        prepared = begin + duration(step.prepare, platform)
        ready = prepared + overhead * step.participants
        taken = transfer(step.sent, platform)
        before = np.cumsum(taken, axis=1) - taken if sends == "serial" else np.zeros_like(taken)
        departure = ready[:, None] + np.where(step.sent > 0, before, 0)
        arrival = departure + taken
        received = np.maximum(arrival.max(axis=1), np.where(step.sent > 0, arrival, 0).max(axis=0))
        end = received + duration(step.compute, platform)
        found.append(StepTimes(begin, prepared, ready, departure, arrival, received, end))
        begin = end
    return tuple(found)


def duration(demand: Demand, platform: Platform) -> Indices:
    """(P,) nanoseconds that a computation takes."""
    # There and back through the units of its configuration, as ASTRA-sim reads it: the last bit may differ.
    peak = platform.operations / PEAK_UNIT * PEAK_UNIT
    bandwidth = platform.memory_bandwidth / MEMORY_UNIT * MEMORY_UNIT
    operations, memory = demand.operations.astype(np.float64), np.maximum(demand.memory, 1)
    is_computed = demand.operations > 0
    rate = np.minimum(peak, bandwidth * np.where(is_computed, operations / memory, 1.0))
    return _whole(operations / rate * NANOSECONDS)


def transfer(sent: Indices, platform: Platform) -> Indices:
    """(P, P) nanoseconds that each message takes; 0 where nothing is sent."""
    is_sent = sent > 0  # elsewhere the diagonal may say anything
    latency = np.where(is_sent, platform.latency, 0.0) * NANOSECONDS
    per_nanosecond = np.where(is_sent, platform.bandwidth, np.inf) / NANOSECONDS
    return _whole(platform.hops * latency + sent / per_nanosecond)


def _whole(nanoseconds: ArrayLike) -> Indices:
    """Cut off. Raises InvalidArgument where int64 could not hold the sum of many such times."""
    times = np.asarray(nanoseconds, dtype=np.float64)
    if not (times <= _LONGEST).all():
        allowed = f"steps of at most {_LONGEST / NANOSECONDS:g} s"
        raise InvalidArgument("platform", f"a step of {times.max() / NANOSECONDS:g} s", allowed)
    return times.astype(np.int64)


def _events(work: Work, times: StepTimes, worker: int) -> Iterator[Event]:
    begin, prepared, ready = int(times.begin[worker]), int(times.prepared[worker]), int(times.ready[worker])
    if prepared > begin:
        yield _event(work, worker, "compute", begin, prepared)
    if ready > prepared:
        yield _event(work, worker, "overhead", prepared, ready)
    for target in np.flatnonzero(work.sent[worker]).tolist():
        yield _send(work, times, worker, target)
    sent, received, end = int(times.arrival[worker].max()), int(times.received[worker]), int(times.end[worker])
    if received > sent:
        yield _event(work, worker, "wait", sent, received)
    if end > received:
        yield _event(work, worker, "compute", received, end)


def _critical(work: Work, times: StepTimes, worker: int, sends: Sends) -> tuple[list[Event], int]:
    """What of one step decides when a worker is done with it, last first; and the worker that it leads back to."""
    path, received = [], int(times.received[worker])
    if times.end[worker] > received:
        path.append(_event(work, worker, "compute", received, int(times.end[worker])))
    source = worker
    if times.arrival[worker].max() < received:
        source = int(np.flatnonzero((work.sent[:, worker] > 0) & (times.arrival[:, worker] == received))[0])
    arrival = times.arrival[source]
    targets = np.flatnonzero(work.sent[source])
    if source != worker:
        targets = targets[targets <= worker]
    if sends == "parallel":
        targets = targets[arrival[targets] == received][-1:]
    path += [_send(work, times, source, target) for target in reversed(targets.tolist())]
    begin, prepared, ready = int(times.begin[source]), int(times.prepared[source]), int(times.ready[source])
    if ready > prepared:
        path.append(_event(work, source, "overhead", prepared, ready))
    if prepared > begin:
        path.append(_event(work, source, "compute", begin, prepared))
    return path, source


def _event(work: Work, worker: int, kind: Kind, start: int, end: int, target: int | None = None) -> Event:
    return Event(worker, work.name, kind, start / NANOSECONDS, end / NANOSECONDS, target)


def _send(work: Work, times: StepTimes, worker: int, target: int) -> Event:
    start, end = int(times.departure[worker, target]), int(times.arrival[worker, target])
    return _event(work, worker, "send", start, end, target)
