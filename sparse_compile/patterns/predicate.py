"""Predicate: a mask function of FlexAttention as a pattern."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.expr.nodes import COORDINATES, KV, B, H, Q
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.patterns.checks import bad
from sparse_compile.patterns.data import same
from sparse_compile.patterns.symbolic import Reads, symbolic_call
from sparse_compile.patterns.symbolic_ops import is_truth


@dataclass(frozen=True, repr=False)
class Predicate(Pattern):
    """Attention where a function of the coordinates says so, as FlexAttention's ``mask_mod`` does.

    The function is never run on numbers: it is called once with symbols, and what it does to them
    is the mask. So it may compute ``+ - * // %``, compare, combine by ``& | ~`` and
    ``torch.where``, and index tensors of integers or bools by the coordinates; but no ``if`` or
    ``and`` can depend on them. The tensors are read when attention runs, so they may change.

    Two predicates are equal when their functions are the same object.

    Args:
        fn: ``fn(b, h, q, kv)``, true where query ``q`` may attend to key ``kv``.
        name: how it prints; the name of the function unless given.

    >>> Predicate(lambda b, h, q, kv: (kv <= q) & (kv % 2 == 0)).dense(4, 4).int().tolist()
    [[[[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]]]]
    """

    fn: Callable[[Any, Any, Any, Any], Any]
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.fn, Pattern) or not callable(self.fn):
            raise bad(f"Predicate({self.fn!r}) is no function", "Pass one of (b, h, q, kv).")

    def __repr__(self) -> str:
        called = self.name or getattr(self.fn, "__name__", None) or repr(self.fn)
        return f"Predicate({called})"

    def check(self, n_q: int, n_kv: int, batch: int, heads: int) -> None:
        """Tensors must reach as far as the coordinates that index them."""
        _, reads = self._traced(Tables())
        lengths = {B: batch, H: heads, Q: n_q, KV: n_kv}
        for tensor, index in reads.seen:
            for size, place in zip(tensor.shape, index, strict=True):
                if place in lengths and size < lengths[place]:
                    raise bad(
                        f"{self!r} reads a tensor of {list(tensor.shape)} at {place}, which goes "
                        f"up to {lengths[place] - 1}",
                        "Pass a tensor of that size.",
                    )

    def predicate(self, tables: Tables) -> sympy.Basic:
        """What the function returns for symbols; the same each time, or it is no mask."""
        first, reads = self._traced(Tables())
        second, again = self._traced(Tables())
        if first != second:
            raise bad(
                f"{self!r} says {first} and, called again, {second}",
                "A mask function must depend on its arguments only.",
            )
        # Tensors that the function makes itself are others each time, but must hold the same.
        pairs = zip(reads.seen, again.seen, strict=True)
        if not all(same(one, other) for (one, _), (other, _) in pairs):
            raise bad(
                f"{self!r} makes a tensor that differs from call to call",
                "Make it outside, and let the function only read it.",
            )
        if not is_truth(first):
            raise bad(
                f"{self!r} returns {first}, which is neither true nor false",
                "Return a comparison, such as != 0.",
            )
        return self._traced(tables)[0]

    def _traced(self, tables: Tables) -> tuple[Any, Reads]:
        return symbolic_call(self.fn, COORDINATES, tables)
