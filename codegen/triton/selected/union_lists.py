"""The lists of neighbouring units of queries as one, on the device and in one launch.

Imported only where attention runs by Triton, so that nothing else needs it.
"""

# Triton reads the annotations of a kernel, and knows none for pointers and numbers.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kernel, constants, pointers, sizes
from sparse_compile.codegen.runtime.launch import launchers_of
from sparse_compile.codegen.triton.selected.united import constants_of

#: Beyond the greatest unit of keys.
_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def together(unit, names, next_unit, next_names):
    """Of two runs of sorted entries: the last unit, and who names it."""
    return next_unit, tl.where(unit == next_unit, names | next_names, next_names)


@triton.jit(do_not_specialize=["lines", "unions", "units", "most", "cost_query", "cost_union"])
def unite_lists(
    INDEX, COUNT, UNION, NAMES, UNION_COUNT, BALANCE,
    lines, unions, units, most, cost_query, cost_union,
    NEIGHBOURS: tl.constexpr, MEMBERS: tl.constexpr, ROOM: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """LINES unions: their entries are sorted by units of keys, and equal ones become one.

    MEMBERS and ROOM are at least NEIGHBOURS and ``most``, and powers of two.
    """
    SLOTS: tl.constexpr = MEMBERS * ROOM
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    member, at = slot // ROOM, slot % ROOM
    unit = line % unions * NEIGHBOURS + member
    there = (line < lines) & (member < NEIGHBOURS) & (unit < units)
    own = (line // unions).to(tl.int64) * units + unit
    used = there & (at < tl.load(COUNT + own, mask=there, other=0))
    entry = tl.load(INDEX + own * most + at, mask=used, other=0)
    entry = tl.sort(tl.where(used, entry * NEIGHBOURS + member, _NONE))

    unit, names = entry // NEIGHBOURS, 1 << (entry % NEIGHBOURS)
    after = tl.broadcast_to(tl.minimum(slot + 1, SLOTS - 1), [LINES, SLOTS])
    last = (entry != _NONE) & ((unit != tl.gather(unit, after, 1)) | (slot == SLOTS - 1))
    _, names = tl.associative_scan((unit, names), 1, together)
    counted = last.to(tl.int32)
    place = tl.cumsum(counted, 1) - 1
    to = line.to(tl.int64) * (NEIGHBOURS * most) + place
    tl.store(UNION + to, unit, mask=last)
    tl.store(NAMES + to, names, mask=last)
    length = tl.sum(counted, 1)
    row = tl.program_id(0) * LINES + tl.arange(0, LINES)
    tl.store(UNION_COUNT + row, length, mask=row < lines)
    entries = tl.sum(tl.sum(used.to(tl.int32), 1), 0).to(tl.int64)
    united = tl.sum(length, 0).to(tl.int64)
    tl.atomic_add(BALANCE, united * cost_union - entries * cost_query)


_LINES = (
    pointers("int32", "INDEX", "COUNT", "UNION", "NAMES", "UNION_COUNT")
    + pointers("int64", "BALANCE"),
    sizes("lines", "unions", "units", "most", "cost_query", "cost_union"),
    *constants(NEIGHBOURS=4, MEMBERS=4, ROOM=16, LINES=16),
)
_ENTRY = Entry("unite_lists", _LINES, {"num_warps": 4})
UNITE = Kernel(__name__, "", (_ENTRY,), {"unite_lists": unite_lists})
_LAUNCH = launchers_of(UNITE)["unite_lists"]


@dataclass(frozen=True, eq=False)
class UnionLists:
    """What ``neighbours`` units of queries, one after another, select together.

    Attributes:
        index: int32 [B, lists, ceil(units / neighbours), neighbours * most], ascending; what
            follows the first ``count`` of a row is never read.
        names: int32, like ``index``: bit ``g`` is set if the g-th of the units named the entry.
        count: int32 [B, lists, ceil(units / neighbours)].
        balance: int64 [1], below zero if the unions cost less than the lists.
    """

    index: Tensor
    names: Tensor
    count: Tensor
    balance: Tensor


def unite(index: Tensor, count: Tensor, neighbours: int, costs: tuple[int, int]) -> UnionLists:
    """Unite the lists of neighbouring units of queries; does not synchronise.

    Args:
        index: int32 [B, lists, units, most], contiguous; as in
            :class:`sparse_compile.selection.Selection`.
        count: int32 [B, lists, units], contiguous.
        neighbours: units that are united, at most 32; times the number of units of keys, they must
            be below 2 ** 31 - 1.
        costs: of an entry of a list, and of an entry of a union.
    """
    batch, lists, units, most = index.shape
    unions = -(-units // neighbours)
    shape = (batch, lists, unions)
    made = UnionLists(
        index.new_empty(*shape, neighbours * most),
        index.new_empty(*shape, neighbours * most),
        count.new_empty(shape),
        torch.zeros(1, dtype=torch.int64, device=index.device),
    )
    lines = batch * lists * unions
    shapes = constants_of(neighbours, most, lines)
    tensors = {"INDEX": index, "COUNT": count, "UNION": made.index, "NAMES": made.names}
    tensors |= {"UNION_COUNT": made.count, "BALANCE": made.balance}
    numbers = {"lines": lines, "unions": unions, "units": units, "most": most}
    numbers |= {"cost_query": costs[0], "cost_union": costs[1]}
    _LAUNCH((-(-lines // shapes["LINES"]),), {**tensors, **numbers, **shapes})
    return made
