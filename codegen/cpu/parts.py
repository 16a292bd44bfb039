"""Parts: the heads that go through one call together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.expr import H


@dataclass(frozen=True)
class Part:
    """Some heads of one batch entry, with the same mask.

    Attributes:
        batch: the batch entry.
        heads: the query heads.
        kv_heads: the key heads: as many as the query heads, or one that they share.
        layout_class: whose blocks they visit.
    """

    batch: int
    heads: range
    kv_heads: range
    layout_class: int

    def query_side(self, x: Tensor) -> Tensor:
        """x [B, Hq, ...] of these heads: a view."""
        heads = self.heads
        return x[self.batch, heads.start : heads.stop : heads.step]

    def key_side(self, x: Tensor) -> Tensor:
        """x [B, Hkv, ...] of these heads: a view."""
        return x[self.batch, self.kv_heads.start : self.kv_heads.stop]

    def per_head(self, keys: Tensor) -> Tensor:
        """Keys [tiles, kv_heads, ...] as [tiles, heads, ...], without a copy."""
        return keys.expand(-1, len(self.heads), -1, -1)

    def over_heads(self, grad: Tensor) -> Tensor:
        """The transpose of :meth:`per_head`."""
        shared = len(self.kv_heads) < len(self.heads)
        return grad.sum(1, keepdim=True) if shared else grad


def parts_of(call: AttentionCall) -> Iterator[Part]:
    """All heads, in as few parts as keep the mask the same within a part and copy no K or V."""
    (batch, heads, _, _), kv_heads, (layout,) = call.shape, call.k.shape[1], call.blocks.views
    group = heads // kv_heads
    for b in range(batch):
        first = b % layout.batches * layout.heads
        if layout.heads > 1 or call.spec.mask.depends_on(H):
            for h in range(heads):
                shared = range(h // group, h // group + 1)
                yield Part(b, range(h, h + 1), shared, first + h % layout.heads)
        elif group <= kv_heads:
            for g in range(group):
                yield Part(b, range(g, heads, group), range(kv_heads), first)
        else:
            for kv in range(kv_heads):
                sharing = range(kv * group, (kv + 1) * group)
                yield Part(b, sharing, range(kv, kv + 1), first)
