"""Causal, SlidingWindow, Dilated: patterns of the distance between query and key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, FloorMod
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
