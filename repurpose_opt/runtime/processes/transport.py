"""An exchange over torch.distributed that goes on while the worker computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from repurpose_opt.runtime.exchange import Wait
from repurpose_opt.runtime.processes.group import contact

PURPOSE = "exchange values"


def start(
    received: torch.Tensor, sent: torch.Tensor, received_counts: list[int], sent_counts: list[int], at_once: bool
) -> Wait:
    """One all-to-all call of all workers (`at_once`), or a call for each message."""
    with contact(PURPOSE):
        if at_once:
            works = [dist.all_to_all_single(received, sent, received_counts, sent_counts, async_op=True)]
        else:
            works = _to_peers(received, sent, received_counts, sent_counts)

    def wait() -> None:
        with contact(PURPOSE):
            for work in works:
                assert work is not None
                work.wait()

    return wait


def _to_peers(
    received: torch.Tensor, sent: torch.Tensor, received_counts: Sequence[int], sent_counts: Sequence[int]
) -> list[dist.Work | None]:
    # gloo ends a send only when its receive is posted: receives go first, so that no two workers wait for each other.
    # NCCL needs all calls of an exchange in one batch for the same reason.
    sources = zip(received.split(list(received_counts)), range(len(received_counts)), strict=True)
    targets = zip(sent.split(list(sent_counts)), range(len(sent_counts)), strict=True)
    calls = [dist.P2POp(dist.irecv, rows, source) for rows, source in sources if len(rows)]
    calls += [dist.P2POp(dist.isend, rows, target) for rows, target in targets if len(rows)]
    return list(dist.batch_isend_irecv(calls)) if calls else []
