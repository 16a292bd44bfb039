"""PrefixLM: causal after a prefix that everyone sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import KV, B
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import UPPER_LEFT, alignment, bad, position, store, whole
from sparse_compile.patterns.data import (
    HoldsData,
    dtype_of,
    frozen,
    is_tensor,
    key_of,
    on_device,
    shape_of,
)


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

    prefix: Any
    align: str = UPPER_LEFT

    def __post_init__(self) -> None:
        alignment("PrefixLM", self.align)
        prefix = self.prefix
        if is_tensor(prefix) or hasattr(prefix, "tolist") or isinstance(prefix, (tuple, list)):
            prefix = frozen("PrefixLM: prefix", prefix)
        else:
            prefix = whole("PrefixLM: prefix", prefix, 0)
        shape = shape_of("PrefixLM: prefix", prefix)
        if len(shape) > 1 or (not shape and is_tensor(prefix)):
            raise bad(
                f"PrefixLM: prefix has the sizes {list(shape)}",
                "Write an int, or one length for each batch entry.",
            )
        store(self, prefix=prefix)

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """There must be one length for each batch entry."""
        shape = shape_of("PrefixLM: prefix", self.prefix)
        if shape and shape != (batch,):
            raise bad(
                f"PrefixLM: {shape[0]} prefix lengths for a batch of {batch}",
                f"Write {batch} lengths, or an int for all.",
            )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """``kv < prefix`` or ``kv <= q``."""
        prefix = self.prefix
        if not isinstance(prefix, int):
            dtype = dtype_of(prefix)
            prefix = tables.add(("each", key_of(prefix)), dtype, on_device(prefix, dtype))(B)
        return sympy.Or(sympy.Lt(KV, prefix), sympy.Le(KV, position(self.align)))
