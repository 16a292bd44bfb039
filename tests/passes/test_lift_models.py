"""Masks as they come out of real models: tiny random Hugging Face transformers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from sparse_compile.options import Options
from sparse_compile.passes.lift import LiftCache, lift_mask
from sparse_compile.sites.site import LiftedMask
from sparse_compile.spec import EmptyRows
from tests.passes.lifting import capture, sites

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}


def build(name: str, attention: str) -> Any:
    t, eager = transformers, {"attn_implementation": attention}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "mistral":
            config = t.MistralConfig(**GROUPED, **eager, num_hidden_layers=2, sliding_window=8)
            return t.MistralModel(config).eval()
        if name == "bert":
            return t.BertModel(t.BertConfig(**SMALL, **eager, num_hidden_layers=2)).eval()
        if name == "modernbert":
            tokens = {key: 1 for key in ("cls_token_id", "bos_token_id")}
            tokens |= {key: 2 for key in ("sep_token_id", "eos_token_id")}
            local = {"local_attention": 8, "global_attn_every_n_layers": 2}
            config = t.ModernBertConfig(**SMALL, **eager, **tokens, **local, num_hidden_layers=2)
            return t.ModernBertModel(config).eval()
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32}
        config = t.Llama4TextConfig(
            **GROUPED,
            **eager,
            **experts,
            num_hidden_layers=4,
            head_dim=8,
            attention_chunk_size=8,
            interleave_moe_layer_step=8,
        )
        return t.Llama4TextModel(config).eval()


PADDED = "Ne(t0(b, kv), 0)"
EXPECTED = {
    ("mistral", False): {"(kv <= q) & (-kv + q < 8)"},
    ("mistral", True): {f"(kv <= q) & {PADDED} & (-kv + q < 8)"},
    ("bert", False): {"True"},
    ("bert", True): {PADDED},
    ("modernbert", False): {"True", "Abs(kv - q) < 5"},
    ("modernbert", True): {PADDED, f"{PADDED} & (Abs(kv - q) < 5)"},
    ("llama4", False): {"kv <= q", "(kv <= q) & Eq(FloorDiv(kv, 8), FloorDiv(q, 8))"},
    ("llama4", True): {
        f"(kv <= q) & {PADDED}",
        "(kv <= q) & Ne(t1(b, kv), 0) & Eq(FloorDiv(kv - t0(b), 8), FloorDiv(q - t0(b), 8))",
    },
}


@pytest.mark.parametrize(
    ("name", "attention", "padded"),
    [  # every pair, of models and of decoders and encoders
        ("mistral", "sdpa", True),
        ("mistral", "eager", False),
        ("bert", "sdpa", True),
        ("bert", "eager", False),
        ("modernbert", "sdpa", False),
        ("modernbert", "eager", True),
        ("llama4", "sdpa", False),
        ("llama4", "eager", True),
    ],
)
def test_masks_of_models(name: str, attention: str, padded: bool) -> None:
    model = build(name, attention)
    options = {} if name in ("bert", "modernbert") else {"use_cache": False}
    ids, pad = torch.randint(3, 60, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    pad[0, :5] = 0
    found = lift_all(model, ids, {**options, **({"attention_mask": pad} if padded else {})})
    assert {str(mask.mask) for mask in found} == EXPECTED[name, padded]
    policy = EmptyRows.MEAN_ADDED if padded and attention == "eager" else EmptyRows.ZERO
    assert {mask.empty_rows for mask in found} == {policy}


def lift_all(
    model: Any, ids: torch.Tensor, options: dict[str, Any], dynamic: bool = False
) -> list[LiftedMask]:
    def run(ids: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return model(ids, **options).last_hidden_state  # type: ignore[no-any-return]

    with torch.no_grad():
        captured = capture(run, ids, options, dynamic=dynamic)
    cache = LiftCache()
    found = [lift_mask(site, captured.inputs, Options(), cache) for site in sites(captured.gm)]
    assert all(isinstance(mask, LiftedMask) for mask in found), found
    return [mask for mask in found if isinstance(mask, LiftedMask)]


def test_dynamic_sizes_change_nothing() -> None:
    pad = torch.ones(2, 20, dtype=torch.long)
    options = {"use_cache": False, "attention_mask": pad}
    found = lift_all(
        build("mistral", "eager"), torch.randint(3, 60, (2, 20)), options, dynamic=True
    )
    assert {str(mask.mask) for mask in found} == EXPECTED["mistral", True]


def test_decoding_with_a_static_cache() -> None:
    model = build("mistral", "sdpa")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(torch.randint(3, 60, (1, 6)), past_key_values=cache)

        def step(ids: torch.Tensor) -> torch.Tensor:
            return model(ids, past_key_values=cache).last_hidden_state  # type: ignore[no-any-return]

        captured = capture(step, torch.randint(3, 60, (1, 1)))
    found = [
        lift_mask(site, captured.inputs, Options(), LiftCache()) for site in sites(captured.gm)
    ]
    assert all(isinstance(mask, LiftedMask) for mask in found), found
