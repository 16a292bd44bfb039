"""Selection: for every unit of queries, the units of keys that it attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.patterns.checks import bad
from sparse_compile.patterns.selecting import Selected


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

    @property
    def used(self) -> Tensor:
        """bool [B, Hs, ceil(Nq / unit_q), K]: the places that come before the end of their list."""
        return used_places(self.index, self.count)

    def report(self, n_q: int, n_kv: int) -> SelectionReport:
        """How many units the lists hold; print it, or read its fields. Waits for the device.

        Args:
            n_q, n_kv: queries and keys.

        >>> index, count = canonical(torch.tensor([[[[0, 3], [1, 1]]]]), 4)
        >>> print(Selection(index, count, 1, 16).report(2, 64))
        1 to 2 of 4 units of 16 keys for each query (median 1.5, mean 1.5, 95 % have at most 2), \
38 % of the pairs
        """
        ordered = self.count.flatten().sort().values
        lists = ordered.numel()
        places = [0, (lists - 1) // 2, lists // 2, -(-95 * lists // 100) - 1, lists - 1]
        at = torch.tensor(places, device=ordered.device)
        least, below, above, p95, most = ordered[at].tolist() if lists else [0] * 5
        return SelectionReport(
            lists=lists,
            units=-(-n_kv // self.unit_kv),
            room=self.index.shape[-1],
            least=least,
            median=(below + above) / 2,
            mean=float(ordered.double().mean()) if lists else 0.0,
            p95=p95,
            most=most,
            density=self._density(n_q, n_kv),
            unit_q=self.unit_q,
            unit_kv=self.unit_kv,
        )

    def _density(self, n_q: int, n_kv: int) -> float:
        all_pairs = self.count.shape[0] * self.count.shape[1] * n_q * n_kv
        if not all_pairs:
            return 0.0
        keys = (n_kv - self.index * self.unit_kv).clamp(max=self.unit_kv)
        starts = torch.arange(self.count.shape[2], device=self.count.device) * self.unit_q
        queries = (n_q - starts).clamp(max=self.unit_q)
        return float((keys.masked_fill(~self.used, 0).sum(-1) * queries).sum()) / all_pairs

    def dense(self, n_q: int, n_kv: int) -> Tensor:
        """bool [B, Hs, n_q, n_kv], True where selected; for tests and pictures."""
        units = -(-n_kv // self.unit_kv)
        place = torch.where(self.used, self.index.long(), units)
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


def check_lists(index: Tensor, count: Tensor, units: int) -> None:
    """Raise unless the lists are those of a :class:`sparse_compile.selection.Selection`.

    It looks at the values, and so waits for the device. Attention over selected keys calls it on
    the CPU, where nothing is waited for; on a GPU its kernels read what the lists say.

    Args:
        index: int32 [B, Hs, Uq, K].
        count: int32 [B, Hs, Uq].
        units: how many units of keys there are.

    Raises:
        BadPattern: naming the first entry that is out of range, repeated or not ascending.

    >>> check_lists(torch.tensor([[[[0, 2, 7]]]]), torch.tensor([[[2]]]), 3)
    >>> check_lists(torch.tensor([[[[2, 0, 7]]]]), torch.tensor([[[2]]]), 3)
    Traceback (most recent call last):
    sparse_compile.errors.BadPattern: sparse_compile: a selection lists unit 0 at [0, 0, 0, 1], \
after unit 2. Pass what selection.canonical(index, units) returns, with units=3.
    """
    fault = _first_fault(index, count, units)
    if fault is not None:
        instead = f"Pass what selection.canonical(index, units) returns, with units={units}."
        raise bad(fault, instead)


def _first_fault(index: Tensor, count: Tensor, units: int) -> str | None:
    """What is wrong with lists, said of the first entry; None if nothing is."""
    most = index.shape[-1]
    wrong = (count < 0) | (count > most)
    if bool(wrong.any()):
        at = _first(wrong)
        return f"a selection counts {int(count[at])} of {most} units at {list(at)}"
    used = used_places(index, count)
    wrong = used & ((index < 0) | (index >= units))
    if bool(wrong.any()):
        at = _first(wrong)
        return f"a selection lists unit {int(index[at])} at {list(at)}, but there are {units}"
    wrong = used[..., 1:] & (index[..., 1:] <= index[..., :-1])
    if bool(wrong.any()):
        *row, place = _first(wrong)
        before, unit = index[(*row, place)], index[(*row, place + 1)]
        at = (*row, place + 1)
        return f"a selection lists unit {int(unit)} at {list(at)}, after unit {int(before)}"
    return None


def _first(wrong: Tensor) -> tuple[int, ...]:
    """Where the first True is."""
    return tuple(wrong.nonzero()[0].tolist())


def used_places(index: Tensor, count: Tensor) -> Tensor:
    """bool [..., K]: which places of the lists [..., K] come before their ends, ``count`` [...]."""
    return torch.arange(index.shape[-1], device=index.device) < count[..., None]


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
    used = used_places(index, count)
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


@dataclass(frozen=True)
class SelectionReport:
    """How many units of keys the lists of a selection hold.

    Attributes:
        lists: how many lists there are: one for each batch entry, group of heads and unit of
            queries.
        units: of keys, that there are.
        room: units that a list has room for.
        least, median, mean, p95, most: units of a list; 95 of 100 lists have at most ``p95``.
        density: pairs of a query and a selected key over all pairs, whatever else the mask hides.
        unit_q, unit_kv: queries and keys of a unit.
    """

    lists: int
    units: int
    room: int
    least: int
    median: float
    mean: float
    p95: int
    most: int
    density: float
    unit_q: int
    unit_kv: int

    @property
    def room_for_all(self) -> bool:
        """Whether a list has room for all units, so that a top-k with this room keeps all."""
        return self.room >= self.units

    def __str__(self) -> str:
        """In one sentence.

        >>> print(SelectionReport(512, 32, 16, 1, 16, 12.25, 16, 16, 0.375, 1, 64))
        1 to 16 of 32 units of 64 keys for each query (median 16, mean 12.25, 95 % have at most \
16), 38 % of the pairs
        """
        counts = f"{self.least} to {self.most}" if self.least < self.most else f"{self.most}"
        keys = "1 key" if self.unit_kv == 1 else f"{self.unit_kv} keys"
        rows = "query" if self.unit_q == 1 else f"{self.unit_q} queries"
        text = f"{counts} of {self.units} units of {keys} for each {rows}"
        if self.least < self.most:
            spread = f"median {self.median:.4g}, mean {self.mean:.4g}, 95 % have at most {self.p95}"
            text += f" ({spread})"
        text += f", {float(f'{100 * self.density:.2g}'):g} % of the pairs"
        return f"{text}; there is room for all: a top-k keeps all" if self.room_for_all else text
