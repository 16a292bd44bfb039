"""Tiny unmodified models that select keys: DeepSeek-V3.2, GLM-5 and MiniMax-M3."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

#: A prime, so that nothing else has as many numbers as a mask.
LENGTH, KEPT = 37, 8
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": KEPT,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "max_position_embeddings": 512,
    "use_cache": False,
}


#: The second of the three reuses the first one's indices.
LAYERS = {"deepseek_v32": 1, "glm_moe_dsa": 3, "minimax_m3": 2}


def model(kind: str, implementation: str = "sdpa", layers: int = 0) -> nn.Module:
    """A model in training mode, always the same; by default with as many layers as LAYERS says."""
    layers = layers or LAYERS[kind]
    if kind == "minimax_m3":
        return _minimax(implementation, layers)
    name = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}[kind]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {kind}")
    extra = {"indexer_types": ["full", "shared", "full"]} if kind == "glm_moe_dsa" else {}
    config = getattr(transformers, f"{name}Config")(
        **SMALL,
        **extra,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        attn_implementation=implementation,
    )
    torch.manual_seed(0)
    found: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return found


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(length))


def padding(side: str) -> dict[str, Tensor]:
    if side == "none":
        return {}
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, slice(0, 11) if side == "left" else slice(-11, None)] = 0
    return {"attention_mask": mask}


def _minimax(implementation: str, layers: int) -> nn.Module:
    """It selects blocks of keys for each group of heads."""
    name = "transformers.models.minimax_m3_vl"
    settings = pytest.importorskip(f"{name}.configuration_minimax_m3_vl")
    modeling = pytest.importorskip(f"{name}.modeling_minimax_m3_vl")
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = settings.MiniMaxM3VLTextConfig(
        **sizes,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=8,
        dense_intermediate_size=48,
        mlp_layer_types=["dense"] * layers,
        layer_types=["minimax_m3_sparse"] * layers,
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=2,
        use_cache=False,
        attn_implementation=implementation,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    found: nn.Module = modeling.MiniMaxM3VLForCausalLM(config)
    return found
