"""Lists of the units of keys that scores keep, however many these are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: What is kept of the rows from the first up to the end: bool [B, Hs, end - first, units].
Rows = Callable[[int, int], Tensor]
#: Elements that are looked at together, of which each takes 13 bytes meanwhile.
TOGETHER = 1 << 22


def kept_lists(
    kept: Rows,
    parts: Sequence[tuple[int, int]],
    shape: Sequence[int],
    device: torch.device,
    room: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The units that are kept, as the lists of a :class:`Selection`.

    Args:
        kept: what is kept of some rows.
        parts: the rows, from the first up to the end of each part.
        shape: B, Hs and U.
        device: where it is.
        room: of each list, which none exceeds; None for as much as the longest needs, for which the
            device is waited for in each part.

    Returns:
        int32 index [B, Hs, U, room], ascending, and count [B, Hs, U].

    >>> mask = torch.tensor([[[[True, False, True], [False, True, False]]]])
    >>> parts = [(0, 1), (1, 2)]
    >>> index, count = kept_lists(lambda a, b: mask[:, :, a:b], parts, (1, 1, 2), mask.device)
    >>> index[0, 0, 0].tolist(), index[0, 0, 1, :1].tolist(), count.tolist()
    ([0, 2], [1], [[[2, 1]]])
    """
    count = torch.empty(*shape, dtype=torch.int32, device=device)
    lists = []
    for first, end in parts:
        part = kept(first, end)
        count[:, :, first:end] = part.sum(-1, dtype=torch.int32)
        lists.append(_filled(part, room) if room is not None else _listed(part))
    longest = max((made.shape[-1] for made in lists), default=room or 0)
    index = torch.zeros(*shape, longest, dtype=torch.int32, device=device)
    for (first, end), made in zip(parts, lists, strict=True):
        index[:, :, first:end, : made.shape[-1]] = made
    return index, count


def _listed(part: Tensor) -> Tensor:
    """int32 [..., longest]: which of the last dimension are True, in order."""
    units = part.flatten(0, -2)
    count = units.sum(-1)
    row, unit = units.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=part.device) - (count.cumsum(0) - count)[row]
    longest = int(place.max()) + 1 if len(row) else 0
    lists = torch.zeros(len(units), longest, dtype=torch.int32, device=part.device)
    lists[row, place] = unit.int()
    return lists.view(*part.shape[:-1], longest)


def _filled(part: Tensor, room: int) -> Tensor:
    """int32 [..., room]: which of the last dimension are True, in order; waits for nothing."""
    place = part.cumsum(-1, dtype=torch.int32) - 1
    # What is not kept goes to a place of its own, which is cut off.
    place = torch.where(part, place, room).long()
    number = torch.arange(part.shape[-1], dtype=torch.int32, device=part.device)
    lists = torch.zeros(*part.shape[:-1], room + 1, dtype=torch.int32, device=part.device)
    return lists.scatter_(-1, place, number.expand(place.shape))[..., :room]
