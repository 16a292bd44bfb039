"""What is relied upon of the operators behind codegen/cpu/flash.py, and the stand-in for them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparse_compile import reference
from sparse_compile.codegen.cpu import flash
from sparse_compile.codegen.cpu.bias import Bias
from sparse_compile.codegen.cpu.flash import Score, Tiles
from tests.tolerance import relative_error

SCALE = 0.3
SCORE = Score(SCALE)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def tiles(dtype: torch.dtype, keys: int = 70) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 2, 40, 16), (3, 2, keys, 16), (3, 2, keys, 16), (3, 2, 40, 16)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def bias_of(allowed: Tensor, dtype: torch.dtype) -> Bias:
    values = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -math.inf)
    empty = ~allowed.any(-1)
    return Bias(values, empty if bool(empty.any()) else None)


def some_allowed(keys: int = 70) -> Tensor:
    allowed = torch.rand(3, 1, 40, keys, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[1, :, 5] = False
    return allowed


def test_signatures() -> None:
    operators = torch.ops.aten
    forward = operators._scaled_dot_product_flash_attention_for_cpu.default._schema
    backward = operators._scaled_dot_product_flash_attention_for_cpu_backward.default._schema
    assert [a.name for a in forward.arguments] == [
        *("query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale")
    ]
    assert [a.name for a in backward.arguments] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"),
        *("attn_mask", "scale"),
    ]
    assert len(forward.returns), len(backward.returns) == (2, 3)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_tiles(dtype: torch.dtype, portable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if portable:
        monkeypatch.setattr(flash, "_operators", lambda: None)
    q, k, v, grad = tiles(dtype)
    allowed = some_allowed()
    bias = bias_of(allowed, dtype)
    out, lse = flash.forward(Tiles(q, k, v, bias, SCORE))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = reference.attention(*leaves, allowed.expand(3, 2, 40, 70), SCALE)
    stored = torch.promote_types(dtype, torch.float32) if portable else dtype
    assert out.dtype == stored
    assert relative_error(out, want) < TOLERANCE[dtype]
    assert bool(lse[1, :, 5].eq(-math.inf).all())  # natural log, and -inf where nothing is seen
    assert relative_error(lse.nan_to_num(neginf=0), want_lse.nan_to_num(neginf=0)) < 1e-4
    grads = flash.backward(
        Tiles(q, k, v, bias, SCORE), grad, out, lse.masked_fill(lse == -math.inf, 0.0)
    )
    expected = torch.autograd.grad(want, leaves, grad.double())
    for value, truth in zip(grads, expected, strict=True):
        assert value.dtype == stored
        assert relative_error(value, truth) < TOLERANCE[dtype]


def test_keys_masked_for_longer_than_the_inner_block() -> None:
    q, k, v, _ = tiles(torch.float32, keys=1200)
    allowed = torch.ones(1, 1, 40, 1200, dtype=torch.bool)
    allowed[..., :1100] = False
    out, lse = flash.forward(Tiles(q, k, v, bias_of(allowed, torch.float32), SCORE))
    want, want_lse = reference.attention(q, k[:, :, 1100:], v[:, :, 1100:], None, SCALE)
    assert relative_error(out, want) < 1e-5
    assert relative_error(lse, want_lse) < 1e-5


def test_overlapping_views_are_read_in_place() -> None:
    x = torch.randn(1, 2, 200, 16)
    views = x.as_strided((5, 2, 64, 16), (32 * 16, 200 * 16, 16, 1))
    shared = x[:, :1].expand(1, 2, 200, 16)
    for k in (views, shared):
        q = torch.randn(k.shape[0], 2, 8, 16)
        results = [flash.forward(Tiles(q, y, y, None, SCORE)) for y in (k, k.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        out, lse = results[0]
        grads = [
            flash.backward(Tiles(q, y, y, None, SCORE), q, out, lse) for y in (k, k.contiguous())
        ]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("portable", [False, True])
def test_backward_composes_over_parts_of_the_keys(
    portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portable:
        monkeypatch.setattr(flash, "_operators", lambda: None)
    q, k, v, grad = tiles(torch.float64)
    out, lse = flash.forward(Tiles(q, k, v, None, SCORE))
    whole = flash.backward(Tiles(q, k, v, None, SCORE), grad, out, lse)
    parts = [
        flash.backward(Tiles(q, k[:, :, s], v[:, :, s], None, SCORE), grad, out, lse)
        for s in (slice(0, 30), slice(30, 70))
    ]
    assert relative_error(parts[0][0] + parts[1][0], whole[0]) < 1e-12
    assert relative_error(torch.cat([parts[0][1], parts[1][1]], 2), whole[1]) < 1e-12
    assert relative_error(torch.cat([parts[0][2], parts[1][2]], 2), whole[2]) < 1e-12
