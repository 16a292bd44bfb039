"""What a hidden key holds reaches no query: NaN and infinity, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile import reference
from sparse_compile.expr import evaluate_score, softcap

N = 150
PATTERNS: dict[str, Callable[[], P.Pattern]] = {
    "window": lambda: P.Causal() & P.SlidingWindow(20),
    "strided": lambda: P.Strided(16, 16),
    "padding": lambda: P.Padding((90, 90)),
    "random blocks": lambda: P.Random(block=16, random=2, seed=1),
    "selected": lambda: listed(),
    "selected and causal": lambda: P.Causal() & (listed() | P.SlidingWindow(9)),
}


def listed() -> P.Pattern:
    index = (torch.arange(10) % 7).view(1, 1, 10, 1).expand(2, 1, 10, 1)
    return P.Selected(index, unit_q=16, unit_kv=16)


def operands(strange: float, keys: list[int], group: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * group, N, 16), (2, 2, N, 16), (2, 2, N, 24)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    k[0, :, keys], v[:, 1, keys[0]] = strange, strange
    return [q, k, v]


def agree(found: Tensor, wanted: Tensor, name: str) -> None:
    """The same entries are not finite, and the others are equal."""
    strange = ~wanted.isfinite()
    assert torch.equal(~found.isfinite(), strange), name
    found, wanted = (t.double().masked_fill(strange, 0) for t in (found, wanted))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("name", "group", "strange"),
    [  # every pair
        (name, group, (math.nan, math.inf)[(number + group // 2) % 2])
        for number, name in enumerate(PATTERNS)
        for group in (1, 3)
    ],
)
def test_hidden_pairs_contribute_nothing(name: str, group: int, strange: float) -> None:
    pattern = PATTERNS[name]()
    tensors = operands(strange, [140, 141, 63], group)
    mask = _mask(name, pattern, 2 * group)
    check(tensors, pattern, mask)


def _mask(name: str, pattern: P.Pattern, heads: int) -> Tensor:
    if not name.startswith("selected"):
        return pattern.dense(N, N, 2, heads)
    i, j = torch.arange(N)[:, None], torch.arange(N)
    chosen = j // 16 == i // 16 % 7
    return chosen if name == "selected" else (j <= i) & (chosen | ((i - j).abs() <= 9))


def check(
    tensors: list[Tensor],
    pattern: P.Pattern,
    mask: Tensor,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    ours = [t.clone().requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    out = sparse_compile.attention(*ours, pattern, softcap=cap, sinks=sinks)
    score = None if cap is None else partial(evaluate_score, softcap(cap))
    column = None if sinks is None else sinks[:, None]
    wanted, _ = reference.attention(*exact, mask, score=score, sinks=column)
    agree(out, wanted, "out")
    assert bool(out.isfinite().any())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = (
        torch.autograd.grad(out, ours, weight),
        torch.autograd.grad(wanted, exact, weight.double()),
    )
    for which, found, its in zip(("dq", "dk", "dv"), *grads, strict=True):
        agree(found, its, which)


@pytest.mark.parametrize("name", ["window", "strided", "selected and causal"])
def test_whatever_becomes_of_scores(name: str) -> None:
    """With a softcap and sinks, which change the scores of hidden keys, too."""
    pattern = PATTERNS[name]()
    tensors = operands(math.nan, [140, 141, 63], 2)
    check(tensors, pattern, _mask(name, pattern, 4), cap=1.5, sinks=torch.linspace(-1, 1, 4))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, N - 1), st.integers(1, 60))
def test_it_does_not_depend_on_blocks(key: int, width: int) -> None:
    pattern = P.Causal() & P.SlidingWindow(width)
    tensors = operands(math.nan, [key], 1)
    check(tensors, pattern, pattern.dense(N, N, 2, 2))
    q, k, v = tensors
    out = sparse_compile.attention(q, k, v, pattern)
    reached = out[0, 0].isnan().any(-1).nonzero().flatten().tolist()
    assert reached == list(range(key, min(key + width + 1, N)))
