"""Every attention of real models, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from sparse_compile.passes.find import find_attention
from sparse_compile.sites.site import AttentionSite
from tests.passes.capture import Captured, capture
from tests.passes.site_meaning import Found, compare, rejections, sites

transformers = pytest.importorskip("transformers")

LAYERS, TOKENS, BATCH = 2, 12, 2
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def mistral(implementation: str) -> nn.Module:
    config = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config)


def bert(implementation: str) -> nn.Module:
    config = transformers.BertConfig(**SMALL)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def tokens() -> Tensor:
    return torch.arange(BATCH * TOKENS).view(BATCH, TOKENS) % 64


def padding() -> Tensor:
    """The first sequence ends three tokens early."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


def find_all(graphs: tuple[Captured, ...]) -> Found:
    return tuple(found for captured in graphs for found in find_attention(captured.gm))


def assert_all_found(graphs: tuple[Captured, ...], kind: str) -> tuple[AttentionSite, ...]:
    """One site per layer, each meaning what the model computes."""
    found = find_all(graphs)
    assert rejections(found) == ()
    assert [site.kind for site in sites(found)] == [kind] * LAYERS
    comparisons = [comparison for captured in graphs for comparison in compare(captured)]
    for comparison in comparisons:
        torch.testing.assert_close(
            comparison.computed.double(), comparison.claimed, rtol=1e-5, atol=1e-5
        )
    return sites(found)


@pytest.mark.parametrize(
    ("implementation", "padded", "cached"),
    [  # every pair
        ("sdpa", False, False),
        ("sdpa", True, True),
        ("eager", True, False),
        ("eager", False, True),
    ],
)
def test_mistral(implementation: str, padded: bool, cached: bool) -> None:
    model = mistral(implementation).eval()
    mask = {"attention_mask": padding()} if padded else {}
    graphs = capture(model, tokens(), use_cache=cached, fullgraph=False, **mask)
    found = assert_all_found(graphs, implementation)
    for site in found:
        assert site.scale == pytest.approx(8**-0.5)
        assert site.k.node.meta["example_value"].shape == (BATCH, 2, TOKENS, 8)
        assert site.v.node.meta["example_value"].shape == (BATCH, 2, TOKENS, 8)
        assert "modeling_mistral.py" in " ".join(site.where)
    assert len({operand.node for site in found for operand in site.masks}) == 1


def test_mistral_dynamic() -> None:
    model = mistral("eager").eval()
    graphs = capture(model, tokens(), use_cache=False, dynamic=True)
    for site in assert_all_found(graphs, "eager"):
        assert isinstance(site.scale, Node) or site.scale == pytest.approx(8**-0.5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_with_padding(implementation: str) -> None:
    graphs = capture(bert(implementation), tokens(), attention_mask=padding())
    for site in assert_all_found(graphs, implementation):
        assert [mask.role for mask in site.masks] == ["keep" if implementation == "sdpa" else "add"]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_checkpointed_training(implementation: str) -> None:
    model = mistral(implementation).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    graphs = capture(model, tokens(), grad=True, fullgraph=False, use_cache=False)
    found = assert_all_found(graphs, implementation)
    assert all(site.scope.call is not None for site in found)
    outer = [site.scope.feeds.get(site.masks[0].node) for site in found]
    assert outer[0] is outer[1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_active_dropout_is_found(implementation: str) -> None:
    model = bert(implementation).train()
    graphs = capture(model, tokens(), grad=True, fullgraph=False)
    found = find_all(graphs)
    assert rejections(found) == ()
    assert model.config.attention_probs_dropout_prob == 0.1
    assert [site.dropout for site in sites(found)] == [0.1] * LAYERS


def test_a_router_is_not_attention() -> None:
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=4, sliding_window=None
    )
    config._attn_implementation = "eager"
    model = transformers.MixtralForCausalLM(config).eval()
    found = find_all(capture(model, tokens(), use_cache=False, fullgraph=False))
    assert (len(sites(found)), rejections(found)) == (LAYERS, ())
