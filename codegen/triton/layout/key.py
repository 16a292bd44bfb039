"""Key: what a module of kernels that list blocks is generated for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from sparse_compile.codegen.triton.layout.printed import INT32_MAX, INT32_MIN, variable
from sparse_compile.expr import FloorDiv, FloorMod, MaskExpr
from sparse_compile.expr.digits import digit_names
from sparse_compile.layout.intervals import Span, point
from sparse_compile.spec.view import Order

#: Longest sequence, largest batch, most heads.
LONGEST = 1 << 26
#: Blocks that are looked at together first.
SPAN = 128


@dataclass(frozen=True)
class Key:
    """What a module is generated for; hashable.

    Attributes:
        text: the mask, as :attr:`MaskExpr.text`.
        q, kv: the orders.
        fixed: the value of each size that is a constant of the module, None for the others.
        span: blocks that are looked at together first.
    """

    text: str
    q: Order
    kv: Order
    fixed: tuple[int | None, ...] = ()
    span: int = SPAN

    @property
    def mask(self) -> MaskExpr:
        """The predicate."""
        return MaskExpr.parse(self.text)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from others, for names of files; without ``span``."""
        return self.text, self.q.fields, self.kv.fields, self.fixed

    @property
    def sizes(self) -> list[str]:
        """The sizes that are parameters."""
        return list(self.values(self.fixed))

    def values(self, sizes: Sequence[Any]) -> dict[str, Any]:
        """The values of the sizes that are parameters, by name."""
        return {f"s{i}": sizes[i] for i, value in enumerate(self.fixed) if value is None}

    @staticmethod
    def of(
        mask: MaskExpr, sizes: Sequence[int], q: Order, kv: Order, span: int | None = None
    ) -> Key:
        """The key of a call: its lengths, and most sizes, are parameters of the kernels."""
        constant = constant_sizes(mask.text)
        fixed = tuple(
            size if i in constant or not INT32_MIN <= size <= INT32_MAX else None
            for i, size in enumerate(sizes)
        )
        return Key(mask.text, q, kv, fixed, span or SPAN)

    def order(self, axis: str) -> Order:
        """The order of the side ``"q"`` or ``"kv"``."""
        return self.q if axis == "q" else self.kv

    def ends(self, axis: str) -> list[str]:
        """The bounds of the digits of a side, by the names that kernels give them."""
        names = digit_names(axis, len(self.order(axis).box))
        return [f"{name}_{end}" for name in names for end in ("lo", "hi")]

    def scalars(self) -> dict[str, Span]:
        """The spans of ``n_q``, ``n_kv`` and the sizes."""

        def parameter(name: str, low: int, high: int) -> Span:
            return point(variable(name, low, high), max(-low, high))

        found = {name: parameter(name, 1, LONGEST) for name in ("n_q", "n_kv")}
        for i, value in enumerate(self.fixed):
            name = f"s{i}"
            found[name] = parameter(name, INT32_MIN, INT32_MAX) if value is None else point(value)
        return found


@functools.lru_cache(maxsize=1024)
def constant_sizes(text: str) -> frozenset[int]:
    """The sizes that divide or multiply: the analysis of steps needs their values."""
    mask = MaskExpr.parse(text)
    found: set[int] = set()
    for node in sympy.preorder_traversal(mask.predicate):
        if isinstance(node, (FloorDiv, FloorMod)):
            scaling: Sequence[sympy.Basic] = node.args[1:]
        elif isinstance(node, (sympy.Mul, sympy.Pow)):
            # By a number, such as the -1 of a difference, is no scaling.
            varying = [arg for arg in node.args if arg.free_symbols]
            scaling = varying if len(varying) > 1 or isinstance(node, sympy.Pow) else ()
        else:
            continue
        names = {symbol.name for arg in scaling for symbol in arg.free_symbols}
        found |= {i for i in range(mask.n_sizes) if f"s{i}" in names}
    return frozenset(found)


def digest(described: str) -> str:
    """What names of generated modules end in."""
    return hashlib.sha256(described.encode()).hexdigest()[:12]
