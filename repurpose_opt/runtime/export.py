"""A plan as programs for other runtimes: a folder with exchange.json and a file for every stage of every worker."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repurpose_opt import __version__
from repurpose_opt.errors import InvalidArgument, UnsupportedModule
from repurpose_opt.progress import Report
from repurpose_opt.registry import check_importable
from repurpose_opt.runtime.export_guide import guide
from repurpose_opt.runtime.graph import INPUT
from repurpose_opt.runtime.layer import PlannedLayer
from repurpose_opt.runtime.local import part_of
from repurpose_opt.runtime.manifest import DTYPES, Manifest
from repurpose_opt.runtime.splits import Split, reads_ids
from repurpose_opt.runtime.stages import SAMPLES, Argument, Holdings, Stage, stages_of
from repurpose_opt.runtime.storage import read_manifest, read_worker, replaced

FORMAT = "repurpose-opt exported plan"
VERSION = 1
EXCHANGE, README = "exchange.json", "README.md"
_OURS = re.compile(r"exchange\.json|README\.md|worker-\d+(/stage-\d+\.(pt2|onnx|onnx\.data))?")
_EXAMPLE_SAMPLES = 2  # torch.export would take an axis of one for one that is always one


class ProgramKind(NamedTuple):
    """What programs are written as."""

    suffix: str
    """Of the files."""
    write: Callable[[Stage, Path], None]


@dataclass(frozen=True)
class ExportedPlan:
    """What was written."""

    directory: Path
    files: tuple[str, ...]
    """Relative to the directory."""
    n_bytes: int
    """Of all files."""
    n_programs: int
    n_exchanges: int


def write_torch(stage: Stage, path: Path) -> None:
    torch.export.save(_program(stage), path)


def write_onnx(stage: Stage, path: Path) -> None:
    """Raises UnsupportedModule where ONNX has no operator for one of the stage's."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    exported = _program(stage)
    try:
        with _quiet():
            program = torch.onnx.export(
                exported,
                dynamo=True,
                input_names=[argument.name for argument in stage.inputs],
                output_names=[argument.name for argument in stage.outputs],
                dynamic_shapes=tuple({argument.shape.index(SAMPLES): SAMPLES} for argument in stage.inputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(_first_cause(error)).split("\n")[0]
        raise UnsupportedModule(f"{path.parent.name}/{path.name}: cannot be written as ONNX ({reason})") from None
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    program.save(path)


PROGRAMS = {
    "torch-export": ProgramKind(".pt2", write_torch),
    "onnx": ProgramKind(".onnx", write_onnx),
}


def export_plan(plan: Path, directory: Path, programs: str, report: Report = lambda step: None) -> ExportedPlan:
    """Write the plan in the folder `plan` to `directory`, whole or not at all; an export that is there is replaced.

    Raises InvalidArgument where `programs` is no key of PROGRAMS or the directory holds anything else, PlanError where
    the plan is damaged, SolverNotInstalled where a package is missing that writes ONNX, UnsupportedModule where ONNX
    has no operator for a step: adaptive max pooling to more than one position.
    """
    if programs not in PROGRAMS:
        raise InvalidArgument("programs", repr(programs), ", ".join(PROGRAMS))
    if programs == "onnx":
        check_importable("ONNX", "onnx", "onnxscript")
    manifest = read_manifest(plan)
    directory = directory.resolve()
    _check_replaceable(directory)
    with replaced(directory) as folder:
        workers: list[dict[str, Any]] = []
        for worker in range(manifest.n_workers):
            (folder / f"worker-{worker}").mkdir()
            stages = []
            for number, stage in enumerate(_stages(plan, manifest, worker)):
                report(f"worker {worker} of {manifest.n_workers}, stage {number}")
                stages.append(_written(stage, folder, f"worker-{worker}/stage-{number}", PROGRAMS[programs]))
            workers.append({"worker": worker, "stages": stages})
        content = _content(manifest, programs, workers)
        (folder / EXCHANGE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / README).write_text(guide(content), encoding="utf-8")
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return ExportedPlan(
        directory,
        tuple(path.relative_to(directory).as_posix() for path in paths),
        sum(path.stat().st_size for path in paths),
        sum(stage["file"] is not None for worker in workers for stage in worker["stages"]),
        len(content["exchanges"]),
    )


def _stages(plan: Path, manifest: Manifest, worker: int) -> list[Stage]:
    tensors, dtype = read_worker(plan, manifest, worker), DTYPES[manifest.dtype]
    part = part_of(manifest.graph, manifest.layers, manifest.splits, worker, tensors, 1, dtype)
    return stages_of(part, Holdings(manifest.splits, worker, dtype, _input_dtype(manifest)))


def _input_dtype(manifest: Manifest) -> torch.dtype:
    return torch.int64 if reads_ids(manifest.graph) else DTYPES[manifest.dtype]


def _written(stage: Stage, folder: Path, stem: str, kind: ProgramKind) -> dict[str, Any]:
    """Writes a stage, unless it has nothing to do; returns what exchange.json says of it."""
    file = stem + kind.suffix if stage.outputs else None
    if file is not None:
        kind.write(stage, folder / file)
    return {
        "file": file,
        "inputs": [_argument(argument) for argument in stage.inputs],
        "outputs": [_argument(argument) for argument in stage.outputs],
    }


def _argument(argument: Argument) -> dict[str, Any]:
    return {
        "name": argument.name,
        "role": argument.role.value,
        "shape": list(argument.shape),
        "dtype": str(argument.dtype).removeprefix("torch."),
    }


@torch.no_grad()
def _program(stage: Stage) -> torch.export.ExportedProgram:
    """For any number of samples ≥ 1; without the paths of source files, which say something of this machine only."""
    samples = torch.export.Dim(SAMPLES, min=1)
    shapes = [
        [_EXAMPLE_SAMPLES if size == SAMPLES else int(size) for size in argument.shape] for argument in stage.inputs
    ]
    example = tuple(
        torch.zeros(shape, dtype=argument.dtype) for shape, argument in zip(shapes, stage.inputs, strict=True)
    )
    axes = tuple({argument.shape.index(SAMPLES): samples} for argument in stage.inputs)
    program = torch.export.export(stage.eval(), example, dynamic_shapes=(axes,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _first_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _first_cause(error.__cause__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.onnx says of every program: no torchvision, a deprecated call, an axis named once already."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            warnings.filterwarnings("ignore", ".*axis name", UserWarning)
            yield
    finally:
        logger.setLevel(level)


def _content(manifest: Manifest, programs: str, workers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What exchange.json says; see export_guide.py."""
    P, output = manifest.n_workers, manifest.splits[manifest.steps[-1].name]
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_with": {"repurpose-opt": __version__, "torch": torch.__version__},
        "plan_sha256": manifest.digest(),
        "programs": programs,
        "n_workers": P,
        "dtype": manifest.dtype,
        "input": _tensor(manifest.splits[INPUT], _input_dtype(manifest), P),
        "output": _tensor(output, DTYPES[manifest.dtype], P),
        "exchanges": [_exchange(layer) for layer in manifest.layers if layer.messages],
        "workers": list(workers),
    }


def _tensor(split: Split, dtype: torch.dtype, P: int) -> dict[str, Any]:
    is_split = split.layout is not None
    return {
        "shape": list(split.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "axis": split.axis if is_split else None,
        "places": [split.held(worker).tolist() for worker in range(P)] if is_split else None,
    }


def _exchange(layer: PlannedLayer) -> dict[str, Any]:
    P = layer.n_workers
    rows = [[len(layer.message(source, target)) for target in range(P)] for source in range(P)]
    sent = [[0, *accumulate(row)] for row in rows]
    received = [[0, *accumulate(column)] for column in zip(*rows, strict=True)]
    return {
        "before": layer.name,
        "positions": layer.positions,
        "messages": [
            {
                "source": source,
                "target": target,
                "rows": rows[source][target],
                "sent_offset": sent[source][target],
                "received_offset": received[target][source],
            }
            for source, target in sorted(layer.messages)
            if rows[source][target]
        ],
    }


def _check_replaceable(directory: Path) -> None:
    allowed = "a new or empty folder, or one that holds nothing but an exported plan"
    if not directory.parent.is_dir():
        raise InvalidArgument("directory", f"{directory}, in a folder that does not exist", "an existing folder")
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InvalidArgument("directory", f"{directory}, a file", allowed)
    if directory == Path.cwd():
        raise InvalidArgument("directory", f"{directory}, the working directory", allowed)
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
    foreign = {name for name in names if not _OURS.fullmatch(name)}
    if foreign or (names and EXCHANGE not in names):
        raise InvalidArgument("directory", f"{directory}, which holds {min(foreign or names)}", allowed)
