"""Lists of the units of keys that scores keep, however many these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: What is kept of the rows from the first up to the end: bool [B, Hs, end - first, units].
Rows = Callable[[int, int], Tensor]
#: Elements that are looked at together, of which each takes 13 bytes meanwhile.
_TOGETHER = 1 << 22
#: Units that may be kept besides those expected before the lists are made once more.
_SPARE = 64


def kept_lists(
    kept: Rows,
    parts: Sequence[tuple[int, int]],
    shape: Sequence[int],
    device: torch.device,
    expected: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The units that are kept, as the lists of a :class:`Selection`.

    Args:
        kept: what is kept of some rows.
        parts: the rows, from the first up to the end of each part.
        shape: B, Hs, U and units.
        device: where it is.
        expected: how long lists are, but for some. There is room for these and a few more; where
            that does not do, for which the device is waited for, the lists are made once more. None
            for room for all units, which waits for nothing.

    Returns:
        int32 index [B, Hs, U, room], ascending, and count [B, Hs, U].

    >>> mask = torch.tensor([[[[True, False, True], [False, True, False]]]])
    >>> parts = in_parts(2, elements=3)
    >>> index, count = kept_lists(lambda a, b: mask[:, :, a:b], parts, mask.shape, mask.device)
    >>> index[0, 0, 0, :2].tolist(), index[0, 0, 1, :1].tolist(), count.tolist()
    ([0, 2], [1], [[[2, 1]]])
    """
    *rows, units = shape
    room = units if expected is None else min(units, expected + _SPARE)
    index, count = _lists(kept, parts, rows, room, device)
    if expected is not None and count.numel() and (longest := int(count.max())) > room:
        index, count = _lists(kept, parts, rows, longest, device)
    return index, count


def in_parts(rows: int, elements: int) -> list[tuple[int, int]]:
    """Rows in parts that can be looked at together, when each has so many elements."""
    step = max(1, _TOGETHER // max(1, elements))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def _lists(
    kept: Rows,
    parts: Sequence[tuple[int, int]],
    rows: list[int],
    room: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Lists with a given room, and the counts of what they should hold: longer ones are cut off."""
    index = torch.empty(*rows, room, dtype=torch.int32, device=device)
    count = torch.empty(rows, dtype=torch.int32, device=device)
    for first, end in parts:
        part = kept(first, end)
        count[:, :, first:end] = part.sum(-1, dtype=torch.int32)
        index[:, :, first:end] = _places(part, room)
    return index, count


def _places(part: Tensor, room: int) -> Tensor:
    """int32 [..., room]: which of the last dimension are True, in order, as far as room goes."""
    units = part.shape[-1]
    place = part.cumsum(-1, dtype=torch.int32) - 1
    # What is not kept, or has no room, goes to a place of its own, which is cut off.
    place = torch.where(part & (place < room), place, room).long()
    number = torch.arange(units, dtype=torch.int32, device=part.device)
    wide = torch.full((*part.shape[:-1], room + 1), units, dtype=torch.int32, device=part.device)
    return wide.scatter_(-1, place, number.expand(place.shape))[..., :room]
