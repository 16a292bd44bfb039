"""Attention that the program computes by calling :func:`sparse_compile.attention`."""

from __future__ import annotations

import torch
from torch.fx import Node

from sparse_compile.ops.masked import MASKED_ATTENTION
from sparse_compile.passes.find import values
from sparse_compile.passes.find.provenance import where
from sparse_compile.sites.named import TENSOR, NamedMask
from sparse_compile.sites.site import AttentionSite, Called, MaskOperand, Operand, Rejection, Scope


def match_called(node: Node, scope: Scope) -> AttentionSite | Rejection | None:
    """The attention that a node calls; None if it calls none."""
    if node.target is not MASKED_ATTENTION:
        return None
    q, k, v, given, sizes, text, scale = node.args
    assert isinstance(text, str)
    named, masks = NamedMask.parse(text), ()
    if named.selects == TENSOR:
        (mask,) = given  # type: ignore[misc, union-attr]
        example = values.tensor(mask)
        if example is None or example.dtype is not torch.bool:
            reason = "its mask is a tensor that is added to the scores"
            hint = "pass a bool tensor, True to attend, to have it planned for these sizes"
            return Rejection(reason, hint, where(node), node)
        masks = (MaskOperand(mask, "keep"),)
    called = None if masks else Called(named, tuple(given), tuple(sizes))  # type: ignore[arg-type]
    return AttentionSite(
        scope,
        Operand(node),
        *(Operand(operand) for operand in (q, k, v)),  # type: ignore[arg-type]
        scale=scale,  # type: ignore[arg-type]
        kind="call",
        masks=masks,
        where=where(node),
        region=(node,),
        called=called,
    )
