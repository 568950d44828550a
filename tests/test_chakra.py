"""Traces and configuration files for ASTRA-sim: read by protobuf's own library, and run by a small ASTRA-sim."""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_platform import plain, random_works, three_workers

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.platform import astra
from repurpose_opt.platform.chakra import encoded, nodes_of, write_traces
from repurpose_opt.platform.machine import Platform, datacenter
from repurpose_opt.platform.timeline import Sends, Timeline, step_times
from repurpose_opt.platform.work import Work

descriptor_pb2, descriptor_pool, message_factory, unknown_fields, decoder = (
    pytest.importorskip(f"google.protobuf.{module}")
    for module in ("descriptor_pb2", "descriptor_pool", "message_factory", "unknown_fields", "internal.decoder")
)
COMPUTE, SEND, RECEIVE = 4, 5, 6


def timeline_of(works: tuple[Work, ...], platform: Platform, sends: Sends = "serial") -> Timeline:
    return Timeline(platform, 1, sends, None, works, step_times(works, platform, sends), None)


# What protobuf's library reads


@pytest.fixture(scope="module")
def schema() -> tuple[Any, Any]:
    """The classes GlobalMetadata and Node of Chakra's schema 0.0.4, as far as they are written."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package="ChakraProtoMsg", syntax="proto3")

    def add(message: Any, name: str, number: int, kind: int, *, many: bool = False, of: str | None = None) -> Any:
        label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
        return message.field.add(name=name, number=number, type=kind, label=label, type_name=of)

    attribute = file.message_type.add(name="AttributeProto")
    add(attribute, "name", 1, kinds.TYPE_STRING)
    add(attribute, "doc_string", 2, kinds.TYPE_STRING)
    attribute.oneof_decl.add(name="value")
    for name, number, kind in (
        ("double_val", 3, kinds.TYPE_DOUBLE),
        ("float_val", 5, kinds.TYPE_FLOAT),
        ("int32_val", 7, kinds.TYPE_INT32),
        ("int64_val", 9, kinds.TYPE_INT64),
        ("uint32_val", 11, kinds.TYPE_UINT32),
        ("uint64_val", 13, kinds.TYPE_UINT64),
        ("bool_val", 27, kinds.TYPE_BOOL),
        ("string_val", 29, kinds.TYPE_STRING),
    ):
        add(attribute, name, number, kind).oneof_index = 0
    metadata = file.message_type.add(name="GlobalMetadata")
    add(metadata, "version", 1, kinds.TYPE_STRING)
    node = file.message_type.add(name="Node")
    add(node, "id", 1, kinds.TYPE_UINT64)
    add(node, "name", 2, kinds.TYPE_STRING)
    add(node, "type", 3, kinds.TYPE_INT32)  # an enumeration, the same on the wire
    add(node, "ctrl_deps", 4, kinds.TYPE_UINT64, many=True)
    add(node, "data_deps", 5, kinds.TYPE_UINT64, many=True)
    for message, number in ((metadata, 2), (node, 10)):
        add(message, "attr", number, kinds.TYPE_MESSAGE, many=True, of=".ChakraProtoMsg.AttributeProto")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = (pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}") for name in ("GlobalMetadata", "Node"))
    first, second = map(message_factory.GetMessageClass, found)
    return first, second


def messages(data: bytes) -> Iterator[bytes]:
    """The messages of a file, each after its length."""
    position = 0
    while position < len(data):
        size, position = decoder._DecodeVarint(data, position)
        yield data[position : position + size]
        position += size
    assert position == len(data)


def read_nodes(schema: tuple[Any, Any], data: bytes) -> list[Any]:
    first, *rest = messages(data)
    metadata = schema[0].FromString(first)
    assert (metadata.version, len(metadata.attr)) == ("0.0.4", 0)
    nodes = [schema[1].FromString(message) for message in rest]
    assert all(len(unknown_fields.UnknownFieldSet(message)) == 0 for node in nodes for message in (node, *node.attr))
    return nodes


def values(node: Any) -> dict[str, tuple[str, int]]:
    return {a.name: (a.WhichOneof("value"), getattr(a, a.WhichOneof("value"))) for a in node.attr}


def test_a_trace_is_what_protobuf_reads(schema: tuple[Any, Any]) -> None:
    nodes = read_nodes(schema, encoded(nodes_of(three_workers(), 0)))
    assert [(n.id, n.type, list(n.data_deps), list(n.ctrl_deps)) for n in nodes] == [
        (0, COMPUTE, [], []),
        (1, SEND, [0], []),
        (2, SEND, [0], []),
        (3, RECEIVE, [0], []),
        (4, COMPUTE, [1, 2, 3], []),
    ]
    assert [n.name for n in nodes] == ["a.prepare", "a.0-1", "a.0-2", "a.2-0", "a"]
    is_cpu = {"is_cpu_op": ("bool_val", False)}
    assert values(nodes[4]) == {"num_ops": ("int64_val", 10), "tensor_size": ("uint64_val", 40), **is_cpu}
    assert values(nodes[3]) == {
        "comm_size": ("int64_val", 50),
        "comm_src": ("int32_val", 2),
        "comm_dst": ("int32_val", 0),
        "comm_tag": ("int32_val", 0),
        **is_cpu,
    }
    assert [n.type for n in read_nodes(schema, encoded(nodes_of(three_workers(), 2)))] == [SEND, RECEIVE]


def test_large_numbers_survive(schema: tuple[Any, Any]) -> None:
    """A varint of each length up to 63 bits, and a name beyond ASCII."""
    (work,) = three_workers()
    for bits in range(1, 63, 3):
        large = replace(work.compute, operations=np.full(3, 2**bits - 1), memory=np.full(3, 2**bits))
        last = read_nodes(schema, encoded(nodes_of([replace(work, name="ä" * bits, compute=large)], 0)))[-1]
        assert last.name == "ä" * bits
        assert values(last)["num_ops"] == ("int64_val", 2**bits - 1)
        assert values(last)["tensor_size"] == ("uint64_val", 2**bits)


# A small ASTRA-sim, which knows only the files


def simulated(schema: tuple[Any, Any], exported: astra.Export) -> list[int]:
    """Cycles after which each rank has finished, by the rules of its analytical, congestion-unaware backend."""
    network = dict(re.findall(r"(\w+): \[ (\S+) \]", exported.network.read_text()))
    system = json.loads(exported.system.read_text())
    assert json.loads(exported.memory.read_text()) == {"memory-type": "NO_MEMORY_EXPANSION"}
    assert (system["roofline-enabled"], system["scheduling-policy"]) == (1, "LIFO")
    peak, memory = system["peak-perf"] * 1e12, system["local-mem-bw"] * 1e9
    bandwidth, hops = float(network["bandwidth"]) * 2**30 / 1e9, {"FullyConnected": 1, "Switch": 2}[network["topology"]]
    ranks = [read_nodes(schema, path.read_bytes()) for path in exported.traces]
    assert int(network["npus_count"]) == len(ranks)
    todo = [{node.id: node for node in rank} for rank in ranks]
    done: list[set[int]] = [set() for _ in ranks]
    busy: list[set[int]] = [set() for _ in ranks]  # kinds in flight: one computation, one send
    arrived: dict[Any, int] = {}
    posted: dict[Any, tuple[int, int]] = {}
    queue: list[Any] = []
    finished, now = [0] * len(ranks), 0

    def issue(rank: int) -> None:
        for number, node in sorted(todo[rank].items()):
            if not set(node.data_deps) <= done[rank] or (node.type != RECEIVE and node.type in busy[rank]):
                continue
            del todo[rank][number]
            of = {name: value for name, (_, value) in values(node).items()}
            if node.type == COMPUTE:
                rate = min(peak, memory * (of["num_ops"] / of["tensor_size"]))
                heapq.heappush(queue, (now + int(of["num_ops"] / rate * 1e9), rank, number, node.type, None))
                busy[rank].add(node.type)
                continue
            key = (of["comm_src"], of["comm_dst"], of["comm_tag"], of["comm_size"])
            if node.type == SEND:
                delay = int(hops * float(network["latency"]) + of["comm_size"] / bandwidth)
                heapq.heappush(queue, (now + delay, rank, number, node.type, key))
                busy[rank].add(node.type)
            elif key in arrived:
                heapq.heappush(queue, (now, rank, number, node.type, None))
            else:
                posted[key] = (rank, number)

    for rank in range(len(ranks)):
        issue(rank)
    while queue:
        now, rank, number, kind, key = heapq.heappop(queue)
        done[rank].add(number)
        busy[rank].discard(kind)
        finished[rank] = now
        if key is not None:
            assert key not in arrived
            arrived[key] = now
            if key in posted:
                heapq.heappush(queue, (now, *posted[key], RECEIVE, None))
        issue(rank)
    assert not any(todo)
    assert [len(numbers) for numbers in done] == [len(rank) for rank in ranks]
    return finished


def test_what_is_exported_takes_as_long_as_simulated(schema: tuple[Any, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for case in range(25):
        works = random_works(rng)
        platform = plain(
            len(works[0].sent),
            operations=rng.uniform(1e9, 5e9),
            memory_bandwidth=rng.uniform(1e9, 5e9),
            bandwidth=rng.uniform(2e8, 3e9),
            latency=rng.uniform(0, 1e-6),
            topology=rng.choice(["fully_connected", "switch"]),
        )
        timeline = timeline_of(works, platform)
        exported = astra.export(timeline, tmp_path / f"case{case}")
        assert simulated(schema, exported) == timeline.finish.tolist()


def test_a_worker_with_nothing_to_do_has_a_trace(schema: tuple[Any, Any], tmp_path: Path) -> None:
    (work,) = three_workers()
    nothing = np.zeros(3, dtype=np.int64)
    idle = replace(work, sent=work.sent * 0, prepare=replace(work.prepare, operations=nothing), compute=work.compute)
    paths = write_traces([idle], tmp_path / "idle")
    assert [path.name for path in paths] == ["idle.0.et", "idle.1.et", "idle.2.et"]
    assert [len(read_nodes(schema, path.read_bytes())) for path in paths] == [1, 1, 0]


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        (plain(3, memory_bandwidth=1, bandwidth=[[1, 1, 1], [1, 1, 2], [1, 1, 1]]), "bandwidth"),
        (plain(3, memory_bandwidth=1, latency=[[1, 1, 1], [1, 1, 2], [1, 1, 1]]), "latency"),
        (plain(3, operations=[1, 1, 2]), "operations"),
        (plain(3), "memory_bandwidth"),  # infinite
        (plain(3, overhead=1e-6), "overhead"),
    ],
)
def test_platforms_that_astra_sim_does_not_know(platform: Platform, name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as raised:
        astra.export(timeline_of(three_workers(), platform), tmp_path / "new")
    assert raised.value.argument == name
    assert not (tmp_path / "new").exists()


def test_parallel_sends_and_files_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="sends: got parallel"):
        astra.export(timeline_of(three_workers(), datacenter(3), "parallel"), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="directory: got"):
        astra.export(timeline_of(three_workers(), datacenter(3)), tmp_path / "file")


# Running it


def fake(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "astra"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def line(worker: int, cycles: int) -> str:
    """As ASTRA-sim logs it."""
    logged = f"[workload] [info] sys[{worker}] finished, {cycles} cycles, exposed communication 1 cycles."
    return f"echo '[2025-01-26 23:03:37.384] {logged}'"


def test_a_run_of_astra_sim(tmp_path: Path) -> None:
    exported = astra.export(timeline_of(three_workers(), datacenter(3)), tmp_path / "with space")
    lines = "\n".join(line(worker, 10 + worker) for worker in (2, 0, 1))
    binary = fake(tmp_path, f'{lines}\nprintf "%s\\n" "$@" > "{tmp_path}/given"\npwd > "{tmp_path}/where"')
    assert astra.run(exported, binary, 10).tolist() == [10, 11, 12]
    folder = tmp_path / "with space"
    assert (tmp_path / "given").read_text().splitlines() == [
        f"--workload-configuration={folder}/plan",
        f"--system-configuration={folder}/system.json",
        f"--network-configuration={folder}/network.yml",
        f"--remote-memory-configuration={folder}/memory.json",
    ]
    assert (tmp_path / "where").read_text().strip() == str(folder)  # its logs stay out of the user's folder


@pytest.mark.parametrize(
    ("script", "timeout", "reason"),
    [
        (f"{line(0, 1)}\n{line(2, 1)}", 10, "worker 1 did not finish, exit code 0; its last line: [2025"),
        (f"{line(0, 1)}\n{line(1, 1)}\n{line(2, 1)}\necho bad >&2; exit 3", 10, "exit code 3; its last line: bad"),
        ("exec sleep 60", 0.2, "not done after 0.2 s, ended"),
    ],
)
def test_a_run_that_fails(tmp_path: Path, script: str, timeout: float, reason: str) -> None:
    exported = astra.export(timeline_of(three_workers(), datacenter(3)), tmp_path)
    binary = fake(tmp_path, script)
    with pytest.raises(RepurposeError) as raised:
        astra.run(exported, binary, timeout)
    assert str(raised.value).startswith(f"{binary}: {reason}")
    assert "\n" not in str(raised.value)


def test_a_binary_that_is_not_there(tmp_path: Path) -> None:
    exported = astra.export(timeline_of(three_workers(), datacenter(3)), tmp_path)
    with pytest.raises(RepurposeError, match="cannot be run"):
        astra.run(exported, tmp_path / "none", 1)
