"""The kernel that scores windows compiles for the architectures that are supported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy

from sparse_compile.codegen.entry import Resources
from sparse_compile.codegen.triton.aot import compiled
from sparse_compile.codegen.triton.layout.key import Key
from sparse_compile.codegen.triton.selection.window_scores import WindowSpec, window_kernel
from sparse_compile.expr import KV, MaskExpr, Q
from sparse_compile.spec.view import natural

CAUSAL = MaskExpr(KV <= Q)


def used_by(
    heads: int, dim: int, arch: int, mask: MaskExpr = CAUSAL, dtype: str = "bfloat16"
) -> Resources:
    key = replace(Key.of(mask, [], natural(1), natural(16)), span=256)
    spec = WindowSpec(key, heads, dim, dtype, 2, 2, 4, 1, True, f"sm_{arch}")
    return compiled(window_kernel(spec), arch).resources["window_scores"]


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_of_many_heads(arch: int) -> None:
    used = used_by(16, 128, arch)
    assert used.spills == 0
    assert used.shared <= (200 << 10 if arch in (90, 100) else 99 << 10)
    assert arch != 90 or "wgmma" in used.ptx


def test_of_one_head() -> None:
    used = used_by(1, 128, 90, MaskExpr(sympy.true), "float16")
    assert used.spills <= 64
    assert used.shared <= 200 << 10


@pytest.mark.parametrize("arch", [80, 90])
def test_of_many_channels(arch: int) -> None:
    used = used_by(4, 256, arch)
    # Ampere holds products and queries in registers.
    assert used.spills <= (1024 if arch == 80 else 64)
    assert used.shared <= (227 << 10 if arch != 80 else 99 << 10)
