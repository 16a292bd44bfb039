"""Masks of scores that reach the k-th best: the same keys, equal scores included, as lists."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparse_compile
from sparse_compile.expr import KV, B, MaskExpr, Q, table
from sparse_compile.layout.cost import KEYS_FOR_ONE
from sparse_compile.ops import indexer as indexer_ops
from sparse_compile.ops.kept import INDEXED_KEPT, KEPT_SELECTION
from sparse_compile.passes.lift import kept
from sparse_compile.selection import Selection, check_lists
from sparse_compile.selection.kept import kept_lists
from sparse_compile.sites.plan import Plan
from sparse_compile.spec.indexer import IndexerSpec
from tests.passes import test_find_indexer as indexing
from tests.passes.rewritten import Rewritten, assert_same, trained
from tests.passes.test_recognise_selected import (
    BATCH,
    BLOCK,
    DIM,
    HEADS,
    LENGTH,
    Moba,
    agree,
    causal,
    gate_of,
    operands,
)

Mask = Callable[[Tensor], Tensor]
KEPT = 2


@pytest.fixture(autouse=True)
def lists_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of single keys pay for these few keys, as they do for many."""
    monkeypatch.setitem(KEYS_FOR_ONE, "cpu", 2)


def by_bool_index(gate: Tensor) -> Tensor:
    """As in the reference implementation of MoBA: the threshold, and the indices besides."""
    best = torch.topk(gate, KEPT, dim=-1, largest=True, sorted=False)
    need = gate >= best.values.min(dim=-1)[0].unsqueeze(-1)
    named = torch.zeros(need.shape, dtype=torch.bool).scatter_(-1, best.indices, value=True)
    need = torch.logical_and(need, named)
    gate = gate.clone()
    gate[need] = 0
    gate[~need] = -math.inf
    return gate


#: Scores to the keys that they keep.
WAYS: dict[str, Mask] = {
    "k-th value": lambda g: g >= g.topk(KEPT, -1).values[..., -1:],
    "an index": lambda g: g >= g.topk(KEPT).values[..., -1].unsqueeze(-1),
    "the other way round": lambda g: g.topk(KEPT, -1)[0][..., [-1]] <= g,
    "least of the best": lambda g: g >= g.topk(KEPT, -1).values.amin(-1, keepdim=True),
    "gathered": lambda g: g >= g.gather(-1, g.topk(KEPT, -1).indices)[..., -1:],
    "above": lambda g: g > g.topk(KEPT, -1).values[..., -1:] - 1,
    "the least": lambda g: g <= g.topk(KEPT, -1, largest=False).values[..., -1:],
    "kthvalue": lambda g: g >= g.kthvalue(g.shape[-1] - KEPT + 1, -1, keepdim=True).values,
    "below is masked": lambda g: torch.zeros_like(g).masked_fill(
        g < g.topk(KEPT).values[..., -1, None], -math.inf
    ),
    "where": lambda g: torch.where(g < g.topk(KEPT).values[..., -1:], -math.inf, 0.0),
}


def program(way: Mask, block: int) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = way(gate)
        mask = mask if block == 1 else mask.repeat_interleave(block, -1)
        own = mask & causal() if mask.dtype == torch.bool else None
        mask = mask.masked_fill(~causal(), -math.inf) if own is None else own
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


#: Each way in both units and with both kinds of room, and each of these with the other.
PAIRS = [
    pytest.param(way, block, (block == 1) == bool(number % 2), id=f"{name}-{block}")
    for number, (name, way) in enumerate(WAYS.items())
    for block in (1, BLOCK)
]


@pytest.mark.parametrize(("way", "block", "waits"), PAIRS)
def test_equal_scores_are_kept(
    monkeypatch: pytest.MonkeyPatch, way: Mask, block: int, waits: bool
) -> None:
    if waits:
        monkeypatch.setattr(kept, "_FEW", 0)
    gate = gate_of(HEADS, LENGTH // block).mul(2).round()
    assert (way(gate) != way(gate + torch.rand_like(gate) / 9)).any(), "scores are equal"
    found = agree(program(way, block), *operands(), gate)
    assert found.listed is not None, found.reason
    assert (found.listed.unit_q, found.listed.unit_kv) == (1, block)
    assert str(found.listed.mask.predicate) == "kv <= q"
    assert "the 2 best scores and those that equal the last of them" in found.reason
    assert ("asked of the device" in found.reason) == waits


@pytest.mark.parametrize("block", [1, BLOCK])
def test_with_the_indices_besides(block: int) -> None:
    """What an index names and what a tensor of the same shape allows: no tensor of all pairs."""
    gate = gate_of(HEADS, LENGTH // block).mul(2).round()
    found = agree(program(by_bool_index, block), *operands(), gate)
    assert found.listed is not None, found.reason
    assert found.listed.mask.tables == ()
    assert found.reason.startswith(f"selected: top-k of {KEPT} indices")


def test_scores_without_order() -> None:
    """NaN is greater than all for a top-k, and smaller than none; -inf equals -inf."""
    gate = gate_of(HEADS, LENGTH)
    gate[0, 0, :10, ::3], gate[0, 1] = math.nan, -math.inf
    gate[1, 0, :, 5:9] = math.inf
    for way in (WAYS["k-th value"], WAYS["below is masked"]):
        assert agree(program(way, 1), *operands(), gate).listed is not None


def test_hidden_keys_are_not_listed() -> None:
    """Where less than k keys are visible, all the hidden ones reach -inf, too."""

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, lengths: Tensor) -> Tensor:
        visible = causal() & (torch.arange(LENGTH) < lengths.view(-1, 1, 1, 1))
        gate = gate.masked_fill(~visible, -math.inf)
        mask = visible & (gate >= gate.topk(7, -1).values[..., -1:])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = *operands(), gate_of(HEADS, LENGTH), torch.tensor([LENGTH, 9])
    found = agree(run, *args)
    assert found.listed is not None, found.reason
    lists = sparse_compile.explain(run, *args).sites[0].lists
    assert lists is not None
    assert (lists.least, lists.most, lists.room) == (1, 7, 7)


@pytest.mark.parametrize("lists", [1, 2, HEADS])
def test_heads_share_lists(lists: int) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        mask = (gate >= gate.topk(5, -1).values[..., -1:]).repeat_interleave(HEADS // lists, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & causal())

    assert agree(run, *operands(), gate_of(lists, LENGTH)).executor == "selected"


def unbounded(gate: Tensor) -> Tensor:
    return gate >= gate.sort(-1).values[..., -3:-2]


def most_of_them(gate: Tensor) -> Tensor:
    return gate >= gate.topk(30, -1).values[..., -1:]


def or_others(gate: Tensor) -> Tensor:
    at = torch.arange(LENGTH)
    return WAYS["k-th value"](gate) | (at[:, None] - at < 4)


@pytest.mark.parametrize(
    ("way", "why"),
    [
        (unbounded, "nothing says how many these are"),
        (most_of_them, "30 of 40 keys, and on cpu lists pay from one of 2 on"),
        (or_others, "does not just narrow the mask"),
    ],
)
def test_left_as_a_tensor(way: Mask, why: str) -> None:
    found = agree(program(way, 1), *operands(), gate_of(HEADS, LENGTH))
    assert found.listed is None
    assert why in found.reason


class ByThreshold(Moba):
    """The same blocks, and those whose scores equal the last of them."""

    def best(self, gate: Tensor) -> Tensor:
        return gate >= gate.topk(KEPT, -1).values[..., -1:]


@pytest.mark.parametrize("backend", ["passes", "sparse_compile"])
def test_a_model(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(kept, "_FEW", 0)  # 13 blocks: the longest list is asked for
    torch.manual_seed(0)
    network = nn.Sequential(ByThreshold(), ByThreshold())
    x = torch.randn(1, 104, HEADS * DIM)  # no other tensor has 104 * 104 numbers
    if backend == "sparse_compile":
        fast = torch.compile(network, backend=backend, fullgraph=True)
        assert_same(trained(fast, network, x), trained(network, network, x))
        return
    program = Rewritten()
    assert_same(trained(program.compiled(network), network, x), trained(network, network, x))
    assert program.squares(104) == []
    assert all(isinstance(found, Plan) and found.listed for found in program.decisions)


# The lists ---------------------------------------------------------------------------------------


@given(
    shape=st.tuples(*(st.integers(1, high) for high in (2, 3, 9, 40))),
    part=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_lists_say_what_is_kept(shape: tuple[int, ...], part: float, seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < part
    parts = [(0, shape[2] // 2), (shape[2] // 2, shape[2])]
    for room in (None, shape[3]):
        lists = kept_lists(lambda a, b: mask[:, :, a:b], parts, shape[:3], mask.device, room)
        assert lists[0].shape[3] == (lists[1].max() if room is None else room)
        check_lists(*lists, shape[3])
        assert torch.equal(Selection(*lists, 1, 1).dense(shape[2], shape[3]), mask)


@pytest.mark.parametrize("fixed", [False, True])
def test_the_operators(fixed: bool) -> None:
    mask = MaskExpr((KV <= Q) & (KV < table(0)(B)), ("int64",))
    seen = [torch.tensor([20, 30])], []
    kept = torch.rand(BATCH, HEADS, 5, 9) < 0.5
    args = kept, fixed, *seen, [2 * HEADS, 33, 33], [8, 4], mask.text
    torch.library.opcheck(KEPT_SELECTION, args)
    found = Selection(*KEPT_SELECTION(*args), 8, 4).dense(33, 33)
    at = torch.arange(33)
    visible = (at <= at[:, None]) & (at < seen[0][0].view(-1, 1, 1, 1))
    by_key = kept.repeat_interleave(8, 2).repeat_interleave(4, 3)[:, :, :33, :33]
    assert torch.equal(found & visible, by_key & visible)
    assert not found[:, :, :, 32:].any()
    assert not found[:, :, :8, 8:].any()
    q, k, w, _ = indexing.operands(ties=False)
    spec = IndexerSpec((), (), True, MaskExpr(KV <= Q), 0, True)
    lengths = [2, indexing.LENGTH, indexing.LENGTH]
    given_ = (q, k.mT, w, [], [], 5, spec.text, "ge", fixed, *seen, lengths, mask.text)
    torch.library.opcheck(INDEXED_KEPT, given_)


# Of the scores of an indexer ---------------------------------------------------------------------

#: Scores to the keys that they keep, of the indexer's queries.
REACHING: dict[str, Mask] = {
    "at least": lambda s: s >= s.topk(5, -1).values[..., -1:],
    "above": lambda s: s > s.topk(5, -1).values[..., -1].unsqueeze(-1),
    "not below": lambda s: ~(s < s.topk(5, -1).values[..., -1:]),
    "least, in no order": lambda s: s >= s.topk(5, -1, sorted=False).values.amin(-1, keepdim=True),
    "at most": lambda s: s.topk(5, -1, largest=False).values[..., -1:] >= s,
}


def by_indexer(
    scores: indexing.Scores, masked: Mask, reaching: Mask
) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        hidden = reaching(masked(scores(q, k, w)))
        bias = torch.zeros(hidden.shape).masked_fill(~hidden, -math.inf)
        mask = bias.masked_fill(~indexing.causal(), -math.inf).unsqueeze(1)
        return (F.scaled_dot_product_attention(x, x, x, attn_mask=mask),)

    return run


SCORED = [
    (indexing.matmul, indexing.by_fill),
    (indexing.einsum, indexing.by_sum),
    (indexing.heads_first, indexing.in_place),
    (indexing.summed, indexing.not_at_all),
]


@pytest.mark.parametrize(
    ("scores", "masked", "reaching", "ties"),
    [  # every pair of scores, comparison and ties
        pytest.param(*scored, reaching, (i + j) % 2 == 1, id=f"{scored[0].__name__}-{name}")
        for i, scored in enumerate(SCORED)
        for j, (name, reaching) in enumerate(REACHING.items())
    ],
)
def test_no_scores_of_all_keys(
    monkeypatch: pytest.MonkeyPatch,
    scores: indexing.Scores,
    masked: Mask,
    reaching: Mask,
    ties: bool,
) -> None:
    monkeypatch.setattr(kept, "_FEW", 0)
    monkeypatch.setattr(indexer_ops, "_MOST", 10 * indexing.HEADS * indexing.LENGTH)
    run, args = by_indexer(scores, masked, reaching), indexing.operands(ties)
    rewritten = Rewritten()
    torch.testing.assert_close(rewritten.compiled(run)(*args), run(*args))
    (found,) = rewritten.decisions
    assert isinstance(found, Plan)
    assert found.indexer is not None, found.reason
    assert rewritten.squares(indexing.LENGTH) == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_few_keys_are_not_asked_for(dynamic: bool) -> None:
    """Every list has room for all of few keys; that there are few, only a fixed length tells."""

    def run(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
        length = q.shape[1]
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        scores = indexing.matmul(q, k, w).masked_fill(~visible, -math.inf)
        mask = REACHING["at least"](scores) & visible
        return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))

    rewritten, args = Rewritten(), indexing.operands(ties=True)
    fast = rewritten.compiled(run, dynamic)
    for length in (indexing.LENGTH, 11):
        cut = [*(arg[:, :length] for arg in args[:3]), args[3][:, :, :length]]
        torch.testing.assert_close(fast(*cut), run(*cut))
    for found in rewritten.decisions:
        assert isinstance(found, Plan)
        assert found.indexer is not None, found.reason
    assert ("asked of the device" in rewritten.decisions[0].reason) == dynamic


def test_inside_a_checkpoint() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return program(WAYS["k-th value"], BLOCK)(q, k, v, gate)

    def run(*args: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(attend, *args, use_reentrant=False)
        return out

    found = agree(run, *operands(), gate_of(HEADS, LENGTH // BLOCK).mul(2).round())
    assert found.listed is not None, found.reason


class Indexed(nn.Module):
    """Attention to the keys whose scores, of an indexer of their own, reach the 16th best."""

    WIDTH, HEADS = 64, 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(self.WIDTH, 3 * self.WIDTH, bias=False)
        self.index_q, self.index_k, self.weights = (
            nn.Linear(self.WIDTH, width, bias=False) for width in (32, 8, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        with torch.no_grad():
            q = self.index_q(x).view(batch, length, 4, 8)
            scores = indexing.matmul(q, self.index_k(x), self.weights(x))
            scores = scores.masked_fill(~causal, -math.inf)
            mask = scores >= scores.topk(16, -1).values[..., -1:]
        heads = self.qkv(x).view(batch, length, 3, self.HEADS, -1).permute(2, 0, 3, 1, 4)
        hidden = ~(mask & causal).unsqueeze(1)
        weights = (heads[0] @ heads[1].mT * 0.25).masked_fill(hidden, -math.inf).softmax(-1)
        out: Tensor = (weights @ heads[2]).transpose(1, 2).flatten(2)
        return out


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_with_an_indexer(batch: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Indexed(), Indexed())
    x, program = torch.randn(batch, 150, Indexed.WIDTH), Rewritten()
    assert_same(trained(program.compiled(network), network, x), trained(network, network, x))
    assert program.squares(150) == []


#: Scores to keys that they keep; the bounds are not, or not known to be, the last of the best.
OTHER_BOUNDS: dict[str, Mask] = {
    "k-th value": lambda s: s >= s.kthvalue(30, -1, keepdim=True).values,
    "indices": lambda s: s >= s.topk(5, -1).indices.float()[..., -1:],
    "rounded": lambda s: s >= s.topk(5, -1).values[..., -1:].bfloat16().float(),
    "in another dtype": lambda s: s >= s.topk(5, -1).values[..., -1:].to(torch.float16),
    "scaled": lambda s: s >= s.topk(5, -1).values[..., -1:] * 0.9,
    "without sign": lambda s: s >= s.topk(5, -1).values[..., -1:].abs(),
    "not below a number": lambda s: s >= s.topk(5, -1).values[..., -1:].clamp(min=0.3),
    "the first": lambda s: s >= s.topk(5, -1).values.amax(-1, keepdim=True),
    "the last but one": lambda s: s >= s.topk(5, -1).values[..., -2:-1],
    "of keys": lambda s: s >= s.topk(5, 1).values[:, -1:],
    "rounded scores": lambda s: s.bfloat16() >= s.topk(5, -1).values[..., -1:],
    "other scores": lambda s: s * 2 >= s.topk(5, -1).values[..., -1:],
}


@pytest.mark.parametrize(
    ("reaching", "ties"),
    [
        pytest.param(reaching, number % 2 == 1, id=name)
        for number, (name, reaching) in enumerate(OTHER_BOUNDS.items())
    ],
)
def test_other_bounds(reaching: Mask, ties: bool) -> None:
    run = by_indexer(indexing.matmul, indexing.by_fill, reaching)
    rewritten, args = Rewritten(), indexing.operands(ties)
    torch.testing.assert_close(rewritten.compiled(run)(*args), run(*args), equal_nan=True)
    (found,) = rewritten.decisions
    assert isinstance(found, Plan)
    assert found.indexer is None


def values_read(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    best = scores.topk(5, -1).values
    mask = (scores >= best[..., -1:]) & indexing.causal()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1)) + best.sum()


def scores_read(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    mask = (scores >= scores.topk(5, -1).values[..., -1:]) & indexing.causal()
    out = F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))
    return out + scores.amax()


def others_compared(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    best = (scores / 2).topk(5, -1).values
    mask = (scores >= best[..., -1:]) & indexing.causal()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))


def changed_between(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.matmul(q, k, w)
    best = scores.topk(5, -1).values
    scores = scores.masked_fill_(~indexing.causal(), -math.inf)
    mask = (scores >= best[..., -1:]) & indexing.causal()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))


def bound_changed(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    best = scores.topk(5, -1).values
    best += 0.25
    mask = (scores >= best[..., -1:]) & indexing.causal()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))


def operand_changed(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    q = q.clone()
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    reached = scores >= scores.topk(5, -1).values[..., -1:]
    q.zero_()
    visible = (torch.rand(1, 1, indexing.LENGTH) < 2) & indexing.causal()
    mask = (reached & visible).unsqueeze(1)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask) + q.sum()


def first_of_the_best(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    mask = (scores >= scores.topk(5, -1).values[..., :1]) & indexing.causal()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))


def of_another_row(q: Tensor, k: Tensor, w: Tensor, x: Tensor) -> Tensor:
    scores = indexing.by_fill(indexing.matmul(q, k, w))
    bound = scores.topk(5, -1).values[..., -1:].flip(1)
    mask = (scores >= bound) & indexing.causal()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.unsqueeze(1))


@pytest.mark.parametrize(
    "run",
    [
        values_read,
        scores_read,
        others_compared,
        changed_between,
        bound_changed,
        operand_changed,
        first_of_the_best,
        of_another_row,
    ],
)
def test_scores_that_must_stay(run: Callable[..., Tensor]) -> None:
    args = indexing.operands(ties=False)
    rewritten = Rewritten()
    torch.testing.assert_close(rewritten.compiled(run)(*args), run(*args), equal_nan=True)
    (found,) = rewritten.decisions
    assert not isinstance(found, Plan) or found.indexer is None
