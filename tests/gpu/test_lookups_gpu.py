"""Lookups on a GPU: their gradients are the same each time, and constants are read as they are."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.expr import KV, B, MaskExpr, Q, table
from sparse_compile.layout import build as host
from sparse_compile.layout.superset import Problem, ProblemShape
from sparse_compile.ops.looked_up import LOOKED_UP
from tests.gpu.waiting import no_waiting

GPU = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_tables(dtype: torch.dtype) -> None:
    table = torch.randn(32, 12, device=GPU, dtype=dtype, requires_grad=True)
    indices = [torch.randint(0, 3, (50000,), device=GPU), torch.arange(12, device=GPU)[:, None]]
    grad = torch.randn(12, 50000, device=GPU, dtype=dtype)

    def gradient() -> Tensor:
        table.grad = None
        LOOKED_UP(table, indices).backward(grad)
        assert table.grad is not None
        return table.grad

    first = gradient()
    assert all(torch.equal(first, gradient()) for _ in range(5))
    wide = table.detach().double().requires_grad_()
    wide[tuple(indices)].backward(grad.double())
    assert wide.grad is not None
    close = 1e-3 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(first.double(), wide.grad, rtol=close, atol=close)


def test_constants_of_a_graph() -> None:
    """A list of blocks in the program, as BigBird draws them."""
    drawn = [[3, 1, 0, 2], [1, 1, 3, 0]]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots = torch.tensor(drawn, device=q.device)
        i = torch.arange(q.shape[2], device=q.device)
        near = (i[:, None] // 64 - i // 64).abs() <= 1
        named = slots[:, i // 64][..., None] == i // 64
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near | named)

    q, k, v = (torch.randn(1, 2, 256, 64, device=GPU, dtype=torch.float16) for _ in range(3))
    run = torch.compile(attend, backend="sparse_compile", options={"decide": "sparse"})
    wanted = attend(q.double(), k.double(), v.double())
    torch.testing.assert_close(run(q, k, v).double(), wanted, atol=2e-3, rtol=2e-3)


def test_layouts_that_nobody_waits_for() -> None:
    mask = MaskExpr((KV <= Q) & (Q - KV < 512) & sympy.Ne(table(0)(B, KV), 0), ("bool",))
    problem = Problem.of(mask, ProblemShape(8, 12, 4096, 4096), (64, 64))
    real = torch.arange(4096, device=GPU) < torch.randint(1, 4096, (8, 1), device=GPU)
    assert host.quick_layout(problem, [real], GPU) is not None  # kernels were tried
    with no_waiting():
        quick = host.quick_layout(problem, [real], GPU)
        assert quick is not None
        packed = problem.unpacked(quick.pack())
    assert torch.equal(packed.kinds(), host._by_cpu(problem, [real]).kinds())
