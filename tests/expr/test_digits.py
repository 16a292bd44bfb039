"""Predicates in digits mean the same, and the analysis of blocks sees each digit by itself."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.expr import KV, N_KV, N_Q, FloorDiv, FloorMod, MaskExpr, Q, evaluate
from sparse_compile.expr.digits import digit, in_digits

Radices = tuple[int, ...]
Windows = tuple[tuple[int, int], ...]
TOKENS = 90


def whole(radices: Radices) -> Windows:
    return tuple((0, radix) for radix in radices)


def values(predicate: sympy.Basic) -> Tensor:
    where = {"q": torch.arange(TOKENS)[:, None], "kv": torch.arange(TOKENS)}
    return evaluate(MaskExpr(predicate), where, 50, 60).expand(TOKENS, TOKENS)


def token_digits(side: sympy.Symbol, radices: Radices) -> list[sympy.Expr]:
    """Each digit as a function of the token."""
    strides = [math.prod(radices[k:]) for k in range(len(radices) + 1)]
    outer, *inner = (FloorDiv(side, stride) for stride in strides)
    return [outer, *(FloorMod(x, radix) for x, radix in zip(inner, radices, strict=True))]


def back_in_tokens(predicate: sympy.Basic, q: Radices, kv: Radices) -> sympy.Basic:
    places = {
        digit(side.name, k): value
        for side, radices in ((Q, q), (KV, kv))
        if radices
        for k, value in enumerate(token_digits(side, radices))
    }
    return predicate.xreplace(places)


def inside(side: sympy.Symbol, radices: Radices, windows: Windows) -> sympy.Basic:
    digits = token_digits(side, radices)[1:] if radices else []
    return sympy.And(
        *(sympy.And(x >= lo, x < hi) for x, (lo, hi) in zip(digits, windows, strict=True))
    )


def check(
    predicate: sympy.Basic, q: Radices, kv: Radices, windows: tuple[Windows, Windows]
) -> None:
    found = back_in_tokens(in_digits(predicate, q, kv, *windows), q, kv)
    kept = values(inside(Q, q, windows[0])) & values(inside(KV, kv, windows[1]))
    assert torch.equal(values(found)[kept], values(predicate)[kept])


def expressions() -> st.SearchStrategy[sympy.Expr]:
    leaves = st.one_of(
        st.sampled_from([Q, KV, Q - KV, KV - Q, Q + KV, Q + N_KV - N_Q, KV - N_Q]),
        st.integers(-9, 9).map(sympy.Integer),
    )
    divisor = st.sampled_from([2, 3, 4, 6, 8, 12, 24, 5])

    def extend(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
        return st.one_of(
            st.builds(FloorDiv, inner, divisor),
            st.builds(FloorMod, inner, divisor),
            st.builds(lambda a, b: a + b, inner, inner),
            st.builds(lambda a, c: a * c, inner, st.integers(-3, 4)),
            st.builds(sympy.Abs, inner),
            st.builds(sympy.Min, inner, inner),
        )

    return st.recursive(leaves, extend, max_leaves=4)


def relations() -> st.SearchStrategy[sympy.Basic]:
    kinds = st.sampled_from([sympy.Eq, sympy.Eq, sympy.Ne, sympy.Lt, sympy.Ge])
    return st.builds(lambda kind, a, b: kind(a, b), kinds, expressions(), expressions())


def radices() -> st.SearchStrategy[Radices]:
    return st.sampled_from([(), (4,), (8,), (3, 4), (4, 6), (2, 3, 4), (5,)])


@st.composite
def windows(draw: st.DrawFn, of: Radices) -> Windows:
    found = []
    for radix in of:
        lo = draw(st.integers(0, radix - 1))
        found.append((lo, draw(st.integers(lo + 1, radix))))
    return tuple(found) if draw(st.booleans()) else whole(of)


@settings(max_examples=400, deadline=None)
@given(relations(), radices(), radices(), st.data())
def test_digits_mean_the_tokens(
    relation: sympy.Basic, q: Radices, kv: Radices, data: st.DataObject
) -> None:
    check(relation, q, kv, (data.draw(windows(q)), data.draw(windows(kv))))


GRID = (4, 6)
Q0, Q1, Q2 = (digit("q", k) for k in range(3))
KV0, KV1, KV2 = (digit("kv", k) for k in range(3))
#: predicate, radices, windows of the keys, and what it must become.
RULES = {
    "a quotient by less than the grid": (
        sympy.Eq(FloorDiv(Q, 6), FloorDiv(KV, 6)),
        sympy.Eq(Q0 - KV0, 0) & sympy.Eq(Q1 - KV1, 0),
    ),
    "small digits leave a quotient": (FloorDiv(Q, 48) >= 3, FloorDiv(Q0, 2) >= 3),
    "small digits leave a remainder": (
        FloorMod(Q, 48) >= 3,
        24 * FloorMod(Q0, 2) + 6 * Q1 + Q2 >= 3,
    ),
    "an equation of each digit": (
        sympy.Eq(Q, KV),
        sympy.Eq(Q0 - KV0, 0) & sympy.Eq(Q1 - KV1, 0) & sympy.Eq(Q2 - KV2, 0),
    ),
    "a remainder of the whole grid": (
        sympy.Eq(FloorMod(Q - KV, 24), 0),
        sympy.Eq(Q1 - KV1, 0) & sympy.Eq(Q2 - KV2, 0),
    ),
    "a remainder of several grids": (
        sympy.Eq(FloorMod(Q - KV, 72), 0),
        sympy.Eq(FloorMod(Q0 - KV0, 3), 0) & sympy.Eq(Q1 - KV1, 0) & sympy.Eq(Q2 - KV2, 0),
    ),
    "unequal in some digit": (
        sympy.Ne(FloorMod(Q - KV, 24), 0),
        sympy.Ne(Q1 - KV1, 0) | sympy.Ne(Q2 - KV2, 0),
    ),
    "a shifted remainder": (sympy.Eq(FloorMod(KV + 4, 6), 0), sympy.Eq(KV2 - 2, 0)),
    "a shift by whole rows": (
        sympy.Eq(Q - 15, 0),
        sympy.Eq(Q0, 0) & sympy.Eq(Q1 - 2, 0) & sympy.Eq(Q2 - 3, 0),
    ),
}


def normal(predicate: sympy.Basic) -> sympy.Basic:
    """With differences the same way round."""
    if isinstance(predicate, (sympy.Eq, sympy.Ne)):
        left = min(predicate.lhs, sympy.expand(-predicate.lhs), key=str)
        if isinstance(predicate.lhs, FloorMod):
            x, m = predicate.lhs.args
            left = FloorMod(min(x, sympy.expand(-x), key=str), m)
        return predicate.func(left, predicate.rhs)
    if isinstance(predicate, (sympy.And, sympy.Or)):
        return predicate.func(*map(normal, predicate.args))
    return predicate


@pytest.mark.parametrize("name", RULES)
def test_every_rule_fires(name: str) -> None:
    predicate, expected = RULES[name]
    found = in_digits(predicate, GRID, GRID, whole(GRID), whole(GRID))
    assert normal(found) == normal(expected)
    check(predicate, GRID, GRID, (whole(GRID), whole(GRID)))


def test_a_window_without_a_multiple_holds_nothing() -> None:
    predicate = sympy.Eq(FloorMod(KV, 8), 6)
    assert in_digits(predicate, (), (8,), (), ((0, 4),)) == sympy.false
    assert in_digits(predicate, (), (8,), (), ((6, 7),)) == sympy.Eq(digit("kv", 1), 6)


def test_what_is_no_sum_of_digits_stays() -> None:
    predicate = sympy.Eq(FloorMod(Q + N_KV - N_Q - KV, 8), 0)
    found = in_digits(predicate, (8,), (8,), ((0, 8),), ((0, 8),))
    assert found.has(FloorMod)
    assert not found.has(Q0)
    check(predicate, (8,), (8,), (((0, 8),), ((0, 8),)))
