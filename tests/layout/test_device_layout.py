"""Generated kernels that list blocks: deterministic, compiled without a GPU, equal to the CPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.codegen.entry import Entry, Kind
from sparse_compile.codegen.triton.aot import compiled
from sparse_compile.codegen.triton.layout.key import LONGEST, Key
from sparse_compile.codegen.triton.layout.printed import Code, printed
from sparse_compile.codegen.triton.layout.source import digit_bounds, module_of
from sparse_compile.layout import extents
from sparse_compile.layout.intervals import INT64_MAX, INT64_MIN, Span, point, span
from sparse_compile.spec.view import Order
from tests.layout.device_cases import CASES, DeviceCase, residues
from tests.layout.test_intervals import relations

ROOT = Path(__file__).parent.parent.parent
NAMED = {case.name: case for case in CASES}
COMPILED = ("all at once", "pairs", "padding", "columns", "boxes", "size beyond int32")


def key_of(case: DeviceCase) -> Key:
    return Key.of(case.mask, [case.size], case.q, case.kv)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_text_is_the_same_each_time_and_fits_the_page(case: DeviceCase) -> None:
    text = module_of(key_of(case)).source
    assert text == module_of(key_of(case)).source
    compile(text, case.name, "exec")
    assert "$" not in text
    assert str(ROOT) not in text


def test_lengths_and_most_sizes_share_a_module() -> None:
    case = NAMED["window"]
    keys = {Key.of(case.mask, [size], case.q, case.kv) for size in (1, 7, 100)}
    assert len(keys) == 1
    divided = NAMED["divided by a size"].mask
    assert Key.of(divided, [7], case.q, case.kv).fixed == (7,)
    assert Key.of(case.mask, [1 << 40], case.q, case.kv).fixed == (1 << 40,)


@pytest.mark.parametrize(
    ("name", "arch"),
    [*((name, 90) for name in COMPILED), ("all at once", 80), ("all at once", 100)],
)
def test_the_kernels_compile(name: str, arch: int) -> None:
    kernel = compiled(module_of(key_of(NAMED[name])), arch)
    lists = {"list_rows", "fill_rows", "list_cols", "fill_cols"}
    assert set(kernel.resources) in (lists, lists | {"read_tables"})
    for used in kernel.resources.values():
        assert "st.global" in used.ptx
        assert ".local" not in used.ptx


@pytest.mark.parametrize("name", ["all at once", "boxes"])
def test_the_kernels_compile_for_hosts_that_wait_for_nothing(name: str) -> None:
    """They are given no place for totals, and add nothing up."""
    kernel = module_of(key_of(NAMED[name]))
    listing = [entry for entry in kernel.entries if entry.name.startswith("list_")]
    assert len(listing) == 2

    def without_totals(entry: Entry) -> Entry:
        lines = (
            tuple(replace(p, kind=Kind.CONSTANT) if p.name == "totals" else p for p in line)
            for line in entry.lines
        )
        return replace(entry, lines=tuple(lines))

    found = compiled(replace(kernel, entries=tuple(map(without_totals, listing))), 90).resources
    whole = compiled(kernel, 90).resources
    for label, used in found.items():
        assert "atom." in whole[label].ptx or "red." in whole[label].ptx
        assert "atom." not in used.ptx
        assert "red." not in used.ptx
        assert ".local" not in used.ptx


def run(results: dict[str, Any], **values: Tensor) -> dict[str, Any]:
    """What the printed lines compute, by torch; int32 wraps around as in a kernel."""
    language = SimpleNamespace(
        minimum=_promoted(torch.minimum),
        maximum=_promoted(torch.maximum),
        where=torch.where,
        full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
        int64=torch.int64,
        int1=torch.bool,
    )
    scope: dict[str, Any] = {
        "tl": language,
        "floor_div": lambda a, b: a // b,
        "floor_mod": lambda a, b: a % b,
        "LEAST": INT64_MIN,
        "GREATEST": INT64_MAX,
        **values,
    }
    exec("\n".join(printed(results)), scope)
    return {name: scope[name] for name in results}


def _promoted(function: Any) -> Any:
    return lambda a, b: function(*torch.broadcast_tensors(*map(torch.as_tensor, (a, b))))


def ends(low: int, high: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    pair = st.tuples(st.integers(low, high), st.integers(0, 40)).map(lambda p: (p[0], sum(p)))
    return st.lists(pair, min_size=6, max_size=6)


@settings(max_examples=150, deadline=None)
@given(relations(), ends(0, 60), ends(0, 60), ends(-20, 20), st.integers(-30, 30))
def test_printed_analysis_is_the_analysis(
    relation: sympy.Basic,
    q: list[tuple[int, int]],
    kv: list[tuple[int, int]],
    entries: list[tuple[int, int]],
    size: int,
) -> None:
    symbols: dict[str, Span] = {}
    codes: dict[str, Span] = {}
    values: dict[str, Tensor] = {}
    for name, pairs in (("q", q), ("kv", kv)):
        lo, hi = torch.tensor(pairs).unbind(1)
        symbols[name] = Span(lo, hi, 1, LONGEST + 1)
        values |= {f"{name}_lo": lo.int(), f"{name}_hi": hi.int()}
        code: Any = [Code.named(f"{name}_{end}", 0, LONGEST) for end in ("lo", "hi")]
        codes[name] = Span(*code, 1, LONGEST + 1)
    lo, hi = torch.tensor(entries).unbind(1)
    values |= {"t_lo": lo.int(), "t_hi": hi.int()}
    read: Any = [Code.named(name, -(1 << 31), (1 << 31) - 1) for name in ("t_lo", "t_hi")]
    symbols["s0"] = codes["s0"] = point(size)
    wanted = span(relation, symbols, lambda *_: Span(lo, hi, 1, 1 << 32))
    code = span(relation, codes, lambda *_: Span(*read, 1, 1 << 32))
    found = run({"must": code.lo, "may": code.hi}, **values)
    must, may = (torch.as_tensor(found[name]).bool().expand(6) for name in ("must", "may"))
    # What is printed knows the range of every value besides, so it may settle more, never less.
    assert (must | ~torch.as_tensor(wanted.lo).expand(6)).all()
    assert (~may | torch.as_tensor(wanted.hi).expand(6)).all()
    for at in itertools.product((0, 1, 2), (0, 1, 2), (0, 2)):
        holds = at_points(relation, size, *map(inside, (q, kv, entries), at))
        assert (may | ~torch.as_tensor(holds.lo).expand(6)).all(), "it holds somewhere"
        assert (~must | torch.as_tensor(holds.hi).expand(6)).all(), "it does not hold everywhere"


def inside(pairs: list[tuple[int, int]], half: int) -> Tensor:
    """A point of each range: its least one, one in the middle, or its greatest one."""
    return torch.tensor([lo + (hi - lo) * half // 2 for lo, hi in pairs])


def at_points(relation: sympy.Basic, size: int, q: Tensor, kv: Tensor, entry: Tensor) -> Span:
    """The truth of a relation at one point of each rectangle, as an interval."""
    coordinates = {"q": point(q, LONGEST), "kv": point(kv, LONGEST), "s0": point(size)}
    return span(relation, coordinates, lambda *_: point(entry, 1 << 32))


ORDERS = [
    Order((8,)),
    residues(16, 4),
    Order((2, 4), (16,), (0, 1), ((12, 16),)),
    Order((4, 4), (8,), (0, 1)),
    Order((1, 2, 4), (6, 8), (0, 2, 1)),
]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(1, 400), st.sampled_from([1, 4, 128]))
def test_printed_digits_are_the_digits(order: Order, n: int, size: int) -> None:
    first = torch.arange(order.blocks(n))
    key = Key("", order, order)
    sides = extents.cut(order, n, extents.digits(order, n, first, size))
    wanted = [end for side in sides for end in side]
    wanted.append(extents.whole(order, n, first, size))
    length = torch.tensor(n, dtype=torch.int32)
    found = run(digit_bounds(key, "q"), n=length, first=first.int(), size=torch.tensor(size))
    for mine, its in zip(found.values(), wanted, strict=True):
        expected = torch.as_tensor(its).expand(first.shape)
        assert torch.equal(torch.as_tensor(mine).expand(first.shape).to(expected.dtype), expected)


def test_code_says_what_it_is() -> None:
    x, y = Code.named("x", 0, 1 << 20), Code.named("y", -5, 1 << 40)
    minus = -x
    lines = printed(
        {
            "settled": x < -1,
            "narrow": x * 64 - x,
            "wide": x * (1 << 20),
            "down": (x - 3) // 5,
            "shifted": y // 8 + y % 8,
            "double": -minus + 0,
        }
    )
    assert set(lines) == {
        "settled = tl.full([], 0, tl.int1)",
        "narrow = (x * 64) - x",
        "wide = x.to(tl.int64) * 1048576",
        "down = floor_div(x - 3, 5)",
        "shifted = (y >> 3) + (y & 7)",
        "double = x",
    }
    with pytest.raises(TypeError, match="no truth value"):
        bool(x < 5)
