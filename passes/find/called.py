"""Attention that the program computes by calling :func:`sparse_compile.attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.find import values
from sparse_compile.passes.find.provenance import where
from sparse_compile.passes.find.refusal import Refusal
from sparse_compile.sites.named import TENSOR, NamedMask
from sparse_compile.sites.site import AttentionSite, Called, MaskOperand, Operand, Scope


def match_called(node: Node, scope: Scope) -> AttentionSite:
    """The attention that a call of ``MASKED_ATTENTION`` computes.

    Raises:
        Refusal: it cannot be planned.
    """
    args: Any = node.args
    q, k, v, given, sinks, sizes, text, scale = args
    named = NamedMask.parse(text)
    by_tensor = named.selects == TENSOR
    if by_tensor and values.dtype(given[0]) is not torch.bool:
        reason = "its mask is a tensor that is added to the scores"
        hint = "pass a bool tensor, True to attend, to have it planned for these sizes"
        raise Refusal(reason, hint)
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
