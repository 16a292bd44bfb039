"""BlockLocal and BlockSparse: patterns made of whole blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import KV, B, FloorDiv, H, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import (
    UPPER_LEFT,
    Align,
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
        if isinstance(block, (tuple, list)):
            if len(block) != 2:
                raise bad(f"BlockSparse: block is {block!r}", "Write one size or a pair of them.")
            sizes = tuple(whole("BlockSparse: block", size, 1) for size in block)
            store(self, layout_=layout, block=sizes[0] if sizes[0] == sizes[1] else sizes)
        else:
            store(self, layout_=layout, block=whole("BlockSparse: block", block, 1))

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
