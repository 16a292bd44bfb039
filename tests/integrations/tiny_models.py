"""Tiny models of transformers that are sparse by hand, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    LEDConfig,
    LEDModel,
    LongformerConfig,
    LongformerModel,
    LongT5Config,
    LongT5EncoderModel,
    LongT5Model,
)

from sparse_compile.integrations.transformers import sparsify

VOCABULARY = 40


def longformer(**settings: Any) -> Any:
    """With another window in each of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LongformerConfig(
        vocab_size=VOCABULARY,
        intermediate_size=32,
        attention_window=[8, 4],
        max_position_embeddings=160,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        **{"sep_token_id": 2, **sizes, **settings},
    )
    return LongformerModel(config).eval()


def led(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LEDConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        attention_window=8,
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=32,
        dropout=0.0,
        **settings,
    )
    return LEDModel(config).eval()


def bigbird(**settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"attention_type": "block_sparse", **settings}
    sizes = {"block_size": 4, "num_random_blocks": 2, "max_position_embeddings": 256}
    config = BigBirdConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=32,
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        sep_token_id=2,
        **{**sizes, **settings},
    )
    return BigBirdModel(config).eval()


def longt5(kind: str = "local", whole: bool = False, **settings: Any) -> Any:
    """The encoder, or the ``whole`` model; with attention of a ``kind``, blocks of 5 and of 4."""
    torch.manual_seed(0)
    sizes = {"local_radius": 4, "global_block_size": 4, "relative_attention_max_distance": 16}
    config = LongT5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=3,
        num_decoder_layers=1,
        num_heads=2,
        relative_attention_num_buckets=8,
        encoder_attention_type=kind,
        decoder_start_token_id=0,
        **{"dropout_rate": 0.0, **sizes, **settings},
    )
    model = (LongT5Model if whole else LongT5EncoderModel)(config).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def sparse(model: Any) -> Any:
    """A copy that is sparsified."""
    return sparsify(copy.deepcopy(model))


def batch(n: int, padding: int = 0, is_global: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Two sequences of n tokens; the second has padding.

    Args:
        n: how many.
        padding: how many of the second are.
        is_global: from places [n] and rows [2, 1], which tokens are global.
    """
    generator = torch.Generator().manual_seed(n)
    found = {"input_ids": torch.randint(5, VOCABULARY, (2, n), generator=generator)}
    mask = torch.ones(2, n, dtype=torch.int64)
    mask[1, n - padding :] = 0
    if padding:
        found["attention_mask"] = mask
    if is_global is not None:
        chosen = is_global(torch.arange(n), torch.arange(2)[:, None])  # type: ignore[call-arg]
        found["global_attention_mask"] = chosen.expand(2, n).long()
    return found


def results(model: Any, given: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Hidden states [B, N, D] of tokens that are no padding, 0 at others, and gradients."""
    model.zero_grad()
    out = model(**given)
    hidden = out[0] if "decoder_input_ids" in given else out.last_hidden_state
    mask = given.get("attention_mask")
    if mask is not None and mask.shape == hidden.shape[:2]:
        hidden = hidden * mask[..., None]
    generator = torch.Generator().manual_seed(1)
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(model: Any, other: Any, given: Any) -> None:
    """Hidden states and the gradients of all parameters are equal; one that is absent is 0."""
    hidden, gradients = results(model, given)
    found, others = results(other, given)
    torch.testing.assert_close(found, hidden, atol=2e-6, rtol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        expected = torch.zeros(()) if gradient is None else gradient
        got = torch.zeros_like(expected) if others[name] is None else others[name]
        assert got is not None
        error, size = (got - expected).abs().max(), expected.abs().max()
        assert error <= 2e-5 * (1 + size), (name, error, size)


class Named(nn.Module):
    """A compiled module under the names of its parameters."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, **given: Any) -> Any:
        return self.compiled(**given)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled._orig_mod.named_parameters(*args, **kwargs)
