"""Layouts of calls of attention, found again: those just packed, and those of static masks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_compile.layout.layout import Layout, static_layout, unpack
from sparse_compile.layout.listed import packed_lists
from sparse_compile.layout.superset import Problem
from sparse_compile.layout.tensor_state import memory_of
from sparse_compile.spec import AttentionSpec

#: Batch, query heads, n_q and n_kv.
Shape = tuple[int, int, int, int]


def packed_layout(layout: Layout, spec: str) -> list[Tensor]:
    """For each view of a layout one int32 vector, of which the host still knows what is in it.

    Args:
        layout: of the blocks of a mask.
        spec: the text of the spec that it was made for.
    """
    packed = [view.pack() for view in layout.views]
    shape = layout.batch, layout.heads, layout.n_q, layout.n_kv
    # Operators that get these very tensors need not ask the device what is in them.
    known = _memory(packed, spec, shape, layout.sizes)
    if known is not None:
        known[0][known[1]] = replace(layout, tables=())
    return packed


def listed_views(
    spec: AttentionSpec,
    shape: Shape,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    lists: Sequence[Tensor],
) -> list[Tensor]:
    """For each view of a mask, all of whose blocks selections name, one int32 vector.

    Args:
        spec, shape, tables, sizes: as for :func:`known_layout`.
        lists: index and count of each view.
    """
    (batch, heads, *lengths), numbers = shape, tuple(map(int, sizes))
    packed = []
    for part, index, count in zip(spec.parts, lists[::2], lists[1::2], strict=True):
        mask, blocks, (n_q, n_kv) = spec.part_mask(part), (part.q, part.kv), lengths
        problem = Problem.of(mask, numbers, batch, heads, (n_q, n_kv), blocks, part.listed)
        packed.append(packed_lists(problem, index, count, tables))
    return packed


def known_layout(
    spec: AttentionSpec,
    shape: Shape,
    tables: Sequence[Tensor],
    sizes: Sequence[int],
    packed: Sequence[Tensor],
    device: torch.device,
) -> Layout:
    """The layout of a call: unpacked, or for a static mask as it is cached.

    Args:
        spec: parts of blocks.
        shape: of the problem.
        tables, sizes: what the mask reads.
        packed: a vector for each view, of :func:`packed_layout`; none for a static mask.
        device: of the call.
    """
    batch, heads, n_q, n_kv = shape
    of = {"batch": batch, "heads": heads, "n_q": n_q, "n_kv": n_kv}
    if packed:
        known = _memory(packed, spec.text, shape, sizes)
        found: Layout | None = known and known[0].get(known[1])
        return found or unpack(spec, packed, **of, tables=tables, sizes=sizes)
    return static_layout(spec, sizes=tuple(map(int, sizes)), **of, device=device)


def _memory(
    packed: Sequence[Tensor], spec: str, shape: Shape, sizes: Sequence[int]
) -> tuple[dict[Hashable, Any], Hashable] | None:
    """Where the layout that was packed is remembered, and under what; None if nowhere.

    The layout keeps its own tensors beside the packed ones, which must not be referred to.
    """
    if not packed:
        return None
    numbers = tuple((id(part), part.data_ptr()) for part in packed)
    return memory_of(packed[0]), ("layout", spec, shape, tuple(map(int, sizes)), numbers)
