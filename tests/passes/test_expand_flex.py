"""``flex_attention`` is written out as SDPA, or as a softmax, and rewritten where that is equal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from sparse_compile.sites.plan import Plan
from tests.passes.rewritten import Rewritten, assert_same
from tests.passes.test_expand import left, only_plan

B, H, N, D, BLOCK = 2, 4, 48, 16, 16
DOCUMENTS = torch.arange(N) // 20
OF_BATCH = torch.stack([DOCUMENTS, torch.arange(N) // 13])
SLOPES, DISTANCES = torch.randn(H), torch.randn(H, 2 * N)
PAIRS = torch.randn(H, N, N)

Mask = Callable[[Any, Any, Any, Any], Any]
Score = Callable[[Any, Any, Any, Any, Any], Any]


def blocks(mask: Mask, batch: int | None = None, heads: int | None = None) -> BlockMask:
    return create_block_mask(mask, batch, heads, N, N, device="cpu", BLOCK_SIZE=BLOCK)


def causal(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return q >= kv


MASKS: dict[str, tuple[BlockMask | None, str]] = {
    "nothing": (None, "True"),
    "causal": (blocks(causal), "kv <= q"),
    "window": (blocks(lambda b, h, q, kv: (q >= kv) & (q - kv < 9)), "(kv <= q) & (-kv + q < 9)"),
    "documents": (blocks(lambda b, h, q, kv: DOCUMENTS[q] == DOCUMENTS[kv]), "Eq(t0(kv), t0(q))"),
    "documents of a batch": (
        blocks(lambda b, h, q, kv: OF_BATCH[b, q] == OF_BATCH[b, kv], B),
        "Eq(t0(b, kv), t0(b, q))",
    ),
    "index by index": (
        blocks(lambda b, h, q, kv: OF_BATCH[b][q] == OF_BATCH[b][kv], B),
        "Eq(t0(b, kv), t0(b, q))",
    ),
    "a window of each head": (
        blocks(lambda b, h, q, kv: (q - kv < 4 * (h + 1)) & (q >= kv), None, H),
        "(kv <= q) & (-4*h - kv + q < 4)",
    ),
    "rows without keys": (
        blocks(lambda b, h, q, kv: (q >= kv) & (q > 10)),
        "(q >= 11) & (kv <= q)",
    ),
    "torch functions": (
        blocks(lambda b, h, q, kv: torch.logical_and(q >= kv, torch.abs(q - kv) < 9)),
        "(kv <= q) & (Abs(kv - q) < 9)",
    ),
}

SCORES: dict[str, Score] = {
    "slopes": lambda s, b, h, q, kv: s + SLOPES[h] * (q - kv),
    "slopes of numbers": lambda s, b, h, q, kv: s - (q - kv).abs() * 0.25 * (h + 1),
    "softcap": lambda s, b, h, q, kv: 20 * torch.tanh(s / 20),
    "distances": lambda s, b, h, q, kv: s + DISTANCES[h, q - kv + N],
    "pairs": lambda s, b, h, q, kv: s + PAIRS[h, q, kv],
    "temperatures": lambda s, b, h, q, kv: s * SLOPES[h],
    "a mask": lambda s, b, h, q, kv: torch.where(q - kv < 9, s, -float("inf")),
    "nothing": lambda s, b, h, q, kv: s,
}


def operands(dtype: torch.dtype = torch.float32, heads: int = 2) -> list[Tensor]:
    shapes = [(B, H, N, D), (B, heads, N, D), (B, heads, N, D)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def flex(**given: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: flex_attention(q, k, v, enable_gqa=True, **given)


def compare(run: Callable[..., Tensor], *args: Tensor, dynamic: bool = False) -> Rewritten:
    seen = Rewritten()
    found, truth = seen.compiled(run, dynamic)(*args), run(*args)
    if truth.dtype is torch.float32:
        assert_same([found], [truth])
    torch.testing.assert_close(found, truth, atol=1e-2, rtol=1e-2)
    return seen


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read(name: str) -> None:
    mask, predicate = MASKS[name]
    plan = only_plan(compare(flex(block_mask=mask), *operands()))
    assert plan.site.kind == "sdpa"
    assert str(plan.lifted.mask.predicate) == predicate


@pytest.mark.parametrize("mask", ["window", "rows without keys"])
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_read(name: str, mask: str) -> None:
    run = flex(block_mask=MASKS[mask][0], score_mod=SCORES[name])
    plan = only_plan(compare(run, *operands()))
    assert (plan.lifted.score is None) == (name in ("a mask", "nothing"))


def test_a_mask_that_is_made_inside_is_read() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
            return (DOCUMENTS[i] == DOCUMENTS[j]) & (i >= j)

        made = create_block_mask(mask, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=made, score_mod=SCORES["softcap"])

    seen = compare(run, *operands(heads=H))
    assert str(only_plan(seen).lifted.mask.predicate) == "(kv <= q) & Eq(t0(kv), t0(q))"
    assert not any("argsort" in target or "sort" in target for target in seen.targets())


def test_sizes_may_be_symbols() -> None:
    seen = compare(flex(score_mod=SCORES["a mask"]), *operands(), dynamic=True)
    assert all(isinstance(plan, Plan) for plan in seen.decisions)


def test_a_batch_of_queries_may_share_keys() -> None:
    q, k, v = operands()
    only_plan(compare(flex(block_mask=MASKS["documents of a batch"][0]), q, k[:1], v[:1]))


def test_half_precision_is_that_of_the_operands() -> None:
    run = flex(block_mask=MASKS["window"][0], score_mod=SCORES["softcap"], scale=0.3)
    plan = only_plan(compare(run, *operands(torch.bfloat16)))
    assert plan.site.q.node.meta["example_value"].dtype is torch.bfloat16


def test_a_call_in_a_checkpoint_is_rewritten() -> None:
    run = flex(block_mask=MASKS["documents"][0])
    only_plan(compare(lambda *args: checkpoint(run, *args, use_reentrant=False), *operands()))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask, score_mod: Score) -> Tensor:
    """What it computes, with a matrix of scores."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    places = torch.arange(B)[:, None, None, None], torch.arange(H)[:, None, None]
    places += torch.arange(N)[:, None], torch.arange(N)
    scores = score_mod(q @ k.transpose(-2, -1) / D**0.5, *places)
    weights = scores.masked_fill(~mask(*places), -float("inf")).softmax(-1)
    return weights.nan_to_num(0.0) @ v


@pytest.mark.parametrize("name", ["nothing", "softcap", "pairs", "distances"])
def test_gradients_are_those_of_the_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch has no backward of its own on the CPU, and says so before the graph is captured.
    module = sys.modules[flex_attention.__module__]
    monkeypatch.setattr(module, "_validate_device", lambda *_: None)

    def keep(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q >= kv) & (DOCUMENTS[q] == DOCUMENTS[kv])

    args = [x.requires_grad_() for x in operands()]
    weights, seen = torch.randn(B, H, N, D), Rewritten()
    run = seen.compiled(flex(block_mask=blocks(keep), score_mod=SCORES[name]))
    found = torch.autograd.grad((run(*args) * weights).sum(), args)
    truth = torch.autograd.grad((dense(*args, keep, SCORES[name]) * weights).sum(), args)
    assert_same(found, truth)
    only_plan(seen)


# What stays as it is ---------------------------------------------------------------------------

LISTED = torch.tensor([[[1, 2, 2]]], dtype=torch.int32)
INDEX = torch.tensor([[[[0, 1, 2], [0, 1, 2], [1, 2, 0]]]], dtype=torch.int32)


def by_hand(**given: Any) -> BlockMask:
    return BlockMask.from_kv_blocks(LISTED, INDEX, BLOCK_SIZE=BLOCK, seq_lengths=(N, N), **given)


def selected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    means = [x.mean(1).unflatten(1, (-1, BLOCK)).mean(2) for x in (q, k)]
    index = (means[0] @ means[1].transpose(1, 2)).topk(2, -1).indices.sort(-1).values
    index = torch.cat([index, torch.zeros_like(index[..., :1])], -1).int().unsqueeze(1)
    count = torch.full((B, 1, N // BLOCK), 2, dtype=torch.int32)
    lists = count, index
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(N, N))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)


ROWS = torch.randn(N, 4)

LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "its log-sum-exp": (flex(return_lse=True), "its log-sum-exp or its largest scores are read"),
    "lists by hand": (flex(block_mask=by_hand(mask_mod=causal)), "lists other blocks than"),
    "lists without a mask": (flex(block_mask=by_hand()), "lists other blocks than"),
    "selected blocks": (selected, "selected by values that its mask_mod does not see"),
    "a row of a table": (
        flex(score_mod=lambda s, b, h, q, kv: s + ROWS[q].sum()),
        "calls `sum`, which is not known to be pointwise",
    ),
    "a part of a table": (
        flex(score_mod=lambda s, b, h, q, kv: s + (ROWS[q] + 1)[0]),
        "`add` in its score_mod or mask_mod is more than a number",
    ),
    "scores read twice": (flex(score_mod=lambda s, b, h, q, kv: s * s.sigmoid()), ""),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_rewritten_stays(name: str) -> None:
    run, reason = LEFT[name]
    rejection = left(run, *operands())
    assert reason in rejection.reason
    assert rejection.where[-1].startswith("test_expand_flex.py:")


def test_lists_that_name_more_than_the_mask_keeps_are_no_other_mask() -> None:
    whole = torch.arange(3, dtype=torch.int32).expand(1, 1, 3, 3).contiguous()
    lists = torch.full((1, 1, 3), 3, dtype=torch.int32), whole
    mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=causal, seq_lengths=(N, N))
    only_plan(compare(flex(block_mask=mask), *operands()))
