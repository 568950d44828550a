"""Chakra execution traces: a graph of computations and messages for each worker, as ASTRA-sim reads it.

A file is a sequence of protobuf messages of the package ChakraProtoMsg (MLCommons Chakra, schema 0.0.4), each with its
length before it: one GlobalMetadata, then the Nodes. So few fields need no library: see
https://protobuf.dev/programming-guides/encoding for the wire format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

from repurpose_opt.platform.work import Demand, Work

SCHEMA = "0.0.4"
_METADATA_VERSION = 1
_NODE_ID, _NODE_NAME, _NODE_TYPE, _NODE_DATA_DEPS, _NODE_ATTR = 1, 2, 3, 5, 10
_ATTR_NAME = 1
_TYPES = {"compute": 4, "send": 5, "receive": 6}
_VALUES = {"int32": 7, "int64": 9, "uint64": 13, "bool": 27}
"""Field of an attribute's value, by its type; a reader takes a value of another type for 0."""
_VARINT, _BYTES = 0, 2

Kind: TypeAlias = Literal["compute", "send", "receive"]
Attribute: TypeAlias = tuple[str, str, int]
"""Name, type (a key of _VALUES) and value ≥ 0."""


@dataclass(frozen=True)
class Node:
    """One computation or message of one worker."""

    number: int
    name: str
    kind: Kind
    after: tuple[int, ...]
    """Numbers of the nodes that must be done before."""
    attributes: tuple[Attribute, ...]


def nodes_of(work: Sequence[Work], worker: int) -> tuple[Node, ...]:
    """What one worker does, in order: of each step the preparation, its messages by target, those to it, the rest."""
    nodes: list[Node] = []
    after: tuple[int, ...] = ()

    def add(name: str, kind: Kind, *attributes: Attribute) -> int:
        nodes.append(Node(len(nodes), name, kind, after, attributes))
        return len(nodes) - 1

    for tag, step in enumerate(work):
        if step.prepare.operations[worker]:
            after = (add(f"{step.name}.prepare", "compute", *_computation(step.prepare, worker)),)
        messages = [(worker, target) for target in step.sent[worker].nonzero()[0].tolist()]
        messages += [(source, worker) for source in step.sent[:, worker].nonzero()[0].tolist()]
        numbers = [
            add(
                f"{step.name}.{source}-{target}",
                "send" if source == worker else "receive",
                *_message(source, target, int(step.sent[source, target]), tag),
            )
            for source, target in messages
        ]
        after = tuple(numbers) or after
        if step.compute.operations[worker]:
            after = (add(step.name, "compute", *_computation(step.compute, worker)),)
    return tuple(nodes)


def write_traces(work: Sequence[Work], prefix: Path) -> list[Path]:
    """Writes PREFIX.{worker}.et for each worker; returns the files."""
    paths = []
    for worker in range(len(work[0].sent)):
        path = prefix.with_name(f"{prefix.name}.{worker}.et")
        path.write_bytes(encoded(nodes_of(work, worker)))
        paths.append(path)
    return paths


def encoded(nodes: Iterable[Node]) -> bytes:
    """The content of a trace."""
    messages = [_text(_METADATA_VERSION, SCHEMA), *map(_node, nodes)]
    return b"".join(_varint(len(message)) + message for message in messages)


def _computation(demand: Demand, worker: int) -> tuple[Attribute, ...]:
    return (
        ("is_cpu_op", "bool", 0),
        ("num_ops", "int64", int(demand.operations[worker])),
        ("tensor_size", "uint64", int(demand.memory[worker])),
    )


def _message(source: int, target: int, size: int, tag: int) -> tuple[Attribute, ...]:
    return (
        ("is_cpu_op", "bool", 0),
        ("comm_size", "int64", size),
        ("comm_src", "int32", source),
        ("comm_dst", "int32", target),
        ("comm_tag", "int32", tag),
    )


def _node(node: Node) -> bytes:
    return b"".join(
        [
            _number(_NODE_ID, node.number),
            _text(_NODE_NAME, node.name),
            _number(_NODE_TYPE, _TYPES[node.kind]),
            *([_field(_NODE_DATA_DEPS, b"".join(map(_varint, node.after)))] if node.after else []),
            *(_attribute(*attribute) for attribute in node.attributes),
        ]
    )


@lru_cache(2**16)
def _attribute(name: str, kind: str, value: int) -> bytes:
    return _field(_NODE_ATTR, _text(_ATTR_NAME, name) + _number(_VALUES[kind], value))


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    content = bytearray()
    while value > 0x7F:
        content.append(value & 0x7F | 0x80)
        value >>= 7
    content.append(value)
    return bytes(content)
