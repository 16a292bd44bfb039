"""Indexers of blocks: the same indices, ties included, without scores of keys; or left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops import indexer as indexer_ops
from sparse_compile.sites.plan import Plan
from sparse_compile.spec.indexer import BlockScoresSpec
from tests.passes.rewritten import Rewritten

BATCH, HEADS, LENGTH, DIM, BLOCK, KEPT = 2, 2, 37, 8, 8, 3
BLOCKS = -(-LENGTH // BLOCK)

Pooled = Callable[[Tensor, Tensor], Tensor]
Run = Callable[..., Tensor]


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def pooled(scores: Tensor) -> Tensor:
    scores = F.pad(scores, (0, BLOCKS * BLOCK - LENGTH), value=-math.inf)
    return scores.view(BATCH, HEADS, LENGTH, BLOCKS, BLOCK).amax(dim=-1)


def one_key_head(q: Tensor, k: Tensor) -> Tensor:
    return pooled((q @ k[:, :1].mT).masked_fill(~causal(), -math.inf))


def key_heads(q: Tensor, k: Tensor) -> Tensor:
    return pooled((torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.25).masked_fill(~causal(), -math.inf))


def without_heads(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) / 4
    return pooled(torch.where(causal(), scores, -math.inf))


def added(q: Tensor, k: Tensor) -> Tensor:
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~causal(), torch.finfo(torch.float).min)
    return pooled(q @ k.mT + mask)


def reshaped(q: Tensor, k: Tensor) -> Tensor:
    scores = F.pad(q @ k.mT, (0, BLOCKS * BLOCK - LENGTH), "constant", -1e30)
    return scores.unflatten(-1, (BLOCKS, BLOCK)).amax(4)


def by_max(q: Tensor, k: Tensor) -> Tensor:
    scores = (q @ k.mT).mul_(0.5).masked_fill_(~causal(), -math.inf)
    scores = F.pad(scores, (0, BLOCKS * BLOCK - LENGTH), value=-math.inf)
    return scores.view(BATCH, HEADS, LENGTH, BLOCKS, BLOCK).max(dim=-1).values


def transposed(q: Tensor, k: Tensor) -> Tensor:
    q = q.transpose(1, 2).contiguous()
    return pooled(torch.einsum("bqhd,bhkd->bhqk", q, k).masked_fill(~causal(), -math.inf))


def with_own_block(best: Tensor) -> Tensor:
    own = (torch.arange(LENGTH) // BLOCK)[:, None].expand(BATCH, HEADS, -1, -1)
    best.scatter_(-1, own, math.inf)
    return best


def without_future(best: Tensor) -> Tensor:
    later = torch.arange(BLOCKS) > torch.arange(LENGTH)[:, None] // BLOCK
    return best.masked_fill(later, -math.inf) + 0.0


def attend(index: Tensor, x: Tensor) -> Tensor:
    blocks = torch.zeros(BATCH, HEADS, LENGTH, BLOCKS, dtype=torch.bool).scatter(-1, index, True)
    chosen = blocks.repeat_interleave(BLOCK, -1)[..., :LENGTH]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=chosen & causal())


def operands(ties: bool) -> tuple[Tensor, ...]:
    """q and k of an indexer, and q = k = v of an attention."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, BATCH, HEADS, LENGTH, DIM, generator=generator)
    x = torch.randn(BATCH, HEADS, LENGTH, 16, generator=generator)
    # Small whole numbers are computed exactly, in whatever order, and make many scores equal.
    q, k = (q.round(), k.round()) if ties else (q, k)
    return q.requires_grad_(), k.requires_grad_(), x


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        *[(scores, without_future) for scores in (one_key_head, without_heads, added, transposed)],
        *[(scores, with_own_block) for scores in (key_heads, reshaped, by_max)],
    ],
)
def test_same_blocks(
    monkeypatch: pytest.MonkeyPatch, scores: Pooled, chosen: Callable[[Tensor], Tensor], ties: bool
) -> None:
    monkeypatch.setattr(indexer_ops, "_MOST", BATCH * HEADS * LENGTH * 10)

    def run(q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        index = chosen(scores(q, k)).topk(KEPT, -1).indices
        return attend(index, x), index

    program, args = Rewritten(), operands(ties)
    out, index = program.compiled(run)(*args)
    expected_out, expected_index = run(*args)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(out, expected_out)
    (found,) = program.decisions
    assert isinstance(found, Plan)
    assert found.indexer is not None, found.reason
    assert program.squares(LENGTH) == []


def values_read(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    best = one_key_head(q, k).topk(KEPT, -1)
    return attend(best.indices, x) * best.values.softmax(-1)[..., :1]


def scores_read(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~causal(), -math.inf)
    return attend(pooled(scores).topk(KEPT, -1).indices, x) + scores.amax()


def overwritten(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    k = k + 0
    scores = q @ k.mT
    k.zero_()
    return attend(pooled(scores).topk(KEPT, -1).indices, x)


def strided(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """Every eighth key is a block."""
    scores = F.pad(q @ k.mT, (0, BLOCKS * BLOCK - LENGTH), value=-math.inf)
    best = scores.view(BATCH, HEADS, LENGTH, BLOCK, BLOCKS).amax(-2)
    return attend(best.topk(KEPT, -1).indices, x)


def padded_in_front(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    scores = F.pad(q @ k.mT, (BLOCKS * BLOCK - LENGTH, 0), value=-math.inf)
    best = scores.view(BATCH, HEADS, LENGTH, BLOCKS, BLOCK).amax(-1)
    return attend(best.topk(KEPT, -1).indices, x)


def over_queries(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """Regrouped so that blocks reach over the ends of rows."""
    scores = (q @ k.mT)[..., : LENGTH - 1].reshape(BATCH, HEADS, -1, LENGTH, 4)
    best = scores.transpose(2, 3).reshape(BATCH, HEADS, LENGTH, -1, 4).amax(-1)
    return attend(best[..., :BLOCKS].topk(KEPT, -1).indices, x)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (values_read, "it pools scores of keys, but `return` reads their values"),
        (scores_read, "its scores are also read by `amax`"),
        (overwritten, "is overwritten"),
        (strided, "they are not pooled over blocks of the last axis"),
        (padded_in_front, "they are padded in several places"),
        (over_queries, "they are not [B, H, Nq, Nkv]"),
    ],
)
def test_left_as_it_is(run: Run, why: str) -> None:
    program, args = Rewritten(), operands(ties=False)
    torch.testing.assert_close(program.compiled(run)(*args), run(*args))
    (found,) = program.decisions
    assert isinstance(found, Plan)
    assert found.indexer is None
    assert "its top-k is left as it is: " in found.reason
    assert why in found.reason


def test_values_without_a_gradient_may_be_read() -> None:
    program, args = Rewritten(), [arg.detach() for arg in operands(ties=False)]
    torch.testing.assert_close(program.compiled(values_read)(*args), values_read(*args))
    (found,) = program.decisions
    assert isinstance(found, Plan)
    assert found.indexer is not None


def test_operator() -> None:
    q, k, _ = (arg.detach() for arg in operands(ties=False))
    spec = BlockScoresSpec(BLOCK, (), MaskExpr(KV <= Q), -math.inf, False, -math.inf)
    torch.library.opcheck(indexer_ops.BLOCK_SCORES, (q, k.mT, [], [], BLOCKS, spec.text))
    expected = pooled((q @ k.mT).masked_fill(~causal(), -math.inf))
    found = indexer_ops.block_scores(q, k.mT, [], [], BLOCKS, spec.text)
    torch.testing.assert_close(found, expected)
    with pytest.raises(BadShape, match=r"Give q \[B, H, Nq, D\] and k \[B, H or 1, D, Nkv\]"):
        indexer_ops.block_scores(q, k, [], [], BLOCKS, spec.text)
