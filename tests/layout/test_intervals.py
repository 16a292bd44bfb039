"""Spans are proofs: every value an expression takes lies in its span."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.expr import (
    KV,
    Bit,
    FloorDiv,
    FloorMod,
    MaskExpr,
    Q,
    evaluate,
    size_symbol,
    table,
)
from sparse_compile.layout.canonical import canonical
from sparse_compile.layout.intervals import INT64_MAX, UNKNOWN, Span, dtype_span, point, span

S0 = size_symbol(0)
Expression = sympy.Expr


def integers() -> st.SearchStrategy[Expression]:
    leaves = st.one_of(st.sampled_from([Q, KV, S0, table(0)(KV)]), st.integers(-9, 9))
    leaves = leaves.map(sympy.sympify)
    divisor = st.one_of(st.integers(-9, -1), st.integers(1, 9), st.just(S0))

    def extend(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
        pair = st.tuples(inner, inner)
        return st.one_of(
            pair.map(lambda p: p[0] + p[1]),
            pair.map(lambda p: p[0] - p[1]),
            st.tuples(inner, st.integers(-5, 5)).map(lambda p: p[0] * p[1]),
            pair.map(lambda p: p[0] * p[1]),
            st.tuples(inner, divisor).map(lambda p: FloorDiv(*p)),
            st.tuples(inner, divisor).map(lambda p: FloorMod(*p)),
            pair.map(lambda p: FloorMod(p[0], 1 + sympy.Abs(p[1]))),
            pair.map(lambda p: FloorDiv(p[0], 1 + sympy.Abs(p[1]))),
            inner.map(sympy.Abs),
            inner.map(lambda e: Bit(FloorMod(e, 3) - 1, FloorMod(e, 32))),
            pair.map(lambda p: sympy.Min(*p)),
            pair.map(lambda p: sympy.Max(*p)),
            pair.map(lambda p: sympy.Piecewise((p[0], Q < KV + 3), (p[1], True))),
        )

    return st.recursive(leaves, extend, max_leaves=5)


def relations() -> st.SearchStrategy[sympy.Basic]:
    kinds = st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne])
    return st.builds(lambda kind, a, b: kind(a, b), kinds, integers(), integers())


def ranges() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, 30), st.integers(1, 12)).map(lambda p: (p[0], sum(p) - 1))


def values(expr: sympy.Basic, q: tuple[int, int], kv: tuple[int, int], s0: int) -> Tensor:
    where = {
        "q": torch.arange(q[0], q[1] + 1)[:, None],
        "kv": torch.arange(kv[0], kv[1] + 1),
    }
    # evaluate() gives integer expressions their value too.
    return evaluate(MaskExpr(sympy.sympify(expr), ("int32",), 1), where, 42, 42, [ENTRIES], [s0])


ENTRIES = torch.tensor([3, -7, 0, 12, 5, 5, -1] * 6, dtype=torch.int32)


def bounds(
    expr: sympy.Basic, q: tuple[int, int], kv: tuple[int, int], s0: int, tensors: bool = True
) -> Span:
    def bound(value: int) -> Tensor | int:
        return torch.tensor([value]) if tensors else value

    symbols = {
        "q": Span(*map(bound, q), 1, 42),
        "kv": Span(*map(bound, kv), 1, 42),
        "s0": point(s0),
    }
    return span(sympy.sympify(expr), symbols, lambda *_: Span(-7, 12, 1, 12))


divisors = st.one_of(st.integers(-8, -1), st.integers(1, 20))


@settings(max_examples=600, deadline=None)
@given(integers(), ranges(), ranges(), divisors, st.booleans())
def test_every_value_lies_in_the_span(
    expr: Expression, q: tuple[int, int], kv: tuple[int, int], s0: int, tensors: bool
) -> None:
    found, real = bounds(expr, q, kv, s0, tensors), values(expr, q, kv, s0)
    lo, hi = int(found.lo), int(found.hi)
    assert lo <= int(real.min())
    assert int(real.max()) <= hi
    assert int(real.abs().max()) <= found.magnitude
    if found.step > 0:
        assert bool(((real - lo) % found.step == 0).all())
        assert (hi - lo) % found.step == 0
    else:
        assert lo == hi


@settings(max_examples=400, deadline=None)
@given(relations(), ranges(), ranges(), divisors, st.booleans())
def test_verdicts_hold(
    relation: sympy.Basic, q: tuple[int, int], kv: tuple[int, int], s0: int, rewrite: bool
) -> None:
    real = values(relation, q, kv, s0)
    found = bounds(canonical(relation) if rewrite else relation, q, kv, s0)
    assert bool(found.hi) or not real.any()
    assert not bool(found.lo) or bool(real.all())


@settings(max_examples=300, deadline=None)
@given(relations(), divisors)
def test_the_canonical_form_means_the_same(relation: sympy.Basic, s0: int) -> None:
    rewritten = canonical(relation)
    left = values(relation, (0, 20), (0, 20), s0)
    assert bool((left == values(rewritten, (0, 20), (0, 20), s0)).all())


@pytest.mark.parametrize("symbol", [7, S0])
@pytest.mark.parametrize("relation", [sympy.Eq, sympy.Ne])
def test_equal_remainders_become_divisibility(
    symbol: int | sympy.Symbol, relation: type[sympy.Basic]
) -> None:
    before = relation(FloorMod(Q + 2, symbol), FloorMod(KV, symbol))
    after = canonical(before)
    assert after == relation(FloorMod(Q - KV + 2, symbol), 0)
    for s0 in (7, -7, 1):
        same = values(before, (0, 30), (0, 30), s0) == values(after, (0, 30), (0, 30), s0)
        assert bool(same.all())


@pytest.mark.parametrize("residue", [0, 3, 6, 7, -1])
def test_a_known_remainder_becomes_divisibility(residue: int) -> None:
    before = sympy.Eq(FloorMod(KV, 7), residue)
    after = canonical(before)
    assert (after == before) == (residue not in range(1, 7))
    same = values(before, (0, 30), (0, 30), 1) == values(after, (0, 30), (0, 30), 1)
    assert bool(same.all())


def test_a_coordinate_on_both_sides_becomes_one_difference() -> None:
    relation = Q + KV < 2 * Q - 7
    assert canonical(relation) == (KV - Q + 7 < 0)
    assert canonical(sympy.Not(relation, evaluate=False)) == sympy.Not(KV - Q + 7 < 0)


@pytest.mark.parametrize(
    ("expr", "lo", "hi"),
    [
        (Q - KV, 1, 15),
        (FloorMod(Q, 16), 8, 15),
        (FloorMod(Q, 10), 0, 9),
        (FloorMod(4 * Q, 6), 0, 4),
        (FloorMod(4 * KV + 1, 6), 1, 5),
        (FloorMod(8 * Q + 3, 4), 3, 3),
        (FloorDiv(6 * Q, 3), 16, 30),
        (FloorDiv(Q, -3), -5, -3),
        (FloorMod(Q, -16), -8, -1),
        (sympy.Abs(Q - KV), 1, 15),
        (sympy.Abs(KV - Q - 5), 6, 20),
        (sympy.Min(Q, KV), 0, 7),
        (sympy.Max(KV, 3), 3, 7),
    ],
)
def test_bounds_by_hand(expr: Expression, lo: int, hi: int) -> None:
    """q in [8, 15], kv in [0, 7]."""
    found = bounds(expr, (8, 15), (0, 7), 1)
    assert (int(found.lo), int(found.hi)) == (lo, hi)


def test_congruence_excludes_what_intervals_allow() -> None:
    found = bounds(sympy.Eq(4 * Q, 6 * KV + 1), (0, 9), (0, 9), 1)
    assert not bool(found.hi)


WRAPPING: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x + 5,
    "difference": lambda x: 7 - x,
    "scaled": lambda x: x * 100,
    "negated": lambda x: x * -1,
    "absolute": torch.abs,
    "square": lambda x: x * x,
}


@pytest.mark.parametrize("name", WRAPPING)
@pytest.mark.parametrize("value", [INT64_MAX, -INT64_MAX - 1, 1 << 62, -(1 << 61), 1 << 60, 6])
def test_wide_arithmetic_covers_what_wraps(name: str, value: int) -> None:
    entry = table(0)(KV)
    exprs = {
        "sum": entry + 5,
        "difference": 7 - entry,
        "scaled": 100 * entry,
        "negated": -entry,
        "absolute": sympy.Abs(entry),
        "square": entry**2,
    }
    entries = torch.tensor([value])
    symbols = {"kv": Span(torch.zeros(1).long(), torch.zeros(1).long(), 1, 1)}
    for bound in (entries, value):
        found = span(exprs[name], symbols, lambda *_, bound=bound: Span(bound, bound))
        real = int(WRAPPING[name](entries))
        assert int(found.lo) <= real <= int(found.hi)
        if value == 6 and name != "square":
            assert int(found.lo) == real == int(found.hi)


def test_what_a_dtype_tells() -> None:
    assert dtype_span("int64") is UNKNOWN
    assert (dtype_span("int32").lo, dtype_span("int32").hi) == (-(1 << 31), (1 << 31) - 1)
    assert point(1 << 70) is UNKNOWN


@pytest.mark.parametrize(
    ("word", "expected"),
    [((0, 0), (0, 0)), ((-1, -1), (1, 1)), ((-1, 0), (0, 1)), ((5, 5), (0, 1))],
)
@pytest.mark.parametrize("tensors", [True, False])
def test_all_bits_of_some_words_are_known(
    word: tuple[int, int], expected: tuple[int, int], tensors: bool
) -> None:
    ends = [torch.tensor([end]) if tensors else end for end in word]
    symbols = {"q": Span(*ends, 1, 8), "kv": Span(0, 31)}
    found = span(Bit(Q, KV), symbols)
    assert (int(found.lo), int(found.hi)) == expected
