"""Selecting: the base of patterns whose keys are chosen by content, or given as indices."""

from __future__ import annotations

from typing import Any

import sympy

from sparse_compile.errors import PatternMisuse
from sparse_compile.patterns.base import Pattern, Tables


class Selecting(Pattern):
    """A pattern that selects units of keys for units of queries, from q and k or by index.

    It combines with others by ``&`` and ``|``. What it selects is known when q and k are, so it has
    no predicate over positions: :func:`sparse_compile.attention` splits a mask into what is static
    and what is selected. No gradient flows through the choice.

    Attributes:
        unit_q, unit_kv: consecutive queries, and keys, that are selected together.
    """

    unit_q: int
    unit_kv: int

    def predicate(self, tables: Tables) -> sympy.Basic:
        """There is none before q and k are known."""
        raise PatternMisuse(
            f"sparse_compile: {self!r} selects keys by content, so it has no mask before q and k "
            "are known. Pass it to sparse_compile.attention(q, k, v, mask=...), or attach it with "
            "sparse_compile.mask."
        )

    def select(self, q: Any, k: Any, mask: Any, tables: Any, sizes: Any) -> Any:
        """What it selects, as a :class:`sparse_compile.selection.Selection` of new tensors.

        It is called while graphs run, with autocast off, and must not wait for the device.

        Args:
            q: [B, Hq, Nq, D].
            k: [B, Hkv, Nkv, D].
            mask: the :class:`MaskExpr` of who may attend to whom, without what the static part of
                the whole mask allows anyway; a unit that it hides entirely is not selected.
            tables, sizes: what the mask reads.
        """
        raise NotImplementedError
