"""Patterns made of whole blocks: BlockLocal, BlockSparse, Random, BigBird."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import KV, B, FloorDiv, H, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import (
    UPPER_LEFT,
    Align,
    Count,
    Flag,
    Positive,
    bad,
    blocks,
    position,
    store,
    whole,
)
from sparse_compile.patterns.data import HoldsData, along, frozen, shape_of


@dataclass(frozen=True, repr=False)
class BlockLocal(Pattern):
    """Each block of tokens attends to one block: itself, or the one that a permutation names.

    From BlockBERT (Qiu et al. 2020, https://arxiv.org/abs/1911.02972), where the heads of a layer
    use different permutations.

    Args:
        size: tokens per block.
        permutation: block ``i`` of the queries attends to block ``permutation[i]`` of the keys;
            without one, to block ``i``.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> BlockLocal(2).dense(4, 4).int().tolist()
    [[[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]]
    >>> BlockLocal(2, permutation=(1, 0)).dense(4, 4).int().tolist()
    [[[[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]]]
    """

    size: Positive
    permutation: tuple[int, ...] | None = None
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.permutation is None:
            return
        order = tuple(whole("BlockLocal: a block", item, 0) for item in self.permutation)
        if sorted(order) != list(range(len(order))):
            raise bad(
                f"BlockLocal: {order} is no permutation",
                f"Write every number from 0 to {len(order) - 1} once.",
            )
        store(self, permutation=order)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """A permutation must name every block."""
        if self.permutation is None:
            return
        count = len(self.permutation)
        for length, name in ((n_q, "queries"), (n_kv, "keys")):
            if blocks(length, self.size) != count:
                raise bad(
                    f"BlockLocal: a permutation of {count} blocks of {self.size} tokens does not "
                    f"fit {length} {name}",
                    f"{length} {name} are {blocks(length, self.size)} such blocks.",
                )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv // size == q // size``, or one such term for each block."""
        row, column = FloorDiv(position(self.align), self.size), FloorDiv(KV, self.size)
        if self.permutation is None:
            return sympy.Eq(column, row)
        terms = enumerate(self.permutation)
        return sympy.Or(*(sympy.And(sympy.Eq(row, i), sympy.Eq(column, j)) for i, j in terms))


@dataclass(frozen=True, repr=False, eq=False, init=False)
class BlockSparse(HoldsData, Pattern):
    """The blocks that a table says: query block i attends to key block j where it is not zero.

    Args:
        layout: ``[blocks of queries, blocks of keys]``, with ``[heads]`` or ``[batch, heads]``
            before it; a tensor or nested tuples of bools or integers. A leading size of 1 stands
            for all.
        block: tokens per block; a pair for those of the queries and of the keys.

    >>> BlockSparse(((1, 0), (1, 1)), 2).dense(3, 4).int().tolist()
    [[[[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]]]
    """

    # Not `layout`: that is what every pattern can be asked for.
    layout_: Any
    block: int | tuple[int, int]

    def __init__(self, layout: Any, block: int | tuple[int, int]) -> None:
        instead = "Write [query blocks, key blocks], with [heads] or [batch, heads] before it."
        layout = frozen("BlockSparse: layout", layout, (2, 3, 4), instead, least=1)
        both = block if isinstance(block, (tuple, list)) else (block, block)
        if len(both) != 2:
            raise bad(f"BlockSparse: block is {block!r}", "Write one size or a pair of them.")
        sizes = tuple(whole("BlockSparse: block", size, 1) for size in both)
        store(self, layout_=layout, block=sizes[0] if sizes[0] == sizes[1] else sizes)

    @property
    def sizes(self) -> tuple[int, int]:
        """Queries and keys per block."""
        return self.block if isinstance(self.block, tuple) else (self.block, self.block)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """The layout must cover the lengths exactly, and match batch and heads."""
        shape = shape_of(self.layout_)
        wanted = [blocks(n, size) for n, size in zip((n_q, n_kv), self.sizes, strict=True)]
        leading = [batch, heads][4 - len(shape) :]
        fits = all(size in (1, n) for size, n in zip(shape[:-2], leading, strict=True))
        if list(shape[-2:]) != wanted or not fits:
            raise bad(
                f"BlockSparse: a layout of {list(shape)} in blocks of {self.block} does not fit "
                f"{n_q} queries and {n_kv} keys (batch {batch}, {heads} heads)",
                f"Write a layout of {[*leading, *wanted]}.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``layout[q // block, kv // block] != 0``."""
        shape, lookup = shape_of(self.layout_), tables.holding(self.layout_, "bool")
        leading = zip((B, H)[4 - len(shape) :], shape[:-2], strict=True)
        index = [along(coordinate, size) for coordinate, size in leading]
        size_q, size_kv = self.sizes
        return sympy.Ne(lookup(*index, FloorDiv(Q, size_q), FloorDiv(KV, size_kv)), 0)


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
        lookup = tables.add(self, "int32", self._table, fixed=True)
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


@dataclass(frozen=True, repr=False)
class BigBird(Pattern):
    """The pattern of BigBird: window, global and random attention, all in blocks.

    Zaheer et al. 2020, https://arxiv.org/abs/2007.14062 (the internal transformer construction).
    The global blocks are the first ones. The random blocks of a block of queries are outside its
    window and not global, so that each adds something; they depend on the seed and the lengths.

    Args:
        block: tokens per block, of queries and of keys.
        random: random blocks of keys for each block of queries.
        global_: how many blocks at the start see, and are seen by, all.
        window: the width of the window in blocks, the query's own among them; odd.
        seed: of the random choice.

    >>> BigBird(block=2, random=1, global_=1, window=3).dense(16, 16).sum(-1)[0, 0].tolist()
    [16, 16, 8, 8, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 8, 8]
    """

    block: Positive
    random: Count
    global_: Count
    window: Positive
    seed: Count = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window % 2 == 0:
            raise bad(
                f"BigBird: window is {self.window} blocks, but the query's own is in the middle",
                f"Write an odd number, such as {self.window + 1}.",
            )

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be room for the random blocks outside window and global blocks."""
        columns = blocks(n_kv, self.block)
        if self.global_ > columns:
            raise bad(
                f"BigBird: {self.global_} global blocks of the {columns} that {n_kv} keys make",
                f"Write global_={columns} or fewer, or smaller blocks.",
            )
        row, free = _first_without_room(self, n_q, n_kv)
        if free < self.random:
            raise bad(
                f"BigBird: {self.random} random blocks, but of the {columns} blocks that {n_kv} "
                f"keys make only {free} are neither global nor in the window of block {row}",
                f"Write random={free} or fewer, or smaller blocks.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """In the window, or global, or chosen."""
        row, column = FloorDiv(Q, self.block), FloorDiv(KV, self.block)
        half, tokens = self.window // 2, self.global_ * self.block
        near = sympy.Eq(column, row)
        if half:
            near = sympy.And(sympy.Le(row - column, half), sympy.Le(column - row, half))
        terms = [near]
        if tokens:
            terms += [sympy.Lt(Q, tokens), sympy.Lt(KV, tokens)]
        if self.random:
            lookup = tables.add(self, "int32", self._table, fixed=True)
            terms.append(chosen(lambda slot: lookup(row, slot), self))
        return sympy.Or(*terms)

    def _local_rows(self, n_q: int) -> range:
        """Blocks of queries that are not global."""
        return range(self.global_, blocks(n_q, self.block))

    def _free(self, row: int, columns: int) -> list[int]:
        """Blocks of keys that ``row`` does not see anyway."""
        half = self.window // 2
        before = range(self.global_, min(row - half, columns))
        after = range(max(row + half + 1, self.global_), columns)
        return [*before, *after]

    def _table(self, device: Any, n_q: int, n_kv: int, batch: int, heads: int) -> Any:
        return drawn(self, str(device), n_q, n_kv, 1)[0]

    def draws(self, n_q: int, n_kv: int, heads: int) -> list[Any]:
        """For each head and row of blocks, the blocks of keys."""
        rng, columns = random.Random(self.seed), blocks(n_kv, self.block)
        # Global rows see everything, so what they choose is of no matter.
        choice = [[0] * self.random for _ in range(min(self.global_, blocks(n_q, self.block)))]
        choice += [
            draw(rng, self._free(row, columns), self.random) for row in self._local_rows(n_q)
        ]
        return [choice] * heads


@functools.lru_cache(maxsize=256)
def _first_without_room(pattern: BigBird, n_q: int, n_kv: int) -> tuple[int, int]:
    """The first row of blocks with too few blocks to choose from, and how many it has.

    The last row if all have enough. Every call checks, so it is looked up.
    """
    columns, row, free = blocks(n_kv, pattern.block), 0, pattern.random
    for row in pattern._local_rows(n_q):
        free = len(pattern._free(row, columns))
        if free < pattern.random:
            break
    return row, free
