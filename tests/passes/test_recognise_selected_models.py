"""Unmodified models with a DSA indexer run without a mask or scores of all pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_compile
from sparse_compile.passes import Plan
from tests.passes.rewritten import Rewritten, assert_same, trained

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
LAYERS = {"deepseek_v32": 1, "glm_moe_dsa": 3}


def model(kind: str, implementation: str) -> nn.Module:
    name = {"deepseek_v32": "DeepseekV32", "glm_moe_dsa": "GlmMoeDsa"}[kind]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {kind}")
    extra = {"indexer_types": ["full", "shared", "full"]} if kind == "glm_moe_dsa" else {}
    config = getattr(transformers, f"{name}Config")(
        **SMALL,
        **extra,
        num_hidden_layers=LAYERS[kind],
        first_k_dense_replace=LAYERS[kind],
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


@pytest.mark.parametrize(
    ("kind", "implementation", "side"),
    [
        *[("deepseek_v32", how, side) for how in ("sdpa", "eager") for side in ("none", "left")],
        ("deepseek_v32", "sdpa", "right"),
        ("glm_moe_dsa", "sdpa", "left"),
        ("glm_moe_dsa", "eager", "none"),
    ],
)
def test_training(kind: str, implementation: str, side: str) -> None:
    network = model(kind, implementation)
    given = {"input_ids": tokens(), **padding(side)}
    expected = trained(network, network, **given)
    program = Rewritten()
    assert_same(trained(program.compiled(network), network, **given), expected)
    assert [type(found) for found in program.decisions] == [Plan] * LAYERS[kind]
    for found in program.decisions:
        assert found.reason == (
            f"selected: top-k of {KEPT} indices, units of 1 query and 1 key; "
            "the scores of its indexer are computed some queries at a time"
        )
    assert program.squares(LENGTH) == []
    full = 2 if kind == "glm_moe_dsa" else 1
    called = program.targets()
    assert called.count("sparse_compile.selected_attention.default") == LAYERS[kind]
    assert called.count("sparse_compile.canonical_selection.default") == full
    assert called.count("sparse_compile.indexed_topk.default") == full
    assert not [name for name in called if "topk" in name and "indexed" not in name]


def test_the_check_sees_masks_and_scores() -> None:
    network = model("deepseek_v32", "sdpa")
    program = Rewritten(rewrite=False)
    program.compiled(network)(tokens())
    assert len(program.squares(LENGTH)) > 10


def test_one_compilation_for_many_lengths() -> None:
    network = model("deepseek_v32", "sdpa").eval()
    program = Rewritten()
    fast = program.compiled(network, dynamic=True)
    with torch.no_grad():
        for length in (37, 41, 61):
            torch.testing.assert_close(fast(tokens(length)).logits, network(tokens(length)).logits)
    assert len(program.graphs) == 1
    assert {found.executor for found in program.decisions} == {"selected"}


def test_report() -> None:
    report = sparse_compile.explain(model("glm_moe_dsa", "sdpa").eval(), tokens())
    assert report.rewritten == LAYERS["glm_moe_dsa"]
    assert {site.mask for site in report.sites} == {"kv <= q"}
    assert {site.executor for site in report.sites} == {"selected"}
    assert "selected: top-k of 8 indices, units of 1 query and 1 key" in str(report)


@pytest.mark.parametrize("padded", [False, True])
def test_msa(padded: bool) -> None:
    """MiniMax M3 selects blocks for each group of heads; its indexer pools whole scores."""
    name = "transformers.models.minimax_m3_vl"
    settings = pytest.importorskip(f"{name}.configuration_minimax_m3_vl")
    modeling = pytest.importorskip(f"{name}.modeling_minimax_m3_vl")
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = settings.MiniMaxM3VLTextConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rotary_dim=8,
        dense_intermediate_size=48,
        mlp_layer_types=["dense"],
        layer_types=["minimax_m3_sparse"],
        index_n_heads=2,
        index_head_dim=16,
        index_block_size=8,
        index_topk_blocks=2,
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    network = modeling.MiniMaxM3VLForCausalLM(config)
    given = {"input_ids": tokens(), **padding("right" if padded else "none")}
    program = Rewritten()
    found = trained(program.compiled(network), network, **given)
    assert_same(found, trained(network, network, **given))
    (decision,) = program.decisions
    assert isinstance(decision, Plan)
    assert decision.reason == "selected: 2 indices, units of 1 query and 8 keys"
