"""Sparsified models mean what transformers' own code means, values and gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BigBirdForQuestionAnswering,
    LEDForConditionalGeneration,
    LongformerForSequenceClassification,
    LongformerModel,
)
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import sparse_compile
from sparse_compile.errors import NothingToSparsify, WeightsNeeded
from sparse_compile.integrations.transformers import sparsify
from sparse_compile.integrations.transformers.bigbird_blocks import Draw, columns_of
from tests.integrations.tiny_models import (
    Named,
    assert_same,
    batch,
    bigbird,
    led,
    longformer,
    longt5,
    sparse,
)

GLOBAL: dict[str, Any] = {
    "none": None,
    "the first": lambda at, row: at == 0,
    "several": lambda at, row: (at % 7 == 3) | (at < 2),
    "in one sequence": lambda at, row: (at % 11 == row * 5) & (row == 0),
    "of padding": lambda at, row: at % 5 == 4,
    "all": lambda at, row: at >= 0,
}


@pytest.mark.parametrize("is_global", GLOBAL)
@pytest.mark.parametrize("n, padding", [(32, 0), (29, 11), (61, 30), (5, 1)])
def test_longformer(n: int, padding: int, is_global: str) -> None:
    model = longformer()
    assert_same(model, sparse(model), batch(n, padding, GLOBAL[is_global]))


@pytest.mark.parametrize("is_global", ["none", "several", "of padding"])
@pytest.mark.parametrize("n, padding", [(32, 0), (45, 20)])
def test_led(n: int, padding: int, is_global: str) -> None:
    model = led()
    given = batch(n, padding, GLOBAL[is_global])
    assert_same(model, sparse(model), {**given, "decoder_input_ids": given["input_ids"][:, :6]})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "n, padding, random", [(48, 0, 2), (61, 13, 2), (41, 2, 2), (64, 40, 1), (93, 5, 5)]
)
def test_bigbird(n: int, padding: int, random: int, training: bool) -> None:
    model = bigbird(num_random_blocks=random).train(training)
    assert_same(model, sparse(model), batch(n, padding))


@pytest.mark.parametrize("longest", [1024, 4096])
def test_bigbird_at_a_length_of_the_paper(longest: int) -> None:
    """Where transformers draws blocks that are near or the last as well."""
    sizes = {"block_size": 32, "num_random_blocks": 3, "max_position_embeddings": longest}
    model = bigbird(**sizes).train()
    _, copied = columns_of(Draw(0, 2, 1024, 32, 3, longest, training=True))
    assert copied
    assert_same(model, sparse(model), batch(1024, 100))


def test_short_sequences_of_bigbird_are_dense() -> None:
    model = bigbird()
    other = sparse(model)
    assert_same(model, other, batch(20, 3))
    assert other.attention_type == "original_full"


def test_numpy_draws_what_it_would_have_drawn() -> None:
    model, given = sparse(bigbird()).train(), batch(61)
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    model(**given)
    assert np.random.rand() == expected


def test_hidden_states_and_tuples() -> None:
    given = batch(21, 4, GLOBAL["several"])
    for model, more in ((longformer(), {}), (led(), {"decoder_input_ids": given["input_ids"]})):
        given |= more
        whole = model(**given, output_hidden_states=True)
        found = sparse(model)(**given, output_hidden_states=True)
        assert found.keys() == whole.keys()
        for name in ("hidden_states", "encoder_hidden_states"):
            for state, expected in zip(found.get(name, ()), whole.get(name, ()), strict=True):
                padded = given["attention_mask"][..., None]
                torch.testing.assert_close(state * padded, expected * padded, atol=1e-5, rtol=1e-4)
        parts = model(**given, return_dict=False), sparse(model)(**given, return_dict=False)
        assert len(parts[0]) == len(parts[1])


def test_embeddings_instead_of_tokens() -> None:
    given = batch(21, 4, GLOBAL["several"])
    for model in (longformer(), led().encoder):
        other = sparse(model)
        embeddings = model.get_input_embeddings()(given["input_ids"])
        inputs = {**given, "input_ids": None, "inputs_embeds": embeddings}
        expected, found = model(**inputs)[0], other(**inputs)[0]
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
        with pytest.raises(ValueError, match="not both"):
            other(**{**given, "inputs_embeds": embeddings})


def test_models_with_heads() -> None:
    given = batch(61, 20)
    for kind, config in (
        (LongformerForSequenceClassification, longformer().config),
        (BigBirdForQuestionAnswering, bigbird().config),
        (LEDForConditionalGeneration, led().config),
    ):
        model = kind(config).eval()
        more = (
            {"decoder_input_ids": given["input_ids"][:, :5]} if config.model_type == "led" else {}
        )
        expected, found = model(**given, **more), sparse(model)(**given, **more)
        name = "start_logits" if "start_logits" in expected else "logits"
        value, wanted = found[name], expected[name]
        if value.shape == given["input_ids"].shape:
            value, wanted = (x * given["attention_mask"] for x in (value, wanted))
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4)


def test_parameters_stay_what_they_are() -> None:
    for model in (longformer(), led(), bigbird(), longt5(), longt5("transient-global")):
        before = [(name, id(value)) for name, value in model.named_parameters()]
        state, names = model.state_dict(), [name for name, _ in model.named_modules()]
        assert sparsify(model) is model
        assert [(name, id(value)) for name, value in model.named_parameters()] == before
        assert model.state_dict().keys() == state.keys()
        assert [name for name, _ in model.named_modules()] == names
        again = type(model)(model.config)
        again.load_state_dict(state)
        assert type(model).__name__ == type(again).__name__
        assert "by sparse_compile" in repr(model)
        assert pickle.loads(pickle.dumps(model)).state_dict().keys() == state.keys()


def test_hooks_stay() -> None:
    model, seen = bigbird(), []
    attention = model.encoder.layer[1].attention.self
    attention.register_forward_hook(lambda module, given, out: seen.append(out[0].shape))
    sparsify(model)(**batch(48))
    assert seen == [(2, 48, 32)]
    assert isinstance(attention, BigBirdBlockSparseAttention)


def test_layers_alone_take_what_transformers_hands_them() -> None:
    model, hidden = longformer(), torch.randn(2, 16, 32)
    marks = torch.zeros(2, 16)
    marks[1, 12:], marks[:, 3] = -1e4, 1e4
    masks = marks < 0, marks > 0, True
    expected = model.encoder(hidden, marks)[0]
    torch.testing.assert_close(
        sparse(model).encoder(hidden, marks)[0] * (marks >= 0)[..., None],
        expected * (marks >= 0)[..., None],
        atol=1e-5,
        rtol=1e-4,
    )
    attention = model.encoder.layer[0].attention.self
    other = sparse(model).encoder.layer[0].attention.self
    torch.testing.assert_close(
        other(hidden, marks, *masks)[0], attention(hidden, marks, *masks)[0], atol=1e-5, rtol=1e-4
    )
    blocks = torch.ones(2, 12, 4)
    blocks[1, 9:] = 0
    block_sparse = bigbird().encoder.layer[0].attention.self
    hidden, flat = torch.randn(2, 48, 32), blocks.view(2, 48)
    bands = bigbird().create_masks_for_block_sparse_attn(flat, 4)
    expected = block_sparse(hidden, bands[1], bands[2], bands[3], bands[0], bands[0])[0]
    found = sparsify(block_sparse)(hidden, from_blocked_mask=blocks)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing() -> None:
    for model in (longformer(), led(), bigbird()):
        given = batch(61, 7, None if model.config.model_type == "big_bird" else GLOBAL["several"])
        if model.config.model_type == "led":
            given["decoder_input_ids"] = given["input_ids"][:, :6]
        other = sparse(model.train())
        other.gradient_checkpointing_enable()
        assert_same(model, other, given)


def test_mixed_precision() -> None:
    model, given = longformer(), batch(29, 5, GLOBAL["several"])
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse(model)(**given).last_hidden_state
    expected = model(**given).last_hidden_state
    assert (found - expected)[0].abs().max() < 0.1


def test_models_without_such_attention() -> None:
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    full = bigbird(attention_type="original_full")
    for model in (BertModel(config), full, nn.Linear(2, 2), sparse(longformer())):
        with pytest.raises(NothingToSparsify, match=f"{type(model).__name__} has no attention to"):
            sparsify(model)


def test_weights_are_never_made() -> None:
    for model in (longformer(), led(), bigbird()):
        model = sparsify(model)
        with pytest.raises(WeightsNeeded, match="got output_attentions=True"):
            model(**batch(48), output_attentions=True)
    with pytest.raises(WeightsNeeded, match="got output_attentions=True"):
        sparsify(longformer(output_attentions=True, attn_implementation="eager"))


def test_weights_are_not_dropped() -> None:
    model = longformer()
    for layer in model.encoder.layer:
        layer.attention.self.dropout = 0.1
    other = sparse(model)
    torch.testing.assert_close(other(**batch(16))[0], model(**batch(16))[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(WeightsNeeded, match=r"\(p = 0.1\)"):
        other.train()(**batch(16))
    sparsify(model, attention_dropout=False).train()(**batch(16))


COMPILED = {
    "longformer": (longformer, batch(61, 12, GLOBAL["several"]), 4),
    "longformer, nothing global": (longformer, batch(32), 4),
    "led": (
        led,
        {**batch(45, 12, GLOBAL["several"]), "decoder_input_ids": batch(6)["input_ids"]},
        4,
    ),
    "bigbird": (bigbird, batch(61, 12), 2),
    "bigbird in training": (lambda: bigbird().train(), batch(61, 12), 2),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.inductor] if n == "longformer" else []) for n in COMPILED],
)
def test_compiled_in_one_graph(name: str) -> None:
    make, given, _ = COMPILED[name]
    torch._dynamo.reset()
    model = make()
    other = torch.compile(sparse(model), backend="sparse_compile", fullgraph=True)
    assert_same(model, Named(other), given)


@pytest.mark.parametrize("name", COMPILED)
def test_masks_are_read_from_the_graph(name: str) -> None:
    make, given, count = COMPILED[name]
    torch._dynamo.reset()
    report = sparse_compile.explain(sparse(make()), **given)
    assert report.graphs == 1
    own = [site for site in report.sites if "integrations" in str(site) or "masked.py" in str(site)]
    assert len(own) == count
    for site in own:
        assert site.rewritten
        assert "tensor [" not in str(site)


def test_a_copy_is_its_own() -> None:
    model = longformer()
    other = copy.deepcopy(sparsify(model))
    assert isinstance(other, LongformerModel)
    with torch.no_grad():
        other.encoder.layer[0].attention.self.value.weight.zero_()
    assert model.encoder.layer[0].attention.self.value.weight.abs().sum() > 0
