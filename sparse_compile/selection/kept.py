"""Lists of the units of keys that a mask keeps, however many these are."""

from __future__ import annotations

import torch
from torch import Tensor

#: Elements of a mask that are looked at together, of which each takes 13 bytes meanwhile.
_TOGETHER = 1 << 22


def kept_lists(kept: Tensor, room: int | None = None) -> tuple[Tensor, Tensor]:
    """The units that a mask keeps, as the lists of a :class:`Selection`.

    Args:
        kept: bool [B, Hs, U, units].
        room: of every list; None: as much as the longest needs, for which the device is waited for.

    Returns:
        int32 index [B, Hs, U, room], ascending, and count [B, Hs, U]; a list with a count of more
        than ``room`` is cut off.

    >>> index, count = kept_lists(torch.tensor([[[[True, False, True], [False, True, False]]]]))
    >>> index[0, 0, 0].tolist(), index[0, 0, 1, :1].tolist(), count.tolist()
    ([0, 2], [1], [[[2, 1]]])
    """
    *rows, units = kept.shape
    count = kept.sum(-1, dtype=torch.int32)
    if room is None:
        room = int(count.max()) if count.numel() else 0
    index = torch.empty(*rows, room, dtype=torch.int32, device=kept.device)
    number = torch.arange(units, dtype=torch.int32, device=kept.device)
    step = max(1, _TOGETHER // max(1, units))
    every, lists = kept.flatten(0, 2), index.flatten(0, 2)
    for first in range(0, len(every), step):
        part, out = every[first : first + step], lists[first : first + step]
        place = part.cumsum(-1, dtype=torch.int32) - 1
        # What is not kept, or has no room, goes to a place of its own, which is cut off.
        place = torch.where(part & (place < room), place, room).long()
        wide = torch.full((len(part), room + 1), units, dtype=torch.int32, device=kept.device)
        out.copy_(wide.scatter_(-1, place, number.expand(place.shape))[:, :room])
    return index, count
