"""``attn_implementation="sparse_compile"``: what ``"eager"`` means, without a mask of all pairs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import sparse_compile
from sparse_compile.errors import WeightsNeeded
from sparse_compile.integrations.transformers import NAME, register
from sparse_compile.integrations.transformers.mask_interface import PreparedMask
from tests.integrations.decoders import CONFIGS, decoder, tokens

BATCHES = {
    "whole": tokens(40),
    "padded on the left": tokens(40, left_padding=9),
    "padded on the right": tokens(37, right_padding=8),
}


def results(model: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of tokens that are no padding, and gradients."""
    real = given.get("attention_mask", torch.ones_like(given["input_ids"]))
    model.zero_grad()
    logits = model(**given).logits * real[..., None]
    generator = torch.Generator().manual_seed(2)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def assert_same(model: Any, other: Any, given: dict[str, Any]) -> None:
    logits, gradients = results(model, given)
    found, others = results(other, given)
    torch.testing.assert_close(found, logits, atol=2e-6, rtol=1e-4)
    assert gradients.keys() == {name.removeprefix("_orig_mod.") for name in others}
    for name, gradient in others.items():
        expected = gradients[name.removeprefix("_orig_mod.")]
        error, size = (gradient - expected).abs().max(), expected.abs().max()
        assert error <= 2e-5 * (1 + size), (name, error, size)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients(name: str, batch: str) -> None:
    assert_same(decoder(name, "eager"), decoder(name), BATCHES[batch])


@pytest.mark.parametrize("batch", ["whole", "padded on the left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_in_one_graph(name: str, batch: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(decoder(name), backend="sparse_compile", fullgraph=True)
    assert_same(decoder(name, "eager"), compiled, BATCHES[batch])


@pytest.mark.parametrize("name", CONFIGS)
def test_masks_are_read_from_the_graph(name: str) -> None:
    torch._dynamo.reset()
    report = sparse_compile.explain(decoder(name), **BATCHES["padded on the left"])
    assert report.graphs == 1
    assert len(report.sites) == 2
    shown = str(report)
    for site in report.sites:
        assert site.rewritten
        assert "tensor [" not in str(site.mask)
    for part in ("kv <= q", *(["12"] if "window" in name else [])):
        assert part in shown


class _Sizes(TorchDispatchMode):
    """The elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("cache", [None, "dynamic", "static"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "chunks"])
def test_no_mask_of_all_pairs_is_made(name: str, cache: str | None) -> None:
    n = 1600
    model, given = decoder(name), tokens(n, left_padding=100)
    watched = _Sizes()
    with torch.no_grad(), watched:
        if cache is None:
            model(**given)
        else:
            more = {"max_new_tokens": 2, "cache_implementation": cache, "pad_token_id": 0}
            model.generate(**given, **more)
    assert n * 2 * 32 * 4 <= watched.largest < n * n


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation(name: str, cache: str) -> None:
    model, other = decoder(name, "eager"), decoder(name)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    for given in (tokens(21, left_padding=6), tokens(7)):
        expected = model.generate(**given, **options, cache_implementation=cache)
        found = other.generate(**given, **options, cache_implementation=cache)
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["window", "window and sinks"])
def test_generation_with_a_prompt_in_parts(name: str) -> None:
    given, options = tokens(50, left_padding=6), {"max_new_tokens": 6, "do_sample": False}
    options |= {"pad_token_id": 0, "prefill_chunk_size": 16}
    expected = decoder(name, "eager").generate(**given, **options)
    assert decoder(name).generate(**given, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_compiled_generation(cache: str) -> None:
    """The forward of prompt and tokens; with a static cache it is handed a mask from outside."""
    torch._dynamo.reset()
    given, options = tokens(21, left_padding=6), {"max_new_tokens": 8, "do_sample": False}
    options |= {"pad_token_id": 0, "cache_implementation": cache}
    expected = decoder("window and softcap", "eager").generate(**given, **options)
    model = decoder("window and softcap")
    model.forward = torch.compile(model.forward, backend="sparse_compile")
    assert model.generate(**given, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["causal", "window and softcap"])
def test_masks_may_be_made_outside_of_compiled_code(name: str) -> None:
    """As a static cache has it; the function travels, and is read where it is called."""
    model, given = decoder(name), tokens(40, left_padding=9)
    made = model.config, torch.zeros(2, 40, 32), given["attention_mask"], None
    mask: Any = create_causal_mask(*made)
    if name != "causal":
        window = create_sliding_window_causal_mask(*made)
        mask = {"full_attention": mask, "sliding_attention": window}
    inputs = {**given, "attention_mask": mask, "use_cache": False}
    torch._dynamo.reset()
    found = torch.compile(model, backend="sparse_compile", fullgraph=True)(**inputs).logits
    expected = model(**given).logits
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(found[1, 9:], expected[1, 9:], atol=2e-6, rtol=1e-4)
    torch._dynamo.reset()
    report = sparse_compile.explain(model, **inputs)
    assert all(site.rewritten and "tensor [" not in str(site.mask) for site in report.sites)


def test_packed_sequences() -> None:
    """Told by positions that start again; each is what it is alone."""
    for name in ("causal", "window"):
        model, ids = decoder(name), tokens(40)["input_ids"][:1]
        positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
        found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=part).logits[0] for part in ids.split((15, 25), 1)])
        torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-4)


def _prefix(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return kv < 7


def _not_an_expression(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return torch.sin(kv) > 0


@pytest.mark.parametrize("function, is_read", [(_prefix, True), (_not_an_expression, False)])
def test_functions_of_users(function: Callable[..., Any], is_read: bool) -> None:
    model, hidden = decoder("causal"), torch.zeros(2, 20, 32)
    padding = tokens(20, left_padding=4)["attention_mask"]
    made = [
        create_causal_mask(config, hidden, padding, None, or_mask_function=function)
        for config in (model.config, decoder("causal", "sdpa").config)
    ]
    found, expected = made
    assert isinstance(found, PreparedMask) == is_read
    dense = found.function.pattern.dense(20, 20, 2, 1) if is_read else found
    assert dense.expand(2, 1, 20, 20).equal(expected)


def test_masks_of_users() -> None:
    model, eager = decoder("window and softcap"), decoder("window and softcap", "eager")
    plain, plain_eager = decoder("causal"), decoder("causal", "eager")
    given = tokens(24)
    allowed = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    allowed[:, :, 10:, 3] = False
    added = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(
        plain(**given, attention_mask=allowed).logits,
        plain_eager(**given, attention_mask=added).logits,
        atol=2e-6,
        rtol=1e-4,
    )
    bias = added.clone()
    bias[..., 0] += 0.5
    torch.testing.assert_close(
        plain(**given, attention_mask=bias).logits,
        plain_eager(**given, attention_mask=bias).logits,
        atol=2e-6,
        rtol=1e-4,
    )
    masks = {kind: added for kind in ("full_attention", "sliding_attention")}
    expected = eager(**given, attention_mask=masks).logits
    masks = {kind: allowed for kind in masks}
    found = model(**given, attention_mask=masks).logits
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_encoders_and_attention_across() -> None:
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    given = tokens(30, right_padding=7)
    real = given["attention_mask"][..., None]
    torch.manual_seed(0)
    config = BertConfig(**sizes, hidden_size=32, intermediate_size=32)
    model = BertModel(config).eval()
    expected = model(**given).last_hidden_state
    model.set_attn_implementation(NAME)
    found = model(**given).last_hidden_state
    torch.testing.assert_close(found * real, expected * real, atol=2e-6, rtol=1e-4)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    feed = {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
    bart = BartModel(BartConfig(vocab_size=64, **layers, **heads, **feed)).eval()
    short = {"decoder_input_ids": given["input_ids"][:, :11]}
    expected = bart(**given, **short).last_hidden_state
    bart.set_attn_implementation(NAME)
    found = bart(**given, **short).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_weights_that_drop_out_are_left_to_sdpa() -> None:
    given = tokens(40, left_padding=9)
    both = []
    for implementation in (NAME, "sdpa"):
        model = decoder("window", implementation, attention_dropout=0.5).train()
        torch.manual_seed(1)
        both.append(model(**given).logits)
    torch.testing.assert_close(*both)
    capped = decoder("window and softcap", attention_dropout=0.5).train()
    with pytest.raises(WeightsNeeded, match="asks for dropout, which needs attention weights"):
        capped(**given)


def test_weights_are_never_made() -> None:
    with pytest.raises((WeightsNeeded, ValueError), match="output_attentions"):
        decoder("causal")(**tokens(9), output_attentions=True)


def test_gradient_checkpointing() -> None:
    other = decoder("window").train()
    other.gradient_checkpointing_enable()
    assert_same(decoder("window", "eager").train(), other, BATCHES["padded on the left"])


def test_registering_again_does_no_harm() -> None:
    before = AttentionInterface()[NAME], AttentionMaskInterface()[NAME]
    register()
    register()
    assert (AttentionInterface()[NAME], AttentionMaskInterface()[NAME]) == before


def test_masks_are_freed() -> None:
    model, seen = decoder("window"), []

    def look(module: Any, args: Any, given: dict[str, Any]) -> None:
        seen.append(weakref.ref(given["attention_mask"]))

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    model(**tokens(40, left_padding=9))
    assert len(seen) == 2
    gc.collect()
    assert [mask() for mask in seen] == [None, None]
