"""Native Sparse Attention on a CUDA device: against its dense definition, and without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile import patterns as P
from sparse_compile.api.nsa import native_sparse_attention
from tests.gpu.waiting import no_waiting
from tests.selection.test_nsa import Case, check


def on_gpu(*operands: Any, scale: float | None) -> Tensor:
    def moved(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(moved, given))
        return given.cuda() if isinstance(given, Tensor) else given

    return native_sparse_attention(*map(moved, operands), scale=scale).cpu()


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("n", [101, 257])
def test_dense_definition(heads: tuple[int, int], n: int) -> None:
    check(Case(heads, n, n), on_gpu)


def test_nothing_waits() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 16, 2048, 64), (1, 1, 2048, 64), (1, 1, 2048, 64), (1, 16, 2048, 3)
    made = [torch.randn(shape, generator=generator).cuda().bfloat16() for shape in shapes]
    q, k, v, gates = (t.requires_grad_() for t in made)

    def run() -> None:
        native_sparse_attention(q, k, v, gates, P.NSA()).sum().backward()

    run()  # compiles
    with no_waiting():
        run()
