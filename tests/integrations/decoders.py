"""Tiny decoders of transformers, one for each kind of mask and of scores."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
)

VOCABULARY = 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 2048,
    "head_dim": 16,
}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
CONFIGS: dict[str, Any] = {
    "causal": LlamaConfig(**_SIZES),
    "window": MistralConfig(**_SIZES, sliding_window=12),
    "window and softcap": Gemma2Config(
        **_SIZES, sliding_window=12, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "window and sinks": GptOssConfig(
        **_SIZES,
        **_EXPERTS,
        sliding_window=12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "two kinds of layers": Gemma3TextConfig(
        **_SIZES,
        sliding_window=12,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "chunks": Llama4TextConfig(
        **_SIZES,
        **_EXPERTS,
        attention_chunk_size=16,
        intermediate_size_mlp=32,
        layer_types=["chunked_attention", "full_attention"],
    ),
}


def decoder(name: str, implementation: str = "sparse_compile", **changes: Any) -> Any:
    """The same weights for every implementation; sinks that matter."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def tokens(n: int, left_padding: int = 0, right_padding: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences; the second has padding."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(1, VOCABULARY, (2, n), generator=generator)
    if not left_padding + right_padding:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1, :left_padding] = 0
    mask[1, n - right_padding :] = 0
    return {"input_ids": ids, "attention_mask": mask}
