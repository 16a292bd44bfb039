"""Attention in one call: of F.scaled_dot_product_attention, or of sparse_compile.attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.expr import SCORE, ScoreProgram, learned
from sparse_compile.passes.find import shapes, values
from sparse_compile.passes.find.canonical import canonical, where
from sparse_compile.passes.find.dataflow import Dataflow, constant
from sparse_compile.passes.find.operands import Peeled, Reading, dead_nodes, peel
from sparse_compile.passes.find.scores import probability
from sparse_compile.sites.named import TENSOR, NamedMask
from sparse_compile.sites.operands import MaskOperand, Operand, Scope
from sparse_compile.sites.site import AttentionSite, Called, Refused

_AXES = {
    5: ("b1", "b2", "h", "n", "d"),
    4: ("b", "h", "n", "d"),
    3: ("b", "n", "d"),
    2: ("n", "d"),
}


def match_sdpa(node: Node, flow: Dataflow, scope: Scope) -> AttentionSite:
    """The attention that an SDPA node computes.

    Raises:
        Refused: it cannot be taken.
    """
    call = canonical(node)
    if call is None:
        raise Refused("scaled_dot_product_attention is called in an unknown way")
    masks = _masks(call.args["attn_mask"])
    try:
        return _site(node, call.args, masks, flow, scope)
    except Refused as refused:
        raise Refused(refused.reason, refused.hint, masks) from None


def _site(
    node: Node,
    args: Mapping[str, Any],
    given_masks: tuple[MaskOperand, ...],
    flow: Dataflow,
    scope: Scope,
) -> AttentionSite:
    given = tuple(_operand(args[name], name) for name in ("query", "key", "value"))
    q, k, v = _undo_repeats(given, node, flow)
    operands = q.operand, k.operand, v.operand
    shapes.check_operands(*operands)
    _check_heads(given, args["enable_gqa"])
    output = Operand(node, operands[0].axes)
    shapes.check_output_dtype(output)
    score_shape = (*values.shape(given[0].node)[:-1], shapes.sizes(given[1])["n"])
    score_axes = (*operands[0].axes[:-2], "q", "kv")
    masks = tuple(replace(mask, axes=score_axes, sizes=score_shape) for mask in given_masks)
    shapes.check_masks(masks, score_shape)
    causal = args["is_causal"]
    if not isinstance(causal, bool):
        raise Refused("is_causal is known only at run time", "pass True or False")
    return AttentionSite(
        scope,
        output,
        *operands,
        scale=_scale(args["scale"], operands[0], flow),
        kind="sdpa",
        causal=causal,
        masks=masks,
        score_axes=score_axes,
        where=where(node),
        region=dead_nodes({node}, (q, k, v)),
        score=_score(masks),
        dropout=probability(args["dropout_p"], "dropout_p"),
    )


def _operand(node: object, name: str) -> Operand:
    rank = len(values.shape(node)) if isinstance(node, Node) else 0
    if not isinstance(node, Node) or rank not in _AXES:
        raise Refused(f"{name} has {rank} axes", "give q, k and v the shape [B, H, N, D]")
    return Operand(node, _AXES[rank])


def _undo_repeats(
    given: tuple[Operand, ...], node: Node, flow: Dataflow
) -> tuple[Peeled, Peeled, Peeled]:
    q, k, v = given
    if not q.axes == k.axes == v.axes:
        raise Refused(
            "q, k and v have different numbers of axes", "give each the shape [B, H, N, D]"
        )
    reading = Reading(flow, node, node)
    keys, vals = peel(k, reading), peel(v, reading)
    if not shapes.heads_agree(keys.operand, vals.operand):
        return Peeled(q), Peeled(k), Peeled(v)
    return Peeled(q), keys, vals


def _check_heads(given: tuple[Operand, ...], grouped: object) -> None:
    q, k, _ = (shapes.sizes(operand)["h"] for operand in given)
    if grouped is not True and values.differ(q, k) and values.differ(k, 1):
        raise Refused(f"q has {q} heads and k has {k}, without enable_gqa", "pass enable_gqa=True")


def _masks(mask: Any) -> tuple[MaskOperand, ...]:
    if mask is None:
        return ()
    dtype = values.dtype(mask)
    if dtype is None:
        raise Refused("attn_mask is not a tensor")
    if dtype is torch.bool:
        return (MaskOperand(mask, "keep", -math.inf),)
    if not dtype.is_floating_point:
        raise Refused(
            f"attn_mask is {values.short_dtype(dtype)}", "pass a bool mask, True to attend"
        )
    return (MaskOperand(mask, "add"),)


def _score(masks: tuple[MaskOperand, ...]) -> ScoreProgram | None:
    """What a mask adds, if it is floating, may be more than a mask."""
    adds = any(mask.role == "add" for mask in masks)
    return ScoreProgram(SCORE + learned(0)()) if adds else None


def _scale(scale: Any, q: Operand, flow: Dataflow) -> float | Node:
    features = shapes.head_dim(q)
    if scale is None:
        return 1.0 / math.sqrt(features)
    known = constant(scale, flow)
    if known is None and isinstance(scale, Node):
        return scale
    if known is None:
        raise Refused("the scale is not a number", "pass scale=1 / math.sqrt(head_dim)")
    return known


def match_called(node: Node, scope: Scope) -> AttentionSite:
    """The attention that a call of ``MASKED_ATTENTION``, our own, computes.

    Raises:
        Refused: it cannot be planned.
    """
    args: Any = node.args
    q, k, v, given, sinks, sizes, text, scale = args
    named = NamedMask.parse(text)
    by_tensor = named.selects == TENSOR
    if by_tensor and values.dtype(given[0]) is not torch.bool:
        reason = "its mask is a tensor that is added to the scores"
        hint = "pass a bool tensor, True to attend, to have it planned for these sizes"
        raise Refused(reason, hint)
    return AttentionSite(
        scope,
        Operand(node),
        Operand(q),
        Operand(k),
        Operand(v),
        scale=scale,
        kind="call",
        masks=(MaskOperand(given[0], "keep"),) if by_tensor else (),
        where=where(node),
        region=(node,),
        score=named.score,
        sinks=sinks,
        called=None if by_tensor else Called(named, tuple(given), tuple(sizes)),
    )
