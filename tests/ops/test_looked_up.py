"""Numbers looked up in a trained table: values as by indexing, gradients as sums in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile.ops.looked_up import LOOKED_UP


def problem(dtype: torch.dtype, n: int = 4000) -> tuple[Tensor, list[Tensor], Tensor]:
    """A table of buckets and heads, what is looked up, and the gradient of that."""
    generator = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"generator": generator}
    table = torch.randn(7, 3, dtype=torch.float64, **given).to(dtype).requires_grad_()
    buckets = torch.randint(0, 5, (n,), **given)  # of two nothing is looked up
    grad = torch.randn(3, n, dtype=torch.float64, **given).to(dtype)
    return table, [buckets, torch.arange(3)[:, None]], grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_lookups(dtype: torch.dtype) -> None:
    table, indices, grad = problem(dtype)
    found = LOOKED_UP(table, indices)
    assert torch.equal(found, table[tuple(indices)])
    found.backward(grad)
    wide = table.detach().double().requires_grad_()
    wide[tuple(indices)].backward(grad.double())
    # One rounding of the sum, however many numbers it has.
    torch.testing.assert_close(table.grad, wide.grad.to(dtype), rtol=0, atol=1e-4)


def test_no_lookups() -> None:
    table, indices, grad = problem(torch.float32, n=0)
    LOOKED_UP(table, indices).backward(grad)
    assert torch.equal(table.grad, torch.zeros(7, 3))


def test_a_table_that_is_not_trained_has_no_gradient() -> None:
    table, indices, _ = problem(torch.float32)
    assert not LOOKED_UP(table.detach(), indices).requires_grad
