"""Patterns that select by scores, as values: how they print and compare, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.errors import BadPattern, BadShape
from sparse_compile.ops.selected import SELECTED_ATTENTION
from sparse_compile.selection import checked_select
from sparse_compile.spec.selected import SelectedSpec
from tests.selection.test_scored import check, dense, given_scores, operands, select

VALUES: list[Any] = [
    P.TopK(16),
    P.TopK((1, 2, 3), unit_kv=16, sink=1),
    P.TopRatio(0.25, share="all"),
    P.TopP(0.9, unit_q=128, unit_kv=128, scorer=P.Antidiagonal(8), diagonal=True),
    P.TopP((0.9, 1.0), most=7, align="lower_right"),
    P.Threshold(-1.5, of="softmax", unit_kv=1, block=10, local=2),
    P.TopK(4, scorer=P.MinMax()),
    P.TopK(4, scorer=P.OverlapPool(64, 32)),
    P.MoBA(),
    P.Quest(8),
    P.XAttention(),
    P.NSASelection(),
]


@pytest.mark.parametrize("pattern", VALUES, ids=repr)
def test_prints_as_what_makes_it(pattern: Any) -> None:
    again = eval(repr(pattern), {name: getattr(P, name) for name in P.__all__})
    assert again == pattern
    assert hash(again) == hash(pattern)
    assert sum(other == pattern for other in VALUES) == 1


def test_functions_and_tensors_in_values() -> None:
    def scores(q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError

    one, other = P.TopK(2, scorer=scores), P.TopK(2, scorer=P.Gate(scores))
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == "TopK(2, scorer=Gate(scores))"
    assert repr(P.Gate(torch.nn.Linear(2, 2))) == "Gate(Linear)"
    q, k, w = torch.ones(1, 2, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 2)
    assert P.DSA(q, k, w) == P.DSA(q.clone(), k, w)
    assert hash(P.DSA(q, k, w)) == hash(P.DSA(q.clone(), k, w))
    assert P.DSA(q, k, w) != P.DSA(q + 1, k, w)


MADE: list[tuple[Callable[[], object], str]] = [
    (lambda: P.TopK(0), "TopK: k is 0. Write 1 or more."),
    (lambda: P.TopK(2.5), "TopK: k must be a whole number, not 2.5. Write 1 or more."),
    (lambda: P.TopK(()), "TopK: k is (). Write one for each list of heads, or one for all."),
    (
        lambda: P.TopK((8, 2), sink=1, local=2),
        "TopK: k is 2, but sink, local and diagonal force 3 blocks, which count. Write 3 or more, "
        "or force fewer.",
    ),
    (
        lambda: P.TopP(0.9, most=1, sink=1, diagonal=True),
        "TopP: most is 1, but sink, local and diagonal force 2 blocks, which count. Write 2 or "
        "more, or force fewer.",
    ),
    (lambda: P.TopRatio(0), "TopRatio: ratio is 0. Write more than 0, and at most 1."),
    (lambda: P.TopP(1.5), "TopP: p is 1.5. Write more than 0, and at most 1."),
    (lambda: P.Threshold("low"), "Threshold: t is 'low'. Write a number."),
    (
        lambda: P.Threshold(0.5, of="logits"),
        "Threshold: of is 'logits'. Write 'scores' or 'softmax'.",
    ),
    (lambda: P.TopK(2, unit_kv=48), "TopK: unit_kv is 48. Write one of [1, 16, 32, 64, 128]."),
    (lambda: P.TopK(2, unit_q=2), "TopK: unit_q is 2. Write one of [1, 16, 32, 64, 128]."),
    (
        lambda: P.TopK(2, block=100),
        "TopK: a block of 100 keys is no multiple of unit_kv, 64. Write a unit_kv that divides it.",
    ),
    (lambda: P.TopK(2, share="head"), "TopK: share is 'head'. Write 'group' or 'all' or 'none'."),
    (lambda: P.TopK(2, sink=-1), "TopK: sink is -1. Write 0 or more."),
    (
        lambda: P.TopK(2, scorer="mean"),
        "TopK: scorer is 'mean'. Write a scorer, such as MeanPool(), or a function (q, k) -> "
        "scores.",
    ),
    (
        lambda: P.TopK(2, scorer=P.OverlapPool(24, 24)),
        "OverlapPool(window=24, stride=24) with blocks of 64 keys, which its stride does not "
        "divide. Write a stride that divides the block, such as 16 of 64.",
    ),
    (
        lambda: P.OverlapPool(40, 16),
        "OverlapPool: a window of 40 keys is not a multiple of the stride 16. Write window=32.",
    ),
    (
        lambda: P.TopP(0.9, scorer=P.Antidiagonal()),
        "Antidiagonal() with units of 1 queries and blocks of 64 keys, which its stride does not "
        "divide. Write unit_q and block as multiples of 16, such as 128.",
    ),
    (
        lambda: P.Indexer(torch.ones(1, 2, 3), torch.ones(1, 3, 4), torch.ones(1, 3, 2)),
        "Indexer: q_index is torch.float32 [1, 2, 3]. Pass a floating tensor [B, Hi, Nq, Di].",
    ),
    (
        lambda: P.SeerAttention(len),
        "SeerAttention needs k or threshold, and not both. Write SeerAttention(gate, k=16) or "
        "SeerAttention(gate, threshold=0.002).",
    ),
]


@pytest.mark.parametrize("make, message", MADE, ids=range(len(MADE)))
def test_bad_parameters(make: Callable[[], object], message: str) -> None:
    with pytest.raises(BadPattern) as caught:
        make()
    assert str(caught.value) == f"sparse_compile: {message}"


def test_scores_that_do_not_fit() -> None:
    q, k = operands((6, 2))
    for shape in [(2, 2, 100, 6), (2, 5, 100, 7), (1, 2, 100, 7), (2, 100, 7)]:
        pattern = P.TopK(2, unit_kv=16, scorer=lambda q, k, shape=shape: torch.zeros(shape))
        with pytest.raises(BadShape) as caught:
            select(pattern, q, k)
        assert str(caught.value) == (
            f"sparse_compile: Gate(<lambda>) returned torch.float32 {list(shape)} for q "
            "[2, 6, 100, 8], k [2, 2, 100, 8], units of 1 queries and blocks of 16 keys. Return "
            "floating scores of [2, one of [1, 2, 6], 100, 7]: batch, heads, ceil(Nq / unit_q), "
            "ceil(Nkv / block)."
        )
    with pytest.raises(BadShape, match="returned a NoneType"):
        select(P.TopK(2, scorer=lambda q, k: None), q, k)


def test_operands_that_do_not_fit() -> None:
    q, k = operands((4, 3))
    with pytest.raises(BadShape, match="Hkv divides Hq"):
        select(P.TopK(2), q, k)
    q, k = operands((4, 2))
    with pytest.raises(BadPattern, match="k is given for 3 lists of heads, but there are 2"):
        select(P.TopK((1, 2, 3)), q, k)
    indexer = P.Indexer(torch.ones(2, 1, 99, 4), torch.ones(2, 100, 4), torch.ones(2, 100, 1))
    with pytest.raises(BadPattern, match=r"q_index \[2, 1, 99, 4\] .* Pass \[2, 1, 100, 4\]"):
        select(P.TopK(2, scorer=indexer), q, k)


def test_checked_selection() -> None:
    scorer, q, k = given_scores(torch.tensor([[[[0.0, float("nan"), 1.0]]]]))
    pattern = P.TopK(2, unit_kv=1, scorer=scorer)
    with pytest.raises(BadPattern, match=r"Gate\(<lambda>\) gives 1 scores that are NaN"):
        checked_select(pattern, q, k)
    hidden = (~P.SlidingWindow(1)).bound().expr  # which hides the NaN
    assert checked_select(pattern, q, k, hidden).count.item() == 1
    full = P.Threshold(-1.0, unit_kv=1, scorer=lambda q, k: torch.zeros(1, 1, 1, 3), most=2)
    with pytest.raises(BadPattern, match="would select 3 blocks in a list with room for 2"):
        checked_select(full, q, k)
    given = P.Selected(torch.tensor([[[[0, 5]]]]), unit_kv=1)
    with pytest.raises(BadPattern, match="names unit 5, but the keys make 3 units of 1"):
        checked_select(given, q, k)
    assert checked_select(P.Selected(torch.tensor([[[[2, -1]]]]), unit_kv=1), q, k).count == 1


def gate(q: Tensor, k: Tensor) -> Tensor:
    blocks = [t.split(64, 2) for t in (q, k.repeat_interleave(2, 1))]
    means = [torch.stack([part.mean(2) for part in side], 2) for side in blocks]
    return means[0] @ means[1].mT


@pytest.mark.parametrize(
    "pattern",
    [P.MoBA(32, 2), P.MoBA(256), P.Quest(3), P.XAttention(8, 0.7, 32), P.NSASelection(32, 4)],
    ids=repr,
)
def test_published_selections(pattern: Any) -> None:
    q, k = operands(n_q=300, n_kv=300)
    check(pattern, q, k, P.Causal())


def test_gates() -> None:
    q, k = operands(n_q=300, n_kv=300)
    found = select(P.SeerAttention(gate, k=2), q, k, P.Causal())
    assert found.index.shape == (2, 4, 5, 2)
    wanted = gate(q, k).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    few = select(P.SeerAttention(gate, threshold=0.3), q, k, P.Causal())
    chosen = (wanted.softmax(-1) >= 0.3).repeat_interleave(64, 2).repeat_interleave(64, 3)
    assert torch.equal(few.dense(300, 300), chosen[:, :, :300, :300])


@pytest.mark.parametrize("pattern", [P.TopK(2, unit_kv=16), P.MoBA(32, 2), P.TopP(0.5)], ids=repr)
def test_attention_over_what_is_selected(pattern: Any) -> None:
    q, k = operands()
    found = select(pattern, q, k, P.Causal())
    spec = SelectedSpec(P.Causal().bound().expr, found.unit_q, found.unit_kv)
    out, _ = SELECTED_ATTENTION(q, k, k, found.index, found.count, [], [], 0.25, spec.text)
    chosen = found.dense(100, 100).repeat_interleave(4 // found.index.shape[1], 1)
    keep = chosen & dense(P.Causal(), q, k)
    score = (q @ k.repeat_interleave(2, 1).mT * 0.25).masked_fill(~keep, float("-inf"))
    wanted = score.softmax(-1).nan_to_num(0) @ k.repeat_interleave(2, 1)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
