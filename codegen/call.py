"""AttentionCall and AttentionResult: what executors compute from, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compile.expr import ScoreData
from sparse_compile.layout import Layout
from sparse_compile.layout.lists import assembled
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention: its operands, the data of its mask, and what it means.

    Attributes:
        q: [B, Hq, Nq, D], float32, float16 or bfloat16; any strides.
        k: [B, Hkv, Nkv, D], same dtype; Hkv divides Hq.
        v: [B, Hkv, Nkv, Dv], same dtype.
        tables: the tensors ``t0, t1, ...`` that the mask reads.
        sizes: the integers ``s0, s1, ...`` that it reads.
        lists: those of the parts of blocks, as in :mod:`sparse_compile.layout.lists`; then for each
            part of units index and count, int32, as in :class:`sparse_compile.selection.Selection`.
        scale: factor on the scores.
        spec: the mask, and the parts that cover it.
        learned: the tensors ``w0, w1, ...`` that its score program reads; they may have gradients.
        layout: the blocks to visit; None where ``lists`` tell.
        whole: whether it is all of an attention, rather than a piece of one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    tables: Sequence[Tensor]
    sizes: Sequence[int]
    lists: Sequence[Tensor]
    scale: float
    spec: AttentionSpec
    learned: tuple[Tensor, ...] = ()
    layout: Layout | None = None
    whole: bool = True

    def pieces(self) -> list[AttentionCall]:
        """What one executor each computes: all blocks together, and every part of units alone."""
        if len(self.spec.pieces) == 1:
            return [self]
        packed = len(self.lists) - 2 * len(self.spec.units)
        starts = iter(range(packed, len(self.lists), 2))
        pieces = []
        for spec, used in self.spec.pieces:
            first = next(starts) if spec.units else 0
            lists = self.lists[first : first + 2] if spec.units else self.lists[:packed]
            tables = [self.tables[number] for number in used]
            made = replace(self, tables=tables, lists=lists, spec=spec, whole=False)
            pieces.append(made)
        return pieces

    @property
    def shape(self) -> ProblemShape:
        """Batch, query heads, Nq and Nkv."""
        batch, heads, n_q, _ = self.q.shape
        return ProblemShape(batch, heads, n_q, self.k.shape[2])

    @property
    def data(self) -> tuple[int, int, Sequence[Tensor], Sequence[int]]:
        """What a mask and a score program read besides coordinates: Nq, Nkv, tables and sizes."""
        return self.q.shape[2], self.k.shape[2], self.tables, self.sizes

    def score_data(self, coordinates: Mapping[str, Tensor]) -> ScoreData:
        """What its score program reads at coordinates."""
        return ScoreData(coordinates, *self.data, self.learned)

    def sums(self, wanted: Sequence[int]) -> list[Tensor | None]:
        """Zeros to which gradients of learned tensors are added; None for those not wanted."""
        wide = torch.promote_types(self.q.dtype, torch.float32)
        return [
            torch.zeros(t.shape, dtype=wide, device=t.device) if i in wanted else None
            for i, t in enumerate(self.learned)
        ]

    @functools.cached_property
    def blocks(self) -> Layout:
        """The layout of a call of blocks."""
        return self.layout or assembled(self.spec, self.lists, self.shape, self.sizes)

    @property
    def index(self) -> Tensor:
        """Of a call of one part of units, the units of keys of each list."""
        return self.lists[0]

    @property
    def count(self) -> Tensor:
        """Of a call of one part of units, how long each list is."""
        return self.lists[1]

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
        """Whether there is nothing to compute, or no list has room for anything."""
        return not (self.q.numel() and self.k.numel() and self.index.shape[3])


@dataclass(frozen=True, eq=False)
class AttentionResult:
    """What a backward follows from: maybe that of a larger attention, of which the call is a piece.

    Attributes:
        out: [B, Hq, Nq, Dv] in q's dtype; for an executor, 0 on empty rows.
        lse: fp32 [B, Hq, Nq], the natural log-sum-exp, -inf on empty rows.
        grad_out: gradient of ``out``.
        grad_lse: gradient of ``lse``, if anything read it.
        wanted: numbers of the learned tensors whose gradients are asked for.
    """

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None = None
    wanted: tuple[int, ...] = ()
