"""The lists of a call of attention to blocks: its layout, as int32 tensors that a graph can hold.

For each view one vector of blocks. On a GPU the worklists of the kernels follow, for each section
over queries and then for each over keys the two tensors of :meth:`Schedule.pack`. What the host has
to know of them is in their shapes, so whoever gets them neither asks the device nor looks anything
up.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from sparse_compile.layout.block_layout import BlockLayout
from sparse_compile.layout.layout import Layout, build_views
from sparse_compile.layout.listed import listed_layout, unpacked_listed
from sparse_compile.layout.schedule import workers_of
from sparse_compile.layout.superset import Problem
from sparse_compile.spec import AttentionSpec
from sparse_compile.spec.view import View

#: Types of devices whose kernels take worklists.
_WITH_WORKLISTS = ("cuda",)
#: Batch, query heads, n_q and n_kv.
Shape = tuple[int, int, int, int]
#: Layouts of so many lists are kept assembled.
_MOST = 16
_ASSEMBLED: OrderedDict[Hashable, Layout] = OrderedDict()


def lists_of(layout: Layout, kv_heads: int, device: torch.device) -> list[Tensor]:
    """The lists of a layout, in memory of their own.

    Args:
        layout: of the blocks of a mask.
        kv_heads: number of key heads.
        device: where the attention runs.
    """
    lists = [view.pack() for view in layout.views]
    if device.type in _WITH_WORKLISTS:
        for axis, heads in (("q", layout.heads), ("kv", kv_heads)):
            members, workers = layout.batch * heads, workers_of(device)
            for work in layout.schedules(axis, members, workers, device):
                lists += work.pack()
    return lists


def count_worklists(spec: AttentionSpec, device: torch.device) -> int:
    """How many worklists stand among the lists of an attention on a device."""
    if device.type not in _WITH_WORKLISTS or not spec.parts:
        return 0
    return sum(len(spec.sections(axis)) for axis in ("q", "kv"))


def unpack(
    spec: AttentionSpec,
    lists: Sequence[Tensor],
    *,
    batch: int,
    heads: int,
    n_q: int,
    n_kv: int,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Layout:
    """The layout of some lists, of views into them: nothing is copied, and nothing waits.

    Args:
        spec: parts of blocks.
        lists: of :func:`lists_of`, or the vectors of views alone.
        batch, heads, n_q, n_kv: of the problem.
        tables, sizes: what the mask reads.
    """
    shape, numbers = (batch, heads, n_q, n_kv), tuple(map(int, sizes))
    n = len(spec.parts)
    views = tuple(
        _unpacked(part, _problem(spec, part, shape, numbers), vector)
        for part, vector in zip(spec.parts, lists[:n], strict=True)
    )
    return Layout(spec, views, batch, heads, tuple(tables), numbers, tuple(lists[n:]))


def assembled(
    spec: AttentionSpec, lists: Sequence[Tensor], shape: Shape, sizes: Sequence[int]
) -> Layout:
    """:func:`unpack`, done once for lists that a call gets again, as those that a graph holds.

    What is kept are views: they hold the memory that they are of, so its address tells them apart,
    and show whatever is in it.
    """
    numbers = tuple(map(int, sizes))
    key = spec, shape, numbers, *[(t.data_ptr(), t.shape) for t in lists]
    found = _ASSEMBLED.get(key)
    if found is None:
        batch, heads, n_q, n_kv = shape
        found = unpack(spec, lists, batch=batch, heads=heads, n_q=n_q, n_kv=n_kv, sizes=numbers)
        _ASSEMBLED[key] = found
        if len(_ASSEMBLED) > _MOST:
            _ASSEMBLED.popitem(last=False)
    else:
        _ASSEMBLED.move_to_end(key)
    return found


def _unpacked(part: View, problem: Problem, vector: Tensor) -> BlockLayout:
    if part.listed:
        return unpacked_listed(vector, problem)
    lengths = problem.n_q, problem.n_kv
    return BlockLayout.unpack(vector, *lengths, part.q, part.kv, problem.batches, problem.heads)


def _problem(spec: AttentionSpec, part: View, shape: Shape, sizes: tuple[int, ...]) -> Problem:
    batch, heads, *lengths = shape
    mask, blocks = spec.part_mask(part), (part.q, part.kv)
    return Problem.of(mask, sizes, batch, heads, (lengths[0], lengths[1]), blocks, part.listed)


def listed_views(
    spec: AttentionSpec,
    shape: Shape,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    lists: Sequence[Tensor],
) -> Layout:
    """The layout of a mask all of whose blocks selections name.

    Args:
        spec: the mask and its views.
        shape: of the problem.
        tables, sizes: what the mask reads.
        lists: index and count of each view.
    """
    numbers = tuple(map(int, sizes))
    views = tuple(
        listed_layout(_problem(spec, part, shape, numbers), index, count, tables)
        for part, index, count in zip(spec.parts, lists[::2], lists[1::2], strict=True)
    )
    return Layout(spec, views, *shape[:2], sizes=numbers)


@functools.lru_cache(maxsize=64)
def static_lists(
    spec: AttentionSpec,
    shape: Shape,
    kv_heads: int,
    sizes: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The lists of a mask that reads no tensors; cached, so do not write to them."""
    batch, heads, n_q, n_kv = shape
    # A backward may save them, whoever asks first.
    with torch.inference_mode(False):
        layout = build_views(
            spec, batch=batch, heads=heads, n_q=n_q, n_kv=n_kv, sizes=sizes, device=device
        )
        return tuple(lists_of(layout, kv_heads, device))
