"""Softcapped scores and attention sinks, in every spelling; each site means what is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.expr import SCORE, ScoreProgram, softcap
from sparse_compile.sites.site import AttentionSite
from tests.passes.test_find_eager import (
    INF,
    B,
    H,
    M,
    N,
    assert_plain,
    keep,
    qkv,
    shape,
    tensors,
    the_site,
)

Program = Callable[..., Tensor]


KEEP = keep()


def masked(scores: Tensor) -> Tensor:
    return scores.masked_fill(~KEEP, -INF)


def as_gemma(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    scores = torch.tanh(scores / 5.0) * 5.0
    scores = scores + torch.where(KEEP, 0.0, torch.finfo(torch.float32).min)
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).mul_(0.05).tanh_().mul_(5.0)
    return masked(scores).softmax(-1) @ v


def scale_after_the_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(5 * ((q @ k.mT) / 5 * 0.25).tanh()).softmax(-1) @ v


def queries_scaled_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(F.tanh((q * 0.25) @ k.mT / 5) * 5).softmax(-1) @ v


def masked_before_the_cap_is_multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (masked(torch.tanh(q @ k.mT * 0.05)) * 5).softmax(-1) @ v


def with_torch_mul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(torch.mul(torch.tanh(torch.div(q @ k.mT, 20)), 5)).softmax(-1) @ v


SOFTCAPS = [
    as_gemma,
    in_place,
    scale_after_the_cap,
    queries_scaled_before,
    masked_before_the_cap_is_multiplied,
    with_torch_mul,
]


@pytest.mark.parametrize("fn", SOFTCAPS, ids=lambda fn: fn.__name__)
def test_softcap(fn: Program) -> None:
    site = the_site(fn, *qkv())
    assert site.plain_score == softcap(5.0)
    scale = 1.0 if fn is queries_scaled_before else 0.25
    assert site.scale == pytest.approx(scale, rel=1e-15)
    assert len(site.masks) == 1
    if fn is not queries_scaled_before:
        assert_plain(site)


def test_a_bare_tanh_and_two_of_them() -> None:
    site = the_site(lambda q, k, v: (q @ k.mT * 0.3).tanh().softmax(-1) @ v, *qkv())
    assert (site.scale, site.score) == (0.3, softcap(1.0))
    twice = the_site(lambda q, k, v: ((q @ k.mT).tanh() * 2).tanh().mul(3).softmax(-1) @ v, *qkv())
    assert isinstance(twice.score, ScoreProgram)
    assert twice.score.depends_on(SCORE)


def test_half_precision_rounds_between_the_steps() -> None:
    args = [t.bfloat16() for t in qkv()]
    assert the_site(as_gemma, *args).plain_score == softcap(5.0)


def sinks() -> Tensor:
    return tensors((H,))[0]


def column(s: Tensor) -> Tensor:
    return s.reshape(1, -1, 1, 1).expand(B, -1, N, -1)


def as_gpt_oss(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    scores = scores + torch.where(KEEP, 0.0, torch.finfo(torch.float32).min)
    both = torch.cat([scores, column(s)], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    weights = F.softmax(both, dim=-1, dtype=both.dtype)[..., :-1]
    return torch.matmul(F.dropout(weights, p=0.0, training=True).to(v.dtype), v)


def first(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return torch.cat([column(s), masked(q @ k.mT)], -1).softmax(-1)[:, :, :, 1:] @ v


def up_to_the_keys(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    both = torch.cat((masked(q @ k.mT), column(s)), -1)
    both = both - both.amax(-1, keepdim=True).detach()
    return both.softmax(-1)[..., : k.shape[2]] @ v


def cast_first(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    both = torch.concat([masked(q @ k.mT), column(s)], axis=3)
    return both.float().softmax(-1).to(v.dtype)[..., 0:-1] @ v


def two_columns(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    both = torch.cat([masked(q @ k.mT), torch.cat([column(s), column(s) - 1], -1)], -1)
    return both.softmax(-1)[..., :-2] @ v


def off_by_one(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    return (
        F.pad(s[:0], (0, 0)).sum()
        + torch.cat([masked(q @ k.mT), torch.zeros(B, H, N, 1)], -1).softmax(-1)[..., :-1] @ v
    )


def with_a_softcap(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    both = torch.cat([masked(torch.tanh(q @ k.mT / 5) * 5), column(s)], -1)
    return both.softmax(-1)[..., :-1] @ v


SINKS = [as_gpt_oss, first, up_to_the_keys, cast_first, two_columns, off_by_one, with_a_softcap]


@pytest.mark.parametrize("fn", SINKS, ids=lambda fn: fn.__name__)
def test_sinks(fn: Program) -> None:
    site = the_site(fn, *qkv(), sinks())
    assert_plain(site)
    assert site.sinks is not None
    assert shape(site.sinks)[-1] == (2 if fn is two_columns else 1)
    assert (site.plain_score is not None) == (fn is with_a_softcap)


def test_sinks_are_read_before_they_are_expanded() -> None:
    site: AttentionSite = the_site(as_gpt_oss, *qkv(), sinks())
    assert site.sinks is not None
    assert shape(site.sinks) == (1, H, 1, 1)


def test_sinks_without_heads() -> None:
    q, k, v = tensors((B, N, 8), (B, M, 8), (B, M, 8))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q @ k.mT, torch.ones(B, N, 1)], -1).softmax(-1)[..., :-1] @ v

    site = the_site(fn, q, k, v)
    assert site.score_axes == ("b", "q", "kv")
    assert site.sinks is not None
