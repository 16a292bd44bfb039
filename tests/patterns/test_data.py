"""Patterns that hold run-time data: documents, padding, prefixes, blocks, heads."""

from __future__ import annotations

import pytest
import torch

from sparse_compile import patterns as P
from tests.patterns.brute import assert_means

IDS = [[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_documents(dtype: torch.dtype) -> None:
    ids = torch.tensor(IDS).abs().to(dtype)
    rule = lambda b, h, q, kv: abs(IDS[b][q]) == abs(IDS[b][kv])
    assert_means(P.Documents(ids), rule, 6, 6, batch=2)
    assert_means(P.Documents(ids[0]), lambda b, h, q, kv: IDS[0][q] == IDS[0][kv], 6, 6, batch=2)
    assert_means(P.Documents(ids[:1]), lambda b, h, q, kv: IDS[0][q] == IDS[0][kv], 6, 6, batch=2)


def test_documents_of_tuples_and_lists() -> None:
    rule = lambda b, h, q, kv: IDS[b][q] == IDS[b][kv]
    assert_means(P.Documents(IDS), rule, 6, 6, batch=2)
    assert P.Documents(IDS) == P.Documents(tuple(map(tuple, IDS)))


@pytest.mark.parametrize("tensor", [False, True])
def test_documents_by_their_starts(tensor: bool) -> None:
    starts = (0, 3, 3, 8, 9)
    ids = [0] * 3 + [2] * 5 + [3]
    pattern = P.Documents(cu_seqlens=torch.tensor(starts, dtype=torch.int32) if tensor else starts)
    assert_means(pattern, lambda b, h, q, kv: ids[q] == ids[kv], 9, 9)
    assert pattern.bound().expr.tables == ("int32",)


def test_documents_of_other_queries() -> None:
    pattern = P.Documents((0, 0, 1, 2), q_ids=(2, 0))
    assert_means(pattern, lambda b, h, q, kv: [0, 0, 1, 2][kv] == [2, 0][q], 2, 4)
    pattern = P.Documents(cu_seqlens=(0, 2, 4), q_ids=torch.tensor([[1], [0]]))
    assert_means(pattern, lambda b, h, q, kv: kv // 2 == [1, 0][b], 1, 4, batch=2)


def test_tables_are_read_when_they_are_used() -> None:
    ids = torch.tensor([0, 0, 1])
    pattern = P.Documents(ids)
    before = pattern.dense(3, 3)
    ids[1] = 1
    assert before[0, 0, 0].tolist() == [True, True, False]
    assert pattern.dense(3, 3)[0, 0, 1].tolist() == [False, True, True]


def test_equal_data_is_one_table() -> None:
    ids = torch.tensor([0, 0, 1])
    both = P.Documents(ids) & (P.Causal() | P.Documents(ids))
    assert len(both.bound().expr.tables) == 1
    assert len((P.Documents(ids) & P.Documents(ids.clone())).bound().expr.tables) == 2


@pytest.mark.parametrize("lengths", [(3, 0, 5), [3, 0, 5], torch.tensor([3, 0, 5])])
def test_padding(lengths: object) -> None:
    sizes = {"n_q": 4, "n_kv": 5, "batch": 3}
    assert_means(P.Padding(lengths), lambda b, h, q, kv: kv < (3, 0, 5)[b], **sizes)
    rule = lambda b, h, q, kv: kv >= 5 - (3, 0, 5)[b]
    assert_means(P.Padding(lengths, side="left"), rule, **sizes)


@pytest.mark.parametrize("prefix", [(2, 0), torch.tensor([2, 0], dtype=torch.int32)])
def test_prefix_of_each_batch_entry(prefix: object) -> None:
    rule = lambda b, h, q, kv: kv < (2, 0)[b] or kv <= q
    assert_means(P.PrefixLM(prefix), rule, 4, 4, batch=2)


def layouts() -> list[tuple[object, int]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in [(3, 4), (2, 3, 4), (1, 3, 4), (2, 2, 3, 4), (1, 2, 3, 4), (2, 1, 3, 4)]:
        found.append(torch.rand(shape, generator=generator) < 0.5)
    return found


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: str(list(layout.shape)))
def test_block_sparse(layout: torch.Tensor) -> None:
    full = layout.expand(2, 2, 3, 4)
    rule = lambda b, h, q, kv: bool(full[b, h, q // 2, kv // 3])
    for given in (layout, layout.int(), layout.tolist(), layout.numpy()):
        pattern = P.BlockSparse(given, (2, 3))
        assert_means(pattern, rule, 6, 12, batch=2, heads=2)
        assert_means(pattern, rule, 5, 10, batch=2, heads=2)


def test_heads() -> None:
    causal, window, every = P.Causal(), P.SlidingWindow(1), P.All()
    rules = {
        causal: lambda q, kv: kv <= q,
        window: lambda q, kv: abs(q - kv) <= 1,
        every: lambda q, kv: True,
    }
    lists = [[causal], [causal, window], [causal, window, causal, every], [window, window, every]]
    lists += [[every, causal, causal, window], [P.Causal(), causal]]
    for patterns in lists:
        for per in (1, 2, 3):
            rule = lambda b, h, q, kv, per=per, all=patterns: rules[all[h // per]](q, kv)
            pattern = P.heads(patterns, per)
            assert_means(pattern, rule, 4, 5, heads=len(patterns) * per)


def test_heads_with_one_pattern_do_not_depend_on_the_head() -> None:
    assert P.heads([P.Causal()] * 4).bound().expr == P.Causal().bound().expr
    pair = P.heads([P.Causal(), P.All()] * 2)
    assert pair.bound().expr.depends_on(P.heads.__globals__["H"])
