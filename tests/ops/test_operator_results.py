"""Every operator returns what its fake promises: shape, strides, dtype and memory of its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from sparse_compile.spec import EmptyRows
from tests.ops.operator_calls import PERIODIC, Problem, all_calls, block_calls, check, problems


@settings(max_examples=15, deadline=None)
@given(problems(longest=100, batch=2))
def test_operators_keep_their_promises(problem: Problem) -> None:
    for call in all_calls(problem):
        check(call)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("mask", PERIODIC)
def test_periodic_masks(mask: str, group: int) -> None:
    dims, policy = (16, 24), EmptyRows.ZERO
    for call in block_calls(Problem(2, 2, group, 193, 193, dims, torch.float32, mask, policy)):
        check(call)


@pytest.mark.parametrize("lengths", [(0, 9), (9, 0), (0, 0)])
def test_empty_lengths(lengths: tuple[int, int]) -> None:
    for mask in ("strided", "summaries", "by entry", "random"):
        problem = Problem(2, 1, 3, *lengths, (16, 24), torch.float32, mask, EmptyRows.MEAN)
        for call in block_calls(problem):
            check(call)
    for call in all_calls(problem):
        check(call)


def test_no_operator_is_forgotten() -> None:
    names = torch._C._dispatch_get_all_op_names()
    registered = {name for name in names if name.startswith("sparse_compile::")}
    # These are made of others.
    composed = ("masked_attention", "masked_attention_and_lse", "scored_attention")
    registered -= {f"sparse_compile::{name}" for name in composed}
    calls = [
        call
        for mask in ("window", "random", "by entry")
        for call in all_calls(
            Problem(1, 1, 1, 64, 64, (16, 16), torch.float32, mask, EmptyRows.ZERO)
        )
    ]
    called = {operator.default.name() for operator, _ in calls}
    assert called == registered
