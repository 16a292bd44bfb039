"""The operator of an indexer of blocks: the highest score of each, without those of all keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import evaluate
from sparse_compile.ops.registered import operator
from sparse_compile.spec.block_scores import BlockScoresSpec
from sparse_compile.spec.indexer import IndexerSpec, stepped

#: Numbers that the scores of some queries have at most, all heads together.
_MOST = 1 << 25


@operator("block_scores")
def block_scores(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    blocks: int,
    spec: str,
) -> Tensor:
    """``(q @ k).unflatten(-1, (blocks, size)).amax(-1)``, computed some queries at a time.

    The indexer of blocks of MiniMax-M3. Takes memory for the scores of some queries, never for all
    of them; has no gradient, as what only chooses needs none.

    Args:
        q: [B, H, Nq, D], floating.
        k: [B, Hk, D, Nkv], same dtype; Hk is H or 1.
        tables, sizes: the tensors ``t0, t1, ...`` and the integers ``s0, s1, ...`` of the mask.
        blocks: how many blocks there are; keys beyond them are left out, and those that they lack
            get the score ``padding``.
        spec: the text of a :class:`BlockScoresSpec`.

    Returns:
        [B, H, Nq, blocks] in the dtype of q.

    Raises:
        BadShape: the operands do not fit together.
    """
    parsed = BlockScoresSpec.parse(spec)
    parts, scores = scores_by_head(q, k, tables, sizes, parsed)
    best = q.new_empty(*q.shape[:3], blocks)
    lacking = blocks * parsed.size - k.shape[3]
    for first, end in parts:
        score = F.pad(scores(first, end), (0, lacking), value=parsed.padding)
        best[:, :, first:end] = score.view(*score.shape[:3], blocks, parsed.size).amax(-1)
    return best


@block_scores.register_fake
def _(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    blocks: int,
    spec: str,
) -> Tensor:
    return q.new_empty([*q.shape[:3], blocks])


#: The operator as nodes of a graph call it.
BLOCK_SCORES = torch.ops.sparse_compile.block_scores.default


def scores_by_head(
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    spec: BlockScoresSpec | IndexerSpec,
) -> tuple[list[tuple[int, int]], Callable[[int, int], Tensor]]:
    """The masked scores of all keys, of some queries at a time.

    Args:
        q, k, tables, sizes: as for :func:`block_scores`.
        spec: the steps before the relu, if it is of an indexer, and the mask.

    Returns:
        parts of the queries, from the first up to the end of each, and what computes their scores
        [B, H, end - first, Nkv], by the program's steps in its order.

    Raises:
        BadShape: the operands do not fit together.
    """
    _check(q, k)
    fill = torch.full((), spec.fill, dtype=q.dtype, device=q.device)

    def scores(first: int, end: int) -> Tensor:
        rows = q[:, :, first:end]
        score = stepped(rows @ k, spec.before)
        keep = _keep(first, rows, q, k, tables, sizes, spec)
        return torch.where(keep, score, score + fill if spec.adds else fill)

    step = max(1, _MOST // max(1, q.shape[0] * q.shape[1] * k.shape[3]))
    starts = range(0, q.shape[2], step)
    return [(first, min(first + step, q.shape[2])) for first in starts], scores


def _check(q: Tensor, k: Tensor) -> None:
    fits = q.dim() == k.dim() == 4 and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[2])
    if not fits or k.shape[1] not in (1, q.shape[1]):
        raise BadShape(
            f"sparse_compile: scores of blocks of q {list(q.shape)} and k {list(k.shape)}. "
            "Give q [B, H, Nq, D] and k [B, H or 1, D, Nkv]."
        )


def _keep(
    first: int,
    rows: Tensor,
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    spec: BlockScoresSpec | IndexerSpec,
) -> Tensor:
    """Which scores of some queries are not masked: broadcasts to [B, H, rows, Nkv]."""
    device = q.device
    where = {
        "b": torch.arange(q.shape[0], device=device)[:, None, None, None],
        "h": torch.arange(q.shape[1], device=device)[:, None, None],
        "q": torch.arange(first, first + rows.shape[2], device=device)[:, None],
        "kv": torch.arange(k.shape[3], device=device),
    }
    return evaluate(spec.mask, where, q.shape[2], k.shape[3], tables, sizes)
