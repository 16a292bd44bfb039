"""What patterns select by scores, against loops over plain definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.selection import Selection
from tests.selection import naive

B = 2


def operands(
    heads: tuple[int, int] = (4, 2), n_q: int = 100, n_kv: int = 100, dim: int = 8
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_q + n_kv)
    shapes = (B, heads[0], n_q, dim), (B, heads[1], n_kv, dim)
    q, k = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k


def select(pattern: Any, q: Tensor, k: Tensor, mask: P.Pattern | None = None) -> Selection:
    if mask is None:
        return pattern.select(q, k, None, [], [])
    bound = mask.bound()
    tables = bound.tables("cpu", q.shape[2], k.shape[2], q.shape[0], q.shape[1])
    return pattern.select(q, k, bound.expr, tables, [])


def dense(mask: P.Pattern | None, q: Tensor, k: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return (
        (P.All() if mask is None else mask)
        .dense(shape[2], shape[3], shape[0], shape[1])
        .expand(shape)
    )


def blocks_of(pattern: Any, selection: Selection) -> list[Any]:
    """The selected blocks of every row; a block is selected in all of its units."""
    each = pattern.block_kv // pattern.unit_kv
    index, count = selection.index, selection.count
    return [
        [
            [
                sorted({int(unit) // each for unit in index[b, s, u, : count[b, s, u]]})
                for u in range(index.shape[2])
            ]
            for s in range(index.shape[1])
        ]
        for b in range(index.shape[0])
    ]


def check(
    pattern: Any, q: Tensor, k: Tensor, mask: P.Pattern | None = None
) -> tuple[Selection, Tensor]:
    found, seen = select(pattern, q, k, mask), dense(mask, q, k)
    scores = naive.scores(pattern, q, k, seen)
    assert blocks_of(pattern, found) == naive.chosen(pattern, scores, seen)
    assert_canonical(found, k.shape[2])
    return found, scores


def assert_canonical(found: Selection, n_kv: int) -> None:
    assert found.index.dtype == found.count.dtype == torch.int32
    assert found.index.shape[:3] == found.count.shape
    used = torch.arange(found.index.shape[-1]) < found.count[..., None]
    index = found.index.masked_fill(~used, 1 << 30)
    assert bool((index.diff(dim=-1) > 0)[used[..., 1:]].all())
    assert bool(((found.index >= 0) & (found.index * found.unit_kv < n_kv))[used].all())


SCORERS = [
    P.TopK(3, unit_kv=16),
    P.TopK(3, unit_kv=16, unit_q=16),
    P.TopK(2, unit_kv=16, scorer=P.MinMax()),
    P.TopK(2, unit_kv=16, unit_q=16, scorer=P.MinMax()),
    P.TopK(2, unit_kv=16, scorer=P.OverlapPool(16, 8)),
    P.TopK(3, unit_kv=16, scorer=P.OverlapPool(8, 8), sink=1),
    P.TopK(2, unit_kv=32, unit_q=16, scorer=P.OverlapPool(32, 16)),
    P.TopP(0.6, unit_kv=32, scorer=P.OverlapPool(24, 8)),
    P.TopK(2, unit_kv=32, unit_q=32, scorer=P.Antidiagonal(8)),
    P.TopP(0.7, unit_kv=16, unit_q=32, scorer=P.Antidiagonal(16), sink=1, diagonal=True),
]
MASKS = [
    None,
    P.Causal(),
    P.Causal() & P.Documents(torch.arange(100) // 37),
    P.heads([P.Causal(), P.SlidingWindow(20)], per=2),
    P.SlidingWindow(9),
    P.Padding((60, 100)) & P.Causal(),
    P.Documents(torch.stack([torch.arange(100) // 37, torch.arange(100) // 50])),
    P.BlockSparse(torch.arange(4 * 5 * 5).view(4, 5, 5) % 3 == 0, 20),
]


@pytest.mark.parametrize("pattern", SCORERS, ids=repr)
@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_scorers(pattern: Any, mask: P.Pattern | None) -> None:
    check(pattern, *operands(), mask)


def indexer(n_q: int = 100, n_kv: int = 100, heads: int = 3, dim: int = 4) -> P.Indexer:
    generator = torch.Generator().manual_seed(1)
    shapes = (B, heads, n_q, dim), (B, n_kv, dim), (B, n_q, heads)
    return P.Indexer(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("units", [(1, 1), (16, 1), (1, 16), (16, 32)], ids=str)
def test_indexer(units: tuple[int, int]) -> None:
    unit_q, unit_kv = units
    pattern = P.TopK(5, unit_kv=unit_kv, unit_q=unit_q, scorer=indexer())
    q, k = operands()
    found, _ = check(pattern, q, k, P.Causal())
    assert found.index.shape[1] == 1
    assert P.DSA(indexer().q_index, indexer().k_index, indexer().weights, 5).k == 5


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("share", ["group", "all", "none"])
@pytest.mark.parametrize("scorer", [P.MeanPool(), P.MinMax(), P.OverlapPool(16, 16)], ids=repr)
def test_sharing(group: int, share: str, scorer: P.Scorer) -> None:
    pattern = P.TopK(2, unit_kv=16, unit_q=16, scorer=scorer, share=share)
    q, k = operands((2 * group, 2), 50, 60)
    found, _ = check(pattern, q, k)
    assert found.index.shape[1] == {"group": 2, "all": 1, "none": 2 * group}[share]


@pytest.mark.parametrize("lengths", [(1, 100), (5, 75), (64, 64), (75, 40), (33, 1)], ids=str)
@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
@pytest.mark.parametrize("units", [(1, 16), (16, 16), (64, 16), (16, 64)], ids=str)
def test_forced_blocks_and_ragged_lengths(
    lengths: tuple[int, int], align: str, units: tuple[int, int]
) -> None:
    unit_q, unit_kv = units
    for forced in ({"sink": 1, "local": 2}, {"diagonal": True}, {"sink": 2}, {"local": 1}):
        pattern = P.TopK(3, unit_kv=unit_kv, unit_q=unit_q, align=align, **forced)
        check(pattern, *operands(n_q=lengths[0], n_kv=lengths[1]), P.Causal(align))


def test_blocks_of_several_units() -> None:
    pattern = P.TopK(2, unit_kv=16, block=48, diagonal=True)
    q, k = operands()
    found, _ = check(pattern, q, k, P.Causal())
    # The last block, of 4 keys, has one unit; the others have three.
    assert found.index.shape[-1] == 6
    assert found.count[0, 0, 99] == 4
    assert found.index[0, 0, 99, 3] == 6


def given_scores(scores: Tensor) -> Any:
    """A scorer, and q and k, for scores [B, Hs, Uq, blocks] of units of one token."""
    batch, lists, rows, blocks = scores.shape
    q, k = torch.zeros(batch, lists, rows, 1), torch.zeros(batch, lists, blocks, 1)
    return (lambda q, k: scores), q, k


RULES = [
    lambda **more: P.TopK(3, **more),
    lambda **more: P.TopK((1, 6), **more),
    lambda **more: P.TopRatio(0.3, **more),
    lambda **more: P.TopRatio((0.1, 1.0), **more),
    lambda **more: P.TopP(0.5, **more),
    lambda **more: P.TopP((1.0, 0.8), **more),
    lambda **more: P.Threshold(0.5, **more),
    lambda **more: P.Threshold((-1.0, math.inf), **more),
    lambda **more: P.Threshold(0.2, of="softmax", **more),
    lambda **more: P.Threshold(-math.inf, most=4, **more),
]
#: Sums of these are exact, and no share is close to a threshold by rounding.
VALUES = st.sampled_from([-math.inf, math.inf, math.nan, -0.0, 0.0, 0.5, -1.0, 2.0, 3.0])


@pytest.mark.parametrize("rule", range(len(RULES)))
@given(data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rules_are_the_stable_best(rule: int, data: st.DataObject) -> None:
    rows, blocks = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    count = 2 * rows * blocks
    values = data.draw(st.lists(VALUES, min_size=count, max_size=count))
    scores = torch.tensor(values).view(1, 2, rows, blocks)
    more = data.draw(st.sampled_from([{}, {"sink": 1}, {"local": 1}]))
    scorer, q, k = given_scores(scores)
    pattern = RULES[rule](unit_kv=1, scorer=scorer, **more)
    mask = data.draw(st.sampled_from([None, P.Causal(), P.SlidingWindow(1)]))
    found = blocks_of(pattern, select(pattern, q, k, mask))
    assert found == naive.chosen(pattern, scores, dense(mask, q, k))


def test_ties_go_to_the_lower_number() -> None:
    scorer, q, k = given_scores(torch.zeros(1, 1, 1, 1000))
    found = P.TopK(5, unit_kv=1, scorer=scorer).select(q, k, None, [], [])
    assert found.index.tolist() == [[[[0, 1, 2, 3, 4]]]]


def test_infinities_and_nan() -> None:
    inf, nan = math.inf, math.nan
    scorer, q, k = given_scores(torch.tensor([[[[nan, -inf, inf, 3.0, -inf, inf]]]]))
    for k_best, wanted in ((1, [2]), (2, [2, 5]), (6, [2, 3, 5])):
        pattern = P.TopK(k_best, unit_kv=1, scorer=scorer)
        assert blocks_of(pattern, select(pattern, q, k)) == [[[wanted]]]
    pattern = P.TopK(3, unit_kv=1, scorer=scorer, sink=2)
    assert blocks_of(pattern, select(pattern, q, k)) == [[[[0, 1, 2]]]]


def test_more_than_there_are() -> None:
    q, k = operands()
    found, _ = check(P.TopK(1000, unit_kv=16), q, k, P.Causal())
    assert found.index.shape[-1] == 7
    assert torch.equal(
        found.dense(100, 100)[0, 0],
        torch.tensor([[kv // 16 <= q // 16 for kv in range(100)] for q in range(100)]),
    )


@pytest.mark.parametrize("lengths", [(0, 10), (10, 0)], ids=str)
def test_no_tokens(lengths: tuple[int, int]) -> None:
    q, k = operands(n_q=lengths[0], n_kv=lengths[1])
    found = select(P.TopK(2, unit_kv=16), q, k)
    assert found.dense(*lengths).shape == (B, 1, *lengths)
    assert not found.count.any()


def test_a_mask_that_hides_everything() -> None:
    q, k = operands()
    found = select(P.TopK(2, unit_kv=16, sink=1, local=1), q, k, P.Causal() & ~P.Causal())
    assert not found.count.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_fp32(dtype: torch.dtype) -> None:
    q, k = (t.to(dtype) for t in operands())
    for pattern in SCORERS[:4]:
        rounded = select(pattern, q, k, P.Causal())
        assert torch.equal(rounded.index, select(pattern, q.float(), k.float(), P.Causal()).index)


@pytest.mark.parametrize("scorer", [P.MeanPool(), P.OverlapPool(), P.Antidiagonal()], ids=repr)
def test_chunks_change_nothing(scorer: P.Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_compile.selection import builders as home

    pattern = P.TopK(2, unit_kv=16, unit_q=16, scorer=scorer, diagonal=True)
    q, k = operands(n_q=90)
    whole = select(pattern, q, k, P.Causal())
    monkeypatch.setattr(home, "_MOST", 1)
    found = select(pattern, q, k, P.Causal())
    assert torch.equal(found.index, whole.index)
    assert torch.equal(found.count, whole.count)


def test_no_gradient() -> None:
    q, k = (t.requires_grad_() for t in operands())
    seen: list[bool] = []

    def gate(q: Tensor, k: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return (q @ k.repeat_interleave(2, 1).mT)[:, :, ::1]

    select(P.TopK(2, unit_kv=1, scorer=gate), q, k)
    assert seen == [False]


WAITING = [
    P.TopK((3, 4)),
    P.MoBA(),
    P.Quest(3),
    P.XAttention(),
    P.NSASelection(),
    P.TopRatio((0.2, 0.3)),
    P.TopP((0.2, 1.0)),
    P.Threshold(0.0, of="softmax"),
]


@pytest.mark.parametrize("pattern", WAITING, ids=repr)
def test_waits_for_nothing_and_has_static_shapes(pattern: Any) -> None:
    # Tensors without data cannot be read on the host, nor be combined with others.
    q, k = (t.to("meta") for t in operands(n_q=300, n_kv=300))
    bound = (P.Causal() & P.Documents(torch.zeros(300, dtype=torch.int64))).bound()
    found = pattern.select(q, k, bound.expr, bound.tables("meta", 300, 300, 2, 4), [])
    assert found.index.is_meta
    q, k = operands(n_q=300, n_kv=300)
    assert found.index.shape == select(pattern, q, k).index.shape


def test_no_tensor_of_all_pairs() -> None:
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(part, Tensor):
                    Sizes.largest = max(Sizes.largest, part.untyped_storage().nbytes())
            return out

    n = 4096
    q, k = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8)
    with Sizes():
        select(P.TopK(8, unit_kv=64, local=1), q, k, P.Causal())
    assert Sizes.largest <= n * (n // 64) * 8
