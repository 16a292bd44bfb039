"""Checked selection: what kernels cannot say without making everyone wait."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr
from sparse_compile.patterns.checks import bad, blocks
from sparse_compile.patterns.scored import Scored
from sparse_compile.patterns.selecting import Selected, Selecting
from sparse_compile.selection.rules import Best, Candidates, kept
from sparse_compile.selection.select import select
from sparse_compile.selection.selection import Selection, check_lists


def checked_select(
    pattern: Selecting,
    q: Tensor,
    k: Tensor,
    mask: MaskExpr | None = None,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Selection:
    """:meth:`Selecting.select` that looks at the values, and so waits for the device.

    Args:
        pattern: what selects; :class:`Selected` and those that select by scores are checked.
        q, k, mask, tables, sizes: as for :meth:`Selecting.select`.

    Returns:
        what ``pattern.select`` returns.

    Raises:
        BadPattern: a score of a block that the mask may show is NaN; a list has no room for all
            that its rule selects; an index is beyond the last unit of keys; or lists with a count
            are not what they are taken for.

    >>> from sparse_compile import patterns as P
    >>> q = k = torch.full((1, 1, 4, 2), float("nan"))
    >>> checked_select(P.TopK(2, unit_kv=1), q, k)
    Traceback (most recent call last):
    sparse_compile.errors.BadPattern: sparse_compile: MeanPool() gives 16 scores that are NaN. \
Look for NaN in q and k, and in the scorer.
    """
    if isinstance(pattern, Scored):
        return select(pattern, q, k, mask, tables, sizes, functools.partial(_watch, pattern))
    if isinstance(pattern, Selected):
        _check_index(pattern, blocks(k.shape[2], pattern.unit_kv))
    selection: Selection = pattern.select(q, k, mask, tables, sizes)
    return selection


def _watch(pattern: Scored, found: Candidates, best: Best) -> None:
    """Raise for scores that are NaN, and if the rule selects more than there is room for."""
    nan = int((found.scores.isnan() & found.visible).sum())
    if nan:
        raise bad(
            f"{pattern.scorer!r} gives {nan} scores that are NaN",
            "Look for NaN in q and k, and in the scorer.",
        )
    everything = found.best(found.scores.shape[-1])
    wanted = everything.exists & (everything.forced | kept(pattern, everything))
    longest, room = int(wanted.sum(-1).max()), best.block.shape[-1]
    if longest > room:
        raise bad(
            f"{pattern!r} would select {longest} blocks in a list with room for {room}",
            f"Write most={longest} or more, or let the rule select fewer.",
        )


def _check_index(pattern: Selected, units: int) -> None:
    if pattern.count is not None:
        check_lists(pattern.index, pattern.count, units)
        return
    index = torch.as_tensor(pattern.index)
    highest = int(index.max()) if index.numel() else -1
    if highest >= units:
        raise bad(
            f"Selected: index names unit {highest}, but the keys make {units} units of "
            f"{pattern.unit_kv}",
            f"Write numbers below {units}, or -1 for none.",
        )
