"""Select: what a pattern selects by scores, from q and k; does not wait for the device.

Unless it is checked, for what kernels cannot say without making everyone wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import MaskExpr
from sparse_compile.patterns import scorers
from sparse_compile.patterns.checks import UPPER_LEFT, bad, blocks
from sparse_compile.patterns.scored import Scored
from sparse_compile.patterns.scorers import Compressed
from sparse_compile.patterns.selecting import Selected, Selecting
from sparse_compile.selection import masses
from sparse_compile.selection import scores as scores_of
from sparse_compile.selection.builders import BUILDERS, Prepared, Scoring, Task
from sparse_compile.selection.rules import Best, Candidates, ascending, kept
from sparse_compile.selection.selection import Selection, check_lists, used_places
from sparse_compile.selection.visible import EVERYTHING, Visible

#: What computes the scores of each scorer.
_MAKERS: dict[type, Callable[[Any, Task], Scoring]] = {
    Compressed: masses.by_windows,
    scorers.Antidiagonal: masses.by_antidiagonals,
    scorers.Gate: scores_of.by_gate,
    scorers.Indexer: scores_of.by_indexer,
    scorers.MeanPool: scores_of.by_mean,
    scorers.MinMax: scores_of.by_bounds,
    scorers.OverlapPool: masses.by_windows,
}
#: The parameter of each rule that may be given by head.
_BY_HEAD = ("k", "ratio", "p", "t")

#: Looks at the candidates of some units of queries, and at the best of them.
Watch = Callable[[Candidates, Best], None]


@torch.no_grad()
def select(
    pattern: Scored,
    q: Tensor,
    k: Tensor,
    mask: MaskExpr | None = None,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
    watch: Watch | None = None,
) -> Selection:
    """What ``pattern`` selects for the queries ``q`` among the keys ``k``.

    Memory is that of the lists, and of the scores of some units of queries at a time.

    Args:
        pattern: scores blocks and keeps the best, by its rule.
        q: [B, Hq, Nq, D], floating.
        k: [B, Hkv, Nkv, D]; Hkv divides Hq.
        mask: who may attend to whom; a block that it hides entirely from a unit of queries is not
            selected. None: everyone to everyone.
        tables: the tensors ``t0, t1, ...`` of the mask.
        sizes: the integers ``s0, s1, ...`` of the mask.
        watch: called for each chunk, to look at what is selected from.

    Returns:
        The selection, with lists for Hkv, 1 or Hq groups of heads, see ``share``; or as many as
        the scorer makes if those are fewer.

    Raises:
        BadShape, BadPattern: q and k, the scores or the parameters do not fit together.
    """
    _check(pattern, q, k)
    if not (q.numel() and k.numel()):
        return _nothing(pattern, q)
    made = prepared(pattern, q, k, mask, tables, sizes)
    builder = BUILDERS.get(q.device) if watch is None else None
    kernel = builder.chooser(made) if builder else None
    choose = kernel or functools.partial(_choose, made, watch)
    for first, end in made.chunks(kernel is not None):
        choose(made.scores.score(first, end), first, end)
    return _in_units(pattern, made.index, made.count, k.shape[2])


def prepared(
    pattern: Scored,
    q: Tensor,
    k: Tensor,
    mask: MaskExpr | None,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
) -> Prepared:
    """What :func:`select` works on; its arguments."""
    unit_q, block = pattern.unit_q, pattern.block_kv
    lengths = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    visible = Visible(mask or EVERYTHING, tables, sizes, *lengths, unit_q, block, q.device)
    lists = {"group": k.shape[1], "all": 1, "none": q.shape[1]}[pattern.share]
    task = Task(q, k, unit_q, block, lists, visible)
    scores = scoring(pattern.scorer, task)
    _check_heads(pattern, scores)
    count = torch.empty(q.shape[0], scores.lists, task.rows, dtype=torch.int32, device=q.device)
    index = count.new_empty(*count.shape, pattern.capacity(task.blocks))
    return Prepared(pattern, scores, index, count)


def scoring(scorer: Any, task: Task) -> Scoring:
    """The scores that ``scorer`` gives, prepared to be computed some units at a time."""
    return _MAKERS[type(scorer)](scorer, task)


def _choose(made: Prepared, watch: Watch | None, scores: Tensor, first: int, end: int) -> None:
    """Choose where no kernel can, or where someone wants to look; see :class:`DeviceBuilder`."""
    pattern, task = made.pattern, made.task
    visible = task.visible.may(first, end, made.scores.lists)
    found = Candidates(scores, visible, _forced(pattern, task, first, end))
    best = found.best(made.index.shape[3])
    if watch is not None:
        watch(found, best)
    index, count = ascending(pattern, best, task.blocks)
    made.index[:, :, first:end], made.count[:, :, first:end] = index, count


def _check(pattern: Scored, q: Tensor, k: Tensor) -> None:
    fits = q.dim() == k.dim() == 4 and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise BadShape(
            f"sparse_compile: {pattern!r} selects from q {list(q.shape)} and k {list(k.shape)}. "
            "Pass q [B, Hq, Nq, D] and k [B, Hkv, Nkv, D], where Hkv divides Hq."
        )
    pattern.check(q.shape[2], k.shape[2], q.shape[0], q.shape[1])


def _check_heads(pattern: Scored, scores: Scoring) -> None:
    name, value = next(
        (name, value) for name in _BY_HEAD if (value := getattr(pattern, name, None)) is not None
    )
    if isinstance(value, tuple) and len(value) != scores.lists:
        raise bad(
            f"{type(pattern).__name__}: {name} is given for {len(value)} lists of heads, but there "
            f"are {scores.lists}",
            f"Write {scores.lists} numbers, or one for all.",
        )


def _forced(pattern: Scored, task: Task, first: int, end: int) -> Tensor:
    """bool [units, blocks]: what is forced if it is visible."""
    device = task.q.device
    block = torch.arange(task.blocks, device=device)
    forced = (block < pattern.sink).expand(end - first, task.blocks)
    if not pattern.reach:
        return forced
    n_q = task.q.shape[2]
    shift = 0 if pattern.align == UPPER_LEFT else task.k.shape[2] - n_q
    start = torch.arange(first, end, device=device)[:, None] * task.unit_q
    last = (start + (task.unit_q - 1)).clamp(max=n_q - 1)
    own = [torch.div(at + shift, task.block, rounding_mode="floor") for at in (start, last)]
    return forced | ((block > own[0] - pattern.reach) & (block <= own[1]))


def _in_units(pattern: Scored, index: Tensor, count: Tensor, n_kv: int) -> Selection:
    """Lists of blocks as lists of the units of keys in them."""
    each = pattern.block_kv // pattern.unit_kv
    if each > 1:
        units = blocks(n_kv, pattern.unit_kv)
        within = torch.arange(each, dtype=torch.int32, device=index.device)
        index = (index[..., None] * each + within).flatten(-2)
        # The last block may have fewer units. Being the last, they end the list.
        used = used_places(index, count * each) & (index < units)
        count = used.sum(-1, dtype=torch.int32)
    return Selection(index, count, pattern.unit_q, pattern.unit_kv)


def _nothing(pattern: Scored, q: Tensor) -> Selection:
    """The selection where there are no queries, or no keys: one list for all heads."""
    shape = (q.shape[0], 1, blocks(q.shape[2], pattern.unit_q))
    index = torch.zeros(*shape, 1, dtype=torch.int32, device=q.device)
    count = torch.zeros(shape, dtype=torch.int32, device=q.device)
    return Selection(index, count, pattern.unit_q, pattern.unit_kv)


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
