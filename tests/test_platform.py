"""Platforms, the work of a plan, and its timeline: by hand, by a slow event loop, and by what really runs."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from test_graph_plan import Model, chain, hand_made, inputs_of, spread
from torch import nn

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.exchange import Values
from repurpose_opt.platform.machine import Platform, datacenter, edge, read_platform
from repurpose_opt.platform.picture import _joined, draw_timeline
from repurpose_opt.platform.timeline import Event, Sends, Timeline, simulate, simulate_direct, step_times
from repurpose_opt.platform.work import Demand, Work, direct_work_of, work_of
from repurpose_opt.runtime import simulate as in_process
from repurpose_opt.runtime import steps
from repurpose_opt.runtime.coded import CodedLinear
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.plan import Plan, PlannedLayer
from repurpose_opt.runtime.storage import read_manifest

SERIAL_PARALLEL: tuple[Sends, ...] = ("serial", "parallel")


# Platforms


def test_the_platforms_of_the_paper() -> None:
    for platform, figures in ((datacenter(3), (125e12, 32e9, 150e9)), (edge(3), (0.5e12, 1e9, 100e6))):
        assert platform.n_workers == 3
        given = (platform.operations, platform.memory, platform.bandwidth)
        assert all((values == figure).all() for values, figure in zip(given, figures, strict=True))
        assert any("latency" in line and "memory bandwidth" in line for line in platform.assumptions)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "garage.toml"
    path.write_text(text)
    return path


def test_a_platform_from_a_file(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "operations = [1e9, 2e9]\nbandwidth = [[0, 1e8], [inf, 0]]\nlatency = 1\ntopology = 'switch'\nmemory = 7\n",
    )
    platform = read_platform(path, 2)
    assert (platform.name, platform.hops) == ("garage", 2)
    assert platform.operations.tolist() == [1e9, 2e9]
    assert platform.memory.tolist() == [7, 7]
    assert (platform.bandwidth[0, 1], platform.bandwidth[1, 0]) == (1e8, math.inf)
    assert (platform.latency == 1).all()
    assert platform.assumptions == ("memory_bandwidth of inf: not given", "overhead of 0: not given")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bandwidth = 1", "operations: got nothing"),
        ("operations = 1", "bandwidth: got nothing"),
        ("operations = [1, 2, 3]\nbandwidth = 1", "operations: got 3 numbers; allowed: a number for all, or 2 of them"),
        ("operations = 1\nbandwidth = [[1, 2], [3]]", "bandwidth: got rows of different lengths"),
        ("operations = 1\nbandwidth = [1, 2]", "bandwidth: got 2 numbers; allowed: a number for all, or 2 × 2 of them"),
        ("operations = 1\nbandwidth = 0", "bandwidth: got 0; allowed: numbers > 0"),
        ("operations = nan\nbandwidth = 1", "operations: got nan"),
        ("operations = true\nbandwidth = 1", "operations: got True"),
        ("operations = '1'\nbandwidth = 1", "operations: got '1'"),
        ("operations = 1\nbandwidth = 1\nlatency = inf", "latency: got inf; allowed: finite seconds ≥ 0"),
        ("operations = 1\nbandwidth = 1\noverhead = -1", "overhead: got -1"),
        ("operations = 1\nbandwidth = 1\noverhead = [1, 2]", "overhead: got 2 numbers; allowed: a number"),
        ("operations = 1\nbandwidth = 1\ntopology = 'ring'", "topology: got 'ring'; allowed: fully_connected, switch"),
        ("operations = 1\nbandwidth = 1\nname = 3", "name: got 3; allowed: text"),
        ("operations = 1\nbandwidth = 1\nspeed = 1", "speed: got an unknown key"),
        ("operations = ", "not a TOML file"),
    ],
)
def test_files_that_are_no_platform(tmp_path: Path, text: str, reason: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RepurposeError) as raised:
        read_platform(path, 2)
    assert str(raised.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RepurposeError, match=r"none\.toml: cannot be read"):
        read_platform(tmp_path / "none.toml", 2)


# Timelines by hand. A platform of one operation a nanosecond, one byte a nanosecond and 10 ns of latency.


def plain(n_workers: int, **changes: Any) -> Platform:
    fields: dict[str, Any] = {"operations": 1e9, "bandwidth": 1e9, "latency": 10e-9}
    return Platform.of("plain", n_workers, **(fields | changes))


@torch.no_grad()
def two_workers() -> Plan:
    """3 values, 2 neurons, ReLU, 1 neuron."""
    first = PlannedLayer(
        "0",
        np.array([0, 0, 1]),
        np.array([0, 1]),
        {(0, 1): Values(np.array([0])), (1, 0): Values(np.array([2]))},
        n_workers=2,
        value_bytes=4,
    )
    second = PlannedLayer("2", np.array([0, 1]), np.array([0]), {(1, 0): Values(np.array([1]))}, 2, 4)
    narrowing = nn.Linear(3, 2)
    narrowing.weight[1, 1] = 0
    model = nn.Sequential(narrowing, nn.ReLU(), nn.Linear(2, 1)).eval()
    return Plan(model, (first, second), 2, direct_volume=4 * 3 + 4, stats={})


def nanoseconds(timeline: Timeline) -> list[tuple[int, str, str, int, int]]:
    return [(e.worker, e.step, e.kind, round(e.start * 1e9), round(e.end * 1e9)) for e in timeline.critical_path]


@pytest.mark.parametrize("sends", SERIAL_PARALLEL)
def test_two_workers_by_hand(sends: Sends) -> None:
    """Batches of 2: each message has 8 bytes and takes 18 ns, however it is sent, as no worker sends two."""
    timeline = simulate(two_workers().manifest(), plain(2), 2, sends)
    assert [times.received.tolist() for times in timeline.steps] == [[18, 18], [30, 26], [46, 46]]
    # 2 operations · 2 samples · columns (3, 2), then a value for each of 2 samples, then 2 columns
    assert [times.end.tolist() for times in timeline.steps] == [[30, 26], [32, 28], [54, 46]]
    assert timeline.total == pytest.approx(54e-9)
    assert nanoseconds(timeline) == [
        (1, "0", "send", 0, 18),
        (1, "0", "compute", 18, 26),
        (1, "1", "compute", 26, 28),
        (1, "2", "send", 28, 46),
        (0, "2", "compute", 46, 54),
    ]
    assert timeline.communication_share == pytest.approx(36 / 54)
    waits = [(e.worker, round(e.start * 1e9), round(e.end * 1e9)) for e in timeline.events() if e.kind == "wait"]
    assert waits == [(0, 32, 46)]
    assert timeline.compute[:, 0] * 1e9 == pytest.approx([12, 2, 8])
    assert timeline.communication[:, 1] * 1e9 == pytest.approx([18, 0, 18])


def test_every_value_sent_by_hand() -> None:
    """Worker 0 sends two values of 2 samples; each worker then has all 3 columns."""
    direct = simulate_direct(two_workers().manifest(), plain(2), 2)
    assert direct is not None
    assert [times.end.tolist() for times in direct.steps] == [[38, 38], [40, 40], [66, 58]]
    assert simulate_direct(replace(two_workers(), direct_volume=17).manifest(), plain(2), 2) is None


def demand(*pairs: tuple[int, int]) -> Demand:
    operations, memory = np.array(pairs).T
    return Demand(operations, memory)


def three_workers() -> tuple[Work, ...]:
    """Worker 0 prepares, then sends to both others; worker 2 to worker 0."""
    sent = np.array([[0, 100, 7], [0, 0, 0], [50, 0, 0]])
    return (Work("a", demand((5, 1), (0, 0), (0, 0)), sent, demand((10, 40), (10, 1), (0, 0))),)


@pytest.mark.parametrize(
    ("sends", "platform", "received", "end"),
    [
        # 5 of preparing; 110 to worker 1, then 17 to worker 2; 60 from worker 2. 40 bytes at 2 a nanosecond: 20.
        ("serial", plain(3, memory_bandwidth=2e9), [132, 115, 132], [152, 125, 132]),
        ("parallel", plain(3, memory_bandwidth=2e9), [115, 115, 60], [135, 125, 60]),
        # Two hops: 120, 27 and 70.
        ("serial", plain(3, topology="switch"), [152, 125, 152], [162, 135, 152]),
        # 3 ns before the first message of a worker; worker 1 has none, and waits no shorter for that.
        ("serial", plain(3, overhead=3e-9), [135, 118, 135], [145, 128, 135]),
        # 100 bytes at 3 a nanosecond: 33.3, cut off; 7 and 50 bytes: 2.3 and 16.7.
        ("parallel", plain(3, bandwidth=3e9), [48, 48, 26], [58, 58, 26]),
        # Only the link from 0 to 1 is slow.
        ("serial", plain(3, bandwidth=[[1, 1e8, 1e9], [1e9, 1, 1e9], [1e9, 1e9, 1]]), [1032, 1015, 1032], None),
        # Nothing but hops: worker 1 is twice as fast.
        ("serial", plain(3, bandwidth=math.inf, operations=[1e9, 2e9, 1e9]), [25, 15, 25], [35, 20, 25]),
    ],
)
def test_three_workers_by_hand(sends: Sends, platform: Platform, received: list[int], end: list[int] | None) -> None:
    (times,) = step_times(three_workers(), platform, sends)
    assert times.received.tolist() == received
    assert end is None or times.end.tolist() == end


# Timelines against an event loop, which knows workers, messages and a clock, and no arrays.


def random_works(rng: np.random.Generator) -> tuple[Work, ...]:
    P = int(rng.integers(2, 6))

    def random_demand() -> Demand:
        operations = rng.integers(1, 5000, P) * (rng.random(P) < 0.7)
        return Demand(operations, np.where(operations > 0, rng.integers(1, 9000, P), 0))

    works = []
    for index in range(int(rng.integers(1, 7))):
        sent = (
            rng.choice([8, 600, 2900], (P, P))
            * (rng.random((P, P)) < rng.choice([0.0, 0.3, 0.9]))
            * (1 - np.eye(P, dtype=int))
        )
        works.append(Work(f"s{index}", random_demand(), sent, random_demand()))
    return tuple(works)


def random_platform(rng: np.random.Generator, P: int) -> Platform:
    return plain(
        P,
        operations=rng.uniform(1e9, 5e9, P),
        memory_bandwidth=rng.uniform(1e9, 5e9, P),
        bandwidth=rng.uniform(2e8, 3e9, (P, P)),
        latency=rng.uniform(0, 1e-6, (P, P)),
        overhead=float(rng.choice([0, 250e-9])),
        topology=rng.choice(["fully_connected", "switch"]),
    )


class Loop:
    """Workers that act when something happens to them."""

    def __init__(self, works: Sequence[Work], platform: Platform, sends: Sends) -> None:
        self.works, self.platform, self.sends = works, platform, sends
        self.queue: list[tuple[int, int, Any]] = []
        self.arrived: dict[tuple[int, int], int] = {}
        self.finished: dict[int, int] = {}
        self.count = 0

    def later(self, time: int, action: Any) -> None:
        self.count += 1
        heapq.heappush(self.queue, (time, self.count, action))

    def run(self) -> list[int]:
        workers = [self.worker(k) for k in range(self.platform.n_workers)]
        self.waiting = dict.fromkeys(range(len(workers)), False)
        for worker in workers:
            self.later(0, worker)
        while self.queue:
            self.now, _, action = heapq.heappop(self.queue)
            if isinstance(action, tuple):
                target = action[1]
                self.arrived[action] = self.arrived.get(action, 0) + 1
                if self.waiting[target]:
                    self.waiting[target] = False
                    self.later(self.now, workers[target])
                continue
            pause = next(action, None)
            if pause is not None:
                self.later(self.now + pause, action)
        return [self.finished[k] for k in range(len(workers))]

    def worker(self, k: int) -> Any:
        for number, work in enumerate(self.works):
            yield self.computing(work.prepare, k)
            targets = [t for t in range(len(work.sent)) if work.sent[k, t]]
            sources = sum(1 for p in range(len(work.sent)) if work.sent[p, k])
            if targets or sources:
                yield round(self.platform.overhead * 1e9)
            longest = 0
            for target in targets:
                delay = self.delay(k, target, int(work.sent[k, target]))
                self.later(self.now + delay, (number, target))
                if self.sends == "serial":
                    yield delay
                longest = max(longest, delay)
            if self.sends == "parallel":
                yield longest
            while self.arrived.get((number, k), 0) < sources:
                self.waiting[k] = True
                yield None
            yield self.computing(work.compute, k)
        self.finished[k] = self.now

    def computing(self, demand: Demand, k: int) -> int:
        operations, memory = int(demand.operations[k]), int(demand.memory[k])
        if operations == 0:
            return 0
        peak, bandwidth = float(self.platform.operations[k]), float(self.platform.memory_bandwidth[k])
        return int(operations / min(peak, bandwidth * operations / memory) * 1e9)

    def delay(self, source: int, target: int, size: int) -> int:
        latency, bandwidth = self.platform.latency[source, target], self.platform.bandwidth[source, target]
        return int(self.platform.hops * latency * 1e9 + size / (bandwidth / 1e9))


@pytest.mark.parametrize("sends", SERIAL_PARALLEL)
def test_timelines_against_an_event_loop(sends: Sends) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        works = random_works(rng)
        platform = random_platform(rng, len(works[0].sent))
        timeline = Timeline(platform, 1, sends, None, works, step_times(works, platform, sends), None)
        assert timeline.finish.tolist() == Loop(works, platform, sends).run()
        check_consistent(timeline)


def check_consistent(timeline: Timeline) -> None:
    """Events fill each worker's time, and the critical path is whole and true."""
    finish = timeline.finish / 1e9
    assert (timeline.compute + timeline.communication).sum(axis=0) == pytest.approx(finish)
    assert (finish >= timeline.compute.sum(axis=0) * (1 - 1e-12)).all()
    events = list(timeline.events())
    for worker in range(len(finish)):
        lane = [e for e in events if e.worker == worker]
        assert max((e.end for e in lane), default=0) == pytest.approx(finish[worker])
        computed = sum(e.seconds for e in lane if e.kind == "compute")
        assert computed == pytest.approx(timeline.compute[:, worker].sum())
        if timeline.sends == "serial":
            assert all(before.end == after.start for before, after in pairwise(lane))
            assert not lane or lane[0].start == 0
    path = timeline.critical_path
    assert set(path) <= set(events)
    assert all(before.end == after.start for before, after in pairwise(path))
    assert not path or (path[0].start == 0 and path[-1].end == finish.max())
    assert all(event.kind != "wait" for event in path)
    for before, after in pairwise(path):
        assert after.worker == before.worker or (before.kind, before.target) == ("send", after.worker)


@pytest.mark.parametrize("sends", SERIAL_PARALLEL)
def test_what_is_faster_never_makes_it_slower(sends: Sends) -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        works = random_works(rng)
        platform = random_platform(rng, len(works[0].sent))
        finish = step_times(works, platform, sends)[-1].end
        field = rng.choice(["operations", "memory_bandwidth", "bandwidth"])
        faster = getattr(platform, field) * np.where(rng.random(getattr(platform, field).shape) < 0.3, 3.0, 1.0)
        assert (step_times(works, replace(platform, **{field: faster}), sends)[-1].end <= finish).all()
        assert (step_times(works, platform, "parallel")[-1].end <= finish).all()


# The work of a plan

P = 3


def zoo() -> list[Model]:
    """Every role: a convolution, a depthwise one, pooling, a norm, attention, an embedding, codes, one worker."""
    heads = np.array([0, 2, 1, 2])
    attended = np.tile(np.repeat(heads, 2), 3)
    return [
        Model(
            chain(
                ("conv", nn.Conv2d(4, 6, 3, padding=1)),
                ("relu", nn.ReLU()),
                ("depthwise", nn.Conv2d(6, 6, 3, stride=2, groups=6)),
                ("affine", steps.Affine(6)),
                ("pool", nn.MaxPool2d(2)),
                ("flat", nn.Flatten()),
                ("code", CodedLinear(6, 5, 4)),
                ("gather", steps.Gather()),
                ("softmax", nn.Softmax(-1)),
            ),
            (4, 6, 6),
            spread(4),
            {"conv": spread(6, 1), "code": spread(5, 2)},
        ),
        Model(
            [
                ("embed", nn.Embedding(11, 8), (INPUT,)),
                ("norm", nn.LayerNorm(8), ("embed",)),
                ("qkv", nn.Linear(8, 24), ("norm",)),
                ("attention", steps.Attention(4), ("qkv",)),
                ("out", nn.Linear(8, 8), ("attention",)),
                ("add", steps.Add(), ("out", "embed")),
            ],
            (5,),
            None,
            {"embed": spread(8, 3), "qkv": attended, "out": spread(8, 3)},
            vocabulary=11,
        ),
    ]


@pytest.mark.parametrize(
    ("numbers", "batch_size", "message"),
    [
        ({"bandwidth": 1e-10}, 1, r"platform: got a step of \S+ s; allowed: steps of at most"),
        ({"operations": 1e-10}, 1, r"platform: got a step of \S+ s; allowed: steps of at most"),
        ({"overhead": 1e10}, 1, r"platform: got a step of \S+ s; allowed: steps of at most"),
        ({}, 10**20, r"batch_size: got 10+; allowed: a whole number in 1 …"),
    ],
)
def test_times_beyond_all_measure_are_refused(numbers: dict[str, float], batch_size: int, message: str) -> None:
    steps = chain(("fc", nn.Linear(7, 5)))
    plan = hand_made(Model(steps, (7,), spread(7), {"fc": spread(5, 1)}), density=1.0)
    platform = Platform.of("slow", 3, **{"operations": 1e9, "bandwidth": 1e6} | numbers)
    with pytest.raises(InvalidArgument, match=message):
        simulate(plan.manifest(), platform, batch_size)


@pytest.mark.filterwarnings("error")
def test_the_diagonal_of_the_links_says_nothing() -> None:
    steps = chain(("fc", nn.Linear(7, 5)))
    manifest = hand_made(Model(steps, (7,), spread(7), {"fc": spread(5, 1)}), density=1.0).manifest()
    links = np.full((3, 3), 1e6)
    expected = simulate(manifest, Platform.of("even", 3, operations=1e9, bandwidth=links))
    np.fill_diagonal(links, 0.0)
    assert simulate(manifest, Platform.of("no self", 3, operations=1e9, bandwidth=links)).total == expected.total


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    return [hand_made(model) for model in zoo()]


def test_bytes_are_those_that_really_run(plans: list[Plan]) -> None:
    for plan, model in zip(plans, zoo(), strict=True):
        sent = in_process.simulate(plan, inputs_of(model, 3), batch_size=3).bytes_sent
        works = work_of(plan.manifest(), 3)
        assert np.array_equal(sum(work.sent for work in works), sent)
        assert sent.sum() > 0
        narrow = sum(int(work.sent.sum()) for work in work_of(plan.manifest(), 3, "float16"))
        assert sent.sum() / 2 <= narrow < sent.sum()  # statistics are sent as they are


def test_products_move_their_weights_inputs_and_outputs(plans: list[Plan]) -> None:
    """Of what is really saved for each worker, and of the shapes of what it reads and makes."""
    batch, checked = 2, 0
    for plan in plans:
        works = {work.name: work for work in work_of(plan.manifest(), batch)}
        layers = {layer.name: layer for layer in plan.layers if layer.weight_macs}
        for worker in range(P):
            for part in plan.sub_model(worker):
                if part.name in layers and len(part.rows):
                    layer, work = layers[part.name], works[part.name]
                    columns = len(part.columns) + len(layer.encoded(worker))
                    if part.encoder is not None:
                        columns += len(layer.held(worker))  # read once more, to encode them
                    outputs = len(part.rows) * plan.splits[part.name].n_positions
                    moved = part.nbytes + 4 * batch * (columns * layer.positions + outputs)
                    assert work.prepare.memory[worker] + work.compute.memory[worker] == moved
                    checked += 1
    assert checked >= 8


def test_operations_of_products_by_hand() -> None:
    """Where every value is sent, the workers together do what the model does in one process, here for 4 samples.

    torch.utils.flop_counter counts the same for all but attention, which it does not know on a CPU.
    """
    expected = {
        "conv": 2 * 4 * (6 * 6) * 6 * (4 * 3 * 3),
        "depthwise": 2 * 4 * (2 * 2) * 6 * (3 * 3),
        "qkv": 2 * 4 * 5 * 8 * 24,
        "attention": 2 * 4 * (5 * 5) * (4 * 2) * 2,  # tokens², heads · size; q kᵀ and the sum over v
        "out": 2 * 4 * 5 * 8 * 8,
    }
    works = [work for model in zoo() for work in work_of(hand_made(model, density=1.0).manifest(), 4)]
    found = {work.name: int(work.compute.operations.sum()) for work in works}
    assert {name: found[name] for name in expected} == expected


def test_other_steps_count_what_they_read(plans: list[Plan]) -> None:
    convolutional, tokens = ({work.name: work for work in work_of(plan.manifest(), 2)} for plan in plans)
    held = np.bincount(spread(6, 1), minlength=P)
    assert np.array_equal(convolutional["relu"].compute.operations, 2 * 36 * held)
    assert np.array_equal(convolutional["affine"].compute.memory, 4 * (2 * held + 2 * 2 * 4 * held))
    assert np.array_equal(convolutional["pool"].compute.operations, 2 * 4 * held)
    assert convolutional["flat"].compute.operations.sum() == convolutional["gather"].compute.operations.sum() == 0
    assert convolutional["softmax"].compute.operations.tolist() == [0, 10, 0]
    code = convolutional["code"].prepare.operations
    encoded = [4 * len(plans[0].layers[1].encoded(k)) * held[k] for k in range(P)]
    assert code.tolist() == encoded
    assert sum(encoded) > 0
    held = np.bincount(spread(8, 3), minlength=P)
    assert np.array_equal(tokens["norm"].prepare.operations, 2 * 5 * held)
    assert np.array_equal(tokens["norm"].compute.operations, 2 * 5 * held)
    assert np.array_equal(tokens["norm"].compute.memory, 4 * (2 * held + 2 * 2 * 5 * held))
    assert np.array_equal(tokens["add"].compute.operations, 2 * 2 * 5 * held)
    assert np.array_equal(tokens["embed"].compute.operations, 2 * 5 * held)
    assert np.array_equal(tokens["embed"].compute.memory, 4 * 2 * (2 * 5 * held))  # a row of the table for each token


def test_codes_are_left_out_where_every_value_is_sent(plans: list[Plan]) -> None:
    products = [layer for layer in plans[0].layers if layer.weight_macs]
    sizes = [
        layer.value_bytes * len(layer.held(p)) * (p != k) for layer in products for p in range(P) for k in range(P)
    ]
    plan = replace(plans[0], direct_volume=sum(sizes))
    works = direct_work_of(plan.manifest(), 2)
    assert works is not None
    code = next(work for work in works if work.name == "code")
    assert code.prepare.operations.sum() == 0
    assert code.compute.operations.sum() == 2 * 2 * 6 * 5
    assert code.sent.sum() == 2 * 4 * 6 * (P - 1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"platform": edge(2)}, "platform"),
        ({"batch_size": 0}, "batch_size"),
        ({"wire": "float64"}, "wire"),
        ({"sends": "both"}, "sends"),
    ],
)
def test_wrong_arguments(plans: list[Plan], arguments: dict[str, Any], name: str) -> None:
    fine: dict[str, Any] = {"manifest": plans[0].manifest(), "platform": edge(P)}
    with pytest.raises(InvalidArgument) as raised:
        simulate(**(fine | arguments))
    assert raised.value.argument == name


def test_whether_weights_fit(plans: list[Plan], tmp_path: Path) -> None:
    plans[0].save(tmp_path / "plan")
    manifest = read_manifest(tmp_path / "plan")
    sizes = [file.size for file in manifest.files]
    tight = plain(P, memory=[sizes[0], sizes[1] - 1, sizes[2]])
    assert simulate(manifest, tight).does_not_fit == (1,)
    assert simulate(plans[0].manifest(), tight).does_not_fit == ()  # not saved: not known


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture(tmp_path: Path, suffix: Literal[".png", ".svg"]) -> None:
    path = tmp_path / f"timeline{suffix}"
    draw_timeline(simulate(two_workers().manifest(), plain(2), 2), path)
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
    else:
        for text in (
            b"worker 1",
            b"critical path",
            b"ns, one batch of 2 on plain",
            b"#0072b2",
            b"#e69f00",
            b"#dddddd",
            b"stroke-width: 1.2",
        ):
            assert text in data, text


def test_sends_that_overlap_or_touch_are_one_bar() -> None:
    spans = [(0, 1.0, 5.0), (0, 1.0, 3.0), (0, 5.0, 6.0), (0, 7.0, 8.0), (1, 7.5, 9.0)]
    events = [Event(worker, "a", "send", start, end, 2) for worker, start, end in spans]
    assert _joined(events) == [(0, 1.0, 6.0), (0, 7.0, 8.0), (1, 7.5, 9.0)]


def test_a_picture_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"picture: got a\.pdf"):
        draw_timeline(simulate(two_workers().manifest(), plain(2)), tmp_path / "a.pdf")
