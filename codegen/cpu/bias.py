"""Biases: the mask of a batch of tiles, evaluated where it must be and kept where it can be."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.cpu.batches import Batch, Gathered, Strided
from sparse_compile.codegen.cpu.cache import BoundedCache, fingerprint
from sparse_compile.codegen.cpu.flash import Bias
from sparse_compile.codegen.cpu.shift import is_shift_invariant
from sparse_compile.expr import B, H, MaskExpr, evaluate

#: Tables beyond this size, in bytes, are not worth comparing: their biases serve one call only.
LARGEST_KEY = 1 << 22

#: Bytes of biases that are kept.
CACHE_BYTES = 1 << 27

_CACHE: BoundedCache[Bias] = BoundedCache(CACHE_BYTES)


@dataclass(frozen=True)
class MaskCall:
    """A mask and the run-time data of one call.

    Attributes:
        mask: the predicate.
        n_q, n_kv: lengths.
        tables, sizes: what the predicate reads.
        dtype: of the queries.
        key: equal for calls with the same content.
        biases: what is known already; of this call only when its tables are too large to compare.
    """

    mask: MaskExpr
    n_q: int
    n_kv: int
    tables: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    key: Hashable
    biases: BoundedCache[Bias]

    @staticmethod
    def make(call: AttentionCall) -> MaskCall:
        """The mask of a call, with its key."""
        mask, tables, dtype = call.spec.mask, tuple(call.tables), call.q.dtype
        (_, _, n_q, n_kv), sizes = call.shape, tuple(call.sizes)
        content = fingerprint(tables, LARGEST_KEY)
        biases = _CACHE if content is not None else BoundedCache[Bias](CACHE_BYTES)
        key = (mask.text, n_q, n_kv, sizes, dtype, content)
        return MaskCall(mask, n_q, n_kv, tables, sizes, dtype, key, biases)

    def at(self, batch: int, head: int) -> MaskAt:
        """The mask of one batch entry and query head."""
        return MaskAt(self, batch, head)


@dataclass(frozen=True)
class MaskAt:
    """The mask of one batch entry and query head."""

    call: MaskCall
    batch: int
    head: int

    def is_shared(self, batch: Batch) -> bool:
        """Whether all tiles of a batch have the same bias, or none at all."""
        if isinstance(batch, Gathered):
            return False
        if not batch.masked or batch.tiles == 1:
            return True
        return is_shift_invariant(self.call.mask, batch.q_step, batch.kv_step)

    def bias(self, batch: Batch, name: Hashable) -> Bias | None:
        """The bias of a batch; ``name`` tells it from the other batches of all plans."""
        if isinstance(batch, Strided):
            if not batch.masked:
                return None
            # One tile stands for all of them.
            batch = batch.part(0, 1) if self.is_shared(batch) else batch
        elif bool(batch.present.all()) and not bool(batch.partial.any()):
            return None
        mask, key = self.call.mask, self.call.key
        entry = self.batch if mask.depends_on(B) else 0
        head = self.head if mask.depends_on(H) else 0
        return self.call.biases.get((key, entry, head, name), lambda: self._make(batch))

    def _make(self, batch: Batch) -> Bias:
        allowed = self._strided(batch) if isinstance(batch, Strided) else self._gathered(batch)
        values = torch.zeros(allowed.shape, dtype=self.call.dtype)
        values.masked_fill_(~allowed, -math.inf)
        empty = ~allowed.any(-1)
        return Bias(values.unsqueeze(1), empty.unsqueeze(1) if bool(empty.any()) else None)

    def _strided(self, batch: Strided) -> Tensor:
        queries, keys = batch.coordinates()
        return self._evaluate(queries, keys)

    def _gathered(self, batch: Gathered) -> Tensor:
        tiles, width = batch.blocks.shape
        allowed = batch.present.clone().view(tiles, width, 1, 1)
        allowed = allowed.repeat(1, 1, batch.rows, batch.block_kv)
        tile, place = batch.partial.nonzero(as_tuple=True)
        queries = batch.q_start[tile].view(-1, 1, 1) + torch.arange(batch.rows).view(-1, 1)
        keys = batch.blocks[tile, place].view(-1, 1, 1) * batch.block_kv
        keys = keys + torch.arange(batch.block_kv)
        allowed[tile, place] = self._evaluate(queries, keys) & (keys < self.call.n_kv)
        return allowed.permute(0, 2, 1, 3).reshape(tiles, batch.rows, -1)

    def _evaluate(self, queries: Tensor, keys: Tensor) -> Tensor:
        """bool [tiles, rows, keys] at int64 [tiles, rows, 1] and [tiles, 1, keys]."""
        call = self.call
        where = {
            "b": torch.tensor(self.batch),
            "h": torch.tensor(self.head),
            "q": queries,
            "kv": keys,
        }
        allowed = evaluate(call.mask, where, call.n_q, call.n_kv, call.tables, call.sizes)
        return allowed.expand(queries.shape[0], queries.shape[1], keys.shape[2])
