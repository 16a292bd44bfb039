"""Layers that read one index share its lists: they are made once in the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_compile.sites.plan import Plan
from tests.passes.rewritten import Rewritten, assert_same

BATCH, HEADS, LENGTH, DIM, KEPT = 2, 4, 37, 16, 5

Masks = Callable[[Tensor, Tensor], list[Tensor]]


def allowed(window: int = LENGTH) -> Tensor:
    at = torch.arange(LENGTH)
    return (at <= at[:, None]) & (at[:, None] - at < window)


def scattered(index: Tensor, heads: int = 1) -> Tensor:
    empty = torch.zeros(BATCH, heads, LENGTH, LENGTH, dtype=torch.bool)
    return empty.scatter(-1, index.unsqueeze(1).expand(-1, heads, -1, -1).long(), True)


def other_windows(index: Tensor, real: Tensor) -> list[Tensor]:
    return [scattered(index) & allowed(window) for window in (LENGTH, 20, 10)]


def padding_and_none(index: Tensor, real: Tensor) -> list[Tensor]:
    return [scattered(index) & allowed() & real[:, None, None], scattered(index) & allowed()]


def other_words(index: Tensor, real: Tensor) -> list[Tensor]:
    compared = (index.long()[..., None] == torch.arange(LENGTH)).any(-2)
    counted = F.one_hot(index.long(), LENGTH).sum(-2) > 0
    masks = [named.unsqueeze(1) & allowed() for named in (compared, counted)]
    return [*masks, scattered(index) & allowed()]


def expanded(index: Tensor, real: Tensor) -> list[Tensor]:
    """Every head has a copy of the list, in one of the layers."""
    return [scattered(index, HEADS) & allowed(), scattered(index) & allowed(12)]


def entries_left_out(index: Tensor, real: Tensor) -> list[Tensor]:
    masks = []
    for window in (LENGTH, 20):
        wide = torch.zeros(BATCH, LENGTH, LENGTH + 1, dtype=torch.bool)
        wide = wide.scatter(-1, torch.where(index % 4 == 0, LENGTH, index).long(), True)
        masks.append(wide[:, None, :, :LENGTH] & allowed(window))
    return masks


def operands() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator, requires_grad=True)
    scores = torch.randn(BATCH, LENGTH, LENGTH, generator=generator)
    real = torch.rand(BATCH, LENGTH, generator=generator) > 0.2
    return x, scores, real


@pytest.mark.parametrize(
    "masks", [other_windows, padding_and_none, other_words, expanded, entries_left_out]
)
@pytest.mark.parametrize("outside", [False, True])
def test_one_set_of_lists(masks: Masks, outside: bool) -> None:
    """The index is an input, or the top-k of something."""

    def run(x: Tensor, scores: Tensor, real: Tensor) -> Tensor:
        index = scores if outside else scores.topk(KEPT, -1).indices.int()
        for mask in masks(index, real):
            x = x + 0.1 * F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x

    x, scores, real = operands()
    given = scores.topk(KEPT, -1).indices.int() if outside else scores
    program = Rewritten()
    assert_same([program.compiled(run)(x, given, real)], [run(x, given, real)])
    assert all(isinstance(found, Plan) and found.listed for found in program.decisions)
    called = program.targets()
    assert called.count("sparse_compile.canonical_selection.default") == 1
    assert called.count("sparse_compile.attention.default") == len(program.decisions)


def test_checkpoints_share_what_is_outside_of_them() -> None:
    def attend(x: Tensor, index: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=scattered(index) & allowed())

    def run(x: Tensor, scores: Tensor) -> Tensor:
        index = scores.topk(KEPT, -1).indices.int()
        for _ in range(2):
            x = x + 0.1 * checkpoint(attend, x, index, use_reentrant=False)
        return x

    x, scores, _ = operands()
    program = Rewritten()
    ours, theirs = program.compiled(run)(x, scores), run(x, scores)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (ours, theirs)]
    assert_same([ours, grads[0]], [theirs, grads[1]])
    called = program.targets()
    assert called.count("sparse_compile.attention.default") == 4
    assert called.count("sparse_compile.canonical_selection.default") == 1
