"""Predicates as people write them: ``kv <= q and q - kv < 256``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sympy

from sparse_compile.expr.fold import COMPARISONS, fold

_OR, _AND, _NOT, _COMPARE, _BITS, _SUM, _PRODUCT, _ATOM = range(8)
_INFIX = {"//": _PRODUCT, "%": _PRODUCT, **dict.fromkeys(COMPARISONS, _COMPARE)}


@dataclass(frozen=True)
class _Text:
    """A piece of an expression and how tightly it binds."""

    text: str
    binds: int = _ATOM

    def within(self, binds: int) -> str:
        """The text, in parentheses where it binds no tighter than its surroundings."""
        return self.text if self.binds > binds else f"({self.text})"


class _Infix:
    """The algebra whose values are infix text."""

    def integer(self, value: int) -> _Text:
        return _Text(str(value), _ATOM if value >= 0 else _SUM)

    def boolean(self, value: bool) -> _Text:
        return _Text("true" if value else "false")

    def symbol(self, name: str) -> _Text:
        return _Text(name)

    def table(self, index: int, args: Sequence[_Text], exprs: Sequence[sympy.Expr]) -> _Text:
        return _Text(f"t{index}[{', '.join(arg.text for arg in args)}]")

    def operation(self, name: str, args: Sequence[_Text], expr: sympy.Basic) -> _Text:
        if name in _SPELLED:
            return _SPELLED[name](args)
        if name in _INFIX:
            binds = _INFIX[name]
            return _Text(f" {name} ".join(arg.within(binds) for arg in args), binds)
        return _Text(f"{name}({', '.join(arg.text for arg in args)})")


def _sum(args: Sequence[_Text]) -> _Text:
    terms = [arg.text if _is_number(arg) else arg.within(_SUM) for arg in args]
    first, *rest = sorted(terms, key=lambda t: (t.lstrip("-").isdigit(), t.startswith("-")))
    signed = (f" - {t[1:]}" if t.startswith("-") else f" + {t}" for t in rest)
    return _Text(first + "".join(signed), _SUM)


def _product(args: Sequence[_Text]) -> _Text:
    negative = sum(_is_number(arg) and arg.text.startswith("-") for arg in args) % 2
    sizes = [_Text(arg.text.lstrip("-")) if _is_number(arg) else arg for arg in args]
    factors = [arg for arg in sizes if arg.text != "1"] or sizes[:1]
    text = " * ".join(arg.within(_SUM if len(factors) == 1 else _PRODUCT) for arg in factors)
    return _Text(f"-{text}" if negative else text, _PRODUCT)


def _bit(args: Sequence[_Text]) -> _Text:
    word, index = args
    return _Text(f"{word.within(_BITS)} >> {index.within(_BITS)} & 1", _BITS)


def _and(args: Sequence[_Text]) -> _Text:
    return _Text(" and ".join(_in_order(arg.within(_AND) for arg in args)), _AND)


def _or(args: Sequence[_Text]) -> _Text:
    return _Text(" or ".join(_in_order(arg.within(_AND) for arg in args)), _OR)


def _not(args: Sequence[_Text]) -> _Text:
    return _Text(f"not {args[0].within(_NOT)}", _NOT)


_SPELLED: dict[str, Callable[[Sequence[_Text]], _Text]] = {
    "+": _sum,
    "*": _product,
    "bit": _bit,
    "and": _and,
    "or": _or,
    "not": _not,
}


def _in_order(terms: Iterable[str]) -> list[str]:
    return sorted(terms, key=lambda term: (len(term), term))


def _is_number(piece: _Text) -> bool:
    return piece.text.lstrip("-").isdigit()


def readable(predicate: sympy.Basic) -> str:
    """A predicate in infix notation, tables indexed with brackets.

    >>> from sparse_compile.expr import B, KV, Q, table
    >>> readable((KV <= Q) & (Q - KV < 256))
    'kv <= q and q - kv < 256'
    >>> readable((KV < 4) | ((KV <= Q) & sympy.Ne(table(0)(B, KV), 0)))
    'kv < 4 or (kv <= q and t0[b, kv] != 0)'
    """
    return fold(predicate, _Infix()).text
