"""Layouts against the dense meaning of the mask."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from unittest import mock

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.core.function import AppliedUndef
from torch import Tensor

from sparse_compile.expr import (
    KV,
    B,
    FloorDiv,
    FloorMod,
    H,
    MaskExpr,
    Q,
    evaluate,
    size_symbol,
    table,
    table_index,
)
from sparse_compile.layout import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockLayout,
    build_layout,
    mask_pairs,
    superset,
)
from sparse_compile.layout.build import candidates
from sparse_compile.layout.superset import Problem, ProblemShape

CAUSAL = KV <= Q
S0 = size_symbol(0)
DOCS, PADDING, WINDOWS, SCALAR = table(0), table(1), table(2), table(3)
TABLE_DTYPES = ("int64", "bool", "int32", "int64")


@dataclass(frozen=True)
class Case:
    predicate: sympy.Basic
    n_q: int
    n_kv: int
    block_q: int = 8
    block_kv: int = 8
    batch: int = 2
    heads: int = 2
    offset: int = 0
    seed: int = 0
    mask: MaskExpr = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Only what it reads, so that a mask without tables is static.
        used = [table_index(node) + 1 for node in self.predicate.atoms(AppliedUndef)]
        dtypes = TABLE_DTYPES[: max(used, default=0)]
        object.__setattr__(self, "mask", MaskExpr(self.predicate, dtypes, 1))

    def tables(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        tokens = max(self.n_q, self.n_kv, 1)
        documents = torch.randint(0, 4, (self.batch, tokens), generator=generator).sort(-1)[0]
        kept = torch.randint(0, tokens + 1, (self.batch, 1), generator=generator)
        padding = torch.arange(tokens)[None] < kept
        windows = torch.randint(0, tokens, (self.heads,), generator=generator, dtype=torch.int32)
        return [documents, padding, windows, torch.tensor(11)]

    def layout(self) -> BlockLayout:
        shape = ProblemShape(self.batch, self.heads, self.n_q, self.n_kv)
        problem = Problem.of(self.mask, shape, (self.block_q, self.block_kv), [self.offset])
        return build_layout(problem, self.tables())

    def dense(self) -> Tensor:
        """bool [batch, heads, n_q, n_kv], from the definition."""
        where = {
            "b": torch.arange(self.batch)[:, None, None, None],
            "h": torch.arange(self.heads)[:, None, None],
            "q": torch.arange(self.n_q)[:, None],
            "kv": torch.arange(self.n_kv),
        }
        allowed = evaluate(self.mask, where, self.n_q, self.n_kv, self.tables(), [self.offset])
        return allowed.expand(self.batch, self.heads, self.n_q, self.n_kv)

    def blocks(self) -> tuple[Tensor, Tensor]:
        """What each block holds: any, and all of block_q x block_kv; [batch, heads, rows, cols]."""
        dense = self.dense()
        pad = (0, -self.n_kv % self.block_kv, 0, -self.n_q % self.block_q)
        padded = torch.nn.functional.pad(dense, pad)
        tiles = padded.unflatten(-1, (-1, self.block_kv)).unflatten(2, (-1, self.block_q))
        tiles = tiles.transpose(3, 4)
        return tiles.any(-1).any(-1), tiles.all(-1).all(-1)


def atoms() -> st.SearchStrategy[sympy.Basic]:
    small, stride = st.integers(0, 40), st.integers(1, 40)
    return st.one_of(
        st.just(CAUSAL),
        st.just(KV <= Q + S0),
        st.builds(lambda w: (KV <= Q) & (Q - KV < w), small),
        st.builds(lambda w: sympy.Abs(Q - KV) <= w, small),
        st.builds(lambda c: sympy.Eq(FloorDiv(Q, c), FloorDiv(KV, c)), stride),
        st.builds(lambda s, r: sympy.Eq(FloorMod(Q - KV, s), r), stride, small),
        st.builds(lambda s: sympy.Eq(FloorMod(Q, s), FloorMod(KV, s)), stride),
        st.builds(lambda s, r: FloorMod(KV, s) < r, stride, small),
        st.builds(lambda p: KV < p, small),
        st.builds(lambda w: sympy.Max(FloorMod(KV, w), Q - KV) < w, stride),
        st.just(sympy.Eq(DOCS(B, Q), DOCS(B, KV))),
        st.just(sympy.Ne(PADDING(B, KV), 0)),
        st.just(Q - KV < WINDOWS(H)),
        st.builds(lambda c: sympy.Ne(PADDING(B, FloorDiv(KV, c) * 2 + S0), 0), stride),
        st.just(DOCS(B, sympy.Abs(Q - KV)) > 1),
        st.builds(lambda w: Q - KV < sympy.Piecewise((w, sympy.Eq(H, 0)), (2, True)), small),
    )


def predicates() -> st.SearchStrategy[sympy.Basic]:
    def extend(inner: st.SearchStrategy[sympy.Basic]) -> st.SearchStrategy[sympy.Basic]:
        pair = st.tuples(inner, inner)
        return st.one_of(
            pair.map(lambda p: sympy.And(*p)),
            pair.map(lambda p: sympy.Or(*p)),
            inner.map(sympy.Not),
        )

    return st.recursive(atoms(), extend, max_leaves=4)


def cases() -> st.SearchStrategy[Case]:
    length, block = st.integers(1, 80), st.sampled_from([8, 13, 16, 32])
    offset = st.integers(-20, 60)
    return st.builds(
        Case, predicates(), length, length, block, block, offset=offset, seed=st.integers(0, 9)
    )


def check_meaning(case: Case, layout: BlockLayout) -> None:
    some, every = case.blocks()
    kinds = layout.kinds().view(layout.batches, layout.heads, *layout.grid).expand(some.shape)
    assert not (some & (kinds == EMPTY)).any(), "an unlisted block holds an allowed pair"
    assert not (~every & (kinds == FULL)).any(), "a FULL block holds a forbidden or missing pair"


def check_lists(layout: BlockLayout) -> None:
    for lists, across in ((layout.rows, layout.grid[1]), (layout.cols, layout.grid[0])):
        assert {tensor.dtype for tensor in lists.tensors()} == {torch.int32}
        assert all(tensor.is_contiguous() for tensor in lists.tensors())
        assert lists.index.shape == (layout.classes, int(lists.start[-1]))
        assert bool((lists.counts.sum(-1) <= lists.start.diff()).all())
        for c in range(layout.classes):
            line, block, kind = lists.entries(c)
            place = (line * 3 + kind) * (across + 1) + block
            assert bool((place.diff() > 0).all()), "not ascending, PARTIAL before FULL"
            assert int(lists.index[c].count_nonzero()) <= line.numel(), "unused room is not 0"


def check_transpose(layout: BlockLayout) -> None:
    for c in range(layout.classes):
        by_rows = {tuple(entry) for entry in torch.stack(layout.rows.entries(c), 1).tolist()}
        by_cols = {tuple(entry) for entry in torch.stack(layout.cols.entries(c), 1).tolist()}
        assert by_rows == {(r, k, kind) for k, r, kind in by_cols}


@settings(max_examples=300, deadline=None)
@given(cases())
def test_a_layout_means_its_mask(case: Case) -> None:
    layout = case.layout()
    check_meaning(case, layout)
    check_lists(layout)
    check_transpose(layout)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(1, 20))
def test_subdivision_finds_the_same_blocks(case: Case, rectangles: int) -> None:
    """Small grids start at single blocks; here they start with a few large rectangles."""
    flat = case.layout()
    caches = (candidates, superset.static_layout)
    with mock.patch.object(superset, "_FIRST_RECTANGLES", rectangles):
        for cache in caches:
            cache.cache_clear()
        layout = case.layout()
    for cache in caches:
        cache.cache_clear()
    check_meaning(case, layout)
    check_lists(layout)
    check_transpose(layout)
    # A rectangle proven EMPTY or FULL as a whole is so in every block.
    assert torch.equal(layout.kinds(), flat.kinds())


@settings(max_examples=100, deadline=None)
@given(cases())
def test_classes_together_are_what_they_are_one_by_one(case: Case) -> None:
    """Two ways to the same blocks: narrowed down by the tables, or classified all at once."""
    alone = case.layout()
    with mock.patch.object(sys.modules["sparse_compile.layout.build"], "_FEW_CLASSES", 0):
        together = case.layout()
    check_lists(together)
    check_transpose(together)
    assert torch.equal(alone.kinds(), together.kinds())


@settings(max_examples=40, deadline=None)
@given(cases())
def test_pack_round_trip(case: Case) -> None:
    layout = case.layout()
    again = layout.unpacked(layout.pack())
    for left, right in ((layout.rows, again.rows), (layout.cols, again.cols)):
        assert torch.equal(left.start, right.start)
        assert torch.equal(left.counts, right.counts)
        # Both directions have the room of the larger one; what is beyond their own is never read.
        assert torch.equal(left.index, right.index[:, : left.index.shape[1]])
        for c in range(layout.classes):
            assert all(map(torch.equal, left.entries(c), right.entries(c)))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_pairs_are_counted_exactly(case: Case) -> None:
    layout, dense = case.layout(), case.dense()
    arguments = (case.mask, layout, case.batch, case.heads, case.tables(), [case.offset])
    assert mask_pairs(*arguments) == int(dense.sum())


EXACT = {
    "causal": CAUSAL,
    "window": CAUSAL & (Q - KV < 20),
    "band": sympy.Abs(Q - KV) <= 9,
    "chunks": sympy.Eq(FloorDiv(Q, 12), FloorDiv(KV, 12)),
    "strided": sympy.Eq(FloorMod(Q - KV, 24), 0),
    "strided by classes": sympy.Eq(FloorMod(Q, 24), FloorMod(KV, 24)),
    "one column in 30": sympy.Eq(FloorMod(KV, 30), 17),
    "columns": FloorMod(KV, 24) < 5,
    "prefix": CAUSAL | (KV < 21),
    "offset": KV <= Q + S0,
    "documents": sympy.Eq(DOCS(B, Q), DOCS(B, KV)),
    "causal documents": CAUSAL & sympy.Eq(DOCS(B, Q), DOCS(B, KV)),
    "padding": CAUSAL & sympy.Ne(PADDING(B, KV), 0),
    "per-head window": CAUSAL & (Q - KV < WINDOWS(H)),
    "window in a tensor": CAUSAL & (Q - KV < SCALAR()),
    "both sides": Q + KV < 2 * Q - 7,
    "scaled": sympy.Eq(4 * Q - 4 * KV, 2),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("lengths", [(96, 96), (75, 90), (1, 70)])
@pytest.mark.parametrize("blocks", [(8, 8), (16, 8), (8, 32)])
def test_simple_masks_are_exact(
    name: str, lengths: tuple[int, int], blocks: tuple[int, int]
) -> None:
    """No PARTIAL block of a simple mask is really empty, or really full."""
    case = Case(EXACT[name], *lengths, *blocks, offset=13, seed=3)
    layout = case.layout()
    some, every = case.blocks()
    kinds = layout.kinds().view(layout.batches, layout.heads, *layout.grid)
    expected = some.to(torch.int8) + every.to(torch.int8)
    assert torch.equal(kinds.expand(expected.shape), expected)


def test_a_picture_of_every_kind_of_block() -> None:
    """Drawn by hand: a window of 16 over blocks of 8, 28 tokens."""
    window = build_layout(
        Problem.of(MaskExpr(CAUSAL & (Q - KV < 16)), ProblemShape(3, 5, 28, 28), (8, 8))
    )
    assert window.kinds().tolist() == [[[1, 0, 0, 0], [2, 1, 0, 0], [1, 2, 1, 0], [0, 1, 1, 1]]]
    assert window.rows.start.tolist() == [0, 1, 3, 6, 9]
    assert window.rows.counts.tolist() == [[[1, 0], [1, 1], [2, 1], [3, 0]]]
    assert window.rows.index.tolist() == [[0, 1, 0, 0, 2, 1, 1, 2, 3]]
    assert window.cols.index.tolist() == [[0, 2, 1, 1, 3, 2, 2, 3, 3]]


@pytest.mark.parametrize(
    ("predicate", "classes"),
    [
        (CAUSAL, (1, 1)),
        (sympy.Ne(PADDING(B, KV), 0), (3, 1)),
        (Q - KV < WINDOWS(H), (1, 4)),
        ((Q - KV < WINDOWS(H)) & sympy.Ne(PADDING(B, KV), 0), (3, 4)),
        (Q - KV < 8 * H, (1, 4)),
    ],
)
def test_classes_follow_the_coordinates(predicate: sympy.Basic, classes: tuple[int, int]) -> None:
    case = Case(predicate, 40, 40, batch=3, heads=4)
    layout = case.layout()
    assert (layout.batches, layout.heads) == classes
    check_meaning(case, layout)


@pytest.mark.parametrize("value", [True, False])
def test_constant_masks(value: bool) -> None:
    layout = build_layout(
        Problem.of(
            MaskExpr(sympy.true if value else sympy.false), ProblemShape(1, 1, 20, 16), (8, 8)
        )
    )
    expected = [[2, 2], [2, 2], [1, 1]] if value else [[0, 0]] * 3
    assert layout.kinds().tolist() == [expected]


@pytest.mark.parametrize("lengths", [(0, 16), (16, 0), (0, 0)])
@pytest.mark.parametrize("predicate", [CAUSAL, sympy.Ne(PADDING(B, KV), 0) & CAUSAL])
def test_no_tokens(lengths: tuple[int, int], predicate: sympy.Basic) -> None:
    layout = Case(predicate, *lengths).layout()
    assert layout.nnz_blocks == 0
    check_lists(layout)


def test_documents_far_apart_are_never_visited() -> None:
    tokens, block = 4096, 64
    documents = (torch.arange(tokens) // 512)[None]
    mask = MaskExpr(CAUSAL & sympy.Eq(DOCS(B, Q), DOCS(B, KV)), ("int64",))
    layout = build_layout(
        Problem.of(mask, ProblemShape(1, 1, tokens, tokens), (block, block)), [documents]
    )
    assert layout.nnz_blocks == 8 * (8 * 9 // 2)
    assert int(layout.rows.counts[..., 0].sum()) == tokens // block


def test_extreme_table_values_prove_nothing_false() -> None:
    """int64 arithmetic on table values may wrap; the proof must hold for what really happens."""
    offsets = torch.tensor([[(1 << 63) - 1, -(1 << 63), 1 << 61, 5]]).repeat_interleave(8, 1)
    mask = MaskExpr((DOCS(B, KV) + Q < 2 * KV) | (3 * DOCS(B, KV) > Q), ("int64",))
    where = {"q": torch.arange(32)[:, None], "kv": torch.arange(32), "b": torch.zeros(1).long()}
    dense = evaluate(mask, where, 32, 32, [offsets])
    layout = build_layout(Problem.of(mask, ProblemShape(1, 1, 32, 32), (8, 8)), [offsets])
    tiles = dense.view(4, 8, 4, 8).transpose(1, 2)
    assert not (tiles.any(-1).any(-1) & (layout.kinds()[0] == EMPTY)).any()
    assert not (~tiles.all(-1).all(-1) & (layout.kinds()[0] == FULL)).any()


def test_classes_are_split_to_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    predicate = CAUSAL & (Q - KV < WINDOWS(H)) & sympy.Ne(PADDING(B, KV), 0)
    case = Case(predicate, 60, 60, batch=3, heads=5)
    whole = case.layout()
    monkeypatch.setattr("sparse_compile.layout.build._BLOCKS_AT_ONCE", 70)
    monkeypatch.setattr("sparse_compile.layout.build._FEW_CLASSES", 0)
    split = case.layout()
    assert all(map(torch.equal, whole.rows.tensors(), split.rows.tensors()))
    assert all(map(torch.equal, whole.cols.tensors(), split.cols.tensors()))


def test_cost_follows_the_mask() -> None:
    """A window over a million tokens: 2^26 blocks, of which 2^18 are visited."""
    tokens = 1 << 20
    mask = MaskExpr(CAUSAL & (Q - KV < 4096))
    begin = time.process_time()
    layout = build_layout(Problem.of(mask, ProblemShape(1, 1, tokens, tokens), (128, 128)))
    # Usually 10 ms; evaluating every block takes many seconds.
    assert time.process_time() - begin < 2
    partial, full = layout.rows.counts[0].long().sum(0).tolist()
    rows, window = tokens // 128, 4096 // 128
    assert partial == rows + rows - window
    assert full == rows * (window - 1) - window * (window - 1) // 2


def test_static_layouts_are_cached() -> None:
    shape = ProblemShape(2, 2, 48, 48)
    first = build_layout(Problem.of(MaskExpr(CAUSAL), shape, (16, 16)))
    assert build_layout(Problem.of(MaskExpr(KV <= Q), shape, (16, 16))) is first
    assert int((first.kinds() == PARTIAL).sum()) == 3
