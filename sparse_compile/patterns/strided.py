"""Strided and Fixed: the two factorised patterns of the Sparse Transformer.

Child et al. 2019, https://arxiv.org/abs/1904.10509.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, FloorMod
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import (
    UPPER_LEFT,
    Align,
    Flag,
    Positive,
    bad,
    optional,
    position,
    store,
    whole_from,
)
from sparse_compile.patterns.local import within


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """The last ``local`` tokens and, before them, every ``stride``-th token.

    The strided attention of the Sparse Transformer, both of its factors merged.

    Args:
        stride: a key is seen when its distance is a multiple of this.
        local: a key is seen when its distance is less than this; ``stride`` unless given.
        causal: only keys up to the query; otherwise distances count in both directions.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> Strided(3).dense(7, 7)[0, 0, 6].int().tolist()
    [1, 0, 0, 1, 1, 1, 1]
    >>> Strided(3, local=1).dense(7, 7)[0, 0, 6].int().tolist()
    [1, 0, 0, 1, 0, 0, 1]
    """

    stride: Positive
    local: Annotated[int | None, optional(whole_from(1))] = None
    causal: Flag = True
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        store(self, local=self.stride if self.local is None else self.local)

    def implied(self) -> dict[str, Any]:
        """The local part reaches as far as one stride."""
        return {"local": self.stride}

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``q - kv < local`` or ``(q - kv) % stride == 0``."""
        assert self.local is not None
        place, reach = position(self.align), self.local - 1
        strided = sympy.Eq(FloorMod(place - KV, self.stride), 0)
        if not self.causal:
            return sympy.Or(within(place, reach, reach), strided)
        return sympy.Or(within(place, reach, 0), sympy.And(sympy.Le(KV, place), strided))


@dataclass(frozen=True, repr=False)
class Fixed(Pattern):
    """The query's own block, and the last ``summary`` tokens of every block.

    The fixed attention of the Sparse Transformer, both of its factors merged.

    Args:
        block: tokens per block; the stride of the paper.
        summary: how many tokens at the end of a block all later tokens see; the paper's c.
        causal: only keys up to the query.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> Fixed(3, 1).dense(7, 7)[0, 0, 6].int().tolist()
    [0, 0, 1, 0, 0, 1, 1]
    """

    block: Positive
    summary: Positive
    causal: Flag = True
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.summary > self.block:
            raise bad(
                f"Fixed: summary is {self.summary} tokens of a block of {self.block}",
                f"Write {self.block} or fewer.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv // block == q // block`` or ``kv % block >= block - summary``."""
        place = position(self.align)
        own = sympy.Eq(FloorDiv(KV, self.block), FloorDiv(place, self.block))
        summaries = sympy.Ge(FloorMod(KV, self.block), self.block - self.summary)
        seen = sympy.Or(own, summaries)
        return sympy.And(sympy.Le(KV, place), seen) if self.causal else seen
