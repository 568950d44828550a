"""The processes of one run talking to each other: torch.distributed over gloo, with errors of one line."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from repurpose_opt.errors import RepurposeError


class SharedError(RepurposeError):
    """An error that every process of the run has reached at the same point; one of them reports it."""


class LostContact(RepurposeError):
    """Another process of the run ended or fell silent."""


class Activity:
    """What this process is doing: it waits for others, or it works by itself."""

    def __init__(self) -> None:
        self.purpose: str | None = None
        """What it waits for the others to do with it; None while it works by itself."""
        self.since = time.monotonic()
        """Seconds."""

    def becomes(self, purpose: str | None) -> None:
        self.purpose, self.since = purpose, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since


ACTIVITY = Activity()
"""Of this process; torch.distributed has one default group in a process too."""


def rank_and_size() -> tuple[int, int]:
    """This process and how many there are, as torchrun says. Raises RepurposeError without torchrun."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        start = "torchrun --nproc-per-node=P --no-python repurpose-opt worker PLAN …"
        raise RepurposeError(f"a worker is one process of several: start them with {start}") from None


@contextlib.contextmanager
def process_group(timeout: float, store: Store | None = None, device: str = "cpu") -> Iterator[None]:
    """Connect to the others; no call waits for another process longer than `timeout` seconds.

    Tensors of the processor go by gloo; with `device` "cuda", those of a GPU by NCCL. `store`: where the processes find
    each other; None: that of MASTER_ADDR and MASTER_PORT. Raises LostContact.
    """
    rank, size = rank_and_size()
    with contact("connect to the other workers"):
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(item: Any) -> list[Any]:
    """The item of every process, by rank."""
    items: list[Any] = [None] * dist.get_world_size()
    with contact("compare with the other workers"):
        dist.all_gather_object(items, item)
    return items


def barrier() -> None:
    """Wait until every process is here."""
    with contact("wait for the other workers"):
        dist.barrier()


def broadcast(tensor: torch.Tensor, purpose: str) -> None:
    """Fill `tensor` everywhere with that of process 0."""
    with contact(purpose):
        dist.broadcast(tensor, 0)


def deal(parts: Sequence[torch.Tensor], what: str) -> None:
    """Send process 1 the first part, process 2 the second, and so on; empty ones are not sent."""
    with contact(f"send the {what} to the other workers"):
        for work in [dist.isend(part, target) for target, part in enumerate(parts, start=1) if part.numel()]:
            assert work is not None
            work.wait()


def send(tensor: torch.Tensor, target: int, what: str) -> None:
    with contact(f"send the {what} to worker {target}"):
        dist.send(tensor, target)


def receive(tensor: torch.Tensor, source: int, what: str) -> None:
    with contact(f"receive the {what} of worker {source}"):
        dist.recv(tensor, source)


@contextlib.contextmanager
def contact(purpose: str) -> Iterator[None]:
    """Turn what gloo raises into one line: this worker cannot `purpose`. Raises LostContact."""
    ACTIVITY.becomes(purpose)
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError for a peer that ended and for one that is silent, with a place in its
        # source in brackets before the reason and advice after it.
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).splitlines()[0].split(". ")[0]
        rank, _ = rank_and_size()
        raise LostContact(f"worker {rank} cannot {purpose} ({reason})") from None
    finally:
        ACTIVITY.becomes(None)
