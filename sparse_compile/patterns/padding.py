"""Padding: the tokens that each batch entry really has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import KV, N_KV, B
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import bad, choice, store
from sparse_compile.patterns.data import (
    HoldsData,
    dtype_of,
    frozen,
    key_of,
    on_device,
    shape_of,
    values_now,
)


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

    lengths: Any
    side: str = "right"

    def __post_init__(self) -> None:
        choice("Padding: side", self.side, ("right", "left"))
        lengths = frozen("Padding: lengths", self.lengths)
        shape = shape_of("Padding: lengths", lengths)
        if len(shape) != 1:
            raise bad(
                f"Padding: lengths has the sizes {list(shape)}",
                "Write one length for each batch entry, as in Padding(mask.sum(-1)).",
            )
        store(self, lengths=lengths)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be one length for each batch entry, between none and all keys."""
        (count,) = shape_of("Padding: lengths", self.lengths)
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
        dtype = dtype_of(self.lengths)
        key = "each", key_of(self.lengths)
        length = tables.add(key, dtype, on_device(self.lengths, dtype))(B)
        return sympy.Lt(KV, length) if self.side == "right" else sympy.Ge(KV, N_KV - length)
