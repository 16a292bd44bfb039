"""Simplification rules: each fires where it should, and none changes a value anywhere in range."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_compile.expr import KV, N_KV, N_Q, FloorDiv, FloorMod, MaskExpr, Q, evaluate
from sparse_compile.passes.lift.bounds import Linear, Ranges, linear
from sparse_compile.passes.lift.constants import recognise
from sparse_compile.passes.lift.simplify import Simplifier
from sparse_compile.passes.lift.value import DIMS

LENGTHS = (12, 20)
STATIC = Simplifier(Ranges({Q: sympy.Integer(LENGTHS[0] - 1), KV: sympy.Integer(LENGTHS[1] - 1)}))
SYMBOLIC = Simplifier(Ranges({Q: N_Q - 1, KV: N_KV - 1}))


def table(predicate: sympy.Basic, n_q: int, n_kv: int) -> torch.Tensor:
    coordinates = {"q": torch.arange(n_q)[:, None], "kv": torch.arange(n_kv)}
    coordinates |= {"b": torch.tensor(0), "h": torch.tensor(0)}
    return evaluate(MaskExpr(predicate), coordinates, n_q, n_kv).expand(n_q, n_kv)


RULES = [
    # Comparisons in one spelling.
    (Q >= KV, KV <= Q),
    (sympy.Gt(KV, Q - 8), Q - KV < 8),
    (sympy.Lt(2 * KV, 2 * Q + 1), KV <= Q),
    (sympy.Lt(KV - Q, 0), KV < Q),
    (sympy.Eq(2 * KV, 2 * Q + 1), sympy.false),
    (sympy.Eq(Q, KV), sympy.Eq(KV, Q)),
    # Known by the ranges.
    (KV < N_KV, sympy.true),
    (Q >= 0, sympy.true),
    (sympy.Ge(KV, N_KV), sympy.false),
    (sympy.Ne(Q + 1, 0), sympy.true),
    (sympy.Lt(KV, 1), sympy.Eq(KV, 0)),
    (sympy.Lt(FloorMod(KV, 4), 4), sympy.true),
    (sympy.Abs(Q - KV) >= 0, sympy.true),
    # Bounds on the same terms.
    ((KV <= Q) & (KV <= Q + 3), KV <= Q),
    ((KV <= Q) | (KV <= Q + 3), KV - Q < 4),
    ((KV <= Q) & (KV > Q), sympy.false),
    ((KV <= Q) | (KV > Q), sympy.true),
    ((KV <= Q) & (KV >= Q), sympy.Eq(KV, Q)),
    ((KV < Q) | (KV > Q), sympy.Ne(KV, Q)),
    # Mixed radix.
    (sympy.Lt(12 * Q + FloorMod(KV, 12), 36), Q < 3),
    (sympy.Ge(12 * Q + FloorMod(KV, 12), 36), Q >= 3),
    # A value beside other terms.
    (sympy.Eq(KV, 3) & (KV < Q), sympy.Eq(KV, 3) & (Q >= 4)),
    (sympy.Eq(KV, 3) & sympy.Ne(KV, 4), sympy.Eq(KV, 3)),
    (sympy.Ne(KV, 3) | (KV >= 4), sympy.Ne(KV, 3)),
    # Nested Ands and Ors.
    ((KV <= Q) & ((KV < 4) | (KV <= Q)), KV <= Q),
    ((KV <= Q) & ((KV < 4) | (KV > Q)), (KV < 4) & (KV <= Q)),
    ((KV <= Q) | ((KV < 4) & (KV <= Q)), KV <= Q),
    ((KV < 4) & ((KV < 8) | (Q < 3)), KV < 4),
    (
        (KV < 9) & (((KV < 4) & (Q < 4)) | ((KV < 8) & (Q < 2))),
        ((KV < 4) & (Q < 4)) | ((KV < 8) & (Q < 2)),
    ),
    (
        ((Q < 4) | (Q >= 8)) & (((KV < 4) & (Q < 4)) | ((KV < 8) & (Q >= 9))),
        ((KV < 4) & (Q < 4)) | ((KV < 8) & (Q >= 9)),
    ),
    (sympy.Not((KV <= Q) & (KV < 4), evaluate=False), (KV > Q) | (KV >= 4)),
    (
        sympy.Ne(Q, 5) & ((Q < 4) | (sympy.Eq(Q, 6) & (KV < 2))),
        (Q < 4) | (sympy.Eq(Q, 6) & (KV < 2)),
    ),
    (((KV <= Q) & (KV < 4)) | ((KV <= Q) & (Q < 9)), (KV <= Q) & ((KV < 4) | (Q < 9))),
    ((KV <= Q) | (sympy.Eq(KV, Q) & (Q < 9)), KV <= Q),
    # Integer division.
    (sympy.Eq(FloorDiv(8 * Q + 3, 8), KV), sympy.Eq(KV, Q)),
    (sympy.Eq(FloorMod(8 * Q + 11, 8), KV), sympy.Eq(KV, 3)),
    (sympy.Eq(FloorDiv(FloorDiv(KV, 2), 3), Q), sympy.Eq(FloorDiv(KV, 6), Q)),
    (FloorDiv(KV + 8, 8) <= FloorDiv(Q, 8) + 1, FloorDiv(KV, 8) <= FloorDiv(Q, 8)),
]


@pytest.mark.parametrize("before,after", RULES, ids=str)
def test_rules_fire(before: sympy.Basic, after: sympy.Basic) -> None:
    assert SYMBOLIC(before) == SYMBOLIC(after)
    assert sympy.count_ops(SYMBOLIC(before)) <= sympy.count_ops(before)
    for n_q, n_kv in itertools.product((1, 5, 12), (1, 6, 20)):
        assert torch.equal(table(before, n_q, n_kv), table(SYMBOLIC(before), n_q, n_kv))


def test_what_is_not_known_stays() -> None:
    assert SYMBOLIC(KV < 8) == (KV < 8)
    assert SYMBOLIC(Q < N_KV) == (Q < N_KV)
    assert SYMBOLIC(FloorDiv(Q - KV, 8) >= 0) != sympy.true
    for other in (35, 37):
        kept = SYMBOLIC(sympy.Lt(12 * Q + FloorMod(KV, 12), other))
        assert torch.equal(table(kept, 12, 20), table(12 * Q + FloorMod(KV, 12) < other, 12, 20))


terms = st.builds(
    lambda a, b, c: a * Q + b * KV + c,
    st.integers(-2, 2),
    st.integers(-2, 2),
    st.integers(-24, 24),
)
divided = st.builds(
    lambda kind, t, d: kind(t, sympy.Integer(d)),
    st.sampled_from([FloorDiv, FloorMod]),
    terms,
    st.integers(1, 9),
)
integers = st.one_of(
    terms,
    divided,
    st.builds(lambda d, t: d * 2 + t, divided, terms),
    st.builds(sympy.Abs, terms),
    st.builds(sympy.Min, terms, terms),
    st.builds(sympy.Max, terms, divided),
)
relations = st.builds(
    lambda kind, a, b: kind(a, b),
    st.sampled_from([sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge, sympy.Eq, sympy.Ne]),
    integers,
    integers,
)
predicates = st.recursive(
    relations,
    lambda inner: st.one_of(
        st.builds(sympy.And, inner, inner),
        st.builds(sympy.Or, inner, inner, inner),
        st.builds(sympy.Not, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(predicates)
def test_values_never_change(predicate: sympy.Basic) -> None:
    expected = table(predicate, *LENGTHS)
    assert torch.equal(table(STATIC(predicate), *LENGTHS), expected)
    assert torch.equal(table(SYMBOLIC(predicate), *LENGTHS), expected)


@settings(max_examples=100, deadline=None)
@given(integers, integers)
def test_bounds_hold(a: sympy.Expr, b: sympy.Expr) -> None:
    if STATIC.ranges.nonnegative(a - b):
        assert bool(table(sympy.Ge(a, b), *LENGTHS).all())


def test_normal_form() -> None:
    assert linear(KV > Q - 8) == Linear("le", Q - KV, 7)
    assert linear(sympy.Eq(3 * Q, 6)) == Linear("eq", Q, 2)
    assert linear(sympy.Le(2 * Q, 5)) == Linear("le", Q, 2)
    assert linear(sympy.Lt(sympy.Integer(3), 3, evaluate=False)) is False


# Constant tensors ------------------------------------------------------------


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3, 40, 4),
        torch.arange(24) // 6,
        torch.arange(24) % 6 // 2 * 5 + 1,
        torch.tensor([4]),
        torch.full((3, 5), 7),
        torch.tensor([1, 1, 0, 0, 1, 1, 1, 0]).bool(),
        torch.ones(9, 9).tril(2).triu(-3).bool(),
        torch.ones(6, 9).tril().bool(),
        torch.eye(4).bool().repeat_interleave(3, 0).repeat_interleave(2, 1),
        torch.where(torch.arange(12)[:, None] < 5, 0.0, float("-inf")).expand(12, 12),
        torch.tensor([0.0, float("nan"), 0.0]),
        torch.zeros(0, 3),
    ],
    ids=lambda t: str(tuple(t.shape)),
)
def test_constants_are_recognised(tensor: torch.Tensor) -> None:
    element = recognise(tensor)
    if tensor.isnan().any():
        return
    assert element is not None
    for index in itertools.product(*map(range, tensor.shape)):
        at = dict(zip(DIMS, map(sympy.Integer, index)))  # noqa: B905
        if isinstance(element, sympy.Basic):
            assert bool(element.xreplace(at)) == bool(tensor[index])
        else:
            (value,) = (v for c, v in element if c.xreplace(at) == sympy.true)
            value = value.xreplace(at) if isinstance(value, sympy.Basic) else value
            assert float(value) == tensor[index].item()


def test_noise_is_not_recognised() -> None:
    noise = torch.rand(40, 40, generator=torch.Generator().manual_seed(0))
    assert recognise(noise < 0.5) is None
    assert recognise(noise) is None
