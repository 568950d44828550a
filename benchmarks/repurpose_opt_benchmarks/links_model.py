"""What the simulator says about the workers and links of a run, with rates found in the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repurpose_opt.platform.machine import HOPS, Platform, Topology
from repurpose_opt.platform.timeline import simulate
from repurpose_opt.platform.work import work_of
from repurpose_opt.runtime.manifest import Manifest
from repurpose_opt_benchmarks.links_namespaces import LINKS

TOPOLOGY: Topology = "switch"
BULK = 1_000_000
"""Bytes of the messages by which the rate of the loopback interface is measured."""
Row = dict[str, Any]


def calibrated(link: str, link_rows: Sequence[Row], own_rows: Sequence[Row], manifest: Manifest) -> Platform:
    """The platform of one link, for a plan and a batch size.

    Operations a second are those of the plan without its exchanges, all workers at once, by the order in which they are
    done: they take turns on fewer cores. Latency is that of an exchange of 4 bytes between all pairs, whose messages go
    one after the other. Bandwidth is the link's, without headers; the loopback interface's is measured.
    """
    P = manifest.n_workers
    small = median(seconds for row in link_rows for seconds in row["all_pairs"])
    bandwidth = LINKS[link].payload_rate
    if bandwidth is None:
        bulk = median(seconds for row in link_rows for seconds in row["next"][str(BULK)])
        bandwidth = BULK / bulk
    return Platform.of(
        link,
        P,
        operations=operations(manifest, int(own_rows[0]["batch_size"])).mean() / seconds_in_order(own_rows),
        bandwidth=bandwidth,
        latency=small / (HOPS[TOPOLOGY] * (P - 1)),
        topology=TOPOLOGY,
    )


def operations(manifest: Manifest, batch_size: int) -> NDArray[np.float64]:
    """(P,) of a batch."""
    demands = [demand for work in work_of(manifest, batch_size) for demand in (work.prepare, work.compute)]
    total: NDArray[np.float64] = np.sum([demand.operations for demand in demands], axis=0).astype(np.float64)
    return total


def seconds_in_order(rows: Sequence[Row]) -> NDArray[np.float64]:
    """(P,) of computing a batch: the worker that is done first, the next one, …; median over the rounds."""
    seconds: NDArray[np.float64] = np.median([row["compute_in_order"] for row in rows], axis=0)
    return seconds


def predicted_communication(manifest: Manifest, platform: Platform, batch_size: int, wire: str | None) -> float:
    """Seconds in which the worker that communicates longest sends or waits.

    Which worker computes first changes from batch to batch: the mean over all orders.
    """
    return mean(_longest(manifest, each, batch_size, wire) for each in _orders(platform))


def _orders(platform: Platform) -> Iterator[Platform]:
    for order in permutations(range(platform.n_workers)):
        yield replace(platform, operations=platform.operations[list(order)])


def _longest(manifest: Manifest, platform: Platform, batch_size: int, wire: str | None) -> float:
    timeline = simulate(manifest, platform, batch_size, sends="serial", wire=wire)
    return float(timeline.communication.sum(axis=0).max())
