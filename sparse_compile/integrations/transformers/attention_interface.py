"""The attention of layers under ``attn_implementation="sparse_compile"``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparse_compile.api.attention import attention
from sparse_compile.errors import WeightsNeeded
from sparse_compile.integrations.transformers.mask_interface import PreparedMask
from sparse_compile.integrations.transformers.masked import attend as attend_where
from sparse_compile.patterns import Causal


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys, see :func:`sparse_compile.attention`."""

    scale: float | None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def are_plain(self) -> bool:
        """Whether they are only scaled, which is all that SDPA knows."""
        return not self.softcap and self.sinks is None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PreparedMask | Tensor | None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer, as transformers calls an implementation.

    Args:
        module: the layer.
        query: [B, Hq, Nq, D].
        key, value: [B, Hkv, Nkv, D]; Hkv divides Hq.
        attention_mask: what :func:`sparse_compile.integrations.transformers.mask_interface.mask`
            returns, or a tensor of the user's own that broadcasts to [B, Hq, Nq, Nkv].
        **given: ``scaling``, ``softcap``, ``s_aux`` (the scores of attention sinks, [Hq]),
            ``dropout``, ``is_causal``, ``position_bias``; others do not matter.

    Returns:
        [B, Nq, Hq, D], and no weights.

    Raises:
        WeightsNeeded: weights are to be returned, or dropped where scores have a softcap or sinks.
    """
    scores = Scores(given.get("scaling"), given.get("softcap"), given.get("s_aux"))
    operands = query, key, value
    if _is_for_sdpa(module, scores, given):
        if isinstance(attention_mask, PreparedMask):
            shape = query.shape[0], 1, query.shape[2], key.shape[2]
            attention_mask = attention_mask.function.tensor(shape, query.device).expand(shape)
        done: tuple[Tensor, None] = sdpa_attention_forward(
            module, *operands, attention_mask, **given
        )
        return done
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if query.shape[2] > 1 and attention_mask is None and causal:
        # As SDPA has it: queries and keys start together, and later keys are room in a cache.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        out = _attention(query, key, value, Causal(), scores)
    else:
        out = _masked(*operands, attention_mask, scores)
    return out.transpose(1, 2).contiguous(), None


def _is_for_sdpa(module: nn.Module, scores: Scores, given: Mapping[str, Any]) -> bool:
    """Whether a layer asks for what only SDPA computes: weights dropped, a bias, or paged keys."""
    name = type(module).__name__
    if given.get("output_attentions"):
        raise WeightsNeeded(
            f"sparse_compile: {name} got output_attentions=True, but its weights are never made. "
            'Remove it, or write attn_implementation="eager".'
        )
    asked = [name for name in ("dropout", "position_bias", "cache") if _is_given(given.get(name))]
    if asked and not scores.are_plain:
        raise WeightsNeeded(
            f"sparse_compile: {name} asks for {asked[0]}, which needs attention weights where "
            "scores have a softcap or sinks. Train with attention_dropout=0.0, or write "
            'attn_implementation="eager".'
        )
    return bool(asked)


def _is_given(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and value == 0.0)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | Tensor | None, scores: Scores
) -> Tensor:
    if isinstance(mask, PreparedMask):
        more = {"softcap": scores.softcap, "sinks": scores.sinks}
        return attend_where(q, k, v, mask.function, scores.scale, **more)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
    # In a graph SDPA is found, and may be cheaper. A floating mask may be a bias.
    by_sdpa = torch.compiler.is_compiling() or q.shape[2] == 1
    if scores.are_plain and (by_sdpa or (mask is not None and mask.is_floating_point())):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=grouped)
    if q.shape[2] == 1:
        return _of_one_query(q, k, v, mask, scores)
    return _attention(q, k, v, mask, scores)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Causal | Tensor | None, scores: Scores
) -> Tensor:
    softcap = scores.softcap or None
    return attention(q, k, v, mask, scores.scale, softcap=softcap, sinks=scores.sinks)


def _of_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores) -> Tensor:
    """What SDPA does not know, for a token that is generated, where every key is read."""
    group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    # The heads of a group stand in the place of queries.
    logits = (_grouped(q, group) @ k.mT).float() * scale
    if scores.softcap:
        logits = scores.softcap * torch.tanh(logits / scores.softcap)
    if mask is not None:
        mask = mask.expand(-1, q.shape[1] if mask.shape[1] > 1 else group, -1, -1)
        mask = _grouped(mask, group)
        added = mask.dtype != torch.bool
        logits = logits + mask if added else logits.masked_fill(~mask, torch.finfo(q.dtype).min)
    if scores.sinks is not None:
        sinks = scores.sinks.float().view(-1, group, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = logits.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    out: Tensor = (weights @ v).flatten(1, 2).unsqueeze(2)
    return out


def _grouped(x: Tensor, group: int) -> Tensor:
    """[B, H, 1, N] as [B, H / group, group, N]."""
    return x.reshape(x.shape[0], -1, group, x.shape[-1])
