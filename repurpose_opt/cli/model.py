"""Reads what `run` is given, a model and samples, from files. PyTorch loads when these functions are called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repurpose_opt.errors import InvalidArgument, RepurposeError
from repurpose_opt.files import read_array

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

PROGRAM_SUFFIX = ".pt2"
_NESTED = ("state_dict", "model")
"""Names under which training scripts keep a state dict among other things."""
_ANY_BATCH = 'torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))'
_FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def read_model(name: str, weights: Path | None, seed: int) -> nn.Module:
    """The model, in evaluation mode, of an exported program FILE.pt2 or of PACKAGE.MODULE:NAME.

    `seed` is for a factory that draws its weights. Raises InvalidArgument where there is no such model, or the
    weights are not its.
    """
    if name.endswith(PROGRAM_SUFFIX):
        return _exported(Path(name))
    model = _made(name, seed)
    if weights is not None:
        _load(model, weights)
    return model.eval()


def read_samples(path: Path, argument: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inputs (samples, …) and, if there are any, labels, of a .npy, .npz or .safetensors file.

    Raises InvalidArgument, which names `argument`.
    """
    from repurpose_opt.network.calibrate import gather

    suffix = path.suffix.lower()
    if suffix == ".npy":
        arrays: Mapping[str, Any] = {"inputs": read_array(path, argument)}
    elif suffix in (".npz", ".safetensors"):
        with _reading(argument, path):
            arrays = _npz(path) if suffix == ".npz" else _safetensors(path)
    else:
        raise InvalidArgument(argument, path.name, "a .npy, .npz or .safetensors file")
    if "inputs" not in arrays or not arrays.keys() <= {"inputs", "labels"}:
        got = ", ".join(sorted(arrays)) or "no arrays"
        raise InvalidArgument(argument, f"{path.name} with {got}", "the arrays inputs and, if there are any, labels")
    with named(data=argument):
        return gather((arrays["inputs"], arrays["labels"]) if "labels" in arrays else arrays["inputs"])


@contextmanager
def named(**options: str) -> Iterator[None]:
    """Errors that name an argument of the library name the option of the command line that it comes from."""
    try:
        yield
    except InvalidArgument as error:
        if error.argument not in options:
            raise
        raise RepurposeError(options[error.argument] + str(error).removeprefix(error.argument)) from None


def _exported(path: Path) -> nn.Module:
    """The module of an exported program that takes any number of samples."""
    import torch

    with _reading("MODEL", path), _without_pickled_objects():
        module: fx.GraphModule = torch.export.load(path).module()
    for node in module.graph.nodes:
        if _is_in_training(node):
            raise InvalidArgument("MODEL", f"{path}, exported in training mode", _ANY_BATCH)
        shape: list[Any] = list(getattr(node.meta.get("val"), "shape", ()))
        if node.op == "placeholder" and shape and isinstance(shape[0], int):
            raise InvalidArgument("MODEL", f"{path}, exported for batches of {shape[0]} only", _ANY_BATCH)
    return _plain(module)


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """An exported module as any other: one that gives a tensor, not a structure with one, and takes part in eval()."""
    from torch import fx

    graph = module.graph
    for node in list(graph.nodes):
        # Checks of shapes that export adds; they are called for nothing that the model computes.
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
    output: Any = graph.output_node()
    if len(output.args[0]) == 1:
        output.args = (output.args[0][0],)
    graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, graph).eval()


@contextmanager
def _without_pickled_objects() -> Iterator[None]:
    """torch.export.load unpickles whatever objects a file has, unless the environment forbids it.

    That leaves the expressions for shapes in the file, which PyTorch evaluates: a program is to be trusted like code.
    """
    before = os.environ.get(_FORCE_SAFE)
    os.environ[_FORCE_SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE_SAFE]
        else:
            os.environ[_FORCE_SAFE] = before


def _is_in_training(node: Any) -> bool:
    """Whether a node of an exported graph is dropout or batch norm that does what it does in training."""
    import torch

    position = {torch.ops.aten.dropout.default: 2, torch.ops.aten.batch_norm.default: 5}.get(node.target)
    return position is not None and node.args[position] is True


def _made(name: str, seed: int) -> nn.Module:
    """What PACKAGE.MODULE:NAME is, or gives when it is called; the working directory is searched too."""
    import torch
    from torch import nn

    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise InvalidArgument("MODEL", repr(name), f"FILE{PROGRAM_SUFFIX} or PACKAGE.MODULE:NAME")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = found if isinstance(found, nn.Module) else found()  # type: ignore[operator]
    except Exception as error:  # the user's code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        allowed = "the name of a module, or of what gives one without arguments"
        raise InvalidArgument("MODEL", f"{name} ({reason})", allowed) from None
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            "MODEL", f"{name}, which gives a value of type {type(model).__name__}", "a torch.nn.Module"
        )
    return model


def _load(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into the model. Raises InvalidArgument where they are not its."""
    import torch

    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise InvalidArgument("--weights", path.name, "a .safetensors, .pt or .pth file")
    with _reading("--weights", path):
        state: Any = (
            _safetensors(path) if suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
        )
    for key in _NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InvalidArgument(
            "--weights", f"{path.name}, which is no state dict", "tensors by name, as state_dict() gives"
        )
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InvalidArgument("--weights", f"{path.name} ({_shortened(first)})", "the weights of MODEL") from None


def _npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(path))


@contextmanager
def _reading(argument: str, path: Path) -> Iterator[None]:
    if not path.is_file():
        raise InvalidArgument(argument, f"{path}, which is no file", "the path of a file")
    try:
        yield
    except Exception as error:  # decoders raise anything on damaged bytes
        reason = _shortened((str(error).strip() or type(error).__name__).split("\n")[0])
        raise InvalidArgument(argument, f"{path} ({reason})", f"a complete {path.suffix} file of numbers") from None


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]} …"
