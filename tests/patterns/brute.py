"""Masks by definition: one Python call for each entry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sparse_compile.expr import MaskExpr
from sparse_compile.patterns import Pattern
from sparse_compile.patterns.base import BoundMask

Rule = Callable[[int, int, int, int], bool]


def brute(rule: Rule, n_q: int, n_kv: int, batch: int = 1, heads: int = 1) -> np.ndarray:
    """bool [batch, heads, n_q, n_kv]; ``rule(b, h, q, kv)`` decides."""
    at = np.ndindex(batch, heads, n_q, n_kv)
    flat = [bool(rule(*map(int, where))) for where in at]
    return np.array(flat).reshape(batch, heads, n_q, n_kv)


def spread(pattern: Pattern, n_q: int, n_kv: int, batch: int = 1, heads: int = 1) -> np.ndarray:
    """The dense mask with every batch entry and head."""
    mask = pattern.dense(n_q, n_kv, batch, heads).numpy()
    return np.broadcast_to(mask, (batch, heads, n_q, n_kv))


def assert_means(
    pattern: Pattern, rule: Rule, n_q: int, n_kv: int, batch: int = 1, heads: int = 1
) -> None:
    """The pattern is the rule, and so is its predicate after it was spelled and read back."""
    expected = brute(rule, n_q, n_kv, batch, heads)
    assert (spread(pattern, n_q, n_kv, batch, heads) == expected).all(), pattern
    assert (spread(Reread(pattern), n_q, n_kv, batch, heads) == expected).all(), pattern


class Reread(Pattern):
    """A pattern whose predicate went through its text."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern

    def bound(self) -> BoundMask:
        bound = self.pattern.bound()
        return BoundMask(MaskExpr.parse(bound.expr.text), bound.makers)
