"""PrefixLM: causal after a prefix that everyone sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, B
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import UPPER_LEFT, Align, bad, position, whole
from sparse_compile.patterns.data import HoldsData, frozen, shape_of


def _checked_prefix(where: str, prefix: Any) -> Any:
    if not hasattr(prefix, "__len__"):
        return whole(where, prefix, 0)
    return frozen(where, prefix, (1,), "Write an int, or one length for each batch entry.")


@dataclass(frozen=True, repr=False, eq=False)
class PrefixLM(HoldsData, Pattern):
    """All tokens attend to the prefix; the rest is causal.

    Raffel et al. 2020, https://arxiv.org/abs/1910.10683.

    Args:
        prefix: its length: an int, or one for each batch entry as a tensor or tuple.
        align: the corner in which the diagonal starts, see :class:`Causal`.

    >>> PrefixLM(2).dense(3, 3).int().tolist()
    [[[[1, 1, 0], [1, 1, 0], [1, 1, 1]]]]
    """

    prefix: Annotated[Any, _checked_prefix]
    align: Align = UPPER_LEFT

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be one length for each batch entry."""
        shape = shape_of(self.prefix)
        if shape and shape != (batch,):
            raise bad(
                f"PrefixLM: {shape[0]} prefix lengths for a batch of {batch}",
                f"Write {batch} lengths, or an int for all.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv < prefix`` or ``kv <= q``."""
        prefix = self.prefix
        if not isinstance(prefix, int):
            prefix = tables.holding(prefix)(B)
        return sympy.Or(sympy.Lt(KV, prefix), sympy.Le(KV, position(self.align)))
