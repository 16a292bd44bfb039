"""The example that trains a gate and tunes a model under it: its parts, and all with tiny sizes."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # where a plain `pytest` does not look

from benchmarks import gate_measures, gate_report, gate_scorers, small_lm, train_gate
from benchmarks.gate_scorers import UNIT, choose, chosen, density, most_units
from benchmarks.gate_tuning import (
    GateConfig,
    Seen,
    Steering,
    distil,
    new_gates,
    scorer,
    tune,
    under_selection,
)
from benchmarks.small_lm import Config, Text, causal, encode, read_text, train, vocabulary
from sparse_compile.ops import ATTENTION

TINY = Config(layers=2, context=64, batch=1, steps=2, vocabulary=300, most_bytes=20_000)
GATES = GateConfig(width=40, rope=8, steps=2, tuning_steps=2, held_out_rows=2)
ENDLESS = train_gate.Clock(math.inf)


def test_everything_with_tiny_settings(tmp_path: Path) -> None:
    told: list[str] = []
    results = train_gate.Results(tmp_path / "found.json", {"config": {}}, told.append)
    train_gate.run(train_gate.Settings(TINY, GATES), read_text(TINY), ENDLESS, results)
    names = {gate_measures.TRAINED, "oracle", *gate_scorers.UNTRAINED}
    for model in ("frozen", "tuned"):
        own = [row for row in results.recalls if row["model"] == model]
        assert {row["scorer"] for row in own} == names
        best = {row["ratio"]: row["recall"] for row in own if row["scorer"] == "oracle"}
        assert all(row["recall"] <= best[row["ratio"]] + 1e-6 for row in own)
        lost = {row["scorer"]: row for row in results.losses if row["model"] == model}
        assert set(lost) == names | {"dense", "dense baseline"}
        for row in (lost[name] for name in names):
            expected = row["loss"] / lost["dense baseline"]["loss"] - 1
            assert row["above_dense"] == pytest.approx(expected, abs=1e-4)
    assert json.loads(results.path.read_text())["losses"] == results.losses
    table = gate_report.tables(json.loads(results.path.read_text()))
    assert table.count("| trained gate |") == 2
    gate_report.plot(results.recalls, tmp_path / "plot.svg")
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert any(gate_measures.TRAINED in (text or "") for text in drawn.itertext())


def operands(heads: int = 4, kv_heads: int = 2, n: int = 96) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, h, n, 32) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_tuning_is_attention_to_the_selected_keys(kv_heads: int) -> None:
    """Output, gradients, and what is missed are those of the operator and its log-sum-exps."""
    q, k, v = operands(kv_heads=kv_heads)
    gate = new_gates(Config(kv_heads=kv_heads), GATES, q.device)[0]
    lists = choose(scorer(gate)(q.detach(), k.detach()), 2)
    chosen = [lists.index, lists.count]
    out, lse = ATTENTION(q, k, v, [], [], [], chosen, 32**-0.5, gate_measures.SPEC)
    keys = k.repeat_interleave(4 // kv_heads, 1)
    score = (q @ keys.mT * 32**-0.5).masked_fill(torch.ones(96, 96).triu(1).bool(), -math.inf)
    missed = 1 - (lse - score.logsumexp(-1)).exp().mean()
    seen = Seen()
    found = under_selection(gate, 2, seen, q, k, v)
    torch.testing.assert_close(found, out)
    torch.testing.assert_close(seen.missed[0], missed)
    weights = torch.randn_like(out)
    expected = torch.autograd.grad((out * weights).sum() + missed, [q, k, v])
    got = torch.autograd.grad(
        (found * weights).sum() + seen.missed[0], [q, k, v], retain_graph=True
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # The distillation teaches the gate, and nothing but the gate.
    reached = torch.autograd.grad(seen.divergence[0], [q, *gate.parameters()], allow_unused=True)
    assert reached[0] is None
    assert all(grad is not None for grad in reached[1:])


def test_all_units_are_dense_attention() -> None:
    q, k, v = operands()
    for by in (gate_scorers.mean_pool, gate_scorers.random):
        found = gate_measures.selected(by, 6, q, k, v)
        torch.testing.assert_close(found, causal(q, k, v), rtol=1e-4, atol=1e-5)


def test_choices() -> None:
    n = 8 * UNIT
    scores, own = torch.rand(2, 3, n, 8), torch.arange(n) // UNIT
    mass = torch.rand(2, 6, n, 8).masked_fill(torch.arange(8) > own[:, None], 0)
    found = gate_measures.recall(scores, mass, [1, 3, 8])
    for most, share in zip((1, 3, 8), found, strict=True):
        units, lists = chosen(scores, most), choose(scores, most)
        assert torch.equal(lists.dense(n, n)[..., ::UNIT], units)
        assert units[:, :, torch.arange(n), own].all()
        assert not (units & (torch.arange(8) > own[:, None])).any()
        assert torch.equal(units.sum(-1), (own + 1).clamp_max(most).expand(2, 3, n))
        kept = (mass * units.repeat_interleave(2, 1)).sum(-1).mean()
        torch.testing.assert_close(share, kept)
        pairs = lists.dense(n, n) & torch.ones(n, n).tril().bool()
        expected = pairs.float().mean() / (n * (n + 1) / 2) * n * n
        assert density(most, n) == pytest.approx(expected.item())
    assert density(most_units(0.5, n), n) <= 0.5 < density(most_units(0.5, n) + 1, n)
    assert most_units(1e-3, n) == 1


def test_the_weight_is_steered_to_what_is_wanted() -> None:
    steering = Steering(0.05, torch.tensor(0.5))
    assert steering.next(torch.tensor(0.25), 0.0) == 0.5  # as much as at first is fine at first
    assert steering.next(torch.tensor(0.15), 0.25) == pytest.approx(0.5)  # half of the way
    higher = steering.next(torch.tensor(0.15), 0.5)
    assert higher == pytest.approx(0.5 * math.exp(0.02))
    assert steering.next(torch.tensor(0.01), 1.0) == pytest.approx(0.5)
    for _ in range(100):
        highest = steering.next(torch.tensor(0.9), 1.0)
    assert highest == 1
    assert Steering(0.05, torch.tensor(0.5)).next(torch.tensor(0.01), 0.0) < 0.5


def test_tuning_concentrates_attention_and_learns() -> None:
    config = Config(layers=1, context=256, batch=4, steps=30, vocabulary=300, most_bytes=200_000)
    gates = replace(GATES, steps=20, tuning_steps=30, tuning_rate=3e-3)
    text, told = read_text(config), list[str]()
    model = train(config, text, told.append)
    made = distil(model, text, gates, told.append)
    tuned, followed = tune(model, made, text, gates, 2, told.append)
    assert (model.steps, tuned.steps) == (30, 60)
    rows = text.held_out_rows(config, 4)

    def measured(model: small_lm.SmallLM, gate: torch.nn.Module) -> tuple[float, float]:
        attend = [partial(gate_measures.selected, scorer(gate), 2)]
        recalls = gate_measures.compare_recall(model, rows, {"gate": [scorer(gate)]})
        (share,) = [row["recall"] for row in recalls if row["ratio"] == 0.25]
        return gate_measures.losses(model, rows, attend).mean().item(), share

    (loss, share), (later, more) = measured(model, made[0]), measured(tuned, followed[0])
    assert later < loss - 0.1
    assert more > share + 0.01


def test_text_is_the_same_each_time() -> None:
    first, second = read_text(TINY), read_text(TINY)
    assert first.sha256 == second.sha256
    assert torch.equal(first.train, second.train)
    assert first.train.max() < TINY.vocabulary
    assert torch.equal(first.held_out_rows(TINY, 2), second.held_out_rows(TINY, 2))


def test_long_texts_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import torch  # é\n" * 40
    words = vocabulary(text, 260)
    expected = encode(text, words)
    monkeypatch.setattr(small_lm, "PIECE", 18 * 10)
    assert torch.equal(encode(text, words), expected)


def test_packages_are_read_and_missing_ones_named() -> None:
    found = small_lm.modules(("networkx",))
    assert any(path.name == "digraph.py" for path in found)
    assert not any("tests" in path.parts for path in found)
    with pytest.raises(SystemExit, match="no_such_package"):
        small_lm.modules(("no_such_package",))


def test_words_and_bytes() -> None:
    words = vocabulary("self self x", 257)
    assert words == {"self": 256}
    assert encode("self é", words).tolist() == [256, 32, 0xC3, 0xA9]


def test_time_ends_what_steps_do_not() -> None:
    assert list(small_lm.progress(4)) == [0, 0.25, 0.5, 0.75]
    assert len(list(small_lm.progress(10**9, 0.01))) < 10**9
    text = Text(torch.arange(300), torch.arange(300), "")
    assert len(list(text.batches(TINY, 3, seed=0))) == 3


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_gate", "--quick", "--packages", "networkx"])
    found = train_gate.settings_of(train_gate.arguments())
    assert found.model.packages == ("networkx",)
    assert found.gates.held_out_rows == 8
    monkeypatch.setattr(sys, "argv", ["train_gate", "--help"])
    with pytest.raises(SystemExit) as done:
        train_gate.main()
    assert done.value.code == 0
