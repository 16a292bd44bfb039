"""Indexers: the same indices, ties included, without the scores of all keys; or left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops import indexer as indexer_ops
from sparse_compile.ops import selection as selection_ops
from sparse_compile.sites.plan import Plan
from sparse_compile.spec.indexer import IndexerSpec
from tests.passes.rewritten import Rewritten

BATCH, LENGTH, HEADS, DIM, KEPT = 2, 37, 3, 8, 5

Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


def matmul(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    each = F.relu(torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)) * 0.25)
    return torch.matmul(w.unsqueeze(-2), each).squeeze(-2)


def einsum(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    each = torch.relu(torch.einsum("bshd,btd->bsht", q, k))
    return torch.einsum("bsht,bsh->bst", each, w) / 3


def heads_first(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    each = (torch.einsum("bhsd,btd->bhst", q.transpose(1, 2), k) / 4).relu()
    return (each * w.transpose(1, 2).unsqueeze(-1)).sum(1)


def summed(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    each = (q @ k.mT[:, None]).relu()
    return (w[..., None] * each).sum(dim=2)


def operands(ties: bool) -> tuple[Tensor, ...]:
    """q, k, the weights of an indexer, and q = k = v of an attention."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, LENGTH, HEADS, DIM), (BATCH, LENGTH, DIM), (BATCH, LENGTH, HEADS)]
    made = [torch.randn(s, generator=generator) for s in (*shapes, (BATCH, 2, LENGTH, 16))]
    # Small whole numbers are computed exactly, in whatever order, and make many scores equal.
    return tuple(t.round() if ties and t.shape[-1] != 16 else t for t in made)


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def program(
    scores: Scores, masked: Callable[[Tensor], Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        index = masked(scores(q, k, w)).topk(KEPT, -1).indices
        chosen = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
        mask = (chosen & causal()).unsqueeze(1)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask), index

    return run


def by_fill(scores: Tensor) -> Tensor:
    return scores.masked_fill(~causal(), -math.inf)


def by_sum(scores: Tensor) -> Tensor:
    return scores + torch.zeros(LENGTH, LENGTH).masked_fill(~causal(), torch.finfo(torch.float).min)


def by_where(scores: Tensor) -> Tensor:
    return torch.where(causal(), scores, -math.inf)


def in_place(scores: Tensor) -> Tensor:
    scores.masked_fill_(~causal(), -math.inf)
    return scores


def added_in_place(scores: Tensor) -> Tensor:
    scores /= 4
    scores += torch.zeros(LENGTH, LENGTH).masked_fill(~causal(), -math.inf)
    return scores


def not_at_all(scores: Tensor) -> Tensor:
    return scores


WAYS = [
    *[(matmul, masked) for masked in (by_fill, by_sum, by_where, not_at_all)],
    *[(scores, by_fill) for scores in (einsum, heads_first, summed)],
    (matmul, in_place),
    (einsum, added_in_place),
]


@pytest.mark.parametrize(
    ("scores", "masked", "chunk", "ties"),
    [  # every pair of a way, of chunks and of ties
        (*way, chunk, (number + whole) % 2 == 1)
        for number, way in enumerate(WAYS)
        for whole, chunk in enumerate([10 * HEADS * LENGTH, 1 << 25])
    ],
)
def test_same_indices(
    monkeypatch: pytest.MonkeyPatch,
    scores: Scores,
    masked: Callable[[Tensor], Tensor],
    chunk: int,
    ties: bool,
) -> None:
    monkeypatch.setattr(indexer_ops, "_MOST", chunk)
    run, args = program(scores, masked), operands(ties)
    rewritten = Rewritten()
    out, index = rewritten.compiled(run)(*args)
    expected_out, expected_index = run(*args)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(out, expected_out)
    (found,) = rewritten.decisions
    assert isinstance(found, Plan)
    assert found.indexer is not None, found.reason
    assert rewritten.squares(LENGTH) == []


def values_read(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    best = by_fill(matmul(q, k, w)).topk(KEPT, -1)
    mask = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, best.indices, True)
    out = F.scaled_dot_product_attention(x, x, x, attn_mask=(mask & causal()).unsqueeze(1))
    return out + best.values.sum()


def scores_read(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = by_fill(matmul(q, k, w))
    index = scores.topk(KEPT, -1).indices
    mask = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
    out = F.scaled_dot_product_attention(x, x, x, attn_mask=(mask & causal()).unsqueeze(1))
    return out + scores.amax()


def changed_in_part(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = matmul(q, k, w)
    scores[..., 0] = 1.0
    index = scores.topk(KEPT, -1).indices
    mask = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(mask & causal()).unsqueeze(1))


def read_before_it_changes(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = matmul(q, k, w)
    most = scores.amax()
    scores.masked_fill_(~causal(), -math.inf)
    index = scores.topk(KEPT, -1).indices
    mask = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
    out = F.scaled_dot_product_attention(x, x, x, attn_mask=(mask & causal()).unsqueeze(1))
    return out + most


def operand_overwritten(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    k = k + 0
    scores = by_fill(matmul(q, k, w))
    k.zero_()
    index = scores.topk(KEPT, -1).indices
    mask = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(mask & causal()).unsqueeze(1))


def another_activation(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    each = torch.sigmoid(q @ k.mT[:, None])
    index = by_fill((w[..., None] * each).sum(2)).topk(KEPT, -1).indices
    mask = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool).scatter(-1, index, True)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(mask & causal()).unsqueeze(1))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (values_read, "its values are read, too"),
        (scores_read, "its scores are also read by `amax`"),
        (changed_in_part, "overwritten in part"),
        (read_before_it_changes, "its scores are also read by `amax`"),
        (operand_overwritten, "is overwritten"),
        (another_activation, "not those of an indexer"),
    ],
)
def test_left_as_it_is(run: Callable[..., Tensor], why: str) -> None:
    args, rewritten = operands(ties=False), Rewritten()
    torch.testing.assert_close(rewritten.compiled(run)(*args), run(*args))
    (found,) = rewritten.decisions
    assert isinstance(found, Plan)
    assert found.listed is not None
    assert found.indexer is None
    assert "its top-k is left as it is: " in found.reason
    assert why in found.reason


def test_operators() -> None:
    q, k, w, _ = operands(ties=False)
    spec = IndexerSpec((("mul", 0.25),), (), True, MaskExpr(KV <= Q), -math.inf, adds=False)
    args = (q, k.mT, w, [], [], KEPT, spec.text)
    torch.library.opcheck(indexer_ops.INDEXED_TOPK, args)
    index = indexer_ops.indexed_topk(*args)[:, None]
    torch.library.opcheck(selection_ops.CANONICAL_SELECTION, (index, LENGTH))


def widened(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """As in transformers' DeepSeek-V3.2: products and sums in fp32."""
    each = torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * 0.25
    return torch.matmul(w.unsqueeze(-2), F.relu(each)).squeeze(-2)


def test_operands_that_were_made_fp32_stay_in_half_precision() -> None:
    q, k, w, x = operands(ties=False)
    args, rewritten = (q.bfloat16(), k.bfloat16(), w, x), Rewritten()
    run = program(widened, by_fill)
    torch.testing.assert_close(rewritten.compiled(run)(*args), run(*args))
    (found,) = rewritten.decisions
    assert isinstance(found, Plan)
    assert found.indexer is not None
    spec = found.indexer.spec
    assert isinstance(spec, IndexerSpec)
    assert spec.single
    assert spec.factor == 0.25


def test_operands_of_which_one_was_single_stay_single() -> None:
    q, k, w, x = operands(ties=False)
    args, rewritten = (q.bfloat16(), k, w, x), Rewritten()
    run = program(widened, by_fill)
    torch.testing.assert_close(rewritten.compiled(run)(*args), run(*args))
    (found,) = rewritten.decisions
    assert isinstance(found, Plan)
    assert found.indexer is not None
    assert not found.indexer.spec.single  # type: ignore[union-attr]
