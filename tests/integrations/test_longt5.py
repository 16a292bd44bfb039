"""LongT5's encoder means what transformers' own code means, values and gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LongT5ForConditionalGeneration

import sparse_compile
from sparse_compile.codegen import attend
from sparse_compile.errors import BadShape, WeightsNeeded
from sparse_compile.integrations.transformers import sparsify
from sparse_compile.ops import ATTENTION, LAYOUT
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from tests.integrations.tiny_models import Named, assert_same, batch, longt5, sparse

KINDS = ("local", "transient-global")
BIASES = {
    "local": ["relative_attention_bias"],
    "transient-global": ["relative_attention_bias", "global_relative_attention_bias"],
}


def masked(n: int, hidden: Any) -> Any:
    """A batch whose second sequence lacks the tokens at some places."""
    given = batch(n, 1)
    given["attention_mask"] = torch.stack([torch.ones(n), ~hidden(torch.arange(n))]).long()
    return given


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, padding", [(40, 0), (29, 0), (29, 11), (61, 30), (64, 5), (20, 17)])
def test_encoder(kind: str, n: int, padding: int) -> None:
    """Blocks are of 5 tokens, those that are summed of 4; 17 of 20 tokens leave no whole one."""
    model = longt5(kind)
    other = sparse(model)
    assert_same(model, other, batch(n, padding))
    for name in BIASES[kind]:
        attention = other.encoder.block[0].layer[0].get_submodule(_name_of(kind))
        assert attention.get_parameter(f"{name}.weight").grad.abs().max() > 0


def _name_of(kind: str) -> str:
    return "LocalSelfAttention" if kind == "local" else "TransientGlobalSelfAttention"


HIDDEN = {
    "left": lambda at: at < 13,
    "every third": lambda at: at % 3 == 2,
    "a hole": lambda at: (at > 9) & (at < 21),
    "the ends of blocks": lambda at: at % 4 == 3,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_tokens_that_are_hidden_elsewhere(kind: str, hidden: str) -> None:
    model = longt5(kind)
    assert_same(model, sparse(model), masked(37, HIDDEN[hidden]))


@pytest.mark.parametrize("kind", KINDS)
def test_shorter_than_a_block(kind: str) -> None:
    model = longt5(kind)
    assert_same(model, sparse(model), batch(3, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"local_radius": 127, "global_block_size": 16, "relative_attention_max_distance": 128},
        {"local_radius": 30, "global_block_size": 3, "feed_forward_proj": "gated-gelu"},
    ],
)
def test_other_sizes(kind: str, sizes: dict[str, Any]) -> None:
    model = longt5(kind, **sizes)
    assert_same(model, sparse(model), batch(300, 41))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_model(kind: str) -> None:
    model = longt5(kind, whole=True)
    given = batch(29, 11)
    assert_same(model, sparse(model), {**given, "decoder_input_ids": given["input_ids"][:, :6]})


def test_generation() -> None:
    model = LongT5ForConditionalGeneration(longt5().config).eval()
    given = batch(29, 11)
    wanted = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(sparse(model).generate(**given, max_new_tokens=4, do_sample=False), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_tuples_and_embeddings(kind: str) -> None:
    model, given = longt5(kind), batch(21, 4)
    other, real = sparse(model), given["attention_mask"][..., None]
    whole, found = (m(**given, output_hidden_states=True) for m in (model, other))
    assert found.keys() == whole.keys()
    for state, expected in zip(found.hidden_states, whole.hidden_states, strict=True):
        torch.testing.assert_close(state * real, expected * real, atol=1e-5, rtol=1e-4)
    parts = [m(**given, return_dict=False) for m in (model, other)]
    assert len(parts[0]) == len(parts[1])
    embeddings = model.get_input_embeddings()(given["input_ids"])
    again = other(inputs_embeds=embeddings, attention_mask=given["attention_mask"])
    torch.testing.assert_close(again[0] * real, found[0] * real, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="not both"):
        other.encoder(input_ids=given["input_ids"], inputs_embeds=embeddings)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_alone_take_what_transformers_hands_them(kind: str) -> None:
    """A first layer makes its biases itself, a later one gets them; others have none."""
    model, hidden = longt5(kind), torch.randn(2, 23, 32)
    real = torch.ones(2, 23)
    real[1, 17:] = 0
    mask: Tensor = real
    if kind == "local":
        from transformers.models.longt5 import modeling_longt5

        mask = modeling_longt5._get_local_attention_mask(real, 5, hidden.device)
    for number in (0, 1):
        attention = model.encoder.block[number].layer[0].get_submodule(_name_of(kind))
        if number and kind == "transient-global":
            continue  # It asks for a module that only the first one has.
        expected, theirs = attention(hidden, mask)
        found, bias = sparse_attention(model, number, kind)(hidden, mask)
        keep = real[..., None]
        torch.testing.assert_close(found * keep, expected * keep, atol=1e-5, rtol=1e-4)
        assert bias.dim() == 2
        with pytest.raises(BadShape, match="Pass the whole encoder"):
            sparse_attention(model, number, kind)(hidden, mask, theirs)
    with pytest.raises(BadShape, match="mask=None"):
        sparse_attention(model, 0, kind)(hidden)


def sparse_attention(model: Any, number: int, kind: str) -> Any:
    return sparse(model).encoder.block[number].layer[0].get_submodule(_name_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing(kind: str) -> None:
    model = longt5(kind).train()
    other = sparse(model)
    other.gradient_checkpointing_enable()
    assert_same(model, other, batch(29, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(kind: str) -> None:
    model, given = longt5(kind), batch(29, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = sparse(model)(**given).last_hidden_state
    expected = model(**given).last_hidden_state
    assert (found - expected)[0].abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_not_dropped(kind: str) -> None:
    """Dropout elsewhere stays: both draw the same numbers where no weight is dropped."""
    model = longt5(kind, dropout_rate=0.1)
    torch.testing.assert_close(sparse(model)(**batch(16))[0], model(**batch(16))[0])
    with pytest.raises(WeightsNeeded, match=r"\(p = 0.1\)"):
        sparse(model).train()(**batch(16))
    other = sparsify(longt5(kind, dropout_rate=0.1), attention_dropout=False).train()
    model.train()
    for block in model.encoder.block:
        block.layer[0].get_submodule(_name_of(kind)).dropout = 0.0
    for one in (model, other):
        torch.manual_seed(5)
        one.dropped = one(**batch(16))[0]
    torch.testing.assert_close(other.dropped, model.dropped, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_never_made(kind: str) -> None:
    with pytest.raises(WeightsNeeded, match="got output_attentions=True"):
        sparse(longt5(kind))(**batch(16), output_attentions=True)


@pytest.mark.parametrize(
    "backend, padding", [("sparse_compile", 0), ("sparse_compile", 11), ("aot_eager", 11)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind: str, backend: str, padding: int) -> None:
    torch._dynamo.reset()
    model = longt5(kind)
    other = sparse(model)
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    assert_same(model, Named(compiled), batch(29, padding))


@pytest.mark.parametrize("kind", KINDS)
def test_other_lengths_need_no_other_graph(kind: str) -> None:
    """But for whole blocks, which nothing is added to: none of these are."""
    torch._dynamo.reset()
    model = longt5(kind)
    other, graphs = sparse(model), []

    def counted(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm

    compiled = torch.compile(other, backend=counted, fullgraph=True, dynamic=True)
    for n in (29, 42, 55):
        assert_same(model, Named(compiled), batch(n, 11))
    assert len(graphs) == 1


@pytest.mark.parametrize(("kind", "count"), [("local", 1), ("transient-global", 2)])
def test_layers_share_their_layouts(kind: str, count: int) -> None:
    """Under this library's backend; the attention of each layer is there, and has no other."""
    torch._dynamo.reset()
    nodes: Counter[Any] = Counter()

    def rewritten(gm: Any, inputs: Any) -> Any:
        pipeline.run(gm, inputs, Options())
        nodes.update(node.target for node in gm.graph.nodes)
        return gm.forward

    model = longt5(kind)
    compiled = torch.compile(sparse(model), backend=rewritten, fullgraph=True)
    assert_same(model, Named(compiled), batch(29, 11))
    assert (nodes[LAYOUT], nodes[ATTENTION]) == (count, 3 * count)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_has_a_number_for_each_pair(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What attention gets: biases by distance, and one table of tokens or of sequences."""
    seen, forward = [], attend.forward
    monkeypatch.setattr(attend, "forward", lambda call: seen.append(call) or forward(call))
    sparse(longt5(kind))(**batch(61, 12))
    near = [[2, 9], [2, 61]]
    sides = [[2, 32], [2]]
    found = [[list(t.shape) for t in (*call.learned, *call.tables)] for call in seen]
    assert found == [near, *([sides] if kind != "local" else [])] * 3


def test_an_explanation_names_them() -> None:
    """They stay what they are: calls of this library."""
    report = sparse_compile.explain(sparse(longt5("transient-global")), **batch(29, 11))
    assert report.graphs == 1
    assert len(report.sites) == 6
    assert all("it is this library's already" in str(site) for site in report.sites)
