"""Padding: the tokens that each batch entry really has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import sympy

from sparse_compile.expr.nodes import KV, N_KV, B
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import bad, one_of
from sparse_compile.patterns.data import HoldsData, frozen, shape_of, values_now


def _checked_lengths(where: str, lengths: Any) -> Any:
    instead = "Write one length for each batch entry, as in Padding(mask.sum(-1))."
    return frozen(where, lengths, (1,), instead)


@dataclass(frozen=True, repr=False, eq=False)
class Padding(HoldsData, Pattern):
    """Keys that are padding are not attended to.

    Args:
        lengths: how many keys of each batch entry are real; a tensor or tuple.
        side: where the padding is, ``"right"`` or ``"left"`` of them.

    >>> Padding((2, 3)).dense(1, 4, batch=2).int().tolist()
    [[[[1, 1, 0, 0]]], [[[1, 1, 1, 0]]]]
    >>> Padding((2, 3), side="left").dense(1, 4, batch=2).int().tolist()
    [[[[0, 0, 1, 1]]], [[[0, 1, 1, 1]]]]
    """

    lengths: Annotated[Any, _checked_lengths]
    side: Annotated[str, one_of("right", "left")] = "right"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be one length for each batch entry, between none and all keys."""
        (count,) = shape_of(self.lengths)
        if count != batch:
            raise bad(f"Padding: {count} lengths for a batch of {batch}", f"Write {batch} lengths.")
        for length in values_now(self.lengths) or ():
            if not 0 <= length <= n_kv:
                raise bad(
                    f"Padding: a length of {length}, but there are {n_kv} keys",
                    f"Write lengths from 0 to {n_kv}.",
                )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv < lengths[b]``, or ``kv >= n_kv - lengths[b]`` with the padding on the left."""
        length = tables.holding(self.lengths)(B)
        return sympy.Lt(KV, length) if self.side == "right" else sympy.Ge(KV, N_KV - length)
