"""Attention through a gate: the dense definition, all gradients, and the hard selection."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sparse_compile.errors import BadShape
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.ops import ATTENTION
from sparse_compile.selection import gated_attention
from tests.selection.cases import CASES, Case

SMALL = Case("small", n_q=9, n_kv=9, dim=4, value_dim=3, unit_kv=4, most=2, batch=1)


def gates(case: Case) -> Tensor:
    rows, units = -(-case.n_q // case.unit_q), -(-case.n_kv // case.unit_kv)
    generator = torch.Generator().manual_seed(3)
    return torch.randn(case.batch, case.lists, rows, units, generator=generator)


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor) -> Tensor:
    """The definition, with [Nq, Nkv] scores."""
    bias = log_gate.repeat_interleave(case.unit_q, 2)[:, :, : case.n_q]
    bias = bias.repeat_interleave(case.unit_kv, 3)[..., : case.n_kv]
    bias = bias.repeat_interleave(case.q_heads // case.lists, 1)
    k, v = (t.repeat_interleave(case.q_heads // case.kv_heads, 1) for t in (k, v))
    score = q @ k.mT * case.dim**-0.5 + bias
    keep = case.dense_mask()
    empty = ~keep.any(-1, keepdim=True)
    return score.masked_fill(~keep & ~empty, -torch.inf).softmax(-1).masked_fill(empty, 0) @ v


#: Latent keys are as wide as kernels need them; the definition has no widths.
DEFINED = [
    dataclasses.replace(case, dim=72, value_dim=64) if case.shared else case
    for case in CASES
    if case.n_q <= 200
]


@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_equals_the_dense_definition(case: Case) -> None:
    *inputs, grad = (t.double() for t in case.operands())
    leaves = [t.requires_grad_() for t in (*inputs, gates(case).double())]
    out = gated_attention(*leaves, case.selection(), mask=case.mask)
    wanted = dense(case, *leaves)
    torch.testing.assert_close(out, wanted)
    found_grads = torch.autograd.grad(out, leaves, grad)
    for found, grad_wanted in zip(
        found_grads, torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, grad_wanted)


@pytest.mark.parametrize("mask", [MaskExpr(KV <= Q), MaskExpr(KV + 3 <= Q)], ids=str)
def test_gradients_are_exact(mask: MaskExpr) -> None:
    case = dataclasses.replace(SMALL, mask=mask)
    leaves = [t.double().requires_grad_() for t in (*case.operands()[:3], gates(case))]

    def run(*args: Tensor) -> Tensor:
        return gated_attention(*args, case.selection(), mask=mask)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_straight_through_is_the_operator_with_the_gradient_of_a_gate(case: Case) -> None:
    q, k, v, grad = case.operands()
    chosen, log_gate = case.selection(), gates(case).requires_grad_()
    out = gated_attention(q, k, v, log_gate, chosen, mask=case.mask, straight_through=True)
    lists = [chosen.index, chosen.count]
    hard, _ = ATTENTION(q, k, v, [], [], [], lists, case.dim**-0.5, case.spec.text)
    torch.testing.assert_close(out, hard, rtol=1e-4, atol=1e-5)
    zero = torch.zeros_like(log_gate, requires_grad=True)
    soft = gated_attention(q, k, v, zero, chosen, mask=case.mask)
    (found,) = torch.autograd.grad(out, log_gate, grad)
    torch.testing.assert_close(found, torch.autograd.grad(soft, zero, grad)[0])
    assert found.abs().sum() > 0


def test_a_gate_that_is_not_finite_where_nothing_is_selected() -> None:
    case = SMALL
    chosen, log_gate = case.selection(), gates(case)
    used = chosen.dense(case.n_q, case.n_kv)[..., :: case.unit_kv]
    hidden = log_gate.masked_fill(~used, -torch.inf).requires_grad_()
    q, k, v, _ = case.operands()
    out = gated_attention(q, k, v, hidden, chosen, mask=case.mask)
    assert torch.equal(out, gated_attention(q, k, v, log_gate, chosen, mask=case.mask))
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_half_precision() -> None:
    case = CASES[0]
    q, k, v, _ = case.operands(torch.bfloat16)
    out = gated_attention(q, k, v, gates(case), case.selection(), mask=case.mask)
    assert out.dtype == torch.bfloat16
    wanted = dense(case, q.float(), k.float(), v.float(), gates(case))
    torch.testing.assert_close(out.float(), wanted, rtol=2e-2, atol=2e-2)


def test_what_does_not_fit() -> None:
    case = SMALL
    q, k, v, _ = case.operands()
    with pytest.raises(BadShape, match="log_gate"):
        gated_attention(q, k, v, gates(case)[..., 1:], case.selection())
    with pytest.raises(BadShape, match="Hkv divides Hq"):
        gated_attention(q[:, :3], k, v, gates(case), case.selection())
