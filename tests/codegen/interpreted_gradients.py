"""Sums of learned tensors are added up by a kernel as by PyTorch, in Triton's interpreter."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch

from sparse_compile.codegen.triton.blocks import gradients
from sparse_compile.codegen.triton.blocks.gradients import Merge
from sparse_compile.codegen.triton.blocks.learned import looked_up
from sparse_compile.codegen.triton.calls import kernels_of
from sparse_compile.expr import (
    KV,
    N_Q,
    SCORE,
    B,
    FloorDiv,
    H,
    MaskExpr,
    Q,
    ScoreData,
    ScoreProgram,
    learned,
    table,
)
from sparse_compile.spec import AttentionSpec, KernelSpec

pytestmark = pytest.mark.usefixtures("interpreted_kernels")

W0 = learned(0)
#: Batch entries, heads, queries and keys; and tiles of queries.
SHAPE, TILES = (2, 6, 70, 90), 40
#: Lookups, and the sizes of the tensor; all of each is named.
PLAIN = [
    (W0(H, KV - Q + N_Q - 1), (6, 159)),
    (W0(KV - Q + 7, B), (12, 2)),
    (W0(FloorDiv(H, 3), Q - KV - 20), (2, 30)),
    (W0(Q - KV), (1,)),
    (W0(0, FloorDiv(H, 2), KV), (1, 3, 90)),
    (W0(KV, B), (90, 2)),
    (W0(B, H, Q, KV), (2, 6, 70, 90)),
    (W0(Q, KV), (70, 90)),
    (W0(KV, H, Q), (90, 6, 70)),
    (W0(Q, H), (70, 6)),
    (W0(FloorDiv(H, 2)), (3,)),
    (W0(), ()),
    (W0(H, KV + 5 * B), (6, 97)),
    (W0(KV - table(0)(B) + N_Q - 60, FloorDiv(H, 2)), (100, 3)),
]
#: Lookups that compute indices, or do not reach all of the tensor.
OTHERS = [
    (W0(H, FloorDiv(KV - Q + N_Q, 2)), (6, 80)),
    (W0(FloorDiv(Q, 2)), (35,)),
    (W0(H, KV), (6, 91)),
    (W0(Q, KV), (90, 70)),
    (W0(FloorDiv(H, 4)), (2,)),
    (W0(KV, KV), (90, 90)),
]


def _asked(lookup: sympy.Basic, sizes: tuple[int, ...]) -> tuple[Any, Any, torch.Tensor]:
    """A call, the lookup, and what a kernel might have left of it."""
    mask = MaskExpr(KV <= Q + table(0)(B), ("int32",))
    spec = AttentionSpec(mask, score=ScoreProgram(SCORE + lookup, ("float32",)))
    call = SimpleNamespace(shape=SHAPE, learned=[torch.zeros(sizes)])
    tables = [torch.tensor([10, 3], dtype=torch.int32)]
    call.score_data = lambda where: ScoreData(where, *SHAPE[2:], tables, learned=call.learned)
    launchers = kernels_of(KernelSpec(spec, 32, 32, "float32", "interpreter"))
    values = {"SECTION": 0}

    def start(label: str, grid: tuple[int, ...], given: Any, **own: Any) -> None:
        launchers[label](grid, {**values, **given, **own})

    (one,) = looked_up(spec)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(one.shape(call, TILES), generator=generator)
    return SimpleNamespace(call=call, start=start), one, left


@pytest.mark.parametrize("lookup, sizes", PLAIN, ids=str)
def test_sums_are_added_up_by_a_kernel(lookup: sympy.Basic, sizes: tuple[int, ...]) -> None:
    running, one, left = _asked(lookup, sizes)
    assert Merge.of(running.call, one, left, sizes) is not None
    found = gradients._total(running, one, left, torch.float32)
    wanted = gradients._scattered(running.call, one, left.double(), sizes)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    half = gradients._total(running, one, left, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found, rtol=2**-7, atol=0)  # truncated here


@pytest.mark.parametrize(
    "lookup, sizes", [(W0(B, H, Q, KV), (2, 6, 70, 90)), (W0(B, H, Q), (2, 6, 70))], ids=str
)
def test_all_of_the_sums_are_not_copied(lookup: sympy.Basic, sizes: tuple[int, ...]) -> None:
    running, one, left = _asked(lookup, sizes)
    found = gradients._total(running, one, left, torch.float32)
    assert found.data_ptr() == left.data_ptr()
    assert torch.equal(found, left.view(sizes))


@pytest.mark.parametrize("lookup, sizes", OTHERS, ids=str)
def test_computed_indices_are_no_axes(lookup: sympy.Basic, sizes: tuple[int, ...]) -> None:
    running, one, left = _asked(lookup, sizes)
    assert Merge.of(running.call, one, left, sizes) is None
    found = gradients._total(running, one, left, torch.float32)
    assert found.shape == sizes
    assert math.isclose(float(found.double().sum()), float(left.double().sum()), rel_tol=1e-3)
