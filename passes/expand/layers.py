"""What the fused calls of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` compute."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.expand.inputs import Inputs
from sparse_compile.passes.expand.python_mha import as_python
from sparse_compile.passes.expand.recipe import Recipe
from sparse_compile.sites.site import Refused

_USED = "its attention weights are returned, so they must exist"
_USE_NOT = "pass need_weights=False, or leave the weights unused"

_ATTENTION = torch.ops.aten._native_multi_head_attention.default
_LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default


def module_attention(call: Node, read: Collection[int], inputs: Inputs) -> Recipe:
    """``F.multi_head_attention_forward``: its own Python code.

    Raises:
        Refused: its weights are read.
    """
    if 1 in read:
        raise Refused(_USED, _USE_NOT)
    return Recipe(as_python(), call.args, call.kwargs)


def native_attention(call: Node, read: Collection[int], inputs: Inputs) -> Recipe:
    """``torch._native_multi_head_attention``.

    Raises:
        Refused: its weights are read.
    """
    if 1 in read:
        raise Refused(_USED, _USE_NOT)
    return Recipe(_attention_alone, (_named(call, _ATTENTION),))


def native_layer(call: Node, read: Collection[int], inputs: Inputs) -> Recipe:
    """``torch._transformer_encoder_layer_fwd``."""
    given = _named(call, _LAYER)
    return Recipe(_layer, ({**given, "num_head": given["num_heads"]},))


def _named(call: Node, operator: torch._ops.OpOverload) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's."""
    arguments = operator._schema.arguments
    defaults = {one.name: one.default_value for one in arguments if one.has_default_value()}
    given = zip((one.name for one in arguments), call.args, strict=False)
    return {**defaults, **dict(given), **call.kwargs}


_Given = Mapping[str, Any]


def _attention_alone(given: _Given) -> tuple[Tensor, None]:
    return _attention(given["query"], given["key"], given["value"], given), None


def _attention(query: Tensor, key: Tensor, value: Tensor, given: _Given) -> Tensor:
    """Projections, attention and projection of [B, N, E]."""
    heads = given["num_head"]
    weight, bias = given["qkv_weight"], given["qkv_bias"]
    if query is key and key is value:
        projected = F.linear(query, weight, bias).chunk(3, -1)
    else:
        parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        projected = tuple(F.linear(*part) for part in parts)
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in projected)
    scores = torch.matmul(q * (1 / math.sqrt(q.shape[-1])), k.transpose(-2, -1))
    if given["mask"] is not None:
        hidden = _hidden(given["mask"].to(torch.bool), scores, given["mask_type"])
        scores = scores.masked_fill(hidden, -math.inf)
    out = torch.matmul(torch.softmax(scores, -1), v)
    return F.linear(out.transpose(1, 2).flatten(2), given["proj_weight"], given["proj_bias"])


def _hidden(mask: Tensor, scores: Tensor, kind: int | None) -> Tensor:
    """A mask, True where keys are hidden, that broadcasts against the scores.

    Raises:
        Refused: it is of no kind that the operator takes.
    """
    if mask.dim() == scores.dim():
        return mask
    if kind == 0 and mask.dim() == 2:  # of pairs
        return mask.unsqueeze(0).unsqueeze(0)
    if kind == 1 and mask.dim() == 2:  # of keys
        return mask.unsqueeze(1).unsqueeze(1)
    raise Refused(f"it has a mask of {mask.dim()} axes and type {kind}")


def _layer(given: _Given) -> Tensor:
    """One layer: attention and a feed-forward network, each with a norm and beside the input."""
    x = given["src"]

    def normed(x: Tensor, number: int) -> Tensor:
        parameters = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
        return F.layer_norm(x, (given["embed_dim"],), *parameters, given["eps"])

    def beside(x: Tensor, number: int, part: Callable[[Tensor], Tensor]) -> Tensor:
        if given["norm_first"]:
            return part(normed(x, number)) + x
        return normed(part(x) + x, number)

    x = beside(x, 1, lambda x: _attention(x, x, x, given))
    return beside(x, 2, lambda x: _feed_forward(x, given))


def _feed_forward(x: Tensor, given: _Given) -> Tensor:
    # The operator that the layer itself calls: its gelu is another one on a GPU.
    rows = torch._addmm_activation(
        given["ffn_bias_1"], x.flatten(0, 1), given["ffn_weight_1"].t(), use_gelu=given["use_gelu"]
    )
    rows = F.linear(rows, given["ffn_weight_2"], given["ffn_bias_2"])
    return rows.view(x.shape)
