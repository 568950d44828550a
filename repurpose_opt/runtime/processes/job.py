"""What one worker of a plan has to run, and what it counted when it has."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from repurpose_opt.errors import RepurposeError
from repurpose_opt.runtime.inputs import Reader
from repurpose_opt.runtime.layer import Indices, PlannedLayer
from repurpose_opt.runtime.local import Part
from repurpose_opt.runtime.manifest import Manifest
from repurpose_opt.runtime.processes import group
from repurpose_opt.runtime.processes.agreement import Readiness, byte_mismatch, predicted_bytes
from repurpose_opt.runtime.processes.transport import start
from repurpose_opt.runtime.splits import Split
from repurpose_opt.runtime.wire import Wire


@dataclass(frozen=True, eq=False)
class Job:
    """All that one worker needs to run."""

    rank: int
    manifest: Manifest
    part: Part
    reader: Reader
    files: tuple[NDArray[Any], ...]
    """(samples, …) each, memory-mapped: what this worker reads its part of by itself."""
    batch_size: int
    mode: str
    """How the workers get their inputs, in words; the same for all."""
    wire: Wire
    device: torch.device
    batches: Counter[int] = field(default_factory=Counter)
    """How many batches of so many samples have been run."""

    @property
    def output(self) -> Split:
        return self.manifest.splits[self.manifest.steps[-1].name]

    @property
    def layers(self) -> tuple[PlannedLayer, ...]:
        """Those with an exchange, in order."""
        names = {exchange.name for exchange in self.part.exchanges}
        return tuple(layer for layer in self.manifest.layers if layer.name in names)

    def readiness(self) -> Readiness:
        exchanges = self.part.exchanges
        return Readiness(
            digest=self.manifest.digest(),
            mode=self.mode,
            inputs=tuple(inputs.shape for inputs in self.files),
            batch_size=self.batch_size,
            wire=self.wire.name,
            device=self.device.type,
            sent_counts=tuple(tuple(exchange.sent_counts) for exchange in exchanges),
            received_counts=tuple(tuple(exchange.received_counts) for exchange in exchanges),
        )

    @torch.inference_mode()
    def run(self, values: torch.Tensor, samples: int) -> NDArray[Any]:
        """From the part of the inputs that this worker holds to the outputs that it computes.

        (places held, samples, *positions) both; at most `batch_size` samples.
        """
        self.batches[samples] += 1
        with on(self.device):
            output = self.part.run(values.to(self.device), samples, start)
        return np.ascontiguousarray(output.cpu().numpy())


def traffic_report(job: Job, seconds: float) -> tuple[dict[str, Any], str | None]:
    """What all workers have sent, and the pair whose counted bytes are not the predicted ones.

    Every worker calls this at the same point. `seconds` is the time that the batches took.
    """
    exchanges = job.part.exchanges
    sent = np.array([exchange.bytes_sent for exchange in exchanges])
    squares = np.array([exchange.squares.cpu().numpy() for exchange in exchanges])
    counts = group.gather((sent, sum(exchange.messages_sent for exchange in exchanges), squares))
    counted: Indices = np.stack([bytes_sent for bytes_sent, _, _ in counts], axis=1)
    rounded, numbers = np.sum([squares for _, _, squares in counts], axis=0).T
    predicted = _predicted(job)
    batches = job.batches.total()
    report = {
        "samples": sum(samples * count for samples, count in job.batches.items()),
        "batches": batches,
        "seconds": seconds,
        "wire": job.wire.name,
        "messages_per_batch": sum(messages for _, messages, _ in counts) // max(batches, 1),
        "bytes_sent": counted.sum(axis=0).tolist(),
        "bytes_predicted": predicted.sum(axis=0).tolist(),
        "layers": [
            {
                "name": layer.name,
                "bytes_sent": counted[i].tolist(),
                "bytes_predicted": predicted[i].tolist(),
                "wire_nmse": float(rounded[i] / numbers[i]) if numbers[i] else 0.0,
            }
            for i, layer in enumerate(job.layers)
        ],
        "outputs_gathered_on_worker_0": len(np.unique(job.output.places)) > 1,
        "note": "bytes_sent is counted from the tensors handed to torch.distributed, row: source, column: target; "
        "gathering outputs that several workers own is not part of it; wire_nmse is the squared error that a narrower "
        "wire makes of the numbers of the first batch, relative to their squares",
    }
    return report, byte_mismatch(job.layers, counted, predicted)


def _predicted(job: Job) -> Indices:
    """(layers, P, P) bytes of all batches that have been run."""
    layers, wire = job.layers, job.wire.name
    sent = (predicted_bytes(layers, samples, wire) * count for samples, count in job.batches.items())
    return sum(sent, predicted_bytes(layers, 0, wire))


def device_of(kind: str) -> torch.device:
    """The processor, or the GPU of this process by LOCAL_RANK. Raises RepurposeError where there is none."""
    if kind == "cpu":
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise RepurposeError(f"--device cuda: no GPU number {number} here, of {torch.cuda.device_count()}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Tensors that are made within are on the device; on the processor they are without, and faster."""
    return contextlib.nullcontext() if device.type == "cpu" else device
