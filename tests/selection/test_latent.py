"""Latent keys, whose first features are the values: the indexer of DSA selects among them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile import reference
from sparse_compile.backend import backend
from sparse_compile.errors import BadShape

N, HEADS, DIM, VALUES, SCALE = 200, 4, 576, 512, 192**-0.5


def problem() -> tuple[torch.Tensor, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    indexer = made(1, 8, N, 16), made(1, N, 16), made(1, N, 8)
    return made(1, HEADS, N, DIM), made(1, 1, N, DIM), P.Causal() & P.DSA(*indexer, k=40)


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_to_selected_latent_keys(compiled: bool) -> None:
    q, kv, mask = problem()

    def run(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return sparse_compile.attention(q, kv, kv[..., :VALUES], mask=mask, scale=SCALE)

    chosen = sparse_compile.select(mask, q, kv).dense(N, N)
    assert chosen.sum(-1).max() == 40
    single = [t.requires_grad_() for t in (q, kv)]
    double = [t.detach().double().requires_grad_() for t in single]
    out = (torch.compile(run, backend=backend) if compiled else run)(*single)
    seen = chosen & torch.ones(N, N, dtype=torch.bool).tril()
    wanted, _ = reference.attention(double[0], double[1], double[1][..., :VALUES], seen, SCALE)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, single, grad)
    for mine, theirs in zip(found, torch.autograd.grad(wanted, double, grad.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_wide_heads_need_a_selection() -> None:
    q, kv, mask = problem()
    with pytest.raises(BadShape, match="head dims must lie in 1 to 256"):
        sparse_compile.attention(q, kv, kv[..., :VALUES], mask=P.SlidingWindow(10))
    with pytest.raises(BadShape, match="head dims must lie in 1 to 256"):
        sparse_compile.attention(q, kv, kv[..., :VALUES], mask=mask | P.SlidingWindow(10))
    with pytest.raises(BadShape, match="head dims must lie in 1 to 640 and 512"):
        sparse_compile.attention(q, kv, kv, mask=mask)
