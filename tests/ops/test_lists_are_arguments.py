"""Attention visits what its arguments list: it builds, looks up and waits for nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from sparse_compile.expr import KV, B, FloorMod, MaskExpr, Q, table
from sparse_compile.layout import Layout, Schedule, build_views, layout, lists, schedule
from sparse_compile.layout.lists import listed_views, lists_of, unpack
from sparse_compile.layout.superset import ProblemShape
from sparse_compile.layout.views.split_views import choose_views
from sparse_compile.ops import ATTENTION, LAYOUT
from sparse_compile.ops.attention import attention_backward
from sparse_compile.spec import AttentionSpec
from tests.handed_in import worklists_on_the_cpu

CPU = torch.device("cpu")
BATCH, HEADS, KV_HEADS, N = 2, 4, 2, 500
SHAPE = ProblemShape(BATCH, HEADS, N, N)
WORKERS = 64

MASKS = {
    "window": MaskExpr((KV <= Q) & (Q - KV < 40)),
    "a global token": MaskExpr((sympy.Abs(Q - KV) < 8) | sympy.Eq(Q, 3) | sympy.Eq(KV, 3)),
    "several views": MaskExpr((KV <= Q) & ((Q - KV < 16) | sympy.Eq(FloorMod(Q - KV, 16), 0))),
    "padding": MaskExpr(sympy.Ne(table(0)(B, KV), 0) & (KV <= Q), ("bool",)),
    "nothing": MaskExpr(sympy.false),
}


def spec_of(mask: MaskExpr) -> AttentionSpec:
    return choose_views(mask, ProblemShape(1, 1, 2000, 2000), (16, 16))[0]


def tables_of(mask: MaskExpr) -> list[Tensor]:
    return [torch.arange(N) > torch.tensor([[30], [0]])] if mask.tables else []


def built(mask: MaskExpr) -> Layout:
    return build_views(spec_of(mask), SHAPE, tables=tables_of(mask))


@pytest.fixture
def worklists() -> Iterator[None]:
    """Lists as kernels on a GPU get them."""
    with worklists_on_the_cpu(WORKERS):
        yield


def listed() -> Layout:
    """The layout of blocks that a selection names."""
    spec = AttentionSpec.of_listed_blocks(MaskExpr(KV <= Q), 64, 64)
    index = torch.arange(3, dtype=torch.int32).expand(BATCH, KV_HEADS, 8, 3).contiguous()
    count = torch.full((BATCH, KV_HEADS, 8), 3, dtype=torch.int32)
    return listed_views(spec, SHAPE, [], [], [index, count])


LAYOUTS: dict[str, Callable[[], Layout]] = {
    **{name: lambda mask=mask: built(mask) for name, mask in MASKS.items()},
    "listed": listed,
}


def same(a: Schedule, b: Schedule) -> bool:
    tensors = torch.equal(a.items, b.items) and torch.equal(a.merges, b.merges)
    return tensors and (a.heavy, a.slots) == (b.heavy, b.slots)


@pytest.mark.usefixtures("worklists")
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_unpacked_is_what_was_built(name: str) -> None:
    made = LAYOUTS[name]()
    again = unpack(made.spec, lists_of(made, KV_HEADS, CPU), SHAPE)
    for view, its in zip(again.views, made.views, strict=True):
        assert torch.equal(view.kinds(), its.kinds())
        for c in range(view.classes):
            found, wanted = view.cols.entries(c), its.cols.entries(c)
            assert all(map(torch.equal, found, wanted))
    for axis, heads in (("q", HEADS), ("kv", KV_HEADS)):
        found = again.schedules(axis, BATCH * heads, WORKERS, CPU)
        wanted = made.schedules(axis, BATCH * heads, WORKERS, CPU)
        assert len(found) == len(made.spec.sections(axis))
        assert all(map(same, found, wanted))


def test_rows_are_split_and_sections_several() -> None:
    """Otherwise the test above says little."""
    assert any(work.slots for work in built(MASKS["a global token"]).schedules("q", 1, 64, CPU))
    assert len(spec_of(MASKS["several views"]).parts) > 1


@pytest.mark.usefixtures("worklists")
@pytest.mark.parametrize("name", LAYOUTS)
def test_kernels_get_aligned_lists(name: str) -> None:
    """They are compiled once for all lengths, and read 16 bytes at a time."""
    made = LAYOUTS[name]()
    again = unpack(made.spec, lists_of(made, KV_HEADS, CPU), SHAPE)
    found = [t for view in again.views for t in view.rows.tensors()]
    found += [t for view in again.views if not view.listed for t in view.cols.tensors()]
    works = [work for axis in ("q", "kv") for work in again.schedules(axis, 1, 1, CPU)]
    found += [t for work in works for t in (work.items, work.merges)]
    assert all(t.is_contiguous() and t.storage_offset() % 4 == 0 for t in found)


@pytest.mark.usefixtures("worklists")
@pytest.mark.parametrize("name", ["window", "listed"])
def test_lists_that_are_written_to_are_read_again(name: str) -> None:
    """What is made of the columns of a selection is no view of its lists."""
    made = LAYOUTS[name]()
    held = [t.clone() for t in lists_of(made, KV_HEADS, CPU)]

    def columns() -> Tensor:
        return lists.assembled(made.spec, held, SHAPE, ()).views[0].cols.counts

    assert columns().any()
    held[0].zero_()
    assert not columns().any()


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    heads = HEADS, KV_HEADS, KV_HEADS
    return [torch.randn(BATCH, h, N, 16, requires_grad=True) for h in heads]


def layout_call(mask: MaskExpr) -> tuple[Any, ...]:
    shape = BATCH, HEADS, N, N, KV_HEADS
    return tables_of(mask), "[]", [], *shape, spec_of(mask).text, CPU, []


@pytest.mark.usefixtures("worklists")
@pytest.mark.parametrize("name", MASKS)
def test_attention_builds_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = MASKS[name]
    given, call = LAYOUT(*layout_call(mask)), operands()

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("attention builds")

    for module, builder in (
        *((layout, name) for name in ("make_schedule", "build_layout", "device_layout")),
        *((layout, name) for name in ("build_views", "_schedules", "_load", "candidates")),
        *((lists, name) for name in ("build_views", "static_lists", "listed_layout", "lists_of")),
        *((schedule, name) for name in ("_all_lines", "_whole_lines", "_sorted_schedule")),
    ):
        monkeypatch.setattr(module, builder, fail)
    out, lse = ATTENTION(*call, [], tables_of(mask), [], given, 0.25, spec_of(mask).text)
    out.sum().backward()
    assert all(t.grad is not None for t in call)
    assert lse.shape == (BATCH, HEADS, N)


@pytest.mark.usefixtures("worklists")
@pytest.mark.parametrize("name", ["a global token", "padding"])
def test_operators_fit_torch_with_worklists(name: str) -> None:
    mask = MASKS[name]
    given = layout_call(mask)
    torch.library.opcheck(LAYOUT, given)
    call = *operands(), [], tables_of(mask), [], LAYOUT(*given), 0.25, spec_of(mask).text
    torch.library.opcheck(ATTENTION, call, test_utils=("test_schema", "test_faketensor"))


def test_only_what_may_look_at_the_host_stays_out_of_cuda_graphs() -> None:
    unsafe = torch.Tag.cudagraph_unsafe
    assert unsafe in LAYOUT.tags
    assert unsafe not in ATTENTION.tags
    assert unsafe not in attention_backward._opoverload.tags


def test_results_of_a_cached_layout_may_be_overwritten() -> None:
    given = layout_call(MASKS["window"])
    first = LAYOUT(*given)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()
    assert all(map(torch.equal, LAYOUT(*given), kept))
