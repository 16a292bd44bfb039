"""Operators that run Triton kernels keep what their fakes promise, too; interpreted."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings

from sparse_compile.codegen import attend
from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton.blocks import executor
from sparse_compile.codegen.triton.selected import executor as selected_executor
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.reference import attention as reference
from sparse_compile.spec import AttentionSpec, EmptyRows
from tests.handed_in import worklists_on_the_cpu
from tests.ops.operator_calls import OPS, Problem, block_calls, check, problems, selected_calls
from tests.tolerance import relative_error

pytestmark = pytest.mark.usefixtures("interpreted_kernels")


def by_kernels(piece: AttentionCall) -> attend.Executor:
    """The executor of a GPU."""
    return selected_executor if piece.spec.units else executor


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    """The CPU's tensors go through the kernels, with the lists that those get."""
    with pytest.MonkeyPatch.context() as patch, worklists_on_the_cpu(64):
        patch.setattr(attend, "executor_for", by_kernels)
        yield


@settings(max_examples=3, deadline=None)
@given(problems(longest=150, batch=2))
def test_operators_of_blocks_keep_their_promises(problem: Problem) -> None:
    for call in block_calls(problem):
        check(call)


@settings(max_examples=3, deadline=None)
@given(problems(longest=24, batch=2))  # a program for each query
def test_operators_of_selected_keys_keep_their_promises(problem: Problem) -> None:
    for call in selected_calls(problem):
        check(call)


@pytest.mark.parametrize("mask", ["strided", "columns", "dilated on a grid", "window"])
def test_masks(mask: str) -> None:
    dims, policy = (16, 24), EmptyRows.ZERO
    for call in block_calls(Problem(2, 1, 3, 65, 65, dims, torch.float32, mask, policy)):
        check(call)


def test_split_lines_are_merged_as_the_worklists_say() -> None:
    """The row and the column of a global token are cut into parts, forward and backward."""
    spec = AttentionSpec(
        MaskExpr((sympy.Abs(Q - KV) < 8) | sympy.Eq(Q, 3) | sympy.Eq(KV, 3)),
        block_q=16,
        block_kv=16,
    )
    n, device = 400, torch.device("cpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, 16, requires_grad=True) for heads in (2, 1, 1))
    made = OPS.layout([], "[]", [], 1, 2, n, n, 1, spec.text, device, [])
    slots = [numbers.shape[1] for numbers in made[2::2]]
    assert len(slots) == 2
    assert all(slots)
    out, _ = OPS.attention(q, k, v, [], [], [], made, 0.25, spec.text)
    i = torch.arange(n)
    mask = ((i[:, None] - i).abs() < 8) | (i[:, None] == 3) | (i == 3)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wanted, _ = reference(*exact, mask, 0.25)
    assert relative_error(out, wanted) < 1e-5
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for grad, its in zip(grads, torch.autograd.grad(wanted.square().sum(), exact), strict=True):
        assert relative_error(grad, its) < 1e-5


def test_no_keys() -> None:
    problem = Problem(1, 1, 3, 9, 0, (16, 24), torch.float32, "window", EmptyRows.MEAN)
    for calls in (block_calls, selected_calls):
        for call in calls(problem):
            check(call)
