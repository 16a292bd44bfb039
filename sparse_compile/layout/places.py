"""A counting sort of the entries of lists, on their device."""

from __future__ import annotations

import torch
from torch import Tensor


def places(
    index: Tensor, count: Tensor, units: int, stretch: int | None = None
) -> tuple[Tensor, Tensor]:
    """The entries of all lists in the order of the units of keys that they name.

    Does not synchronise: those that no list has stand at the end.

    Args:
        index, count: as in :class:`sparse_compile.selection.Selection`.
        units: how many units of keys there are.
        stretch: so many units of queries come before the next ones, each stretch in the order of
            the units of keys; None: all at once. Who works through the entries in order finds the
            queries of a stretch in a cache.

    Returns:
        ``start`` int32 [B, Hs, n * units + 1] for n stretches and ``order`` int32 [B, Hs, Uq * K]:
        unit ``j`` is named in stretch ``s`` by the entries ``order[b, h, start[b, h, i] :
        start[b, h, i + 1]]``, ``i = s * units + j``, ascending, counted over the last two
        dimensions of ``index``.
    """
    batch, heads, rows, most = index.shape
    stretch = stretch or max(rows, 1)
    edges = -(-rows // stretch) * units
    used = torch.arange(most, device=index.device) < count[..., None]
    first = torch.arange(rows, device=index.device)[:, None] // stretch * units
    keys = torch.where(used, index + first, edges).to(torch.int32).view(batch, heads, rows * most)
    by_unit = keys.sort(dim=-1, stable=True)
    edge = torch.arange(edges + 1, dtype=torch.int32, device=index.device)
    edge = edge.expand(batch, heads, edges + 1).contiguous()
    start = torch.searchsorted(by_unit.values, edge, out_int32=True)
    return start, by_unit.indices.to(torch.int32)
