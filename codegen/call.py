"""SelectedCall: the operands of attention over selected keys, as all executors take them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sparse_compile.spec.selected import SelectedSpec


@dataclass(frozen=True, eq=False)
class SelectedCall:
    """What attention over selected keys is computed from.

    Attributes:
        q: [B, Hq, Nq, D].
        k: [B, Hkv, Nkv, D].
        v: [B, Hkv, Nkv, Dv].
        index, count: int32, as in :class:`sparse_compile.selection.Selection`.
        tables, sizes: what the mask reads.
        scale: factor on the scores.
        spec: the mask and the units.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    index: Tensor
    count: Tensor
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    scale: float
    spec: SelectedSpec

    @property
    def groups(self) -> int:
        """Groups of query heads; those of a group share both a key head and a selection."""
        return math.lcm(self.k.shape[1], self.index.shape[1])

    @property
    def members(self) -> int:
        """Query heads of a group."""
        return self.q.shape[1] // self.groups

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute, or nothing to attend to."""
        return not (self.q.numel() and self.k.numel() and self.index.shape[3])


@dataclass(frozen=True, eq=False)
class Result:
    """What a backward follows from: maybe that of a larger attention, of which the call is a part.

    Attributes:
        out: [B, Hq, Nq, Dv], 0 on empty rows.
        lse: fp32 [B, Hq, Nq], the natural log-sum-exp, -inf on empty rows.
        grad_out: gradient of ``out``.
        grad_lse: gradient of ``lse``, if anything read it.
    """

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None
