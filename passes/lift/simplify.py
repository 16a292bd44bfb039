"""Simplifying predicates over coordinates with known ranges.

Each rule below is an equivalence over the integers in range; each has its own test.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import sympy
from sympy.core.relational import Relational

from sparse_compile.expr import FloorDiv, FloorMod
from sparse_compile.passes.lift.bounds import Linear, Ranges, linear

_count_ops = functools.lru_cache(maxsize=1 << 12)(sympy.count_ops)


class Simplifier:
    """Simplifies expressions whose coordinates lie in ``ranges``; remembers what it has seen.

    >>> from sparse_compile.expr import KV, N_KV, Q
    >>> Simplifier(Ranges({KV: N_KV - 1}))((KV <= Q) & (KV < N_KV) & (KV - Q <= 3))
    kv <= q
    """

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self._memo: dict[sympy.Basic, sympy.Basic] = {}

    def __call__(self, expr: sympy.Basic) -> sympy.Basic:
        """An equivalent, usually shorter, expression."""
        if expr.is_Atom:
            return expr
        if expr not in self._memo:
            self._memo[expr] = self._rebuild(expr)
        return self._memo[expr]

    def _rebuild(self, expr: sympy.Basic) -> sympy.Basic:
        args = [self(arg) for arg in expr.args]
        if isinstance(expr, FloorDiv):
            return self.floordiv(*args)
        if isinstance(expr, FloorMod):
            return self.floormod(*args)
        if isinstance(expr, Relational):
            return self._relation(expr.func(*args))
        if isinstance(expr, (sympy.And, sympy.Or)):
            return self._junction(args, conjunction=isinstance(expr, sympy.And))
        if isinstance(expr, sympy.Not):
            return self._negate(args[0])
        return expr.func(*args)

    # Integers ----------------------------------------------------------------------------------

    def floordiv(self, value: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
        """``value // divisor`` with multiples of the divisor taken out."""
        if not divisor.is_positive:
            return FloorDiv(value, divisor)
        whole, rest = _divide(value, divisor)
        if self.ranges.nonnegative(rest) and self.ranges.nonnegative(divisor - 1 - rest):
            return whole
        if isinstance(rest, FloorDiv) and rest.args[1].is_positive:
            return whole + self.floordiv(rest.args[0], rest.args[1] * divisor)
        return whole + FloorDiv(rest, divisor)

    def floormod(self, value: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr:
        """``value % divisor`` with multiples of the divisor dropped."""
        if not divisor.is_positive:
            return FloorMod(value, divisor)
        _, rest = _divide(value, divisor)
        if self.ranges.nonnegative(rest) and self.ranges.nonnegative(divisor - 1 - rest):
            return rest
        return FloorMod(rest, divisor)

    # Comparisons -------------------------------------------------------------------------------

    def _relation(self, relation: sympy.Basic) -> sympy.Basic:
        if not isinstance(relation, Relational):
            return relation
        form = linear(relation)
        if isinstance(form, bool):
            return sympy.true if form else sympy.false
        nonnegative = self.ranges.nonnegative
        below, above = form.bound - form.terms, form.terms - form.bound
        if form.kind == "le":
            if nonnegative(below):
                return sympy.true
            if nonnegative(above - 1):
                return sympy.false
            if nonnegative(above):
                return Linear("eq", form.terms, form.bound).spelled
            return self._leading_digit(form).spelled
        if nonnegative(below - 1) or nonnegative(above - 1):
            return sympy.true if form.kind == "ne" else sympy.false
        return form.spelled

    def _leading_digit(self, form: Linear) -> Linear:
        """``12 q + kv <= 35`` is ``q <= 2`` if kv < 12: the lower digit cannot matter."""
        terms = sympy.Add.make_args(form.terms)
        if len(terms) < 2:
            return form
        lead = max(terms, key=lambda term: abs(int(term.as_coeff_Mul()[0])))
        size, variable = lead.as_coeff_Mul()
        rest = form.terms - lead if size > 0 else lead - form.terms
        size, sign = abs(int(size)), 1 if size > 0 else -1
        inside = self.ranges.nonnegative(rest) and self.ranges.nonnegative(size - 1 - rest)
        if size == 1 or not inside or form.bound % size != (size - 1 if sign > 0 else 0):
            return form
        return Linear("le", sign * variable, form.bound // size)

    # Logic -------------------------------------------------------------------------------------

    def _negate(self, arg: sympy.Basic) -> sympy.Basic:
        if isinstance(arg, (sympy.And, sympy.Or)):
            return self._junction(
                [self._negate(part) for part in arg.args], isinstance(arg, sympy.Or)
            )
        negated = sympy.Not(arg)
        return self._relation(negated) if isinstance(negated, Relational) else negated

    def _junction(self, args: Iterable[sympy.Basic], conjunction: bool) -> sympy.Basic:
        """And (or, by duality, Or) of simplified arguments."""
        kind, other = (sympy.And, sympy.Or) if conjunction else (sympy.Or, sympy.And)
        joined = kind(*args)
        if not isinstance(joined, kind):
            return joined
        parts = [part for part in joined.args if not isinstance(part, other)]
        literals = _merge_bounds(parts, conjunction)
        if literals is None:
            return sympy.false if conjunction else sympy.true
        literals = [self._relation(part) for part in literals]
        facts = _Facts(literals, conjunction)
        nested = [self._within(part, facts) for part in joined.args if isinstance(part, other)]
        plain = [part for part in nested if not isinstance(part, other)]
        nested = _without_implied([p for p in nested if isinstance(p, other)], conjunction)
        literals = [
            part for part in literals if not any(_settled(part, n, conjunction) for n in nested)
        ]
        result = _factored(kind(*self._substitute(literals, plain + nested, conjunction)))
        # Once more while it shrinks, so that this ends.
        shrank = result != joined and _count_ops(result) < _count_ops(joined)
        return self(result) if shrank else result

    def _within(self, part: sympy.Basic, facts: _Facts) -> sympy.Basic:
        """A nested Or in the light of the literals beside it in an And (and dually)."""
        if any(facts.settle(arg) for arg in part.args):
            return sympy.true if isinstance(part, sympy.Or) else sympy.false
        args = [arg for arg in part.args if not facts.settle(sympy.Not(arg))]
        return part if len(args) == len(part.args) else self(part.func(*args))

    def _substitute(
        self, literals: list[sympy.Basic], nested: list[sympy.Basic], conjunction: bool
    ) -> list[sympy.Basic]:
        """Use ``x == 3`` beside other terms of an And, and ``x != 3`` beside those of an Or."""
        relation = sympy.Eq if conjunction else sympy.Ne
        found: dict[sympy.Basic, sympy.Basic] = {}
        for part in literals:
            if isinstance(part, relation) and part.lhs.is_Symbol and part.rhs.is_Integer:
                found.setdefault(part.lhs, part)
        if not found:
            return literals + nested
        values = {symbol: part.rhs for symbol, part in found.items()}
        sources = set(found.values())
        return [
            part if part in sources else self(part.xreplace(values)) for part in literals + nested
        ]


class _Facts:
    """The literals of an And (or, by duality, an Or), as what they say about other literals.

    In an And, a literal settles what it implies. In an Or, a literal settles what implies it: with
    ``x < 5`` in the Or, ``x < 3`` beside it adds nothing.
    """

    def __init__(self, literals: Iterable[sympy.Basic], conjunction: bool) -> None:
        self.conjunction = conjunction
        self.literals = set(literals)
        self.bounds: dict[sympy.Expr, int] = {}
        for part in self.literals:
            form = linear(part) if isinstance(part, Relational) else None
            if isinstance(form, Linear) and form.kind == "le":
                self.bounds[form.terms] = form.bound
            elif isinstance(form, Linear) and form.kind == "eq" and conjunction:
                self.bounds |= {form.terms: form.bound, form.opposite: -form.bound}

    def settle(self, arg: sympy.Basic) -> bool:
        """Whether ``arg`` is settled: true in an And's light, false in an Or's."""
        if arg in self.literals:
            return True
        form = linear(arg) if isinstance(arg, Relational) else None
        if not isinstance(form, Linear):
            return False
        above, below = self.bounds.get(form.terms), self.bounds.get(form.opposite)
        if form.kind == "le" and above is not None:
            return above <= form.bound if self.conjunction else form.bound <= above
        if form.kind == ("ne" if self.conjunction else "eq"):
            # x <= 3 says x != 4; x == 3 says x <= 3.
            margin = 1 if self.conjunction else 0
            sign = 1 if self.conjunction else -1
            return (above is not None and sign * (form.bound - above) >= margin) or (
                below is not None and sign * (-form.bound - below) >= margin
            )
        return False


def _factored(expr: sympy.Basic) -> sympy.Basic:
    """``(a and b) or (a and c)`` as ``a and (b or c)``, and dually."""
    if not isinstance(expr, (sympy.And, sympy.Or)):
        return expr
    other = sympy.Or if isinstance(expr, sympy.And) else sympy.And
    if not all(isinstance(part, other) for part in expr.args):
        return expr
    common = set.intersection(*(set(part.args) for part in expr.args))
    if not common:
        return expr
    rest = [other(*(arg for arg in part.args if arg not in common)) for part in expr.args]
    return other(*common, expr.func(*rest))


def _without_implied(parts: list[sympy.Basic], conjunction: bool) -> list[sympy.Basic]:
    """Drop from an And every Or that each term of another of its Ors implies (and dually)."""
    kept = list(parts)
    for part in parts:
        about = _subjects(part)
        others = [o for o in kept if o != part and all(about & _subjects(t) for t in o.args)]
        if any(
            all(any(map(_facts_of(term, conjunction).settle, part.args)) for term in other.args)
            for other in others
        ):
            kept.remove(part)
    return kept


def _settled(literal: sympy.Basic, nested: sympy.Basic, conjunction: bool) -> bool:
    """Whether an Or beside a literal in an And already implies it, term by term (and dually)."""
    return all(_facts_of(term, conjunction).settle(literal) for term in nested.args)


@functools.lru_cache(maxsize=1 << 12)
def _facts_of(term: sympy.Basic, conjunction: bool) -> _Facts:
    parts = term.args if isinstance(term, (sympy.And, sympy.Or)) else [term]
    return _Facts(parts, conjunction)


@functools.lru_cache(maxsize=1 << 12)
def _subjects(term: sympy.Basic) -> frozenset[sympy.Basic]:
    """What the literals of a term are about: only literals about the same can settle each other."""
    parts = term.args if isinstance(term, (sympy.And, sympy.Or)) else [term]
    forms = [linear(part) if isinstance(part, Relational) else None for part in parts]
    subjects: set[sympy.Basic] = set(parts)
    for form in forms:
        if isinstance(form, Linear):
            subjects |= {form.terms, form.opposite}
    return frozenset(subjects)


def _divide(value: sympy.Expr, divisor: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """``value == whole * divisor + rest``, moving every term that the divisor divides."""
    whole, rest = [], []
    for term in sympy.Add.make_args(sympy.expand(value)):
        quotient = _exact_quotient(term, divisor)
        if quotient is not None:
            whole.append(quotient)
        elif term.is_Integer and divisor.is_Integer:
            whole.append(sympy.Integer(int(term) // int(divisor)))
            rest.append(sympy.Integer(int(term) % int(divisor)))
        else:
            rest.append(term)
    return sympy.Add(*whole), sympy.Add(*rest)


def _exact_quotient(term: sympy.Expr, divisor: sympy.Expr) -> sympy.Expr | None:
    if divisor.is_Integer:
        coefficient, factors = term.as_coeff_Mul()
        if coefficient.is_Integer and int(coefficient) % int(divisor) == 0:
            return coefficient // divisor * factors
        return None
    quotient = sympy.cancel(term / divisor) if term.has(*divisor.free_symbols) else None
    if quotient is None or sympy.fraction(quotient)[1] != 1:
        return None
    return quotient if quotient.is_integer else None


def _merge_bounds(parts: list[sympy.Basic], conjunction: bool) -> list[sympy.Basic] | None:
    """Join bounds on the same terms; None when they contradict (And) or cover all (Or)."""
    bounds: dict[sympy.Expr, int] = {}
    others: list[sympy.Basic] = []
    tightest = min if conjunction else max
    for part in parts:
        form = linear(part) if isinstance(part, Relational) else None
        if isinstance(form, Linear) and form.kind == "le":
            seen = bounds.get(form.terms, form.bound)
            bounds[form.terms] = tightest(seen, form.bound)
        else:
            others.append(part)
    for terms, bound in list(bounds.items()):
        opposite = bounds.get(-terms)
        if opposite is None or terms not in bounds:
            continue
        width = bound + opposite
        if (conjunction and width < 0) or (not conjunction and width >= -1):
            return None
        if width == (0 if conjunction else -2):
            # x <= 3 and x >= 3 is x == 3; x <= 2 or x >= 4 is x != 3.
            del bounds[terms], bounds[-terms]
            exact = Linear("eq", terms, bound) if conjunction else Linear("ne", terms, bound + 1)
            others.append(exact.spelled)
    return others + [Linear("le", terms, bound).spelled for terms, bound in bounds.items()]
