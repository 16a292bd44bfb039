"""Selection: for every unit of queries, the units of keys that it attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.patterns.selecting import Selected
from sparse_compile.selection.selection_report import SelectionReport, report_of


@dataclass(frozen=True)
class Selection:
    """The selected units of keys, as lists of a fixed capacity.

    :func:`sparse_compile.select` makes one, and so does ``Selection(*canonical(index, units),
    unit_q, unit_kv)`` of any indices; its :attr:`pattern` is part of the masks of the attentions
    that share it.

    Queries ``u * unit_q, ..., u * unit_q + unit_q - 1`` of query head ``h`` attend to the keys of
    the units ``index[b, s, u, : count[b, s, u]]``, ``s = h // (Hq // Hs)``; unit ``j`` is the keys
    ``j * unit_kv, ..., j * unit_kv + unit_kv - 1``, those that exist.

    Attributes:
        index: int32 [B, Hs, ceil(Nq / unit_q), K]; Hs divides the query heads. The first ``count``
            units of each row are distinct, ascending and in range; what follows is never read.
        count: int32 [B, Hs, ceil(Nq / unit_q)].
        unit_q, unit_kv: consecutive queries, and keys, that are selected together.
    """

    index: Tensor
    count: Tensor
    unit_q: int
    unit_kv: int

    @property
    def pattern(self) -> Selected:
        """The pattern that selects this, at no cost: ``P.Causal() & chosen.pattern``."""
        return Selected(self.index, self.unit_kv, self.unit_q, self.count)

    def report(self, n_q: int, n_kv: int) -> SelectionReport:
        """How many units the lists hold; print it, or read its fields. Waits for the device.

        Args:
            n_q, n_kv: queries and keys.

        >>> index, count = canonical(torch.tensor([[[[0, 3], [1, 1]]]]), 4)
        >>> print(Selection(index, count, 1, 16).report(2, 64))
        1 to 2 of 4 units of 16 keys for each query (median 1.5, mean 1.5, 95 % have at most 2), \
38 % of the pairs
        """
        return report_of(self, n_q, n_kv)

    def dense(self, n_q: int, n_kv: int) -> Tensor:
        """bool [B, Hs, n_q, n_kv], True where selected; for tests and pictures."""
        units = -(-n_kv // self.unit_kv)
        used = torch.arange(self.index.shape[-1], device=self.index.device) < self.count[..., None]
        place = torch.where(used, self.index.long(), units)
        chosen = torch.zeros(
            *self.index.shape[:3], units + 1, dtype=torch.bool, device=self.index.device
        ).scatter_(-1, place, True)[..., :units]
        by_query = chosen.repeat_interleave(self.unit_q, 2)[:, :, :n_q]
        return by_query.repeat_interleave(self.unit_kv, 3)[..., :n_kv]


def canonical(index: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """Any lists of units as those of a :class:`Selection`; does not synchronise.

    Args:
        index: integers [B, Hs, Uq, K]. Negative numbers and numbers of ``units`` or more are left
            out, and repeated ones count once.
        units: how many units of keys there are.

    Returns:
        int32 index [B, Hs, Uq, K] and count [B, Hs, Uq].

    >>> index, count = canonical(torch.tensor([[[[3, -1, 0, 3]]]]), 4)
    >>> index[..., :2].tolist(), count.tolist()
    ([[[[0, 3]]]], [[[2]]])
    """
    inside = (index >= 0) & (index < units)
    ordered = torch.where(inside, index, units).to(torch.int32).sort(-1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[..., 1:] = ordered[..., 1:] == ordered[..., :-1]
    ordered = ordered.masked_fill(again, units).sort(-1).values
    return ordered.contiguous(), (ordered < units).sum(-1, dtype=torch.int32)


def keys_of(index: Tensor, count: Tensor, unit: int, n_kv: int) -> tuple[Tensor, Tensor]:
    """The keys of listed units; does not synchronise.

    Args:
        index: [..., K], anything beyond the first ``count`` of each row.
        count: [...].
        unit: keys of a unit.
        n_kv: how many keys there are.

    Returns:
        int64 [..., K * unit], all in range; and bool, which of them are selected and exist.

    >>> keys, exist = keys_of(torch.tensor([1, 9]), torch.tensor(1), 2, 3)
    >>> keys.tolist(), exist.tolist()
    ([2, 2, 2, 2], [True, False, False, False])
    """
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    keys = index.long()[..., None] * unit + torch.arange(unit, device=index.device)
    exist = used[..., None] & (keys >= 0) & (keys < n_kv)
    return keys.clamp(0, n_kv - 1).flatten(-2), exist.flatten(-2)


def rows_at(t: Tensor, keys: Tensor) -> Tensor:
    """The rows [B, G, U, L, X] of [B, Hkv, Nkv, X] at keys [B, G, U, L]; Hkv divides G."""
    batch = torch.arange(t.shape[0], device=t.device).view(-1, 1, 1, 1)
    head = torch.arange(keys.shape[1], device=t.device) // (keys.shape[1] // t.shape[1])
    return t[batch, head.view(-1, 1, 1), keys]


def worklist(start: Tensor, entries: int, each: int) -> Tensor:
    """Who handles which entries of :func:`places`, none more than ``each``; does not synchronise.

    Args:
        start: int32 [B, Hs, units + 1].
        entries: how many entries there may be.
        each: entries of an item at most.

    Returns:
        int32 [B, Hs, n, 3]: a unit, and from where to where; n depends on the shapes alone, and
        items that are not needed are empty.

    >>> worklist(torch.tensor([[[0, 5, 5, 7]]], dtype=torch.int32), 8, 4)[0, 0].tolist()
    [[0, 0, 4], [0, 4, 5], [2, 5, 7], [2, 7, 7], [2, 7, 7]]
    """
    length = start.diff(dim=-1)
    items = (length + (each - 1)) // each
    ends = items.cumsum(-1)
    n = length.shape[-1] + entries // each
    number = torch.arange(n, device=start.device).expand(*ends.shape[:2], n).contiguous()
    unit = torch.searchsorted(ends, number, right=True).clamp(max=length.shape[-1] - 1)
    within = number - (ends - items).gather(-1, unit)
    until = start[..., 1:].gather(-1, unit).long()
    lo = torch.minimum(start.gather(-1, unit) + within * each, until)
    return torch.stack([unit, lo, torch.minimum(lo + each, until)], -1).to(torch.int32)
