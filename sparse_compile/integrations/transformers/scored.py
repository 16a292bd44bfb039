"""Attention whose scores look up trained numbers, with the log-sum-exp of its scores.

A position bias is a small tensor that a score program reads, with gradients, and no tensor of all
pairs exists, whichever backend compiles the graph. By their log-sum-exps attentions of the same
queries to different keys become one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile import ops
from sparse_compile.layout.from_dense import NO_READS
from sparse_compile.ops.composite import composed_of
from sparse_compile.ops.fresh_size import told_apart
from sparse_compile.ops.scored import SCORED_ATTENTION, scored_specs


def attend(
    operands: tuple[Tensor, Tensor, Tensor],
    learned: Sequence[Tensor],
    tables: Sequence[Tensor],
    mask: str,
    score: str,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attention under a mask, with a score program.

    Args:
        operands: q, k and v, [B, H, N, D], as for :func:`sparse_compile.attention`.
        learned: the tensors ``w0, w1, ...`` of the score program; they have gradients.
        tables: the tensors ``t0, t1, ...`` of mask and score program.
        mask: the text of a :class:`MaskExpr`.
        score: the text of a :class:`ScoreProgram`.
        scale: factor on the products of queries and keys, before the program.

    Returns:
        [B, Hq, Nq, Dv], 0 for a query that may attend to nothing; and the log-sum-exp of its
        scores, fp32 [B, Hq, Nq], -inf there.
    """
    if torch.compiler.is_compiling():
        out, lse = SCORED_ATTENTION(*operands, list(learned), list(tables), mask, score, scale)
        return out, lse
    return _composed(operands, learned, tables, mask, score, scale)


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to the keys of both, in one softmax.

    Args:
        one, other: results [..., D] and log-sum-exps [...] of the same queries.

    Returns:
        in the dtype of the results; 0 for a query that neither lets attend to anything.
    """
    (out, lse), (more, more_lse) = one, other
    # Of two that are -inf the difference is no number.
    lowest = torch.finfo(lse.dtype).min / 4
    share = torch.sigmoid(lse.clamp(min=lowest) - more_lse.clamp(min=lowest))[..., None]
    return (share * out + (1 - share) * more).to(out.dtype)


def _composed(
    operands: tuple[Tensor, Tensor, Tensor],
    learned: Sequence[Tensor],
    tables: Sequence[Tensor],
    mask: str,
    score: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    (q, k, v), device = operands, operands[0].device
    lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    of_layout, of_attention = scored_specs(mask, score, device.type)
    where: tuple[Any, ...] = of_layout, device, [], told_apart()
    lists = ops.LAYOUT(list(tables), NO_READS, [], *lengths, k.shape[1], *where)
    out, lse = ops.ATTENTION(q, k, v, list(learned), list(tables), [], lists, scale, of_attention)
    return out, lse


composed_of(SCORED_ATTENTION, _composed)
