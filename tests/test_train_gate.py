"""The example that trains a gate: its parts, and all of it with tiny settings."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # where a plain `pytest` does not look

from benchmarks import gate_scorers, train_gate
from benchmarks.gate_scorers import UNIT, choose
from benchmarks.small_lm import Config, encode, read_text, vocabulary

TINY = Config(layers=2, context=64, batch=1, steps=2, vocabulary=300, most_bytes=20_000)


def test_everything_with_tiny_settings(tmp_path: Path) -> None:
    gates = train_gate.GateConfig(width=40, rope=8, steps=2, held_out_rows=2)
    said: list[str] = []
    recalls, extra = train_gate.compare(TINY, gates, said.append, tmp_path / "model.pt")
    again, _ = train_gate.compare(TINY, gates, said.append, tmp_path / "model.pt")
    assert [row["recall"] for row in again] == pytest.approx([row["recall"] for row in recalls])
    names = {train_gate.TRAINED, "oracle", *gate_scorers.UNTRAINED}
    assert {row["scorer"] for row in recalls} == names
    best = {row["ratio"]: row["recall"] for row in recalls if row["scorer"] == "oracle"}
    assert all(row["recall"] <= best[row["ratio"]] + 1e-6 for row in recalls)
    by_ratio = {row["ratio"]: row["density"] for row in recalls}
    assert all(abs(row["density"] - by_ratio[row["ratio"]]) < 1e-6 for row in recalls)
    assert {row["scorer"] for row in extra["losses"]} == names | {"dense"}
    assert len(extra["text"]["sha256"]) == 64
    train_gate.plot(recalls, tmp_path / "plot.svg")
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert any(train_gate.TRAINED in (text or "") for text in drawn.itertext())


def test_all_units_are_dense_attention() -> None:
    q, k, v = (torch.randn(1, heads, 64, 32) for heads in (4, 2, 2))
    for scorer in (gate_scorers.mean_pool, gate_scorers.random):
        found = train_gate.selected(scorer, 1.0, q, k, v)
        torch.testing.assert_close(found, train_gate.causal(q, k, v), rtol=1e-4, atol=1e-5)


def test_choices() -> None:
    scores = torch.rand(2, 3, 8 * UNIT, 8)
    for ratio in (0.1, 0.25, 0.5):
        chosen = choose(scores, ratio)
        n = 8 * UNIT
        assert torch.equal(chosen.lists.dense(n, n)[..., ::UNIT], chosen.units)
        own = torch.arange(n) // UNIT
        assert chosen.units[:, :, torch.arange(n), own].all()
        assert not (chosen.units & (torch.arange(8) > own[:, None])).any()
        counts = chosen.units.sum(-1)
        assert torch.equal(
            counts, ((own + 1) * ratio).round().clamp_min(1).long().expand_as(counts)
        )


def test_text_is_the_same_each_time() -> None:
    first, second = read_text(TINY), read_text(TINY)
    assert first.sha256 == second.sha256
    assert torch.equal(first.train, second.train)
    assert first.train.max() < TINY.vocabulary
    assert torch.equal(first.held_out_rows(TINY, 2), second.held_out_rows(TINY, 2))


def test_words_and_bytes() -> None:
    words = vocabulary("self self x", 257)
    assert words == {"self": 256}
    assert encode("self é", words).tolist() == [256, 32, 0xC3, 0xA9]


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gate", "--help"])
    with pytest.raises(SystemExit) as done:
        train_gate.main()
    assert done.value.code == 0
