"""Views are disjoint, together are the mask, and are what a person would choose."""

from __future__ import annotations

import time
from random import Random
from unittest import mock

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.core.function import AppliedUndef
from torch import Tensor

from sparse_compile.codegen.generators import block_shapes
from sparse_compile.expr import (
    KV,
    N_KV,
    N_Q,
    B,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    evaluate,
    table,
)
from sparse_compile.layout import build_layout, mask_pairs
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.layout.views import split_views as module
from sparse_compile.layout.views.split_views import Search, Split, split_views
from sparse_compile.layout.views.terms import MOST_TERMS, periods, terms, window_of, without
from sparse_compile.layout.views.view_candidates import Blocks, box_along, candidates
from sparse_compile.layout.views.visits import visits
from sparse_compile.patterns import Axial, Neighborhood, SlidingTile, Strided
from sparse_compile.patterns.base import Pattern, Tables
from sparse_compile.spec.view import Order, View, natural

CAUSAL = KV <= Q
DOCS = sympy.Eq(table(0)(B, Q), table(0)(B, KV))
HEADS = 4


def masks(predicate: sympy.Basic) -> MaskExpr:
    return MaskExpr(predicate, ("int64",) if predicate.atoms(AppliedUndef) else ())


def dense(predicate: sympy.Basic, n_q: int, n_kv: int) -> Tensor:
    """bool [heads, n_q, n_kv], from the definition."""
    where = {
        "b": torch.zeros(1, dtype=torch.int64),
        "h": torch.arange(HEADS)[:, None, None],
        "q": torch.arange(n_q)[:, None],
        "kv": torch.arange(n_kv),
    }
    allowed = evaluate(masks(predicate), where, n_q, n_kv, [documents(n_q, n_kv)])
    return allowed.expand(HEADS, n_q, n_kv)


def documents(n_q: int, n_kv: int) -> Tensor:
    return torch.arange(max(n_q, n_kv))[None] // 13


def contained(order: Order, n: int) -> Tensor:
    """bool [n]: the tokens that belong to a block."""
    tokens = torch.tensor(order.tokens(n)).flatten()
    assert tokens.unique().numel() == tokens.numel()
    found = torch.zeros(n, dtype=torch.bool)
    found[tokens[tokens < n]] = True
    return found


def check_contract(
    predicate: sympy.Basic, views: tuple[View, ...], n_q: int, n_kv: int, block: int
) -> None:
    seen = torch.zeros(HEADS, n_q, n_kv, dtype=torch.bool)
    for view in views:
        assert view.q.block == view.kv.block == block
        own = dense(view.predicate, n_q, n_kv)
        assert not (own & seen).any(), "two views hold the same pair"
        inside = contained(view.q, n_q)[:, None] & contained(view.kv, n_kv)
        assert not (own & ~inside).any(), "a pair lies outside the blocks of its view"
        check_layout(view, own)
        seen |= own
    assert torch.equal(seen, dense(predicate, n_q, n_kv))


def check_layout(view: View, own: Tensor) -> None:
    """The layout visits every pair, and nothing that is FULL is forbidden."""
    _, n_q, n_kv = own.shape
    mask = masks(view.predicate)
    tables = [documents(n_q, n_kv)] if mask.tables else []
    layout = build_layout(
        Problem.of(mask, ProblemShape(1, HEADS, n_q, n_kv), (view.q, view.kv)), tables
    )
    assert mask_pairs(mask, layout, 1, HEADS, tables) == int(own.sum())


def atoms() -> st.SearchStrategy[sympy.Basic]:
    small, stride = st.integers(0, 20), st.integers(2, 24)
    side = st.sampled_from([Q, KV])
    return st.one_of(
        st.just(CAUSAL),
        st.just(DOCS),
        st.builds(lambda w: sympy.Abs(Q - KV) <= w, small),
        st.builds(lambda p: KV < p, small),
        st.builds(lambda h: H < h, st.integers(1, 3)),
        st.builds(lambda s, r: sympy.Eq(FloorMod(Q - KV, s), r), stride, small),
        st.builds(lambda s: sympy.Eq(FloorMod(Q, s), FloorMod(KV, s)), stride),
        st.builds(lambda s: sympy.Eq(FloorMod(Q + N_KV - N_Q - KV, s), 0), stride),
        st.builds(lambda x, s, r: FloorMod(x, s) >= r, side, stride, small),
        st.builds(lambda x, s, r: FloorMod(x, s) >= s - 1 - r % s, side, stride, small),
        st.builds(lambda x, s, r: sympy.Eq(FloorMod(x + 2, s), r % s), side, stride, small),
        st.builds(lambda c: sympy.Eq(FloorDiv(Q, c), FloorDiv(KV, c)), stride),
        st.builds(grid, st.integers(2, 5), st.integers(2, 6), st.integers(0, 3)),
    )


def grid(h: int, w: int, reach: int) -> sympy.Basic:
    """Near in rows and in columns, of planes of h x w cells in one plane."""
    row, column = (
        [FloorMod(FloorDiv(x, w), h) for x in (Q, KV)],
        [FloorMod(x, w) for x in (Q, KV)],
    )
    near = [sympy.Abs(a - b) <= reach for a, b in (row, column)]
    return sympy.And(sympy.Eq(FloorDiv(Q, h * w), FloorDiv(KV, h * w)), *near)


def predicates() -> st.SearchStrategy[sympy.Basic]:
    """Mostly an Or of patterns, as people write them; sometimes anything."""
    both = st.lists(atoms(), min_size=1, max_size=3).map(lambda parts: sympy.And(*parts))
    either = st.lists(both, min_size=2, max_size=4).map(lambda parts: sympy.Or(*parts))
    within = st.tuples(atoms(), either).map(lambda parts: sympy.And(*parts))

    def extend(inner: st.SearchStrategy[sympy.Basic]) -> st.SearchStrategy[sympy.Basic]:
        pair = st.tuples(inner, inner)
        return st.one_of(
            pair.map(lambda p: sympy.And(*p)),
            pair.map(lambda p: sympy.Or(*p)),
            inner.map(sympy.Not),
        )

    return st.one_of(either, within, st.recursive(either, extend, max_leaves=2))


LENGTHS = st.integers(1, 70)


@settings(max_examples=75, deadline=None)
@given(predicates(), LENGTHS, LENGTHS, st.randoms(use_true_random=False))
def test_every_split_is_the_mask(
    predicate: sympy.Basic, n_q: int, n_kv: int, random: Random
) -> None:
    """Whatever orders the terms take; which they are is a matter of cost."""
    search = Search(masks(predicate), ProblemShape(1, HEADS, n_q, n_kv), (8, 8))
    parts = terms(predicate)
    assignment = tuple(random.choice(list(candidates(part, search.blocks))) for part in parts)
    check_contract(predicate, search.views(parts, assignment), n_q, n_kv, 8)


@settings(max_examples=20, deadline=None)
@given(predicates(), LENGTHS, LENGTHS)
def test_splits_that_do_not_pay_are_right(predicate: sympy.Basic, n_q: int, n_kv: int) -> None:
    search = Search(masks(predicate), ProblemShape(1, HEADS, n_q, n_kv), (8, 8))
    for views in search.splits():
        check_contract(predicate, views, n_q, n_kv, 8)


@settings(max_examples=30, deadline=None)
@given(predicates(), LENGTHS, LENGTHS, LENGTHS)
def test_a_split_holds_for_other_lengths(
    predicate: sympy.Basic, n: int, n_q: int, n_kv: int
) -> None:
    with mock.patch.object(module, "MERGE_PAIRS", 0), mock.patch.object(module, "REORDERED", 0.5):
        split = split_views.__wrapped__(
            masks(predicate), ProblemShape(1, HEADS, n, n), block=(8, 8)
        )
    check_contract(predicate, split.views, n_q, n_kv, 8)


@settings(max_examples=50, deadline=None)
@given(predicates(), LENGTHS, LENGTHS)
def test_terms_are_the_predicate(predicate: sympy.Basic, n_q: int, n_kv: int) -> None:
    found = terms(predicate)
    assert len(found) <= MOST_TERMS
    parts = [dense(term, n_q, n_kv) for term in found]
    assert torch.equal(torch.stack(parts).any(0), dense(predicate, n_q, n_kv))
    for count, term in enumerate(found):
        rest = dense(without(term, found[:count]), n_q, n_kv)
        before = torch.stack([*parts[:count], torch.zeros_like(rest)]).any(0)
        assert torch.equal(rest, parts[count] & ~before)


@settings(max_examples=50, deadline=None)
@given(predicates(), st.sampled_from([Q, KV]), st.integers(2, 24))
def test_a_window_is_implied(predicate: sympy.Basic, side: sympy.Symbol, period: int) -> None:
    lo, hi = window_of(predicate, side, period)
    assert 0 <= lo < hi <= period
    holds = dense(predicate, 60, 60).any(0).any(1 if side == Q else 0)
    digit = torch.arange(60) % period
    assert not (holds & ~((lo <= digit) & (digit < hi))).any()


@settings(max_examples=50, deadline=None)
@given(predicates(), LENGTHS, LENGTHS)
def test_small_problems_are_counted_exactly(predicate: sympy.Basic, n_q: int, n_kv: int) -> None:
    mask = masks(predicate)
    for orders in list(candidates(predicate, Blocks(8, 8, n_q, n_kv)))[:6]:
        problem = Problem.of(
            MaskExpr(predicate, mask.tables), ProblemShape(1, HEADS, n_q, n_kv), orders
        )
        if mask.tables:
            continue
        layout = build_layout(
            Problem.of(mask, ProblemShape(1, HEADS, n_q, n_kv), (orders[0], orders[1]))
        )
        found = visits(problem, accuracy=1000)
        assert found.pairs == pytest.approx(layout.nnz_blocks * 64 / layout.classes)
        assert found.full <= found.pairs


def residues(s: int, block: int = 64) -> Order:
    return Order((block, 1), (s,), (1, 0))


def of(pattern: Pattern) -> sympy.Basic:
    return pattern.predicate(Tables())


N = 65536
STRIDED = CAUSAL & ((Q - KV < 128) | sympy.Eq(FloorMod(Q - KV, 128), 0))
WINDOW = CAUSAL & (Q - KV < 1024)
PLAIN = (natural(64), natural(64))
BY_128 = (residues(128), residues(128))
AXIAL = of(Axial((256, 256)))
#: The mask and the orders of its views.
EXPECTED: dict[str, tuple[sympy.Basic, list[tuple[Order, Order]]]] = {
    "causal": (CAUSAL, [PLAIN]),
    "window": (WINDOW, [PLAIN]),
    "longformer": ((sympy.Abs(Q - KV) <= 256) | (Q < 64) | (KV < 64), [PLAIN]),
    "strided": (STRIDED, [PLAIN, BY_128]),
    "strided, lower right": (of(Strided(128, align="lower_right")), [PLAIN, BY_128]),
    "fixed": (
        CAUSAL & (sympy.Eq(FloorDiv(Q, 128), FloorDiv(KV, 128)) | (FloorMod(KV, 128) >= 120)),
        [PLAIN, (natural(64), Order((8, 8), (128,), (0, 1), ((120, 128),)))],
    ),
    "fixed for queries": (
        CAUSAL & ((Q - KV < 128) | (FloorMod(Q, 128) >= 112)),
        [PLAIN, (Order((4, 16), (128,), (0, 1), ((112, 128),)), natural(64))],
    ),
    "dilated": (
        (sympy.Abs(Q - KV) <= 1024) & sympy.Eq(FloorMod(Q - KV, 4), 0),
        [(residues(4), residues(4))],
    ),
    "axial": (AXIAL, [PLAIN, (residues(256), residues(256))]),
    "axial, causal": (AXIAL & CAUSAL, [PLAIN, (residues(256), residues(256))]),
    "axial, 3-D": (
        of(Axial((16, 64, 64))),
        [PLAIN, (residues(64), residues(64)), (Order((16, 4), (4096,), (1, 0)),) * 2],
    ),
    "blocks": (sympy.Eq(FloorDiv(Q, 512), FloorDiv(KV, 512)), [PLAIN]),
    "neighborhood": (of(Neighborhood((256, 256), 80)), [(Order((8, 8), (256,), (0, 1)),) * 2]),
    "dilated neighborhood": (
        of(Neighborhood((256, 256), 32, dilation=4)),
        [(Order((8, 1, 8, 1), (4, 64, 4), (1, 3, 0, 2)),) * 2],
    ),
    "sliding tile": (
        of(SlidingTile((16, 64, 64), (4, 8, 8), 3)),
        [(Order((4, 4, 4), (64, 64), (0, 1, 2)),) * 2],
    ),
    "documents": (DOCS, [PLAIN]),
    "strided documents": (STRIDED & DOCS, [PLAIN, BY_128]),
    "per head": (
        sympy.Or(sympy.And(H < 8, STRIDED), sympy.And(H >= 8, WINDOW)),
        [PLAIN, BY_128],
    ),
}


def allowed_per_query(predicate: sympy.Basic, n: int, heads: int) -> float:
    """Counted for a few queries; whatever the tables hold."""
    random = torch.Generator().manual_seed(0)
    rows = 32
    q = (torch.arange(rows) + torch.rand(rows, generator=random)) * n / rows
    count = heads if predicate.has(H) else 1
    where = {
        "b": torch.zeros(1, dtype=torch.int64),
        "h": torch.arange(count)[:, None, None],
        "q": q.long()[:, None],
        "kv": torch.arange(n),
    }
    allowed = evaluate(masks(predicate), where, n, n, [torch.zeros(1, n, dtype=torch.int64)])
    return float(allowed.expand(count, rows, n).sum()) / rows / count


@pytest.mark.parametrize("name", EXPECTED)
def test_masks_are_split_as_expected(name: str) -> None:
    predicate, expected = EXPECTED[name]
    begin = time.process_time()
    split = split_views.__wrapped__(masks(predicate), ProblemShape(1, 16, N, N), block=None)
    # Usually a fifth of it; the machine may be busy.
    assert time.process_time() - begin < 4
    assert [(view.q, view.kv) for view in split.views] == expected
    if len(expected) == 1:
        assert split.views[0].predicate == predicate
    assert "docu" in name or split.cost.visited <= 1.5 * allowed_per_query(predicate, N, 16)
    assert split.cost.total <= split.cost.plain
    assert len(split.texts) == len(split.views)


TEXTS = {
    "causal": ("plain",),
    "fixed": ("plain", "keys 120..127 of every 128"),
    "fixed for queries": ("plain", "queries 112..127 of every 128"),
    "neighborhood": ("tiles of 8 x 8 on a grid of width 256",),
    "sliding tile": ("tiles of 4 x 4 x 4 on a grid of planes of 64 x 64",),
    "strided": ("plain", "q and kv by residue mod 128"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_views_in_words(name: str) -> None:
    split = split_views(masks(EXPECTED[name][0]), ProblemShape(1, 1, N, N), block=(64, 64))
    assert split.texts == TEXTS[name]
    assert f"{split.cost.visited:.0f} pairs" in split.cost.why


def split_at(predicate: sympy.Basic, n_q: int, n_kv: int, block: int = 64) -> Split:
    return split_views(masks(predicate), ProblemShape(1, 1, n_q, n_kv), block=(block, block))


@pytest.mark.parametrize("lengths", [(1000, 1000), (999, 1777), (3001, 1000)])
def test_lengths_that_fit_nothing(lengths: tuple[int, int]) -> None:
    predicate = (sympy.Abs(Q - KV) <= 700) & sympy.Eq(FloorMod(Q - KV, 7), 0)
    split = split_at(predicate, *lengths)
    assert split.texts == ("q and kv by residue mod 7",)
    check_contract(predicate, split.views, *lengths, 64)


@pytest.mark.parametrize("shift", [0, 3, 128])
def test_lower_right_alignment(shift: int) -> None:
    """Where the shift is no multiple of the stride, other pairs of classes meet."""
    predicate = CAUSAL.subs(Q, Q + N_KV - N_Q) & sympy.Eq(FloorMod(Q + N_KV - N_Q - KV, 32), 0)
    split = split_at(predicate, 32768, 32768 + shift)
    assert split.texts == ("q and kv by residue mod 32",)
    assert split.cost.visited < 1.2 * 32768 / 64
    small = split_at(predicate, 512, 512 + shift, 8)
    check_contract(predicate, small.views, 512, 512 + shift, 8)


SMALL = {
    "strided": (CAUSAL & ((Q - KV < 24) | sympy.Eq(FloorMod(Q - KV, 24), 0)), 768, 2),
    "dilated": ((sympy.Abs(Q - KV) <= 60) & sympy.Eq(FloorMod(Q - KV, 4), 0), 480, 1),
    "axial": (of(Axial((24, 24))), 576, 2),
    "axial, causal, 3-D": (of(Axial((4, 16, 16), causal=True)), 1024, 3),
    "neighborhood": (of(Neighborhood((24, 24), 9)), 576, 1),
    "dilated neighborhood": (of(Neighborhood((32, 32), 7, dilation=2)), 1024, 1),
    "sliding tile": (of(SlidingTile((8, 16, 16), (2, 4, 4), 3)), 2048, 1),
}


@pytest.mark.parametrize("name", SMALL)
def test_views_visit_no_empty_block(name: str) -> None:
    """And every full block is known to be."""
    predicate, n, count = SMALL[name]
    with mock.patch.object(module, "MERGE_PAIRS", 2):
        split = split_views.__wrapped__(masks(predicate), ProblemShape(1, 1, n, n), block=(16, 16))
    assert len(split.views) == count
    for view in split.views:
        layout = build_layout(
            Problem.of(masks(view.predicate), ProblemShape(1, 1, n, n), (view.q, view.kv))
        )
        q, kv = torch.tensor(view.q.tokens(n)), torch.tensor(view.kv.tokens(n))
        padded = torch.zeros(int(q.max()) + 1, int(kv.max()) + 1, dtype=torch.bool)
        padded[:n, :n] = dense(view.predicate, n, n)[0]
        tiles = padded[q[:, None, :, None], kv[None, :, None, :]].flatten(-2)
        expected = tiles.any(-1).to(torch.int8) + tiles.all(-1).to(torch.int8)
        assert torch.equal(layout.kinds()[0], expected)


def test_few_tokens_are_not_split() -> None:
    assert split_at(STRIDED, 512, 512).is_plain
    assert split_at(STRIDED, 0, 16).is_plain


def test_one_query_reads_few_keys() -> None:
    """In decoding, the keys of one class lie together whatever the order of the queries."""
    split = split_at(sympy.Eq(FloorMod(N_KV - 1 - KV, 128), 0), 1, 65536)
    assert split.texts == ("keys by residue mod 128",)
    assert split.views[0].q == natural(64)
    assert split.cost.visited == 512


def test_block_shapes() -> None:
    band = masks(sympy.Abs(Q - KV) <= 2)
    shape = ProblemShape(1, 1, N, N)
    assert split_views(band, shape, block=None).views[0].q == natural(32)
    found = split_views(band, shape, block=None, shapes=block_shapes("cpu"))
    assert found.views[0].q == natural(32)
    wide = split_views(masks(STRIDED), ProblemShape(1, 1, N, N), block=(128, 64))
    assert [(view.q.block, view.kv.block) for view in wide.views] == [(128, 64)] * 2
    assert wide.views[1].q == residues(128, 128)


def test_views_with_the_same_queries_merge_for_free() -> None:
    assert split_at(EXPECTED["fixed"][0], N, N).cost.merge == 0
    assert split_at(STRIDED, N, N).cost.merge == module.MERGE_PAIRS


def test_heads_of_many_strides() -> None:
    """More terms than are told apart: still the mask, and soon."""
    parts = [
        sympy.And(sympy.Eq(H, h), CAUSAL, sympy.Eq(FloorMod(Q - KV, 5 + 2 * h), 0) | (Q - KV < 9))
        for h in range(12)
    ]
    begin = time.process_time()
    split = split_views(masks(sympy.Or(*parts)), ProblemShape(1, 12, 4096, 4096), block=(64, 64))
    assert time.process_time() - begin < 8
    search = Search(masks(sympy.Or(*parts[:HEADS])), ProblemShape(1, HEADS, 70, 70), (8, 8))
    for views in search.splits():
        check_contract(search.mask.predicate, views, 70, 70, 8)
    assert split.cost.total <= split.cost.plain


def test_different_heads_exclude_nothing() -> None:
    first, second = sympy.And(H < 2, CAUSAL), sympy.And(sympy.Eq(H, 3), KV >= 4)
    assert without(first, [second]) == first


def test_periods_and_boxes() -> None:
    assert periods(of(SlidingTile((16, 64, 64), (4, 8, 8), 3))) == {64, 4096}
    assert periods(sympy.Eq(FloorMod(H, 4), 1) & CAUSAL) == frozenset()
    # A side of 16 cells is full; the rest of the block goes along another.
    assert box_along((0,), 64, (64, 64), N).box == (16, 1, 4)
    # Extents divide the radix; the first digit has none.
    assert box_along((0, 1), 64, (250,), N).box == (32, 2)
