"""Expressions as Triton source: lookups and shared terms named once, outside the loop if possible.

Coordinates broadcast: with ``q`` of shape [M, 1] and ``kv`` of shape [1, N] (or transposed) the
same text gives an [M, N] tile.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import sympy

from sparse_compile.codegen.triton.text.common import HELPERS
from sparse_compile.expr import KV, MaskExpr, Q, fold, fold_real
from sparse_compile.expr.fold import COMPARISONS, FUNCTIONS, RECIPROCAL

# Python's precedence of the operators used, loosest first.
_COMPARE, _OR, _AND, _ADD, _MUL, _UNARY, _ATOM = range(7)

# Signed bits a value needs. Lengths, batch and heads are checked at launch to fit COORDINATE_BITS.
COORDINATE_BITS = 26
_INT32_BITS, _INT64_BITS = 31, 63
#: Stands for the bits of a real number, which is in fp32 and stays there.
_REAL = -1


@dataclass(frozen=True)
class Term:
    """One node of a printed predicate.

    Attributes:
        pieces: alternating literal text and operands; a name replaces an operand's text.
        precedence: how tightly the text binds.
        axes: which of ``b``, ``q`` and ``kv`` it varies with.
        bits: signed magnitude in bits; more than 31 means the value is int64, _REAL that it is
            fp32.
        named: whether it deserves a line of its own: a lookup or a helper call.
        hint: what to call it, if named.
    """

    pieces: tuple[str | Term, ...]
    precedence: int = _ATOM
    axes: frozenset[str] = frozenset()
    bits: int = 0
    named: bool = False
    hint: str = ""

    def text(self, names: dict[Term, str] | None = None) -> str:
        """Source of this term, with named operands by name."""
        names = names or {}
        parts = (p if isinstance(p, str) else names.get(p) or p.text(names) for p in self.pieces)
        return "".join(parts)

    def operands(self) -> Iterator[Term]:
        """The terms it reads directly."""
        return (piece for piece in self.pieces if isinstance(piece, Term))


@dataclass(frozen=True)
class Printed:
    """A predicate as source lines.

    Attributes:
        before: assignments that belong before the loop.
        inside: assignments that belong in it.
        keep: expression for the whole predicate; empty when it is always true.
        helpers: which of ``floor_div``, ``floor_mod`` and ``table_offset`` the lines call.
    """

    before: tuple[str, ...]
    inside: tuple[str, ...]
    keep: str
    helpers: frozenset[str]

    def masking(self, *others: str) -> list[str]:
        """Lines that leave out of ``score`` what the predicate hides, or one of other conditions.

        >>> print_predicate(MaskExpr(KV <= Q), "kv").masking("there")
        ['keep = kv <= q', 'score = tl.where(keep & there, score, float("-inf"))']
        """
        keep = [f"keep = {self.keep}"] if self.keep else []
        kept = " & ".join([*(["keep"] if keep else []), *others])
        where = f'score = tl.where({kept}, score, float("-inf"))'
        return [*self.inside, *keep, where] if kept else []


def print_predicate(mask: MaskExpr, loop_axis: str) -> Printed:
    """Source of ``mask`` for a kernel that loops over ``loop_axis``: ``"q"``, ``"kv"``, ``"b"``.

    >>> from sparse_compile.expr import KV, Q
    >>> print_predicate(MaskExpr((KV <= Q) & (Q - KV < 8)), "kv").keep
    '(kv <= q) & (q - kv < 8)'
    """
    if mask.predicate == sympy.true:
        return Printed((), (), "", frozenset())
    root = fold(mask.predicate, _Printer(mask.tables))
    if not root.axes and root.precedence == _ATOM and root.text() == "False":
        root = Term(("kv < 0",), _COMPARE, frozenset({"kv"}))
    before, inside, names = named_terms((root,), loop_axis)
    keep = names.get(root, root.text(names))
    return Printed(before, inside, keep, helpers_in(*before, *inside, keep))


def named_terms(
    roots: Sequence[Term], loop_axis: str, hint: str = "x", taken: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...], dict[Term, str]]:
    """Assignments to the terms that deserve a name, before the loop and in it; and the names.

    Args:
        roots: what is printed; shared terms get a name.
        loop_axis: ``"q"`` or ``"kv"``.
        hint: what terms are called that have no name of their own.
        taken: names that mean something else.
    """
    every = list(dict.fromkeys(term for root in roots for term in subterms(root)))
    uses = Counter(term for node in every for term in node.operands())
    uses.update(roots)
    chosen = [t for t in every if t.named or (uses[t] > 1 and any(t.operands()))]
    names: dict[Term, str] = {}
    before: list[str] = []
    inside: list[str] = []
    for term in chosen:
        line = term.text(names)
        names[term] = _fresh(term.hint or hint, {*names.values(), *taken})
        (inside if loop_axis in term.axes else before).append(f"{names[term]} = {line}")
    return tuple(before), tuple(inside), names


def helpers_in(*lines: str) -> frozenset[str]:
    """Which functions of :data:`sparse_compile.codegen.triton.text.common.HELPERS` are called."""
    text = "\n".join(lines)
    return frozenset(name for name in HELPERS if re.search(rf"(?<![\w.]){name}\(", text))


def subterms(root: Term) -> list[Term]:
    """Every distinct term once, operands before the terms that read them."""
    order: dict[Term, None] = {}

    def visit(term: Term) -> None:
        if term not in order:
            for operand in term.operands():
                visit(operand)
            order[term] = None

    visit(root)
    return list(order)


def _fresh(hint: str, taken: Collection[str]) -> str:
    if hint not in taken and len(hint) > 1:
        return hint
    return next(f"{hint}_{i}" for i in range(len(taken) + 1) if f"{hint}_{i}" not in taken)


def _most(terms: Sequence[Term]) -> int:
    """The bits that hold any of these."""
    bits = [term.bits for term in terms]
    return _REAL if _REAL in bits else max(bits)


def _axes(terms: Sequence[Term]) -> frozenset[str]:
    return frozenset().union(*(term.axes for term in terms))


def _wrap(term: Term, precedence: int) -> tuple[str | Term, ...]:
    """The operand, in parentheses unless it binds at least as tightly as ``precedence``."""
    return (term,) if term.precedence >= precedence else ("(", term, ")")


def _join(op: str, terms: Sequence[Term], precedence: int) -> tuple[str | Term, ...]:
    pieces: list[str | Term] = []
    for term in terms:
        pieces += [op, *_wrap(term, precedence)] if pieces else _wrap(term, precedence)
    return tuple(pieces)


def _call(name: str, terms: Sequence[Term]) -> tuple[str | Term, ...]:
    return (f"{name}(", *_join(", ", terms, _COMPARE), ")")


class _Printer:
    """The algebra whose values are :class:`Term`."""

    def __init__(self, table_dtypes: Sequence[str]) -> None:
        self.table_dtypes = table_dtypes

    def integer(self, value: int) -> Term:
        return Term((str(value),), _ATOM if value >= 0 else _UNARY, bits=value.bit_length())

    def boolean(self, value: bool) -> Term:
        return Term((str(value),))

    def symbol(self, name: str) -> Term:
        axes = frozenset({name} & {"b", "q", "kv"})
        return Term((name,), axes=axes, bits=_INT32_BITS if name[0] == "s" else COORDINATE_BITS)

    def table(self, index: int, args: Sequence[Term], exprs: Sequence[sympy.Expr]) -> Term:
        dtype = self.table_dtypes[index]
        bits = {"bool": 1, "int32": _INT32_BITS, "int64": _INT64_BITS}[dtype]
        return _lookup(f"t{index}", args, exprs, bits, ".to(tl.int32)" if dtype == "bool" else "")

    def operation(self, name: str, args: Sequence[Term], expr: sympy.Basic) -> Term:
        if name in ("//", "%"):
            return _division(name, args, expr)
        if name in COMPARISONS:
            return Term(_join(f" {name} ", args, _OR), _COMPARE, _axes(args))
        return _OPERATIONS[name](args)


def _lookup(
    name: str, args: Sequence[Term], exprs: Sequence[sympy.Expr], bits: int, cast: str
) -> Term:
    """What a tensor holds at some indices, which are ``exprs``."""
    pieces: list[str | Term] = [f"tl.load({name}"]
    bounds = []
    for axis, (arg, expr) in enumerate(zip(args, exprs, strict=True)):
        if expr == 0 and name[0] == "w":
            continue  # an axis of size one
        if expr in (Q, KV):
            # Neighbours stay neighbours, so the addresses cost nothing.
            pieces += [" + ", arg, f".to(tl.int64) * {name}_stride{axis}"]
            bounds.append(f"({expr} < n_{expr})")
        else:
            rest = f", {name}_size{axis}, {name}_stride{axis})"
            pieces += [" + table_offset(", arg, rest]
    if bounds:
        pieces.append(f", mask={' & '.join(dict.fromkeys(bounds))}, other=0")
    pieces.append(f"){cast}")
    # A name of its own: a table without axes must not be called as its pointer is.
    plain = exprs and all(isinstance(expr, sympy.Symbol) for expr in exprs)
    hint = "_".join([name, *(str(e) for e in exprs)]) if plain else f"{name}_at"
    return Term(tuple(pieces), axes=_axes(args), bits=bits, named=True, hint=hint)


def _sum(args: Sequence[Term]) -> Term:
    bits = _most(args) + (len(args) - 1).bit_length()
    ordered = sorted(args, key=lambda t: (t.text().startswith("-"), t.text()))
    ordered, bits = _widened(ordered, bits)
    pieces: list[str | Term] = list(_wrap(ordered[0], _ADD))
    for term in ordered[1:]:
        pieces += _subtracted(term) or (" + ", *_wrap(term, _MUL))
    return Term(tuple(pieces), _ADD, _axes(args), bits)


def _product(args: Sequence[Term]) -> Term:
    ordered = sorted(args, key=lambda t: (not t.text().lstrip("-").isdigit(), t.text()))
    ordered, bits = _widened(ordered, sum(arg.bits for arg in args))
    if ordered[0].text() == "-1" and len(ordered) > 1:
        pieces: tuple[str | Term, ...] = ("-", *_join(" * ", ordered[1:], _UNARY))
    else:
        pieces = _join(" * ", ordered, _UNARY)
    return Term(pieces, _MUL, _axes(args), bits)


def _division(op: str, args: Sequence[Term], expr: sympy.Basic) -> Term:
    a, b = args
    bits = a.bits if op == "//" else b.bits
    # On tensors Triton's // and % truncate towards zero, as in C.
    if expr.args[0].is_nonnegative and expr.args[1].is_positive:
        pieces = (*_wrap(a, _MUL), f" {op} ", *_wrap(b, _UNARY))
        return Term(pieces, _MUL, _axes(args), bits)
    helper = "floor_div" if op == "//" else "floor_mod"
    return Term(_call(helper, args), axes=_axes(args), bits=bits, named=True)


def _bit(args: Sequence[Term]) -> Term:
    shifted = _join(" >> ", args, _ATOM)
    return Term(("(", *shifted, ") & 1"), _AND, _axes(args), bits=1)


def _absolute(args: Sequence[Term]) -> Term:
    return Term(_call("tl.abs", args), axes=_axes(args), bits=_most(args))


def _extreme(name: str, args: Sequence[Term]) -> Term:
    first, *rest = sorted(args, key=Term.text)
    for term in rest:
        axes, bits = _axes([first, term]), _most([first, term])
        first = Term(_call(name, [first, term]), axes=axes, bits=bits)
    return first


def _select(args: Sequence[Term]) -> Term:
    return Term(_call("tl.where", args), axes=_axes(args), bits=_most(args[1:]))


def _junction(op: str, precedence: int, args: Sequence[Term]) -> Term:
    ordered = sorted(args, key=Term.text)
    return Term(_join(op, ordered, precedence), precedence, _axes(args))


def _not(args: Sequence[Term]) -> Term:
    return Term(("~", *_wrap(args[0], _ATOM)), _UNARY, _axes(args))


_OPERATIONS: dict[str, Callable[[Sequence[Term]], Term]] = {
    "+": _sum,
    "*": _product,
    "bit": _bit,
    "abs": _absolute,
    "min": functools.partial(_extreme, "tl.minimum"),
    "max": functools.partial(_extreme, "tl.maximum"),
    "where": _select,
    "and": functools.partial(_junction, " & ", _AND),
    "or": functools.partial(_junction, " | ", _OR),
    "not": _not,
}


def _subtracted(term: Term) -> tuple[str | Term, ...]:
    """`` - x`` for a term spelled ``-x``; empty for others."""
    head = term.pieces[0]
    if term.named or not isinstance(head, str) or not head.startswith("-"):
        return ()
    rest = (head[1:], *term.pieces[1:]) if head != "-" else term.pieces[1:]
    return (" - ", Term(rest, _MUL, term.axes, term.bits))


def _widened(terms: list[Term], bits: int) -> tuple[list[Term], int]:
    """The operands with one made int64 and put first, if the result may not fit int32."""
    if any(term.bits == _REAL for term in terms):
        return terms, _REAL
    if bits <= _INT32_BITS:
        return terms, bits
    if any(term.bits > _INT32_BITS for term in terms):
        # Evaluation runs from left to right: all of it happens in int64.
        return sorted(terms, key=lambda t: t.bits <= _INT32_BITS), min(bits, _INT64_BITS)
    tensors = [term for term in terms if not term.text().lstrip("-").isdigit()]
    narrow = min(tensors, key=lambda t: (len(t.axes - {"b"}), t.text()))
    wide = Term((*_wrap(narrow, _ATOM), ".to(tl.int64)"), _ATOM, narrow.axes, _INT32_BITS + 1)
    rest = list(terms)
    rest.remove(narrow)  # once: in q * q it stands twice
    return [wide, *rest], min(bits, _INT64_BITS)


class _RealPrinter(_Printer):
    """The same with real numbers: these have no bits, so never become int64."""

    def learned(self, index: int, args: Sequence[Term], exprs: Sequence[sympy.Expr]) -> Term:
        return _lookup(f"w{index}", args, exprs, _REAL, ".to(tl.float32)")

    def symbol(self, name: str) -> Term:
        pairs = frozenset({"b", "q", "kv"})
        if name == "score" or name.startswith("near_"):
            return Term((name,), axes=pairs, bits=_REAL)
        if name == "distance":
            return Term((name,), axes=pairs, bits=COORDINATE_BITS + 1)
        return super().symbol(name)

    def real(self, value: sympy.Number) -> Term:
        return Term((repr(float(value)),), _ATOM if value >= 0 else _UNARY, bits=_REAL)

    def operation(self, name: str, args: Sequence[Term], expr: sympy.Basic) -> Term:
        if name == RECIPROCAL:
            return Term(("1.0 / ", *_wrap(args[0], _ATOM)), _MUL, _axes(args), _REAL)
        if name not in FUNCTIONS:
            return super().operation(name, args, expr)
        function = name if name == "tanh" else f"tl.{name}"
        return Term(_call(function, args), axes=_axes(args), bits=_REAL)


def real_terms(tables: Sequence[str], *exprs: sympy.Expr) -> list[Term]:
    """Real expressions over ``score`` and what predicates are made of, with tables of dtypes."""
    return fold_real(_RealPrinter(tables), *exprs)
