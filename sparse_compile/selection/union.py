"""Union: what several selections choose, as one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.expr import MaskExpr
from sparse_compile.patterns.checks import bad, blocks
from sparse_compile.patterns.selecting import Selecting
from sparse_compile.selection.selection import Selection, canonical


@dataclass(frozen=True, repr=False)
class Union(Selecting):
    """The units that one of ``parts`` selects; what ``|`` of selections runs as.

    Args:
        parts: two selections or more, of the same units.
    """

    parts: tuple[Selecting, ...]

    def __post_init__(self) -> None:
        if len({(part.unit_q, part.unit_kv) for part in self.parts}) > 1:
            units = ", ".join(f"{part!r} of {part.unit_q} x {part.unit_kv}" for part in self.parts)
            raise bad(
                f"an Or of selections in different units: {units} (queries x keys)",
                "Give all of them the same unit_q and unit_kv.",
            )
        object.__setattr__(self, "unit_q", self.parts[0].unit_q)
        object.__setattr__(self, "unit_kv", self.parts[0].unit_kv)

    def __repr__(self) -> str:
        return f"({' | '.join(map(repr, self.parts))})"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Each part must fit."""
        for part in self.parts:
            part.check(n_q, n_kv, batch, heads)

    def select(
        self, q: Tensor, k: Tensor, mask: MaskExpr, tables: list[Tensor], sizes: list[int]
    ) -> Selection:
        """All lists one after another, made ascending; as wide as all of them together."""
        found = [part.select(q, k, mask, tables, sizes) for part in self.parts]
        lists = math.lcm(*(selection.index.shape[1] for selection in found))
        listed = [
            _used(selection).repeat_interleave(lists // selection.index.shape[1], 1)
            for selection in found
        ]
        index, count = canonical(torch.cat(listed, -1), blocks(k.shape[2], self.unit_kv))
        return Selection(index, count, self.unit_q, self.unit_kv)


def _used(selection: Selection) -> Tensor:
    """The lists with -1 beyond their end."""
    place = torch.arange(selection.index.shape[-1], device=selection.index.device)
    return selection.index.masked_fill(place >= selection.count[..., None], -1)
