"""The README.md of an exported plan: all that it takes to write a runtime for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CALLS = {
    "torch-export": """\
    program = torch.export.load(file).module()
    results = program(*inputs)          # tensors in the order of "inputs"; a tuple in the order of "outputs"

`torch.export.passes.move_to_device_pass` moves a program to a GPU. Open a .pt2 only if you trust it.""",
    "onnx": """\
    session = onnxruntime.InferenceSession(file)
    results = session.run(None, dict(zip(names, inputs)))       # a list in the order of "outputs"

Inputs and outputs of a program have the names that exchange.json gives them. A program whose weights do not fit into
one file has them in FILE.data.""",
}

_GUIDE = """\
# A network for {n_workers} workers

Written by repurpose-opt {version}. Each worker runs its own programs, which have no more than its own weights, and
between them exchanges numbers with other workers. `exchange.json` says who runs, sends and receives what; nothing else
is needed.

## One worker

`workers[k].stages` are run in order. Between stage s and stage s + 1, all workers take part in `exchanges[s]`; there is
one stage more than there are exchanges. A worker does

{loop}

where `part` is its part of the input, `samples` ≥ 1 the number of samples in this batch, `programs[s]` runs the file of
stage s, and `send` and `receive` are the transport. Receives are to be posted before sends where a send waits for its
receive. What is sent are the rows of an array in C order, of `dtype` numbers: one run of memory for each target.

{calls}

## exchange.json

- `format`, `version`: {format!r}, {format_version}. `plan_sha256` is the digest of the plan.
- `dtype`: of all weights, messages and answers. `programs`: the kind of the files.
- `input`, `output`: `shape` is that of one sample, so that a batch is (samples, *shape), and `axis` the axis of the
  batch along which it is split: worker k holds `places[k]` of it, in this order. Its part is an array with these places
  as first axis, then the samples, then the other axes: `moveaxis(take(batch, places[k], axis), axis, 0)`. Where
  `places` is null, every worker has the whole batch, as it is. The outputs of all workers, put at their places, are the
  answer.
- `exchanges`: `before` is the layer of the model that needs it, `positions` how many numbers of one sample a row has
  (pixels of a channel, tokens of a feature). Of `messages` each goes from `source` to `target`: `rows` rows of the
  source's "sent" from row `sent_offset`, which become rows of the target's "received" from row `received_offset`.
  Pairs that are not listed send nothing. Messages are sorted by source, then by target.
- `workers[k].stages`: `file`, null where the worker has nothing to compute, `inputs` and `outputs` in the order of the
  program: `name`, `dtype`, `shape`, in which "samples" stands for the number of samples, and `role`:

| role | |
|---|---|
| input | the worker's part of the input |
| sent | (rows, samples, positions) to be sent in the exchange that follows, by target |
| received | (rows, samples, positions) that arrived in the exchange before, by source |
| carried | of an earlier stage of the same worker, under the same name; kept until no later stage lists it |
| samples | zeros, (samples,), for a program that reads nothing else and yet has to know how many samples there are |
| output | the worker's part of the output |

What a worker holds nothing of is no input and no output of its programs. A worker may receive rows that its next stage
does not list: then nothing that is needed depends on them.
"""

LOOP = """\
def run(worker, exchange, programs, part, samples, send, receive):
    values = {"input": part, "samples": numpy.zeros(samples, exchange["dtype"])}
    for s, stage in enumerate(exchange["workers"][worker]["stages"]):
        if stage["file"] is not None:
            results = programs[s]([values[tensor["name"]] for tensor in stage["inputs"]])
            values.update(zip([tensor["name"] for tensor in stage["outputs"]], results))
        if s == len(exchange["exchanges"]):
            return values.get("output")
        messages = exchange["exchanges"][s]["messages"]
        for message in messages:
            if message["source"] == worker:
                first = message["sent_offset"]
                send(message["target"], values["sent"][first : first + message["rows"]])
        received = [receive(message["source"]) for message in messages if message["target"] == worker]
        if received:
            values["received"] = numpy.concatenate(received)"""


def guide(content: Mapping[str, Any]) -> str:
    """Markdown, for what exchange.json says."""
    return _GUIDE.format(
        n_workers=content["n_workers"],
        version=content["made_with"]["repurpose-opt"],
        format=content["format"],
        format_version=content["version"],
        loop="\n".join(f"    {line}".rstrip() for line in LOOP.splitlines()),
        calls=_CALLS[content["programs"]],
    )
