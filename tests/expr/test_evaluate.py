"""Predicates mean what Python integers say, and their text says what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    B,
    Bit,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    UnsupportedNode,
    evaluate,
    fold,
    from_text,
    size_symbol,
    table,
    to_text,
)

S0 = size_symbol(0)
T0 = table(0)
N_QUERIES, N_KEYS = 7, 9
TABLE = [[4, -3, 0, 8, 1, 1, -9, 2, 5], [0, 7, 7, -2, 3, 6, 0, 1, -1]]

# An expression, and the same thing as a function of Python integers b, h, q, kv, s.
Value = Callable[[int, int, int, int, int], int]
Pair = tuple[sympy.Basic, Value]


def leaf(expr: sympy.Basic, value: Value) -> st.SearchStrategy[Pair]:
    return st.just((expr, value))


def integers() -> st.SearchStrategy[Pair]:
    leaves = st.one_of(
        leaf(B, lambda b, h, q, kv, s: b),
        leaf(H, lambda b, h, q, kv, s: h),
        leaf(Q, lambda b, h, q, kv, s: q),
        leaf(KV, lambda b, h, q, kv, s: kv),
        leaf(S0, lambda b, h, q, kv, s: s),
        leaf(N_Q - N_KV, lambda b, h, q, kv, s: N_QUERIES - N_KEYS),
        leaf(T0(B, KV), lambda b, h, q, kv, s: TABLE[b][kv]),
        st.integers(-9, 9).map(lambda n: (sympy.Integer(n), lambda b, h, q, kv, s: n)),
    )
    divisors = st.one_of(st.integers(-6, -1), st.integers(1, 6))

    def binary(make, value):
        return lambda x, y: (make(x[0], y[0]), lambda *at: value(x[1](*at), y[1](*at)))

    def extend(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
        return st.one_of(
            st.builds(binary(lambda x, y: x + y, lambda x, y: x + y), inner, inner),
            st.builds(binary(lambda x, y: x * y, lambda x, y: x * y), inner, inner),
            st.builds(binary(sympy.Min, min), inner, inner),
            st.builds(binary(sympy.Max, max), inner, inner),
            inner.map(lambda x: (sympy.Abs(x[0]), lambda *at: abs(x[1](*at)))),
            st.builds(
                lambda x, d: (FloorDiv(x[0], d), lambda *at: x[1](*at) // d), inner, divisors
            ),
            st.builds(lambda x, d: (FloorMod(x[0], d), lambda *at: x[1](*at) % d), inner, divisors),
        )

    return st.recursive(leaves, extend, max_leaves=5)


def booleans() -> st.SearchStrategy[Pair]:
    def compare(kind, value):
        return st.builds(
            lambda x, y: (kind(x[0], y[0]), lambda *at: value(x[1](*at), y[1](*at))),
            integers(),
            integers(),
        )

    leaves = st.one_of(
        compare(sympy.Lt, lambda x, y: x < y),
        compare(sympy.Le, lambda x, y: x <= y),
        compare(sympy.Gt, lambda x, y: x > y),
        compare(sympy.Ge, lambda x, y: x >= y),
        compare(sympy.Eq, lambda x, y: x == y),
        compare(sympy.Ne, lambda x, y: x != y),
    )

    def extend(inner: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
        def joined(kind, value):
            return lambda x, y: (kind(x[0], y[0]), lambda *at: value(x[1](*at), y[1](*at)))

        def select(c: Pair, x: Pair, y: Pair) -> Pair:
            expr = sympy.Piecewise((x[0], c[0]), (y[0], True))
            return expr > 0, lambda *at: (x[1](*at) if c[1](*at) else y[1](*at)) > 0

        return st.one_of(
            st.builds(joined(sympy.And, lambda x, y: x and y), inner, inner),
            st.builds(joined(sympy.Or, lambda x, y: x or y), inner, inner),
            st.builds(joined(sympy.Xor, lambda x, y: x != y), inner, inner),
            inner.map(lambda x: (sympy.Not(x[0]), lambda *at: not x[1](*at))),
            st.builds(select, inner, integers(), integers()),
        )

    return st.recursive(leaves, extend, max_leaves=3)


def dense(predicate: sympy.Basic, size: int) -> torch.Tensor:
    shape = (2, 2, N_QUERIES, N_KEYS)
    where = {
        name: torch.arange(extent).view([-1] + [1] * (3 - dim))
        for dim, (name, extent) in enumerate(zip(("b", "h", "q", "kv"), shape, strict=True))
    }
    mask = MaskExpr(predicate, ("int64",), 1)
    tables = [torch.tensor(TABLE)]
    return evaluate(mask, where, N_QUERIES, N_KEYS, tables, [size]).expand(shape)


@settings(max_examples=150, deadline=None)
@given(booleans(), st.integers(-5, 5), st.data())
def test_evaluate_agrees_with_python(pair: Pair, size: int, data: st.DataObject) -> None:
    predicate, value = pair
    found = dense(predicate, size)
    for _ in range(10):
        at = tuple(data.draw(st.integers(0, n - 1)) for n in (2, 2, N_QUERIES, N_KEYS))
        assert bool(found[at]) == bool(value(*at, size))


@settings(max_examples=150, deadline=None)
@given(booleans())
def test_text_round_trip(pair: Pair) -> None:
    mask = MaskExpr(pair[0], ("int64",), 1)
    again = MaskExpr.parse(mask.text)
    assert bool((dense(again.predicate, 3) == dense(mask.predicate, 3)).all())


@pytest.mark.parametrize("a", range(-7, 8))
@pytest.mark.parametrize("b", [-5, -3, -1, 1, 2, 8])
def test_integer_division_is_pythons(a: int, b: int) -> None:
    x = sympy.Symbol("s0", integer=True)
    assert FloorDiv(a, b) == a // b == FloorDiv(x, b).subs(x, a)
    assert FloorMod(a, b) == a % b == FloorMod(x, b).subs(x, a)
    assert bool(dense(sympy.Eq(FloorDiv(x, b), a // b), a).all())
    assert bool(dense(sympy.Eq(FloorMod(x, b), a % b), a).all())


@pytest.mark.parametrize(
    ("predicate", "text"),
    [
        (KV <= Q, "(<= kv q)"),
        (sympy.Eq(T0(B, Q), T0(B, KV)), "(== (t0 b q) (t0 b kv))"),
        (sympy.Ne(FloorMod(Q, 4), 0), "(!= (% q 4) 0)"),
        (sympy.Not(sympy.Eq(FloorDiv(Q, S0), 1)), "(!= (// q s0) 1)"),
        (sympy.true, "true"),
        (table(0)() > 0, "(> (t0) 0)"),
    ],
)
def test_spelling(predicate: sympy.Basic, text: str) -> None:
    assert to_text(predicate) == text
    assert from_text(text) == predicate


def test_lookups_outside_a_table_read_its_edge() -> None:
    beyond = MaskExpr(T0(KV + 10) > 0, ("bool",))
    where = {"q": torch.zeros(1).long(), "kv": torch.arange(3)}
    assert evaluate(beyond, where, 1, 3, [torch.tensor([False, True])]).tolist() == [True] * 3


def test_what_a_mask_depends_on() -> None:
    mask = MaskExpr(sympy.Eq(T0(B, Q), T0(B, KV)) & (KV <= Q), ("int64",))
    assert mask.depends_on(B)
    assert not mask.depends_on(H)
    assert mask.uses_table
    assert mask.lookups == (T0(B, KV), T0(B, Q))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown symbols"):
        MaskExpr(Q < size_symbol(0))
    with pytest.raises(ValueError, match="no dtype given for tables"):
        MaskExpr(T0(KV) > 0)


def test_fractions_that_sympy_introduces_are_cleared() -> None:
    expr = sympy.Piecewise((1, N_KV - N_Q < 2 * Q), (0, True)) > 0
    assert sympy.Rational(1, 2) in expr.atoms(sympy.Rational)
    expected = [N_KEYS - N_QUERIES < 2 * q for q in range(N_QUERIES)]
    assert dense(expr, 0)[0, 0, :, 0].tolist() == expected
    assert MaskExpr.parse(MaskExpr(expr).text) == MaskExpr(expr)


class _Counting:
    """An algebra that counts how often a node is computed."""

    def __init__(self) -> None:
        self.divisions = 0

    def integer(self, value: int) -> int:
        return value

    def symbol(self, name: str) -> int:
        return len(name)

    def operation(self, name: str, args: Sequence[int], expr: sympy.Basic) -> int:
        self.divisions += name == "//"
        return min(args)


def test_shared_terms_are_computed_once() -> None:
    counting = _Counting()
    chunk = FloorDiv(Q, 4)
    fold((chunk < KV) & (chunk < H), counting)  # type: ignore[arg-type]
    assert counting.divisions == 1


def test_unknown_nodes_are_named() -> None:
    with pytest.raises(UnsupportedNode, match="sin"):
        dense(sympy.sin(Q) < 0, 0)
    with pytest.raises(UnsupportedNode, match="without a default"):
        dense(sympy.Piecewise((Q, Q < KV)) < 3, 0)


def test_bits() -> None:
    words = torch.tensor([0, -1, 5, -(2**31), 2**31 - 1], dtype=torch.int32)
    mask = MaskExpr(sympy.Eq(Bit(table(0)(Q), FloorMod(KV, 32)), 1), ("int32",))
    assert MaskExpr.parse(mask.text) == mask
    where = {"q": torch.arange(5)[:, None], "kv": torch.arange(32)}
    expected = [[int(word) >> key & 1 == 1 for key in range(32)] for word in words]
    assert evaluate(mask, where, 5, 32, [words]).tolist() == expected
    assert [Bit(word, 31) for word in (0, -1, 5, -(2**31))] == [0, 1, 0, 1]
