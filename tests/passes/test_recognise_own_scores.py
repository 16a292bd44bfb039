"""Attention to the best of its own scores, by a threshold or by index; or left alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.layout.cost import KEYS_FOR_ONE
from sparse_compile.ops import indexer as indexer_ops
from sparse_compile.ops.indexer import INDEXED_TOPK
from sparse_compile.ops.kept import INDEXED_KEPT
from sparse_compile.passes.lift import kept
from sparse_compile.selection import Selection, check_lists
from sparse_compile.sites.plan import Plan
from sparse_compile.spec.indexer import IndexerSpec
from tests.passes.rewritten import Rewritten, assert_same
from tests.passes.test_memory_of_models import growth
from tests.passes.test_recognise_selected import gradients

BATCH, HEADS, LENGTH, DIM, BEST = 2, 4, 41, 8, 5

Scores = Callable[[Tensor, Tensor], Tensor]
Keep = Callable[[Tensor], Tensor]


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


# From q and k to scores --------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * 0.25


def divided(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(DIM)


def hidden(q: Tensor, k: Tensor) -> Tensor:
    return plain(q, k).masked_fill(~causal(), -math.inf)


def hidden_in_place(q: Tensor, k: Tensor) -> Tensor:
    return plain(q, k).masked_fill_(~causal(), -math.inf)


def shared_keys(q: Tensor, k: Tensor) -> Tensor:
    repeated = k[:, :2, None].expand(-1, -1, 2, -1, -1).reshape(k.shape)
    return hidden(q, repeated)


# From scores to scores that are left -------------------------------------------------------------


def below_is_filled(scores: Tensor) -> Tensor:
    return scores.masked_fill(scores < scores.topk(BEST, -1).values[..., -1:], -math.inf)


def at_least_is_kept(scores: Tensor) -> Tensor:
    bound = torch.topk(scores, BEST, dim=-1)[0][..., -1].unsqueeze(-1)
    return torch.where(scores >= bound, scores, -math.inf)


def least_of_the_best(scores: Tensor) -> Tensor:
    bound = scores.topk(BEST, -1, sorted=False).values.amin(-1, keepdim=True)
    return scores.masked_fill(~(scores >= bound), -math.inf)


def by_index(scores: Tensor) -> Tensor:
    index = scores.topk(BEST, -1).indices
    mask = torch.zeros_like(scores).scatter_(-1, index, 1.0)
    return torch.where(mask > 0, scores, torch.full_like(scores, -math.inf))


def by_index_of_bool(scores: Tensor) -> Tensor:
    index = scores.topk(BEST, -1, sorted=False).indices
    named = torch.zeros(scores.shape, dtype=torch.bool).scatter(-1, index, True)
    return scores.masked_fill(~named, -math.inf)


THRESHOLDS = [below_is_filled, at_least_is_kept, least_of_the_best]


def program(scores: Scores, keep: Keep) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return keep(scores(q, k)).softmax(-1) @ v

    return run


def operands(ties: bool = False, batch: int = BATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, HEADS, LENGTH, DIM, generator=generator) for _ in range(3)]
    # Whole numbers are multiplied exactly, and make many scores equal.
    q, k = (t.round() if ties else t for t in made[:2])
    return [t.requires_grad_() for t in (q, k, made[2])]


@pytest.fixture(autouse=True)
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer_ops, "_MOST", 10 * BATCH * HEADS * LENGTH)
    monkeypatch.setattr(kept, "_FEW", 0)
    monkeypatch.setitem(KEYS_FOR_ONE, "cpu", 8)


def agree(run: Callable[..., Tensor], args: list[Tensor]) -> tuple[Plan, Rewritten]:
    rewritten = Rewritten()
    assert_same(gradients(rewritten.compiled(run), *args), gradients(run, *args))
    (found,) = rewritten.decisions
    assert isinstance(found, Plan), found
    assert found.listed is not None
    assert found.indexer is not None, found.reason
    assert found.reason.endswith("its scores are computed some queries at a time")
    return found, rewritten


@pytest.mark.parametrize(
    ("scores", "keep", "ties"),
    [  # every pair of scores, of what is kept and of ties
        (scores, keep, (i + j) % 2 == 1)
        for i, scores in enumerate([plain, divided, hidden, hidden_in_place, shared_keys])
        for j, keep in enumerate([*THRESHOLDS, by_index, by_index_of_bool])
    ],
)
def test_same_results(scores: Scores, keep: Keep, ties: bool) -> None:
    _, rewritten = agree(program(scores, keep), operands(ties))
    assert rewritten.squares(LENGTH) == []


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("keep", THRESHOLDS)
def test_the_longest_list_is_asked_for(keep: Keep, batch: int) -> None:
    found, rewritten = agree(program(hidden, keep), operands(ties=True, batch=batch))
    assert "asked of the device" in found.reason
    assert rewritten.squares(LENGTH) == []


def test_scores_are_ranked_before_they_are_masked() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = plain(q, k)
        best = scores.topk(BEST, -1).values
        return scores.masked_fill((scores < best[..., -1:]) | ~causal(), -1e9).softmax(-1) @ v

    fast, args = Rewritten(), operands(ties=True)
    assert_same(gradients(fast.compiled(run), *args), gradients(run, *args))

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = plain(q, k)
        best = scores.topk(BEST, -1).values
        shown = scores.masked_fill(~causal(), -math.inf)
        return shown.masked_fill(scores < best[..., -1:], -math.inf).softmax(-1) @ v

    agree(apart, args)


def test_few_keys_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_FEW", 128)
    found, _ = agree(program(hidden, below_is_filled), operands(ties=True))
    assert "asked of the device" not in found.reason


def test_the_backend() -> None:
    run, args = program(hidden, below_is_filled), operands(ties=True)
    fast = torch.compile(run, backend="sparse_compile", fullgraph=True)
    assert_same(gradients(fast, *args), gradients(run, *args))


# Left alone --------------------------------------------------------------------------------------


def returned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = hidden(q, k)
    return below_is_filled(scores).softmax(-1) @ v + scores.nan_to_num(neginf=0.0).sum()


def values_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = hidden(q, k)
    best = scores.topk(BEST, -1).values
    kept_ = scores.masked_fill(scores < best[..., -1:], -math.inf)
    return kept_.softmax(-1) @ v + best[..., :1]


def masked_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = plain(q, k)
    bound = scores.topk(BEST, -1).values[..., -1:]
    scores = scores.masked_fill(~causal(), -math.inf)
    return scores.masked_fill(scores < bound, -math.inf).softmax(-1) @ v


def doubled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = plain(q, k)
    below = scores * 2 < scores.topk(BEST, -1).values[..., -1:]
    return scores.masked_fill(below, -math.inf).softmax(-1) @ v


def of_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores, others = hidden(q, k), hidden(k, q)
    below = scores < others.topk(BEST, -1).values[..., -1:]
    return scores.masked_fill(below, -math.inf).softmax(-1) @ v


def fixed_threshold(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = hidden(q, k)
    return scores.masked_fill(scores < -1.0, -math.inf).softmax(-1) @ v


def many(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = hidden(q, k)
    below = scores < scores.topk(12, -1).values[..., -1:]
    return scores.masked_fill(below, -math.inf).softmax(-1) @ v


def by_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = plain(q, k)
    below = scores < scores.topk(BEST, -2).values[..., -1:, :]
    return scores.masked_fill(below, -math.inf).softmax(-1) @ v


def added_and_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hiding = torch.zeros(LENGTH, LENGTH).masked_fill(~causal(), -math.inf)
    return below_is_filled(plain(q, k) + hiding).softmax(-1) @ v


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (returned, "`nan_to_num`"),
        (added_and_filled, "masks several times, in different ways"),
        (values_read, "also read by `topk`"),
        (of_other_scores, "they cannot be ranked apart: its values are not compared"),
        (masked_between, "also read by `topk`"),
        (doubled, "also read by"),
        (fixed_threshold, "also read by `lt`"),
        (many, "12 of 41 keys, and on cpu lists pay from one of 8 on"),
        (by_query, "also read by `topk`"),
    ],
)
def test_left_alone(run: Callable[..., Tensor], why: str) -> None:
    args, rewritten = operands(), Rewritten()
    assert_same(gradients(rewritten.compiled(run), *args), gradients(run, *args))
    (found,) = rewritten.decisions
    assert not isinstance(found, Plan)
    assert why in found.reason


# Memory and operators ----------------------------------------------------------------------------


class Explicit(nn.Module):
    """Attention to the 16 best keys of every query, after https://arxiv.org/abs/1912.11637."""

    WIDTH = 16

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(self.WIDTH, 3 * self.WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        q, k, v = self.qkv(x).view(batch, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * 0.25).masked_fill(~visible, -math.inf)
        scores = scores.masked_fill(scores < scores.topk(16, -1).values[..., -1:], -math.inf)
        out: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return out


@pytest.mark.parametrize("rewrite", [False, True])
def test_memory_grows_with_the_length(monkeypatch: pytest.MonkeyPatch, rewrite: bool) -> None:
    monkeypatch.setattr(indexer_ops, "_MOST", 1 << 16)
    found = growth(Explicit(), lambda n: torch.randn(1, n, Explicit.WIDTH), rewrite, 512)
    assert found < 2.2 if rewrite else found > 3.5


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("key_heads", [1, HEADS])
def test_the_operators(key_heads: int, fixed: bool) -> None:
    q, k, _ = (t.detach() for t in operands(ties=True))
    k = k[:, :key_heads].mT
    spec = IndexerSpec((("mul", 0.25),), (), False, MaskExpr(KV <= Q), -math.inf, False)
    scores = (q @ k * 0.25).masked_fill(~causal(), -math.inf)
    ranking = q, k, None, [], [], BEST, spec.text
    torch.library.opcheck(INDEXED_TOPK, ranking)
    index = INDEXED_TOPK(*ranking)
    torch.testing.assert_close(scores.gather(-1, index), scores.topk(BEST, -1).values)
    seen = [], [], [HEADS, LENGTH, LENGTH], spec.mask.text
    torch.library.opcheck(INDEXED_KEPT, (*ranking, "ge", fixed, *seen))
    lists = INDEXED_KEPT(*ranking, "ge", fixed, *seen)
    check_lists(*lists, LENGTH)
    wanted = (scores >= scores.topk(BEST, -1).values[..., -1:]) & causal()
    assert torch.equal(Selection(*lists, 1, 1).dense(LENGTH, LENGTH), wanted)


def test_equal_scores_in_half_precision() -> None:
    """Where rounding makes scores equal, all of them are kept, as in the program."""
    args = [t.detach().bfloat16() for t in operands(ties=True)]
    run, rewritten = program(hidden, below_is_filled), Rewritten()
    ours, theirs = rewritten.compiled(run)(*args), run(*args)
    scores = hidden(*args[:2])
    counts = ((scores >= scores.topk(BEST, -1).values[..., -1:]) & causal()).sum(-1)
    assert counts.max() > BEST
    wide = [t.double() for t in args]
    truth = program(hidden, below_is_filled)(*wide)
    error, eager = ((x.double() - truth).norm() / truth.norm() for x in (ours, theirs))
    assert error <= 1.1 * eager
    assert isinstance(rewritten.decisions[0], Plan)
