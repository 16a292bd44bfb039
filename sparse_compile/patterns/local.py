"""Patterns of the distance between query and key: windows, gaps, strides and the ends of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, FloorDiv, FloorMod
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import (
    UPPER_LEFT,
    Align,
    Count,
    Flag,
    Positive,
    bad,
    optional,
    position,
    store,
    whole_from,
)


def within(place: sympy.Expr, left: int, right: int) -> sympy.Basic:
    """Keys from ``left`` before ``place`` to ``right`` after it."""
    if left == right == 0:
        return sympy.Eq(KV, place)
    before = sympy.Le(place - KV, left) if left else sympy.Le(place, KV)
    after = sympy.Le(KV - place, right) if right else sympy.Le(KV, place)
    return sympy.And(before, after)


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """A query attends to itself and to what came before.

    Args:
        align: with fewer queries than keys, ``"upper_left"`` makes query 0 see key 0 only, as
            ``is_causal`` of PyTorch does; ``"lower_right"`` makes the last query see the last key,
            as decoding with a cache needs.

    >>> Causal().dense(2, 3).int().tolist()
    [[[[1, 0, 0], [1, 1, 0]]]]
    >>> Causal("lower_right").dense(2, 3).int().tolist()
    [[[[1, 1, 0], [1, 1, 1]]]]
    """

    align: Align = UPPER_LEFT

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv <= q``."""
        return sympy.Le(KV, position(self.align))


@dataclass(frozen=True, repr=False)
class SlidingWindow(Pattern):
    """A query attends to the keys near it: ``q - left <= kv <= q + right``.

    A causal window of 1024 tokens, the query's own among them, is ``SlidingWindow(1023, 0)``.

    Args:
        left: how many tokens back.
        right: how many tokens ahead; as many as back, unless given.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> SlidingWindow(1).dense(3, 4).int().tolist()
    [[[[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]]]
    """

    left: Count
    right: Annotated[int | None, optional(whole_from(0))] = None
    align: Align = UPPER_LEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        right = self.left if self.right is None else self.right
        if self.left == right == 0:
            raise bad(
                "SlidingWindow of zero tokens left and right",
                "Count the other tokens that a query sees, as in SlidingWindow(127, 0).",
            )
        store(self, right=right)

    def implied(self) -> dict[str, Any]:
        """The window is symmetric unless it says otherwise."""
        return {"right": self.left}

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``q - kv <= left`` and ``kv - q <= right``."""
        assert self.right is not None
        return within(position(self.align), self.left, self.right)


@dataclass(frozen=True, repr=False)
class Dilated(Pattern):
    """A sliding window with gaps: every ``dilation``-th key, ``window`` of them on each side.

    From Longformer (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150).

    Args:
        window: how many keys on each side, the query's own not counted.
        dilation: the distance between neighbouring keys; 1 is a sliding window.
        causal: only keys up to the query.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> Dilated(1, 2).dense(4, 4).int().tolist()
    [[[[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]]]
    """

    window: Positive
    dilation: Positive
    causal: Flag = False
    align: Align = UPPER_LEFT

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``(q - kv) % dilation == 0`` within ``window * dilation`` tokens."""
        place, reach = position(self.align), self.window * self.dilation
        near = within(place, reach, 0 if self.causal else reach)
        return sympy.And(near, sympy.Eq(FloorMod(place - KV, self.dilation), 0))


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
