"""The operators that list the keys whose scores a program keeps, instead of those of an index.

``scores >= scores.topk(k).values[..., -1:]`` keeps k keys, and more where scores are equal: the
lists are as long as the longest has to be. What the mask of the attention hides is not listed: a
row of which less than k keys are visible reaches -inf, which all the hidden ones reach, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr
from sparse_compile.ops.fresh_size import fresh_size
from sparse_compile.ops.indexer import best_of, rows_of, scores_of
from sparse_compile.ops.registered import fake_lists, operator
from sparse_compile.selection.chunks import chunks
from sparse_compile.selection.kept import TOGETHER, kept_lists
from sparse_compile.selection.visible import Visible

_COMPARISONS = {"ge": torch.ge, "gt": torch.gt, "le": torch.le, "lt": torch.lt}


def _like_kept(
    kept: Tensor, fixed: bool, lengths: Sequence[int], units: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return fake_lists(kept, kept.shape[:3], _room(fixed, -(-lengths[2] // units[1])))


@operator(_like_kept)
def kept_selection(
    kept: Tensor,
    fixed: bool,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    lengths: Sequence[int],
    units: Sequence[int],
    mask: str,
) -> tuple[Tensor, Tensor]:
    """The lists of the units of keys that are kept, and that a mask may show.

    Args:
        kept: bool [B, Hs, ceil(Nq / unit_q), at least ceil(Nkv / unit_kv)].
        fixed: whether each list has room for all units; else as much as the longest needs, for
            which the device is waited for, some rows at a time.
        tables, sizes: the tensors ``t0, t1, ...`` and the integers ``s0, s1, ...`` of the mask.
        lengths: query heads, Nq and Nkv.
        units: unit_q and unit_kv, as in :class:`sparse_compile.selection.Selection`.
        mask: the text of a :class:`MaskExpr`.

    Returns:
        index and count, int32, as in :class:`sparse_compile.selection.Selection`.
    """
    (heads, n_q, n_kv), (unit_q, unit_kv) = lengths, units
    seen = MaskExpr.parse(mask), tables, sizes
    visible = Visible(*seen, kept.shape[0], heads, n_q, n_kv, unit_q, unit_kv, kept.device)
    kept = kept[..., : -(-n_kv // unit_kv)]
    batch, lists, rows, columns = kept.shape

    def shown(first: int, end: int) -> Tensor:
        return kept[:, :, first:end] & visible.may(first, end, lists)

    parts = chunks(rows, batch * max(lists, heads) * columns, TOGETHER)
    return kept_lists(shown, parts, kept.shape[:3], kept.device, columns if fixed else None)


def _like_indexed(
    q: Tensor, w: Tensor | None, fixed: bool, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return fake_lists(q, _lists_of(q, w), _room(fixed, lengths[2]))


@operator(_like_indexed)
def indexed_kept(
    q: Tensor,
    k: Tensor,
    w: Tensor | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    most: int,
    spec: str,
    reaches: str,
    fixed: bool,
    mask_tables: Sequence[Tensor],
    mask_sizes: Sequence[int],
    lengths: Sequence[int],
    mask: str,
) -> tuple[Tensor, Tensor]:
    """The keys whose scores reach the last of the best, computed some queries at a time.

    Args:
        q, k, w, tables, sizes, most, spec: as for :func:`indexed_topk`, of whose scores ``most``
            keys of every query are kept, and those whose scores equal the last of them.
        reaches: the comparison with the last, ``ge``, ``gt``, ``le`` or ``lt``; after ``not``, that
            of those that are left out; after ``least``, with the least of the best instead.
        fixed, mask_tables, mask_sizes, lengths, mask: as for :func:`kept_selection`, of the mask of
            the attention.

    Returns:
        int32 index [B, Hs, Nq, room] and count [B, Hs, Nq], as for :func:`kept_selection`; Hs is 1,
        or without weights H.

    Raises:
        BadShape: the operands do not fit together.
    """
    scores = scores_of(q, k, w, tables, sizes, spec)
    batch, lists, rows = _lists_of(q, w)
    seen, (heads, n_q, n_kv) = (MaskExpr.parse(mask), mask_tables, mask_sizes), lengths
    visible = Visible(*seen, batch, heads, n_q, n_kv, 1, 1, q.device)

    def kept(first: int, end: int) -> Tensor:
        score = scores(first, end)
        reached = _reached(score, best_of(score, most, spec), reaches)[..., :n_kv]
        return reached.view(batch, lists, -1, n_kv) & visible.may(first, end, lists)

    room = n_kv if fixed else None
    return kept_lists(kept, scores.parts(), (batch, lists, rows), q.device, room)


def _room(fixed: bool, units: int) -> int | torch.SymInt:
    """Of each list: for all units, or as much as the longest will need."""
    return units if fixed else fresh_size()


def _lists_of(q: Tensor, w: Tensor | None) -> list[int]:
    """B, Hs and Nq of the lists of an indexer: one for all heads, or one for each."""
    batch, *heads, rows = rows_of(q, w)
    return [batch, *(heads or [1]), rows]


def _reached(score: Tensor, best: Any, reaches: str) -> Tensor:
    """Which scores reach the last of the best."""
    *words, name = reaches.split()
    last = best.values.amin(-1, keepdim=True) if "least" in words else best.values[..., -1:]
    reached: Tensor = _COMPARISONS[name](score, last)
    return ~reached if "not" in words else reached


#: The operators as nodes of a graph call them.
KEPT_SELECTION = torch.ops.sparse_compile.kept_selection.default
INDEXED_KEPT = torch.ops.sparse_compile.indexed_kept.default
