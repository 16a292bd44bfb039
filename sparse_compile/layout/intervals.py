"""What a predicate can be over a rectangle of coordinates: interval and congruence analysis.

Every node gets a :class:`Span`, a proof about all its values in the rectangle. A Boolean is an
interval too, over False < True: ``lo`` is *must be true*, ``hi`` is *may be true*. A block is FULL
when ``lo``, EMPTY when not ``hi``, and PARTIAL otherwise; PARTIAL is always a safe answer.

The ends of a span are bounds: int64 tensors with one entry per rectangle, or Python ints where they
are the same for all of them. Truth values are bounds too. Where a kernel is generated, an
:class:`Abstract` value stands for the tensor: it has the same operators, and says itself what the
functions of bounds here are of it. Nothing here reads a tensor's values on the host, so the
analysis runs on any device without synchronising.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from sparse_compile.expr.fold import COMPARISONS, fold, joined

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

Bound = Tensor | int


class Abstract:
    """A bound that is no number yet: what will compute one. Has the operators of a tensor.

    A base and not a protocol, because every step of the analysis asks whether a bound is one.
    """

    @staticmethod
    def least(a: Any, b: Any) -> Any:
        """The smaller of two, one of which is abstract."""
        raise NotImplementedError

    @staticmethod
    def greatest(a: Any, b: Any) -> Any:
        """The larger of two, one of which is abstract."""
        raise NotImplementedError

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> Any:
        """``yes`` where an abstract condition holds, else ``no``."""
        raise NotImplementedError


def _abstract(*values: object) -> Abstract | None:
    """The first of these that is abstract."""
    return next((value for value in values if isinstance(value, Abstract)), None)


def least(a: Bound, b: Bound) -> Bound:
    """The smaller of two."""
    if (of := _abstract(a, b)) is not None:
        found: Bound = of.least(a, b)
        return found
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return b.clamp(max=a) if isinstance(b, Tensor) else min(a, b)


def greatest(a: Bound, b: Bound) -> Bound:
    """The larger of two."""
    if (of := _abstract(a, b)) is not None:
        found: Bound = of.greatest(a, b)
        return found
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def where(condition: Bound, yes: Bound, no: Bound) -> Bound:
    """``yes`` where the condition holds, else ``no``."""
    if (of := _abstract(condition)) is not None:
        found: Bound = of.where(condition, yes, no)
        return found
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def negated(truth: Bound) -> Bound:
    """Logical not."""
    return not truth if isinstance(truth, int) else ~truth


def saturated(value: Bound) -> Bound:
    """A result, brought back into int64 if it is a Python int."""
    # Python ints are unbounded and torch rejects those beyond int64; tensors wrap. Neither matters
    # to the analysis: it drops every entry that could overflow.
    return max(INT64_MIN, min(value, INT64_MAX)) if isinstance(value, int) else value


#: Sums and differences of numbers up to this size cannot overflow int64.
LIMIT = 1 << 60
#: The magnitude of a span whose values may be any int64.
WIDE = 1 << 63


@dataclass(frozen=True)
class Span:
    """All values of a node over a rectangle lie in ``lo, lo + step, ..., hi``.

    Attributes:
        lo, hi: least and greatest possible value; ``hi - lo`` is a multiple of ``step``.
        step: 0 when there is one value only, 1 when nothing more is known.
        magnitude: no value in any rectangle is larger than this, a fact known on the host. Spans
            beyond :data:`LIMIT` are handled by comparing before adding, others without a check.
    """

    lo: Bound
    hi: Bound
    step: int = 1
    magnitude: int = WIDE

    @property
    def constant(self) -> int | None:
        """The value, when it is the same known integer in every rectangle."""
        lo, hi = self.lo, self.hi
        return lo if isinstance(lo, int) and isinstance(hi, int) and lo == hi else None


#: Any int64. The bounds are sound without being infinite, since no int64 lies outside them.
UNKNOWN = Span(INT64_MIN, INT64_MAX)

#: Bounds of a lookup: table number, spans of its index expressions, the expressions.
Lookup = Callable[[int, Sequence[Span], Sequence[sympy.Expr]], Span]


def point(value: Bound, magnitude: int = WIDE) -> Span:
    """The span of a node with one known value per rectangle."""
    if isinstance(value, int):
        magnitude = abs(value)
        if not INT64_MIN <= value <= INT64_MAX:
            return UNKNOWN
    return Span(value, value, 0 if magnitude <= LIMIT else 1, magnitude)


def dtype_span(dtype: str) -> Span:
    """What is known of an entry of a table by its dtype alone.

    >>> dtype_span("bool").hi, dtype_span("int64") is UNKNOWN
    (1, True)
    """
    if dtype == "bool":
        return Span(0, 1, 1, 1)
    bits = int(dtype.removeprefix("int"))
    return UNKNOWN if bits == 64 else Span(-(1 << bits - 1), (1 << bits - 1) - 1, 1, 1 << bits - 1)


def span(expr: sympy.Basic, symbols: Mapping[str, Span], lookup: Lookup | None = None) -> Span:
    """What ``expr`` can be when its symbols lie in the given spans.

    >>> import torch
    >>> from sparse_compile.expr import KV, Q
    >>> q, kv = Span(torch.tensor([0, 8]), torch.tensor([7, 15])), Span(0, 7)
    >>> causal = span(KV <= Q, {"q": q, "kv": kv})
    >>> causal.lo.tolist(), causal.hi.tolist()
    ([False, True], [True, True])
    """
    return fold(expr, _Intervals(symbols, lookup))


class _Intervals:
    """The algebra whose values are spans."""

    def __init__(self, symbols: Mapping[str, Span], lookup: Lookup | None = None) -> None:
        self.symbols, self.lookup = symbols, lookup

    def integer(self, value: int) -> Span:
        return point(value)

    def boolean(self, value: bool) -> Span:
        return Span(value, value, 0, 1)

    def symbol(self, name: str) -> Span:
        return self.symbols[name]

    def table(self, index: int, args: Sequence[Span], exprs: Sequence[sympy.Expr]) -> Span:
        return UNKNOWN if self.lookup is None else self.lookup(index, args, exprs)

    def operation(self, name: str, args: Sequence[Span], expr: sympy.Basic) -> Span:
        if name in COMPARISONS:
            return _compared(name, *args)
        if name in ("and", "or"):
            both = operator.and_ if name == "and" else operator.or_
            must, may = [arg.lo for arg in args], [arg.hi for arg in args]
            return _truth(functools.reduce(both, must), functools.reduce(both, may))
        return joined(_OPERATIONS[name], name, args)


# Booleans


def _truth(must: Bound, may: Bound) -> Span:
    return Span(must, may, 1, 1)


def _congruent(a: Span, b: Span) -> Bound:
    modulus = math.gcd(a.step, b.step)
    # Two points need no modulus: their intervals already tell.
    return True if modulus <= 1 else (a.lo - b.lo) % modulus == 0


def _compared(op: str, a: Span, b: Span) -> Span:
    if op in (">", ">="):
        op, a, b = op.replace(">", "<"), b, a
    if op == "<":
        return _truth(a.hi < b.lo, a.lo < b.hi)
    if op == "<=":
        return _truth(a.hi <= b.lo, a.lo <= b.hi)
    # All four bounds coincide exactly when these two pairs do, since lo <= hi on both sides.
    must = (a.lo == b.hi) & (a.hi == b.lo)
    may = (a.lo <= b.hi) & (b.lo <= a.hi) & _congruent(a, b)
    return _truth(must, may) if op == "==" else _truth(negated(may), negated(must))


def _not(a: Span) -> Span:
    return _truth(negated(a.hi), negated(a.lo))


# Integers


def _add(a: Span, b: Span) -> Span:
    fits = _fits(a, LIMIT) & _fits(b, LIMIT)
    step, magnitude = math.gcd(a.step, b.step), a.magnitude + b.magnitude
    return _guarded(fits, saturated(a.lo + b.lo), saturated(a.hi + b.hi), step, magnitude)


def _mul(a: Span, b: Span) -> Span:
    if a.constant is not None or b.magnitude > LIMIT:
        a, b = b, a
    if b.magnitude > LIMIT:
        return UNKNOWN
    fits = _fits(a, LIMIT // max(b.magnitude, 1))
    magnitude = a.magnitude * b.magnitude
    factor = b.constant
    if factor is not None:
        lo, hi = (a.lo, a.hi) if factor >= 0 else (a.hi, a.lo)
        step = a.step * abs(factor)
        return _guarded(fits, saturated(lo * factor), saturated(hi * factor), step, magnitude)
    corners = [saturated(x * y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    lo, hi = functools.reduce(least, corners), functools.reduce(greatest, corners)
    return _guarded(fits, lo, hi, 0 if a.step == b.step == 0 else 1, magnitude)


def _floordiv(a: Span, b: Span) -> Span:
    divisor = b.constant
    if divisor is not None and divisor < 0:
        return _floordiv(_mul(a, point(-1)), point(-divisor))
    if divisor is not None and divisor > 0:
        step = a.step // divisor if a.step % divisor == 0 else 1
        return Span(a.lo // divisor, a.hi // divisor, step, a.magnitude)
    positive, divisors = b.lo > 0, (greatest(b.lo, 1), greatest(b.hi, 1))
    corners = [x // y for x in (a.lo, a.hi) for y in divisors]
    lo, hi = functools.reduce(least, corners), functools.reduce(greatest, corners)
    return _guarded(positive, lo, hi, 1, a.magnitude)


def _mod(a: Span, m: Span) -> Span:
    modulus = m.constant
    if modulus is not None and modulus < 0:
        return _mul(_mod(_mul(a, point(-1)), point(-modulus)), point(-1))
    # In lo, lo + step, ... a wrap around the modulus keeps only the residue modulo their gcd.
    common = math.gcd(a.step, modulus) if modulus else 1
    residue = a.lo % common if common > 1 else 0
    if modulus is not None and common == modulus:
        return Span(residue, residue, 0, modulus)
    divisor = greatest(m.lo, 1)
    one_turn = (m.lo == m.hi) & (a.lo // divisor == a.hi // divisor)
    lo = where(one_turn, a.lo % divisor, residue)
    hi = where(one_turn, a.hi % divisor, saturated(m.hi + (residue - common)))
    if modulus is None:
        unchanged = (a.lo >= 0) & (a.hi < divisor)
        lo, hi = where(unchanged, a.lo, lo), where(unchanged, a.hi, hi)
    return _guarded(m.lo > 0, lo, hi, common, m.magnitude)


def _extreme(choose: Callable[[Bound, Bound], Bound], a: Span, b: Span) -> Span:
    lo, hi = choose(a.lo, b.lo), choose(a.hi, b.hi)
    return Span(lo, hi, 0 if a.step == b.step == 0 else 1, max(a.magnitude, b.magnitude))


def _absolute(a: Span) -> Span:
    if a.step == 0 and isinstance(a.lo, int):
        return point(abs(a.lo))
    fits = _fits(a, LIMIT)
    lo = greatest(greatest(a.lo, saturated(-a.hi)), 0)
    hi = greatest(saturated(-a.lo), a.hi)
    return _guarded(fits, lo, hi, 0 if a.step == 0 else 1, a.magnitude)


def _bit(word: Span, index: Span) -> Span:
    # All bits of 0 and of -1 are the same.
    must, never = ((word.lo == same) & (word.hi == same) for same in (-1, 0))
    return Span(where(must, 1, 0), where(never, 0, 1), 1, 1)


def _select(condition: Span, yes: Span, no: Span) -> Span:
    if isinstance(condition.lo, bool) and condition.lo is condition.hi:
        return yes if condition.lo else no
    must, may = condition.lo, condition.hi
    lo = where(must, yes.lo, where(may, least(yes.lo, no.lo), no.lo))
    hi = where(must, yes.hi, where(may, greatest(yes.hi, no.hi), no.hi))
    return Span(lo, hi, 1, max(yes.magnitude, no.magnitude))


def _fits(a: Span, limit: int) -> Bound:
    """Whether no value exceeds ``limit``; a Python bool when that is known on the host."""
    if a.magnitude <= limit:
        return True
    return (a.lo >= -limit) & (a.hi <= limit)


def _guarded(sound: Bound, lo: Bound, hi: Bound, step: int, magnitude: int) -> Span:
    """The span where ``sound``, anything elsewhere."""
    if sound is True:
        return Span(lo, hi, step, magnitude)
    if sound is False:
        return UNKNOWN
    return Span(where(sound, lo, INT64_MIN), where(sound, hi, INT64_MAX))


_OPERATIONS: dict[str, Callable[..., Span]] = {
    "+": _add,
    "*": _mul,
    "//": _floordiv,
    "%": _mod,
    "bit": _bit,
    "abs": _absolute,
    "min": functools.partial(_extreme, least),
    "max": functools.partial(_extreme, greatest),
    "where": _select,
    "not": _not,
}
