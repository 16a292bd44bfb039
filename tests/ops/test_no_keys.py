"""Attention to no keys at all: a sum over nothing is 0, whatever a row without a key yields."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import sparse_compile
from sparse_compile import patterns as P
from sparse_compile import reference
from sparse_compile.codegen import empty_rows
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.expr import MaskExpr
from sparse_compile.options import Options
from sparse_compile.passes import pipeline
from sparse_compile.spec import AttentionSpec, EmptyRows

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def near(q: Tensor, k: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (i - j).abs() <= 20


def filled(value: float) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(~near(q, k), value).softmax(-1) @ v

    return run


def added(value: float) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~near(q, k), value)
        return (q @ k.mT + bias).softmax(-1) @ v

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near(q, k))


def of_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_compile.attention(q, k, v, near(q, k))


def of_pattern(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_compile.attention(q, k, v, P.SlidingWindow(20))


def of_selection(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sparse_compile.attention(q, k, v, P.MoBA(block=16, k=2) | P.SlidingWindow(20))


LOWEST = torch.finfo(torch.float32).min
RUNS = [filled(-math.inf), filled(LOWEST), added(-math.inf), added(LOWEST), sdpa]
NAMES = ["-inf", "lowest", "added -inf", "added lowest", "sdpa"]


def rewritten_eagerly(gm: GraphModule, example_inputs: list[Any]) -> GraphModule:
    """The passes alone, without what Inductor does to the rest."""
    pipeline.run(gm, example_inputs, Options(decide="sparse"))
    gm.recompile()
    return gm


def operands(n_kv: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_kv)
    shapes = [(1, 2, 70, 16), (1, 2, n_kv, 16), (1, 2, n_kv, 24)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_compiled_code_does_what_it_did(run: Run, dynamic: bool) -> None:
    torch._dynamo.reset()
    fast = torch.compile(run, backend=rewritten_eagerly, dynamic=dynamic)
    for n_kv in (70, 3, 0) if dynamic else (0,):
        given = operands(n_kv)
        wanted, found = run(*given), fast(*given)
        torch.testing.assert_close(found, wanted, equal_nan=True)
        weight = torch.randn(wanted.shape)
        grads = (
            torch.autograd.grad(found, given, weight),
            torch.autograd.grad(wanted, given, weight),
        )
        torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("run", [of_tensor, of_pattern, of_selection])
def test_direct_calls(run: Run) -> None:
    given = operands(0)
    out = run(*given)
    assert not out.any()
    for grad, of in zip(torch.autograd.grad(out.sum(), given), given, strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


@pytest.mark.parametrize("policy", EmptyRows)
def test_every_policy(policy: EmptyRows) -> None:
    q, k, v = operands(0)
    out, lse = reference.attention(q, k, v, empty_rows=policy.value)
    assert not out.any()
    assert bool(lse.isneginf().all())
    zero = torch.zeros(out.shape)
    call = AttentionCall(q, k, v, [], [], [], 1.0, AttentionSpec(MaskExpr(sympy.true), policy))
    assert torch.equal(empty_rows.apply_forward(call, zero, lse), zero)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    ours = empty_rows.apply_backward(call, AttentionResult(zero, lse, zero + 1), (dq, dk, dv))
    for grad, wanted in zip(ours, torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert torch.equal(grad, wanted)
