"""Biases: the mask of a batch of tiles, evaluated where it must be and kept where it can be."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.cpu.batches import Batch, Gathered, Strided
from sparse_compile.codegen.cpu.cache import BoundedCache, fingerprint
from sparse_compile.codegen.cpu.shift import is_shift_invariant
from sparse_compile.expr import B, H, evaluate

#: Tables beyond this size, in bytes, are not worth comparing: their biases serve one call only.
LARGEST_KEY = 1 << 22

#: Bytes of biases that are kept.
CACHE_BYTES = 1 << 27


@dataclass(frozen=True)
class Bias:
    """What is added to the scores of a batch of tiles: 0 where a query may attend, else -inf.

    Attributes:
        values: [tiles or 1, 1, rows, keys] in the dtype of the queries.
        empty: bool [tiles or 1, 1, rows], the rows that may attend to no key of their tile;
            None where there are none.
    """

    values: Tensor
    empty: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        empty = 0 if self.empty is None else self.empty.numel()
        return empty + self.values.numel() * self.values.element_size()


_CACHE: BoundedCache[Bias] = BoundedCache(CACHE_BYTES)


@dataclass(frozen=True, eq=False)
class MaskCall:
    """The mask of a call, for one batch entry and query head, and what is known of it.

    Attributes:
        call: whose mask it is.
        key: equal for calls with the same content.
        biases: what is known already; of this call only when its tables are too large to compare.
        batch, head: the batch entry and the query head.
    """

    call: AttentionCall
    key: Hashable
    biases: BoundedCache[Bias]
    batch: int = 0
    head: int = 0

    @staticmethod
    def make(call: AttentionCall) -> MaskCall:
        """The mask of a call, with its key."""
        content = fingerprint(call.tables, LARGEST_KEY)
        biases = _CACHE if content is not None else BoundedCache[Bias](CACHE_BYTES)
        key = (call.spec.mask.text, *call.shape[2:], tuple(call.sizes), call.q.dtype, content)
        return MaskCall(call, key, biases)

    def at(self, batch: int, head: int) -> MaskCall:
        """The mask of one batch entry and query head."""
        return replace(self, batch=batch, head=head)

    def is_shared(self, batch: Batch) -> bool:
        """Whether all tiles of a batch have the same bias, or none at all."""
        if isinstance(batch, Gathered):
            return False
        if not batch.masked or batch.tiles == 1:
            return True
        return is_shift_invariant(self.call.spec.mask, batch.q_step, batch.kv_step)

    def bias(self, batch: Batch, name: Hashable) -> Bias | None:
        """The bias of a batch; ``name`` tells it from the other batches of all plans."""
        if isinstance(batch, Strided):
            if not batch.masked:
                return None
            # One tile stands for all of them.
            batch = batch.part(0, 1) if self.is_shared(batch) else batch
        elif bool(batch.present.all()) and not bool(batch.partial.any()):
            return None
        mask = self.call.spec.mask
        entry = self.batch if mask.depends_on(B) else 0
        head = self.head if mask.depends_on(H) else 0
        return self.biases.get((self.key, entry, head, name), lambda: self._make(batch))

    def _make(self, batch: Batch) -> Bias:
        allowed = self._allowed(batch)
        values = torch.zeros(allowed.shape, dtype=self.call.q.dtype)
        values.masked_fill_(~allowed, -math.inf)
        empty = ~allowed.any(-1)
        return Bias(values.unsqueeze(1), empty.unsqueeze(1) if bool(empty.any()) else None)

    def _allowed(self, batch: Batch) -> Tensor:
        """bool [tiles, rows, keys]: who may attend."""
        if isinstance(batch, Strided):
            return self._evaluate(*batch.coordinates())
        tiles, width = batch.blocks.shape
        allowed = batch.present.clone().view(tiles, width, 1, 1)
        allowed = allowed.repeat(1, 1, batch.rows, batch.block_kv)
        tile, place = batch.partial.nonzero(as_tuple=True)
        queries = batch.q_start[tile].view(-1, 1, 1) + torch.arange(batch.rows).view(-1, 1)
        keys = batch.blocks[tile, place].view(-1, 1, 1) * batch.block_kv
        keys = keys + torch.arange(batch.block_kv)
        allowed[tile, place] = self._evaluate(queries, keys) & (keys < self.call.k.shape[2])
        return allowed.permute(0, 2, 1, 3).reshape(tiles, batch.rows, -1)

    def _evaluate(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [tiles, rows, keys] at int64 [tiles, rows, 1] and [tiles, 1, keys]."""
        where = {"b": torch.tensor(self.batch), "h": torch.tensor(self.head)}
        where |= {"q": queries, "kv": keys}
        allowed = evaluate(self.call.spec.mask, where, *self.call.data)
        return allowed.expand(queries.shape[0], queries.shape[1], keys.shape[2])
