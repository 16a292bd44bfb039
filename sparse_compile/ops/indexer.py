"""The operators of indexers: the best keys of every query, and the highest score of each block.

Neither ever has the scores of all queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import evaluate, grid
from sparse_compile.ops.registered import operator
from sparse_compile.selection.builders import BUILDERS, Indexing
from sparse_compile.selection.chunks import chunks
from sparse_compile.selection.visible import EVERYTHING, Visible
from sparse_compile.spec.indexer import BlockScoresSpec, IndexerSpec, stepped

#: Numbers that the scores of some queries have at most, all heads together.
_MOST = 1 << 25


def _like_scores(q: Tensor, blocks: int) -> Tensor:
    return q.new_empty([*q.shape[:3], blocks])


@operator(_like_scores)
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
    scores = MaskedScores(q, k, tables, sizes, parsed)
    best = q.new_empty(*scores.rows, blocks)
    lacking = blocks * parsed.size - k.shape[3]
    for first, end in scores.parts():
        score = F.pad(scores(first, end), (0, lacking), value=parsed.padding)
        best[:, :, first:end] = score.view(*score.shape[:3], blocks, parsed.size).amax(-1)
    return best


#: The operator as nodes of a graph call it.
BLOCK_SCORES = torch.ops.sparse_compile.block_scores.default


@dataclass(frozen=True, eq=False)
class MaskedScores:
    """The masked scores of all keys, of some queries at a time, by the program's steps in order.

    Attributes:
        axes: of what has scores for all keys.
        q, k, tables, sizes: as for :func:`block_scores`.
        spec: the steps, for an indexer those before the relu, and the mask.

    Raises:
        BadShape: the operands do not fit together.
    """

    axes: ClassVar[tuple[str, ...]] = ("b", "h", "q")

    q: Tensor
    k: Tensor
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    spec: BlockScoresSpec | IndexerSpec

    def __post_init__(self) -> None:
        self._check()

    @property
    def rows(self) -> tuple[int, ...]:
        """The sizes of :attr:`axes`."""
        return tuple(self.q.shape[: len(self.axes)])

    @property
    def heads(self) -> int:
        """Of how many heads scores exist meanwhile."""
        return self.q.shape[1]

    def parts(self) -> list[tuple[int, int]]:
        """Parts of the queries, from the first up to the end of each, as large as fit."""
        each = self.rows[0] * self.heads * self.k.shape[-1]
        return chunks(self.rows[-1], each, _MOST, tile=128)  # whole tiles of kernels

    def __call__(self, first: int, end: int) -> Tensor:
        """The scores [..., end - first, Nkv] of the queries from the first up to the end."""
        score = self.unmasked(first, end)
        fill = torch.full((), self.spec.fill, dtype=score.dtype, device=score.device)
        return torch.where(self._keep(first, end), score, score + fill if self.adds else fill)

    @property
    def adds(self) -> bool:
        """Whether the fill is added to scores, which have to exist."""
        return self.spec.adds

    def unmasked(self, first: int, end: int) -> Tensor:
        """The same before the mask."""
        return stepped(self.q[:, :, first:end] @ self.k, self.spec.before)

    def _keep(self, first: int, end: int) -> Tensor:
        """Which scores of some queries are not masked; broadcasts to theirs."""
        n_q, n_kv = self.rows[-1], self.k.shape[-1]
        axes = dict(zip(self.axes, map(range, self.rows), strict=True))
        where = grid(self.q.device, **axes | {"q": range(first, end), "kv": range(n_kv)})
        return evaluate(self.spec.mask, where, n_q, n_kv, self.tables, self.sizes)

    def _check(self) -> None:
        q, k = self.q, self.k
        fits = q.dim() == k.dim() == 4 and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[2])
        if not fits or k.shape[1] not in (1, q.shape[1]):
            raise BadShape(
                f"sparse_compile: scores of blocks of q {list(q.shape)} and k {list(k.shape)}. "
                "Give q [B, H, Nq, D] and k [B, H or 1, D, Nkv]."
            )


def _like_best(q: Tensor, w: Tensor | None, most: int) -> Tensor:
    return q.new_empty([*rows_of(q, w), most], dtype=torch.int64)


@operator(_like_best)
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
    scores = scores_of(q, k, w, tables, sizes, spec)
    index = q.new_empty([*scores.rows, most], dtype=torch.int64)
    for first, end in scores.parts():
        index[..., first:end, :] = best_of(scores(first, end), most, spec).indices
    return index


#: The operator as nodes of a graph call it.
INDEXED_TOPK = torch.ops.sparse_compile.indexed_topk.default


def rows_of(q: Tensor, w: Tensor | None) -> Sequence[int]:
    """What scores there are: [B, Nq], and [B, H, Nq] where every head has its own."""
    return q.shape[:3] if w is None else q.shape[:2]


def scores_of(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    spec: str,
) -> MaskedScores:
    """The scores that :func:`indexed_topk` ranks; its arguments.

    Raises:
        BadShape: the operands do not fit together.
    """
    given = q, k, tables, sizes, IndexerSpec.parse(spec)
    return MaskedScores(*given) if w is None else _WeightedScores(*given, w)


def best_of(score: Tensor, most: int, spec: str) -> Any:
    """The top-k of scores [..., Nkv], as the program takes it."""
    parsed = IndexerSpec.parse(spec)
    return score.topk(most, -1, largest=parsed.largest, sorted=parsed.is_sorted)


@dataclass(frozen=True, eq=False)
class _WeightedScores(MaskedScores):
    """The scores [B, end - first, Nkv] of an indexer with weights ``w``."""

    axes: ClassVar[tuple[str, ...]] = ("b", "q")

    spec: IndexerSpec
    w: Tensor

    @property
    def heads(self) -> int:
        """One, where a kernel sums over the heads at once."""
        return 1 if self._kernel else self.q.shape[2]

    @property
    def adds(self) -> bool:
        """What is hidden need not have been computed."""
        return self.spec.adds and self.spec.fill != -math.inf

    @functools.cached_property
    def _kernel(self) -> Callable[[int, int], Tensor] | None:
        """Computes what the program does: products of half precision, summed in fp32."""
        factor, builder = self.spec.factor, BUILDERS.get(self.q.device)
        if factor is None or builder is None or not self.spec.single:
            return None
        mask = EVERYTHING if self.adds else self.spec.mask
        lengths = self.q.shape[0], 1, self.q.shape[1], self.k.shape[2]
        visible = Visible(mask, self.tables, self.sizes, *lengths, 1, 1, self.q.device)
        operands = self.q.transpose(1, 2), self.k.mT, self.w
        return builder.index_scores(Indexing(*operands, visible, factor))

    def unmasked(self, first: int, end: int) -> Tensor:
        """By a kernel, which leaves out what is hidden, or by the program's steps in its order."""
        if self._kernel is not None:
            return self._kernel(first, end)
        q, k, w, spec = self.q[:, first:end], self.k, self.w[:, first:end], self.spec
        if spec.single:
            q, k = q.float(), self._single_keys
        each = (q.flatten(1, 2) @ k).view(*q.shape[:3], k.shape[2])
        each = torch.relu(stepped(each, spec.before))
        if spec.product:
            score = (w.unsqueeze(-2) @ each).squeeze(-2)
        else:
            score = (each * w.unsqueeze(-1)).sum(-2)
        return stepped(score, spec.after)

    @functools.cached_property
    def _single_keys(self) -> Tensor:
        return self.k.float()

    def _check(self) -> None:
        q, k, w = self.q, self.k, self.w
        fits = q.dim() == 4 and k.dim() == w.dim() == 3 and w.shape == q.shape[:3]
        if not fits or (q.shape[0], q.shape[3]) != tuple(k.shape[:2]):
            raise BadShape(
                f"sparse_compile: an indexer of q {list(q.shape)}, k {list(k.shape)} and weights "
                f"{list(w.shape)}. Give q [B, Nq, H, D], k [B, D, Nkv] and weights [B, Nq, H]."
            )
