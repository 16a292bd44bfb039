"""What is made of the output of an attention afterwards: NaN, no NaN, and sinks."""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from sparse_compile.passes.graph_edit import Inserter, example_value
from sparse_compile.sites.site import AttentionSite


def ruined(insert: Inserter, operands: tuple[Node, ...], out: Node, rows: Node) -> Node:
    """``out`` with NaN for some queries, and for the gradients of the operands there.

    Args:
        insert: what inserts.
        operands: those that NaN reaches: v [B, Hkv, N, Dv], or q, k and v.
        out: [B, Hq, Nq, Dv].
        rows: the queries, bool [B, Hq, Nq].
    """
    heads = insert.size(out, 1)
    factor = insert.method("masked_fill", insert.method("to", rows, torch.float32), rows, math.nan)
    total: Node | float = 0.0
    for operand in operands:
        # A key is read by all rows, a query by its own.
        axes = (3,) if len(operands) > 1 and operand is operands[0] else (2, 3)
        one = insert.method("sum", operand, axes, True)
        if insert.size(operand, 1) != heads:
            group = insert.call(operator.floordiv, heads, insert.size(operand, 1))
            one = insert.method("repeat_interleave", one, group, 1)
        total = insert.call(operator.add, one, total)
    shown = insert.call(operator.mul, insert.method("unsqueeze", factor, -1), total)
    shown = insert.method("to", shown, example_value(out).dtype)
    return insert.call(torch.where, insert.method("unsqueeze", rows, -1), shown, out)


def without_nan(insert: Inserter, out: Node, lse: Node) -> Node:
    """0 for queries whose weights are NaN, such as those that attend to one."""
    strange = insert.method("unsqueeze", insert.method("isnan", lse), -1)
    return insert.method("masked_fill", out, strange, 0.0)


def with_sinks(insert: Inserter, site: AttentionSite, out: Node, lse: Node, sinks: Node) -> Node:
    """``out`` times the share of the weight that keys get beside the sinks.

    Args:
        insert: what inserts.
        site: the attention.
        out: [B, H, Nq, Dv], without sinks.
        lse: fp32 [B, H, Nq], -inf where there are no keys, whose share is 0 then.
        sinks: as in :class:`AttentionSite`.
    """
    sinks = insert.method("to", sinks, torch.float32)
    if site.kind == "call":
        sinks = insert.method("reshape", sinks, 1, -1, 1, 1)  # from [Hq]
    if example_value(sinks).shape[-1] != 1:
        sinks = insert.call(torch.logsumexp, sinks, -1, True)
    axes = list(site.score_axes)
    for outer, inner in (("b1", "b2"), ("h1", "h2")):
        if inner in axes:
            at = axes.index(outer)
            whole: list[int | Node] = [-1] * len(axes)
            whole[at : at + 2] = [insert.length(site.q, axis) for axis in (outer, inner)]
            sinks = insert.method("flatten", insert.method("expand", sinks, *whole), at, at + 1)
            axes[at : at + 2] = [outer[0]]
    for position, axis in enumerate(("b", "h", "q")):
        if axis not in axes:
            sinks = insert.method("unsqueeze", sinks, position)
    distance = insert.call(operator.sub, insert.method("unsqueeze", lse, -1), sinks)
    # Not as a sigmoid, whose gradient is computed of what is left of 1: nothing, near it.
    share = insert.call(torch.exp, insert.call(F.logsigmoid, distance))
    shared = insert.call(operator.mul, out, share)
    return insert.method("to", shared, example_value(out).dtype)
