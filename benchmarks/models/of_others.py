"""The models of the survey that are not in transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.models.entry import BATCH, LENGTH, Entry, Inputs, drawn_anew, kept, noise
from benchmarks.models.entry import image as pixels


def _timm(family: str, implementation: str, **given: Any) -> nn.Module:
    from timm import models

    torch.manual_seed(0)
    model = drawn_anew(getattr(models, family)(num_classes=8, **given))
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = implementation == "sdpa"
    return model


def _vit(implementation: str, dropout: bool) -> nn.Module:
    sizes = dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4)
    return _timm("VisionTransformer", implementation, **sizes)


def _swin(implementation: str, dropout: bool) -> nn.Module:
    sizes = dict(img_size=64, patch_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4))
    return _timm("SwinTransformer", implementation, window_size=4, drop_path_rate=0.0, **sizes)


def _eva(implementation: str, dropout: bool) -> nn.Module:
    sizes = dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4)
    options = dict(swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(8, 8), mlp_ratio=1.5)
    return _timm("Eva", implementation, **sizes, **options)


def _image(padding: str) -> Inputs:
    return {"x": pixels(padding)["pixel_values"]}


def _timm_entry(name: str, build: Any) -> Entry:
    return Entry(f"timm {name}", build, _image, ("none",), package="timm")


TIMM = (_timm_entry("vit", _vit), _timm_entry("swin", _swin), _timm_entry("eva02", _eva))

_HEADS = dict(num_layers=2, attention_head_dim=16, num_attention_heads=4)
_LATENTS = dict(sample_size=16, patch_size=2, in_channels=4, out_channels=4)


def _diffusers(family: str, implementation: str, **given: Any) -> nn.Module:
    import diffusers
    from diffusers.models import attention_processor

    torch.manual_seed(0)
    model = getattr(diffusers, family)(**given)
    if implementation == "eager":
        model.set_attn_processor(attention_processor.AttnProcessor())
    return drawn_anew(model)


def _sd3(implementation: str, dropout: bool) -> nn.Module:
    sizes = dict(joint_attention_dim=32, caption_projection_dim=64, pooled_projection_dim=32)
    given = {**_HEADS, **_LATENTS, **sizes, "pos_embed_max_size": 16}
    return _diffusers("SD3Transformer2DModel", implementation, **given)


def _sd3_inputs(padding: str) -> Inputs:
    return {
        "hidden_states": noise(BATCH, 4, 16, 16),
        "encoder_hidden_states": noise(BATCH, LENGTH, 32),
        "pooled_projections": noise(BATCH, 32),
        "timestep": torch.tensor([1.0, 5.0, 9.0]),
    }


def _flux(implementation: str, dropout: bool) -> nn.Module:
    sizes = dict(num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32)
    given = {**_HEADS, "num_layers": 1, **sizes, "in_channels": 8, "axes_dims_rope": (4, 6, 6)}
    return _diffusers("FluxTransformer2DModel", implementation, **given)


def _flux_inputs(padding: str) -> Inputs:
    rows = torch.arange(64)
    places = torch.stack([torch.zeros(64), rows // 8, rows % 8], -1)
    return {
        "hidden_states": noise(BATCH, 64, 8),
        "encoder_hidden_states": noise(BATCH, LENGTH, 32),
        "pooled_projections": noise(BATCH, 32),
        "timestep": torch.tensor([0.1, 0.5, 0.9]),
        "img_ids": places,
        "txt_ids": torch.zeros(LENGTH, 3),
    }


def _pixart(implementation: str, dropout: bool) -> nn.Module:
    sizes = dict(cross_attention_dim=64, caption_channels=32, norm_num_groups=4)
    given = {**_HEADS, **_LATENTS, **sizes, "use_additional_conditions": False}
    return _diffusers("PixArtTransformer2DModel", implementation, **given)


def _pixart_inputs(padding: str) -> Inputs:
    mask = {} if padding == "none" else {"encoder_attention_mask": kept(padding)}
    return {
        "hidden_states": noise(BATCH, 4, 16, 16),
        "encoder_hidden_states": noise(BATCH, LENGTH, 32),
        "timestep": torch.tensor([1, 5, 9]),
        **mask,
    }


def _diffusers_entry(name: str, build: Any, inputs: Any, *more: Any) -> Entry:
    return Entry(f"diffusers {name}", build, inputs, *more, package="diffusers")


DIFFUSERS = (
    _diffusers_entry("sd3", _sd3, _sd3_inputs, ("none",), ("sdpa",)),
    _diffusers_entry("flux", _flux, _flux_inputs, ("none",), ("sdpa",)),
    _diffusers_entry("pixart", _pixart, _pixart_inputs),
)
