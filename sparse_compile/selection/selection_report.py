"""SelectionReport: how much a selection selects, in numbers for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sparse_compile.selection.selection import Selection


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


def report_of(chosen: Selection, n_q: int, n_kv: int) -> SelectionReport:
    """What :meth:`sparse_compile.selection.Selection.report` returns; its arguments."""
    index, count = chosen.index, chosen.count
    ordered = count.flatten().sort().values
    lists, room = ordered.numel(), index.shape[-1]
    some = lists > 0
    places = [0, (lists - 1) // 2, lists // 2, -(-95 * lists // 100) - 1, lists - 1]
    found = ordered[torch.tensor(places, device=count.device)].tolist() if some else [0] * 5
    return SelectionReport(
        lists=lists,
        units=-(-n_kv // chosen.unit_kv),
        room=room,
        least=found[0],
        median=(found[1] + found[2]) / 2,
        mean=float(ordered.double().mean()) if some else 0.0,
        p95=found[3],
        most=found[4],
        density=_density(chosen, n_q, n_kv),
        unit_q=chosen.unit_q,
        unit_kv=chosen.unit_kv,
    )


def _density(chosen: Selection, n_q: int, n_kv: int) -> float:
    index, count, unit_q, unit_kv = chosen.index, chosen.count, chosen.unit_q, chosen.unit_kv
    all_pairs = count.shape[0] * count.shape[1] * n_q * n_kv
    if not all_pairs:
        return 0.0
    used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
    keys = (n_kv - index * unit_kv).clamp(max=unit_kv).masked_fill(~used, 0).sum(-1)
    starts = torch.arange(count.shape[2], device=count.device) * unit_q
    return float((keys * (n_q - starts).clamp(max=unit_q)).sum()) / all_pairs
