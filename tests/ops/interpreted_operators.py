"""Operators that run Triton kernels, interpreted; test_operator_results.py runs this."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from sparse_compile.codegen import attend
from sparse_compile.codegen.call import AttentionCall
from sparse_compile.codegen.triton.blocks import executor
from sparse_compile.codegen.triton.selected import executor as selected_executor
from sparse_compile.spec import EmptyRows
from tests.ops.operator_calls import Problem, block_calls, check, problems, selected_calls


def by_kernels(piece: AttentionCall) -> attend.Executor:
    """The executor of a GPU."""
    return selected_executor if piece.spec.units else executor


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    """The CPU's tensors go through the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "executor_for", by_kernels)
        yield


@settings(max_examples=5, deadline=None)
@given(problems())
def test_operators_keep_their_promises(problem: Problem) -> None:
    for calls in (block_calls, selected_calls):
        for call in calls(problem):
            check(call)


@pytest.mark.parametrize("mask", ["strided", "columns", "dilated on a grid", "window"])
def test_masks(mask: str) -> None:
    dims, policy = (16, 24), EmptyRows.ZERO
    for call in block_calls(Problem(2, 1, 3, 65, 65, dims, torch.float32, mask, policy)):
        check(call)


def test_no_keys() -> None:
    problem = Problem(1, 1, 3, 9, 0, (16, 24), torch.float32, "window", EmptyRows.MEAN)
    for calls in (block_calls, selected_calls):
        for call in calls(problem):
            check(call)
