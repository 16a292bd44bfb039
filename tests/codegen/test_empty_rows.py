from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_compile import reference
from sparse_compile.codegen import empty_rows
from sparse_compile.codegen.call import AttentionCall, AttentionResult
from sparse_compile.expr import MaskExpr
from sparse_compile.spec import AttentionSpec, EmptyRows
from tests.tolerance import assert_close_as_eager, relative_error

SCALE = 0.4
N_Q, N_KV = 9, 7


def masks(batch: int, heads: int) -> Tensor:
    """A causal mask whose first rows, different ones in each head, see nothing."""
    q, kv = torch.arange(N_Q).view(-1, 1), torch.arange(N_KV)
    first = (torch.arange(batch * heads) % 4).view(batch, heads, 1, 1)
    return (kv <= q) & (q >= first)


def operands(
    group: int, dim: int, value_dim: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 2 * group, N_Q, dim, dtype=dtype)
    k = torch.randn(2, 2, N_KV, dim, dtype=dtype)
    v = torch.randn(2, 2, N_KV, value_dim, dtype=dtype)
    return q, k, v, torch.randn(2, 2 * group, N_Q, value_dim, dtype=dtype)


def results(
    program: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = program(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def call_of(q: Tensor, k: Tensor, v: Tensor, policy: EmptyRows) -> AttentionCall:
    spec = AttentionSpec(MaskExpr(sympy.true), policy)
    return AttentionCall(q, k, v, [], [], [], SCALE, spec)


def ours(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, grad_out: Tensor, policy: EmptyRows
) -> tuple[Tensor, ...]:
    """The policy on top of what an executor gives: 0 and no gradient on empty rows."""

    def zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, mask, SCALE)[0]

    lse = reference.attention(q, k, v, mask, SCALE)[1]
    kept = grad_out.masked_fill(lse.eq(-math.inf).unsqueeze(-1), 0.0)
    out, *grads = (x.to(q.dtype) for x in results(zero, q, k, v, kept))
    lse = lse.float()
    call = call_of(q, k, v, policy)
    dq, dk, dv = grads
    return (
        empty_rows.apply_forward(call, out, lse),
        *empty_rows.apply_backward(call, AttentionResult(out, lse, grad_out), (dq, dk, dv)),
    )


@pytest.mark.parametrize("policy", EmptyRows)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dims", [(5, 5), (4, 6)])
def test_matches_reference(policy: EmptyRows, group: int, dims: tuple[int, int]) -> None:
    q, k, v, grad_out = operands(group, *dims)
    mask = masks(2, 2 * group)

    def program(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, mask, SCALE, policy.value)[0]

    expected = results(program, q, k, v, grad_out)
    for name, got, want in zip(
        ("out", "dq", "dk", "dv"), ours(q, k, v, mask, grad_out, policy), expected, strict=True
    ):
        assert relative_error(got, want) < 1e-12, name


def _eager(apply_mask: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: apply_mask(q @ k.mT * SCALE).softmax(-1) @ v


def _additive(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, low)


LOWEST = torch.finfo(torch.float64).min
#: Programs people write, and the policy that says what they do on fully masked rows.
PROGRAMS: dict[str, tuple[EmptyRows, Callable[[Tensor], Callable[..., Tensor]]]] = {
    "masked_fill with the least number": (
        EmptyRows.MEAN,
        lambda mask: _eager(lambda s: s.masked_fill(~mask, LOWEST)),
    ),
    "where with the least number": (
        EmptyRows.MEAN,
        lambda mask: _eager(lambda s: torch.where(mask, s, LOWEST)),
    ),
    "adding the least number": (
        EmptyRows.MEAN_ADDED,
        lambda mask: _eager(lambda s: s + _additive(mask, LOWEST)),
    ),
    "adding -inf": (
        EmptyRows.NAN_ADDED,
        lambda mask: _eager(lambda s: s + _additive(mask, -math.inf)),
    ),
    "masked_fill with -inf": (
        EmptyRows.NAN,
        lambda mask: _eager(lambda s: s.masked_fill(~mask, -math.inf)),
    ),
    "where with -inf": (
        EmptyRows.NAN,
        lambda mask: _eager(lambda s: torch.where(mask, s, -math.inf)),
    ),
    "SDPA, bool mask": (
        EmptyRows.ZERO,
        lambda mask: lambda *qkv: F.scaled_dot_product_attention(*qkv, mask, scale=SCALE),
    ),
    "SDPA, -inf mask": (
        EmptyRows.ZERO,
        lambda mask: (
            lambda *qkv: F.scaled_dot_product_attention(
                *qkv, _additive(mask, -math.inf), scale=SCALE
            )
        ),
    ),
    "SDPA, mask with the least number": (
        EmptyRows.MEAN_ADDED,
        lambda mask: (
            lambda *qkv: F.scaled_dot_product_attention(*qkv, _additive(mask, LOWEST), scale=SCALE)
        ),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_policies_are_what_pytorch_does(name: str) -> None:
    policy, make = PROGRAMS[name]
    q, k, v, grad_out = operands(1, 5, 5)
    mask = masks(2, 2)
    # The CPU flash backward loses log(n) against the least number, so that it gives n times the
    # gradient on such rows; the plain decomposition of SDPA does not.
    with sdpa_kernel(SDPBackend.MATH):
        expected = results(make(mask), q, k, v, grad_out)
    got = ours(q, k, v, mask, grad_out, policy)
    for part, value, want in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert relative_error(value, want) < 1e-12, part


def test_default_sdpa_agrees_in_the_forward() -> None:
    q, k, v, _ = operands(1, 5, 5)
    mask = masks(2, 2)
    for policy, make in PROGRAMS.values():
        out = make(mask)(q, k, v)
        assert relative_error(ours(q, k, v, mask, out, policy)[0], out) < 1e-12


@pytest.mark.parametrize("policy", EmptyRows)
def test_half_precision(policy: EmptyRows) -> None:
    half = operands(3, 8, 8, torch.bfloat16)
    mask = masks(2, 6)

    def program(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        k, v = (x.repeat_interleave(3, 1) for x in (k, v))
        scores = (q @ k.mT * SCALE).masked_fill(~mask, torch.finfo(dtype).min)
        if policy is EmptyRows.MEAN_ADDED:
            scores = q @ k.mT * SCALE + torch.zeros(mask.shape, dtype=dtype).masked_fill(
                ~mask, torch.finfo(dtype).min
            )
        if policy is EmptyRows.NAN:
            scores = scores.masked_fill(~mask, -math.inf)
        if policy is EmptyRows.NAN_ADDED:
            scores = scores + torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
        if policy is EmptyRows.ZERO:
            empty = ~mask.any(-1, keepdim=True)
            return (scores.softmax(-1) @ v).masked_fill(empty, 0.0)
        return scores.softmax(-1) @ v

    def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, mask, SCALE, policy.value)[0]

    eager = results(lambda *qkv: program(*qkv, torch.bfloat16), *half)
    expected = results(truth, *(x.double() for x in half))
    got = ours(*half[:3], mask, half[3], policy)
    for name, value, dense, want in zip(
        ("out", "dq", "dk", "dv"), got, eager, expected, strict=True
    ):
        assert value.dtype == torch.bfloat16
        assert_close_as_eager(name, value, dense, want)


def test_zero_is_free() -> None:
    q, k, v, grad_out = operands(1, 5, 5)
    lse = torch.full(q.shape[:3], -math.inf)
    call = call_of(q, k, v, EmptyRows.ZERO)
    assert empty_rows.apply_forward(call, q, lse) is q
    grads = empty_rows.apply_backward(call, AttentionResult(q, lse, grad_out), (q, k, v))
    assert all(a is b for a, b in zip(grads, (q, k, v), strict=True))


@pytest.mark.parametrize("policy", EmptyRows)
def test_no_value_is_read_back(policy: EmptyRows) -> None:
    q, k, v, grad_out = (x.to("meta") for x in operands(2, 4, 6))
    lse = torch.empty(q.shape[:3], device="meta")
    call = call_of(q, k, v, policy)
    out = empty_rows.apply_forward(call, grad_out, lse)
    grads = empty_rows.apply_backward(call, AttentionResult(out, lse, grad_out), (q, k, v))
    assert [x.shape for x in (out, *grads)] == [x.shape for x in (grad_out, q, k, v)]
