"""The operator of an indexer: the best keys of every query, without the scores of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import evaluate
from sparse_compile.ops.block_scores import scores_by_head
from sparse_compile.ops.registered import operator
from sparse_compile.selection.builders import BUILDERS
from sparse_compile.selection.visible import Visible
from sparse_compile.spec.indexer import IndexerSpec, stepped

#: Numbers that the scores of some queries have at most, all heads together.
_MOST = 1 << 25
#: The scores of the queries from the first up to the end, and the top-k of these.
Ranking = Callable[[int, int], tuple[Tensor, Any]]


@operator("indexed_topk")
def indexed_topk(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    spec: str,
) -> Tensor:
    """``topk(sum_h w_h * relu(q_h k), most).indices``, computed some queries at a time.

    The lightning indexer of DeepSeek-V3.2 (https://arxiv.org/abs/2512.02556). Takes memory for the
    scores of some queries, never for all of them. Which of several equal scores are kept is as
    open as it is for :func:`torch.topk`. Without weights it is ``topk(q k, most).indices``, head by
    head: the scores of an attention that keeps its best (https://arxiv.org/abs/1912.11637).

    Args:
        q: [B, Nq, H, D]; without weights [B, H, Nq, D].
        k: [B, D, Nkv], same dtype; without weights [B, H or 1, D, Nkv].
        w: [B, Nq, H], or None.
        tables, sizes: the tensors ``t0, t1, ...`` and the integers ``s0, s1, ...`` of the mask.
        most: how many keys a query keeps.
        spec: the text of an :class:`IndexerSpec`.

    Returns:
        int64 [B, Nq, most]; without weights [B, H, Nq, most].

    Raises:
        BadShape: the operands do not fit together.
    """
    parts, ranked = ranking(q, k, w, tables, sizes, most, IndexerSpec.parse(spec))
    index = q.new_empty([*rows_of(q, w), most], dtype=torch.int64)
    for first, end in parts:
        index[..., first:end, :] = ranked(first, end)[1].indices
    return index


@indexed_topk.register_fake
def _(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    spec: str,
) -> Tensor:
    return q.new_empty([*rows_of(q, w), most], dtype=torch.int64)


#: The operator as nodes of a graph call it.
INDEXED_TOPK = torch.ops.sparse_compile.indexed_topk.default


def rows_of(q: Tensor, w: Tensor | None) -> list[int]:
    """What scores there are: [B, Nq], and [B, H, Nq] where every head has its own."""
    return [*q.shape[:3]] if w is None else [q.shape[0], q.shape[1]]


def ranking(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    spec: IndexerSpec,
) -> tuple[list[tuple[int, int]], Ranking]:
    """The scores of an indexer, and the best of them, of some queries at a time.

    Args:
        q, k, w, tables, sizes, most, spec: as for :func:`indexed_topk`.

    Returns:
        parts of the queries, from the first up to the end of each, and what computes their scores
        [..., end - first, Nkv] and the top-k of these.

    Raises:
        BadShape: the operands do not fit together.
    """
    if w is None:
        parts, scores = scores_by_head(q, k, tables, sizes, spec)
    else:
        parts, scores = _masked_scores(q, k, w, tables, sizes, spec)

    def ranked(first: int, end: int) -> tuple[Tensor, Any]:
        score = scores(first, end)
        return score, score.topk(most, -1, largest=spec.largest, sorted=spec.is_sorted)

    return parts, ranked


def _masked_scores(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    spec: IndexerSpec,
) -> tuple[list[tuple[int, int]], _Scorer]:
    """Parts of the queries, and what computes their masked scores."""
    _check(q, k, w)
    scores, heads = _scorer(q, k, w, tables, sizes, spec)
    # What is hidden need not have been computed.
    adds = spec.adds and spec.fill != -math.inf

    def masked(first: int, end: int) -> Tensor:
        score = scores(first, end)
        keep = _keep(first, end, q, k, tables, sizes, spec)
        fill = torch.full((), spec.fill, dtype=score.dtype, device=score.device)
        return torch.where(keep, score, score + fill if adds else fill)

    return list(_chunks(q, k, heads)), masked


def _check(q: Tensor, k: Tensor, w: Tensor) -> None:
    fits = q.dim() == 4 and k.dim() == w.dim() == 3 and w.shape == q.shape[:3]
    if not fits or (q.shape[0], q.shape[3]) != tuple(k.shape[:2]):
        raise BadShape(
            f"sparse_compile: an indexer of q {list(q.shape)}, k {list(k.shape)} and weights "
            f"{list(w.shape)}. Give q [B, Nq, H, D], k [B, D, Nkv] and weights [B, Nq, H]."
        )


def _chunks(q: Tensor, k: Tensor, heads: int) -> Iterator[tuple[int, int]]:
    """First and last query of the parts, as large as fit; scores of ``heads`` heads exist."""
    batch, n_q = q.shape[:2]
    step = max(1, _MOST // max(1, batch * heads * k.shape[2]))
    step = step // 128 * 128 or step  # whole tiles of kernels
    for first in range(0, n_q, step):
        yield first, min(first + step, n_q)


#: The scores [B, end - first, Nkv] of the queries from the first up to the end.
_Scorer = Callable[[int, int], Tensor]


def _scorer(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    spec: IndexerSpec,
) -> tuple[_Scorer, int]:
    """What computes scores, and of how many heads they exist meanwhile."""
    by_head, by_key, factor = q.transpose(1, 2), k.mT, spec.factor
    builder = BUILDERS.get(q.device) if spec.single else None
    kernel = builder.index_scores(by_head, by_key) if builder else None
    if factor is None or kernel is None:
        return _by_steps(q, k, w, spec), q.shape[2]
    # The kernel computes what the program does: products of half precision, summed in fp32.
    # Scores that a finite fill is added to have to exist.
    mask = None if spec.adds and spec.fill != -math.inf else spec.mask
    lengths = q.shape[0], 1, q.shape[1], k.shape[2]
    visible = Visible(mask, tables, sizes, *lengths, 1, 1, q.device)

    def scores(first: int, end: int) -> Tensor:
        return kernel(by_head, by_key, w, (first, end), visible, factor)

    return scores, 1


def _by_steps(q: Tensor, k: Tensor, w: Tensor, spec: IndexerSpec) -> _Scorer:
    """The program's steps in its order."""
    keys = k.float() if spec.single else k

    def scores(first: int, end: int) -> Tensor:
        queries = q[:, first:end].float() if spec.single else q[:, first:end]
        return _scores(queries, keys, w[:, first:end], spec)

    return scores


def _scores(q: Tensor, k: Tensor, w: Tensor, spec: IndexerSpec) -> Tensor:
    """The scores [B, C, Nkv] of C queries: the program's steps in its order."""
    batch, rows, heads, _ = q.shape
    each = (q.flatten(1, 2) @ k).view(batch, rows, heads, k.shape[2])
    each = torch.relu(stepped(each, spec.before))
    if spec.product:
        score = (w.unsqueeze(-2) @ each).squeeze(-2)
    else:
        score = (each * w.unsqueeze(-1)).sum(-2)
    return stepped(score, spec.after)


def _keep(
    first: int,
    end: int,
    q: Tensor,
    k: Tensor,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    spec: IndexerSpec,
) -> Tensor:
    """Which scores of some queries are not masked: broadcasts to [B, C, Nkv]."""
    device = q.device
    where = {
        "b": torch.arange(q.shape[0], device=device)[:, None, None],
        "h": torch.zeros(1, 1, 1, dtype=torch.int64, device=device),
        "q": torch.arange(first, end, device=device)[:, None],
        "kv": torch.arange(k.shape[2], device=device),
    }
    return evaluate(spec.mask, where, q.shape[1], k.shape[2], tables, sizes)
