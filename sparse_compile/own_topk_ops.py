"""The operator of an attention that keeps its best scores: which these are, without all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.block_scores_ops import scores_by_head
from sparse_compile.block_scores_spec import BlockScoresSpec


@torch.library.custom_op("sparse_compile::own_topk", mutates_args=())
def own_topk(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    flags: Sequence[bool],
    spec: str,
) -> Tensor:
    """``topk(q @ k, most).indices``, computed some queries at a time.

    Explicit sparse attention (https://arxiv.org/abs/1912.11637). Takes memory for the scores of
    some queries, never for all of them. Which of several equal scores are kept is as open as it is
    for :func:`torch.topk`.

    Args:
        q: [B, H, Nq, D], floating.
        k: [B, Hk, D, Nkv], same dtype; Hk is H or 1.
        tables, sizes: the tensors ``t0, t1, ...`` and the integers ``s0, s1, ...`` of the mask.
        most: how many keys a query keeps.
        flags: whether the largest are kept, and in order.
        spec: the text of a :class:`BlockScoresSpec` for blocks of one key.

    Returns:
        int64 [B, H, Nq, most].

    Raises:
        BadShape: the operands do not fit together.
    """
    parts, ranked = own_ranking(q, k, tables, sizes, most, flags, spec)
    index = q.new_empty(*q.shape[:3], most, dtype=torch.int64)
    for first, end in parts:
        index[:, :, first:end] = ranked(first, end)[1].indices
    return index


@own_topk.register_fake
def _(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    flags: Sequence[bool],
    spec: str,
) -> Tensor:
    return q.new_empty([*q.shape[:3], most], dtype=torch.int64)


def own_ranking(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    flags: Sequence[bool],
    spec: str,
) -> tuple[list[tuple[int, int]], Callable[[int, int], tuple[Tensor, Any]]]:
    """The scores, and the best of them, of some queries at a time; see :func:`own_topk`.

    Returns:
        parts of the queries, from the first up to the end of each, and what computes their scores
        [B, H, end - first, Nkv] and the top-k of these.
    """
    parts, scores = scores_by_head(q, k, tables, sizes, BlockScoresSpec.parse(spec))
    largest, in_order = flags

    def ranked(first: int, end: int) -> tuple[Tensor, Any]:
        score = scores(first, end)
        return score, score.topk(most, -1, largest=largest, sorted=in_order)

    return parts, ranked


#: The operator as nodes of a graph call it.
OWN_TOPK = torch.ops.sparse_compile.own_topk.default
