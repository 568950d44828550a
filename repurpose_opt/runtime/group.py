"""The processes of one run talking to each other: torch.distributed over gloo, with errors of one line."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from repurpose_opt.errors import RepurposeError

LOST_CONTACT = "another worker ended or fell silent"


class SharedError(RepurposeError):
    """An error that every process of the run has reached at the same point; one of them reports it."""


class LostContact(RepurposeError):
    """Another process of the run ended or fell silent."""


def rank_and_size() -> tuple[int, int]:
    """This process and how many there are, as torchrun says. Raises RepurposeError without torchrun."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        start = "torchrun --nproc-per-node=P -m repurpose_opt.runtime.worker PLAN …"
        raise RepurposeError(f"a worker is one process of several: start them with {start}") from None


@contextlib.contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """Join the run; no call waits for another process longer than `timeout` seconds."""
    with contact("join the other workers"):
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
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


def all_to_all(received: torch.Tensor, sent: torch.Tensor, received_counts: list[int], sent_counts: list[int]) -> None:
    """Send a run of rows of `sent` to each process and fill `received` with those of each process."""
    with contact("exchange values"):
        dist.all_to_all_single(received, sent, received_counts, sent_counts)


def send(tensor: torch.Tensor, target: int) -> None:
    with contact(f"send the outputs to worker {target}"):
        dist.send(tensor, target)


def receive(tensor: torch.Tensor, source: int) -> None:
    with contact(f"receive the outputs of worker {source}"):
        dist.recv(tensor, source)


@contextlib.contextmanager
def contact(purpose: str) -> Iterator[None]:
    """Turn what gloo raises into one line: this worker cannot `purpose`. Raises LostContact."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError for a peer that ended and for one that is silent, with a place in its
        # source in brackets before the reason and advice after it.
        reason = re.sub(r"^\[[^]]*\] ", "", str(error).strip()).splitlines()[0].split(". ")[0]
        rank, _ = rank_and_size()
        raise LostContact(f"worker {rank} cannot {purpose}: {LOST_CONTACT} ({reason})") from None
