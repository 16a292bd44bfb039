"""The lists of a call of attention to blocks: its layout, as int32 tensors that a graph can hold.

For each view one vector of blocks. On a GPU the worklists of the kernels follow, for each section
over queries and then for each over keys the two tensors of :attr:`Schedule.packed`. What the host
has to know of them is in their shapes, so whoever gets them neither asks the device nor looks
anything up.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from sparse_compile.layout.layout import Layout, build_views, problems_of
from sparse_compile.layout.listed import listed_layout, unpacked_listed
from sparse_compile.layout.schedule import workers_of
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec

#: Types of devices whose kernels take worklists.
_WITH_WORKLISTS = ("cuda",)
#: Layouts of so many lists are kept assembled.
_MOST = 16
_ASSEMBLED: OrderedDict[Hashable, Layout] = OrderedDict()


def lists_of(
    layout: Layout,
    kv_heads: int,
    device: torch.device,
    copied: Callable[[Tensor], Tensor] = torch.clone,
) -> list[Tensor]:
    """The lists of a layout, in memory of their own.

    Args:
        layout: of the blocks of a mask.
        kv_heads: number of key heads.
        device: where the attention runs.
        copied: copies a worklist, which follows from what the host knows.
    """
    lists = [view.pack() for view in layout.views]
    if device.type in _WITH_WORKLISTS:
        for axis, heads in (("q", layout.heads), ("kv", kv_heads)):
            members, workers = layout.batch * heads, workers_of(device)
            for work in layout.schedules(axis, members, workers, device):
                items_and_merges, numbers = work.packed
                lists += copied(items_and_merges), numbers.new_empty(numbers.shape)
    return lists


def count_worklists(spec: AttentionSpec, device: torch.device) -> int:
    """How many worklists stand among the lists of an attention on a device."""
    if device.type not in _WITH_WORKLISTS or not spec.parts:
        return 0
    return sum(len(spec.sections(axis)) for axis in ("q", "kv"))


def unpack(
    spec: AttentionSpec,
    lists: Sequence[Tensor],
    shape: ProblemShape,
    tables: Sequence[Tensor] = (),
    sizes: Sequence[int] = (),
) -> Layout:
    """The layout of some lists, of views into them: nothing is copied, and nothing waits.

    Args:
        spec: parts of blocks.
        lists: of :func:`lists_of`, or the vectors of views alone.
        shape: of the problem.
        tables, sizes: what the mask reads.
    """
    n, numbers = len(spec.parts), tuple(map(int, sizes))
    problems = problems_of(spec, shape, numbers)
    views = tuple(
        unpacked_listed(vector, problem) if part.listed else problem.unpacked(vector)
        for part, problem, vector in zip(spec.parts, problems, lists[:n], strict=True)
    )
    return Layout(spec, views, shape.batch, shape.heads, tuple(tables), numbers, tuple(lists[n:]))


def assembled(
    spec: AttentionSpec, lists: Sequence[Tensor], shape: ProblemShape, sizes: Sequence[int]
) -> Layout:
    """:func:`unpack`, done once for lists that a call gets again, as those that a graph holds.

    What is kept are views: they hold the memory that they are of, so its address tells them apart,
    and show whatever is in it. Of a selection nothing is kept: its columns are no views.
    """
    numbers = tuple(map(int, sizes))
    if any(part.listed for part in spec.parts):
        return unpack(spec, lists, shape, sizes=numbers)
    key = spec, shape, numbers, *[(t.data_ptr(), t.shape) for t in lists]
    found = _ASSEMBLED.get(key)
    if found is None:
        found = _ASSEMBLED[key] = unpack(spec, lists, shape, sizes=numbers)
        if len(_ASSEMBLED) > _MOST:
            _ASSEMBLED.popitem(last=False)
    else:
        _ASSEMBLED.move_to_end(key)
    return found


def listed_views(
    spec: AttentionSpec,
    shape: ProblemShape,
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
    parts = zip(problems_of(spec, shape, numbers), lists[::2], lists[1::2], strict=True)
    views = tuple(listed_layout(problem, index, n, tables) for problem, index, n in parts)
    return Layout(spec, views, shape.batch, shape.heads, sizes=numbers)


@functools.lru_cache(maxsize=64)
def static_lists(
    spec: AttentionSpec,
    shape: ProblemShape,
    kv_heads: int,
    sizes: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The lists of a mask that reads no tensors; cached, so do not write to them."""
    # A backward may save them, whoever asks first.
    with torch.inference_mode(False):
        layout = build_views(spec, shape, sizes=sizes, device=device)
        return tuple(lists_of(layout, kv_heads, device))
