"""The models of transformers in the survey: unmodified, two layers of each, narrow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.models import entry
from benchmarks.models.entry import LENGTH, VOCABULARY, WINDOW, Entry, Inputs

_SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_WORDS = dict(vocab_size=VOCABULARY, **_SPECIAL)
_TEXT: dict[str, Any] = dict(**_WORDS, max_position_embeddings=128)
_SIZES: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.15,
)
_PLAIN = {**_TEXT, **_SIZES}
_GROUPED = {**_PLAIN, "num_key_value_heads": 2, "head_dim": 16}
_WINDOWED = {**_GROUPED, "sliding_window": WINDOW}
_ONE_WINDOWED = {**_WINDOWED, "use_sliding_window": True, "max_window_layers": 1}
_ALTERNATING = {**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}
_N_LAYER = dict(**_WORDS, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.15)
_ALIBI = dict(**_WORDS, initializer_range=0.15)
_D_MODEL = dict(**_TEXT, d_model=64, init_std=0.15)
_TWO_STACKS = dict(
    **_D_MODEL,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
)
_IMAGE = {**_SIZES, "image_size": 64, "patch_size": 8}
_SWIN = dict(
    image_size=64,
    patch_size=4,
    embed_dim=32,
    depths=[2, 2],
    num_heads=[2, 4],
    window_size=4,
    initializer_range=0.15,
)
#: Computed without graph breaks, and in fp64 too.
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, experts_implementation="batched_mm")
_DISENTANGLED = dict(
    relative_attention=True,
    max_relative_positions=32,
    position_buckets=16,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
)
_LATENT = dict(
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    num_key_value_heads=4,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    experts_implementation="batched_mm",
)
_CHUNKED = dict(
    **_EXPERTS,
    intermediate_size_mlp=96,
    attention_chunk_size=WINDOW,
    no_rope_layers=[1, 0],
    moe_layers=[1],
)


def _built(
    config: str, model: str, given: dict[str, Any], implementation: str, dropout: bool
) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**given)
    for part in (made, *_nested(made)):
        if not dropout:
            _without_dropout(part)
        part._attn_implementation = implementation
        part.use_cache = False
    pooling = {"add_pooling_layer": False} if model in _POOLING else {}
    return entry.drawn_anew(getattr(transformers, model)(made, **pooling))


_POOLING = {"BertModel", "RobertaModel", "ViTModel", "SwinModel", "Swinv2Model", "BeitModel"}


def _nested(config: Any) -> list[Any]:
    names = ("text_config", "vision_config")
    return [value for name in names if (value := getattr(config, name, None)) is not None]


def _without_dropout(config: Any) -> None:
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _made(name: str, config: str, model: str, given: dict[str, Any]) -> Entry:
    build = functools.partial(_built, config, model, given)
    has = ("eager",) if name in _WITHOUT_SDPA else ("eager", "sdpa")
    return Entry(name, build, entry.text, implementations=has, dropout=name in ("bert", "gpt2"))


_WITHOUT_SDPA = frozenset(
    ("deberta_v2", "gpt_neo", "gptj", "gemma2", "gpt_oss", "bloom", "mpt", "xglm", "swinv2")
)


def _causal(name: str, family: str, given: dict[str, Any], **more: Any) -> Entry:
    config = f"{family}TextConfig" if family in ("Gemma3", "Llama4") else f"{family}Config"
    model = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    made = _made(name, config, model, {**given, **more})
    return replace(made, paddings=(*entry.PADDINGS, "packed"))


def _encoder(name: str, family: str, given: dict[str, Any], **more: Any) -> Entry:
    return _made(name, f"{family}Config", f"{family}Model", {**given, **more})


def _pair(
    name: str, family: str, inputs: Callable[[str], Inputs], given: dict[str, Any], **more: Any
) -> Entry:
    head = f"{family}ForConditionalGeneration"
    return replace(_made(name, f"{family}Config", head, {**given, **more}), inputs=inputs)


def _image(name: str, family: str, given: dict[str, Any], **more: Any) -> Entry:
    made = _encoder(name, family, given, **more)
    return replace(made, inputs=entry.image, paddings=("none",))


ENCODERS = (
    _encoder("bert", "Bert", _PLAIN),
    _encoder("roberta", "Roberta", _PLAIN),
    _encoder("electra", "Electra", _PLAIN, embedding_size=32),
    _encoder("albert", "Albert", _PLAIN, embedding_size=32),
    _encoder(
        "distilbert",
        "DistilBert",
        dict(**_TEXT, n_layers=2, n_heads=4, dim=64, hidden_dim=96, initializer_range=0.15),
    ),
    _encoder("deberta_v2", "DebertaV2", _PLAIN, **_DISENTANGLED),
    _encoder(
        "modernbert",
        "ModernBert",
        {**_PLAIN, "cls_token_id": 1, "sep_token_id": 2},
        local_attention=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    ),
)
DECODERS = (
    _causal("gpt2", "GPT2", _N_LAYER),
    _causal(
        "gpt_neo",
        "GPTNeo",
        dict(**_TEXT, hidden_size=64, num_layers=2, num_heads=4, initializer_range=0.15),
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
    ),
    _causal("gpt_neox", "GPTNeoX", _PLAIN),
    _causal("gptj", "GPTJ", _N_LAYER, rotary_dim=8),
    _causal("opt", "OPT", {**_PLAIN, "init_std": 0.15}, ffn_dim=96, word_embed_proj_dim=64),
    _causal("xglm", "XGLM", _D_MODEL, ffn_dim=96, num_layers=2, attention_heads=4),
    _causal("bloom", "Bloom", _ALIBI, hidden_size=64, n_layer=2, n_head=4),
    _causal("mpt", "Mpt", _ALIBI, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    _causal("falcon", "Falcon", _PLAIN),
    _causal("falcon (alibi)", "Falcon", _PLAIN, alibi=True),
    _causal("llama", "Llama", _GROUPED),
    _causal("llama4", "Llama4", _GROUPED, **_CHUNKED),
    _causal("mistral", "Mistral", _WINDOWED),
    _causal("mixtral", "Mixtral", _WINDOWED, **_EXPERTS),
    _causal("qwen2", "Qwen2", _ONE_WINDOWED),
    _causal("qwen3", "Qwen3", _ONE_WINDOWED),
    _causal("gemma2", "Gemma2", _ALTERNATING, query_pre_attn_scalar=16),
    _causal("gemma3", "Gemma3", _ALTERNATING, query_pre_attn_scalar=16),
    _causal("gpt_oss", "GptOss", {**_ALTERNATING, "max_position_embeddings": 131072}, **_EXPERTS),
    _causal("phi3", "Phi3", _PLAIN, num_key_value_heads=2, sliding_window=WINDOW),
    _causal("cohere2", "Cohere2", _ALTERNATING),
    _causal("olmo3", "Olmo3", _ALTERNATING),
    _causal("deepseek_v3", "DeepseekV3", _PLAIN, **_LATENT),
)
PAIRS = (
    _pair(
        "t5",
        "T5",
        entry.text_to_text,
        dict(**_WORDS, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
    ),
    _pair("bart", "Bart", entry.text_to_text, _TWO_STACKS),
    _pair(
        "whisper",
        "Whisper",
        entry.sound_to_text,
        {**_TWO_STACKS, "decoder_start_token_id": 1},
        num_mel_bins=8,
        max_source_positions=LENGTH,
        max_target_positions=128,
    ),
    replace(
        _made(
            "clip",
            "CLIPConfig",
            "CLIPModel",
            dict(
                text_config={**_PLAIN, "projection_dim": 32},
                vision_config={**_IMAGE, "projection_dim": 32},
                projection_dim=32,
            ),
        ),
        inputs=entry.image_and_text,
    ),
)
IMAGES = (
    _image("vit", "ViT", _IMAGE),
    _image("swin", "Swin", _SWIN),
    _image("swinv2", "Swinv2", _SWIN),
    _image("beit", "Beit", _IMAGE, use_relative_position_bias=True),
)
TRANSFORMERS = (*ENCODERS, *DECODERS, *PAIRS, *IMAGES)
