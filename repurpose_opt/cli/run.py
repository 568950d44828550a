"""`run`: a whole model to a plan folder; goes on where it was interrupted."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repurpose_opt import __version__
from repurpose_opt.cli.model import PROGRAM_SUFFIX, named, read_model, read_samples
from repurpose_opt.cli.plan_report import figures_of, report
from repurpose_opt.cli.text import PROGRAM, add_verb, fraction, loads, natural, positive, price
from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.files import read_array
from repurpose_opt.formulation import Volume
from repurpose_opt.formulation.codes import MESSAGES
from repurpose_opt.registry import check_importable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from repurpose_opt.network.finetune import Batch, FineTuning
    from repurpose_opt.network.trace import Network
    from repurpose_opt.runtime.plan import Plan

INTERRUPTED = 130
_CONTIGUOUS = "contiguous"
_LOSSES = ("cross_entropy", "squared_error")
_LIMITS = ("budget", "budget_bytes", "transfer_price", "max_nmse")
_TUNING = ("batch_size", "learning_rate", "distillation", "validation_share", "patience")
_RECORD, _LOG = "run.json", "rounds.jsonl"
_CHECKPOINT_FILES = re.compile(r"run\.json|run\.part|rounds\.jsonl|.*\.npz")
_ARGUMENTS = {
    "model": "MODEL",
    "example_input": "--data",
    "n_workers": "--workers",
    "steps": "--finetune-steps",
    "checkpoint_dir": "--checkpoint",
    "directory": "--output",
    "transfer_price": "--price",
}
"""Arguments of the library whose option has another name."""

_EPILOG = """\
MODEL is a program of torch.export, or the name of a torch.nn.Module, or of a class or function that gives one without
arguments; the module is searched in the working directory too. An exported program must take any number of samples:
  torch.export.save(torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), "m.pt2")
Files of weights and samples are read without pickled objects. Like Python code, open a .pt2 only if you trust it:
PyTorch evaluates expressions in it.

Samples are a .npy of inputs (samples, …), or a .npz or .safetensors with the arrays inputs and labels: classes
(samples,) for cross_entropy, numbers of the outputs' shape for squared_error. Calibration needs no labels.

What is finished is kept in DIR.checkpoint. The same command goes on from there after an interruption, to the same plan.

examples:
  repurpose-opt run mynets:Digits --weights digits.safetensors --data train.npz --test test.npz --workers 4 \\
    --budget 0.05 --finetune-steps 1000 --output digits-plan
  repurpose-opt run digits.pt2 --data train.npz --workers 4 --max-nmse 0.02 --messages codes --output digits-plan
  repurpose-opt run mynets:Digits --data train.npz --workers 3 --budget 0.02 --rounds 3 --finetune-steps 3000 \\
    --distillation 0.5 --worker-share 1,1,2 --output digits-plan --json

Without --test, the accuracies that are printed are those on the data that the plan was made from: no measure of what
is to be expected on other data. Seconds of a round leave out what an interrupted run did of it."""


def add(verbs: Any) -> None:
    verb = add_verb(verbs, "run", "place, prune and repair a whole model, and write its plan", epilog=_EPILOG)
    verb.add_argument("model", metavar="MODEL", help=f"FILE{PROGRAM_SUFFIX} or PACKAGE.MODULE:NAME; see below")
    verb.add_argument("--workers", type=positive, required=True, metavar="P", help="number of workers")
    verb.add_argument("--weights", type=Path, metavar="FILE", help="state dict: .safetensors, .pt or .pth")
    _add_data(verb.add_argument_group("data"))
    _add_formulation(verb.add_argument_group("what is minimised"))
    _add_workers(verb.add_argument_group("the workers"))
    _add_search(verb.add_argument_group("how it is solved"))
    _add_tuning(verb.add_argument_group("fine-tuning, with the pruned connections held at zero"))
    _add_output(verb.add_argument_group("output"))
    verb.set_defaults(run=_run, usage_error=verb.error)


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="samples for calibration and fine-tuning; see below"
    )
    group.add_argument("--test", type=Path, metavar="FILE", help="other samples, which judge the model and the plan")
    group.add_argument(
        "--loss", choices=_LOSSES, default="cross_entropy", help="what MODEL was trained for; default: %(default)s"
    )


def _add_formulation(group: Any) -> None:
    limit = group.add_mutually_exclusive_group(required=True)
    limit.add_argument("--budget", type=fraction, metavar="F", help="at most this fraction of the direct volume")
    limit.add_argument("--budget-bytes", type=price, metavar="N", help="at most this many bytes a sample")
    limit.add_argument(
        "--price",
        dest="transfer_price",
        type=price,
        metavar="X",
        help="price of sending a byte, in units of the error weighted by the loss",
    )
    limit.add_argument("--max-nmse", type=price, metavar="X", help="at most this relative squared error of the outputs")
    group.add_argument(
        "--messages",
        choices=MESSAGES,
        default=MESSAGES[0],
        help="what is sent: chosen values, linear combinations of them, or what costs less; default: %(default)s",
    )


def _add_workers(group: Any) -> None:
    group.add_argument(
        "--input-owner",
        default=_CONTIGUOUS,
        metavar="FILE.npy",
        help="worker of each column, channel or feature of the input, whole numbers; or contiguous: equal runs, the "
        "default",
    )
    group.add_argument(
        "--output-owner", type=_naturals, default=[0], metavar="A,B", help="workers that want the answer; default: 0"
    )
    group.add_argument(
        "--worker-share", type=loads, metavar="A,B,C", help="relative capacity of each worker; default: equal"
    )
    group.add_argument(
        "--memory-limit",
        type=loads,
        metavar="A,B,C",
        help="bytes that the weights of each worker may take, or one number for all; default: none",
    )
    group.add_argument(
        "--link-price",
        metavar="FILE.npy",
        help="price of a byte from worker (row) to worker, (workers, workers), or a number; default: 1",
    )


def _add_search(group: Any) -> None:
    group.add_argument(
        "--partitioner",
        default="auto",
        metavar="CHAIN",
        help='a name of "solvers", or several joined by +; default: auto',
    )
    group.add_argument("--pruner", default="auto", metavar="CHAIN", help="the same for pruners; default: auto")
    group.add_argument(
        "--no-look-ahead",
        dest="look_ahead",
        action="store_false",
        help="place neurons without regard to what sending their values on will cost",
    )
    group.add_argument(
        "--rounds",
        type=positive,
        default=1,
        metavar="N",
        help="rounds of placing, pruning and fine-tuning, each of which sends less; default: 1",
    )
    group.add_argument("--seed", type=natural, default=0, metavar="N", help="default: 0")


def _add_tuning(group: Any) -> None:
    group.add_argument("--finetune-steps", type=positive, metavar="N", help="batches, over all rounds; default: none")
    group.add_argument("--batch-size", type=positive, metavar="N", help="samples a batch; default: 128")
    group.add_argument("--learning-rate", type=price, metavar="X", help="the highest of the cycle; default: 0.001")
    group.add_argument(
        "--distillation",
        type=fraction,
        metavar="F",
        help="share of the loss that compares with MODEL's outputs, not with labels; default: 0, or 1 without labels",
    )
    group.add_argument(
        "--validation-share", type=fraction, metavar="F", help="of the data that picks the best weights; default: 0"
    )
    group.add_argument(
        "--patience", type=positive, metavar="N", help="looks at them without a better one that end it; default: none"
    )


def _add_output(group: Any) -> None:
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the plan")
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="folder for what is finished; default: that of --output + .checkpoint",
    )
    group.add_argument("--keep-checkpoint", action="store_true", help="do not delete it when the plan is written")
    group.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _naturals(text: str) -> list[int]:
    return [natural(part) for part in text.split(",")]


def _run(args: argparse.Namespace) -> int:
    _check_usage(args)
    output = args.output.resolve()
    checkpoint = output.with_name(f"{output.name}.checkpoint") if args.checkpoint is None else args.checkpoint.resolve()
    _check_folders(output, checkpoint)
    _check_installed()
    try:
        figures = _planned(args, output, checkpoint)
    except KeyboardInterrupt:
        again = f"; the same command goes on from {checkpoint}" if (checkpoint / _RECORD).exists() else ""
        print(f"{PROGRAM}: interrupted{again}", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(figures) if args.json else report(figures))
    return 0


def _check_usage(args: argparse.Namespace) -> None:
    """Options that do not belong together are a usage error."""
    if args.weights is not None and args.model.endswith(PROGRAM_SUFFIX):
        args.usage_error(f"--weights is for PACKAGE.MODULE:NAME; a {PROGRAM_SUFFIX} has its own")
    if args.finetune_steps is None:
        for name in _TUNING:
            if getattr(args, name) is not None:
                args.usage_error(f"--{name.replace('_', '-')} needs --finetune-steps")
        if args.rounds > 1:
            args.usage_error("--rounds above 1 need --finetune-steps")
    if args.rounds > 1 and args.max_nmse is not None:
        args.usage_error("--rounds above 1 need a budget or a price, which change from round to round")
    if args.patience is not None and not args.validation_share:
        args.usage_error("--patience needs a --validation-share above 0")


def _check_folders(output: Path, checkpoint: Path) -> None:
    """Finds out before the work, not after it, that a folder could not be written; never one with other files in it."""
    if output == checkpoint:
        raise InvalidArgument("--checkpoint", f"{checkpoint}, the folder of --output", "another folder")
    for option, folder, mark in (("--output", output, "manifest.json"), ("--checkpoint", checkpoint, _RECORD)):
        if not folder.parent.is_dir():
            raise InvalidArgument(option, f"{folder}, in a folder that does not exist", "an existing folder")
        if folder.exists() and not folder.is_dir():
            raise InvalidArgument(option, f"{folder}, a file", "a folder")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
            allowed = "a new or empty folder, or one of an earlier run"
            raise InvalidArgument(option, f"{folder}, which holds other files", allowed)


def _check_installed() -> None:
    # Before PyTorch loads: threads that spin while they wait make small steps several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    check_importable("run", "torch", "safetensors", "rich")


def _planned(args: argparse.Namespace, output: Path, checkpoint: Path) -> dict[str, Any]:
    """Makes and writes the plan; returns the result as --json prints it."""
    from repurpose_opt.network.repurpose import repurpose

    began = time.monotonic()
    model = read_model(args.model, args.weights, args.seed)
    data = read_samples(args.data, "--data")
    options = {name: f"--{name.replace('_', '-')}" for name in vars(args)} | _ARGUMENTS
    with named(**options):
        network = _traced(model, data[0])
        test = None if args.test is None else _test_samples(args, network, data[0])
        plan = repurpose(
            model,
            data[0][:1],
            args.workers,
            data=data[0] if data[1] is None else data,
            formulation=_formulation(args),
            partitioner=args.partitioner,
            pruner=args.pruner,
            loss=args.loss,
            finetune=_fine_tuning(args, data),
            rounds=args.rounds,
            look_ahead=args.look_ahead,
            checkpoint_dir=checkpoint,
            seed=args.seed,
            **_worker_arguments(args),
        )
    judged = None if test is None else _judged(network, plan, test, args.loss)
    figures = figures_of(plan, _formulation(args), _round_seconds(checkpoint), judged)
    with named(**options):
        plan.save(output)
    if not args.keep_checkpoint:
        _delete(checkpoint)
    return {
        "model": args.model,
        **figures,
        "loss": args.loss,
        "seed": args.seed,
        "version": __version__,
        "plan": str(args.output),
        "checkpoint": str(checkpoint) if args.keep_checkpoint else None,
        "seconds": time.monotonic() - began,
    }


def _traced(model: nn.Module, inputs: torch.Tensor) -> Network:
    """The model as a graph, which a plan folder can hold. Raises UnsupportedModule."""
    from repurpose_opt.network.trace import trace
    from repurpose_opt.runtime.steps import Opaque

    network = trace(model, inputs[:1])
    for step in network.graph.steps:
        module = network.graph.module(step.name)
        if isinstance(module, Opaque):
            raise UnsupportedModule(
                f"MODEL: step {step.name!r} ({module.name}) is of a kind that no plan folder can hold"
            )
    return network


def _test_samples(args: argparse.Namespace, network: Network, data: torch.Tensor) -> Batch:
    from repurpose_opt.network.calibrate import check_loss, checked_labels

    inputs, labels = read_samples(args.test, "--test")
    if inputs.shape[1:] != data.shape[1:]:
        got, allowed = tuple(inputs.shape[1:]), tuple(data.shape[1:])
        raise InvalidArgument("--test", f"inputs of shape {got}", f"the shape of those of --data, {allowed}")
    check_loss(args.loss, network)
    if labels is not None:
        with named(data="--test"):
            labels = checked_labels(labels, args.loss, network.shapes[network.output])
    return inputs, labels


def _formulation(args: argparse.Namespace) -> Volume:
    limit = {name: getattr(args, name) for name in _LIMITS if getattr(args, name) is not None}
    return Volume(**limit, messages=args.messages)


def _fine_tuning(args: argparse.Namespace, data: Batch) -> FineTuning | None:
    from repurpose_opt.network.finetune import FineTuning

    if args.finetune_steps is None:
        return None
    given = {name: getattr(args, name) for name in _TUNING if getattr(args, name) is not None}
    if data[1] is None and given.setdefault("distillation", 1.0) < 1:
        raise InvalidArgument("--distillation", f"{args.distillation:g}", "1, since --data has no labels")
    return FineTuning(steps=args.finetune_steps, **given)


def _worker_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `repurpose` about workers."""
    is_file = args.input_owner != _CONTIGUOUS
    return {
        "input_owner": read_array(Path(args.input_owner), "--input-owner") if is_file else None,
        "output_owner": args.output_owner,
        "worker_share": args.worker_share,
        "memory_limit": args.memory_limit,
        "link_price": None if args.link_price is None else _link_price(args.link_price),
    }


def _link_price(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return read_array(Path(text), "--link-price")


def _judged(network: Network, plan: Plan, test: Batch, loss: str) -> dict[str, Any]:
    """Accuracy or mean squared error of the original and the plan on test samples, and how far their outputs differ."""
    inputs, labels = test
    sums = {"original": 0.0, "plan": 0.0, "difference": 0.0, "outputs": 0.0}
    for start in range(0, len(inputs), network.batch_size):
        part = slice(start, start + network.batch_size)
        original, planned = _outputs(network, plan, inputs[part])
        sums["difference"] += float((planned - original).square().sum())
        sums["outputs"] += float(original.square().sum())
        if labels is not None:
            sums["original"] += _score(original, labels[part], loss)
            sums["plan"] += _score(planned, labels[part], loss)
    found: dict[str, Any] = {
        "samples": len(inputs),
        "output_nmse": sums["difference"] / sums["outputs"] if sums["outputs"] else None,
    }
    if labels is None:
        return found
    metric = "accuracy" if loss == "cross_entropy" else "mean_squared_error"
    return {**found, metric: {which: sums[which] / len(inputs) for which in ("original", "plan")}}


def _outputs(network: Network, plan: Plan, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, of the original and of the plan."""
    import torch

    from repurpose_opt.runtime.graph import INPUT

    with torch.no_grad():
        given = inputs if network.layouts[INPUT] is None else inputs.to(network.dtype)
        return network.graph(given).double(), plan.model(given).double()


def _score(outputs: torch.Tensor, labels: torch.Tensor, loss: str) -> float:
    """Sum over the samples: right answers, or squared errors."""
    if loss == "cross_entropy":
        return float((outputs.argmax(1) == labels).sum())
    return float((outputs - labels).square().flatten(1).mean(1).sum())


def _round_seconds(checkpoint: Path) -> dict[int, float]:
    """Seconds that each round took, over all runs that came to its end."""
    seconds: dict[int, float] = {}
    for line in (checkpoint / _LOG).read_text().splitlines():
        try:
            record = json.loads(line)
            number, taken = int(record["round"]), float(record["seconds"])
        except (ValueError, KeyError, TypeError):  # a run that was killed may have left half a line
            continue
        seconds[number] = seconds.get(number, 0.0) + taken
    return seconds


def _delete(checkpoint: Path) -> None:
    """The files of a checkpoint, and its folder where nothing else is in it."""
    for path in checkpoint.iterdir():
        if _CHECKPOINT_FILES.fullmatch(path.name):
            path.unlink()
    if not any(checkpoint.iterdir()):
        checkpoint.rmdir()
