"""The operator of an indexer of blocks: the highest score of each, without those of all keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import evaluate, grid
from sparse_compile.ops.registered import operator
from sparse_compile.selection.chunks import chunks
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
