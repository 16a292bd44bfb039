from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.codegen.cpu.batches import Batch, Gathered, Strided, cut
from sparse_compile.codegen.cpu.cache import BoundedCache, fingerprint
from sparse_compile.codegen.cpu.plan import Plan, make_plan, segments_of
from sparse_compile.codegen.cpu.shift import is_shift_invariant
from sparse_compile.expr import KV, B, FloorDiv, FloorMod, H, MaskExpr, Q, evaluate, table
from sparse_compile.layout import EMPTY, FULL, PARTIAL, BlockLayout, BlockLists, build_layout
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.spec.view import natural


def layout_from(kinds: Tensor, n_q: int, n_kv: int, block: int) -> BlockLayout:
    """A layout of one class from int8 [rows, columns] of EMPTY, PARTIAL, FULL."""

    def lists(lines: Tensor) -> BlockLists:
        parts, counts = [], []
        for line in lines:
            partial, full = (line == PARTIAL).nonzero()[:, 0], (line == FULL).nonzero()[:, 0]
            parts.append(torch.cat([partial, full]))
            counts.append([len(partial), len(full)])
        totals = torch.tensor(counts).sum(1).cumsum(0)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), totals])
        return BlockLists(start.int(), torch.tensor([counts]).int(), torch.cat(parts)[None].int())

    return BlockLayout(
        n_q, n_kv, natural(block), natural(block), 1, 1, lists(kinds), lists(kinds.T)
    )


def visits(batch: Batch, n_q: int, n_kv: int) -> tuple[Tensor, Tensor]:
    """How often a batch visits each pair, and where it evaluates the mask."""
    count = torch.zeros(n_q, n_kv, dtype=torch.int64)
    masked = torch.zeros(n_q, n_kv, dtype=torch.bool)
    for i in range(batch.tiles):
        if isinstance(batch, Strided):
            q, kv = (x.flatten() for x in batch.part(i, i + 1).coordinates())
            count[q[:, None], kv] += 1
            masked[q[:, None], kv] |= batch.masked
            continue
        q = batch.q_start[i] + torch.arange(batch.rows)
        for block, here, partial in zip(
            batch.blocks[i], batch.present[i], batch.partial[i], strict=True
        ):
            kv = block * batch.block_kv + torch.arange(batch.block_kv)
            assert bool(partial) or not here or int(kv[-1]) < n_kv
            kv = kv[kv < n_kv]
            count[q[:, None], kv] += int(here)
            masked[q[:, None], kv] |= here & partial
    return count, masked


def check(plan: Plan, kinds: Tensor, n_q: int, n_kv: int, block: int) -> None:
    tokens = kinds.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n_q, :n_kv]
    count = torch.zeros(n_q, n_kv, dtype=torch.int64)
    masked = torch.zeros(n_q, n_kv, dtype=torch.bool)
    written = torch.zeros(n_q, dtype=torch.bool)
    for batch in plan.batches:
        more, evaluated = visits(batch, n_q, n_kv)
        count, masked = count + more, masked | evaluated
        rows = more.any(1)
        assert bool((written[rows] == batch.merge).all()), "a merge needs a result to merge with"
        written |= rows
    assert int(count.max()) <= 1, "no pair twice"
    assert bool((count[tokens != EMPTY] == 1).all()), "every visited block"
    assert bool((count[~masked] == 0)[tokens[~masked] != FULL].all()), "the mask where it matters"
    assert plan.complete == bool(written.all())


KINDS = st.integers(0, 10**6).map(lambda seed: torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    KINDS,
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.1, 0.5, 0.95]),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([(8, 0), (8, 3), (64, 0), (64, 21)]),
)
def test_every_block_is_visited_once(
    generator: torch.Generator,
    rows: int,
    columns: int,
    density: float,
    fullness: float,
    shape: tuple[int, int],
) -> None:
    block, missing = shape
    visited = torch.rand(rows, columns, generator=generator) < density
    full = torch.rand(rows, columns, generator=generator) < fullness
    kinds = torch.where(visited, torch.where(full, FULL, PARTIAL), EMPTY).to(torch.int8)
    n_q, n_kv = rows * block - missing, columns * block - missing // 2
    check(make_plan(layout_from(kinds, n_q, n_kv, block), 0), kinds, n_q, n_kv, block)


def plan_of(predicate: sympy.Basic, n: int, block: int) -> Plan:
    mask = MaskExpr(predicate)
    layout = build_layout(Problem.of(mask, ProblemShape(1, 1, n, n), (block, block)))
    plan = make_plan(layout, 0)
    check(plan, layout.kinds()[0], n, n, block)
    return plan


def test_a_window_is_one_large_call_and_its_ramp() -> None:
    plan = plan_of((KV <= Q) & (Q - KV < 64), 1024, 16)
    largest = max(plan.batches, key=lambda batch: batch.tiles)
    assert largest == Strided(64, 16, 0, 16, 60, 16, 80, masked=True, merge=False)
    ramp = Strided(0, 64, 0, 0, 1, 64, 64, masked=True, merge=False)
    assert set(plan.batches) == {largest, ramp}
    assert not any(batch.merge for batch in plan.batches)


def test_global_columns_are_one_call_that_merges() -> None:
    plan = plan_of((KV < 2) | ((KV <= Q) & (Q - KV < 64)), 1024, 16)
    shared = [batch for batch in plan.batches if batch.tiles > 50]
    assert sorted((batch.kv_step, batch.length) for batch in shared) == [(0, 16), (16, 80)]
    assert any(batch.merge for batch in plan.batches)


def test_long_full_runs_go_without_a_mask() -> None:
    plan = plan_of(KV <= Q, 2048, 64)
    unmasked = sum(b.tiles * b.rows * b.length for b in plan.batches if not b.masked)
    assert unmasked > 0.5 * 2048 * 2048 / 2
    assert len(plan.batches) < 20


def test_long_masked_runs_are_cut() -> None:
    kinds = torch.full((2, 80), PARTIAL, dtype=torch.int8)
    plan = make_plan(layout_from(kinds, 128, 5120, 64), 0)
    check(plan, kinds, 128, 5120, 64)
    assert [batch.length for batch in plan.batches] == [2048, 2048, 1024]
    assert any(batch.merge for batch in plan.batches)


def test_scattered_blocks_are_gathered() -> None:
    kinds = torch.where(torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1, 2, 0)
    kinds = kinds.to(torch.int8)
    plan = make_plan(layout_from(kinds, 1024, 1020, 16), 0)
    check(plan, kinds, 1024, 1020, 16)
    assert any(isinstance(batch, Gathered) for batch in plan.batches)
    assert len(plan.batches) < 24


def test_nothing_to_visit() -> None:
    plan = make_plan(layout_from(torch.zeros(4, 4, dtype=torch.int8), 64, 64, 16), 0)
    assert plan == Plan((), complete=False)


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("step", [0, 3, 8, 11])
def test_keys_add_up_where_tiles_overlap(tiles: int, step: int) -> None:
    batch = Strided(0, 4, 2, step, tiles, 4, 8, masked=False, merge=False)
    x = torch.zeros(2, 60, 3)
    value = torch.randn(tiles, 2, 8, 3)
    batch.add_keys(x, value)
    expected = torch.zeros_like(x)
    for i in range(tiles):
        expected[:, 2 + i * step :][:, :8] += value[i]
    torch.testing.assert_close(x, expected)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_cut_keeps_every_tile(most: int) -> None:
    batch = Strided(5, 4, 2, 3, 10, 4, 8, masked=False, merge=False)
    pieces = list(cut(batch, most))
    assert max(piece.tiles for piece in pieces) <= most
    starts = [piece.coordinates()[1][:, 0, 0] for piece in pieces]
    assert torch.cat(starts).tolist() == [2 + 3 * i for i in range(10)]


PREDICATES = [
    KV <= Q,
    (KV <= Q) & (Q - KV < 7),
    sympy.Eq(FloorMod(Q - KV, 4), 0),
    sympy.Eq(FloorDiv(Q, 8), FloorDiv(KV, 8)),
    KV < 2,
    sympy.Abs(2 * Q - KV) < 9,
    sympy.Max(Q, KV) < sympy.Min(Q + 3, KV + 5),
    sympy.Eq(table(0)(KV), 1),
    sympy.Piecewise((Q, Q - KV > 2), (KV + 1, True)) > KV,
    sympy.Not(sympy.Xor(KV <= Q, Q - KV < 3)),
    KV * Q < 30,
    (Q - KV < H + B),
]


@pytest.mark.parametrize("predicate", PREDICATES, ids=str)
def test_shift_invariance_is_never_a_guess(predicate: sympy.Basic) -> None:
    mask = MaskExpr(predicate, ("int64",) if predicate.has(table(0)) else ())
    q, kv = torch.arange(40).view(-1, 1), torch.arange(40)
    values = torch.randint(0, 2, (100,), generator=torch.Generator().manual_seed(0))

    def at(dq: int, dkv: int) -> Tensor:
        where = {"b": torch.tensor(1), "h": torch.tensor(2), "q": q + dq, "kv": kv + dkv}
        return evaluate(mask, where, 40, 40, [values]).expand(40, 40)

    for dq, dkv in [(8, 8), (8, 0), (8, 4), (4, 8), (5, 5), (0, 0)]:
        if is_shift_invariant(mask, dq, dkv):
            assert torch.equal(at(0, 0), at(dq, dkv)), (dq, dkv)


@pytest.mark.parametrize(
    "predicate, steps",
    [
        ((KV <= Q) & (Q - KV < 7), (32, 32)),
        (sympy.Eq(FloorMod(Q - KV, 4), 0), (32, 0)),
        (sympy.Eq(FloorDiv(Q, 8), FloorDiv(KV, 8)), (8, 8)),
        (sympy.Abs(2 * Q - KV) < 9, (16, 32)),
    ],
    ids=str,
)
def test_shift_invariance_is_found(predicate: sympy.Basic, steps: tuple[int, int]) -> None:
    assert is_shift_invariant(MaskExpr(predicate), *steps)


def test_cache_stays_within_its_budget() -> None:
    cache: BoundedCache[Tensor] = BoundedCache(max_bytes=1000)
    for i in range(20):
        cache.get(i, lambda: torch.zeros(50))
        assert cache.nbytes <= 1000
    made = []
    cache.get(19, lambda: made.append(1) or torch.zeros(1))
    assert not made
    assert cache.get("large", lambda: torch.zeros(1000)).numel() == 1000
    assert cache.nbytes <= 1000


def test_fingerprint_is_of_the_content() -> None:
    x = torch.arange(12).view(3, 4)
    assert fingerprint([x.T]) == fingerprint([x.T.contiguous()])
    assert fingerprint([x]) != fingerprint([x.view(4, 3)])
    before = fingerprint([x])
    x[0, 0] = 7
    assert fingerprint([x]) != before
    assert fingerprint([x], max_bytes=8) is None


def test_no_segments_without_blocks() -> None:
    from sparse_compile.codegen.cpu.plan import choose_tiles

    layout = layout_from(torch.zeros(2, 2, dtype=torch.int8), 32, 32, 16)
    assert segments_of(choose_tiles(layout, 0)) == []
