"""Printed predicates mean what evaluate() says: executed as Python, with Triton's division."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.codegen.triton.predicate import print_predicate
from sparse_compile.expr import (
    KV,
    N_KV,
    B,
    Bit,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    dense_bit,
    evaluate,
    table,
)
from sparse_compile.expr import size_symbol as size

S0, S1 = size(0), size(1)
T0, T1 = table(0), table(1)
N_QUERIES, N_KEYS = 11, 13


class Truncating:
    """An integer tensor whose // and % round towards zero, as Triton's do."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __floordiv__(self, other: object) -> Truncating:
        return Truncating(torch.div(self.value, plain(other), rounding_mode="trunc"))

    def __mod__(self, other: object) -> Truncating:
        return Truncating(torch.fmod(self.value, plain(other)))

    def to(self, dtype: torch.dtype) -> Truncating:
        return Truncating(self.value.to(dtype))

    def __neg__(self) -> Truncating:
        return Truncating(-self.value)

    def __invert__(self) -> Truncating:
        return Truncating(~self.value)


def plain(x: object) -> Tensor:
    return x.value if isinstance(x, Truncating) else torch.as_tensor(x)


def _binary(name: str):
    def method(self: Truncating, other: object) -> Truncating:
        return Truncating(getattr(self.value, name)(plain(other)))

    return method


for _name in "add sub mul lt le gt ge eq ne and or rshift".split():
    setattr(Truncating, f"__{_name}__", _binary(f"__{_name}__"))
for _name in ("add", "sub", "mul"):
    setattr(Truncating, f"__r{_name}__", _binary(f"__r{_name}__"))


def language(tables: list[Tensor]) -> dict[str, object]:
    """What printed lines refer to. A pointer is (table number, indices seen so far)."""

    class Pointer(SimpleNamespace):
        def __add__(self, index: object) -> Pointer:
            return Pointer(table=self.table, indices=[*self.indices, plain(index)])

    def load(pointer: Pointer, mask: object = None, other: int = 0) -> Truncating:
        values = tables[pointer.table]
        inside = [i.clamp(0, n - 1) for i, n in zip(pointer.indices, values.shape, strict=True)]
        return Truncating(values[tuple(inside)])

    names: dict[str, object] = {
        "tl": SimpleNamespace(
            load=load,
            where=lambda c, a, b: Truncating(torch.where(plain(c), plain(a), plain(b))),
            minimum=lambda a, b: Truncating(torch.minimum(plain(a), plain(b))),
            maximum=lambda a, b: Truncating(torch.maximum(plain(a), plain(b))),
            abs=lambda a: Truncating(plain(a).abs()),
            int32=torch.int32,
            int64=torch.int64,
        ),
        "table_offset": lambda index, n, stride: Truncating(plain(index)),
    }
    for number, values in enumerate(tables):
        names[f"t{number}"] = Pointer(table=number, indices=[])
        for axis in range(values.dim()):
            names |= {f"t{number}_size{axis}": 0, f"t{number}_stride{axis}": 1}
    return names


def helpers() -> str:
    from sparse_compile.codegen.triton.text.common import HELPERS

    texts = [HELPERS[name] for name in ("floor_div", "floor_mod")]
    return "\n".join(texts).replace("@triton.jit\n", "")


def printed_value(
    mask: MaskExpr, axis: str, tables: list[Tensor], sizes: tuple[int, ...]
) -> Tensor:
    printed = print_predicate(mask, axis)
    names = language(tables)
    names |= {
        "q": Truncating(torch.arange(N_QUERIES, dtype=torch.int32)[:, None]),
        "kv": Truncating(torch.arange(N_KEYS, dtype=torch.int32)[None]),
    }
    # In Triton a scalar promotes like any tensor; in torch only if it has dimensions.
    for name, value in {"b": 1, "h": 2, "n_q": N_QUERIES, "n_kv": N_KEYS}.items():
        names[name] = Truncating(torch.tensor([[value]], dtype=torch.int32))
    for i, value in enumerate(sizes):
        dtype = torch.int32 if -(2**31) <= value < 2**31 else torch.int64
        names[f"s{i}"] = Truncating(torch.tensor([[value]], dtype=dtype))
    exec(helpers(), names)
    for line in (*printed.before, *printed.inside):
        exec(line, names)
    return plain(eval(printed.keep, names)) if printed.keep else torch.tensor(True)


def true_value(mask: MaskExpr, tables: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    coordinates = {
        "b": torch.tensor([[1]]),
        "h": torch.tensor([[2]]),
        "q": torch.arange(N_QUERIES)[:, None],
        "kv": torch.arange(N_KEYS)[None],
    }
    return evaluate(mask, coordinates, N_QUERIES, N_KEYS, tables, sizes)


TABLES = [torch.randint(-4, 5, (3, 13)), torch.randint(0, 2, (13,)).bool()]
DIVISORS = st.sampled_from([-3, 2, 4]).map(sympy.Integer)


def grown(inner: st.SearchStrategy[sympy.Expr]) -> st.SearchStrategy[sympy.Expr]:
    return st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a - b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(FloorDiv, inner, DIVISORS),
        st.builds(FloorMod, inner, DIVISORS),
        st.builds(sympy.Min, inner, leaves),
        st.builds(sympy.Max, leaves, inner),
        inner.map(sympy.Abs),
        inner.map(lambda a: T0(B, a)),
        inner.map(T1),
        st.builds(lambda a, b: Bit(T1(a) - 2, FloorMod(b, 32)), inner, inner),
        st.builds(lambda a, b: sympy.Piecewise((a, b < 2), (b, True)), inner, inner),
    )


leaves = st.sampled_from([Q, KV, B, H, N_KV, S0, S1]) | st.integers(-5, 5).map(sympy.Integer)
integers = st.recursive(leaves, grown, max_leaves=4)
comparisons = st.builds(
    lambda make, a, b: make(a, b),
    st.sampled_from([sympy.Le, sympy.Lt, sympy.Eq, sympy.Ne]),
    integers,
    integers,
)
predicates = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.builds(sympy.And, inner, inner), st.builds(sympy.Or, inner, inner), inner.map(sympy.Not)
    ),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None)
@given(predicates, st.sampled_from(["q", "kv"]), st.tuples(*[st.integers(-9, 9)] * 2))
def test_printed_text_means_the_predicate(
    predicate: sympy.Basic, axis: str, sizes: tuple[int, int]
) -> None:
    mask = MaskExpr(predicate, ("int64", "bool"), 2)
    ours = printed_value(mask, axis, TABLES, sizes).expand(N_QUERIES, N_KEYS)
    assert torch.equal(ours, true_value(mask, TABLES, sizes).expand(N_QUERIES, N_KEYS))


@pytest.mark.parametrize("s0", [2**31 - 1, 2**31 + 7, -(2**31), 2**40])
@pytest.mark.parametrize(
    "predicate",
    [KV <= Q + S0, KV - S0 > Q * 3, Q * S0 <= KV * 1000 * 1000 * 1000, S0 + Q + S1 >= KV],
    ids=str,
)
def test_no_sum_or_product_overflows(predicate: sympy.Basic, s0: int) -> None:
    mask = MaskExpr(predicate, n_sizes=2)
    for axis in ("q", "kv"):
        ours = printed_value(mask, axis, [], (s0, 2**31 - 1)).expand(N_QUERIES, N_KEYS)
        assert torch.equal(ours, true_value(mask, [], (s0, 2**31 - 1)).expand(ours.shape))


def test_a_square_keeps_both_factors() -> None:
    mask = MaskExpr(Q * Q <= KV * KV * KV + Q + Q)
    ours = printed_value(mask, "kv", [], ()).expand(N_QUERIES, N_KEYS)
    assert torch.equal(ours, true_value(mask, [], ()))


def test_divisions_proven_non_negative_stay_plain() -> None:
    printed = print_predicate(MaskExpr(sympy.Eq(FloorDiv(Q, 64), FloorDiv(KV, 64))), "kv")
    assert sorted(printed.keep.split(" == ")) == ["kv // 64", "q // 64"]
    assert not printed.helpers
    printed = print_predicate(MaskExpr(sympy.Eq(FloorDiv(Q - KV, 64), 0)), "kv")
    assert printed.inside == ("x_0 = floor_div(q - kv, 64)",)
    assert printed.helpers == {"floor_div"}


def test_lookups_leave_the_loop_that_they_do_not_depend_on() -> None:
    mask = MaskExpr(sympy.Eq(T0(B, Q), T0(B, KV)) & (Q - KV < T1(H)), ("int64", "int32"))
    over_keys, over_queries = (print_predicate(mask, axis) for axis in ("kv", "q"))
    assert [line.split(" = ")[0] for line in over_keys.before] == ["t1_h", "t0_b_q"]
    assert [line.split(" = ")[0] for line in over_keys.inside] == ["t0_b_kv"]
    assert [line.split(" = ")[0] for line in over_queries.inside] == ["t0_b_q"]


@pytest.mark.parametrize("axis", ["q", "kv"])
def test_bits_of_a_dense_mask(axis: str) -> None:
    mask = MaskExpr(sympy.Ne(dense_bit(0, ["q", "kv"]), 0), ("int32",))
    printed = print_predicate(mask, axis)
    assert printed.keep == "(t0_at >> (kv % 32)) & 1 != 0"
    assert "(kv // 32" in printed.inside[0]
    words = torch.randint(-(2**31), 2**31, (1, 1, N_QUERIES, 1)).to(torch.int32)
    ours = printed_value(mask, axis, [words], ())
    expected = [[int(word) >> key & 1 == 1 for key in range(N_KEYS)] for word in words.flatten()]
    assert torch.equal(ours, torch.tensor(expected))


def test_a_shared_term_is_computed_once() -> None:
    distance = sympy.Abs(Q - 2 * KV)
    printed = print_predicate(MaskExpr((distance < 8) | sympy.Eq(FloorMod(distance, 5), 0)), "kv")
    text = "\n".join([*printed.inside, printed.keep])
    assert text.count("tl.abs") == 1


def test_constants() -> None:
    assert print_predicate(MaskExpr(sympy.true), "kv").keep == ""
    assert not printed_value(MaskExpr(sympy.false), "kv", [], ()).any()
    assert math.prod(printed_value(MaskExpr(sympy.false), "kv", [], ()).shape) == N_KEYS


def test_a_number_in_memory_is_not_called_as_its_pointer() -> None:
    # A kernel reads it in a loop over the heads of a group, and needs the pointer again.
    printed = print_predicate(MaskExpr((KV <= Q) & (KV < T0()), ("int64",)), "q")
    assert printed.before == ("t0_at = tl.load(t0)",)
