"""Random: a few random blocks for each block of queries."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, H, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import Count, Flag, Positive, bad, blocks


@dataclass(frozen=True, repr=False)
class Random(Pattern):
    """Each block of queries attends to ``random`` blocks of keys, all different.

    The same seed and lengths give the same blocks, on every machine.

    Args:
        block: tokens per block, of queries and of keys.
        random: how many blocks of keys each block of queries attends to.
        seed: of the choice.
        per_head: whether each head chooses its own.

    >>> mask = Random(block=2, random=1, seed=0).dense(4, 8)
    >>> mask.sum(-1).tolist(), bool((mask[:, :, 0] == mask[:, :, 1]).all())
    ([[[2, 2, 2, 2]]], True)
    """

    block: Positive
    random: Positive
    seed: Count
    per_head: Flag = False

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be enough blocks of keys."""
        count = blocks(n_kv, self.block)
        if count < self.random:
            raise bad(
                f"Random: {self.random} random blocks of the {count} that {n_kv} keys make",
                f"Write random={count} or fewer, or smaller blocks.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv // block`` is one of the blocks chosen for ``q // block``."""
        lookup = tables.add(self, "int32", self._table)
        head = [H] if self.per_head else []
        return chosen(lambda slot: lookup(*head, FloorDiv(Q, self.block), slot), self)

    def _table(self, device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> Any:
        table = drawn(self, str(device), n_q, n_kv, heads if self.per_head else 1)
        return table if self.per_head else table[0]

    def draws(self, n_q: int, n_kv: int, heads: int) -> list[Any]:
        """For each head and row of blocks, the blocks of keys."""
        rng = random.Random(self.seed)
        every = range(blocks(n_kv, self.block))
        rows = range(blocks(n_q, self.block))
        return [[draw(rng, every, self.random) for _ in rows] for _ in range(heads)]


@functools.lru_cache(maxsize=64)
def drawn(pattern: Any, device: str, n_q: int, n_kv: int, heads: int) -> Any:
    """``pattern.draws(...)`` as an int32 tensor, made once: whoever reads it must not change it."""
    import torch

    return torch.tensor(pattern.draws(n_q, n_kv, heads), dtype=torch.int32, device=device)


def draw(rng: random.Random, among: Sequence[int], count: int) -> list[int]:
    """``count`` different blocks in order."""
    return sorted(rng.sample(among, count))


def chosen(lookup: Callable[[sympy.Integer], sympy.Expr], pattern: Any) -> sympy.Basic:
    """The block of the key is the one in some slot of the table."""
    column = FloorDiv(KV, pattern.block)
    slots = map(sympy.Integer, range(pattern.random))
    return sympy.Or(*(sympy.Eq(column, lookup(slot)) for slot in slots))
